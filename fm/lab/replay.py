"""`fm replay RUN --step N`: take one step of a run again and show its data, losses and gradients. The run is only read.

The step starts from the state of the incident if the step was refused, else from the newest checkpoint before it; the
steps between are then taken again. Everything runs in one process. If several processes trained, the numbers differ by
the order of summation.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import indent

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.progress import progress_bar
from data_pipeline.tables import plain
from data_pipeline.windows.schedule import Draw
from fm.checkpoint import list_checkpoints, verify_checkpoint
from fm.config import load_recipe
from fm.distributed import StopSignal, make_accelerator
from fm.model.surrogate import Surrogate
from fm.training.runlog import parse_lines
from fm.training.step import StepMetrics
from fm.training.trainer import Trainer

SHOWN_WINDOWS = 8


@dataclass(frozen=True)
class ChannelStatistics:
    """One state channel in the input, target and prediction of a mini-batch."""

    name: str
    ranges: Mapping[str, tuple[float, float]]  # least and greatest finite value, physical units
    nonfinite: Mapping[str, int]  # cells
    rms_error: float  # normalized


@dataclass(frozen=True)
class DrawStatistics:
    """One mini-batch of the step."""

    dataset: str
    loss: float  # as in training
    channels: Sequence[ChannelStatistics]
    windows: Sequence[tuple[int, int, int, float]]  # id, trajectory, first frame, mean squared error; largest first


@dataclass(frozen=True)
class Replay:
    """The data, losses and gradients of one step."""

    step: int
    state: Path  # the checkpoint before the step
    again: int  # steps between, which were taken again
    draws: Sequence[DrawStatistics]
    gradient: Mapping[str, float]  # norm before clipping, by part of the model
    logged: float | None  # loss in log.jsonl; None if it was not finite, or there is no line


def replay(run: Path, step: int, shards: str | None = None) -> Replay:
    """Take step number `step`, counted from 1, of a run again. UserError if no state before it is kept."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: not a run directory, it has no recipe.yaml")
    recipe = load_recipe(run / "recipe.yaml", [f"data.shards={shards}"] if shards else [])
    if not 1 <= step <= recipe.train.steps:
        raise UserError(f"--step: expected 1 to {recipe.train.steps}, the length of {run}, got {step}")
    state = _state_before(run, step)
    with tempfile.TemporaryDirectory(prefix="fm-replay-") as folder:
        recipe = replace(
            recipe,
            run=replace(recipe.run, dir=folder, stop_at=None),
            train=replace(recipe.train, read_every=1),
            guard=replace(recipe.guard, action="skip", max_events=10**9),  # no step ends the run
        )
        trainer = Trainer(recipe, make_accelerator(recipe.train.clip), checkpoint=state)
        again = _train_to(trainer, step - 1)
        gradient: dict[str, float] = {}

        def keep_norms(metrics: StepMetrics) -> bool:
            gradient.update(_gradient_norms(trainer.state.parallel.model))
            return True  # leave the weights as they are

        taken = trainer.take_step(step - 1, keep_norms)
        draws = [_statistics(trainer, *one) for one in zip(taken.draws, taken.metrics.losses, strict=True)]
    log = run / "log.jsonl"
    lines, _ = parse_lines(log.read_text(errors="replace")) if log.is_file() else ([], 0)
    logged = next((line.get("loss") for line in lines if line["step"] == step), None)
    return Replay(step, state, again, draws, gradient, logged)


def _state_before(run: Path, step: int) -> Path:
    """Return the newest whole checkpoint after fewer than `step` steps."""
    found = [*list_checkpoints(run / "incidents").items(), *list_checkpoints(run / "checkpoints").items()]
    for _, path in sorted((one for one in found if one[0] < step), reverse=True):
        try:
            verify_checkpoint(path)
            return path
        except UserError as error:
            print(f"skipping a damaged checkpoint: {error}")
    kept = ", ".join(str(done) for done, _ in sorted(found)) or "none"
    raise UserError(
        f"{run}: no state before step {step} is kept (those after steps {kept} are). Keep more with checkpoint.keep or "
        "checkpoint.keep_every; the states before the newest three refused steps are kept in incidents/."
    )


