"""Do the datasets of a run pull the shared part of the model the same way? Cosines between their gradients.

For each dataset: the gradient of the one-step training loss over a few windows, with the present weights, with respect
to the parameters that all datasets use. Which windows is a hash of (seed, step, dataset), the model is in evaluation
mode and no `.grad` is touched, so the training is the same bit for bit whether it is looked at or not.

n datasets cost n forward and backward passes of WINDOWS windows, and hold n gradients: n x 4 bytes a shared parameter.
Eight datasets every 1000 steps of global batch 4 add 0.8% to the time; at ten million parameters they hold 0.3 GB.

The longest unroll on the largest grid, once, before step 0: what does not fit in memory fails now and not at night.

An unroll grows with its curriculum and differs by dataset, so the step that needs the most memory may come late.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from data_pipeline.files import UserError
from data_pipeline.hashing import stream_key, uniform
from data_pipeline.windows.reader import ShardReader
from data_pipeline.windows.schedule import Division
from fm.config import Recipe
from fm.distributed import autocast_dtype, peak_memory_bytes
from fm.evaluation.plots import Cosines
from fm.training.flops import held_calls
from fm.training.objective import Unroll
from fm.training.parallel import Parallel
from fm.training.state import TrainingState

WINDOWS = 4  # of each dataset


def check_gradient_cosines(recipe: Recipe, parallel: Parallel, datasets: Sequence[str]) -> None:
    """UserError where the recipe asks for cosines that cannot be had for the datasets of the run."""
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


def gradient_cosines(
    recipe: Recipe, parallel: Parallel, readers: Mapping[str, ShardReader], step: int, device: torch.device
) -> Cosines:
    """Cosines after `step` steps, on this process alone, of the datasets that the readers (train split) are of."""
    model = parallel.model
    objective = Unroll(model, recipe.loss, autocast=autocast_dtype(recipe.train.precision, device))
    shared = model.parameters_by_datasets()[frozenset(model.specs)]
    seed, training = recipe.run.seed, model.training
    model.eval()
    try:
        gradients = {
            name: _gradient(objective, shared, reader, sampled_windows(reader, seed, step), device)
            for name, reader in sorted(readers.items())
        }
    finally:
        model.train(training)
    return cosines_of(gradients)


def sampled_windows(reader: ShardReader, seed: int, step: int) -> np.ndarray:
    """Ids of the windows of two frames that a dataset's gradient is taken over, (WINDOWS,) int64."""
    chances = uniform(stream_key("gradient cosine", seed, step, reader.dataset), np.arange(WINDOWS, dtype=np.uint64))
    return (chances * len(reader.index(2))).astype(np.int64)


def cosines_of(gradients: Mapping[str, Tensor]) -> Cosines:
    """Of vectors (P,) by dataset."""
    vectors = list(gradients.values())
    norms = np.array([float(torch.linalg.vector_norm(vector)) for vector in vectors])
    dots = np.array([[float(torch.dot(one, other)) for other in vectors] for one in vectors])
    lengths = np.where(np.isfinite(norms) & (norms > 0), norms, np.nan)  # what has no length has no direction
    return Cosines(tuple(gradients), np.clip(dots / np.outer(lengths, lengths), -1, 1), norms)


def _gradient(
    objective: Unroll, shared: list[torch.nn.Parameter], reader: ShardReader, windows: np.ndarray, device: torch.device
) -> Tensor:
    """The gradient of the one-step loss over some windows, all shared parameters one after the other, (P,) float32."""
    batch = reader.batch(windows, 2).to(device)
    forced = torch.ones(1, 1, dtype=torch.bool, device=device)
    mean = torch.zeros(sum(parameter.numel() for parameter in shared), device=device)
    # One by one: no process of the run takes less at once, so it fits wherever the training does.
    for fields, constants in zip(batch.fields.split(1), batch.constants.split(1), strict=True):
        loss = objective(fields, constants, forced, batch.dataset)["loss"]
        # Not backward(): that would add to .grad, and make DDP and DeepSpeed exchange it.
        found = torch.autograd.grad(loss, shared, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(shared, found, strict=True)]
        mean += torch.cat([part.flatten() for part in parts]) / len(windows)
    return mean


def rehearse(
    recipe: Recipe, state: TrainingState, division: Division, readers: Mapping[str, ShardReader], device: torch.device
) -> str:
    """Forward and backward of the piece that needs the most memory; returns what to say of it. Collective.

    Neither weights nor moments change. UserError where memory does not suffice.
    """
    dataset, length = longest_unroll(recipe, readers)
    reader, count = readers[dataset], division.largest_micro_batch
    height, width = reader.manifest.grid
    what = f"{length} model steps of {count} windows of {dataset} ({height} x {width})"
    windows = np.arange(count) % len(reader.index(length + 1))
    try:
        batch = reader.batch(windows, length + 1).to(device)
        inputs = {"forced": torch.zeros(count, length, dtype=torch.bool, device=device), "dataset": dataset}
        noise = torch.zeros_like(batch.fields[:, 1:]) if recipe.train.jitter else None
        with state.parallel.accumulate(last=True):
            terms = state.parallel.objective(batch.fields, batch.constants, noise=noise, **inputs)
            state.parallel.backward(terms["loss"])
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(
            f"not enough memory for {what}, the largest unroll of this run ({str(error).partition(chr(10))[0]}).\n"
            "Set train.micro_batch (fewer windows at once) or finetune.checkpoint_activations=true (a third more "
            f"work), or shorten the unroll (finetune.unroll_steps, or unroll_override: {{{dataset}: ...}}). "
            "finetune.rehearse=false goes on without this check."
        ) from error
    state.parallel.forget()
    return f"the largest unroll fits: {what}; peak memory so far {peak_memory_bytes() / 1e9:.1f} GB"


def longest_unroll(recipe: Recipe, readers: Mapping[str, ShardReader]) -> tuple[str, int]:
    """The dataset whose unroll of full length needs the most memory, and that length.

    It has the most tokens over all its model steps, or where only one is held for the backward pass, in that one.
    """
    lengths = {name: recipe.window_length(name) - 1 for name in readers}
    tokens = {name: int(np.prod(readers[name].manifest.grid)) for name in readers}
    costs = {name: (tokens[name] * held_calls(lengths[name], recipe.finetune), lengths[name]) for name in readers}
    dataset = max(costs, key=lambda name: costs[name])
    return dataset, lengths[dataset]


def _is_out_of_memory(error: Exception) -> bool:
    said = str(error)  # by torch's allocator on a CPU, and by oneDNN
    symptoms = "allocate memory" in said or "could not create a primitive" in said
    return symptoms or isinstance(error, MemoryError | torch.OutOfMemoryError)
