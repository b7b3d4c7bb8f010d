"""A card and its channels, written by hand, and what is said of wrong ones."""

from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.registry import load_folders

CHANNELS = """
velocity_x: {description: velocity along x, unit: none}
velocity_y: {description: velocity along y, unit: none}
temperature: {description: temperature, unit: none}
porosity: {description: porosity, unit: none}
S_xx: {description: stress, unit: none}
S_xy: {description: stress, unit: none}
S_yx: {description: stress, unit: none, duplicate_of: S_xy}
S_yy: {description: stress, unit: none}
"""
CARD = """
name: burgers
abbreviation: BU
description: Burgers turbulence
state:
  t0: {temperature: [temperature]}
  t1: {velocity: [velocity_x, velocity_y]}
  t2: {S: [S_xx, S_xy, S_yx, S_yy]}
constant:
  t0: {porosity: [porosity]}
scalars: [nu]
boundary: {x: [PERIODIC, PERIODIC], y: [WALL, OPEN]}
grid: [32, 16]
domain: {x: [0, 4], y: [-1, 1]}
dt: 0.5
train:
  - {trajectories: 4, frames: 11}
  - {trajectories: 1, frames: 3}
test_trajectories: 2
source: https://example.org/burgers
ranges: {temperature: [0, null]}
conserved:
  - {kind: mean, channels: [temperature]}
  - {kind: mean_square, channels: [S_xx, S_yy]}
published:
  - table: our paper
    protocol: wavelit
    one_step: {U-net: 0.5}
    "1:20": {U-net: 0.75}
"""


def write(root: Path, card: str | bytes = CARD, channels: str = CHANNELS, name: str = "burgers") -> Path:
    (root / "datasets").mkdir(parents=True, exist_ok=True)
    (root / "channels.yaml").write_text(channels, encoding="utf-8")
    content = card if isinstance(card, bytes) else card.encode()
    (root / "datasets" / f"{name}.yaml").write_bytes(content)
    return root


def complaint(*roots: Path) -> str:
    """About folders read on their own, without the packaged cards."""
    with pytest.raises(UserError) as caught:
        load_folders(roots)
    return str(caught.value)
