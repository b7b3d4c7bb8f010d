"""The training loop: load; while step < steps: take a step (fm/training/step.py), save, validate.

Pretraining and rollout finetuning differ by recipe, not by code.

Runs a recipe: connects the processes, builds its trainer, keeps others out of its directory, and starts over where
the guard rolls it back.
"""

from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path

from accelerate import Accelerator

from data_pipeline.files import UserError, only_process
from data_pipeline.registry import load_registry
from data_pipeline.windows.loader import sources
from fm.checkpoint import CheckpointWriter, keep_best, newest_checkpoint, read_state
from fm.config import Recipe, changed_settings, recipe_to_dict, resolve
from fm.datasets import build_model, check_names, check_same_shards, check_unrolls, open_split, shard_digests
from fm.distributed import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    StopSignal,
    broadcast_from_main,
    make_accelerator,
    naming_lost_processes,
)
from fm.evaluation.evaluate import ValidationResult, validate
from fm.training.checks import check_gradient_cosines, gradient_cosines, rehearse
from fm.training.guard import Gate, Guard
from fm.training.mixing import Mixing
from fm.training.optim import check_adapted, learns_alone
from fm.training.record import NullRecord, RunRecord, open_record
from fm.training.runlog import lacks_validation
from fm.training.state import TrainingState
from fm.training.step import RollBack, Stepper
from fm.training.tensorboard import check_trackers


