"""The sentences follow from the numbers, and the page is one file with figures that hold them."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from html_reader import Reader

from fm.lab.diagnosis.figures import FIGURES, draw, figure_names
from fm.lab.diagnosis.quantities import Diagnosis
from fm.lab.diagnosis.report import findings, key_numbers, number, page


def test_an_unstable_model_is_called_so(unstable: Diagnosis) -> None:
    text = findings(unstable)
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
    text = findings(stable)
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
    text = findings(replace(unstable, stability=stability))["Stability"]
    assert "grow by 1.225 (twins): the model is less stable than the physics." in text
    stability = replace(stability, along_truth=np.full((2, 12), 1.22))
    text = findings(replace(unstable, stability=stability))["Stability"]
    assert "(twins): the model is as stable as the physics." in text
    assert "In the second half it is 1.220 against 1.000: the model is less stable than the physics." in text
    stability = replace(stability, along_truth=np.full((2, 12), 0.8))
    assert "damps what the physics would let grow" in findings(replace(unstable, stability=stability))["Stability"]


def test_what_is_not_finite_is_findings(unstable: Diagnosis) -> None:
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
    text = findings(replace(unstable, growth=growth, bands=bands, stability=stability, drifts=drifts))
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
    text = findings(replace(unstable, stability=replace(unstable.stability, along_truth=broken)))["Stability"]
    assert "grows by factors that are not finite from step 4 on in the model" in text
    assert "1.100 (twins): the model is less stable than the physics" in text


def test_a_true_flow_that_is_not_finite_is_not_known(unstable: Diagnosis) -> None:
    stability = replace(unstable.stability, true_flow=np.full((2, 12), np.nan))
    text = findings(replace(unstable, stability=stability))["Stability"]
    assert "how fast the true flow lets it grow is not known here" in text
    assert "less stable" not in text


def test_a_pointwise_map_may_be_exact(unstable: Diagnosis) -> None:
    text = findings(replace(unstable, floors=replace(unstable.floors, pointwise=0.0)))["One step"]
    assert "VRMSE 0.02, is to be compared with that of the best linear map of each point's own channels, 0" in text
    assert "simpler than the model makes it" in text


def test_a_truth_without_fine_details_is_told(unstable: Diagnosis) -> None:
    truth = unstable.bands.truth * np.array([1.0, 0, 0, 0])
    for prediction in (unstable.bands.prediction, truth):
        bands = replace(unstable.bands, truth=truth, prediction=prediction)
        text = findings(replace(unstable, bands=bands))["Scales"]
        assert "The truth ends without any energy in the finest wavelet details." in text


def test_amplification_of_independent_errors_is_told(unstable: Diagnosis) -> None:
    fit = unstable.growth.recurrence
    assert fit is not None
    growth = replace(unstable.growth, recurrence=replace(fit, factor=0.9, independent_factor=1.2))
    assert "amplifies them as far as they are independent" in findings(replace(unstable, growth=growth))["Error growth"]
    growth = replace(unstable.growth, recurrence=replace(fit, factor=0.5, independent_factor=0.8))
    assert "a step damps what it is given" in findings(replace(unstable, growth=growth))["Error growth"]


def test_lost_energy_is_findings(unstable: Diagnosis) -> None:
    bands = replace(unstable.bands, prediction=0.1 * unstable.bands.truth)
    assert "High-frequency energy is lost" in findings(replace(unstable, bands=bands))["Scales"]


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


def test_the_page_is_one_file(unstable: Diagnosis) -> None:
    text = page(unstable, findings(unstable))
    images = [image["src"] or "" for image in Reader(text).of("img")]
    assert len(images) == len(FIGURES)
    for image in images:
        assert image.startswith("data:image/png;base64,")
        assert base64.b64decode(image.split(",")[1]).startswith(b"\x89PNG")
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert "runs/a/&lt;b&gt;" in text
    assert "2 of 2 rollouts become worse" in text


def test_a_dataset_without_conserved_quantities_has_no_such_picture(unstable: Diagnosis) -> None:
    assert figure_names(unstable) == list(FIGURES)
    assert "conservation" not in figure_names(replace(unstable, drifts=()))
    assert "Conservation" not in findings(replace(unstable, drifts=()))


def test_lines_hold_the_numbers(unstable: Diagnosis) -> None:
    errors, scores = draw("growth", unstable).axes
    np.testing.assert_array_equal(errors.lines[0].get_ydata(), unstable.growth.rollout[0])
    assert "fit, L = 1.50" in [text.get_text() for text in errors.get_legend().get_texts()]
    (failures,) = [line for line in scores.lines if line.get_label() == "first failure"]
    assert failures.get_xdata().tolist() == [10, 11]
    growth, _ = draw("stability", unstable).axes
    (flow,) = [line for line in growth.lines if line.get_label() == "true flow"]
    np.testing.assert_allclose(flow.get_ydata(), 1.1 ** np.arange(13))


def test_what_is_not_finite_does_not_stop_the_drawing(unstable: Diagnosis) -> None:
    errors = unstable.growth.rollout.copy()
    errors[:, 6:] = np.nan
    growth = replace(unstable.growth, rollout=errors, vrmse=errors, failed=(7, 7), not_finite=(7, 7))
    error = np.where(np.arange(8) > 2, np.nan, unstable.spectra.error)
    broken = replace(unstable, growth=growth, spectra=replace(unstable.spectra, prediction=error, error=error))
    for name in figure_names(broken):
        draw(name, broken).draw_without_rendering()
    content = json.dumps(broken.to_json(), allow_nan=False)
    assert json.loads(content)["growth"]["rollout"][0][5:8] == [errors[0, 5], None, None]


def test_key_numbers_name_what_they_are(unstable: Diagnosis, stable: Diagnosis) -> None:
    rows = key_numbers(unstable)
    assert rows["growth factor L, where errors add up"] == "1.500"
    assert rows["first step with VRMSE above 1"] == "10, 11"
    assert rows["growth of a small error a step, true flow, twins, all steps / second half"] == "1.100 / 1.100"
    assert not any("twins" in name for name in key_numbers(stable))
