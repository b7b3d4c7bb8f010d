"""A diagnosis made by hand: what its numbers say can be read off."""

from dataclasses import replace

import numpy as np
import pytest

from fm.lab.diagnosis.growth import Growth, Stability, fit_recurrence
from fm.lab.diagnosis.quantities import Bands, Diagnosis, Drift, Floors, Spectra

STEPS = 12


@pytest.fixture
def unstable() -> Diagnosis:
    """Two rollouts whose errors grow by 1.5 a step from one-step errors of 0.01; fine scales gain energy."""
    one_step = np.full((2, STEPS), 0.01)
    errors = np.array([0.01 * sum(1.5**k for k in range(step)) for step in range(1, STEPS + 1)]) * np.ones((2, 1))
    vrmse = errors * 2
    growth = Growth(errors, one_step, vrmse, fit_recurrence(errors, one_step), (10, 11), (None, None))
    grow = np.full((2, STEPS), 1.5)
    stability = Stability(grow, grow, np.full((2, STEPS), 1.1), (0, 5, 11), np.full(3, 4.0), np.full(3, 4.5))
    names = ("LL1", "LH1", "HL1", "HH1")
    truth = np.ones((2, STEPS, 4))
    prediction = truth * np.array([1.0, 3, 3, 3]) ** (np.arange(STEPS)[:, None] / 4)
    bands = Bands(names, truth, prediction, prediction - truth)
    spectra = Spectra((1, 12), np.arange(1.0, 9), *(np.full((2, 8), power) for power in (1.0, 2.0, 1.0)))
    drifts = (
        Drift("mean", "mean of tracer", "std", np.zeros((2, STEPS + 1)), np.full((2, STEPS + 1), -0.5)),
        Drift("divergence", "divergence of u, v", "of it", np.full((2, STEPS + 1), 0.1), np.full((2, STEPS + 1), 0.2)),
    )
    floors = Floors(windows=9, model=0.02, pointwise=0.0001, persistence=0.3)
    origin: dict[str, object] = {"checkpoint": "runs/a/<b>", "step": 7}
    return Diagnosis("shear_flow", origin, (0, 3), 0.5, growth, stability, spectra, bands, drifts, floors)


@pytest.fixture
def stable(unstable: Diagnosis) -> Diagnosis:
    """Independent errors that no step amplifies, no twins, everything kept."""
    one_step = np.full((2, STEPS), 0.01)
    errors = 0.01 * np.sqrt(np.arange(1, STEPS + 1)) * np.ones((2, 1))
    fit = fit_recurrence(errors, one_step)
    ones = np.ones((2, STEPS))
    bands = replace(unstable.bands, prediction=unstable.bands.truth, error=0.1 * unstable.bands.truth)
    return replace(
        unstable,
        growth=Growth(errors, one_step, errors, fit, (None, None), (None, None)),
        stability=replace(unstable.stability, along_truth=ones, along_rollout=ones, true_flow=None),
        bands=bands,
        drifts=unstable.drifts[1:],
        floors=replace(unstable.floors, pointwise=0.2),
    )