class Trainer:
    """A run: its data, what training changes, and the record of what happened.

    It continues from its newest whole checkpoint, or from `checkpoint`, and passes over the steps `passed_over`.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        passed_over: Collection[int] = (),
        checkpoint: Path | None = None,
    ) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        self.directory = recipe.run.directory
        self.registry = load_registry(recipe.data.registry)
        self.checkpoints = self.directory / "checkpoints"
        self.writer = CheckpointWriter(self.checkpoints, recipe.checkpoint.keep, recipe.checkpoint.keep_every)
        check_names(recipe.data.datasets, self.registry)
        check_trackers(recipe.tracking.log_with or ())
        self.readers = open_split(recipe, self.registry, "train")
        self.valid_readers = open_split(recipe, self.registry, "valid") if recipe.validation.every else {}
        check_unrolls(recipe, self.readers)
        check_adapted(recipe.adapt, self.readers)
        lengths = {name: recipe.window_length(name) for name in self.readers}
        self.mixing = Mixing(recipe, sources(self.readers, lengths))
        self.guard, self.gate = Guard(recipe.guard), Gate(recipe.finetune, recipe.validation)
        self.changes: list[str] = []  # settings that differ from those the run began with
        self.saved: int | None = None  # the step of the last save
        model = build_model(recipe, self.readers, self.registry)
        self.say = self.accelerator.print
        if checkpoint is None and recipe.checkpoint.resume == "auto":
            checkpoint = self._newest_checkpoint()
        self.state = TrainingState(recipe, model, self.accelerator, checkpoint)
        if checkpoint is not None and self.state.facts is not None:
            self._take_up(checkpoint, self.state.facts)
        self.guard.refused.update(passed_over)
        run = (recipe, accelerator, self.state, self.readers, self.mixing, self.guard)
        self.stepper = Stepper(*run, self._facts, self._looks_at)
        check_gradient_cosines(recipe, self.state.parallel, list(self.readers))
        self.owes_validation = broadcast_from_main(self.accelerator, self._killed_while_validating_the_end)

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.state.step

    def open_record(self) -> RunRecord | NullRecord:
        """The record of this run from the step it continues at; silent but on the main process."""
        model = self.state.averaged_model()
        return open_record(self.recipe, self.mixing.schedule, model, self.step, self.state.parallel.name)

    def train(self, stop: StopSignal, record: RunRecord | NullRecord) -> int:
        """Step to the end of the run; returns the exit code."""
        settings = self.recipe.train
        every = self.recipe.validation.every
        if self.recipe.finetune and self.recipe.finetune.rehearse and self.step < settings.steps:
            record.print(
                rehearse(self.recipe, self.state, self.stepper.division, self.readers, self.accelerator.device)
            )
        adapt = self.recipe.adapt
        if adapt is not None and learns_alone(adapt, self.step):
            which = f"only {', '.join(adapt.datasets)} is drawn, and only parts of its own move"
            record.print(f"up to step {adapt.alone_steps} {which} (adapt.alone_steps)")
        self.compare_gradients(record)  # the checkpoint was written before this step's comparison
        if self.gate.active and not self.gate.knows_pretrained:
            self.validate(record)
        elif self.owes_validation or (every and self.step and self.step % every == 0):
            self.validate(record)  # the checkpoint was written before this step's validation
        while self.step < settings.steps and not self.gate.ends:
            interrupted = self.train_step(stop, record)
            last = self.step == settings.steps
            stopped = interrupted or self.step == self.recipe.run.stop_at
            if last or stopped or self.step % self.recipe.checkpoint.every == 0:
                self.save(record, wait=last or stopped)
            if stopped and not last:
                why = "interrupted" if interrupted else "run.stop_at"
                record.print(f"{why}: saved step {self.step}; the same command continues from here.")
                return EXIT_INTERRUPTED if interrupted else EXIT_DONE
            self.compare_gradients(record)
            if self._validated_at(self.step):
                self.validate(record)
        if self.gate.ends:
            if self.saved != self.step:
                self.save(record, wait=True)
            record.end_reason = f"ended by finetune.gate after step {self.step}"
        return EXIT_DONE

    def train_step(self, stop: StopSignal, record: RunRecord | NullRecord) -> bool:
        """A step; returns whether a process was asked to stop (fm/training/step.py)."""
        self._report_save(self.writer.failure(), record)
        try:
            return self.stepper.take(stop.received, record)
        except RollBack:
            self._report_save(self.writer.wait(), record)
            self.accelerator.wait_for_everyone()  # until the checkpoint that all go back to is there
            raise

    def save(self, record: RunRecord | NullRecord, wait: bool) -> None:
        """Begin to write a checkpoint on the main process, after the one before is written; all processes meet here.

        `wait` until it is on disk where no step follows that would say that it failed.
        """
        if self.accelerator.is_main_process:
            self._report_save(self.writer.wait(), record)
            record.flush(self.step)
        snapshot, self.saved = self.state.snapshot(self._facts()), self.step
        if snapshot is not None:
            self.writer.start(snapshot)
            if wait and (failure := self.writer.wait()):
                raise failure  # whatever checkpoint.on_error: no later save makes up for this one
        self.accelerator.wait_for_everyone()

    def validate(self, record: RunRecord | NullRecord) -> None:
        """Score the averaged weights on the valid split, on the main process; all processes meet here."""
        result, model = None, self.state.averaged_model()
        if model is not None:
            result = validate(model, self.valid_readers, self.recipe.validation, self.accelerator.device)
        if self.gate.active:
            self._pass_gate(result, record)
        if result is not None:
            record.log_validation(result, self.step)  # last: a run that was killed before it does all of this again
        if self.mixing.changes_at(self.step):
            unscored = self.mixing.follow(result.ratios() if result else None, self.step, self.accelerator)
            self.stepper.divide()
            record.log_shares(self.mixing.schedule, unscored, self.step)
        self.accelerator.wait_for_everyone()

    def compare_gradients(self, record: RunRecord | NullRecord) -> None:
        """Log how the datasets' gradients agree, at multiples of tracking.gradient_cosine_every; all processes meet."""
        every = self.recipe.tracking.gradient_cosine_every
        if not every or not self.step or self.step % every:
            return
        if self.accelerator.is_main_process:
            parallel, device = self.state.parallel, self.accelerator.device
            record.log_cosines(gradient_cosines(self.recipe, parallel, self.readers, self.step, device), self.step)
        self.accelerator.wait_for_everyone()

    def _pass_gate(self, result: ValidationResult | None, record: RunRecord | NullRecord) -> None:
        """Judge a validation, which the main process has, and keep the best compromise. Collective."""
        verdict = self.gate.judge(result, self.step) if result else None
        if verdict is not None:
            record.log_verdict(verdict.text, self.step)
        if self.gate.share(verdict, self.accelerator):
            snapshot = self.state.snapshot(self._facts())
            if snapshot is not None:
                try:
                    keep_best(self.directory / "best", snapshot)
                except UserError as failure:
                    self._report_save(failure, record)

    def _report_save(self, failure: UserError | None, record: RunRecord | NullRecord) -> None:
        """Stop the run where a save has failed, or say so and go on (checkpoint.on_error)."""
        if failure is None:
            return
        if self.recipe.checkpoint.on_error == "stop":
            raise failure
        note = "Training goes on (checkpoint.on_error: continue); the next save tries again."
        record.log_message(f"{failure}\n{note}", self.step)

    def _newest_checkpoint(self) -> Path | None:
        return broadcast_from_main(self.accelerator, lambda: newest_checkpoint(self.checkpoints, self.say))

    def _facts(self) -> dict:
        """What state.json holds beside the step, as JSON."""
        return {
            "recipe": recipe_to_dict(self.recipe),
            "registry": self.registry.snapshot(),
            "shards": shard_digests(self.readers),
            "sampling": self.mixing.state(self.step),
            "guard": self.guard.state(),
            "gate": self.gate.state(),
        }

    def _take_up(self, checkpoint: Path, facts: dict) -> None:
        """Continue as a checkpoint's facts say. UserError where the shards are others."""
        check_same_shards(facts["shards"], self.readers, checkpoint)
        self.mixing.restore(facts["sampling"], self.step)
        self.guard.restore(facts["guard"])
        best = newest_checkpoint(self.directory / "best", self.say) if self.gate.active else None
        self.gate.restore(facts.get("gate"), read_state(best)["gate"] if best else None, self.step)
        before = resolve(facts["recipe"], str(checkpoint / "state.json"))
        self.changes = changed_settings(recipe_to_dict(before), recipe_to_dict(self.recipe))

    def _killed_while_validating_the_end(self) -> bool:
        steps = self.recipe.train.steps
        due = self.step == steps and self._validated_at(steps)
        return due and lacks_validation(self.directory / "events.jsonl", steps)

    def _looks_at(self, step: int) -> bool:
        """Whether the state after `step` steps is saved, scored or compared, or is the run's last."""
        cosines = self.recipe.tracking.gradient_cosine_every
        every = self.recipe.checkpoint.every
        ends = step in (self.recipe.train.steps, self.recipe.run.stop_at)
        return ends or step % every == 0 or self._validated_at(step) or (cosines > 0 and step % cosines == 0)

    def _validated_at(self, step: int) -> bool:
        """Whether there is a validation after `step` steps: every so many, and at the end of a run that is longer."""
        every = self.recipe.validation.every
        last = step == self.recipe.train.steps and (step > every or self.gate.active)
        return every > 0 and (step % every == 0 or last)


