"""The page is one file that needs no other, and its pictures show what they should."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
from html_reader import Reader

from fm.lab.diagnosis.report import PICTURES, drawn, findings, key_numbers, page, picture
from fm.lab.diagnosis.subject import Diagnosis


def test_the_page_is_one_file(unstable: Diagnosis) -> None:
    text = page(unstable, findings(unstable))
    images = [image["src"] or "" for image in Reader(text).of("img")]
    assert len(images) == len(PICTURES)
    for image in images:
        assert image.startswith("data:image/png;base64,")
        assert base64.b64decode(image.split(",")[1]).startswith(b"\x89PNG")
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert "runs/a/&lt;b&gt;" in text
    assert "2 of 2 rollouts become worse" in text


def test_a_dataset_without_conserved_quantities_has_no_such_picture(unstable: Diagnosis) -> None:
    assert drawn(unstable) == list(PICTURES)
    assert "conservation" not in drawn(replace(unstable, drifts=()))
    assert [one.subject for one in findings(replace(unstable, drifts=()))].count("Conservation") == 0


def test_lines_hold_the_numbers(unstable: Diagnosis) -> None:
    errors, scores = picture("growth", unstable).axes
    np.testing.assert_array_equal(errors.lines[0].get_ydata(), unstable.growth.rollout[0])
    assert "fit, L = 1.50" in [text.get_text() for text in errors.get_legend().get_texts()]
    (failures,) = [line for line in scores.lines if line.get_label() == "first failure"]
    assert failures.get_xdata().tolist() == [10, 11]
    growth, _ = picture("stability", unstable).axes
    (flow,) = [line for line in growth.lines if line.get_label() == "true flow"]
    np.testing.assert_allclose(flow.get_ydata(), 1.1 ** np.arange(13))


def test_what_is_not_finite_does_not_stop_the_drawing(unstable: Diagnosis) -> None:
    errors = unstable.growth.rollout.copy()
    errors[:, 6:] = np.nan
    growth = replace(unstable.growth, rollout=errors, vrmse=errors, failed=(7, 7), not_finite=(7, 7))
    error = np.where(np.arange(8) > 2, np.nan, unstable.spectra.error)
    broken = replace(unstable, growth=growth, spectra=replace(unstable.spectra, prediction=error, error=error))
    for name in drawn(broken):
        picture(name, broken).draw_without_rendering()
    content = json.dumps(broken.to_json(), allow_nan=False)
    assert json.loads(content)["growth"]["rollout"][0][5:8] == [errors[0, 5], None, None]


def test_key_numbers_name_what_they_are(unstable: Diagnosis, stable: Diagnosis) -> None:
    rows = dict(key_numbers(unstable))
    assert rows["growth factor L, where errors add up"] == "1.500"
    assert rows["first step with VRMSE above 1"] == "10, 11"
    assert rows["growth of a small error a step, true flow, twins, all steps / second half"] == "1.100 / 1.100"
    assert not any("twins" in name for name in dict(key_numbers(stable)))
