"""The gradient of one step: this process's pieces of it, forward and backward.

Each window counts 1 / train.global_batch, whichever process takes it, in however many pieces.

Steps whose losses nobody has read yet.

To read a number from a GPU is to wait until it has computed it, and meanwhile nobody hands it work. So the trainer
reads what several steps found at once. Until then a flag on the device judges: from the first step whose loss or
gradient is not finite on, optimiser and averaged weights stand still, so the state is the one before that step when the
trainer reads of it, and goes back to it.

Optimiser steps: fetch, forward, backward, clip, judge on all processes alike, move.

Which windows, teacher-forcing coins and learning rate a step gets is a function of (recipe, step), so continuing a run
is arithmetic. With adaptive sampling the windows depend on the history of shares too, which the checkpoints hold.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from data_pipeline.files import UserError, sha256
from data_pipeline.windows.loader import scheduled_batches
from data_pipeline.windows.reader import Batch, ShardReader
from data_pipeline.windows.schedule import Division, Draw, MicroBatch
from fm.checkpoint import keep_incident
from fm.config import Recipe
from fm.distributed import autocast_dtype, precision
from fm.training.guard import Guard, Refusal
from fm.training.mixing import Mixing
from fm.training.objective import forcing_coins, forcing_prob, input_noise, unroll_length
from fm.training.optim import learning_rate, learns_alone
from fm.training.record import NullRecord, RunRecord, StepResult
from fm.training.state import TrainingState


def step_gradient(
    recipe: Recipe,
    state: TrainingState,
    division: Division,
    accelerator: Accelerator,
    batches: Iterator[Batch],
    mark: Callable[[str], None] = lambda phase: None,
) -> tuple[torch.Tensor, float]:
    """Leave the gradient of the step after `state.step`, averaged over the processes, with the parameters. Collective.

    `batches` gives this process's pieces of the step; `mark` is told when forward or backward of a piece is at its end.
    Returns its parts of each draw's loss, mse and wavelet_l1
    (draws, 3), which add up to the whole over the processes, and the seconds it waited for data.
    """
    pieces = division.micro_batches(state.step)
    losses, waited = torch.zeros(division.draws, 3, device=accelerator.device), 0.0
    for number, piece in enumerate(pieces):
        fetch = time.perf_counter()
        batch = next(batches).to(accelerator.device, non_blocking=True)
        waited += time.perf_counter() - fetch
        assert batch.draw == piece.draw
        assert batch.dataset == division.schedule.source(piece.draw).name  # else shares have changed since it was read
        inputs = _inputs(recipe, state.step, piece, batch)
        # processes average their gradients, so each counts as many times more
        weight = len(piece.places) * accelerator.num_processes / recipe.train.global_batch
        autocast = autocast_dtype(recipe.train.precision, accelerator.device)
        with state.parallel.accumulate(last=number == len(pieces) - 1), precision(autocast):
            terms = state.parallel.objective(**inputs)
            mark("forward")
            state.parallel.backward(terms["loss"] * weight)
            mark("backward")
        share = len(piece.places) / recipe.train.batch
        found = torch.stack([terms["loss"].detach(), terms["mse"], terms["wavelet_l1"]])
        losses[piece.draw - state.step * division.draws] += share * found
    return losses, waited


def _inputs(recipe: Recipe, step: int, piece: MicroBatch, batch: Batch) -> dict[str, Any]:
    """What the objective takes: the piece's windows, as long as this step's unroll, with its coins and its noise."""
    seed, train, finetune, device = recipe.run.seed, recipe.train, recipe.finetune, batch.fields.device
    length, prob = 1, 0.0
    if finetune is not None:
        length = unroll_length(step, train.steps, finetune, batch.dataset)
        prob = forcing_prob(step, train.steps, finetune)
    coins = forcing_coins(seed, piece.draw, train.batch, length, prob)[piece.places]
    noise = None
    if train.jitter:
        shape = (length, *batch.fields.shape[2:])
        noise = input_noise(seed, piece.draw, piece.places, shape, train.jitter, device)
    return {
        "fields": batch.fields[:, : length + 1],
        "constants": batch.constants,
        "forced": _sent(torch.from_numpy(coins), device),
        "dataset": batch.dataset,
        "noise": noise,
    }


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. Only from page-locked memory does a GPU copy without making the host wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass(frozen=True)
class Found:
    """What the processes found in a step together: per draw loss, mse and wavelet_l1; gradient norm; a stop."""

    values: Tensor  # (3 * draws + 2,)

    @classmethod
    def by(cls, everyone: Tensor) -> "Found":
        """`everyone` is (processes, 3 * draws + 2): parts of the losses, which add up, the norm, 1 where stopped."""
        return cls(torch.cat([everyone[:, :-2].sum(dim=0), everyone[:, -2:].amax(dim=0)]))

    @property
    def losses(self) -> list[float]:
        """One per draw."""
        return self.values[:-2:3].tolist()

    @property
    def mse(self) -> float:
        return float(self.values[1:-2:3].mean())

    @property
    def wavelet_l1(self) -> float:
        return float(self.values[2:-2:3].mean())

    @property
    def norm(self) -> float:
        """Of the gradient, before clipping."""
        return float(self.values[-2])

    @property
    def stop(self) -> bool:
        """Whether a process was asked to stop."""
        return bool(self.values[-1])

    def is_broken(self) -> Tensor:
        """1 where a loss or the norm is not finite, else 0; float32, on the device, as the optimiser takes it."""
        judged = torch.cat([self.values[:-2:3], self.values[-2:-1]])
        return 1 - torch.isfinite(judged).all().float()


@dataclass(frozen=True)
class Taken:
    """A step that was taken."""

    number: int  # counted from 1
    draws: Sequence[Draw]
    lr: float
    started: float  # time.perf_counter
    data_seconds: float
    found: Found


class Ahead:
    """The steps since the last read."""

    def __init__(self) -> None:
        self._taken: list[Taken] = []
        self._halted: Tensor | None = None

    def add(self, taken: Taken) -> None:
        self._taken.append(taken)

    def halted(self) -> Tensor:
        """1 if the step added last is broken, or one that this was asked of since the last read; else 0."""
        broken = self._taken[-1].found.is_broken()
        self._halted = broken if self._halted is None else torch.maximum(self._halted, broken)
        return self._halted

    def read(self) -> list[Taken]:
        """The steps since the last read, in the processor's memory."""
        taken, self._taken, self._halted = self._taken, [], None
        rows = torch.stack([step.found.values for step in taken]).cpu()
        return [replace(step, found=Found(row)) for step, row in zip(taken, rows, strict=True)]


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

    def take(self, stop: bool, record: RunRecord | NullRecord) -> bool:
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
        """That of the next step (fm/training/step.py): losses (draws, 3), and the seconds waited for data."""
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

    def _read(self, record: RunRecord | NullRecord) -> bool:
        """Judge and record the steps since the last read, up to one that is refused; the state goes back to that one.

        Returns whether a process was asked to stop in one of them.
        """
        taken = self._ahead.read()
        seconds = (time.perf_counter() - taken[0].started) / len(taken)
        for one in taken:
            self.state.step = one.number - 1
            refused = one.number not in self.guard.refused and self._refuses(one, record)
            record.log_step(self._result(one, seconds))
            if refused:
                if one is not taken[-1]:
                    self._batches = None  # those of the steps after it come again
                break
        return any(one.found.stop for one in taken)

    def _refuses(self, taken: Taken, record: RunRecord | NullRecord) -> bool:
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
            record.log_refusal(refusal, number)
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
        record.log_refusal(refusal, number)
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
            windows=sha256("".join(draw.digest() for draw in taken.draws).encode())[:16],
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
