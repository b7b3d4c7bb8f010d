"""The gradient of one step: this process's pieces of it, forward and backward.

Each window counts 1 / train.global_batch, whichever process takes it, in however many pieces.
"""

import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from data_pipeline.windows.batch import Batch
from data_pipeline.windows.division import Division, Piece
from fm.settings import Recipe
from fm.state import TrainingState
from fm.unroll import forcing_coins, forcing_prob


def step_gradient(
    recipe: Recipe, state: TrainingState, division: Division, accelerator: Accelerator, batches: Iterator[Batch]
) -> tuple[torch.Tensor, float]:
    """Leave the gradient of the step after `state.step`, averaged over the processes, with the parameters. Collective.

    `batches` gives this process's pieces of the step. Returns its parts of each draw's loss, mse and wavelet_l1
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
        forced = _forced(recipe, state.step, piece).to(accelerator.device)
        # processes average their gradients, so each counts as many times more
        weight = len(piece.places) * accelerator.num_processes / recipe.train.global_batch
        with state.parallel.accumulate(last=number == len(pieces) - 1):
            terms = state.parallel.objective(batch.fields, batch.constants, forced, batch.dataset)
            state.parallel.backward(terms["loss"] * weight)
        share = len(piece.places) / recipe.train.batch
        found = torch.stack([terms["loss"].detach(), terms["mse"], terms["wavelet_l1"]])
        losses[piece.draw - state.step * division.draws] += share * found
    return losses, waited


def _forced(recipe: Recipe, step: int, piece: Piece) -> torch.Tensor:
    """The teacher-forcing coins of a piece's windows, (b, K) bool."""
    prob = forcing_prob(step, recipe.train.steps, recipe.finetune) if recipe.finetune else 1.0
    coins = forcing_coins(recipe.run.seed, piece.draw, recipe.train.batch, recipe.window_length - 1, prob)
    return torch.from_numpy(coins[piece.places])
