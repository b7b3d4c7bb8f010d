"""What is said follows from the numbers, and changes with them."""

from dataclasses import replace

import numpy as np
import pytest

from fm.lab.diagnosis.report import findings, number
from fm.lab.diagnosis.subject import Diagnosis


def said(diagnosis: Diagnosis) -> dict[str, str]:
    return {one.subject: one.text for one in findings(diagnosis)}


def test_an_unstable_model_is_called_so(unstable: Diagnosis) -> None:
    text = said(unstable)
    assert list(text) == ["Failure", "Error growth", "Stability", "Scales", "Conservation", "One step"]
    assert "2 of 2 rollouts become worse than the mean field (VRMSE above 1), at step 10 and 11" in text["Failure"]
    assert "they leave the range of the data" in text["Failure"]
    assert "L = 1.500 where errors add up" in text["Error growth"]
    assert "doubles every 1.71 steps" in text["Error growth"]
    assert "grows by 1.500 a step" in text["Stability"]
    assert "the true flow lets it grow by 1.100 (twins): the model is less stable than the physics" in text["Stability"]
    assert "up to 4.5" in text["Stability"]
    assert "High-frequency energy grows" in text["Scales"]
    # The details' energy is 3^(k/4) of the truth's: above 2 from k = 3 on, and 3^(11/4) at last.
    assert "from step 4 on, 20.5 times at the last step, 98.4% of all its energy" in text["Scales"]
    assert "mean of tracer drifts by up to 0.5 std (truth: 0)" in text["Conservation"]
    assert "It keeps the divergence of u, v" in text["Conservation"]
    assert "is 200 times that of the best linear map" in text["One step"]
    assert "simpler than the model makes it" in text["One step"]


def test_a_stable_model_is_called_so(stable: Diagnosis) -> None:
    text = said(stable)
    assert "All 2 rollouts stay better than the mean field" in text["Failure"]
    assert "one-step errors pile up, with little help from amplification" in text["Error growth"]
    assert "how fast the true flow lets it grow is not known here" in text["Stability"]
    assert "At every scale the error stays below" in text["Scales"]
    assert "The rollout keeps the divergence of u, v" in text["Conservation"]
    assert "is 0.1 times that of the best linear map" in text["One step"]
    assert "simpler" not in text["One step"]


def test_the_second_half_is_told_where_it_differs(unstable: Diagnosis) -> None:
    flow = np.full((2, 12), 1.5)
    flow[:, 6:] = 1.0
    truth = np.full((2, 12), 1.3)
    stability = replace(unstable.stability, along_truth=truth, true_flow=flow)
    text = said(replace(unstable, stability=stability))["Stability"]
    assert "grow by 1.225 (twins): the model is less stable than the physics." in text
    stability = replace(stability, along_truth=np.full((2, 12), 1.22))
    text = said(replace(unstable, stability=stability))["Stability"]
    assert "(twins): the model is as stable as the physics." in text
    assert "In the second half it is 1.220 against 1.000: the model is less stable than the physics." in text
    stability = replace(stability, along_truth=np.full((2, 12), 0.8))
    assert "damps what the physics would let grow" in said(replace(unstable, stability=stability))["Stability"]


def test_what_is_not_finite_is_said(unstable: Diagnosis) -> None:
    vrmse = unstable.growth.vrmse.copy()
    vrmse[:, 8:] = np.inf
    growth = replace(unstable.growth, vrmse=vrmse, rollout=vrmse + 2, failed=(9, 9), not_finite=(9, 9), recurrence=None)
    broken = np.full((2, 12), np.nan)
    broken[:, :5] = 1.1
    prediction = unstable.bands.truth.copy()
    prediction[:, 8:] = np.nan
    bands = replace(unstable.bands, prediction=prediction, error=prediction - unstable.bands.truth)
    stability = replace(unstable.stability, along_rollout=broken, largest_along_rollout=np.full(3, np.nan))
    lost = np.zeros((2, 13))
    lost[:, 9:] = np.nan
    drifts = (replace(unstable.drifts[0], prediction=lost),)
    text = said(replace(unstable, growth=growth, bands=bands, stability=stability, drifts=drifts))
    assert "2 stop being finite, at step 9" in text["Failure"]
    assert text["Error growth"] == "No law of growth can be fitted: the error is too large from the start."
    assert "along the model's own rollout by factors that are not finite from step 6 on" in text["Stability"]
    assert "a single step amplifies by a factor that is not finite." in text["Stability"]
    assert "fine details (level 1) from step 9, in the coarse part from step 9; it is not finite from" in text["Scales"]
    assert "The finest wavelet details are not finite from step 9 on." in text["Scales"]
    assert "the mean of tracer is not finite from step 9 on" in text["Conservation"]


def test_a_model_that_is_not_finite_along_the_truth_is_less_stable(unstable: Diagnosis) -> None:
    broken = np.full((2, 12), 1.1)
    broken[1, 3:] = np.inf
    text = said(replace(unstable, stability=replace(unstable.stability, along_truth=broken)))["Stability"]
    assert "grows by factors that are not finite from step 4 on in the model" in text
    assert "1.100 (twins): the model is less stable than the physics" in text


def test_a_true_flow_that_is_not_finite_is_not_known(unstable: Diagnosis) -> None:
    stability = replace(unstable.stability, true_flow=np.full((2, 12), np.nan))
    text = said(replace(unstable, stability=stability))["Stability"]
    assert "how fast the true flow lets it grow is not known here" in text
    assert "less stable" not in text


def test_a_pointwise_map_may_be_exact(unstable: Diagnosis) -> None:
    text = said(replace(unstable, floors=replace(unstable.floors, pointwise=0.0)))["One step"]
    assert "VRMSE 0.02, is to be compared with that of the best linear map of each point's own channels, 0" in text
    assert "simpler than the model makes it" in text


def test_a_truth_without_fine_details_is_told(unstable: Diagnosis) -> None:
    truth = unstable.bands.truth * np.array([1.0, 0, 0, 0])
    for prediction in (unstable.bands.prediction, truth):
        bands = replace(unstable.bands, truth=truth, prediction=prediction)
        text = said(replace(unstable, bands=bands))["Scales"]
        assert "The truth ends without any energy in the finest wavelet details." in text


def test_amplification_of_independent_errors_is_told(unstable: Diagnosis) -> None:
    fit = unstable.growth.recurrence
    assert fit is not None
    growth = replace(unstable.growth, recurrence=replace(fit, factor=0.9, independent_factor=1.2))
    assert "amplifies them as far as they are independent" in said(replace(unstable, growth=growth))["Error growth"]
    growth = replace(unstable.growth, recurrence=replace(fit, factor=0.5, independent_factor=0.8))
    assert "a step damps what it is given" in said(replace(unstable, growth=growth))["Error growth"]


def test_lost_energy_is_said(unstable: Diagnosis) -> None:
    bands = replace(unstable.bands, prediction=0.1 * unstable.bands.truth)
    assert "High-frequency energy is lost" in said(replace(unstable, bands=bands))["Scales"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (float("nan"), "not finite"),
        (0.0, "0"),
        (1.2345, "1.23"),
        (196_523.0, "197,000"),
        (6.8e-8, "6.8e-8"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text
