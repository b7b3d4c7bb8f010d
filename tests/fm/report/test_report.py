"""Tables that say what happened, pictures that show it."""

import copy
import math

import numpy as np
import pytest

from data_pipeline.errors import UserError
from fm.report.curves import growth_curve, growth_figure
from fm.report.sample import Sample
from fm.report.strips import diverging_map, error_scale, field_scale, overview, strip
from fm.scores.errors import DatasetErrors, ErrorFile, Errors
from fm.scores.protocol import PROTOCOLS
from fm.scores.scoring import score
from fm.scores.tables import compare_table, markdown, number, score_table


def scores_of(**levels: float) -> dict:
    """Scores of datasets whose VRMSE is the level at every step, 9 steps, 3 trajectories, persistence 1."""
    datasets = {}
    for name, level in levels.items():
        errors = Errors(*(np.full((3, 9, 2), value) for value in (1.0, level**2, 1.0, 1.0)))
        datasets[name] = DatasetErrors(("a", "b"), np.arange(3), errors, errors, name, (16, 16))
    return score(ErrorFile(PROTOCOLS["thirds"], datasets))


def cells(table: str, first: str) -> list[list[str]]:
    """The rows of a Markdown table that start with this cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0] == first]


def test_markdown_columns_line_up() -> None:
    table = markdown(["name", "x"], [["a", "1.0"], ["longer", "10.25"]])
    assert table.splitlines() == [
        "| name   |     x |",
        "|:-------|------:|",
        "| a      |   1.0 |",
        "| longer | 10.25 |",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.1235"), (12.0, "12.0000"), (12345.6, "1.23e+04"), (None, "-")]
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_the_score_table_has_protocol_persistence_mean_field_and_every_window() -> None:
    table = score_table(scores_of(shear_flow=0.25, active_matter=0.5))
    assert "protocol thirds v1" in table
    one_step, first, middle, last = cells(table, "shear_flow")
    assert one_step == ["shear_flow", "27", "0.2500", "0.2500", "1.0000", "1.0000", "0.2500"]
    assert [row[1:4] for row in (first, middle, last)] == [
        ["first_third", "1-3", "3"],
        ["middle_third", "4-6", "3"],
        ["last_third", "7-9", "3"],
    ]
    assert f"one step {math.sqrt(0.125):.4f}" in table


def test_the_score_table_marks_divergence_and_missing_windows() -> None:
    model = np.full((3, 9, 1), 0.25)
    model[0, 7:] = np.inf
    ones = np.ones_like(model)
    part = DatasetErrors(
        ("a",), np.array([4, 5, 6]), Errors(*[ones] * 4), Errors(ones, model, ones, ones), "x", (16, 16)
    )
    file = ErrorFile(PROTOCOLS["thirds"], {"shear_flow": part})
    *_, last = cells(score_table(score(file)), "shear_flow")
    assert last[4:6] == ["0.5000 (1 of 3 diverged)", "-"]
    assert "Diverged on shear_flow: trajectory 4 at step 8." in score_table(score(file))
    _, short, long = cells(score_table(score(file, PROTOCOLS["wavelit"])), "shear_flow")
    assert short[1:] == ["1:20", "horizon is 9", "0", "-", "-", "-", "-", "-"]
    assert long[1] == "21:60"


def test_the_compare_table_shows_both_and_counts_wins() -> None:
    before, after = scores_of(shear_flow=0.5, active_matter=0.4), scores_of(shear_flow=0.25, active_matter=0.6)
    table = compare_table(before, after)
    one_step = cells(table, "shear_flow")[0]
    assert one_step == ["shear_flow", "0.5000", "0.2500", "-50%", "1.0000", "1.0000"]
    assert cells(table, "active_matter")[0][3] == "+50%"
    assert "last_third: finetuned lower on 1 of 2 datasets" in table
    assert f"one step {math.sqrt(0.2):.4f} -> {math.sqrt(0.15):.4f}" in table


def test_a_diverged_score_never_wins() -> None:
    before, after = scores_of(shear_flow=0.5), scores_of(shear_flow=math.inf)
    table = compare_table(before, after, labels=("a", "b"))
    assert cells(table, "shear_flow")[0][1:4] == ["0.5000", "27 of 27 diverged", "-"]
    assert "one step: b lower on 0 of 1 datasets" in table
    assert "one step: a lower on 1 of 1 datasets" in compare_table(after, before, labels=("b", "a"))


def test_only_comparable_scores_are_compared() -> None:
    before = scores_of(shear_flow=0.5)
    after = copy.deepcopy(before)
    after["protocol"]["eps"] = 1e-5
    with pytest.raises(UserError, match="under one protocol"):
        compare_table(before, after)
    after = copy.deepcopy(before)
    after["datasets"]["shear_flow"]["data_digest"] = "other"
    with pytest.raises(UserError, match="the same shear_flow data"):
        compare_table(before, after)


def test_the_diverging_map_has_even_lightness_and_a_light_middle() -> None:
    rgb = np.array(diverging_map()(np.arange(257)))[:, :3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert luminance.argmax() == 128
    # CIE L*, independent of the OKLab in which the map is made.
    lightness = 116 * np.cbrt(np.maximum(luminance, 0.008856)) - 16
    for half in (lightness[:129], lightness[128:][::-1]):
        steps = np.diff(half)
        assert (steps > 0).all()
        assert steps.max() < 1.6 * steps.mean()
    assert lightness[0] == pytest.approx(lightness[-1], abs=6)


def test_colour_limits() -> None:
    ramp = np.linspace(0, 1, 1001).reshape(1, 7, 143)
    one_sign, both_signs = field_scale(ramp), field_scale(2 * ramp - 1)
    assert (one_sign.norm.vmin, one_sign.norm.vmax) == pytest.approx((0.002, 0.998))
    assert both_signs.norm.vmin == -both_signs.norm.vmax
    error = np.array([0.1, -0.2, np.nan, np.inf])
    assert error_scale(error, ramp).norm.vmax == pytest.approx(0.2, rel=0.01)
    assert error_scale(error * 1e6, ramp).norm.vmax == 1.0
    assert field_scale(np.zeros((1, 4, 4))).norm.vmax > field_scale(np.zeros((1, 4, 4))).norm.vmin


def sample_of(shape: tuple[int, int]) -> Sample:
    """Fields that grow along x, so that orientation can be seen; the last prediction is not finite."""
    truth = np.broadcast_to(np.linspace(0, 1, shape[0])[:, None], (3, *shape)).copy()
    prediction = truth + 0.1
    prediction[2] = np.nan
    return Sample("shear_flow", "tracer", 0, 0.5, (1, 4, 9), truth, prediction, np.array([0.1, 0.2, np.inf]))


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (64, 16)])
def test_strips_show_x_to_the_right_with_square_cells_and_fixed_limits(shape: tuple[int, int]) -> None:
    figure = strip(sample_of(shape))
    figure.draw_without_rendering()
    images = [image for axes in figure.axes for image in axes.images if image.get_array().shape == shape[::-1]]
    assert len(images) == 9
    for image in images:
        assert image.origin == "lower"
        box = image.axes.get_window_extent()
        assert box.width / box.height == pytest.approx(shape[0] / shape[1], rel=1e-3)
    truth = [image for image in images if np.ptp(image.get_array()[0]) == 1.0 and not image.get_array()[0, 0]]
    assert len(truth) == 3
    assert len({(image.norm.vmin, image.norm.vmax) for image in images}) == 2
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts.count("not finite") == 2


def test_the_overview_has_a_column_for_each_dataset() -> None:
    figure = overview([sample_of((16, 16)), sample_of((64, 16))])
    assert len(figure.axes) == 6
    assert len({round(axes.get_position().x0, 6) for axes in figure.axes}) == 2


def test_growth_curves_keep_diverged_trajectories_as_infinity() -> None:
    model = np.full((3, 4, 2), 0.25)
    model[2, 2:] = np.nan
    ones = np.ones_like(model)
    median, low, high = growth_curve(Errors(ones, model, ones, ones), "model", 0.0)
    assert median.tolist() == low.tolist() == [0.5] * 4
    assert high.tolist() == [0.5, 0.5, math.inf, math.inf]


def test_the_growth_figure_marks_failures() -> None:
    model = np.full((3, 9, 2), 0.25)
    model[2, 4:] = np.nan
    ones = np.ones_like(model)
    errors = Errors(ones, model, ones, ones)
    part = DatasetErrors(("a", "b"), np.arange(3), errors, errors, "x", (16, 16))
    figure = growth_figure({"shear_flow": part}, PROTOCOLS["thirds"])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.texts] == ["1 of 3 diverged"]
    (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert cross.get_xdata().tolist() == [5]
