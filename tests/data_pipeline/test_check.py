"""`data-pipeline check`: what it finds in files that no model can use or others cannot read, and its verdict."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files as foreign
import h5py
import numpy as np
import pytest
from handmade_well import spread
from the_well.data import WellDataset

from data_pipeline import write_well
from data_pipeline.cli import main
from data_pipeline.registry import VARIABLE, load_registry
from data_pipeline.well.findings import KINDS

COUNT, FRAMES, X, Y = 5, 3, 16, 18


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def write(name: str = "mine", values: np.ndarray | None = None, times: Any = None, **more: Any) -> Path:
    values = spread((COUNT, FRAMES, X, Y)) if values is None else values
    points = (np.arange(size) / size for size in values.shape[2:4])
    times = np.arange(FRAMES) * 0.5 if times is None else times
    return write_well("out", name, {"heat": values}, times, *points, boundary={"x": "periodic", "y": "wall"}, **more)


def change(folder: Path, edit: Callable[[h5py.File], object], split: str = "train") -> Path:
    (path,) = (folder / "data" / split).glob("*.hdf5")
    with h5py.File(path, "r+") as file:
        edit(file)
    return folder


def checked(folder: Path, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["check", str(folder), "--jobs", "1"]) == code
    return capsys.readouterr().out


def opens(folder: Path) -> bool:
    """Whether the_well's own class reads a sample of each split."""
    try:
        for split in ("train", "valid", "test"):
            WellDataset(path=str(folder), well_split_name=split, use_normalization=False)[0]
    except (KeyError, AssertionError):
        return False
    return True


def test_data_without_faults_can_be_used_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(write(), 0, capsys) == "mine: no findings in 5 trajectories, 15 frames. It can be used as it is.\n"
    assert opens(Path("out/mine"))
    write("yours")
    assert checked(Path("out"), 0, capsys).count("It can be used as it is.") == 2


def twins(fields: np.ndarray) -> np.ndarray:
    fields[1:] = fields[:1]
    return fields


