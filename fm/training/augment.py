"""Random symmetry transformations of training windows (`train.augment`).

Each window is transformed by one random element of its dataset's symmetry group, as the card names the symmetries
(data_pipeline/symmetries.py). All frames and constant fields of the window get the same transformation. The element is
a function of (seed, draw, place in the global batch). It does not depend on the number of processes or the
micro-batches, and a continued run repeats it. Dataset statistics stay as they are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data_pipeline.hashing import stream_key, uniform
from data_pipeline.registry import Card, Field, load_registry
from data_pipeline.symmetries import SYMMETRIES, component_signs, exchanged_components
from data_pipeline.windows.reader import Batch
from fm.config import Recipe


@dataclass(frozen=True)
class Transformation:
    """One element of a symmetry group: first the transposition, then the reflections, then the shift."""

    transpose: bool = False
    reflect: tuple[bool, bool] = (False, False)  # along x, along y
    shift: tuple[int, int] = (0, 0)  # grid points along x, along y


def random_transformations(
    symmetries: Sequence[str], seed: int, draw: int, places: np.ndarray, grid: tuple[int, int]
) -> list[Transformation]:
    """Return one transformation for each of the windows at `places` (b,) of a draw, on a grid (H, W).

    Shifts are uniform over the grid points. Each reflection and the transposition have probability 1/2. Windows on a
    grid that is not square are not transposed.
    """
    slots = places.astype(np.uint64)[:, None] * np.uint64(len(SYMMETRIES)) + np.arange(len(SYMMETRIES), dtype=np.uint64)
    chances = uniform(stream_key("augmentation", seed, draw), slots.ravel()).reshape(slots.shape)
    found = []
    for row in chances.tolist():
        chance = {name: value for name, value in zip(SYMMETRIES, row, strict=True) if name in symmetries}
        found.append(
            Transformation(
                transpose=chance.get("transpose", 1.0) < 0.5 and grid[0] == grid[1],
                reflect=(chance.get("reflect_x", 1.0) < 0.5, chance.get("reflect_y", 1.0) < 0.5),
                shift=(int(chance.get("shift_x", 0.0) * grid[0]), int(chance.get("shift_y", 0.0) * grid[1])),
            )
        )
    return found


class ChannelSymmetry:
    """How the channels of some fields change with the grid: signs under reflections, exchanges under transposition."""

    def __init__(self, fields: Iterable[Field], device: torch.device) -> None:
        orders = [field.order for field in fields]
        self._signs = []  # along x, along y: (C, 1, 1), or None if no channel changes its sign
        for axis in (0, 1):
            signs = torch.tensor(component_signs(orders, axis), dtype=torch.float32, device=device)
            self._signs.append(signs[:, None, None] if any(orders) else None)
        self._exchanged = torch.tensor(exchanged_components(orders), dtype=torch.int64, device=device)

    def transform(self, tensor: Tensor, by: Transformation) -> Tensor:
        """Return the fields (..., C, H, W) in raw units after a transformation; a transposition exchanges H and W.

        The host does not wait for the device.
        """
        if by.transpose:
            tensor = tensor.transpose(-1, -2).index_select(-3, self._exchanged)
        if any(by.reflect):
            tensor = tensor.flip([axis - 2 for axis in (0, 1) if by.reflect[axis]])
            for signs, reflected in zip(self._signs, by.reflect, strict=True):
                if reflected and signs is not None:
                    tensor = tensor * signs
        return tensor.roll(by.shift, (-2, -1)) if any(by.shift) else tensor


class Augmentation:
    """Transforms windows of the datasets whose cards name symmetries; windows of other datasets stay as they are."""

    def __init__(self, cards: Iterable[Card], seed: int, device: torch.device) -> None:
        self._seed = seed
        self.symmetries = {card.name: card.symmetries for card in cards if card.symmetries}
        self._channels = {
            card.name: (ChannelSymmetry(card.state, device), ChannelSymmetry(card.constant, device)) for card in cards
        }

    def apply(self, batch: Batch, places: np.ndarray) -> Batch:
        """Return the batch with each window transformed; `places` (B,) are the windows' places in their draw."""
        if batch.dataset not in self.symmetries:
            return batch
        height, width = batch.fields.shape[-2:]
        symmetries = self.symmetries[batch.dataset]
        drawn = random_transformations(symmetries, self._seed, batch.draw, places, (height, width))
        state, constant = self._channels[batch.dataset]
        fields = [state.transform(window, by) for window, by in zip(batch.fields, drawn, strict=True)]
        constants = batch.constants
        if constants.shape[1]:
            moved = [constant.transform(window, by) for window, by in zip(constants, drawn, strict=True)]
            constants = torch.stack(moved)
        return replace(batch, fields=torch.stack(fields), constants=constants)

    def __str__(self) -> str:
        if not self.symmetries:  # as of data that were just imported
            return (
                "train.augment changes no window: no card of this run names symmetries; data_pipeline/symmetries.py "
                "lists those that a card can have"
            )
        names = (f"{name} ({', '.join(symmetries)})" for name, symmetries in self.symmetries.items())
        return f"windows are transformed by the symmetries of their datasets: {'; '.join(names)}"


def make_augmentation(recipe: Recipe, datasets: Iterable[str], device: torch.device) -> Augmentation | None:
    """Return the augmentation of a run's datasets, or None without train.augment."""
    if not recipe.train.augment:
        return None
    registry = load_registry(recipe.data.registry)
    return Augmentation([registry.card(name) for name in datasets], recipe.run.seed, device)
