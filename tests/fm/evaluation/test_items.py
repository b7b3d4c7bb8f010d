"""Items: each window and each rollout once, the same for any number of processes; and who takes which."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader
from fm.evaluation.evaluate import Item, divide, list_items
from fm.evaluation.protocol import PROTOCOLS, get_protocol

THIRDS = PROTOCOLS["thirds"]


@pytest.fixture(scope="module")
def readers(tiny_shards: Path) -> dict[str, ShardReader]:
    return open_readers(tiny_shards, None, "test")


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_items_hold_each_window_and_each_rollout_once(readers: dict[str, ShardReader], batch_size: int) -> None:
    items = list_items(readers, THIRDS, batch_size)
    assert len({item.name for item in items}) == len(items)
    for name, reader in readers.items():
        height, width = reader.manifest.grid
        windows = [item for item in items if (item.dataset, item.task) == (name, "one_step")]
        assert [window for item in windows for window in item.ids] == list(range(len(reader.index(2))))
        assert max(len(item.ids) for item in windows) <= 8 * batch_size
        rollouts = [item for item in items if (item.dataset, item.task) == (name, "rollout")]
        assert sorted(one for item in rollouts for one in item.ids) == list(range(reader.num_trajectories))
        assert max(len(item.ids) for item in rollouts) <= batch_size
        assert all(item.cost == item.frames * height * width for item in windows + rollouts)  # 9 frames each
        assert sum(item.frames for item in rollouts) == 8 * reader.num_trajectories


def test_what_is_not_scored_is_in_no_item(readers: dict[str, ShardReader]) -> None:
    chosen = {"shear_flow": readers["shear_flow"]}
    items = list_items(chosen, dataclasses.replace(THIRDS, one_step_windows=3, max_steps=2), 8)
    assert [(item.name, item.frames) for item in items] == [
        ("shear_flow-one_step-00000", 3),
        ("shear_flow-rollout-00000", 2 * readers["shear_flow"].num_trajectories),
    ]
    late = list_items(chosen, dataclasses.replace(get_protocol("well"), start=8), 8)
    assert {item.task for item in late} == {"one_step"}  # no frame is left to predict


def items_of(costs: list[int]) -> list[Item]:
    return [Item("flow", "one_step", number, (number,), 1, cost) for number, cost in enumerate(costs)]


def test_the_process_with_the_least_to_do_takes_the_next_item() -> None:
    shares = divide(items_of([2, 7, 5, 3, 4]), 2)
    assert [[item.cost for item in share] for share in shares] == [[7, 3], [5, 4, 2]]


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 40])
def test_processes_divide_all_items_and_none_has_much_more_than_another(processes: int) -> None:
    items = items_of(np.random.default_rng(3).integers(1, 1000, 37).tolist())
    shares = divide(items, processes)
    assert sorted((item for share in shares for item in share), key=lambda item: item.number) == items
    loads = [sum(item.cost for item in share) for share in shares]
    at_least = max(sum(loads) / processes, max(item.cost for item in items))
    assert max(loads) <= 4 / 3 * at_least
    assert divide(items[::-1], processes) == shares
