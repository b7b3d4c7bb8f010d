"""Models that are extended: of three datasets, by burgers, and what is said where they cannot be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import stir
from handmade_export import exported
from safetensors.torch import load_file

from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from data_pipeline.windows.loader import open_readers
from fm.datasets import dataset_specs
from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.share.extend import extend

OLD = ("acoustic_scattering_maze", "helmholtz_staircase", "shear_flow")


CONFIG = ModelConfig(16, 1, 2, wavelet="haar")


CHANNELS = """
burgers_tracer: {description: passive tracer, unit: that of velocity_x at the start}
burgers_velocity_x: {description: velocity along x, unit: dimensionless}
burgers_velocity_y: {description: velocity along y, unit: unknown}
"""


CARD = """
name: burgers
description: Burgers turbulence, in channels of its own
state:
  t0: {tracer: [burgers_tracer]}
  t1: {velocity: [burgers_velocity_x, burgers_velocity_y]}
scalars: [nu]
boundary: {x: [PERIODIC, PERIODIC], y: [PERIODIC, PERIODIC]}
grid: [32, 32]
dt: 0.04
"""


def saved(shards: Path, folder: Path, config: ModelConfig = CONFIG) -> Path:
    """An exported model of OLD whose every parameter is something."""
    specs = dataset_specs(open_readers(shards, OLD, "train"), load_registry())
    return exported(stir(WaveLiTFM(config, specs)), folder, shards)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def refused(trained: Path, shards: Path, out: Path, *datasets: str, rows: str = "zero", **options: Any) -> str:
    """What is said of a wrong command; nothing may be left of it."""
    with pytest.raises(UserError) as caught:
        extend(str(trained), datasets, str(shards), out, rows, **options)
    assert not [path for path in out.parent.glob("*") if out.name in path.name]
    return str(caught.value)
