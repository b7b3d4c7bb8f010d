"""The page is one file that needs no other, and its pictures show what they should."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
from matplotlib.colors import to_rgb

from fm.diagnosis.figures import DARK, LIGHT, PICTURES, drawn, picture
from fm.diagnosis.page import key_numbers, page
from fm.diagnosis.result import Diagnosis
from fm.diagnosis.sentences import findings


class Balanced(HTMLParser):
    """Notes tags that are not closed, and everything that a page could load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file(unstable: Diagnosis) -> None:
    text = page(unstable, findings(unstable))
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.loads) == 2 * len(PICTURES)
    for load in parser.loads:
        assert load.startswith("data:image/png;base64,")
        assert base64.b64decode(load.split(",")[1]).startswith(b"\x89PNG")
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert "runs/a/&lt;b&gt;" in text
    assert "2 of 2 rollouts become worse" in text


def test_a_dataset_without_conserved_quantities_has_no_such_picture(unstable: Diagnosis) -> None:
    assert drawn(unstable) == list(PICTURES)
    assert "conservation" not in drawn(replace(unstable, drifts=()))
    assert [one.subject for one in findings(replace(unstable, drifts=()))].count("Conservation") == 0


def test_themes_colour_the_whole_picture(unstable: Diagnosis) -> None:
    for theme in (LIGHT, DARK):
        figure = picture("scales", unstable, theme)
        assert figure.get_facecolor()[:3] == to_rgb(theme.paper)
        assert all(axes.get_facecolor() == figure.get_facecolor() for axes in figure.axes)


def test_lines_hold_the_numbers(unstable: Diagnosis) -> None:
    errors, scores = picture("growth", unstable, LIGHT).axes
    np.testing.assert_array_equal(errors.lines[0].get_ydata(), unstable.growth.rollout[0])
    assert "fit, L = 1.50" in [text.get_text() for text in errors.get_legend().get_texts()]
    (failures,) = [line for line in scores.lines if line.get_label() == "first failure"]
    assert failures.get_xdata().tolist() == [10, 11]
    growth, _ = picture("stability", unstable, LIGHT).axes
    (flow,) = [line for line in growth.lines if line.get_label() == "true flow"]
    np.testing.assert_allclose(flow.get_ydata(), 1.1 ** np.arange(13))


def test_what_is_not_finite_does_not_stop_the_drawing(unstable: Diagnosis) -> None:
    errors = unstable.growth.rollout.copy()
    errors[:, 6:] = np.nan
    growth = replace(unstable.growth, rollout=errors, vrmse=errors, failed=(7, 7), not_finite=(7, 7))
    error = np.where(np.arange(8) > 2, np.nan, unstable.spectra.error)
    broken = replace(unstable, growth=growth, spectra=replace(unstable.spectra, prediction=error, error=error))
    for name in drawn(broken):
        picture(name, broken, LIGHT).draw_without_rendering()
    content = json.dumps(broken.to_json(), allow_nan=False)
    assert json.loads(content)["growth"]["rollout"][0][5:8] == [errors[0, 5], None, None]


def test_key_numbers_name_what_they_are(unstable: Diagnosis, stable: Diagnosis) -> None:
    rows = dict(key_numbers(unstable))
    assert rows["growth factor L, where errors add up"] == "1.500"
    assert rows["first step with VRMSE above 1"] == "10, 11"
    assert rows["growth of a small error a step, true flow, twins, all steps / second half"] == "1.100 / 1.100"
    assert not any("twins" in name for name in dict(key_numbers(stable)))
