"""The record of a run: what training writes to the run directory, to TensorBoard and to the console.

Only the main process writes (`RunRecord`). Other processes have a `NullRecord`, which ignores everything. The run
directory gets recipe.yaml, the logs (fm/training/runlog.py) and TensorBoard's files (fm/training/tensorboard.py).
"""

import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, ClassVar

import torch

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_file, sha256
from data_pipeline.schema import validate
from data_pipeline.windows.reader import ShardReader
from data_pipeline.windows.schedule import Schedule
from fm.config import Recipe, ValidationSettings, dump_recipe, recipe_to_dict
from fm.distributed import peak_memory_bytes
from fm.evaluation.cosines import Cosines
from fm.evaluation.evaluate import ValidationResult
from fm.evaluation.protocol import load_protocol
from fm.model.surrogate import Surrogate
from fm.training.console import Console, print_quietly
from fm.training.flops import forward_flops, forward_passes
from fm.training.guard import RefusedStep, SlowSteps, slow_steps_warning
from fm.training.objective import unroll_length
from fm.training.optim import part_rates
from fm.training.runlog import EventLog, JsonLog, environment, write_process
from fm.training.step import PendingStep
from fm.training.tensorboard import Dashboard, flat_settings, start_trackers


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all processes. A step may consist of several draws (train.draws)."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # for `validate`; a loss may be NaN

    step: int  # optimizer steps done, this one included
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
    cpu_seconds: float  # of the main process
    stop: bool  # a process received a signal to stop

    @classmethod
    def of(
        cls, taken: PendingStep, took: tuple[float, float], recipe: Recipe, readers: Mapping[str, ShardReader]
    ) -> "StepResult":
        """Return the result of a step that took (seconds, CPU seconds); `readers` are those of the training data."""
        names, metrics, length = [draw.dataset for draw in taken.draws], taken.metrics, recipe.train.steps
        return cls(
            step=taken.step + 1,
            datasets=tuple(names),
            grids=tuple(readers[name].manifest.grid for name in names),
            windows=sha256("".join(draw.digest() for draw in taken.draws).encode())[:16],
            losses=tuple(metrics.losses),
            mse=metrics.mse,
            wavelet_l1=metrics.wavelet_l1,
            grad_norm=metrics.grad_norm,
            lr=taken.learning_rate,
            samples=recipe.train.global_batch,
            model_calls=tuple(unroll_length(taken.step, length, recipe.finetune, name) for name in names),
            data_seconds=taken.data_seconds,
            seconds=took[0],
            cpu_seconds=took[1],
            stop=metrics.stop_requested,
        )

    @property
    def loss(self) -> float:
        """Return the mean loss of the draws."""
        return sum(self.losses) / len(self.losses)

    @property
    def tokens(self) -> int:
        """Return the number of token updates: windows x model calls x H W / 4."""
        windows = self.samples // len(self.grids)
        calls = zip(self.grids, self.model_calls, strict=True)
        return sum(windows * count * h * w // 4 for (h, w), count in calls)


class NullRecord(AbstractContextManager["NullRecord"]):
    """The record on processes other than the main one, with the methods of RunRecord."""

    end_reason: str | None = None
    interrupted = False

    def _ignore(self, *arguments: Any) -> None:
        pass

    __exit__ = print = log_text = log_refusal = log_step = log_validation = log_cosines = log_shares = flush = _ignore


class RunRecord(AbstractContextManager["RunRecord"]):
    """The record on the main process, from the step at which the run starts or continues.

    `end_reason` may be set to explain why the run ends before its last step, `interrupted` if it was asked to stop.
    """

    def __init__(self, recipe: Recipe, schedule: Schedule, model: Surrogate, step: int, spread: str) -> None:
        """Open the files in the run directory.

        `model` is a whole model like the one that is trained; `spread` describes how the trained model is distributed
        over processes.
        """
        self.end_reason: str | None = None
        self.interrupted = False
        self._recipe, self._schedule, self._step = recipe, schedule, step
        self._stops_on_failure = recipe.checkpoint.on_error == "stop"
        self._warned: set[str] = set()  # datasets with a warning of too many passes
        self._slow_steps, self._device = SlowSteps(), next(model.parameters()).device
        resolved = replace(recipe, **{model.section: model.config})
        directory, names = recipe.run.directory, sorted(schedule.shares)
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_file(directory / "recipe.yaml", durable=False) as file:
            file.write(dump_recipe(resolved).encode())
        write_process(directory / "run.json", spread)
        self._log = JsonLog(directory / "log.jsonl", lambda line: line["step"] <= step, self._report_failure)
        self._events = EventLog(directory / "events.jsonl", step, self._report_failure)
        where = f"{directory / 'events.jsonl'}: damaged line of kind save at step {step}, remove it: pending"
        pending: tuple[StepResult, ...] = ()
        if step:
            pending = validate(tuple[StepResult, ...], self._events.saved["pending"], where)
        self._meter = Meter(model, recipe, pending)

        settings = flat_settings(recipe_to_dict(resolved), names)
        others = recipe.tracking.log_with or ()
        trackers = start_trackers(others, recipe.run.name, directory / "trackers", settings)
        windows = list(load_protocol(recipe.validation.protocol).windows)
        folder = directory / "tensorboard"
        saved = self._events.saved
        self._board = Dashboard(folder, names, windows, step, saved, settings, trackers, self._report_failure)
        self._board.text("recipe", f"```yaml\n{dump_recipe(resolved)}```", step)
        facts = environment(self._device, spread)
        rows = [f"| | from step {step} |", "|:--|:--|", *(f"| {name} | {fact} |" for name, fact in facts.items())]
        self._board.text("environment", "\n".join(rows), step)
        if step:
            for text in self._events.refusals:
                self._board.text("events", text, step)
            self._write_text("start", f"continued from step {step}", step)
        else:
            self._log_event("start", step, text="started")

        run, scores, shown = recipe.run.name, self._events.scores, recipe.tracking.progress
        self._console = Console(run, recipe.train.steps, step, names, scores, shown=shown)
        self._warn_of_passes(recipe.train.steps, step)
        for ignored in recipe.finetune.ignored() if recipe.finetune else ():
            self.print(f"warning: finetune.{ignored}")
        if recipe.sampling.scheme == "adaptive" and recipe.train.steps <= recipe.validation.every:
            self.print(
                f"sampling.scheme: adaptive changes nothing in {recipe.train.steps} steps, since the first validation "
                f"is after {recipe.validation.every}; lower validation.every"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stops_on_failure = False  # the run ends anyway, perhaps for this reason
        state, text = "finished", self.end_reason or f"finished after step {self._step}"
        if error is not None:
            reason = str(error).strip().partition("\n")[0]
            state, text = "failed", f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        elif self.interrupted or (self.end_reason is None and self._step < self._recipe.train.steps):
            state, text = "interrupted", f"ended after step {self._step}, as asked"
        self._log_event("end", self._step, state=state, text=text)
        self._console.close()
        self._log.close()
        self._events.close()
        self._board.close({"finished": True, "failed": False}.get(state))

    def print(self, message: str) -> None:
        """Print a message."""
        self._console.print(message)

    def log_text(self, kind: str, text: str, step: int) -> None:
        """Print a text of a kind of events.jsonl, and add it there and to TensorBoard's events."""
        self._write_text(kind, text, step)
        self.print(f"step {step}: {text}")

    def log_refusal(self, refusal: RefusedStep, step: int) -> None:
        """Log a refused step; `step` is the last step of the record, or the step that a run rolls back to."""
        facts = {"refused": refusal.step, "reason": refusal.reason, "action": refusal.action}
        self._write_text("guard", refusal.text, step, **facts, windows=refusal.windows)
        self.print(refusal.text)

    def log_step(self, result: StepResult) -> None:
        """Log one optimizer step: each step in log.jsonl, means of tracking.every steps in TensorBoard."""
        entry = {"step": result.step, "dataset": "+".join(result.datasets), "windows": result.windows}
        loss = result.loss if math.isfinite(result.loss) else None
        self._log.write({**entry, "loss": loss, "lr": result.lr})
        self._meter.results.append(result)
        self._step = result.step
        self._warn_of_slow_steps(result)
        self._console.update_losses(result.step, dict(zip(result.datasets, result.losses, strict=True)))
        if result.step % self._recipe.tracking.every == 0 or result.step == self._recipe.train.steps:
            self._log_scalars(result.step)

    def log_validation(self, result: ValidationResult, step: int) -> None:
        """Log the scores and pictures of a validation after `step` steps."""
        self._board.scalars(result.scalars(), step)
        if draws_pictures(step, self._recipe):
            for sample in result.samples.values():
                self._board.rollout(sample, step)
        self._console.update_scores(result.one_step())
        ratio = result.scores.geometric_mean_ratio_to_persistence
        self._log_event("validation", step, mean_ratio=ratio, datasets=result.one_step())
        scores = f"valid one-step VRMSE / persistence, geometric mean {ratio:.3f}" if ratio else "validated"
        self.print(f"step {step}: {scores}")

    def log_cosines(self, cosines: Cosines, step: int) -> None:
        """Log the cosines between the gradients of the datasets after `step` steps."""
        every, tracking = self._recipe.tracking.gradient_cosine_every, self._recipe.tracking
        picture = is_chosen(step // every, self._recipe.train.steps // every, tracking.pictures)
        self._board.cosines(cosines, step, picture)
        self._log_event("cosine", step, **cosines.to_json())

    def log_shares(self, schedule: Schedule, unscored: Sequence[str], step: int) -> None:
        """Log the schedule of the steps after `step`; `unscored` datasets had no usable validation score."""
        before, after, self._schedule = self._schedule.shares, schedule.shares, schedule
        changes = {name: f"{name} {before[name]:.4f} -> {after[name]:.4f}" for name in after}
        largest = sorted(changes, key=lambda name: abs(after[name] - before[name]), reverse=True)[:3]
        notes = [f"no finite score of {name}: its last one stands, or else the average" for name in unscored]
        body = "\n".join(f"- {line}" for line in [*changes.values(), *notes])
        self._write_text("shares", f"sampling shares from here on\n\n{body}", step)
        self.print(f"step {step}: sampling shares, largest changes: {', '.join(changes[name] for name in largest)}")
        for note in notes:
            self.print(f"step {step}: {note}")

    def flush(self, step: int) -> None:
        """Write everything to the files, so that a run which continues from the checkpoint of `step` finds it."""
        self._board.text("saves", f"checkpoint of step {step}", step)
        self._log_event("save", step, **self._board.flush(step), pending=[asdict(one) for one in self._meter.results])

    def _report_failure(self, message: str) -> None:
        """Raise UserError because a file of the record cannot be written, or report it (checkpoint.on_error)."""
        if self._stops_on_failure:
            raise UserError(
                f"{message}. Free some space, then start the same command again: it continues from the newest whole "
                "checkpoint (with checkpoint.on_error=continue, training goes on without space)."
            )
        note = "is kept in memory until there is space. Training goes on (checkpoint.on_error: continue)."
        print_quietly(f"{message}; what comes {note}")

    def _log_event(self, kind: str, step: int, **facts: Any) -> None:
        self._events.write({"kind": kind, "step": step, "time": time.time(), **facts})

    def _write_text(self, kind: str, text: str, step: int, **facts: Any) -> None:
        self._log_event(kind, step, text=text, **facts)
        self._board.text("events", text, step)

    def _log_scalars(self, step: int) -> None:
        """Write the means of the steps since the last call, and what the schedule has drawn so far."""
        values, pace = self._meter.read()
        draws = step * self._recipe.train.draws
        counts, passes = self._schedule.counts(draws), self._schedule.passes(draws)
        if self._recipe.adapt is not None:
            rates = part_rates(self._recipe.adapt, step - 1)
            values |= {f"learning_rate/{part}": values["train/lr"] * rate for part, rate in rates.items()}
        for name, share in self._schedule.shares_at(draws - 1).items():
            values[f"sampling/target_share/{name}"] = share
            values[f"sampling/drawn_share/{name}"] = counts[name] / draws
            values[f"sampling/passes/{name}"] = passes[name]
        self._board.scalars(values, step)
        self._log_event("pace", step, **pace)
        self._warn_of_passes(step, step)
        self._console.update_values(values)

    def _warn_of_passes(self, until: int, step: int) -> None:
        """Warn once of each dataset that the first `until` steps pass over more often than sampling.max_passes."""
        limit = self._recipe.sampling.max_passes
        if limit is None:
            return
        for name, passes in self._schedule.passes(until * self._recipe.train.draws).items():
            if passes > limit and name not in self._warned:
                self._warned.add(name)
                warning = passes_warning(name, passes, limit, until)
                if until > step and self._recipe.sampling.scheme == "adaptive":
                    warning = f"at the present shares, {warning}"
                self._write_text("warning", warning, step)
                self.print(f"warning: {warning}")

    def _warn_of_slow_steps(self, result: StepResult) -> None:
        """Warn once if steps suddenly take much longer than steps of the same datasets and unroll lengths did.

        Steps of several draws rarely have equal work, so the time of a token is compared. Waits for data do not count.
        """
        kind = (result.datasets, result.model_calls) if len(result.datasets) == 1 else len(result.datasets)
        factor = self._slow_steps.find(kind, max(result.seconds - result.data_seconds, 0.0) / result.tokens)
        if factor is not None:
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            warning = slow_steps_warning(factor, torch.get_num_threads(), processes, self._device.type)
            self._write_text("warning", warning, result.step)
            self.print(f"step {result.step}: warning: {warning}")


class Meter:
    """Returns the means and the speed of the optimizer steps in `results`, those since the last reading."""

    def __init__(self, model: Surrogate, recipe: Recipe, results: Iterable[StepResult]) -> None:
        self._model, self._num_steps, self._finetune = model, recipe.train.steps, recipe.finetune
        self.results = list(results)
        self._flops: dict[str, int] = {}  # dataset -> FLOPs of one model call on one window
        self._first: tuple[float, int] | None = None  # time.monotonic() and step of this process's first reading

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return TensorBoard's values by tag and the facts of a `pace` event, and drop the results.

        Speed is measured over steps alone; the hours left are measured from
        the first reading on, so they include validations and checkpoints.
        """
        results, self.results = self.results, []
        count, seconds = len(results), sum(s.seconds for s in results)
        samples, last = sum(s.samples for s in results), results[-1]
        losses = defaultdict(list)
        flops = 0.0
        for result in results:
            windows = result.samples // len(result.datasets)
            draws = zip(result.datasets, result.grids, result.model_calls, result.losses, strict=True)
            for name, grid, calls, loss in draws:
                losses[name].append(loss)
                if name not in self._flops:
                    self._flops[name] = forward_flops(self._model, name, grid)
                flops += windows * forward_passes(calls, self._finetune) * self._flops[name]
        seconds_per_step = seconds / count
        if self._first is None:
            self._first = (time.monotonic(), last.step)
        else:
            seconds_per_step = (time.monotonic() - self._first[0]) / (last.step - self._first[1])
        values = {
            "train/loss": sum(s.loss for s in results) / count,
            "train/mse": sum(s.mse for s in results) / count,
            "train/wavelet_l1": sum(s.wavelet_l1 for s in results) / count,
            "train/grad_norm": sum(s.grad_norm for s in results) / count,
            "train/lr": last.lr,
            **{f"train_loss/{name}": sum(values) / len(values) for name, values in sorted(losses.items())},
            "throughput/samples_per_s": samples / seconds,
            "throughput/tokens_per_s": sum(s.tokens for s in results) / seconds,
            "throughput/tflops": flops / seconds / 1e12,
            "throughput/data_wait_fraction": sum(s.data_seconds for s in results) / seconds,
            "throughput/peak_memory_gb": peak_memory_bytes() / 1e9,
            "throughput/hours_left": (self._num_steps - last.step) * seconds_per_step / 3600,
        }
        pace = {"steps": count, "seconds": seconds, "samples": samples}
        if next(self._model.parameters()).device.type == "cpu":
            pace["cpu_seconds"] = sum(s.cpu_seconds for s in results)
        return values, pace


def is_validated(step: int, recipe: Recipe) -> bool:
    """Return whether a validation follows `step` steps: every validation.every steps, and at the end."""
    every, has_limit = recipe.validation.every, recipe.finetune is not None and recipe.finetune.gate is not None
    return every > 0 and (step % every == 0 or (step == recipe.train.steps and (step > every or has_limit)))


def validation_settings(step: int, recipe: Recipe) -> ValidationSettings:
    """Return the settings of the validation after `step` steps, whose rollouts are 0 if it has none."""
    every, apart = recipe.validation.every, recipe.validation.rollout_every
    later = -(-recipe.train.steps // every) - -(-step // every)
    return replace(recipe.validation, rollouts=0) if later % apart else recipe.validation


def draws_pictures(step: int, recipe: Recipe) -> bool:
    """Return whether the validation after `step` steps draws pictures: of those with rollouts, tracking.pictures do."""
    every, apart, most = recipe.validation.every, recipe.validation.rollout_every, recipe.tracking.pictures
    before = 1 if recipe.finetune and recipe.finetune.gate else 0  # the validation of the pretrained model
    number, total = (-(-steps // every) + before for steps in (step, recipe.train.steps))
    count = -(-total // apart)  # validations with rollouts
    return (total - number) % apart == 0 and is_chosen(count - (total - number) // apart, count, most)


def is_chosen(number: int, count: int, most: int) -> bool:
    """Return whether the `number`-th of `count` events, from 1, is among `most`: evenly spread, the last included."""
    return number * most // count > (number - 1) * most // count


def passes_warning(dataset: str, passes: float, limit: float, steps: int) -> str:
    """Return a warning of a dataset that `steps` steps pass over more often than `limit`."""
    return (
        f"{steps} steps pass {passes:.1f} times over {dataset}, more than sampling.max_passes={limit:g}; it may be "
        "learned by heart. Add trajectories, lower its share (sampling.scheme, sampling.weights) or train.steps, or "
        "raise the limit (null: no limit)."
    )
