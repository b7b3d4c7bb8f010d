"""Checks of a run: its datasets and their size, the datasets' gradients, and the memory of its largest step."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.hashing import stream_key, uniform
from data_pipeline.registry import Registry
from data_pipeline.windows.division import Division
from data_pipeline.windows.loader import shard_places
from data_pipeline.windows.reader import ShardReader
from data_pipeline.windows.schedule import Schedule
from fm.checkpoint import newest_checkpoint, read_state
from fm.config import AVAILABLE, Recipe
from fm.datasets import with_available_datasets
from fm.distributed import autocast_dtype, broadcast_from_main, peak_memory_bytes
from fm.evaluation.cosines import Cosines
from fm.training.dry_run import DryRun, resized
from fm.training.flops import held_calls
from fm.training.objective import Unroll
from fm.training.parallel import Parallel
from fm.training.state import TrainingState

WINDOWS = 4  # of each dataset
LONG_RUN = 100_000  # optimizer steps that take hours to days
PART = 0.1  # of the published dataset: shards that hold less are not the whole dataset
MANY = 10  # times sampling.max_passes; the paper's runs of one dataset pass at most 308 times, 8 times the default


def check_launch(recipe: Recipe, parallel: Parallel, datasets: Sequence[str]) -> None:
    """Raise UserError if the recipe asks for what the launch configuration or the run's datasets do not allow."""
    if recipe.sampling.draw == "per_rank" and not parallel.holds_whole_model:
        raise UserError(
            "sampling.draw: per_rank gives processes different numbers of forward passes, but with "
            f"{parallel.name} each needs all processes; use launch/ddp.yaml, or sampling.draw=global"
        )
    if not recipe.tracking.gradient_cosine_every:
        return
    if len(datasets) < 2:
        raise UserError(
            f"tracking.gradient_cosine_every needs two datasets or more, got {datasets[0]} alone; leave it "
            "out, or set it to 0"
        )
    if not parallel.holds_whole_model:
        raise UserError(
            "tracking.gradient_cosine_every computes on the main process alone, but with "
            f"{parallel.name} none holds the whole model; use launch/ddp.yaml or DeepSpeed ZeRO-1 or 2, or set it to 0"
        )


def settle_datasets(recipe: Recipe, registry: Registry, accelerator: Accelerator) -> Recipe:
    """Return the recipe with names in place of `available` in data.datasets, the same on all processes. Collective.

    A run that continues keeps the datasets of its newest checkpoint, even where shards were added since.
    """
    if AVAILABLE not in (recipe.data.datasets or ()):
        registry.select(recipe.data.datasets)  # raises UserError for an unknown name
        return recipe
    checkpoints = recipe.run.directory / "checkpoints"

    def look() -> list[str] | None:
        continues = recipe.checkpoint.resume == "auto"
        newest = newest_checkpoint(checkpoints, lambda message: None) if continues else None
        recorded = sorted(read_state(newest)["shards"]) if newest is not None else None
        return with_available_datasets(recipe, registry, recorded).data.datasets

    names = broadcast_from_main(accelerator, look)
    accelerator.print(f"data.datasets: available: {', '.join(names or ())}")
    return replace(recipe, data=replace(recipe.data, datasets=names))


def check_size(
    recipe: Recipe, step: int, schedule: Schedule, readers: Mapping[str, ShardReader], registry: Registry
) -> None:
    """Raise UserError, a question, where a new run of LONG_RUN steps or more has data for much fewer.

    That is: it passes more than sampling.max_passes times over a dataset of which the shards hold less than PART of
    what its card publishes, or MANY times as often over any dataset.
    """
    limit, steps = recipe.sampling.max_passes, min(recipe.train.steps, recipe.run.stop_at or recipe.train.steps)
    if step or limit is None or steps < LONG_RUN:
        return
    passes, lines = schedule.passes(steps * recipe.train.draws), []
    for name, reader in sorted(readers.items()):
        card, manifest = registry.card(name), reader.manifest
        pairs = sum(trajectory.frames - 1 for trajectory in manifest.trajectories)
        part = pairs * int(np.prod(manifest.grid)) / (card.windows * int(np.prod(card.grid)) or np.nan)
        if passes[name] > (limit if part < PART else MANY * limit):
            published = f"; the published dataset is {1 / part:,.0f} times as large" if part < PART else ""
            grid = f"{manifest.grid[0]} x {manifest.grid[1]}"
            lines.append(f"  {passes[name]:,.0f} times over {name}: {pairs:,} pairs of frames of {grid}{published}")
    if lines:
        listed, fewer = "\n".join(lines), int(steps * limit / max(passes.values()))
        places = ", ".join(shard_places(recipe.data.shards))
        raise UserError(
            f"is this meant? {steps:,} steps (train.steps) pass\n{listed}\nNothing was trained. If it is not meant, "
            f"put the whole data into {places}, or train fewer steps: train.steps={fewer} passes at most "
            f"{limit:g} times; for the mini-Well there is recipes/quickstart.yaml. If it is, add\n"
            "  sampling.max_passes=null"
        )


