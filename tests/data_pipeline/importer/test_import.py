"""`data-pipeline import`: files of other programs become datasets, or are refused with the way out."""

import re
import shlex
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import foreign_files as foreign
import h5py
import numpy as np
import pytest
import zarr
from foreign_files import OTHER, POINTS, TIMES, TRUTH, N, T, X, Y
from PIL import Image
from the_well.data import WellDataset
from well_rules import broken_rules

from data_pipeline.cli import main
from data_pipeline.importer.convert import write_files
from data_pipeline.importer.options import Options
from data_pipeline.importer.plan import make_plan
from data_pipeline.registry import VARIABLE, load_registry
from data_pipeline.well.dataset import whole_folder
from data_pipeline.well.hdf5 import WellFile
from data_pipeline.well.register import register

PERIODIC = "--boundary x=periodic,y=wall"


@pytest.fixture(autouse=True)
def _no_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def run(files: Path | str, options: str = "", name: str = "mine") -> int:
    return main(["import", str(files), "--name", name, "--out", "out", *shlex.split(options)])


def write(files: Path | str, options: str = "", name: str = "mine") -> str:
    """Write the files of a dataset without preview and card; return the plan's text."""
    typed: dict[str, list[str]] = {}
    for word in shlex.split(options):
        if word.startswith("--"):
            key = word[2:].replace("-", "_")
        else:
            typed.setdefault(key, []).append(word)
    many = {key: tuple(words) for key, words in typed.items() if key in ("map", "vector", "scalars")}
    one = {key: float(words[0]) if key == "dt" else words[0] for key, words in typed.items() if key not in many}
    plan = make_plan(Options((str(files),), name, Path("out"), **many, **one))  # type: ignore[arg-type]
    with whole_folder(Path("out"), name) as target:
        write_files(plan, target)
    return str(plan)


def imported(name: str = "mine") -> dict[str, np.ndarray]:
    """Fields (n, t, x, y, ...) in the order of the trajectories in the files: TRUTH's own values tell it."""
    found: dict[str, list[np.ndarray]] = {}
    for path in sorted(Path("out", name, "data").glob("*/*.hdf5")):
        assert broken_rules(path) == []
        with h5py.File(path) as file:
            for group in ("t0_fields", "t1_fields"):
                for field, data in file[group].items():
                    found.setdefault(field, []).extend(data[()])
            assert all(file["dimensions"][axis][:].tolist() == np.float32(POINTS[axis]).tolist() for axis in "xy")
            np.testing.assert_allclose(np.atleast_2d(file["dimensions/time"])[0], TIMES, rtol=1e-6)
    return {field: np.stack(values) for field, values in found.items()}


