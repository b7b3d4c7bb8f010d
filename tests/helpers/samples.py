"""Rollouts to be drawn, whose fields are known."""

import numpy as np

from fm.evaluation.samples import Domain, Sample


def ramp_sample(
    shape: tuple[int, int] = (16, 16), num_steps: int = 3, domain: Domain | None = None, dataset: str = "shear_flow"
) -> Sample:
    """Fields that grow along x from 0 to 1, so that orientation can be seen; the prediction is 0.1 above the truth.

    The last prediction is not finite.
    """
    truth = np.broadcast_to(np.linspace(0, 1, shape[0])[:, None], (num_steps, *shape)).copy()
    prediction = truth + 0.1
    prediction[-1] = np.nan
    vrmse = np.full(num_steps, 0.25)
    vrmse[-1] = np.inf
    return Sample(dataset, "tracer", 0, 0.5, tuple(range(1, num_steps + 1)), truth, prediction, vrmse, domain)