def _train_to(trainer: Trainer, step: int) -> int:
    """Train until `step` steps are taken; return how many were missing."""
    missing = step - trainer.step
    with progress_bar(total=step, initial=trainer.step, desc="replay", unit="step", disable=not missing) as bar:
        while True:
            if trainer.mixing.changes_at(trainer.step):  # adaptive shares follow the validation
                trainer.validate(StopSignal())
            if trainer.step == step:
                return missing
            trainer.train_steps(StopSignal())
            bar.update()


def _gradient_norms(model: Surrogate) -> dict[str, float]:
    """Return the gradient norm of each part of the model: blocks by number, heads and task vectors by dataset."""
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = ".".join(name.split(".")[: 1 if name.startswith("lifting") else 2])
            squares[part] = squares.get(part, 0.0) + float(parameter.grad.double().square().sum())
    return {part: math.sqrt(square) for part, square in squares.items()}


@torch.no_grad()
def _statistics(trainer: Trainer, draw: Draw, loss: float) -> DrawStatistics:
    """Return the statistics of a mini-batch, with the prediction of the first model step."""
    model, reader, length = trainer.state.parallel.model, trainer.readers[draw.dataset], trainer.lengths[draw.dataset]
    batch, context = reader.batch(draw.windows, length, draw=draw.index).to(trainer.accelerator.device), model.context
    batch = trainer.state.augmented(batch, np.arange(len(draw.windows)))
    fields = model.normalize(batch.fields, draw.dataset)
    target = fields[:, context]  # (B, C, H, W)
    constants = model.normalize_constants(batch.constants, draw.dataset)
    scalars = model.normalize_scalars(batch.scalars, draw.dataset, len(fields), fields.device)
    prediction = model(fields[:, :context], constants, draw.dataset, scalars)
    squared = (prediction - target).square()  # (B, C, H, W)
    predicted = model.denormalize(prediction, draw.dataset)
    parts = {
        "input": batch.fields[:, context - 1],
        "target": batch.fields[:, context],
        "prediction": predicted,
    }
    channels = [
        ChannelStatistics(
            name,
            {part: _finite_range(values[:, c]) for part, values in parts.items()},
            {part: int((~torch.isfinite(values[:, c])).sum()) for part, values in parts.items()},
            float(squared[:, c].mean().sqrt()),
        )
        for c, name in enumerate(reader.manifest.state_channels)
    ]
    errors = squared.mean(dim=(1, 2, 3)).tolist()
    trajectories, frames = reader.index(length).locate(draw.windows)
    windows = zip(draw.windows.tolist(), trajectories.tolist(), frames.tolist(), errors, strict=True)
    ordered = sorted(windows, key=lambda window: -window[3] if math.isfinite(window[3]) else -math.inf)
    return DrawStatistics(draw.dataset, loss, channels, ordered)


def _finite_range(values: Tensor) -> tuple[float, float]:
    finite = values[torch.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.numel() else (math.nan, math.nan)


def replay_text(result: Replay) -> str:
    """Return the replay as text."""
    logged = "none that is finite" if result.logged is None else f"{result.logged:.6g}"
    lines = [
        f"step {result.step}, from {result.state} ({result.again} steps run again)",
        f"loss           {sum(d.loss for d in result.draws) / len(result.draws):.6g}; in log.jsonl: {logged}",
        f"gradient norm  {math.hypot(*result.gradient.values()):.4g} before clipping",
        *(f"  {part:<24} {norm:.4g}" for part, norm in result.gradient.items()),
    ]
    head = ["channel", "input", "target", "prediction", "rms error / std"]
    for draw in result.draws:
        rows = []
        for channel in draw.channels:
            counts = [f" ({count} not finite)" if count else "" for count in channel.nonfinite.values()]
            ranges = zip(channel.ranges.values(), counts, strict=True)
            cells = [f"{low:.4g} .. {high:.4g}{count}" for (low, high), count in ranges]
            rows.append([channel.name, *cells, f"{channel.rms_error:.4g}"])
        table = indent(plain(head, rows, text_columns=head), "  ")
        lines += ["", f"{draw.dataset}, loss {draw.loss:.6g}", table, "windows, largest error first"]
        lines += [
            f"  window {window}: trajectory {trajectory}, from frame {frame}, mean squared error {error:.4g}"
            for window, trajectory, frame, error in draw.windows[:SHOWN_WINDOWS]
        ]
    return "\n".join(lines)
