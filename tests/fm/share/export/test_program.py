"""A step as a program: the same numbers, in a process that has torch and not this package."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade import make_spec, stir

from data_pipeline.files import UserError
from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.share.export import step_program

SCRIPT = """
import importlib.util, sys
import numpy, torch
assert importlib.util.find_spec("fm") is None
step = torch.export.load(sys.argv[1]).module()
given = numpy.load(sys.argv[2])
numpy.savez(sys.argv[3], **{
    str(size): step(torch.from_numpy(given["state"][:size]), torch.from_numpy(given["constants"][:size])).numpy()
    for size in (1, 2, 5)
})
"""
# one axis wraps, one does not
ENDS = (("PERIODIC", "PERIODIC"), ("WALL", "OPEN"))
MAZE = replace(make_spec("acoustic_scattering_maze"), grid=(18, 22), boundary=ENDS)
SHEAR = make_spec("shear_flow")


@pytest.fixture(scope="module")
def model() -> WaveLiTFM:
    return stir(WaveLiTFM(ModelConfig(16, 1, 4), [MAZE, SHEAR])).eval()


def test_the_program_gives_the_models_steps_where_the_package_is_not(model: WaveLiTFM, tmp_path: Path) -> None:
    (tmp_path / "step.pt2").write_bytes(step_program(model, MAZE.name))
    generator = torch.Generator().manual_seed(3)
    state = model.denormalize(torch.randn(5, 3, 18, 22, generator=generator), MAZE.name)
    constants = torch.randn(5, 2, 18, 22, generator=generator) + MAZE.moment("mean", MAZE.constant_channels).float()
    np.savez(tmp_path / "given.npz", state=state.numpy(), constants=constants.numpy())
    files = [str(tmp_path / name) for name in ("step.pt2", "given.npz", "out.npz")]
    subprocess.run([sys.executable, "-I", "-c", _without_editable_installs(SCRIPT), *files], check=True, cwd=tmp_path)
    expected = next(model.iterate(state, constants, MAZE.name, 1))
    moved = (expected - state).abs().amax()
    scale = expected.abs().amax(dim=(0, 2, 3), keepdim=True)
    with np.load(tmp_path / "out.npz") as out:
        for size in (1, 2, 5):
            error = (torch.from_numpy(out[str(size)]) - expected[:size]).abs() / scale
            assert float(error.amax()) < 1e-6
    assert float(moved) > 1e-3


def _without_editable_installs(script: str) -> str:
    """`-I` leaves site-packages in place, and there a link to this source tree may be."""
    root = json.dumps(str(Path(__file__).parents[4]))
    cut = f"import sys; sys.path[:] = [p for p in sys.path if p != {root}]\n"
    return f"{cut}sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n{script}"


def test_what_cannot_be_a_program_is_refused(model: WaveLiTFM) -> None:
    with pytest.raises(
        UserError, match="expected a dataset of the model, acoustic_scattering_maze, shear_flow; got 'x'"
    ):
        step_program(model, "x")
    with pytest.raises(UserError, match="does not know the grid"):
        step_program(model, SHEAR.name)
