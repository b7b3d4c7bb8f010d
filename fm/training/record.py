"""The record of a run: recipe.yaml, run.json, logs, TensorBoard, the console. Main process only; silent elsewhere."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType
from typing import Any

from data_pipeline.files import atomic_file
from data_pipeline.windows.schedule import Schedule
from fm.config import Recipe, dump_recipe, recipe_to_dict
from fm.evaluation.evaluate import ValidationResult, protocol_windows
from fm.evaluation.plots import Cosines
from fm.model.surrogate import Surrogate
from fm.training.console import Console, Meter, Progress, StepResult
from fm.training.guard import Refusal
from fm.training.optim import rates_after
from fm.training.runlog import EventLog, StepLog, environment, write_process
from fm.training.tensorboard import Dashboard, Session, Trackers, final_scores, is_shown, telling_settings


class RunRecord(AbstractContextManager):
    """Receives what the trainer does, from the step at which the run starts or continues.

    `model` is a whole model like the one that is trained, None where nothing is recorded: on all processes but the main
    one. `spread` says how the model is spread over processes.
    """

    def __init__(self, recipe: Recipe, schedule: Schedule, model: Surrogate | None, step: int, spread: str) -> None:
        self.recipe, self.schedule, self.active = recipe, schedule, model is not None
        self._repeated: set[str] = set()  # datasets that a warning was given for
        self._done = step  # optimiser steps
        self.ended: str | None = None  # why the run is over before its last step, if it is
        if model is None:
            return
        resolved = replace(recipe, **{model.section: model.config})
        self.directory = recipe.run.directory
        self.directory.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.directory / "recipe.yaml", durable=False) as file:
            file.write(dump_recipe(resolved).encode())
        write_process(self.directory / "run.json", spread)
        self._log = StepLog(self.directory / "log.jsonl", step)
        self._events = EventLog(self.directory / "events.jsonl", step)
        self._meter = Meter(model, recipe, self._events.saved["pending"] if step else ())
        self._board = self._open_board(resolved, step)
        self._board.text("recipe", f"```yaml\n{dump_recipe(resolved)}```", step)
        facts = environment(next(model.parameters()).device, spread)
        self._board.text("environment", _table(f"from step {step}", facts), step)
        if step:
            for text in self._events.refusals:
                self._board.text("events", text, step)
            self._tell("start", f"continued from step {step}", step)
        else:
            self._events.write("start", step, text="started")
        names = sorted(schedule.shares)
        progress = Progress(recipe.run.name, recipe.train.steps, step, names, scores=self._events.scores)
        self._console = Console(progress, shown=recipe.tracking.progress)
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
            ending = self._ending(error)
            self._events.write("end", self._done, **ending)
            self._console.close()
            self._log.close()
            self._events.close()
            self._board.close()
            self._trackers.close()
            self._session.close({"finished": True, "failed": False}.get(ending["state"]))

    def say(self, message: str) -> None:
        """Print a message."""
        if self.active:
            self._console.say(message)

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
        self._meter.add(result)
        self._done = result.step
        self._console.step(result)
        if result.step % self.recipe.tracking.every == 0 or result.step == self.recipe.train.steps:
            self._scalars(result.step)

    def settle(self, step: int) -> None:
        """Called before a checkpoint of `step` is written: a run that continues from it finds this record whole."""
        if self.active:
            self._board.text("saves", f"checkpoint of step {step}", step)
            self._events.write("save", step, **self._board.settle(step), pending=self._meter.saved())

    def validation(self, result: ValidationResult, step: int) -> None:
        """Log the scores and pictures of a validation after `step` steps."""
        if not self.active:
            return
        self._board.scalars(result.scalars(), step)
        if pictured(step, self.recipe):
            for sample in result.samples.values():
                self._board.rollout(sample, step)
        self._console.scores(result.one_step())
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
            every, tracking = self.recipe.tracking.gradient_cosine_every, self.recipe.tracking
            picture = is_shown(step // every, self.recipe.train.steps // every, tracking.pictures)
            self._board.cosines(cosines, step, picture)
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

    def _scalars(self, step: int) -> None:
        """Write what the steps since the last call come to, and what the schedule has given."""
        values, pace = self._meter.read()
        draws = step * self.recipe.train.draws
        counts, passes = self.schedule.counts(draws), self.schedule.passes(draws)
        if self.recipe.adapt is not None:
            rates = rates_after(self.recipe.adapt, step - 1)
            values |= {f"learning_rate/{part}": values["train/lr"] * rate for part, rate in rates.items()}
        for name, share in self.schedule.shares_at(draws - 1).items():
            values[f"sampling/target_share/{name}"] = share
            values[f"sampling/drawn_share/{name}"] = counts[name] / draws
            values[f"sampling/passes/{name}"] = passes[name]
        self._board.scalars(values, step)
        self._events.write("pace", step, **pace)
        self._warn_of_repeats(step, step)
        self._console.scalars(values)

    def _open_board(self, recipe: Recipe, step: int) -> Dashboard:
        """TensorBoard's files and the other trackers; `recipe` holds all the settings there are."""
        names, folder = sorted(self.schedule.shares), self.directory / "tensorboard"
        settings = telling_settings(recipe_to_dict(recipe), names)
        self._trackers = Trackers(
            recipe.tracking.log_with or (), recipe.run.name, self.directory / "trackers", settings
        )
        self._session = Session(folder, settings, final_scores(names))  # before the dashboard's own file
        windows = protocol_windows(recipe.validation.protocol)
        return Dashboard(folder, names, windows, step, self._events.saved, self._trackers)


def pictured(step: int, recipe: Recipe) -> bool:
    """Whether the validation after `step` steps draws pictures: tracking.pictures of them, the last included."""
    every, most = recipe.validation.every, recipe.tracking.pictures
    before = 1 if recipe.finetune and recipe.finetune.gate else 0  # of the pretrained model, before the first step
    number, count = (-(-steps // every) + before for steps in (step, recipe.train.steps))
    return is_shown(number, count, most)


def repeat_warning(dataset: str, passes: float, limit: float, steps: int) -> str:
    """What to say of a dataset that `steps` steps pass over more often than `limit`."""
    return (
        f"{steps} steps pass {passes:.1f} times over {dataset}, more than sampling.max_passes={limit:g}; it may be "
        "learnt by heart. Add trajectories, lower its share (sampling.scheme, sampling.weights) or train.steps, or "
        "raise the limit (null: no limit)."
    )


def _table(head: str, facts: Mapping[str, str]) -> str:
    """Markdown."""
    return "\n".join([f"| | {head} |", "|:--|:--|", *(f"| {name} | {fact} |" for name, fact in facts.items())])
