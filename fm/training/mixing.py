"""The mixture of datasets that a run draws: its schedule, and the shares that change during the run.

With adaptive sampling (paper section 4.2), shares follow the scores of the validations inside the run, at multiples of
validation.every. A checkpoint of such a step is written before its validation, so a run that continues from there
validates first: the averaged weights are the same, so the scores and the shares are the same.

With the recipe's section `adapt`, only the new datasets are drawn in the first `alone_steps` steps; after that they
have the share `share`, and the other datasets are drawn again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator

from data_pipeline.errors import UserError
from data_pipeline.schema import nearest
from data_pipeline.windows.schedule import Schedule, Source, adaptive_shares, carry_scores, sampling_shares
from fm.config import AdaptSettings, Recipe
from fm.distributed import broadcast_from_main


class Mixing:
    """The schedule of a run; `schedule` is replaced whenever the shares change."""

    def __init__(self, recipe: Recipe, sources: Sequence[Source]) -> None:
        sampling = recipe.sampling
        self._sampling, self._train, self._every = sampling, recipe.train, recipe.validation.every
        self.adaptive = sampling.scheme == "adaptive"
        self._scores: dict[str, float] = {}  # the last usable score of each dataset, on the main process
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
            self.schedule = self.schedule.with_shares(0, self._adaptive_shares())
        if recipe.adapt is not None:
            self.schedule = with_new_datasets(self.schedule, recipe.adapt, recipe.train.draws)

    def changes_at(self, step: int) -> bool:
        """Return whether the steps after `step` have new shares, once `step` is validated."""
        return self.adaptive and 0 < step < self._train.steps and step % self._every == 0

    def known_until(self, step: int) -> int:
        """Return the last step whose draws are known after `step` steps: the next change of shares, or the end."""
        return min(self._train.steps, (step // self._every + 1) * self._every) if self.adaptive else self._train.steps

    def follow(self, ratios: Mapping[str, float | None] | None, step: int, accelerator: Accelerator) -> list[str]:
        """Change the shares after `step` on all processes and return the datasets without a usable score. Collective.

        `ratios` are one-step VRMSE over persistence's by dataset on the main process, None on the others. A dataset
        without a usable score keeps its last one, or counts as the average if it never had one.
        """
        unscored: list[str] = []
        if ratios is not None:
            scores = {name: ratios.get(name) for name in self.schedule.shares}
            self._scores, unscored = carry_scores(self._scores, scores)
        shares = broadcast_from_main(accelerator, self._adaptive_shares)
        self.schedule = self.schedule.with_shares(step * self._train.draws, shares)
        return unscored

    def state(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint of `step` keeps, as JSON: the scores, and the shares up to that step."""
        history = [[first, shares] for first, shares in self.schedule.history if first <= step * self._train.draws]
        return {"history": history, "scores": self._scores}

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Restore the `state` of a checkpoint of `step`. Shares that the recipe has changed since begin there."""
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
        # not ==: another machine may compute the recipe's shares with another last digit
        if any(abs(shares[name] - share) > 1e-12 for name, share in self.schedule.shares.items()):
            self.schedule = self.schedule.with_shares(draws, shares)
        for first, later in planned.history:
            if first > draws:
                self.schedule = self.schedule.with_shares(first, later)

    def _adaptive_shares(self) -> dict[str, float]:
        base = sampling_shares(self.schedule.sources, "adaptive")
        return adaptive_shares(base, self._scores, self._sampling.power, self._sampling.floor)


def with_new_datasets(schedule: Schedule, adapt: AdaptSettings, draws: int) -> Schedule:
    """Return the schedule with the shares that `adapt` asks for; a step has `draws` draws.

    Raises UserError if the run does not have the new datasets, or if it gives them, or all others, no share.
    """
    shares = schedule.shares
    for name in adapt.datasets:
        if name not in shares:
            raise UserError(f"adapt.datasets: no dataset {name!r} in this run. {nearest(name, sorted(shares))}")
    if adapt.share is not None and set(shares) <= set(adapt.datasets):
        raise UserError(
            "adapt.share: expected datasets beside the new ones to divide the other draws among, got "
            f"{', '.join(sorted(shares))} alone; name more in data.datasets, or set adapt.share=null"
        )
    if not adapt.alone_steps and adapt.share is None:
        return schedule
    new = {name: share for name, share in shares.items() if name in adapt.datasets}
    others = {name: share for name, share in shares.items() if name not in adapt.datasets}
    if not sum(new.values()):
        raise UserError(f"adapt: sampling.weights gives {', '.join(new)} no share; expected a weight above 0")
    if adapt.share is not None:
        if not sum(others.values()):
            raise UserError("adapt.share: sampling.weights leaves the other datasets no share; set adapt.share=null")
        shares = _scaled(new, adapt.share) | _scaled(others, 1 - adapt.share)
    if not adapt.alone_steps:
        return schedule.with_shares(0, shares)
    alone = _scaled(new, 1.0) | dict.fromkeys(others, 0.0)
    return schedule.with_shares(0, alone).with_shares(adapt.alone_steps * draws, shares)


def _scaled(shares: Mapping[str, float], total: float) -> dict[str, float]:
    """Return shares in the same proportions whose sum is `total`."""
    return {name: total * share / sum(shares.values()) for name, share in shares.items()}
