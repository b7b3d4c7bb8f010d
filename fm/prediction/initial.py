"""The states that a rollout of a file starts from.

Array legend: n trajectories, C state channels, K constant channels, X Y grid; channels in the card's order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.cards.registry import Registry
from data_pipeline.errors import UserError
from data_pipeline.well.hdf5 import WellFile
from data_pipeline.well.setting import Setting, read_attributes, read_setting, stored_card


@dataclass(frozen=True)
class Initial:
    """One frame of each of n trajectories."""

    setting: Setting
    trajectories: tuple[int, ...]  # their numbers in the file
    state: np.ndarray  # (n, C, X, Y) float32
    times: np.ndarray  # (n,) physical
    dts: np.ndarray | None  # (n,) time between the file's frames; None where it has one frame

    def time_axis(self, steps: int, step: float | None) -> np.ndarray:
        """Times (n, 1 + steps) from these frames on, `step` apart (1 if None) where the file does not say how much."""
        dts = np.full(len(self.times), 1.0 if step is None else step) if self.dts is None else self.dts
        return self.times[:, None] + np.arange(1 + steps) * dts[:, None]


def read_well(
    path: Path, registry: Registry, dataset: str | None, trajectories: Sequence[int] | None, start: int
) -> Initial:
    """Frame `start` of these trajectories of a Well file; of all where None.

    UserError where the file is missing, damaged or another dataset's, or has no such trajectory or frame.
    """
    card = stored_card(path, registry, dataset, read_attributes(path))
    with WellFile(path, card) as file:
        chosen = choose(path, file.num_trajectories, trajectories)
        check_start(path, file.num_frames, start)
        dts = None
        if file.num_frames > 1:
            dts = np.array([file.dt(one) for one in chosen])
            check_dts(path, dts)
        return Initial(
            setting=read_setting(file, chosen),
            trajectories=chosen,
            state=np.concatenate([file.read(one, start, start + 1) for one in chosen]),
            times=np.array([file.times(one)[start] for one in chosen]),
            dts=dts,
        )


def choose(path: Path, count: int, trajectories: Sequence[int] | None) -> tuple[int, ...]:
    """The chosen of `count` trajectories. UserError for one that is not there, or is chosen twice."""
    chosen = tuple(range(count)) if trajectories is None else tuple(trajectories)
    if not all(0 <= one < count for one in chosen) or len(set(chosen)) < len(chosen) or not chosen:
        raise UserError(
            f"--trajectory: expected numbers from 0 to {count - 1}, the trajectories of {path}, each once, or all; got "
            f"{' '.join(map(str, chosen)) or 'none'}"
        )
    return chosen


def check_start(path: Path, count: int, start: int) -> None:
    """UserError where there is no frame of this number."""
    if not 0 <= start < count:
        raise UserError(f"--start: expected a frame from 0 to {count - 1}, those of {path}; got {start}")


def check_dts(path: Path, dts: np.ndarray) -> None:
    """UserError where time does not go on."""
    if not (np.isfinite(dts) & (dts > 0)).all():
        raise UserError(f"{path}: expected times that increase from frame to frame, got steps of {dts.tolist()}")
