"""What pictures of a rollout are drawn from."""

from dataclasses import dataclass

import numpy as np

Domain = tuple[tuple[float, float], tuple[float, float]]  # (lower, upper) of x, of y


@dataclass(frozen=True)
class Sample:
    """One channel of one rollout at some steps. Fields (n, H, W) in physical units, axis 0 of a field is x."""

    dataset: str
    channel: str
    trajectory: int
    dt: float  # physical time between frames
    steps: tuple[int, ...]  # rollout steps, 1-based and ascending
    truth: np.ndarray
    prediction: np.ndarray
    vrmse: np.ndarray  # (n,) of this channel
    domain: Domain | None = None  # physical extent of the grid; None where the card does not say