def in_order(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Trajectories sorted as in `truth`; each is one of them bit for bit, in the same place of the grid."""
    places = [next(number for number in range(N) if np.array_equal(truth[number], one)) for one in values]
    assert sorted(places) == list(range(N))
    return values[np.argsort(places)]


VECTOR = f"{PERIODIC} --vector velocity=u,v"
MAPPED = "--map 'data[...,0]=u' --map '*/data[...,1]=v' --boundary x=wall,y=wall"
PYPDE = "--boundary y=wall --extent 1"
FORMATS: dict[str, tuple[Callable[[], Path | str], str, str]] = {
    "npz": (lambda: foreign.npz(Path("a.npz")), f"--dims n,t,x,y {VECTOR}", "npz arrays whose axes have no names"),
    "netCDF": (lambda: foreign.netcdf(Path("a.nc")), VECTOR, "netCDF with named dimensions"),
    "PDEBench": (lambda: foreign.pdebench(Path("a.h5")), MAPPED, "groups <seed>/data with the axes (t, y, x, c)"),
    "PDEBench flow": (
        lambda: foreign.pdebench_flow(Path("a.h5")),
        f"{PERIODIC} --vector velocity=Vx,Vy --scalars attrs",
        "beside x-coordinate",
    ),
    "PDEArena": (
        lambda: foreign.pdearena(Path("a.h5"), {"train": slice(0, 2), "valid": slice(2, 3), "test": slice(3, 4)}),
        "",  # its generator says what u, vx and vy are, and which walls there are
        "PDEArena: groups train, valid or test",
    ),
}


@pytest.mark.parametrize("case", FORMATS)
def test_values_arrive_where_they_were(case: str) -> None:
    make, options, recognized = FORMATS[case]
    said = write(make(), options)
    assert recognized in said
    assert f"mine: {N} trajectories of {T} frames on {X} x {Y} points" in said
    fields = imported()
    if case == "PDEBench":
        assert np.array_equal(in_order(fields["u"], TRUTH), TRUTH)
        assert np.array_equal(in_order(fields["v"], OTHER), OTHER)
    elif case == "PDEArena":
        assert np.array_equal(in_order(fields["smoke"], TRUTH), TRUTH)
        assert np.array_equal(in_order(fields["velocity"][..., 1], -OTHER), -OTHER)
        assert "split       train 2, valid 1, test 1" in said
        assert "train, valid and test as the files divide them" in said
    else:
        assert np.array_equal(in_order(fields["velocity"][..., 0], TRUTH), TRUTH)
        assert np.array_equal(in_order(fields["velocity"][..., 1], OTHER), OTHER)
    with h5py.File("out/mine/data/train/mine.hdf5") as file:
        assert list(file["scalars"]) == {"PDEArena": ["buo_y"], "PDEBench flow": ["eta", "zeta"]}.get(case, [])


def test_one_command_writes_data_card_preview_and_shards() -> None:
    assert run(foreign.netcdf(Path("a.nc")), f"{VECTOR} --scalars nu=viscosity --shards shards") == 0
    card = load_registry(Path("out/cards")).card("mine")
    assert (card.grid, card.dt, card.scalars) == ((X, Y), 0.25, ("viscosity",))
    assert card.boundary == (("PERIODIC", "PERIODIC"), ("WALL", "WALL"))
    assert card.domain == ((0.0, 1.0), (-0.0833333, 0.916667))
    assert card.state_channels == ("velocity_x", "velocity_y")  # the user's word
    with h5py.File("out/mine/data/train/mine.hdf5") as file:
        assert file["t1_fields/velocity"].attrs["units"] == "m s-1"
    reader = WellDataset(path="out/mine", well_split_name="train", use_normalization=False)
    assert reader[0]["input_fields"].shape == (1, X, Y, 2)
    assert reader[0]["constant_scalars"].tolist() == pytest.approx([0.0015])
    picture = np.asarray(Image.open("out/mine/preview.png").convert("L"))
    assert picture.shape[1] > 1000
    assert picture.std() > 20
    assert (Path("shards/mine/train/manifest.json").is_file(), Path("shards/mine/test").is_dir()) == (True, True)


def test_runs_of_py_pde_with_parameters_that_differ() -> None:
    for number in range(N):
        foreign.pypde(Path(f"run_{number}.hdf5"), number, collection=True, preallocated=3)
    said = write("run_*.hdf5", PYPDE)
    assert "x           0 to 0.875 (--extent 0 to 1), periodic" in said
    assert "parameter   interface_width = 1 to 1.375" in said
    assert "float64 becomes float32" in said
    with h5py.File("out/mine/data/train/mine.hdf5") as file:
        widths = file["scalars/interface_width"][:]
        for width, c, v in zip(widths, file["t0_fields/c"], file["t1_fields/v"], strict=True):
            number = round((width - 1) * 8)
            assert np.array_equal(c, TRUTH[number])
            assert np.array_equal(v, np.stack([OTHER[number], -OTHER[number]], -1))
        assert list(file.attrs["simulation_parameters"]) == []  # each of these is one number of the file
    register(Path("out/mine"), None, Path("cards"))
    card = load_registry(Path("cards")).card("mine")
    assert card.state_channels == ("mine_c", "mine_v_x", "mine_v_y")


def test_zarr_with_names_and_without() -> None:
    foreign.dataset(("run", "time", "y", "x")).to_zarr("named.zarr", consolidated=False)
    write("named.zarr", VECTOR)
    assert np.array_equal(in_order(imported()["velocity"][..., 0], TRUTH), TRUTH)
    group = zarr.open_group("plain.zarr", mode="w")
    group.create_array("u", data=TRUTH)
    for axis, points in (("t", TIMES), *POINTS.items()):
        group.create_array(axis, data=points)
    write("plain.zarr", f"{PERIODIC} --dims n,t,x,y", "plain")
    assert np.array_equal(in_order(imported("plain")["u"], TRUTH), TRUTH)


def test_what_is_not_known_is_listed_with_a_command_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    wide = np.repeat(np.cumsum(TRUTH, 2), 4, 2)[:, :, None]  # (n, t, 1, 32, 6): smooth, and not periodic along x
    np.save("a b.npy", wide)
    assert run("a b.npy", "--map data=heat") == 2
    said = capsys.readouterr().err
    assert not Path("out").exists()
    assert "data         float32 (4, 5, 1, 32, 6)" in said
    assert "heat = data[n,t,0,x,y]" in said
    assert "--dims n,t,c,x,y: the axes of data have no names in the file (4, 5, 1, 32, 6)" in said
    assert "--boundary x=wall,y=" in said
    command = said.splitlines()[-1].strip()
    assert command.startswith("data-pipeline import 'a b.npy' --name mine --out out --map data=heat --dims n,t,c,x,y")
    assert main([*shlex.split(command)[1:], "--dry-run"]) == 0
    write("a b.npy", command.partition("--out out")[2])
    with h5py.File("out/mine/data/train/mine.hdf5") as file:
        assert file["t0_fields/heat"].shape[1:] == (T, 32, Y)
        assert np.diff(file["dimensions/time"]).tolist() == [1.0] * (T - 1)


def test_axes_of_different_lengths_are_told_by_the_coordinates_and_a_wrong_order_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.savez("one.npz", u=TRUTH[0].transpose(0, 2, 1), t=TIMES, **POINTS)
    write("one.npz", f"{PERIODIC} --split 1,0,0")
    with h5py.File("out/mine/data/train/mine.hdf5") as file:
        assert np.array_equal(file["t0_fields/u"][0], TRUTH[0])
    assert run("one.npz", f"{PERIODIC} --dims t,x,y", "wrong") == 2
    said = capsys.readouterr().err
    assert "u (5, 6, 8): read as t,x,y it has 6 points along x, and the file has 8 of them" in said
    assert "it agrees with --dims t,y,x" in said
    assert not Path("out/wrong").exists()


def test_names_units_dates_and_decreasing_points() -> None:
    times = np.datetime64("2020-01-01T00:00") + np.arange(T) * np.timedelta64(15, "m")
    np.savez("a.npz", **{"Überdruck φ": TRUTH[:, :, :, ::-1]}, t=times, x=POINTS["x"], y=POINTS["y"][::-1])
    said = write("a.npz", f"{PERIODIC} --dims n,t,x,y --units 'Überdruck φ=Pa'")
    assert "'Überdruck φ' becomes Uberdruck_phi: names have letters, digits and underscores" in said
    assert "step 900" in said
    with h5py.File("out/mine/data/train/mine.hdf5") as file:
        assert any(np.array_equal(file["t0_fields/Uberdruck_phi"][0], one) for one in TRUTH)
        assert file["dimensions/y"][0] == 0
    register(Path("out/mine"), None, Path("cards"))
    channel = load_registry(Path("cards")).channel_cards["mine_Uberdruck_phi"]
    assert (channel.description, channel.unit) == ("Überdruck φ", "Pa")


def test_crop_leave_out_parts_of_complex_numbers_and_integers(capsys: pytest.CaptureFixture[str]) -> None:
    odd = np.pad(TRUTH + 1j * OTHER, ((0, 0), (0, 0), (0, 1), (0, 0)))
    odd[2] = np.nan
    np.savez("a.npz", psi=odd, mask=np.ones((X + 1, Y), np.int8), t=TIMES)
    options = "--dims n,t,x,y --extent 1.125,1 --boundary x=wall,y=wall --map psi.real=re psi.imag=im mask=mask"
    assert run("a.npz", f"{options} --leave-out 2") == 2
    said = capsys.readouterr().err
    assert "x has 9 points, and the model's transform needs an even number" in said
    assert "int8 becomes float32" in write("a.npz", said.splitlines()[-1].partition("--out out")[2])
    with h5py.File("out/mine/data/train/mine.hdf5") as file:
        assert file["t0_fields/re"].shape == (1, T, X, Y)
        assert any(np.array_equal(file["t0_fields/im"][0], one) for one in OTHER)
        assert np.array_equal(file["t0_fields/mask"][0], np.ones((X, Y)))
        assert not file["t0_fields/mask"].attrs["time_varying"]


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


STATED = f"--dims n,t,x,y {PERIODIC}"
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


def test_memory_does_not_grow_with_the_file() -> None:
    shape = (2, 20, 256, 256)  # 10 MB; a frame has 256 KiB
    file = np.lib.format.open_memmap("big.npy", mode="w+", dtype=np.float32, shape=shape)
    file[:, :, 0, 0] = np.arange(40).reshape(2, 20)
    del file
    tracemalloc.start()
    try:
        write("big.npy", f"{STATED} --dt 1 --extent 1 --split 1,0,0")
        assert tracemalloc.get_traced_memory()[1] < 7 * 2**20
    finally:
        tracemalloc.stop()


def test_lengths_that_differ_get_a_file_each() -> None:
    for number, frames in enumerate((5, 5, 3, 5)):
        np.savez(f"r{number}.npz", u=TRUTH[number, :frames], t=TIMES[:frames], **POINTS)
    write("r*.npz", f"--dims t,x,y {PERIODIC} --split 1,0,0")
    names = sorted(path.name for path in Path("out/mine/data/train").iterdir())
    assert names == ["mine_3_frames.hdf5", "mine_5_frames.hdf5"]
    register(Path("out/mine"), None, Path("cards"))
    card = load_registry(Path("cards")).card("mine")
    assert card.train == ((1, 3), (3, 5))
    with WellFile(Path("out/mine/data/train/mine_3_frames.hdf5"), card) as file:
        assert np.array_equal(file.read(0, 0, 3)[:, 0], TRUTH[2, :3])


def test_netcdf_without_xarray_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign.netcdf(Path("a.nc"))
    monkeypatch.setitem(sys.modules, "xarray", None)
    assert run("a.nc", VECTOR) == 2
    assert "pip install xarray h5netcdf zarr" in capsys.readouterr().err


def test_netcdf_3_and_a_well_file() -> None:
    foreign.dataset().to_netcdf("old.nc", engine="scipy", format="NETCDF3_64BIT")
    write("old.nc", VECTOR)
    assert np.array_equal(in_order(imported()["velocity"][..., 0], TRUTH), TRUTH)
    assert "recognized  The Well's own layout" in write("out/mine/data/*/mine.hdf5", "", "again")
