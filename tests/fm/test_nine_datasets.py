"""The README's "Add a dataset in ten minutes", typed as it stands there: a ninth dataset, and no code is changed.

A netCDF file stands for the user's. It has a channel that the eight lack.
"""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xarray

from data_pipeline.cli import main as data_pipeline
from data_pipeline.miniwell.generate import simulate
from data_pipeline.registry import VARIABLE, load_folders, load_registry, packaged_folder
from data_pipeline.windows.loader import open_readers
from fm.checkpoint import find_checkpoint, load_pretrained
from fm.cli import main as fm
from fm.datasets import dataset_specs
from fm.model.wavelit import WaveLiTFM

ROOT = Path(__file__).parents[2]
NINTH = "burgers"
EIGHT = load_folders([packaged_folder()])
SMALL = ["model.width=16", "model.depth=1", "model.heads=2", "train.steps=27", "sampling.scheme=uniform"]
QUIET = ["validation.every=0", "tracking.progress=false"]


def readme_commands() -> list[list[str]]:
    """The commands of the section's one shell block, without their comments."""
    section = re.search(
        r"^### 2\. Add a dataset in ten minutes$(.*?)^### 3", (ROOT / "README.md").read_text(), re.S | re.M
    )
    assert section is not None
    block = re.search(r"```sh\n(.*?)```", section[1], re.S)
    assert block is not None
    return [shlex.split(line, comments=True) for line in block[1].splitlines()]


def type_in(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what a shell would, in this process; training is of a small model."""
    match command:
        case ["export", assignment]:
            monkeypatch.setenv(*assignment.split("="))
        case ["data-pipeline", *arguments]:
            quick = {"simulate": ["--jobs", "1"], "shard": ["--jobs", "1"]}.get(arguments[0], [])
            assert data_pipeline([*arguments, *quick]) == 0
        case ["fm", "train", recipe, *overrides]:
            assert fm(["train", str(ROOT / recipe), *overrides, *SMALL, *QUIET]) == 0
        case ["fm", *arguments]:
            assert fm(arguments) == 0
        case _:
            pytest.fail(f"the README has a command that this test cannot type: {shlex.join(command)}")


def users_file(path: Path) -> None:
    """Burgers with a concentration c, as xarray writes what a simulator of the user's might give."""
    simulate(Path("simulated"), "tiny", [NINTH], jobs=1)
    parts: dict[str, list[np.ndarray]] = {"u": [], "v": [], "c": []}
    for source in sorted(Path("simulated").rglob("*.hdf5")):
        with h5py.File(source) as file:
            velocity = file["t1_fields/velocity"][()]
            for name, values in (("u", velocity[..., 0]), ("v", velocity[..., 1]), ("c", file["t0_fields/tracer"][()])):
                parts[name].append(values.swapaxes(2, 3))
            coordinates = {axis: file["dimensions"][axis][()] for axis in ("time", "x", "y")}
    fields = {name: (("sample", "time", "y", "x"), np.concatenate(values)) for name, values in parts.items()}
    xarray.Dataset(fields, coordinates).to_netcdf(path, engine="h5netcdf")


@pytest.fixture(scope="module")
def walked(tiny_well: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the walk-through leaves in the working directory."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("walk"))
        monkeypatch.delenv(VARIABLE, raising=False)
        shutil.copytree(tiny_well, "data/mini/well")  # the quickstart has been run
        users_file(Path("burgers.nc"))
        for command in readme_commands():
            type_in(command, monkeypatch)
        yield


@pytest.mark.usefixtures("walked")
def test_the_walk_through_trains_and_scores_nine_datasets(tiny_shards: Path) -> None:
    drawn = {json.loads(line)["dataset"] for line in Path("runs/nine/log.jsonl").read_text().splitlines()}
    assert NINTH in drawn
    scores = json.loads(Path("runs/nine/report/scores.json").read_text())
    assert sorted(scores["datasets"]) == sorted([*(card.name for card in EIGHT.select(None)), NINTH])
    assert f"| {NINTH} " in Path("runs/nine/report/scores.md").read_text()
    assert Path(f"runs/nine/report/pictures/{NINTH}.png").is_file()
    checkpoint = find_checkpoint(Path("runs/nine"))
    assert NINTH in json.loads((checkpoint / "state.json").read_text())["registry"]["cards"]

    nine = load_pretrained(checkpoint)
    eight = WaveLiTFM(nine.config, dataset_specs(open_readers(tiny_shards, None, "train"), EIGHT), context=nine.context)
    added = nine.state_dict().keys() - eight.state_dict().keys()
    assert eight.state_dict().keys() <= nine.state_dict().keys()
    assert {name.split(".")[1] for name in added if name.startswith("heads.")} == {NINTH}
    new = {name.removeprefix("lifting.rows.") for name in added if name.startswith("lifting.rows.")}
    unseen = {f"{NINTH}_c"}
    assert unseen == set(load_registry().channels) - set(EIGHT.channels)
    assert nine.context == 2
    assert new == unseen | {f"{name}@1" for name in unseen}  # of the last frame and of the one before it

    # Finetuning takes a model of the eight to nine, and its predictions for the eight are the same bits.
    wider = eight.adapted_to(dataset_specs(open_readers(Path("data/nine"), None, "train"), load_registry()))
    reader = open_readers(tiny_shards, ["shear_flow"], "test")["shear_flow"]
    frames = torch.from_numpy(reader.trajectory_frames(0, 0, 2))[None]
    constants = torch.from_numpy(reader.constants(0))[None]
    with torch.no_grad():
        assert torch.equal(eight(frames, constants, "shear_flow"), wider(frames, constants, "shear_flow"))


@pytest.mark.usefixtures("walked")
def test_a_dataset_without_its_cards_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(VARIABLE)
    command = [
        "train",
        str(ROOT / "recipes/quickstart.yaml"),
        "run.name=other",
        "data.shards=data/nine",
        *SMALL,
        *QUIET,
    ]
    assert fm(command) == 2
    assert f"dataset '{NINTH}': no card of this name" in (said := capsys.readouterr().err)
    assert "data.registry" in said
    assert fm([*command, "data.registry=data/mine/cards", "train.steps=1"]) == 0