FAULTS: dict[str, tuple[Callable[[], Path], int, str]] = {
    "no valid, no test": (
        lambda: write(split=(1, 0, 0)),
        0,
        r"valid .*warning .*splits .*train with validation.every=0",
    ),
    "no train": (lambda: write(split={"test": [0, 1]}), 1, r"train .*error .*splits .*nothing to train on"),
    "odd": (lambda: write(values=spread((COUNT, FRAMES, X, 17))), 1, r"error .*model_grid .*16 x 17 .*--crop even"),
    "small": (lambda: write(values=spread((COUNT, FRAMES, 8, 16))), 1, r"error .*model_grid .*8 x 16 points"),
    "copies": (
        lambda: write(values=twins(spread((COUNT, FRAMES, X, Y)))),
        1,
        r"error .*copy .*the same frames as",
    ),
    "constant": (lambda: write(values=np.ones((COUNT, FRAMES, X, Y))), 1, r"warning .*constant_channel .*heat: 1 at"),
    "two time steps": (
        lambda: write(times=np.arange(1, COUNT + 1)[:, None] * np.arange(FRAMES)),
        0,
        r"warning .*times .*the time step differs, from 1 to 5",
    ),
    "uneven times": (
        lambda: change(write(), lambda file: file["dimensions/time"].__setitem__(2, 7.0)),
        0,
        r"train .*warning .*times .*dt is null",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_in_the_table_with_their_severity(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, code, line = FAULTS[fault]
    said = checked(make(), code, capsys)
    assert re.search(line, said), said
    assert ("It cannot be used as it is: " if code else "It can be used; read the warnings first.") in said
    main(["register", "out/mine", "--registry", "cards"])
    drafted = capsys.readouterr().out
    (kind,) = (word for word in KINDS if re.search(rf"\b{word} ", line))
    assert f"{kind}: " in drafted
    assert ("It cannot be used" in drafted) == bool(code)


UNREADABLE: dict[str, Callable[[h5py.File], object]] = {
    "dataset_name": lambda file: file.attrs.pop("dataset_name"),
    "n_spatial_dims": lambda file: file.attrs.pop("n_spatial_dims"),
    "sample_varying": lambda file: file["dimensions/x"].attrs.pop("sample_varying"),
    "scalars": lambda file: file["scalars/nu"].attrs.pop("time_varying"),
}


@pytest.mark.parametrize("missing", UNREADABLE)
def test_files_that_well_dataset_cannot_open(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(scalars={"nu": 0.1})
    assert opens(folder)
    change(folder, UNREADABLE[missing])
    assert not opens(folder)
    code = 1 if missing == "scalars" else 0  # our reader needs this flag too
    said = checked(folder, code, capsys)
    line = "error .*unreadable" if code else rf"train .* reader .*mine.hdf5: .* no .*{missing}"
    assert re.search(line, said), said


def test_files_that_do_not_belong_together(capsys: pytest.CaptureFixture[str]) -> None:
    folder = write()
    write("yours", spread((COUNT, FRAMES, X, Y), seed=1))
    Path("out/yours/data/train/yours.hdf5").rename("out/mine/data/train/yours.hdf5")
    assert not opens(folder)
    said = checked(folder, 0, capsys)
    assert "its dataset_name is yours, and mine.hdf5 has mine" in said


def test_shard_prints_what_the_headers_show(capsys: pytest.CaptureFixture[str]) -> None:
    write(split=(1, 0, 0), values=spread((COUNT, FRAMES, X, 17)))
    assert main(["register", "out/mine", "--registry", "cards"]) == 0
    capsys.readouterr()
    shard = ["shard", "--well", "out", "--out", "shards", "--registry", "cards", "--jobs", "1"]
    assert main(shard) == 0
    said = capsys.readouterr().err
    assert re.search(r"mine +train +error +model_grid", said), said
    assert re.search(r"mine +valid +warning +splits", said)


def netcdf(folder: Path) -> Path:
    folder.mkdir()
    foreign.netcdf(folder / "run 1.nc")
    return folder


def odd(folder: Path) -> Path:
    change(write("odd", spread((COUNT, FRAMES, X, 17))), lambda file: file.attrs.update({"grid_type": "polar"}))
    return Path("out/odd")


def double(folder: Path) -> Path:
    def convert(file: h5py.File) -> None:
        values, attributes = file["t0_fields/heat"][()], dict(file["t0_fields/heat"].attrs)
        del file["t0_fields/heat"]
        file["t0_fields/heat"] = values.astype(np.float64)
        file["t0_fields/heat"].attrs.update(attributes)

    for split in ("train", "valid", "test"):
        change(folder if (folder := Path("out/mine")).exists() else write(), convert, split)
    return folder


def page(folder: Path) -> Path:
    Path("page.hdf5").write_text("<html>404</html>")
    return Path("page.hdf5")


REFUSED: dict[str, tuple[Callable[[Path], Path], str, bool]] = {
    "npz of another name": (lambda folder: foreign.npz(Path("my data.npz")), "'my data.npz' --name my_data", True),
    "PDEBench": (lambda folder: foreign.pdebench(Path("a.hdf5")), "a.hdf5 --name a --out data/imported --map", True),
    "PDEBench without a suffix": (lambda folder: foreign.pdebench(Path("a")), "a --name a --out data/imported", True),
    "a folder of netCDF": (netcdf, "'runs/*.nc' --name runs", True),
    "float64": (double, "'out/mine/data/*/*.hdf5' --name mine --out data/imported", True),
    "web page": (page, "page.hdf5 --name page --out data/imported", False),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_end_with_the_command_that_imports(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, command, works = REFUSED[case]
    source = make(Path("runs"))
    for arguments in (["register", str(source), "--registry", "cards"], ["check", str(source)]):
        if case == "float64" and arguments[0] == "check":
            continue  # a finding there
        assert main(arguments) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"  data-pipeline import {command}")
    assert main([*shlex.split(said)[1:], "--dry-run"]) == (0 if works else 2)


def test_files_in_the_wells_layout_are_imported_to_crop_and_convert(capsys: pytest.CaptureFixture[str]) -> None:
    values = spread((COUNT, FRAMES, X, 17, 2))
    constants = {"depth": spread((X, 17), seed=2)}
    write(
        "odd",
        values,
        constants=constants,
        scalars={"nu": np.arange(COUNT) / 8},
        split={"train": [1, 2, 4], "test": [0]},
    )
    source = ["import", "out/odd/data/*/*.hdf5", "--name", "even", "--out", "out", "--crop", "even"]
    assert main(source) == 0
    assert "recognized  The Well's own layout" in capsys.readouterr().out
    with h5py.File("out/even/data/train/even.hdf5") as file:
        assert np.array_equal(file["t1_fields/heat"][()], values[[1, 2, 4], :, :, :16])
        assert np.array_equal(file["t0_fields/depth"][0], constants["depth"][:, :16])
        assert file["scalars/nu"][()].tolist() == [1 / 8, 2 / 8, 4 / 8]
    assert load_registry("out/cards").card("even").boundary == (("PERIODIC", "PERIODIC"), ("WALL", "WALL"))
    assert "model_grid" not in checked(Path("out/even"), 0, capsys)


def test_import_shares_a_generic_name_at_the_users_word() -> None:
    times, points = np.arange(FRAMES) * 0.5, {"x": np.arange(X) / X, "y": np.arange(Y) / Y}
    np.savez("a.npz", u=spread((COUNT, FRAMES, X, Y)), A=spread((COUNT, FRAMES, X, Y), seed=1), t=times, **points)
    stated = ["--out", "out", "--dims", "n,t,x,y", "--boundary", "x=periodic,y=wall", "--registry", "cards"]
    assert main(["import", "a.npz", "--name", "mine", *stated, "--share", "A"]) == 0
    assert load_registry("cards").card("mine").state_channels == ("mine_u", "A")
    assert main(["register", "out/mine", "--name", "own", "--registry", "other"]) == 0
    assert load_registry("other").card("own").state_channels == ("own_u", "own_A")
