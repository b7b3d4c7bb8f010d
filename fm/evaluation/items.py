"""An evaluation cut into items: what its processes divide among them, and what a restart finds done or not.

An item is a range of one dataset's one-step windows, or one batch of its rollouts. What items hold, and the batches
within them, does not depend on the number of processes. So one process and several give the same errors, on one
machine bit for bit.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.windows.reader import ShardReader
from fm.evaluation.measure import one_step_windows, rollout_batches, rollout_steps
from fm.scores.protocol import Protocol

BATCHES = 8  # of an item of one-step windows, at most


@dataclass(frozen=True)
class Item:
    """A piece of an evaluation that is measured as a whole."""

    dataset: str
    task: str  # one_step or rollout
    number: int  # among those of its dataset and task
    ids: tuple[int, ...]  # of windows (one_step), or of trajectories, longest first (rollout)
    frames: int  # predictions that are scored
    cost: int  # predictions x grid cells

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.task}-{self.number:05d}"


def list_items(readers: Mapping[str, ShardReader], protocol: Protocol, batch_size: int) -> list[Item]:
    """All items of an evaluation: dataset by dataset, one step before rollouts."""
    return [
        item
        for reader in readers.values()
        for item in [*_one_step(reader, protocol, batch_size), *_rollouts(reader, protocol, batch_size)]
    ]


def divide(items: Sequence[Item], processes: int) -> list[list[Item]]:
    """What each process measures, most expensive first: each item goes to the process with the least to do so far.

    A pure function, so that each process knows its share without asking (Graham's LPT rule, SIAM J. Appl. Math. 17,
    1969: the last one ends at most 4/3 as late as is possible).
    """
    loads = [(0, process) for process in range(processes)]
    shares: list[list[Item]] = [[] for _ in range(processes)]
    for item in sorted(items, key=lambda item: (-item.cost, item.name)):
        load, process = heapq.heappop(loads)
        shares[process].append(item)
        heapq.heappush(loads, (load + item.cost, process))
    return shares


def _one_step(reader: ShardReader, protocol: Protocol, batch_size: int) -> list[Item]:
    windows = one_step_windows(reader, protocol)
    ranges = np.array_split(windows, -(-len(windows) // (BATCHES * batch_size)))
    return [
        Item(reader.dataset, "one_step", number, tuple(ids.tolist()), len(ids), len(ids) * _cells(reader))
        for number, ids in enumerate(ranges)
    ]


def _rollouts(reader: ShardReader, protocol: Protocol, batch_size: int) -> list[Item]:
    items = []
    for number, ids in enumerate(rollout_batches(reader, range(reader.num_trajectories), protocol, batch_size)):
        steps = [rollout_steps(reader, trajectory, protocol) for trajectory in ids]
        cost = len(ids) * steps[0] * _cells(reader)  # those that end early go on with the batch
        items.append(Item(reader.dataset, "rollout", number, tuple(ids), sum(steps), cost))
    return items


def _cells(reader: ShardReader) -> int:
    height, width = reader.manifest.grid
    return height * width
