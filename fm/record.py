"""The record of a run: recipe.yaml, run.json, logs, TensorBoard, the console. Main process only; silent elsewhere."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from types import TracebackType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.files import atomic_file
from data_pipeline.windows.schedule import Schedule
from fm.adapt import rates_after
from fm.evaluation.validation import ValidationResult, protocol_windows
from fm.guard import Refusal
from fm.report.cosines import Cosines
from fm.runtime import peak_memory_bytes
from fm.settings import Recipe, dump_recipe
from fm.surrogate import Surrogate
from fm.tracking import Dashboard, EventLog, StepLog, progress_bar, write_process


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did, over all processes. A step may hold several draws (train.draws)."""

    step: int  # optimiser steps done, this one included
    datasets: tuple[str, ...]  # one per draw
    grids: tuple[tuple[int, int], ...]  # (H, W), one per draw
    windows: str  # digest of the global batches' window ids
    losses: tuple[float, ...]  # one per draw
    mse: float
    wavelet_l1: float
    grad_norm: float  # before clipping
    lr: float
    samples: int  # windows
    model_calls: tuple[int, ...]  # forward passes of the unroll, one number per draw
    data_seconds: float
    seconds: float
    stop: bool  # a process was asked to stop

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def tokens(self) -> int:
        """Token updates: windows x model calls x H W / 4."""
        windows = self.samples // len(self.grids)
        calls = zip(self.grids, self.model_calls, strict=True)
        return sum(windows * count * h * w // 4 for (h, w), count in calls)


class RunRecord(AbstractContextManager):
    """Receives what the trainer does, from the step at which the run starts or continues.

    `model` is a whole model like the one that is trained, None where nothing is recorded: on all processes but the main
    one. `spread` says how the model is spread over processes.
    """

    def __init__(self, recipe: Recipe, schedule: Schedule, model: Surrogate | None, step: int, spread: str) -> None:
        self.recipe, self.schedule, self.active = recipe, schedule, model is not None
        self._flops: dict[str, float] = {}  # dataset -> training FLOPs of one model call on one window
        self._since: list[StepResult] = []  # steps since the last scalars
        self._repeated: set[str] = set()  # datasets that a warning was given for
        self._done = step  # optimiser steps
        self.ended: str | None = None  # why the run is over before its last step, if it is
        if model is None:
            return
        self.model = model
        directory = recipe.run.directory
        directory.mkdir(parents=True, exist_ok=True)
        text = dump_recipe(replace(recipe, **{model.section: model.config}))
        with atomic_file(directory / "recipe.yaml", durable=False) as file:
            file.write(text.encode())
        write_process(directory / "run.json", spread)
        self._log = StepLog(directory / "log.jsonl", step)
        self._events = EventLog(directory / "events.jsonl", step)
        windows = protocol_windows(recipe.validation.protocol)
        self._board = Dashboard(directory / "tensorboard", schedule.shares, windows, step, self._events.saved)
        self._board.text("recipe", f"```yaml\n{text}```", step)
        if step:
            self._since = [StepResult(**saved) for saved in self._events.saved["pending"] if _is_result(saved)]
            for text in self._events.refusals:
                self._board.text("events", text, step)
            self._tell("start", f"continued from step {step}", step)
        else:
            self._events.write("start", step, text="started")
        self._bar = progress_bar(recipe.train.steps, step, recipe.run.name, shown=recipe.tracking.progress)
        self._warn_of_repeats(recipe.train.steps, step)
        for ignored in recipe.finetune.ignored() if recipe.finetune else ():
            self.say(f"warning: finetune.{ignored}")
        if recipe.sampling.scheme == "adaptive" and recipe.train.steps <= recipe.validation.every:
            self.say(
                f"sampling.scheme: adaptive changes nothing in {recipe.train.steps} steps, since the first validation "
                f"is after {recipe.validation.every}; lower validation.every"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self._events.write("end", self._done, **self._ending(error))
            self._bar.close()
            self._log.close()
            self._events.close()
            self._board.close()

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            self._bar.write(message, file=sys.stderr)

    def event(self, message: str, step: int) -> None:
        """Print a message, and keep it among TensorBoard's events."""
        if self.active:
            self._tell("message", message, step)
            self.say(f"step {step}: {message}")

    def refusal(self, refusal: Refusal, step: int) -> None:
        """Log that the guard refused a step; `step` is where the record stands, or where a run goes back to."""
        if self.active:
            facts = {"refused": refusal.step, "reason": refusal.reason, "action": refusal.action}
            self._tell("guard", refusal.text, step, **facts, windows=refusal.windows)
            self.say(refusal.text)

    def step(self, result: StepResult) -> None:
        """Log one optimiser step: every one in log.jsonl, TensorBoard scalars every tracking.every."""
        if not self.active:
            return
        dataset = "+".join(result.datasets)
        entry = {"step": result.step, "dataset": dataset, "windows": result.windows}
        self._log.write({**entry, "loss": result.loss, "lr": result.lr})
        for name, loss in zip(result.datasets, result.losses, strict=True):
            self._board.scalars({f"train_loss/{name}": loss}, result.step)
        self._since.append(result)
        self._done = result.step
        self._bar.update()
        if result.step % self.recipe.tracking.every == 0 or result.step == self.recipe.train.steps:
            self._scalars(result)

    def settle(self, step: int) -> None:
        """Called before a checkpoint of `step` is written: a run that continues from it finds this record whole."""
        if self.active:
            pending = [asdict(result) for result in self._since]
            self._events.write("save", step, **self._board.settle(step), pending=pending)

    def validation(self, result: ValidationResult, step: int) -> None:
        """Log the scores and pictures of a validation after `step` steps."""
        if not self.active:
            return
        self._board.scalars(result.scalars(), step)
        for sample in result.samples.values():
            self._board.rollout(sample, step)
        ratio = result.mean_ratio
        self._events.write("validation", step, mean_ratio=ratio, datasets=result.one_step())
        self.say(
            f"step {step}: valid one-step VRMSE / persistence, geometric mean {ratio:.3f}"
            if ratio
            else f"step {step}: validated"
        )

    def verdict(self, text: str, step: int) -> None:
        """Log what the gate says of a validation after `step` steps."""
        if self.active:
            self._tell("gate", text, step)
            self.say(f"step {step}: {text}")

    def cosines(self, cosines: Cosines, step: int) -> None:
        """Log how the gradients of the datasets agreed after `step` steps."""
        if self.active:
            self._board.cosines(cosines, step)
            self._events.write("cosine", step, **cosines.to_json())

    def shares(self, schedule: Schedule, unscored: Sequence[str], step: int) -> None:
        """Log that `schedule` takes over after `step` steps; `unscored` datasets had no usable validation score."""
        before, after, self.schedule = self.schedule.shares, schedule.shares, schedule
        if not self.active:
            return
        changes = {name: f"{name} {before[name]:.4f} -> {after[name]:.4f}" for name in after}
        largest = sorted(changes, key=lambda name: abs(after[name] - before[name]), reverse=True)[:3]
        notes = [f"no finite score of {name}: its last one stands, or else the average" for name in unscored]
        body = "\n".join(f"- {line}" for line in [*changes.values(), *notes])
        self._tell("shares", f"sampling shares from here on\n\n{body}", step)
        self.say(f"step {step}: sampling shares, largest changes: {', '.join(changes[name] for name in largest)}")
        for note in notes:
            self.say(f"step {step}: {note}")

    def _tell(self, kind: str, text: str, step: int, **facts: Any) -> None:
        """Keep a message in events.jsonl and among TensorBoard's events."""
        self._events.write(kind, step, text=text, **facts)
        self._board.text("events", text, step)

    def _ending(self, error: BaseException | None) -> dict[str, str]:
        if error is not None:
            reason = str(error).strip().partition("\n")[0]
            return {"state": "failed", "text": f"{type(error).__name__}: {reason}" if reason else type(error).__name__}
        if self.ended is not None:
            return {"state": "finished", "text": self.ended}
        if self._done < self.recipe.train.steps:
            return {"state": "interrupted", "text": f"ended after step {self._done}, as asked"}
        return {"state": "finished", "text": f"finished after step {self._done}"}

    def _warn_of_repeats(self, until: int, step: int) -> None:
        """Warn once of each dataset that the first `until` steps pass over more often than sampling.max_passes."""
        limit = self.recipe.sampling.max_passes
        if limit is None:
            return
        passes = self.schedule.passes(until * self.recipe.train.draws)
        for name in [name for name in passes if passes[name] > limit and name not in self._repeated]:
            self._repeated.add(name)
            warning = repeat_warning(name, passes[name], limit, until)
            if until > step and self.recipe.sampling.scheme == "adaptive":
                warning = f"at the present shares, {warning}"
            self._tell("warning", warning, step)
            self.say(f"warning: {warning}")

    def _scalars(self, last: StepResult) -> None:
        """Means over the steps since the last call; throughput while stepping, without validations and checkpoints."""
        steps, self._since = self._since, []
        elapsed = sum(s.seconds for s in steps)
        draws = last.step * self.recipe.train.draws
        counts, passes = self.schedule.counts(draws), self.schedule.passes(draws)
        samples = sum(s.samples for s in steps)
        values = {
            "train/loss": sum(s.loss for s in steps) / len(steps),
            "train/mse": sum(s.mse for s in steps) / len(steps),
            "train/wavelet_l1": sum(s.wavelet_l1 for s in steps) / len(steps),
            "train/grad_norm": sum(s.grad_norm for s in steps) / len(steps),
            "train/lr": last.lr,
            "throughput/samples_per_s": samples / elapsed,
            "throughput/tokens_per_s": sum(s.tokens for s in steps) / elapsed,
            "throughput/tflops": sum(self._step_flops(s) for s in steps) / elapsed / 1e12,
            "throughput/data_wait_fraction": sum(s.data_seconds for s in steps) / elapsed,
            "throughput/peak_memory_gb": peak_memory_bytes() / 1e9,
        }
        if self.recipe.adapt is not None:
            rates = rates_after(self.recipe.adapt, last.step - 1)
            values |= {f"learning_rate/{part}": last.lr * rate for part, rate in rates.items()}
        for name, share in self.schedule.shares_at(draws - 1).items():
            values[f"sampling/target_share/{name}"] = share
            values[f"sampling/drawn_share/{name}"] = counts[name] / draws
            values[f"sampling/passes/{name}"] = passes[name]
        self._board.scalars(values, last.step)
        self._events.write("pace", last.step, steps=len(steps), seconds=elapsed, samples=samples)
        self._warn_of_repeats(last.step, last.step)
        self._bar.set_postfix_str(f"loss {values['train/loss']:.3f}, {samples / elapsed:.1f} samples/s")

    def _step_flops(self, step: StepResult) -> float:
        windows = step.samples // len(step.datasets)
        return sum(
            windows * calls * self._call_flops(name, grid)
            for name, grid, calls in zip(step.datasets, step.grids, step.model_calls, strict=True)
        )

    def _call_flops(self, dataset: str, grid: tuple[int, int]) -> float:
        """Forward and backward FLOPs of one window: three times the counted forward pass (matrix and convolution)."""
        if dataset not in self._flops:
            spec = self.model.specs[dataset]
            device = next(self.model.parameters()).device
            state = torch.zeros(1, len(spec.state_channels), *grid, device=device)
            constants = torch.zeros(1, len(spec.constant_channels), *grid, device=device)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                self.model(state, constants, dataset)
            self._flops[dataset] = 3.0 * counter.get_total_flops()
        return self._flops[dataset]


def _is_result(saved: dict[str, Any]) -> bool:
    """Whether an entry is a step's result as this version writes them; model_calls was one number once."""
    return saved.keys() == {field.name for field in fields(StepResult)} and isinstance(saved["model_calls"], list)


def repeat_warning(dataset: str, passes: float, limit: float, steps: int) -> str:
    """What to say of a dataset that `steps` steps pass over more often than `limit`."""
    return (
        f"{steps} steps pass {passes:.1f} times over {dataset}, more than sampling.max_passes={limit:g}; it may be "
        "learnt by heart. Add trajectories, lower its share (sampling.scheme, sampling.weights) or train.steps, or "
        "raise the limit (null: no limit)."
    )
