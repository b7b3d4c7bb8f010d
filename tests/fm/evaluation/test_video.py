"""Videos, decoded by another library than the one that drew the strips."""

import dataclasses
import io

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from samples import ramp_sample

from fm.evaluation.pictures import GAP, Sample, gif


def frames_of(animation: bytes) -> list[np.ndarray]:
    with Image.open(io.BytesIO(animation)) as opened:
        frames = []
        for index in range(opened.n_frames):
            opened.seek(index)
            frames.append(np.asarray(opened.convert("RGB")).astype(int))
    return frames


def local_palettes(animation: bytes) -> int:
    """How many frames have colours of their own, by the GIF89a grammar."""
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


def test_x_runs_to_the_right_y_upwards_and_colours_are_the_maps() -> None:
    side = 100
    frames = frames_of(gif(quarters(3), side=side, labelled=False))
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


def test_the_same_field_has_the_same_colours_in_every_frame() -> None:
    first, *others = frames_of(gif(quarters(4), side=64, labelled=False))
    for frame in others:
        np.testing.assert_array_equal(frame[20:], first[20:])  # below the step's number
        assert (frame[:20] != first[:20]).any()


@pytest.mark.parametrize(("domain", "ratio"), [(None, 1.0), (((0.0, 8.0), (0.0, 2.0)), 4.0), (((0, 1), (0, 3)), 1 / 3)])
def test_panels_have_the_shape_of_the_domain_and_one_area(domain: tuple | None, ratio: float) -> None:
    with Image.open(io.BytesIO(gif(ramp_sample(domain=domain), side=60, labelled=False))) as opened:
        width, height = opened.size
    columns, rows = (1, 3) if ratio >= 2 else (3, 1)
    assert width == pytest.approx(columns * (60 * ratio**0.5 + GAP) + GAP, abs=columns)
    text = 19  # the line with the step
    assert height == pytest.approx(rows * (60 / ratio**0.5 + GAP) + text, abs=rows)


def test_what_is_not_finite_is_grey() -> None:
    *_, last = frames_of(gif(ramp_sample(num_steps=3), side=60, labelled=False))
    prediction = last[-GAP - 30, GAP + 60 + GAP + 30]
    assert prediction.tolist() == [0xB0, 0xB0, 0xB0]


def test_a_large_offset_leaves_the_field_visible() -> None:
    sample = quarters(2)
    offset = dataclasses.replace(sample, truth=sample.truth + 1e5, prediction=sample.prediction + 1e5)
    near, far = (frames_of(gif(one, side=60, labelled=False))[0] for one in (sample, offset))
    np.testing.assert_array_equal(near, far)


def test_labels_leave_the_panels_as_they_are() -> None:
    plain, labelled = (frames_of(gif(quarters(2), labelled=flag))[0] for flag in (False, True))
    assert labelled.shape[0] > plain.shape[0]
    panel = (slice(-GAP - 150, -GAP - 20), slice(GAP + 20, GAP + 150))
    below = labelled.shape[0] - plain.shape[0]
    assert any(
        np.array_equal(plain[panel], np.roll(labelled, shift, axis=0)[-plain.shape[0] :][panel])
        for shift in range(below + 1)
    )


def test_a_narrow_domain_leaves_room_for_the_labels() -> None:
    tiny = dataclasses.replace(ramp_sample(domain=((0.0, 1.0), (0.0, 20.0))), truth=ramp_sample().truth * 1.234e-8)
    with Image.open(io.BytesIO(gif(tiny))) as opened:
        assert opened.width >= 400
