"""A foreign `u`, and a foreign `A`, meet a model of The Well: they have rows of their own in its embedding."""

from pathlib import Path

import numpy as np
import pytest
import torch
from handmade_well import spread

from data_pipeline.cli import main
from data_pipeline.registry import VARIABLE, load_registry
from data_pipeline.well.headers import MODEL_GRID
from data_pipeline.windows.loader import open_readers
from fm.datasets import dataset_specs
from fm.model.spec import ModelConfig
from fm.model.surrogate import MIN_GRID
from fm.model.wavelit import WaveLiTFM

KNOWN = ["gray_scott_reaction_diffusion", "shear_flow"]  # with the channels A, B and velocity_x, velocity_y


def test_a_foreign_u_does_not_train_the_velocity_row(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "cards")
    monkeypatch.chdir(tmp_path)
    count, frames = 3, 3
    values = {name: spread((count, frames, 16, 16), seed) for seed, name in enumerate("uvA")}
    points = np.arange(16) / 16
    np.savez("foreign.npz", **values, t=np.arange(frames) * 0.5, x=points, y=points)
    stated = ["--dims", "n,t,x,y", "--boundary", "x=periodic,y=periodic", "--shards", "shards"]
    assert main(["import", "foreign.npz", "--name", "mine", "--out", "out", *stated]) == 0
    registry = load_registry("cards")
    readers = {**open_readers(tiny_shards, KNOWN, "train"), **open_readers("shards", ["mine"], "train")}
    model = WaveLiTFM(ModelConfig(width=16, depth=1, heads=2), dataset_specs(readers, registry))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # heads begin at zero, behind which no row has a gradient
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    batch = readers["mine"].batch(np.arange(2), 2)
    model(batch.fields[:, 0], batch.constants, "mine").square().sum().backward()
    rows = model.lifting.rows
    moved = {name for name in rows if rows[name].grad is not None and bool(rows[name].grad.abs().sum() > 0)}
    assert moved == {"mine_u", "mine_v", "mine_A"}
    assert {"velocity_x", "velocity_y", "A"} <= rows.keys()
    state = torch.zeros(1, 4, *readers["shear_flow"].manifest.grid)
    before = model(state, state[:, :0], "shear_flow")
    with torch.no_grad():
        rows["mine_u"] += 1
    assert torch.equal(model(state, state[:, :0], "shear_flow"), before)


def test_the_least_grid_that_check_demands_is_the_models() -> None:
    assert MODEL_GRID == MIN_GRID
