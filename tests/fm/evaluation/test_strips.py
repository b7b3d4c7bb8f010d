"""Strips: colours, limits, orientation, the shape of the domain."""

import numpy as np
import pytest
from samples import ramp_sample

from fm.evaluation.pictures import diverging_map, error_scale, field_scale, overview, strip


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


WALLED = ((0.0, 6.0), (-1.0, 1.0))


@pytest.mark.parametrize(
    ("shape", "domain", "ratio"),
    [
        ((16, 16), None, 1),
        ((16, 48), None, 1 / 3),
        ((64, 16), None, 4),
        ((16, 16), WALLED, 3),  # as many points along both axes of a long channel
        ((64, 16), ((0.0, 1.0), (0.0, 2.0)), 1 / 2),
    ],
)
def test_strips_show_x_to_the_right_in_the_shape_of_the_domain_with_fixed_limits(
    shape: tuple[int, int], domain: tuple, ratio: float
) -> None:
    figure = strip(ramp_sample(shape, domain=domain))
    figure.draw_without_rendering()
    images = [image for axes in figure.axes for image in axes.images if image.get_array().shape == shape[::-1]]
    assert len(images) == 9
    for image in images:
        assert image.origin == "lower"
        box = image.axes.get_window_extent()
        assert box.width / box.height == pytest.approx(ratio, rel=1e-3)
        x, y = domain or ((0, shape[0]), (0, shape[1]))
        assert image.get_extent() == pytest.approx([*x, *y])
    truth = [image for image in images if np.ptp(image.get_array()[0]) == 1.0 and not image.get_array()[0, 0]]
    assert len(truth) == 3
    assert len({(image.norm.vmin, image.norm.vmax) for image in images}) == 2
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts.count("not finite") == 2
    words = [text.get_text() for text in figure.texts]
    assert words.count("x 0..6, y -1..1" if domain == WALLED else ramp_sample(shape, domain=domain).extent_text) == 1


def test_without_a_domain_lengths_are_cells() -> None:
    assert ramp_sample((64, 16)).extent_text == "64 x 16 cells, grid units"


@pytest.mark.parametrize("shape", [(16, 16), (64, 16)])
def test_a_strip_shows_six_steps_of_many(shape: tuple[int, int]) -> None:
    figure = strip(ramp_sample(shape, num_steps=24))
    assert sum(image.get_array().shape == shape[::-1] for axes in figure.axes for image in axes.images) == 18
    labels = [text for axes in figure.axes for text in (axes.get_title(), axes.get_ylabel()) if "step" in text]
    assert [label.split()[1] for label in sorted(labels, key=lambda label: int(label.split()[1]))] == [
        "1",
        "6",
        "10",
        "15",
        "19",
        "24",
    ]


def test_the_overview_has_a_column_for_each_dataset() -> None:
    figure = overview([ramp_sample(), ramp_sample((64, 16))])
    assert len(figure.axes) == 6
    assert len({round(axes.get_position().x0, 6) for axes in figure.axes}) == 2
