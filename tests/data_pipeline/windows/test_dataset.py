"""Windows as a map-style Dataset, in this process and in workers that are forked or spawned."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data_pipeline.errors import UserError
from data_pipeline.windows.dataset import Windows
from data_pipeline.windows.reader import ShardReader

NAME = "acoustic_scattering_maze"


def test_items_are_the_readers_windows(tiny_shards: Path) -> None:
    windows, reader = Windows(tiny_shards, NAME, length=3), ShardReader(tiny_shards, NAME, "train")
    assert len(windows) == len(reader.index(3)) > 4
    batch = reader.batch(np.arange(len(windows)), 3)
    items = [windows[number] for number in range(len(windows))]
    assert torch.equal(torch.stack([item["fields"] for item in items]), batch.fields)
    assert torch.equal(torch.stack([item["constants"] for item in items]), batch.constants)
    assert items[0]["fields"].shape == (3, len(windows.state_channels), *windows.grid)
    assert windows.constant_channels == ("density", "speed_of_sound")
    means = [reader.manifest.stats["std_delta"][name] for name in windows.state_channels]
    assert torch.equal(windows.moment("std_delta").flatten(), torch.tensor(means))
    with pytest.raises(IndexError, match="window ids run from 0"):
        windows[len(windows)]


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_several_processes_give_what_one_gives(way: str, tiny_shards: Path) -> None:
    windows = Windows(str(tiny_shards), NAME, length=2, split="valid")
    windows[0]  # this process has its maps, which workers must not share
    assert len(pickle.dumps(windows)) < 10_000
    expected = list(DataLoader(windows, batch_size=4))
    loader = DataLoader(windows, batch_size=4, num_workers=2, multiprocessing_context=way)
    found = list(loader)
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["fields"], other["fields"])
        assert torch.equal(one["constants"], other["constants"])


def test_missing_shards_and_long_windows_are_named(tiny_shards: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)no train shards under .*nothing/train/manifest\.json"):
        Windows(tiny_shards, "nothing", length=2)
    with pytest.raises(UserError, match="no window of 99 frames"):
        Windows(tiny_shards, NAME, length=99)
