"""The mixture of datasets a run draws: its schedule, and with adaptive sampling the shares that follow its scores.

Shares change after the validations inside a run, at multiples of validation.every. A checkpoint of such a step is
written before its validation, so a run that continues from there validates first: the averaged weights are the same,
so are the scores, and so are the shares.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from data_pipeline.files import UserError
from data_pipeline.windows.schedule import Schedule, Source, adaptive_shares, carry_scores, sampling_shares
from fm.config import Recipe
from fm.training.optim import adapted


class Mixing:
    """The schedule of a run; `schedule` is replaced whenever shares change."""

    def __init__(self, recipe: Recipe, sources: Sequence[Source]) -> None:
        sampling = recipe.sampling
        self._sampling, self._train, self._every = sampling, recipe.train, recipe.validation.every
        self.adaptive = sampling.scheme == "adaptive"
        self._scores: dict[str, float] = {}  # the last usable score of each dataset; kept up on the main process
        self.schedule = Schedule(
            sources,
            batch=recipe.train.batch,
            seed=recipe.run.seed,
            scheme=sampling.scheme,
            temperature=sampling.temperature,
            weights=sampling.weights,
            shuffle=sampling.shuffle,
            shards_per_block=sampling.shards_per_block,
        )
        if self.adaptive:
            self.schedule = self.schedule.with_shares(0, self._shares())
        self.schedule = adapted(self.schedule, recipe.adapt, recipe.train.draws)

    def changes_at(self, step: int) -> bool:
        """Whether new shares hold for the steps after `step`, once it is validated."""
        return self.adaptive and 0 < step < self._train.steps and step % self._every == 0

    def known_until(self, step: int) -> int:
        """The last step whose draws are known after `step` steps: that of the next change, or of the run."""
        return min(self._train.steps, (step // self._every + 1) * self._every) if self.adaptive else self._train.steps

    def follow(self, ratios: Mapping[str, float | None] | None, step: int, accelerator: Accelerator) -> list[str]:
        """Let the shares after `step` follow one-step VRMSE over persistence's by dataset, on all processes.

        The main process has the ratios; the others pass None and get its shares. Returns the datasets without a usable
        one: their last score stands, or if they never had one they count as the average.
        """
        shares = self.schedule.shares
        unscored: list[str] = []
        if ratios is not None:
            self._scores, unscored = carry_scores(self._scores, {name: ratios.get(name) for name in shares})
            shares = self._shares()
        if accelerator.num_processes > 1:
            values = torch.tensor(list(shares.values()), dtype=torch.float64, device=accelerator.device)
            shares = dict(zip(shares, broadcast(values).tolist(), strict=True))
        self.schedule = self.schedule.with_shares(step * self._train.draws, shares)
        return unscored

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` keeps, as JSON: of the shares those up to there."""
        history = [[first, shares] for first, shares in self.schedule.history if first <= step * self._train.draws]
        return {"history": history, "scores": self._scores}

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Take up the `state` of a checkpoint of `step`; where the recipe's shares have changed, theirs begin there.

        Raises UserError where the state does not fit the run.
        """
        planned, draws = self.schedule, step * self._train.draws
        try:
            if any(first > draws for first, _ in saved["history"]):
                raise ValueError(f"it goes beyond draw {draws}, where step {step} begins with this train.draws")
            self.schedule = self.schedule.with_history(saved["history"])
            self._scores, _ = carry_scores({}, saved["scores"])
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"the checkpoint's history of sampling shares does not fit this run: {error}. Resume with the datasets "
                "and train.draws that it was trained with, or start afresh in another folder with run.dir=..."
            ) from error
        if self.adaptive:
            return
        shares = planned.shares_at(draws)
        # not ==: another machine may give the recipe's shares another last digit
        if any(abs(shares[name] - share) > 1e-12 for name, share in self.schedule.shares.items()):
            self.schedule = self.schedule.with_shares(draws, shares)
        for first, later in planned.history:
            if first > draws:
                self.schedule = self.schedule.with_shares(first, later)

    def _shares(self) -> dict[str, float]:
        base = sampling_shares(self.schedule.sources, "adaptive")
        return adaptive_shares(base, self._scores, self._sampling.power, self._sampling.floor)
