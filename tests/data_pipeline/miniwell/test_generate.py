"""The mini-Well on disk: the Well's own reader and normalisers take it; simulate() is repeatable and hard to misuse."""

import json
import multiprocessing
import resource
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from the_well.data import WellDataset
from the_well.data.normalization import RMSNormalization, ZScoreNormalization

from data_pipeline.errors import UserError
from data_pipeline.miniwell.contact_sheet import contact_sheet
from data_pipeline.miniwell.generate import SYSTEMS, load_system, simulate
from data_pipeline.miniwell.system import SPLITS

DATASETS = sorted(SYSTEMS)
CHEAP = "gray_scott_reaction_diffusion"
WALL, OPEN, PERIODIC = 0, 1, 2

# What WellDataset reads off the real layout: channels in order, constants, scalars, boundary [axis][lower, upper].
PERIODIC_BOX = [[PERIODIC, PERIODIC], [PERIODIC, PERIODIC]]
CHANNEL_BOX = [[PERIODIC, PERIODIC], [WALL, WALL]]
TENSOR = ("xx", "xy", "yx", "yy")
EXPECTED: dict[str, tuple[list[str], list[str], list[str], list[list[int]]]] = {
    "acoustic_scattering_maze": (
        ["pressure", "velocity_x", "velocity_y"],
        ["density", "speed_of_sound"],
        [],
        [[WALL, OPEN], [WALL, OPEN]],
    ),
    "active_matter": (
        ["concentration", "velocity_x", "velocity_y", *(f"D_{ij}" for ij in TENSOR), *(f"E_{ij}" for ij in TENSOR)],
        [],
        ["L", "zeta", "alpha"],
        PERIODIC_BOX,
    ),
    "gray_scott_reaction_diffusion": (["A", "B"], [], ["F", "k"], PERIODIC_BOX),
    "helmholtz_staircase": (["pressure_re", "pressure_im"], ["mask"], ["omega"], [[OPEN, OPEN], [OPEN, OPEN]]),
    "rayleigh_benard": (
        ["buoyancy", "pressure", "velocity_x", "velocity_y"],
        [],
        ["Rayleigh", "Prandtl"],
        CHANNEL_BOX,
    ),
    "shear_flow": (
        ["tracer", "pressure", "velocity_x", "velocity_y"],
        [],
        ["Rayleigh", "Schmidt"],
        PERIODIC_BOX,
    ),
    "turbulent_radiative_layer_2D": (
        ["density", "pressure", "velocity_x", "velocity_y"],
        [],
        ["tcool"],
        [[PERIODIC, PERIODIC], [OPEN, OPEN]],
    ),
    "viscoelastic_instability": (
        ["pressure", "c_zz", "velocity_x", "velocity_y", *(f"C_{ij}" for ij in TENSOR)],
        [],
        ["Re", "Wi", "beta", "epsilon", "Lmax"],
        CHANNEL_BOX,
    ),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """the_well warns that helmholtz_staircase's wall is not aligned with an axis; the real data has it so, too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Only axis-aligned boundary", category=RuntimeWarning)
        yield


def open_split(tiny_well: Path, dataset: str, split: str, normaliser: type | None = None) -> WellDataset:
    return WellDataset(
        well_base_path=str(tiny_well),
        well_dataset_name=dataset,
        well_split_name=split,
        use_normalization=normaliser is not None,
        normalization_type=normaliser,
    )


def read_arrays(tiny_well: Path, dataset: str, split: str) -> dict[str, dict[str, np.ndarray]]:
    """File -> field -> array, straight from HDF5."""
    found = {}
    for path in sorted((tiny_well / dataset / "data" / split).glob("*.hdf5")):
        with h5py.File(path) as file:
            found[path.name] = {
                name: file[f"t{order}_fields"][name][:] for order in range(3) for name in file[f"t{order}_fields"]
            }
    return found


def test_all_eight_datasets_are_expected() -> None:
    assert set(EXPECTED) == set(SYSTEMS)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_the_wells_reader_takes_every_split(tiny_well: Path, dataset: str, split: str) -> None:
    channels, constants, scalars, boundary = EXPECTED[dataset]
    preset = load_system(dataset).presets["tiny"]
    reader = open_split(tiny_well, dataset, split)
    counts = [one.num_trajectories[split] for one in preset.parameter_sets]
    assert sum(counts) > 0
    assert reader.metadata.dataset_name == dataset
    assert sum(reader.metadata.n_trajectories_per_file) == sum(counts)
    assert len(reader) == sum(counts) * (preset.num_frames - 1)
    assert [name for order in range(3) for name in reader.metadata.field_names[order]] == channels
    assert sorted(name for order in range(3) for name in reader.metadata.constant_field_names[order]) == constants
    assert reader.metadata.constant_scalar_names == scalars
    for sample in (reader[0], reader[len(reader) - 1]):
        assert sample["input_fields"].shape == (1, *preset.grid, len(channels))
        assert sample["input_fields"].dtype == torch.float32
        assert torch.isfinite(sample["input_fields"]).all()
        assert not torch.equal(sample["input_fields"], sample["output_fields"])
        assert sample["boundary_conditions"].tolist() == boundary
        assert sample["space_grid"].shape == (*preset.grid, 2)
        if constants:
            assert sample["constant_fields"].shape == (*preset.grid, len(constants))
        if scalars:
            assert sample["constant_scalars"].shape == (len(scalars),)
    assert float(reader[0]["output_time_grid"] - reader[0]["input_time_grid"]) == pytest.approx(
        _first_interval(tiny_well, dataset, split), rel=1e-5
    )


def _first_interval(tiny_well: Path, dataset: str, split: str) -> float:
    path = sorted((tiny_well / dataset / "data" / split).glob("*.hdf5"))[0]
    with h5py.File(path) as file:
        time = file["dimensions/time"][:].astype(float)
    assert np.allclose(np.diff(time), time[1] - time[0], rtol=1e-4)
    return float(time[1] - time[0])


@pytest.mark.parametrize("dataset", DATASETS)
def test_files_follow_the_wells_layout(tiny_well: Path, dataset: str) -> None:
    system = load_system(dataset)
    for path in (tiny_well / dataset / "data").glob("*/*.hdf5"):
        with h5py.File(path) as file:
            assert {"dataset_name", "grid_type", "n_spatial_dims", "n_trajectories", "simulation_parameters"} <= set(
                file.attrs
            )
            assert list(file["dimensions"].attrs["spatial_dims"]) == ["x", "y"]
            for axis in "xy":
                assert (np.diff(file["dimensions"][axis][:]) > 0).all()
            assert list(file.attrs["simulation_parameters"]) == EXPECTED[dataset][2]
            for name in EXPECTED[dataset][2]:
                assert file["scalars"][name][()] == np.float32(file.attrs[name])
            for order in range(3):
                group = file[f"t{order}_fields"]
                assert sorted(group.attrs["field_names"]) == sorted(group)
                assert [name for name in group.attrs["field_names"] if name in system.tensor_orders] == [
                    name for name, own in system.tensor_orders.items() if own == order
                ]
                for name, values in group.items():
                    assert values.dtype == np.float32
                    assert values.attrs["time_varying"] == (name in system.tensor_orders)
                    if order == 2:
                        assert values.attrs["symmetric"]
                        assert not values.attrs["antisymmetric"]
            for boundary in file["boundary_conditions"].values():
                sizes = [len(file["dimensions"][axis]) for axis in boundary.attrs["associated_dims"]]
                assert list(boundary["mask"].shape) == sizes
                assert boundary["mask"].dtype == bool
                assert boundary["mask"][:].any()


@pytest.mark.parametrize("dataset", DATASETS)
def test_normalisers_of_the_well_standardise_the_train_split(tiny_well: Path, dataset: str) -> None:
    scored, scaled = (open_split(tiny_well, dataset, "train", kind) for kind in (ZScoreNormalization, RMSNormalization))
    raw = open_split(tiny_well, dataset, "train")
    frames = torch.stack([raw[i]["input_fields"][0] for i in range(len(raw))])
    first = scored[0]["input_fields"]
    stats = yaml.safe_load((tiny_well / dataset / "stats.yaml").read_text())
    mean, std, rms = (
        torch.tensor(np.concatenate([np.ravel(stats[key][name]) for name in load_system(dataset).tensor_orders]))
        for key in ("mean", "std", "rms")
    )
    assert (std > 1e-4).all(), "the_well clips at 1e-4"
    assert torch.allclose(first.double(), (frames[0].double() - mean) / std, rtol=1e-3, atol=1e-3)
    assert torch.allclose(scaled[0]["input_fields"].double(), frames[0].double() / rms, rtol=1e-3, atol=1e-3)
    delta = scored.norm.delta_normalize_flattened(raw[0]["output_fields"] - raw[0]["input_fields"], "variable")
    assert torch.isfinite(delta).all()
    normalised = (frames.double() - mean) / std  # all frames but the last: near, not at, 0 and 1
    assert normalised.mean(dim=(0, 1, 2)).abs().max() < 0.3
    assert (normalised.std(dim=(0, 1, 2)) - 1).abs().max() < 0.3


@pytest.mark.parametrize("dataset", DATASETS)
def test_stats_are_the_moments_of_the_train_split(tiny_well: Path, dataset: str) -> None:
    """Against numpy over all values at once."""
    orders = load_system(dataset).tensor_orders
    stats = yaml.safe_load((tiny_well / dataset / "stats.yaml").read_text())
    assert list(stats) == ["mean", "mean_delta", "rms", "rms_delta", "std", "std_delta"]
    files = list(read_arrays(tiny_well, dataset, "train").values())
    for name in files[0]:
        order = orders.get(name, 0)
        arrays = [file[name].astype(np.float64) for file in files]
        samples = {"": arrays, "_delta": [np.diff(values, axis=1) for values in arrays] if name in orders else []}
        for suffix, parts in samples.items():
            if not parts:
                assert name not in stats[f"mean{suffix}"]
                continue
            values = np.concatenate([part.reshape(-1, *part.shape[part.ndim - order :]) for part in parts])
            scale = np.sqrt((values**2).mean(axis=0)).max()
            for statistic, expected in (
                ("mean", values.mean(axis=0)),
                ("std", values.std(axis=0)),
                ("rms", np.sqrt((values**2).mean(axis=0))),
            ):
                assert np.allclose(stats[f"{statistic}{suffix}"][name], expected, rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize("dataset", DATASETS)
def test_frames_move_but_not_like_noise(tiny_well: Path, dataset: str) -> None:
    """Every state field varies, and the last frame as a forecast is neither perfect nor useless (VRMSE)."""
    for split in SPLITS:
        for fields in read_arrays(tiny_well, dataset, split).values():
            for name in load_system(dataset).tensor_orders:
                values = fields[name].astype(np.float64)
                error = (np.diff(values, axis=1) ** 2).mean(axis=(2, 3))
                ratio = np.sqrt(error / (values[:, 1:].var(axis=(2, 3)) + 1e-7))
                assert (values.std(axis=(2, 3)).max(axis=1) > 1e-4).all(), name
                assert (np.median(ratio, axis=1) > 5e-3).all(), name
                assert (np.median(ratio, axis=1) < 1.5).all(), name


@pytest.mark.parametrize("dataset", DATASETS)
def test_no_trajectory_occurs_twice(tiny_well: Path, dataset: str) -> None:
    leading = next(iter(load_system(dataset).tensor_orders))
    seen = [
        trajectory[-1].tobytes()
        for split in SPLITS
        for fields in read_arrays(tiny_well, dataset, split).values()
        for trajectory in fields[leading]
    ]
    assert len(set(seen)) == len(seen)


def test_arrays_do_not_depend_on_the_number_of_jobs(tiny_well: Path, tmp_path: Path) -> None:
    """The shared tiny_well was made by one process."""
    simulate(tmp_path, "tiny", jobs=2)
    for dataset in DATASETS:
        assert (tmp_path / dataset / "stats.yaml").read_bytes() == (tiny_well / dataset / "stats.yaml").read_bytes()
        for split in SPLITS:
            here, there = read_arrays(tmp_path, dataset, split), read_arrays(tiny_well, dataset, split)
            assert here.keys() == there.keys()
            for file, fields in here.items():
                for name, values in fields.items():
                    assert np.array_equal(values, there[file][name]), (dataset, split, file, name)


def test_another_seed_gives_other_trajectories(tiny_well: Path, tmp_path: Path) -> None:
    simulate(tmp_path, "tiny", [CHEAP], seed=4, jobs=1)
    here, there = read_arrays(tmp_path, CHEAP, "test"), read_arrays(tiny_well, CHEAP, "test")
    for file, fields in here.items():
        assert not np.allclose(fields["A"], there[file]["A"], atol=1e-3)


def test_a_complete_dataset_is_kept_and_an_incomplete_one_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(tmp_path, "tiny", [CHEAP], jobs=1)
    files = sorted((tmp_path / CHEAP).rglob("*.*"))
    before = {path: path.stat().st_mtime_ns for path in files}
    assert "MB in" in capsys.readouterr().out
    simulate(tmp_path, "tiny", [CHEAP], jobs=1)
    assert "already simulated" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in files} == before
    (tmp_path / CHEAP / "stats.yaml").unlink()
    damaged = next((tmp_path / CHEAP / "data/train").glob("*.hdf5"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    simulate(tmp_path, "tiny", [CHEAP], jobs=1)
    assert damaged.read_bytes() == whole
    assert sorted((tmp_path / CHEAP).rglob("*.*")) == files


@pytest.mark.parametrize(
    ("preset", "seed", "message"),
    [
        ("tiny", 1, r"expected version 1, preset tiny, seed 1, got version 1, preset tiny, seed 0"),
        ("mini", 0, r"preset mini, .* got .*tiny"),
    ],
)
def test_data_of_another_seed_or_preset_is_not_reused(tmp_path: Path, preset: str, seed: int, message: str) -> None:
    simulate(tmp_path, "tiny", [CHEAP], seed=0, jobs=1)
    with pytest.raises(UserError, match=message) as caught:
        simulate(tmp_path, preset, [CHEAP], seed=seed, jobs=1)
    assert f"Choose another --out, or remove {tmp_path / CHEAP}" in str(caught.value)


def test_data_of_other_settings_or_origin_is_not_reused(tmp_path: Path) -> None:
    marker = tmp_path / CHEAP / "simulation.json"
    simulate(tmp_path, "tiny", [CHEAP], jobs=1)
    found = json.loads(marker.read_text())
    found["settings"]["dt"] = 41.0
    marker.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"holds another simulation: .* with other settings"):
        simulate(tmp_path, "tiny", [CHEAP], jobs=1)
    marker.write_text("{")
    with pytest.raises(UserError, match="expected JSON in"):
        simulate(tmp_path, "tiny", [CHEAP], jobs=1)
    marker.unlink()
    with pytest.raises(UserError, match=r"got data without a simulation\.json"):
        simulate(tmp_path, "tiny", [CHEAP], jobs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "tiny", "datasets": ["shear_flo"]}, "got 'shear_flo'. Did you mean shear_flow?"),
        ({"preset": "minni"}, "expected a preset among mini, tiny; got 'minni'. Did you mean mini?"),
        ({"preset": "tiny", "seed": -1}, "expected a seed of 0 or more, got -1"),
        ({"preset": "tiny", "jobs": 0}, "expected 1 or more jobs, got 0"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        simulate(tmp_path, **arguments)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_reported_and_leaves_no_half_file(tmp_path: Path) -> None:
    """The operating system's limit on file size stands in for the disk: write() fails in the middle of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"train/.*hdf5: cannot be written, .* full \(File too large\).* free some space"
        ):
            simulate(tmp_path, "tiny", [CHEAP], jobs=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["simulation.json"]
    simulate(tmp_path, "tiny", [CHEAP], jobs=1)
    assert (tmp_path / CHEAP / "stats.yaml").exists()


def test_a_killed_worker_is_reported(tmp_path: Path) -> None:
    def kill_the_first_worker() -> None:
        while len(multiprocessing.active_children()) < 2:
            time.sleep(0.01)
        time.sleep(0.1)  # past the executor's own start, importing what the task needs
        multiprocessing.active_children()[0].kill()

    killer = threading.Thread(target=kill_the_first_worker)
    killer.start()
    with pytest.raises(UserError, match=r"a worker process was killed, .* run the same command with fewer --jobs"):
        simulate(tmp_path, "tiny", [CHEAP], jobs=2)
    killer.join()
    assert not (tmp_path / CHEAP / "stats.yaml").exists()


def test_a_file_in_the_place_of_the_folder_is_reported(tmp_path: Path) -> None:
    blocked = tmp_path / "out"
    blocked.write_text("not a folder")
    with pytest.raises(UserError, match=r"simulation\.json: cannot be written \(.*\); choose a folder"):
        simulate(blocked, "tiny", [CHEAP], jobs=1)


def test_contact_sheet_draws_what_is_there(tiny_well: Path, tmp_path: Path) -> None:
    def size(picture: Path) -> tuple[int, int]:
        data = picture.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")

    contact_sheet(tiny_well, tmp_path / "all.png")
    some = tmp_path / "some"
    some.mkdir()
    (some / CHEAP).symlink_to(tiny_well / CHEAP)
    contact_sheet(some, tmp_path / "one.png")
    everything, one = size(tmp_path / "all.png"), size(tmp_path / "one.png")
    assert everything[0] == one[0] > 1000
    assert everything[1] > len(DATASETS) / 2 * one[1]


def test_contact_sheet_needs_data_and_a_known_format(tiny_well: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"expected at least one of .* found none\. Make them with: data-pipeline simulate"
    ):
        contact_sheet(tmp_path, tmp_path / "sheet.png")
    with pytest.raises(UserError, match=r"expected a picture file with one of the suffixes .*png.*; got .*sheet\.txt"):
        contact_sheet(tiny_well, tmp_path / "sheet.txt")
