"""Pictures in TensorBoard's files: read by TensorBoard's own reader, decoded by Pillow."""

import dataclasses
import io
from pathlib import Path

import numpy as np
from PIL import Image
from samples import ramp_sample
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fm.report.sample import Sample
from fm.tracking import Dashboard


def images_of(directory: Path, sample: Sample) -> dict[str, Image.Image]:
    board = Dashboard(directory, [sample.dataset], ["1:20"], 0)
    board.rollout(sample, 7)
    board.close()
    events = EventAccumulator(str(directory), size_guidance={"images": 0})
    events.Reload()
    images = {}
    for tag in events.Tags()["images"]:
        (event,) = events.Images(tag)
        assert event.step == 7
        image = Image.open(io.BytesIO(event.encoded_image_string))
        assert image.size == (event.width, event.height)
        images[tag] = image
    return images


def test_a_rollout_is_shown_still_and_moving(tmp_path: Path) -> None:
    images = images_of(tmp_path, ramp_sample((16, 32), num_steps=9))
    assert set(images) == {f"shear_flow/{kind}" for kind in ("truth", "prediction", "error", "spectrum", "rollout")}
    assert images["shear_flow/rollout"].format == "GIF"
    assert images["shear_flow/rollout"].n_frames == 9
    truth = np.asarray(images["shear_flow/truth"]).astype(int)
    assert truth.shape[0] == 2 * truth.shape[1]  # x to the right, y upwards
    assert truth[0, -1, 1] > truth[0, 0, 1] + 150  # from viridis's violet to its yellow


def test_a_prediction_that_is_not_finite_is_shown_too(tmp_path: Path) -> None:
    sample = ramp_sample()
    broken = dataclasses.replace(sample, prediction=np.full_like(sample.truth, np.nan))
    assert "shear_flow/rollout" in images_of(tmp_path, broken)


def test_the_videos_of_a_million_steps_stay_below_200_mb(tmp_path: Path) -> None:
    """Nine datasets, 100 validations, 16 steps each, and the worst case: noise in every panel."""
    truth, prediction = np.random.default_rng(0).standard_normal((2, 16, 128, 128))
    sample = dataclasses.replace(ramp_sample(num_steps=16), truth=truth, prediction=prediction)
    video = images_of(tmp_path, sample)["shear_flow/rollout"]
    assert len(video.fp.getvalue()) < 200e6 / (9 * 100)
