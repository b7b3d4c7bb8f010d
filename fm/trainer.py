"""The training loop: load; while step < steps: train_step, save, validate.

Pretraining and rollout finetuning differ by recipe, not by code. Which windows, teacher-forcing coins and learning
rate a step gets is a function of (recipe, step), so continuing a run is arithmetic. With adaptive sampling the windows
depend on the history of shares too, which the checkpoints hold.
"""

import hashlib
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from data_pipeline.cards.registry import load_registry
from data_pipeline.errors import UserError
from data_pipeline.windows.batch import Batch
from data_pipeline.windows.division import Division
from data_pipeline.windows.loader import scheduled_batches, sources
from data_pipeline.windows.schedule import Draw
from fm.adapt import check_adapted, learns_alone
from fm.checkpoint import newest_checkpoint, read_state, step_directory
from fm.checkpoint_writer import CheckpointWriter, keep_best, keep_incident
from fm.conflict import check_gradient_cosines, gradient_cosines
from fm.curriculum import unroll_length
from fm.evaluation.validation import ValidationResult, validate
from fm.gate import Gate
from fm.gradient import step_gradient
from fm.guard import Guard, Refusal
from fm.inputs import build_model, check_same_shards, check_unrolls, open_split, shard_digests
from fm.mixing import Mixing
from fm.optim import learning_rate
from fm.recipe_file import changed_settings, recipe_to_dict, resolve
from fm.record import RunRecord, StepResult
from fm.rehearsal import rehearse
from fm.runtime import EXIT_DONE, EXIT_INTERRUPTED, StopSignal, as_main_process_finds
from fm.settings import Recipe
from fm.specs import check_names
from fm.state import TrainingState
from fm.tracking.logs import lacks_validation
from fm.tracking.trackers import check_trackers


