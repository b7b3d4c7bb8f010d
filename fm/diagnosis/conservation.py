"""Does a rollout keep what the equations keep? The quantities that the card declares, along truth and rollout.

The truth is drawn beside the prediction, because its own values are the floor: stored frames are rounded, and a
divergence by centred differences is not the one that a solver on a staggered grid keeps at zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.cards.card import Boundary, Card

Spacing = tuple[float, float]


@dataclass(frozen=True)
class Drift:
    """One conserved quantity over the frames 0..K of the rollouts, frame 0 being the initial state.

    Means and mean squares are changes since frame 0; a divergence, which is to be 0, is given as it is.
    """

    kind: str  # of the card's Conserved
    label: str
    unit: str
    truth: np.ndarray  # (R, K + 1)
    prediction: np.ndarray


def grid_spacing(card: Card, grid: tuple[int, int]) -> Spacing | None:
    """Distance of grid points along x and y; None where the card does not say what the grid covers."""
    if card.domain is None:
        return None
    x, y = ((upper - lower) / points for (lower, upper), points in zip(card.domain, grid, strict=True))
    return x, y


def measure_drifts(
    card: Card, channels: Sequence[str], truth: np.ndarray, prediction: np.ndarray, std: np.ndarray
) -> tuple[Drift, ...]:
    """The card's conserved quantities, of states in physical units (R, K + 1, C, H, W); std (C,) is the channels'.

    A divergence is left out where the card does not say what the grid covers.
    """
    drifts = []
    spacing = grid_spacing(card, (truth.shape[-2], truth.shape[-1]))
    for conserved in card.conserved:
        places = [channels.index(name) for name in conserved.channels]
        fields = truth[:, :, places].astype(np.float64), prediction[:, :, places].astype(np.float64)
        if conserved.kind == "mean":
            for index, name in enumerate(conserved.channels):
                values = [_mean_drift(part[:, :, index]) / std[places[index]] for part in fields]
                drifts.append(Drift("mean", f"mean of {name}", "std", *values))
        elif conserved.kind == "mean_square":
            values = [_square_drift(part) for part in fields]
            label = f"mean square of {', '.join(conserved.channels)}"
            drifts.append(Drift("mean_square", label, "of its first value", *values))
        elif spacing is not None:
            values = [relative_divergence(part, spacing, card.boundary) for part in fields]
            label = f"divergence of {', '.join(conserved.channels)}"
            drifts.append(Drift("divergence", label, "of the rms gradient", *values))
    return tuple(drifts)


def relative_divergence(velocity: np.ndarray, spacing: Spacing, boundary: Boundary) -> np.ndarray:
    """rms of the divergence over rms of the gradient, by centred differences: velocity (..., 2, H, W) to (...)."""
    along_x, along_y = (
        centred_difference(velocity, axis, spacing[axis], boundary[axis][0] == "PERIODIC") for axis in (0, 1)
    )
    divergence = along_x[..., 0, :, :] + along_y[..., 1, :, :]
    gradient = np.square(along_x) + np.square(along_y)
    scale = np.sqrt(gradient.sum(axis=-3).mean(axis=(-2, -1)))
    return np.sqrt(np.square(divergence).mean(axis=(-2, -1))) / np.where(scale > 0, scale, 1.0)


def centred_difference(fields: np.ndarray, axis: int, spacing: float, periodic: bool) -> np.ndarray:
    """Second-order derivative of fields (..., H, W) along x (0) or y (1): it wraps, or is one-sided at the ends."""
    along = axis - 2
    if periodic:
        return (np.roll(fields, -1, along) - np.roll(fields, 1, along)) / (2 * spacing)
    return np.gradient(fields, spacing, axis=along, edge_order=2)


def _mean_drift(field: np.ndarray) -> np.ndarray:
    """(R, K + 1, H, W) to the change of the mean since frame 0."""
    mean = field.mean(axis=(-2, -1))
    return mean - mean[:, :1]


def _square_drift(fields: np.ndarray) -> np.ndarray:
    """(R, K + 1, C, H, W) to the relative change of the mean square since frame 0."""
    energy = np.square(fields).sum(axis=2).mean(axis=(-2, -1))
    return energy / energy[:, :1] - 1
