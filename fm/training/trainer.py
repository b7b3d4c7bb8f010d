"""The training loop: load; while step < steps: take steps (fm/training/step.py), save, validate.

`train` runs a recipe. Pretraining and rollout finetuning differ by recipe, not by code.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.files import only_process
from data_pipeline.registry import load_registry
from data_pipeline.windows.division import Division
from data_pipeline.windows.loader import scheduled_batches, sources
from data_pipeline.windows.reader import Batch
from fm.checkpoint import CheckpointWriter, newest_checkpoint, read_state
from fm.config import Recipe, changed_settings, recipe_to_dict, resolve
from fm.datasets import build_model, check_same_shards, check_windows, open_split, shard_digests
from fm.distributed import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    Interrupted,
    StopSignal,
    broadcast_from_main,
    detect_lost_processes,
    make_accelerator,
    run_on_main,
)
from fm.evaluation.evaluate import ValidationResult, validate
from fm.training.checks import check_launch, check_memory, check_size, gradient_cosines, settle_datasets
from fm.training.guard import AnomalyDetector, RefusedStep, RegressionLimit, RollBack, keep_best, keep_incident
from fm.training.mixing import Mixing
from fm.training.objective import unroll_length
from fm.training.optim import learns_alone
from fm.training.record import NullRecord, RunRecord, StepResult, is_validated, validation_settings
from fm.training.runlog import check_run_folder, lacks_validation
from fm.training.state import TrainingState
from fm.training.step import PendingStep, PendingSteps, StepMetrics, train_step
from fm.training.tensorboard import check_trackers

READ_EVERY = 10  # steps between synchronizations with a GPU, which computes while the host goes on


def train(recipe: Recipe) -> int:
    """Run a recipe to its end, to run.stop_at, or to the first signal that asks it to stop.

    Returns the exit code. Raises UserError for what the user can correct.
    """
    with StopSignal().listen() as stop:
        with detect_lost_processes():
            accelerator = make_accelerator(recipe.train.clip)
        code = train_with(recipe, accelerator, stop)
        accelerator.end_training()
        return code


def train_with(recipe: Recipe, accelerator: Accelerator, stop: StopSignal) -> int:
    """Run a recipe in processes that are connected already, as `train` does; start over after a RollBack."""
    back: RollBack | None = None
    while True:
        try:
            return _train_from_checkpoint(recipe, accelerator, stop, back)
        except RollBack as again:
            back = again
            accelerator.free_memory()


def _train_from_checkpoint(recipe: Recipe, accelerator: Accelerator, stop: StopSignal, back: RollBack | None) -> int:
    """Run a recipe from its newest checkpoint; `back` is why an earlier attempt ended."""
    with detect_lost_processes():
        trainer = Trainer(recipe, accelerator, passed_over=back.refused if back else ())
    if (reason := trainer.nothing_to_do()) is not None:
        accelerator.print(reason)
        return EXIT_DONE
    if trainer.step:
        continuing = f"continuing {trainer.directory} from step {trainer.step}"
        accelerator.print("\n  changed since: ".join([continuing, *trainer.changes]))
    alone = only_process(trainer.directory, "training") if accelerator.is_main_process else nullcontext()
    with detect_lost_processes():
        # The inner context names a lost process while the record can still write it down.
        with alone, trainer.open_record() as trainer.record, trainer.writer, detect_lost_processes():
            if back is not None:
                trainer.record.log_refusal(back.refusal, trainer.step)
            code = trainer.train(stop)
        accelerator.wait_for_everyone()  # a launcher ends all processes as soon as the first has ended
    return code


class Trainer:
    """A run: its data, its training state, and the loop over its steps.

    It continues from its newest whole checkpoint, or from `checkpoint`. It passes over the steps in `passed_over`,
    counted from 1: their windows are read, and their gradients are not used.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        passed_over: Collection[int] = (),
        checkpoint: Path | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.record: RunRecord | NullRecord = NullRecord()
        self.directory = check_run_folder(recipe.run.directory)
        self.registry = load_registry(recipe.data.registry)
        self.checkpoints = self.directory / "checkpoints"
        self.writer = CheckpointWriter(self.checkpoints, recipe.checkpoint.keep, recipe.checkpoint.keep_every)
        recipe = self.recipe = settle_datasets(recipe, self.registry, accelerator)
        check_trackers(recipe.tracking.log_with or ())
        self.readers = open_split(recipe, self.registry, "train")
        self.valid_readers = open_split(recipe, self.registry, "valid") if recipe.validation.every else {}
        check_windows(recipe, self.readers)
        self.lengths = {name: recipe.window_length(name) for name in self.readers}  # frames
        self.mixing = Mixing(recipe, sources(self.readers, self.lengths))
        self.anomalies = AnomalyDetector(recipe.guard)
        self.regression_limit = RegressionLimit(recipe.finetune, recipe.validation)
        self.changes: list[str] = []  # settings that differ from those the run began with
        model = build_model(recipe, self.readers, self.registry, accelerator.print)
        if checkpoint is None and recipe.checkpoint.resume == "auto":
            newest = partial(newest_checkpoint, self.checkpoints, accelerator.print)
            checkpoint = broadcast_from_main(accelerator, newest)
        self.state = TrainingState(recipe, model, self.accelerator, checkpoint)
        if checkpoint is not None and self.state.facts is not None:
            self._restore(checkpoint, self.state.facts)
        self.saved = self.step  # the step of the last save, or the step that the run began with
        self.anomalies.refused.update(passed_over)
        check_launch(recipe, self.state.parallel, list(self.readers))
        check_size(recipe, self.step, self.mixing.schedule, self.readers, self.registry)
        self.division = self._divide()
        self._batches: Iterator[Batch] | None = None
        # FSDP and DeepSpeed take no flag on the device, and whether a loss is a spike depends on the step before.
        self._judges_first = not self.state.parallel.takes_found_inf or recipe.guard.spike is not None
        self._read_every = recipe.train.read_every or (1 if accelerator.device.type == "cpu" else READ_EVERY)
        ended = self.step == recipe.train.steps and is_validated(self.step, recipe)
        lacks = partial(lacks_validation, self.directory, self.step)
        self.validation_pending = ended and broadcast_from_main(accelerator, lacks)

    @property
    def step(self) -> int:
        """Return the number of optimizer steps done."""
        return self.state.step

    def nothing_to_do(self) -> str | None:
        """Return why no step is left to take, for the user, or None."""
        if self.step >= self.recipe.train.steps and not self.validation_pending:
            return f"{self.directory} is finished at step {self.step}; nothing to train."
        if (stop_at := self.recipe.run.stop_at) is not None and self.step >= stop_at:
            return f"{self.directory} is at step {self.step}, where run.stop_at ends it."
        if self.regression_limit.ends_run:
            return f"{self.directory} was ended by finetune.gate at step {self.step}; raise it to go on."
        return None

    def open_record(self) -> RunRecord | NullRecord:
        """Return the record of this run from the present step on; only the main process writes one."""
        model = self.state.averaged_model()
        if model is None:
            return NullRecord()
        return RunRecord(self.recipe, self.mixing.schedule, model, self.step, self.state.parallel.name)

    def train(self, stop: StopSignal) -> int:
        """Take the steps to the end of the run, save and validate; return the exit code."""
        steps, every, stop_at = self.recipe.train.steps, self.recipe.checkpoint.every, self.recipe.run.stop_at
        try:
            self._before_first_step(stop)
            while self.step < steps and not self.regression_limit.ends_run:
                interrupted = self.train_steps(stop)
                ends = self.step in (steps, stop_at)
                if ends or (self.step % every == 0 and not interrupted):
                    self.save(wait=ends)
                if interrupted and self.step < steps:
                    raise Interrupted
                if self.step == stop_at and self.step < steps:
                    self.record.print(f"run.stop_at: saved step {stop_at}; the same command continues from here.")
                    return EXIT_DONE
                self.compare_gradients()
                if is_validated(self.step, self.recipe):
                    self.validate(stop)
        except Interrupted:  # after a step, or within a validation, which is made again when the run continues
            if self.saved != self.step:
                self.save(wait=True)
            self.record.interrupted = True
            self.record.print(f"interrupted: saved step {self.step}; the same command continues from here.")
            return EXIT_INTERRUPTED
        if self.regression_limit.ends_run:
            if self.saved != self.step:
                self.save(wait=True)
            self.record.end_reason = f"ended by finetune.gate after step {self.step}"
        return EXIT_DONE

    def _before_first_step(self, stop: StopSignal) -> None:
        """Check the memory, and make up for comparisons and validations that came after the checkpoint."""
        adapt, every = self.recipe.adapt, self.recipe.validation.every
        if self.recipe.finetune and self.recipe.finetune.rehearse and self.step < self.recipe.train.steps:
            self.record.print(check_memory(self.recipe, self.state, self.division, self.readers, self.accelerator))
        if adapt is not None and learns_alone(adapt, self.step):
            which = f"only {', '.join(adapt.datasets)} is drawn, and only parts of its own move"
            self.record.print(f"up to step {adapt.alone_steps} {which} (adapt.alone_steps)")
        if self.state.augmentation is not None:
            self.record.print(str(self.state.augmentation))
        self.compare_gradients()
        missed = self.regression_limit.needs_pretrained or self.validation_pending
        if missed or (every and self.step and self.step % every == 0):
            self.validate(stop)

    def train_steps(self, stop: StopSignal) -> bool:
        """Take the steps up to the next synchronization with the device, and record them. Collective.

        On a CPU that is one step, on a GPU up to train.read_every. A refused step ends the sequence: the weights are
        those before it, and the steps that follow are taken again. Returns whether a process was asked to stop. Raises
        RollBack or UserError if a refused step ends this attempt or the run.
        """
        self._report_save(self.writer.failure())
        pending, reasons = PendingSteps(), dict[int, str | None]()
        for step in range(self.step, self.recipe.train.steps):
            pending.append(self.take_step(step, partial(self._skip_update, step, pending, reasons), stop.received))
            if (step + 1) % self._read_every == 0 or self._judges_first or self._needs_state(step + 1):
                break
        taken = pending.read()
        seconds, cpu_seconds = (spent / len(taken) for spent in taken[0].elapsed())
        for one in taken:
            reason = reasons[one.step] if one.step in reasons else self._judge(one.step, one.metrics)
            if reason is not None:
                self._refuse(one, reason)
            self.record.log_step(StepResult.of(one, (seconds, cpu_seconds), self.recipe, self.readers))
            self.state.step = one.step + 1
            if reason is not None and one is not taken[-1]:
                self._batches = None  # read again from the step after the refused one
                break
        return any(one.metrics.stop_requested for one in taken)

    def take_step(
        self, step: int, skip_update: Callable[[StepMetrics], bool | Tensor], stop_requested: bool = False
    ) -> PendingStep:
        """Take the run's step after `step` steps (`fm.training.step.train_step`). Collective."""
        if self._batches is None:
            self._batches = self._scheduled_batches()
        return train_step(
            self.recipe, self.state, self.division, self._batches, self.accelerator, step, skip_update, stop_requested
        )

    def _skip_update(
        self, step: int, pending: PendingSteps, reasons: dict[int, str | None], metrics: StepMetrics
    ) -> bool | Tensor:
        """Decide whether a step leaves the weights as they are; note in `reasons` why, if it is known already."""
        if step + 1 in self.anomalies.refused:  # passed over, after the run was rolled back
            reasons[step] = None
            return True
        if not self._judges_first:
            return pending.found_inf(metrics)
        reasons[step] = self._judge(step, metrics)
        return reasons[step] is not None

    def _judge(self, step: int, metrics: StepMetrics) -> str | None:
        names = [draw.dataset for draw in self.division.draws_of(step)]
        if self.recipe.finetune is not None and self.recipe.finetune.unroll_start is not None:
            # Longer unrolls have larger losses, so each length has a history of its own.
            names = [f"{name} over {self._unroll_length(step, name)} model steps" for name in names]
        return self.anomalies.find(names, metrics.losses, metrics.grad_norm)

    def _refuse(self, taken: PendingStep, reason: str) -> None:
        """Keep and record the state before a refused step. Raises RollBack or UserError, as guard.action says."""
        action, number = self.recipe.guard.action, taken.step + 1
        refusal = RefusedStep.of(number, reason, action, taken.draws)
        snapshot = self.state.snapshot(self._facts())
        if snapshot is not None:
            keep_incident(self.directory / "incidents", snapshot, self.accelerator.print)
        if action == "stop":
            self.record.log_refusal(refusal, number)
            raise UserError(refusal.advice(self.directory))
        self.anomalies.count_refused(number)
        if action == "rollback":
            self._report_save(self.writer.wait())
            self.accelerator.wait_for_everyone()  # until the checkpoint that all go back to is on disk
            raise RollBack(refusal, self.anomalies.refused)
        self.record.log_refusal(refusal, number)

    def _divide(self) -> Division:
        """Return what each process takes of the steps of the present schedule."""
        train, way, schedule = self.recipe.train, self.recipe.sampling.draw, self.mixing.schedule
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        return Division(schedule, rank, processes, train.draws, way, train.micro_batch, self._unroll_length)

    def _unroll_length(self, step: int, dataset: str) -> int:
        return unroll_length(step, self.recipe.train.steps, self.recipe.finetune, dataset)

    def _scheduled_batches(self) -> Iterator[Batch]:
        """Yield this process's batches from the next step to the last.

        Workers read ahead, but not beyond the step at which adaptive sampling changes the shares: the batches after it
        are begun when the first of them is needed, which is after the validation.
        """
        while self.step < self.recipe.train.steps:
            yield from scheduled_batches(
                self.readers,
                self.division,
                length=self.lengths,
                start=self.step,
                stop=self.mixing.known_until(self.step),
                workers=self.recipe.data.workers,
                pin_memory=self.accelerator.device.type == "cuda",
            )

    def save(self, wait: bool) -> None:
        """Begin to write a checkpoint on the main process, once the one before it is written. Collective.

        With `wait`, return only when it is on disk: no later step could report that the write failed.
        """
        if self.accelerator.is_main_process:
            self._report_save(self.writer.wait())
            self.record.flush(self.step)
        snapshot, self.saved = self.state.snapshot(self._facts()), self.step
        if snapshot is not None:
            self.writer.start(snapshot)
            if wait and (failure := self.writer.wait()):
                raise failure  # even with checkpoint.on_error: continue, since no later save follows
        self.accelerator.wait_for_everyone()

    def validate(self, stop: StopSignal) -> None:
        """Score the averaged weights on the valid split, on the main process. Collective. Raises Interrupted."""
        model, device = self.state.averaged_model(), self.accelerator.device
        settings = validation_settings(self.step, self.recipe)
        work = partial(validate, model, self.valid_readers, settings, device) if model is not None else None
        result = run_on_main(self.accelerator, stop, work)
        if self.regression_limit.active:
            self._check_regression(result)
        if result is not None:
            self.record.log_validation(result, self.step)  # last, so that a run killed before it validates again
        if self.mixing.changes_at(self.step):
            unscored = self.mixing.follow(result.ratios() if result else None, self.step, self.accelerator)
            self.division = self._divide()
            self.record.log_shares(self.mixing.schedule, unscored, self.step)
        self.accelerator.wait_for_everyone()

    def compare_gradients(self) -> None:
        """Log the cosines between the datasets' gradients every tracking.gradient_cosine_every steps. Collective."""
        every = self.recipe.tracking.gradient_cosine_every
        if not every or not self.step or self.step % every:
            return
        if self.accelerator.is_main_process:
            parallel, device = self.state.parallel, self.accelerator.device
            self.record.log_cosines(gradient_cosines(self.recipe, parallel, self.readers, self.step, device), self.step)
        self.accelerator.wait_for_everyone()

    def _check_regression(self, result: ValidationResult | None) -> None:
        """Compare a validation with finetune.gate on the main process, and keep the best checkpoint. Collective."""
        limit = self.regression_limit
        verdict = broadcast_from_main(self.accelerator, lambda: limit.judge(result) if result else None)
        assert verdict is not None
        limit.failed = not verdict.within_limit
        self.record.log_text("gate", verdict.text, self.step)
        snapshot = self.state.snapshot(self._facts()) if verdict.best else None
        if snapshot is not None:
            try:
                keep_best(self.directory / "best", snapshot)
            except UserError as failure:
                self._report_save(failure)

    def _report_save(self, failure: UserError | None) -> None:
        """Raise the failure of a save, or report it and go on (checkpoint.on_error)."""
        if failure is None:
            return
        if self.recipe.checkpoint.on_error == "stop":
            raise failure
        note = "Training goes on (checkpoint.on_error: continue); the next save tries again."
        self.record.log_text("message", f"{failure}\n{note}", self.step)

    def _facts(self) -> dict:
        """Return what state.json holds beside the step, as JSON."""
        return {
            "recipe": recipe_to_dict(self.recipe),
            "registry": self.registry.snapshot(),
            "shards": shard_digests(self.readers),
            "symmetries": self.state.symmetries,
            "sampling": self.mixing.state(self.step),
            "guard": self.anomalies.state(),
            "gate": self.regression_limit.state(),
        }

    def _restore(self, checkpoint: Path, facts: dict) -> None:
        """Restore what `_facts` returned. Raises UserError if the shards have changed."""
        check_same_shards(facts["shards"], self.readers, checkpoint)
        self.mixing.restore(facts["sampling"], self.step)
        self.anomalies.restore(facts["guard"])
        limit = self.regression_limit
        best = newest_checkpoint(self.directory / "best", self.accelerator.print) if limit.active else None
        limit.restore(facts["gate"], read_state(best)["gate"] if best else None, self.step)
        before = recipe_to_dict(resolve(facts["recipe"], str(checkpoint / "state.json")))
        then = {**before, "symmetries": facts.get("symmetries", {})}
        self.changes = changed_settings(then, {**recipe_to_dict(self.recipe), "symmetries": self.state.symmetries})

    def _needs_state(self, step: int) -> bool:
        """Return whether the state after `step` steps is saved, validated or compared, or is the run's last."""
        every, cosines = self.recipe.checkpoint.every, self.recipe.tracking.gradient_cosine_every
        ends = step in (self.recipe.train.steps, self.recipe.run.stop_at)
        return ends or step % every == 0 or is_validated(step, self.recipe) or (cosines > 0 and step % cosines == 0)
