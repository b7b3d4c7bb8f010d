"""`fm replay RUN --step N`: one step of a run again, from the state before it, and what went through it; read only.

The state is the incident's, if the guard refused the step, else that of the newest checkpoint before it, from which the
steps between are run again, in one process: where several trained, the numbers differ by the order of summation.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.files import UserError
from data_pipeline.windows.schedule import Draw
from fm.checkpoint import list_checkpoints, verify_checkpoint
from fm.config import Recipe, load_recipe
from fm.distributed import StopSignal, make_accelerator
from fm.model.surrogate import Surrogate
from fm.training.record import NullRecord
from fm.training.runlog import parse_lines
from fm.training.step import StepMetrics
from fm.training.trainer import Trainer


@dataclass(frozen=True)
class ChannelStatistics:
    """One state channel of a mini-batch: its first frames, the frames after them, and what the model makes of those."""

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
    windows: Sequence[tuple[int, int, int, float]]  # id, trajectory, first frame, mean squared error, largest first


@dataclass(frozen=True)
class Replay:
    """What went through one step."""

    step: int
    state: Path  # the checkpoint before it
    again: int  # steps between, that were run again
    draws: Sequence[DrawStatistics]
    gradient: Mapping[str, float]  # norm, by part of the model, before clipping
    logged: float | None  # loss in log.jsonl; None where it was not finite, or there is no line


def replay(run: Path, step: int, shards: str | None = None) -> Replay:
    """Run step `step`, counted from 1, of a run again. UserError where nothing before it is kept."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: not a run directory, it has no recipe.yaml")
    recipe = load_recipe(run / "recipe.yaml", [f"data.shards={shards}"] if shards else [])
    if not 1 <= step <= recipe.train.steps:
        raise UserError(f"--step: expected 1 to {recipe.train.steps}, the length of {run}, got {step}")
    state = _state_before(run, step)
    with tempfile.TemporaryDirectory(prefix="fm-replay-") as folder:
        trainer = Trainer(_harmless(recipe, folder), make_accelerator(recipe.train.clip), checkpoint=state)
        again = _run_to(trainer, step - 1)
        gradient: dict[str, float] = {}

        def keep_norms(metrics: StepMetrics) -> bool:
            gradient.update(_gradient_norms(trainer.state.parallel.model))
            return True  # the weights stay as they are

        taken = trainer.take_step(step - 1, keep_norms)
        draws = zip(taken.draws, taken.metrics.losses, strict=True)
        statistics = [_statistics(trainer, draw, loss) for draw, loss in draws]
    return Replay(step, state, again, statistics, gradient, _logged(run / "log.jsonl", step))


def replay_text(result: Replay) -> str:
    """The replay for people."""
    logged = "none that is finite" if result.logged is None else f"{result.logged:.6g}"
    lines = [
        f"step {result.step}, from {result.state} ({result.again} steps run again)",
        f"loss           {sum(d.loss for d in result.draws) / len(result.draws):.6g}; in log.jsonl: {logged}",
        f"gradient norm  {math.hypot(*result.gradient.values()):.4g} before clipping",
        *(f"  {part:<24} {norm:.4g}" for part, norm in result.gradient.items()),
    ]
    for draw in result.draws:
        lines += ["", f"{draw.dataset}, loss {draw.loss:.6g}", _table(draw.channels), "windows, largest error first"]
        lines += [
            f"  window {window}: trajectory {trajectory}, from frame {frame}, mean squared error {error:.4g}"
            for window, trajectory, frame, error in draw.windows[:8]
        ]
    return "\n".join(lines)


def _state_before(run: Path, step: int) -> Path:
    """The newest whole state after fewer than `step` steps."""
    found = [*list_checkpoints(run / "incidents").items(), *list_checkpoints(run / "checkpoints").items()]
    for _, path in sorted(((done, path) for done, path in found if done < step), reverse=True):
        try:
            verify_checkpoint(path)
            return path
        except UserError as error:
            print(f"skipping a damaged checkpoint: {error}")
    kept = ", ".join(str(done) for done, _ in sorted(found)) or "none"
    raise UserError(
        f"{run}: no state before step {step} is kept (those after steps {kept} are). Keep more with checkpoint.keep or "
        "checkpoint.keep_every; what precedes a refused step is kept in incidents/, the newest three."
    )


def _harmless(recipe: Recipe, folder: str) -> Recipe:
    """The recipe, writing elsewhere, in which no step ends the run; the state after each is known."""
    guard = replace(recipe.guard, action="skip", max_events=10**9)
    run, train = replace(recipe.run, dir=folder, stop_at=None), replace(recipe.train, read_every=1)
    return replace(recipe, run=run, train=train, guard=guard)


def _run_to(trainer: Trainer, step: int) -> int:
    """Take the steps up to `step`; returns how many."""
    again = step - trainer.step
    record = NullRecord()
    with tqdm(total=step, initial=trainer.step, desc="replay", unit="step", disable=not again) as bar:
        while True:
            if trainer.mixing.changes_at(trainer.step):
                trainer.validate(record)
            if trainer.step == step:
                return again
            trainer.train_steps(StopSignal(), record)
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
    model, reader = trainer.state.parallel.model, trainer.readers[draw.dataset]
    length = trainer.lengths[draw.dataset]
    batch = reader.batch(draw.windows, length, draw=draw.index).to(trainer.accelerator.device)
    fields, constants = batch.fields, batch.constants
    first, target = model.normalize(fields[:, 0], draw.dataset), model.normalize(fields[:, 1], draw.dataset)
    prediction = model(first, model.normalize_constants(constants, draw.dataset), draw.dataset)
    squared = (prediction - target).square()  # (B, C, H, W)
    parts = {"input": fields[:, 0], "target": fields[:, 1], "prediction": model.denormalize(prediction, draw.dataset)}
    channels = [
        ChannelStatistics(
            name,
            {part: _range(values[:, c]) for part, values in parts.items()},
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


def _range(values: Tensor) -> tuple[float, float]:
    finite = values[torch.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.numel() else (math.nan, math.nan)


def _logged(log: Path, step: int) -> float | None:
    lines, _ = parse_lines(log.read_text(errors="replace")) if log.is_file() else ([], 0)
    return next((line.get("loss") for line in lines if line["step"] == step), None)


def _table(channels: Sequence[ChannelStatistics]) -> str:
    """Ranges in physical units; a count of cells that are not finite where there are any."""
    rows = [["channel", "input", "target", "prediction", "rms error / std"]]
    for channel in channels:
        ranges = [f"{low:.4g} .. {high:.4g}" for low, high in channel.ranges.values()]
        counts = [f" ({count} not finite)" if count else "" for count in channel.nonfinite.values()]
        cells = [cell + count for cell, count in zip(ranges, counts, strict=True)]
        rows.append([channel.name, *cells, f"{channel.rms_error:.4g}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)
