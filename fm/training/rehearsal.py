"""The longest unroll on the largest grid, once, before step 0: what does not fit in memory fails now and not at night.

An unroll grows with its curriculum and differs by dataset, so the step that needs the most memory may come late.
"""

from collections.abc import Mapping

import numpy as np
import torch

from data_pipeline.errors import UserError
from data_pipeline.windows.division import Division
from data_pipeline.windows.reader import ShardReader
from fm.cost import held_calls
from fm.runtime import peak_memory_bytes
from fm.settings import Recipe
from fm.training.state import TrainingState


def rehearse(
    recipe: Recipe, state: TrainingState, division: Division, readers: Mapping[str, ShardReader], device: torch.device
) -> str:
    """Forward and backward of the piece that needs the most memory; returns what to say of it. Collective.

    Neither weights nor moments change. UserError where memory does not suffice.
    """
    dataset, length = longest_unroll(recipe, readers)
    reader, count = readers[dataset], division.largest_piece
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