def gradient_cosines(
    recipe: Recipe, parallel: Parallel, readers: Mapping[str, ShardReader], step: int, device: torch.device
) -> Cosines:
    """Return the cosines between the gradients of the datasets of `readers` (train split). Not collective.

    They show whether the datasets change the shared parameters in the same direction. Each dataset's gradient is that
    of the one-step training loss over WINDOWS windows, a hash of (seed, step, dataset), at the present weights, with
    respect to the parameters that all datasets use. The model is in evaluation mode and no `.grad` changes, so the
    training is the same bit for bit. Eight datasets every 1000 steps of global batch 4 add 0.8 % to the time. With ten
    million parameters their gradients take 0.3 GB.
    """
    model = parallel.model
    objective = Unroll(model, recipe.loss, autocast=autocast_dtype(recipe.train.precision, device))
    shared = model.parameters_by_datasets()[frozenset(model.specs)]
    length = model.context + 1
    seed, training = recipe.run.seed, model.training
    model.eval()
    try:
        gradients = {
            name: _gradient(objective, shared, reader, sampled_windows(reader, seed, step, length), length, device)
            for name, reader in sorted(readers.items())
        }
    finally:
        model.train(training)
    return cosines_of(gradients)


def sampled_windows(reader: ShardReader, seed: int, step: int, length: int) -> np.ndarray:
    """Return the ids of the windows whose mean gradient stands for the dataset, (WINDOWS,) int64.

    The windows have `length` frames.
    """
    chances = uniform(stream_key("gradient cosine", seed, step, reader.dataset), np.arange(WINDOWS, dtype=np.uint64))
    return (chances * len(reader.index(length))).astype(np.int64)


def cosines_of(gradients: Mapping[str, Tensor]) -> Cosines:
    """Return the cosines between gradient vectors (P,), by dataset."""
    vectors = list(gradients.values())
    norms = np.array([float(torch.linalg.vector_norm(vector)) for vector in vectors])
    dots = np.array([[float(torch.dot(one, other)) for other in vectors] for one in vectors])
    lengths = np.where(np.isfinite(norms) & (norms > 0), norms, np.nan)  # a zero vector has no direction
    return Cosines(tuple(gradients), np.clip(dots / np.outer(lengths, lengths), -1, 1), norms)


def _gradient(
    objective: Unroll,
    shared: list[torch.nn.Parameter],
    reader: ShardReader,
    windows: np.ndarray,
    length: int,
    device: torch.device,
) -> Tensor:
    """Return the mean gradient of the one-step loss over some windows, all shared parameters in a row, (P,) float32."""
    batch = reader.batch(windows, length).to(device)
    forced = torch.ones(1, 1, dtype=torch.bool, device=device)
    scalars = objective.model.normalize_scalars(batch.scalars, batch.dataset, len(windows), device)
    mean = torch.zeros(sum(parameter.numel() for parameter in shared), device=device)
    # One window at a time: no process of the run takes fewer at once, so this fits where the training fits.
    for one in range(len(windows)):
        window = slice(one, one + 1)
        own = None if scalars is None else scalars[window]
        loss = objective(batch.fields[window], batch.constants[window], forced, batch.dataset, scalars=own)["loss"]
        # backward() would add to .grad and make DDP and DeepSpeed exchange it.
        found = torch.autograd.grad(loss, shared, materialize_grads=True)
        mean += torch.cat([gradient.flatten() for gradient in found]) / len(windows)
    return mean


def check_memory(
    recipe: Recipe,
    state: TrainingState,
    division: Division,
    readers: Mapping[str, ShardReader],
    accelerator: Accelerator,
) -> str:
    """Compute the gradient of the largest unroll on random data; return a message for the user. Collective.

    An unroll grows during training and differs by dataset, so the step that needs the most memory may come late.
    Neither weights nor moments change. Raises UserError if the memory does not suffice.
    """
    dataset, length = longest_unroll(recipe, readers)
    grid, count = readers[dataset].manifest.grid, division.largest_micro_batch
    what = f"{length} model steps of {count} windows of {dataset} ({grid[0]} x {grid[1]})"
    largest = resized(recipe, count * accelerator.num_processes)
    try:
        DryRun(largest, state.parallel.model.specs[dataset], grid, accelerator).step(state, update=False)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(
            f"not enough memory for {what}, the largest unroll of this run ({str(error).partition(chr(10))[0]}).\n"
            "Set train.micro_batch (fewer windows at once) or finetune.checkpoint_activations=true (a third more "
            f"work), or shorten the unroll (finetune.unroll_steps, or unroll_override: {{{dataset}: ...}}). "
            "finetune.rehearse=false goes on without this check."
        ) from error
    return f"the largest unroll fits: {what}; peak memory so far {peak_memory_bytes() / 1e9:.1f} GB"


def longest_unroll(recipe: Recipe, readers: Mapping[str, ShardReader]) -> tuple[str, int]:
    """Return the dataset whose unroll holds the most tokens for the backward pass, and its length."""
    lengths = {name: recipe.unroll_steps(name) for name in readers}
    tokens = {name: int(np.prod(readers[name].manifest.grid)) for name in readers}
    costs = {name: (tokens[name] * held_calls(lengths[name], recipe.finetune), lengths[name]) for name in readers}
    dataset = max(costs, key=lambda name: costs[name])
    return dataset, lengths[dataset]


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    # The messages of torch's allocator on a CPU and of oneDNN.
    symptoms = "allocate memory" in text or "could not create a primitive" in text
    return symptoms or isinstance(error, MemoryError | torch.OutOfMemoryError)
