"""What a diagnosis measured, as numbers: `R` trajectories, `K` rollout steps."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fm.diagnosis.conservation import Drift
from fm.diagnosis.growth import Recurrence
from fm.diagnosis.scales import Bands, Spectra


@dataclass(frozen=True)
class Growth:
    """Errors along the rollouts, (R, K) each, of normalised states unless said otherwise."""

    rollout: np.ndarray  # root mean square error after k steps
    one_step: np.ndarray  # of one step that starts from the truth
    vrmse: np.ndarray  # as the scores have it: physical units, mean over channels
    recurrence: Recurrence | None
    failed: tuple[int | None, ...]  # first step worse than the mean field, VRMSE above 1
    not_finite: tuple[int | None, ...]


@dataclass(frozen=True)
class Stability:
    """What a step does to small differences: growth factors (R, K), largest singular values (n,)."""

    along_truth: np.ndarray
    along_rollout: np.ndarray
    true_flow: np.ndarray | None  # of twins; None where the flow cannot be simulated again
    frames: tuple[int, ...]  # of the first trajectory: where the singular values were taken
    largest_along_truth: np.ndarray
    largest_along_rollout: np.ndarray


@dataclass(frozen=True)
class Floors:
    """Median one-step VRMSE over windows of the test split."""

    windows: int
    model: float
    pointwise: float  # the best linear map of a grid point's own channels
    persistence: float


@dataclass(frozen=True)
class Diagnosis:
    """All that was measured."""

    dataset: str
    origin: dict[str, object]  # checkpoint, step, data digest
    trajectories: tuple[int, ...]
    dt: float  # physical time of a step
    growth: Growth
    stability: Stability
    spectra: Spectra
    bands: Bands
    drifts: tuple[Drift, ...]
    floors: Floors

    @property
    def num_steps(self) -> int:
        return self.growth.rollout.shape[1]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON; what is not finite is null."""
        return {"num_steps": self.num_steps, **_plain(self)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
