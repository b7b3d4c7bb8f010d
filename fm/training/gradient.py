"""The gradient of one step: this process's pieces of it, forward and backward.

Each window counts 1 / train.global_batch, whichever process takes it, in however many pieces.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator

from data_pipeline.windows.batch import Batch
from data_pipeline.windows.division import Division, Piece
from fm.curriculum import forcing_coins, forcing_prob, input_noise, unroll_length
from fm.runtime import autocast_dtype, products_in_tf32
from fm.settings import Recipe
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
    pieces = division.pieces(state.step)
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
        in_bf16 = autocast_dtype(recipe.train.precision, accelerator.device) is not None
        with state.parallel.accumulate(last=number == len(pieces) - 1), products_in_tf32(in_bf16):
            terms = state.parallel.objective(**inputs)
            mark("forward")
            state.parallel.backward(terms["loss"] * weight)
            mark("backward")
        share = len(piece.places) / recipe.train.batch
        found = torch.stack([terms["loss"].detach(), terms["mse"], terms["wavelet_l1"]])
        losses[piece.draw - state.step * division.draws] += share * found
    return losses, waited


def _inputs(recipe: Recipe, step: int, piece: Piece, batch: Batch) -> dict[str, Any]:
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
