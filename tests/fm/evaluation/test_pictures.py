"""Strips and GIFs: colors, limits, orientation, the shape of the domain. GIFs are decoded by another library."""

import dataclasses
import io

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from samples import ramp_sample

from fm.evaluation.pictures import GAP, composite, error_scale, field_scale, gif, overview, strip
from fm.evaluation.samples import Sample


def test_color_limits() -> None:
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


def frames_of(animation: bytes) -> list[np.ndarray]:
    with Image.open(io.BytesIO(animation)) as opened:
        frames = []
        for index in range(opened.n_frames):
            opened.seek(index)
            frames.append(np.asarray(opened.convert("RGB")).astype(int))
    return frames


def local_palettes(animation: bytes) -> int:
    """How many frames have colors of their own, by the GIF89a grammar."""
    at, count = 13 + 3 * 2 ** ((animation[10] & 7) + 1), 0
    while animation[at] != 0x3B:
        if animation[at] == 0x2C:
            packed = animation[at + 9]
            count += packed >> 7
            at += 11 + (3 * 2 ** ((packed & 7) + 1) if packed >> 7 else 0)
        else:
            at += 2
        while animation[at]:
            at += animation[at] + 1
        at += 1
    return count


def quarters(num_steps: int) -> Sample:
    """1 in the quarter at large x and small y, 0 elsewhere, the same at every step; predicted well."""
    truth = np.zeros((num_steps, 32, 32))
    truth[:, 16:, :16] = 1
    steps = tuple(range(2, 2 * num_steps + 1, 2))
    return Sample("shear_flow", "tracer", 0, 0.5, steps, truth, truth.copy(), np.full(num_steps, 0.1))


def test_every_step_is_a_frame_and_all_share_one_palette() -> None:
    animation = gif(quarters(5))
    with Image.open(io.BytesIO(animation)) as opened:
        assert opened.format == "GIF"
        assert opened.n_frames == 5
        assert opened.info["loop"] == 0
        assert 100 <= opened.info["duration"] <= 125  # 8 to 10 frames a second
    assert animation[10] >> 7 == 1
    assert local_palettes(animation) == 0


def test_x_runs_to_the_right_y_upwards_and_colors_are_the_maps() -> None:
    side = 100
    frames = frames_of(gif(quarters(3), side=side, labeled=False))
    dark, bright = (np.array(colormaps["viridis"](value)[:3]) * 255 for value in (0.0, 1.0))
    for frame in frames:
        top = frame.shape[0] - side - GAP
        for panel in range(2):  # truth and prediction
            left = GAP + panel * (side + GAP)
            picture = frame[top : top + side, left : left + side]
            np.testing.assert_allclose(picture[75, 75], bright, atol=1)  # large x, small y
            for y, x in ((25, 25), (25, 75), (75, 25)):
                np.testing.assert_allclose(picture[y, x], dark, atol=1)
        error = frame[top : top + side, GAP + 2 * (side + GAP) : -GAP]
        assert error.reshape(-1, 3).min() > 240  # no error: the light middle of its map


def test_the_same_field_has_the_same_colors_in_every_frame() -> None:
    first, *others = frames_of(gif(quarters(4), side=64, labeled=False))
    for frame in others:
        np.testing.assert_array_equal(frame[20:], first[20:])  # below the step's number
        assert (frame[:20] != first[:20]).any()


@pytest.mark.parametrize(("domain", "ratio"), [(None, 1.0), (((0.0, 8.0), (0.0, 2.0)), 4.0), (((0, 1), (0, 3)), 1 / 3)])
def test_panels_have_the_shape_of_the_domain_and_one_area(domain: tuple | None, ratio: float) -> None:
    with Image.open(io.BytesIO(gif(ramp_sample(domain=domain), side=60, labeled=False))) as opened:
        width, height = opened.size
    columns, rows = (1, 3) if ratio >= 2 else (3, 1)
    assert width == pytest.approx(columns * (60 * ratio**0.5 + GAP) + GAP, abs=columns)
    text = 19  # the line with the step
    assert height == pytest.approx(rows * (60 / ratio**0.5 + GAP) + text, abs=rows)


def test_what_is_not_finite_is_gray() -> None:
    *_, last = frames_of(gif(ramp_sample(num_steps=3), side=60, labeled=False))
    prediction = last[-GAP - 30, GAP + 60 + GAP + 30]
    assert prediction.tolist() == [0xB0, 0xB0, 0xB0]


@pytest.mark.parametrize(
    "domain", [None, ((0.0, 8.0), (0.0, 2.0)), ((0.0, 1.0), (0.0, 3.0)), ((0.0, 1.0), (0.0, 50.0))]
)
@pytest.mark.parametrize("width", [350, 700])
def test_a_composite_has_its_width_and_all_panels(domain: tuple | None, width: int) -> None:
    sample = dataclasses.replace(quarters(2), domain=domain)
    image = np.asarray(composite(sample, 1, width).convert("RGB")).astype(int)
    assert image.shape[1] == width
    assert image.shape[0] < 1.6 * width
    bright = np.array(colormaps["viridis"](1.0)[:3]) * 255
    yellow = (np.abs(image - bright) < 2).all(-1).sum(1)  # in the rows of truth and prediction, and in the color bar
    assert yellow.max() >= 8
    other = dataclasses.replace(sample, vrmse=np.full(2, 0.7))
    changed = (np.asarray(composite(other, 1, width).convert("RGB")) != image).any(-1)
    assert changed.any()  # the VRMSE is in the picture
    assert np.flatnonzero(changed.any(1)).max() < 0.15 * width  # in its heading


def test_a_large_offset_leaves_the_field_visible() -> None:
    sample = quarters(2)
    offset = dataclasses.replace(sample, truth=sample.truth + 1e5, prediction=sample.prediction + 1e5)
    near, far = (frames_of(gif(one, side=60, labeled=False))[0] for one in (sample, offset))
    np.testing.assert_array_equal(near, far)


def test_labels_leave_the_panels_as_they_are() -> None:
    plain, labeled = (frames_of(gif(quarters(2), labeled=flag))[0] for flag in (False, True))
    assert labeled.shape[0] > plain.shape[0]
    panel = (slice(-GAP - 150, -GAP - 20), slice(GAP + 20, GAP + 150))
    below = labeled.shape[0] - plain.shape[0]
    assert any(
        np.array_equal(plain[panel], np.roll(labeled, shift, axis=0)[-plain.shape[0] :][panel])
        for shift in range(below + 1)
    )


def test_a_narrow_domain_leaves_room_for_the_labels() -> None:
    tiny = dataclasses.replace(ramp_sample(domain=((0.0, 1.0), (0.0, 20.0))), truth=ramp_sample().truth * 1.234e-8)
    with Image.open(io.BytesIO(gif(tiny))) as opened:
        assert opened.width >= 400
