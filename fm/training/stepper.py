"""Optimiser steps: fetch, forward, backward, clip, judge on all processes alike, move.

Which windows, teacher-forcing coins and learning rate a step gets is a function of (recipe, step), so continuing a run
is arithmetic. With adaptive sampling the windows depend on the history of shares too, which the checkpoints hold.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator

from data_pipeline.errors import UserError
from data_pipeline.windows.batch import Batch
from data_pipeline.windows.division import Division
from data_pipeline.windows.loader import scheduled_batches
from data_pipeline.windows.reader import ShardReader
from fm.adapt import learns_alone
from fm.checkpoint_writer import keep_incident
from fm.curriculum import unroll_length
from fm.guard import Guard, Refusal
from fm.optim import learning_rate
from fm.record import RunRecord, StepResult
from fm.settings import Recipe
from fm.training.ahead import Ahead, Found, Taken
from fm.training.gradient import step_gradient
from fm.training.mixing import Mixing
from fm.training.state import TrainingState

READ_EVERY = 10  # steps, on a device that computes while the processor goes on


class RollBack(Exception):
    """The run returns to its last checkpoint, and passes over the steps in `refused` this time."""

    def __init__(self, refusal: Refusal, refused: set[int]) -> None:
        super().__init__(f"step {refusal.step} refused")
        self.refusal, self.refused = refusal, refused


class Stepper:
    """Takes the steps of a run, one after another, from where `state` is.

    `facts` gives what state.json holds, for the snapshots of refused steps. `looks_at(step)` is whether the state
    after `step` steps is looked at, so that all steps up to there must have been read and judged.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        state: TrainingState,
        readers: Mapping[str, ShardReader],
        mixing: Mixing,
        guard: Guard,
        facts: Callable[[], dict[str, Any]],
        looks_at: Callable[[int], bool],
    ) -> None:
        self.recipe, self.accelerator, self.state, self.readers = recipe, accelerator, state, readers
        self.mixing, self.guard, self._facts, self._looks_at = mixing, guard, facts, looks_at
        self.lengths = {name: recipe.window_length(name) for name in readers}
        self.divide()
        self._ahead = Ahead()
        # FSDP and DeepSpeed cannot halt on the device, and what is usual depends on the step before
        self._reads_first = not state.parallel.can_halt or recipe.guard.spike is not None
        self._read_every = recipe.train.read_every or (1 if accelerator.device.type == "cpu" else READ_EVERY)
        self._batches: Iterator[Batch] | None = None
        self._uncounted = 0.0  # seconds of the last step that its own time does not hold

    def divide(self) -> None:
        """Share out the steps of the present schedule between the processes."""
        train, process = self.recipe.train, self.accelerator
        rank, world_size = process.process_index, process.num_processes
        way, calls = self.recipe.sampling.draw, self.unroll_length
        self.division = Division(self.mixing.schedule, rank, world_size, train.draws, way, train.micro_batch, calls)
        if way == "per_rank" and not self.state.parallel.holds_whole_model:
            raise UserError(
                f"sampling.draw: per_rank gives processes different numbers of forward passes, but with "
                f"{self.state.parallel.name} each needs all processes; use launch/ddp.yaml, or sampling.draw=global"
            )

    def unroll_length(self, step: int, dataset: str) -> int:
        """Model steps of a dataset's windows in the step after `step` steps."""
        finetune = self.recipe.finetune
        return unroll_length(step, self.recipe.train.steps, finetune, dataset) if finetune else 1

    def take(self, stop: bool, record: RunRecord) -> bool:
        """Take a step; `stop` is whether this process was asked to. Collective.

        If it is time to read, `record` gets the steps that nobody has read; returns whether a process was asked to stop
        in one of them. Where one was refused the run is back after it, and takes those that followed again. RollBack or
        UserError where that ends this attempt or the run.
        """
        started, step = time.perf_counter() - self._uncounted, self.state.step
        torch.manual_seed(self.recipe.run.seed * 1_000_003 + step)  # so that any random layer resumes exactly
        parallel, lr = self.state.parallel, learning_rate(step, self.recipe.train)
        parallel.optimizer.set_learning_rate(lr)
        draws = self.division.draws_of(step)
        parallel.let_rest([draw.dataset for draw in draws], alone=learns_alone(self.recipe.adapt, step))
        losses, waited = self.gradient()
        found = self._agree(losses, parallel.clip(self.recipe.train.clip), stop)
        self._ahead.add(Taken(step + 1, draws, lr, started, waited, found))
        stopped, self._uncounted = False, 0.0
        if self._reads_first:
            stopped, began = self._read(record), time.perf_counter()
            self._move()
            self._uncounted = time.perf_counter() - began
        else:
            self._move(halts=True)
            if self._must_read(step + 1):
                stopped = self._read(record)
        parallel.forget()
        self.state.step += 1
        return stopped

    def gradient(self) -> tuple[torch.Tensor, float]:
        """That of the next step (fm/training/gradient.py): losses (draws, 3), and the seconds waited for data."""
        if self._batches is None:
            self._batches = self._read_ahead()
        return step_gradient(self.recipe, self.state, self.division, self.accelerator, self._batches)

    def _read_ahead(self) -> Iterator[Batch]:
        """This process's batches from the next step to the last.

        Batches are read ahead, so they are read up to where shares change; what follows is begun when its first batch
        is asked for, which is after the validation.
        """
        while self.state.step < self.recipe.train.steps:
            yield from scheduled_batches(
                self.readers,
                self.division,
                length=self.lengths,
                start=self.state.step,
                stop=self.mixing.known_until(self.state.step),
                workers=self.recipe.data.workers,
                pin_memory=self.accelerator.device.type == "cuda",
            )

    def _agree(self, losses: torch.Tensor, norm: torch.Tensor, stop: bool) -> Found:
        """What all processes find, from this one's losses (draws, 3), gradient norm and wish to stop."""
        mine = torch.cat([losses.flatten(), norm.to(losses).reshape(1), losses.new_full((1,), float(stop))])
        return Found.by(self.accelerator.gather(mine[None]))

    def _move(self, halts: bool = False) -> None:
        """Move weights and averages, if the step was not refused; `halts` leaves that to a flag on the device."""
        if self.state.step + 1 in self.guard.refused:  # or passed over, after the run was rolled back
            return
        halted = self._ahead.halted() if halts else None
        self.state.parallel.move(halted)
        self.state.ema.update(self.state.parallel.shards(), self.state.step, halted)

    def _must_read(self, number: int) -> bool:
        return number % self._read_every == 0 or self._looks_at(number)

    def _read(self, record: RunRecord) -> bool:
        """Judge and record the steps since the last read, up to one that is refused; the state goes back to that one.

        Returns whether a process was asked to stop in one of them.
        """
        taken = self._ahead.read()
        seconds = (time.perf_counter() - taken[0].started) / len(taken)
        for one in taken:
            self.state.step = one.number - 1
            refused = one.number not in self.guard.refused and self._refuses(one, record)
            record.step(self._result(one, seconds))
            if refused:
                if one is not taken[-1]:
                    self._batches = None  # those of the steps after it come again
                break
        return any(one.found.stop for one in taken)

    def _refuses(self, taken: Taken, record: RunRecord) -> bool:
        """Whether a step's gradient is refused; UserError or RollBack where that ends the run, or this attempt."""
        usual = [self._usual_for(draw.dataset) for draw in taken.draws]
        reason = self.guard.judge(usual, taken.found.losses, taken.found.norm)
        if reason is None:
            return False
        action, number = self.recipe.guard.action, taken.number
        windows: dict[str, list[int]] = {}
        for draw in taken.draws:  # of which several may be of one dataset
            windows.setdefault(draw.dataset, []).extend(draw.windows.tolist())
        refusal = Refusal(number, reason, action, windows)
        snapshot = self.state.snapshot(self._facts())
        if snapshot is not None:
            keep_incident(self.recipe.run.directory / "incidents", snapshot, self.accelerator.print)
        if action == "stop":
            record.refusal(refusal, number)
            run = self.recipe.run.directory
            raise UserError(
                f"step {number}: {reason}. The optimiser did not move; the newest checkpoint in {run / 'checkpoints'} "
                f"is from before it.\nLook at the step with `fm replay {run} --step {number}`. Lower "
                "train.learning_rate or train.clip, or let the run go on without such steps (guard.action=skip, or "
                "rollback)."
            )
        self.guard.refuse(number)
        if action == "rollback":
            raise RollBack(refusal, self.guard.refused)
        record.refusal(refusal, number)
        return True

    def _usual_for(self, dataset: str) -> str:
        """Whose losses a step's are compared with: longer unrolls have larger ones."""
        grows = self.recipe.finetune is not None and self.recipe.finetune.unroll_start is not None
        return f"{dataset} over {self.unroll_length(self.state.step, dataset)} model steps" if grows else dataset

    def _result(self, taken: Taken, seconds: float) -> StepResult:
        names = tuple(draw.dataset for draw in taken.draws)
        return StepResult(
            step=taken.number,
            datasets=names,
            grids=tuple(self.readers[name].manifest.grid for name in names),
            windows=hashlib.sha256("".join(draw.digest() for draw in taken.draws).encode()).hexdigest()[:16],
            losses=tuple(taken.found.losses),
            mse=taken.found.mse,
            wavelet_l1=taken.found.wavelet_l1,
            grad_norm=taken.found.norm,
            lr=taken.lr,
            samples=self.recipe.train.global_batch,
            model_calls=tuple(self.unroll_length(taken.number - 1, name) for name in names),
            data_seconds=taken.data_seconds,
            seconds=seconds,
            stop=taken.found.stop,
        )
