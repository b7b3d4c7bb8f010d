"""What a validation shows of a rollout, against the frames themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.registry import load_registry
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader
from fm.config import ValidationSettings
from fm.datasets import dataset_specs
from fm.evaluation.evaluate import ValidationResult, validate
from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM

NAMES = ["rayleigh_benard", "shear_flow"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def readers(tiny_shards: Path) -> dict[str, ShardReader]:
    return open_readers(tiny_shards, NAMES, "valid")


def result_of(readers: dict[str, ShardReader], rollouts: int) -> ValidationResult:
    torch.manual_seed(0)
    model = WaveLiTFM(ModelConfig(width=32, depth=1, heads=2), dataset_specs(readers, load_registry())).eval()
    return validate(model, readers, ValidationSettings(windows=2, rollouts=rollouts, protocol="thirds"), CPU)


def test_one_rollout_of_each_dataset_is_kept_to_look_at(readers: dict[str, ShardReader]) -> None:
    result = result_of(readers, rollouts=1)
    assert list(result.samples) == NAMES
    for name, sample in result.samples.items():
        reader = readers[name]
        assert (sample.dataset, sample.trajectory) == (name, 0)
        assert sample.steps == tuple(range(1, reader.num_frames(0)))  # 8 steps: all of them
        channel = reader.manifest.state_channels.index(sample.channel)
        frames = reader.trajectory_frames(0, 1, len(sample.steps))[:, channel]
        np.testing.assert_array_equal(sample.truth, frames)
        error = ((sample.prediction.astype(float) - frames) ** 2).mean((1, 2))
        exact = np.sqrt(error / (frames.astype(float).var((1, 2), ddof=1) + 1e-7))
        np.testing.assert_allclose(sample.vrmse, exact, rtol=1e-4)


def test_without_rollouts_there_is_nothing_to_look_at(readers: dict[str, ShardReader]) -> None:
    assert not result_of(readers, rollouts=0).samples
