"""Do the datasets of a run pull the shared part of the model the same way? Cosines between their gradients.

For each dataset: the gradient of the one-step training loss over a few windows, with the present weights, with respect
to the parameters that all datasets use. Which windows is a hash of (seed, step, dataset), the model is in evaluation
mode and no `.grad` is touched, so the training is the same bit for bit whether it is looked at or not.

n datasets cost n forward and backward passes of WINDOWS windows, and hold n gradients: n x 4 bytes a shared parameter.
Eight datasets every 1000 steps of global batch 4 add 0.8% to the time; at ten million parameters they hold 0.3 GB.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.hashing import stream_key, uniform
from data_pipeline.windows.reader import ShardReader
from fm.parallel.base import Parallel
from fm.report.cosines import Cosines
from fm.runtime import autocast_dtype
from fm.settings import Recipe
from fm.unroll import Unroll

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