class RollBack(Exception):
    """The run returns to its last checkpoint, and passes over the steps in `refused` this time."""

    def __init__(self, refusal: Refusal, refused: set[int]) -> None:
        super().__init__(f"step {refusal.step} refused")
        self.refusal, self.refused = refusal, refused


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
        self.lengths = {name: recipe.window_length(name) for name in self.readers}
        self.mixing = Mixing(recipe, sources(self.readers, self.lengths))
        self.guard, self.gate = Guard(recipe.guard), Gate(recipe.finetune, recipe.validation)
        self.division = self._divide()
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
        self._check_division()
        check_gradient_cosines(recipe, self.state.parallel, list(self.readers))
        self.owes_validation = bool(as_main_process_finds(self.accelerator, self._killed_while_validating_the_end))

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.state.step

    def open_record(self) -> RunRecord:
        """The record of this run from the step it continues at; silent but on the main process."""
        model = self.state.averaged_model()
        return RunRecord(self.recipe, self.mixing.schedule, model, self.step, self.state.parallel.name)

    def train(self, stop: StopSignal, record: RunRecord) -> int:
        """Step to the end of the run; returns the exit code."""
        settings = self.recipe.train
        batches = self.batches()
        every = self.recipe.validation.every
        if self.recipe.finetune and self.recipe.finetune.rehearse and self.step < settings.steps:
            record.say(rehearse(self.recipe, self.state, self.division, self.readers, self.accelerator.device))
        adapt = self.recipe.adapt
        if adapt is not None and learns_alone(adapt, self.step):
            which = f"only {', '.join(adapt.datasets)} is drawn, and only parts of its own move"
            record.say(f"up to step {adapt.alone_steps} {which} (adapt.alone_steps)")
        self.compare_gradients(record)  # the checkpoint was written before this step's comparison
        if self.gate.active and not self.gate.knows_pretrained:
            self.validate(record)
        elif self.owes_validation or (every and self.step and self.step % every == 0):
            self.validate(record)  # the checkpoint was written before this step's validation
        while self.step < settings.steps and not self.gate.ends:
            result = self.train_step(batches, stop, record)
            record.step(result)
            last = self.step == settings.steps
            stopped = result.stop or self.step == self.recipe.run.stop_at
            if last or stopped or self.step % self.recipe.checkpoint.every == 0:
                self.save(record, wait=last or stopped)
            if stopped and not last:
                why = "interrupted" if result.stop else "run.stop_at"
                record.say(f"{why}: saved step {self.step}; the same command continues from here.")
                return EXIT_INTERRUPTED if result.stop else EXIT_DONE
            self.compare_gradients(record)
            if self._validated_at(self.step):
                self.validate(record)
        if self.gate.ends:
            if self.saved != self.step:
                self.save(record, wait=True)
            record.ended = f"ended by finetune.gate after step {self.step}"
        return EXIT_DONE

    def train_step(self, batches: Iterator[Batch], stop: StopSignal, record: RunRecord) -> StepResult:
        """Fetch, forward, backward, clip, judge on all processes alike, move."""
        settings, started = self.recipe.train, time.perf_counter()
        self._report_save(self.writer.failure(), record)
        torch.manual_seed(self.recipe.run.seed * 1_000_003 + self.step)  # so that any random layer resumes exactly
        parallel, lr = self.state.parallel, learning_rate(self.step, settings)
        parallel.optimizer.set_learning_rate(lr)
        draws = self.division.draws_of(self.step)
        datasets = tuple(draw.dataset for draw in draws)
        parallel.let_rest(datasets, alone=learns_alone(self.recipe.adapt, self.step))
        losses, waited = self.gradient(batches)
        every_rank, stopped = self._agree(losses, parallel.clip(settings.clip), stop.received)
        mean = every_rank[:, :-1].sum(dim=0).view(-1, 3)  # (draws, 3)
        norm = float(every_rank[:, -1].max())
        refused = self._judge(draws, mean[:, 0].tolist(), norm, record)
        if not refused:
            parallel.move()
            self.state.ema.update(parallel.shards(), self.step)
        parallel.forget()
        self.state.step += 1
        return StepResult(
            step=self.step,
            datasets=datasets,
            grids=tuple(self.readers[name].manifest.grid for name in datasets),
            windows=hashlib.sha256("".join(draw.digest() for draw in draws).encode()).hexdigest()[:16],
            losses=tuple(mean[:, 0].tolist()),
            mse=float(mean[:, 1].mean()),
            wavelet_l1=float(mean[:, 2].mean()),
            grad_norm=norm,
            lr=lr,
            samples=settings.global_batch,
            model_calls=tuple(self.unroll_length(self.step - 1, name) for name in datasets),
            data_seconds=waited,
            seconds=time.perf_counter() - started,
            stop=stopped,
        )

    def save(self, record: RunRecord, wait: bool) -> None:
        """Begin to write a checkpoint on the main process, after the one before is written; all processes meet here.

        `wait` until it is on disk where no step follows that would say that it failed.
        """
        if self.accelerator.is_main_process:
            self._report_save(self.writer.wait(), record)
            record.settle(self.step)
        snapshot, self.saved = self.state.snapshot(self._facts()), self.step
        if snapshot is not None:
            self.writer.start(snapshot)
            if wait and (failure := self.writer.wait()):
                raise failure  # whatever checkpoint.on_error: no later save makes up for this one
        self.accelerator.wait_for_everyone()

    def validate(self, record: RunRecord) -> None:
        """Score the averaged weights on the valid split, on the main process; all processes meet here."""
        result, model = None, self.state.averaged_model()
        if model is not None:
            result = validate(model, self.valid_readers, self.recipe.validation, self.accelerator.device)
        if self.gate.active:
            self._pass_gate(result, record)
        if result is not None:
            record.validation(result, self.step)  # last: a run that was killed before it does all of this again
        if self.mixing.changes_at(self.step):
            unscored = self.mixing.follow(result.ratios() if result else None, self.step, self.accelerator)
            self.division = self._divide()
            record.shares(self.mixing.schedule, unscored, self.step)
        self.accelerator.wait_for_everyone()

    def compare_gradients(self, record: RunRecord) -> None:
        """Log how the datasets' gradients agree, at multiples of tracking.gradient_cosine_every; all processes meet."""
        every = self.recipe.tracking.gradient_cosine_every
        if not every or not self.step or self.step % every:
            return
        if self.accelerator.is_main_process:
            parallel, device = self.state.parallel, self.accelerator.device
            record.cosines(gradient_cosines(self.recipe, parallel, self.readers, self.step, device), self.step)
        self.accelerator.wait_for_everyone()

    def batches(self) -> Iterator[Batch]:
        """This process's batches from the current step to the last.

        Batches are read ahead, so they are read up to where shares change; what follows is begun when its first batch
        is asked for, which is after the validation.
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

    def gradient(self, batches: Iterator[Batch]) -> tuple[torch.Tensor, float]:
        """That of the current step (fm/gradient.py): losses (draws, 3), and the seconds waited for data."""
        return step_gradient(self.recipe, self.state, self.division, self.accelerator, batches)

    def _pass_gate(self, result: ValidationResult | None, record: RunRecord) -> None:
        """Judge a validation, which the main process has, and keep the best compromise. Collective."""
        verdict = self.gate.judge(result, self.step) if result else None
        if verdict is not None:
            record.verdict(verdict.text, self.step)
        if self.gate.share(verdict, self.accelerator):
            snapshot = self.state.snapshot(self._facts())
            if snapshot is not None:
                try:
                    keep_best(self.directory / "best", snapshot)
                except UserError as failure:
                    self._report_save(failure, record)

    def unroll_length(self, step: int, dataset: str) -> int:
        """Model steps of a dataset's windows in the step after `step` steps."""
        finetune = self.recipe.finetune
        return unroll_length(step, self.recipe.train.steps, finetune, dataset) if finetune else 1

    def _agree(self, losses: torch.Tensor, norm: torch.Tensor, stop: bool) -> tuple[torch.Tensor, bool]:
        """Losses (draws x 3) and gradient norm of every process, (processes, n); whether any was stopped."""
        mine = torch.cat([losses.flatten(), norm.to(losses).reshape(1), losses.new_tensor([float(stop)])])
        everyone = self.accelerator.gather(mine[None]).cpu()
        return everyone[:, :-1], bool(everyone[:, -1].any())

    def _judge(self, draws: list[Draw], losses: list[float], norm: float, record: RunRecord) -> bool:
        """Whether the step's gradient is refused. UserError or RollBack where that ends the run, or this attempt."""
        number = self.step + 1
        if number in self.guard.refused:
            return True  # passed over, after the run was rolled back
        reason = self.guard.judge([self._usual_for(draw.dataset) for draw in draws], losses, norm)
        if reason is None:
            return False
        action = self.recipe.guard.action
        windows: dict[str, list[int]] = {}
        for draw in draws:  # of which several may be of one dataset
            windows.setdefault(draw.dataset, []).extend(draw.windows.tolist())
        refusal = Refusal(number, reason, action, windows)
        snapshot = self.state.snapshot(self._facts())
        if snapshot is not None:
            keep_incident(self.directory / "incidents", snapshot, self.say)
        if action == "stop":
            record.refusal(refusal, number)
            raise UserError(
                f"step {number}: {reason}. The optimiser did not move; the newest checkpoint in {self.checkpoints} is "
                f"from before it.\nLook at the step with `fm replay {self.directory} --step {number}`. Lower "
                "train.learning_rate or train.clip, or let the run go on without such steps (guard.action=skip, or "
                "rollback)."
            )
        self.guard.refuse(number)
        if action == "rollback":
            self._report_save(self.writer.wait(), record)
            self.accelerator.wait_for_everyone()  # until the checkpoint that all go back to is there
            raise RollBack(refusal, self.guard.refused)
        record.refusal(refusal, number)
        return True

    def _usual_for(self, dataset: str) -> str:
        """Whose losses a step's are compared with: longer unrolls have larger ones."""
        grows = self.recipe.finetune is not None and self.recipe.finetune.unroll_start is not None
        return f"{dataset} over {self.unroll_length(self.step, dataset)} model steps" if grows else dataset

    def _report_save(self, failure: UserError | None, record: RunRecord) -> None:
        """Stop the run where a save has failed, or say so and go on (checkpoint.on_error)."""
        if failure is None:
            return
        if self.recipe.checkpoint.on_error == "stop":
            raise failure
        note = "Training goes on (checkpoint.on_error: continue); the next save tries again."
        record.event(f"{failure}\n{note}", self.step)

    def _divide(self) -> Division:
        """How this process shares the steps of the present schedule with the others."""
        train, process = self.recipe.train, self.accelerator
        way = self.recipe.sampling.draw
        rank, world_size = process.process_index, process.num_processes
        schedule, calls = self.mixing.schedule, self.unroll_length
        return Division(schedule, rank, world_size, train.draws, way, train.micro_batch, calls)

    def _check_division(self) -> None:
        if self.recipe.sampling.draw == "per_rank" and not self.state.parallel.holds_whole_model:
            raise UserError(
                f"sampling.draw: per_rank gives processes different numbers of forward passes, but with "
                f"{self.state.parallel.name} each needs all processes; use launch/ddp.yaml, or sampling.draw=global"
            )

    def _newest_checkpoint(self) -> Path | None:
        def look() -> int | None:
            found = newest_checkpoint(self.checkpoints, self.say)
            return None if found is None else read_state(found)["step"]

        step = as_main_process_finds(self.accelerator, look)
        return None if step is None else step_directory(self.checkpoints, step)

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
        self.division = self._divide()
        before = resolve(facts["recipe"], str(checkpoint / "state.json"))
        self.changes = changed_settings(recipe_to_dict(before), recipe_to_dict(self.recipe))

    def _killed_while_validating_the_end(self) -> bool:
        steps = self.recipe.train.steps
        due = self.step == steps and self._validated_at(steps)
        return due and lacks_validation(self.directory / "events.jsonl", steps)

    def _validated_at(self, step: int) -> bool:
        """Whether there is a validation after `step` steps: every so many, and at the end of a run that is longer."""
        every = self.recipe.validation.every
        last = step == self.recipe.train.steps and (step > every or self.gate.active)
        return every > 0 and (step % every == 0 or last)
