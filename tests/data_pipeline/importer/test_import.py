"""`data-pipeline import`: files of other programs become datasets, or are refused with the way out."""

import shlex
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
from importing import PERIODIC, STATED, VECTOR, imported, in_order, run, write
from PIL import Image
from the_well.data import WellDataset

from data_pipeline.cli import main
from data_pipeline.registry import load_registry
from data_pipeline.well.hdf5 import WellFile
from data_pipeline.well.register import register

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


def test_one_command_writes_data_card_preview_and_shards(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(foreign.netcdf(Path("a.nc")), f"{VECTOR} --scalars nu=viscosity --shards shards") == 0
    training = "fm train recipes/quickstart.yaml data.shards=shards 'data.datasets=[mine]'"
    assert capsys.readouterr().out.endswith(f"Next:\n  export WAVELIT_REGISTRY=out/cards\n  {training}\n")
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
