"""Bad input of `data-pipeline import` ends in one message, and nothing is half written."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import foreign_files as foreign
import h5py
import numpy as np
import pytest
import zarr
from foreign_files import POINTS, TIMES, TRUTH, N, T, X, Y
from importing import PERIODIC, STATED, VECTOR, run, write

from data_pipeline.cli import main


def arrays(**given: np.ndarray) -> Callable[[], Path]:
    def make() -> Path:
        np.savez("bad.npz", **{"t": TIMES, **POINTS, **given})
        return Path("bad.npz")

    return make


def with_nan() -> np.ndarray:
    values = TRUTH.copy()
    values[3, 2, 1, 1] = np.nan
    return values


def objects() -> Path:
    np.save("ragged.npy", np.array([TRUTH[0], TRUTH[1, :3]], dtype=object), allow_pickle=True)
    return Path("ragged.npy")


def two_grids() -> str:
    np.savez("g1.npz", u=TRUTH, t=TIMES, **POINTS)
    np.savez("g2.npz", u=TRUTH[:, :, :6], t=TIMES, x=POINTS["x"][:6], y=POINTS["y"])
    return "g?.npz"


def other_points() -> str:
    np.savez("p1.npz", u=TRUTH, t=TIMES, **POINTS)
    np.savez("p2.npz", u=TRUTH, t=TIMES, x=2 * POINTS["x"], y=POINTS["y"])
    return "p?.npz"


def filled() -> Path:
    made = foreign.dataset()
    made["u"] = made["u"].where(made["u"] > made["u"].min())
    made.to_netcdf("filled.nc", engine="h5netcdf", encoding={"u": {"_FillValue": -999.0}})
    return Path("filled.nc")


def plain_fill() -> Path:
    with h5py.File("fill.h5", "w") as file:
        file["u"] = np.where(TRUTH < 0.01, np.float32(-999), TRUTH)
        file["u"].attrs["_FillValue"] = np.float32(-999)
        for axis, points in (("t", TIMES), *POINTS.items()):
            file[axis] = points
    return Path("fill.h5")


def truncated() -> Path:
    np.save("cut.npy", TRUTH)
    Path("cut.npy").write_bytes(Path("cut.npy").read_bytes()[:-40])
    return Path("cut.npy")


def elsewhere() -> Path:
    np.save("raw.npy", TRUTH)
    with h5py.File("link.h5", "w") as file:
        file.create_dataset("u", TRUTH.shape, np.float32, external=[("raw.npy", 128, TRUTH.nbytes)])
    return Path("link.h5")


def pickled_zarr() -> Path:
    array = zarr.create_array("evil.zarr", shape=(2, 2), dtype="f4", zarr_format=2)
    array[:] = 1
    meta = Path("evil.zarr/.zarray")
    text = meta.read_text().replace('"filters": null', '"filters": [{"id": "pickle"}]')
    assert "pickle" in text
    meta.write_text(text)
    return Path("evil.zarr")


def linked_zarr() -> Path:
    zarr.create_array("there.zarr", data=TRUTH)
    zarr.open_group("here.zarr", mode="w")
    Path("here.zarr/u").symlink_to(Path("there.zarr").absolute())
    return Path("here.zarr")


def strange_pypde() -> Path:
    with h5py.File(foreign.pypde(Path("strange.h5"), 0), "r+") as file:
        file.attrs["field_attributes"] = file.attrs["field_attributes"].replace("[true, false]", "[]")
        assert '\\"periodic\\": []' in file.attrs["field_attributes"]
    return Path("strange.h5")


def written(kind: str) -> Callable[[], Path]:
    def make() -> Path:
        Path(f"text.{kind}").write_text("t, x, y\n1, 2, 3\n")
        return Path(f"text.{kind}")

    return make


BAD: dict[str, tuple[Callable[[], Path | str], str, str]] = {
    "NaN": (arrays(u=with_nan()), STATED, r"bad.npz: trajectory 3, frame 2, u: expected finite numbers, got 1 NaN"),
    "float32": (arrays(u=TRUTH.astype(np.float64) * 1e39), STATED, r"u: .*beyond float32; scale the field"),
    "complex": (arrays(u=TRUTH + 0j), STATED, r"u: it holds complex numbers.*--map 'u.real=NAME_re'"),
    "ragged": (objects, STATED, r"Python objects.*save each trajectory as a file or an array of its own"),
    "uneven time": (
        arrays(u=TRUTH, t=np.array([0, 1, 2, 4, 5])),
        STATED,
        r"expected evenly spaced times, got steps from 1 to 2; .*state one time step",
    ),
    "time that stands": (arrays(u=TRUTH, t=np.zeros(T)), STATED, r"expected times that increase"),
    "one frame": (arrays(u=TRUTH[:, :1], t=TIMES[:1]), STATED, r"expected at least 2 frames, got 1"),
    "one trajectory": (
        arrays(u=TRUTH[:1]),
        STATED,
        r"1 trajectory cannot be divided into train, valid, test .* Split 1,0,0 .*train with `validation.every=0`",
    ),
    "1D": (arrays(u=TRUTH[..., 0]), f"--dims n,t,x {PERIODIC}", r"read 2D fields, not 1D"),
    "3D": (
        arrays(u=np.ones((N, T, X, Y, 4))),
        f"--dims n,t,x,y,z {PERIODIC}",
        r"u \(4, 5, 8, 6, 4\) is 3D.*Take a plane.*--map 'u\[...,0\]=NAME'",
    ),
    "axes": (arrays(u=TRUTH), f"--dims n,x,t,y {PERIODIC}", r"read as n,x,t,y .* it agrees with --dims n,t,x,y"),
    "number of axes": (arrays(u=TRUTH), f"--dims t,x,y {PERIODIC}", r"it names 3 axes, and u has 4: \(4, 5, 8, 6\)"),
    "two grids": (two_grids, STATED, r"g2.npz: expected 8 points along x as in g1.npz, got 6; a dataset has one grid"),
    "other points": (other_points, STATED, r"p2.npz: its points along x differ from those of p1.npz"),
    "fill values": (filled, VECTOR, r"got 1 NaN, Inf or missing values"),
    "HDF5 fill values": (plain_fill, STATED, r"NaN, Inf or missing values; fill them, or leave the trajectory out"),
    "truncated": (truncated, STATED, r"cut.npy: cannot be read: it is damaged, or another process is still writing it"),
    "external storage": (elsewhere, STATED + " --dt 1 --extent 1", r"its values lie in another file"),
    "pickled zarr": (pickled_zarr, STATED, r"expected codecs of numbers, got 'pickle'"),
    "linked zarr": (linked_zarr, STATED, r"it is a link, which is not followed"),
    "text": (written("csv"), STATED, r"text.csv: expected npy, npz, HDF5 .*, got another"),
    "nothing": (lambda: "nothing*.npz", STATED, r"expected files of this pattern, found none"),
    "no such file": (lambda: "nothing.npz", STATED, r"nothing.npz: expected a file, found none"),
    "odd": (arrays(u=TRUTH[:, :, :, :5], y=POINTS["y"][:5]), STATED, r"--crop even: y has 5 points"),
    "no name": (arrays(**{"算": TRUTH}), STATED, r"expected a name with letters; give one with --map KEY=NAME"),
    "map": (arrays(u=TRUTH), f"{STATED} --map w=w", r"--map w: expected an array of the file \(t, x, y, u\), got w"),
    "level": (
        lambda: foreign.netcdf(Path("level.nc"), dims=("level", "time", "y", "x")),
        PERIODIC,
        r"--dims n,t,y,x: what is level of u\?",
    ),
    "empty": (arrays(u=TRUTH[:0]), STATED, r"u \(0, 5, 8, 6\): expected at least one trajectory"),
    "components": (
        lambda: foreign.pdebench(Path("a.h5")),
        f"{PERIODIC} --map data=u",
        r"choose one of its 2 components, as in --map 'data\[:,:,:,0\]=NAME'",
    ),
    "py-pde": (strange_pypde, STATED, r"strange.h5: cannot be read: it is damaged"),
    "axis z": (arrays(u=TRUTH), "--dims n,t,x,y --boundary z=wall", r"--boundary 'z=wall': expected x=periodic,y=wall"),
    "one-sided": (arrays(u=TRUTH), "--dims n,t,x,y --boundary x=periodic:wall,y=wall", r"boundary of x: expected"),
    "dimensions without coordinates": (
        lambda: foreign.netcdf(Path("bare.nc"), coordinates=False),
        PERIODIC,
        r"--extent 8,6: the file has no grid points.*\n.*--dt 1: the file has no times",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_message_and_nothing_half_written(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, options, message = BAD[case]
    files = make()
    assert run(files, options) == 2
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if not line.startswith("import mine:")]
    assert errors[0].startswith("error: ")
    assert "Traceback" not in said
    assert re.search(message, "\n".join(errors)), said
    assert not Path("out").exists() or not [path for path in Path("out").rglob("*") if path.is_file()]
    assert not list(Path().glob("out/*mine*"))


def test_a_file_that_another_process_writes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    program = "import h5py, sys; f = h5py.File('busy.h5', 'w'); f['u'] = 1.0; f.flush(); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        assert run("busy.h5", STATED) == 2
        writer.communicate(b"\n")
    assert "busy.h5: another process has it open for writing" in capsys.readouterr().err


def test_taken_names_and_folders_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    foreign.npz(Path("a.npz"))
    assert run("a.npz", STATED, "shear_flow") == 2
    assert "there is a card 'shear_flow' already" in capsys.readouterr().err
    write("a.npz", STATED)
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    assert run("a.npz", STATED) == 2
    assert "out/mine: it is already there, and is not overwritten" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before
    Path("plain").write_text("")
    assert main(["import", "a.npz", "--name", "m", "--out", "plain/x", *shlex.split(STATED)]) == 2
    assert "plain/x: cannot be written" in capsys.readouterr().err
    assert main(["import", "a.npz", "--name", "m", "--out", "/proc/none", *shlex.split(STATED)]) == 2
    assert "/proc/none: cannot be written" in capsys.readouterr().err


def test_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    foreign.npz(Path("a.npz"))
    assert run("a.npz", f"{STATED} --dry-run") == 0
    assert not Path("out").exists()
    assert "if u and v are the components of a vector, add --vector velocity=u,v" in capsys.readouterr().out