def train(recipe: Recipe) -> int:
    """Run a recipe to its end, to run.stop_at, or to the first signal that asks it to stop.

    Returns the exit code; UserError for what the user can mend.
    """
    back: RollBack | None = None
    with StopSignal().listen() as stop:
        with naming_lost_processes():
            accelerator = make_accelerator(recipe.train.clip)
        while True:
            try:
                return _train(recipe, accelerator, stop, back)
            except RollBack as again:
                back = again
                accelerator.free_memory()


def _train(recipe: Recipe, accelerator: Accelerator, stop: StopSignal, back: RollBack | None) -> int:
    with naming_lost_processes():
        trainer = Trainer(recipe, accelerator, passed_over=back.refused if back else ())
    say = trainer.say
    if trainer.step >= recipe.train.steps and not trainer.owes_validation:
        say(f"{trainer.directory} is finished at step {trainer.step}; nothing to train.")
        return EXIT_DONE
    if recipe.run.stop_at is not None and trainer.step >= recipe.run.stop_at:
        say(f"{trainer.directory} is at step {trainer.step}, where run.stop_at ends it.")
        return EXIT_DONE
    if trainer.gate.ends:
        say(f"{trainer.directory} was ended by finetune.gate at step {trainer.step}; raise it to go on.")
        return EXIT_DONE
    if trainer.step:
        say("\n  changed since: ".join([f"continuing {trainer.directory} from step {trainer.step}", *trainer.changes]))
    alone = only_process(trainer.directory, "training") if accelerator.is_main_process else nullcontext()
    with naming_lost_processes():
        with alone, trainer.open_record() as record, trainer.writer, naming_lost_processes():  # the record has its name
            if back is not None:
                record.log_refusal(back.refusal, trainer.step)
            code = trainer.train(stop, record)
        accelerator.wait_for_everyone()  # a launcher ends the others when the first has ended
    accelerator.end_training()
    return code
