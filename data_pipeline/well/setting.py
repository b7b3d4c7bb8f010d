"""What a Well file says of its trajectories beside their states: all that predictions of them share with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_pipeline.cards.registry import Card, Registry
from data_pipeline.errors import UserError
from data_pipeline.well.boundary import BoundaryMask
from data_pipeline.well.hdf5 import WellFile
from data_pipeline.well.hdf5_safety import texts


@dataclass(frozen=True)
class Setting:
    """n trajectories without their states, on X x Y points."""

    card: Card
    x: np.ndarray  # (X,)
    y: np.ndarray  # (Y,)
    constants: np.ndarray  # (n, K, X, Y) float32, in the card's order
    scalars: Mapping[str, np.ndarray]  # name -> (n,)
    boundaries: tuple[BoundaryMask, ...]

    @property
    def num_trajectories(self) -> int:
        return len(self.constants)

    @property
    def grid(self) -> tuple[int, int]:
        return len(self.x), len(self.y)


def read_setting(file: WellFile, trajectories: Sequence[int]) -> Setting:
    """The setting of some trajectories of a file, in their order."""
    x, y = file.axes()
    scalars = [file.scalars(trajectory) for trajectory in trajectories]
    return Setting(
        card=file.card,
        x=x,
        y=y,
        constants=np.stack([file.constants(trajectory) for trajectory in trajectories]),
        scalars={name: np.array([one[name] for one in scalars]) for name in scalars[0]},
        boundaries=file.boundary_masks(),
    )


def read_attributes(path: Path) -> dict[str, Any]:
    """The attributes of an HDF5 file, `dataset_name` among them. UserError where there is no such file, or another."""
    if not path.is_file():
        found = "a folder" if path.is_dir() else "none"
        raise UserError(f"{path}: expected an HDF5 file in the Well's layout, found {found}")
    try:
        with h5py.File(path, "r") as file:
            return dict(file.attrs)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read, so it is truncated or no HDF5 file ({error})") from error


def stored_card(path: Path, registry: Registry, dataset: str | None, attributes: Mapping[str, Any]) -> Card:
    """The card of `dataset`, by default of what the attribute `dataset_name` says. UserError if there is none."""
    name = dataset or attributes.get("dataset_name")
    if name is None:
        raise UserError(
            f"{path}: it does not say which dataset it is of (attribute dataset_name): name it with --dataset"
        )
    return registry.card(texts(name)[0])
