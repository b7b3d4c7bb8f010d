"""The mini-Well on disk: the layout of the Well, whose own reader and normalisers take it, and sensible data in it."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from small_cases import read_arrays
from the_well.data import WellDataset
from the_well.data.normalization import RMSNormalization, ZScoreNormalization
from the_well.data.utils import WELL_DATASETS
from well_rules import broken_rules

from data_pipeline.miniwell.generate import SYSTEMS, load_system
from data_pipeline.miniwell.system import SPLITS

DATASETS = sorted(SYSTEMS)
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
    "burgers": (["tracer", "velocity_x", "velocity_y"], [], ["nu"], PERIODIC_BOX),
    "euler_multi_quadrants_periodicBC": (
        ["energy", "density", "pressure", "momentum_x", "momentum_y"],
        [],
        ["gamma"],
        PERIODIC_BOX,
    ),
    "gray_scott_reaction_diffusion": (["A", "B"], [], ["F", "k"], PERIODIC_BOX),
    "helmholtz_staircase": (["pressure_re", "pressure_im"], ["mask"], ["omega"], [[OPEN, OPEN], [OPEN, OPEN]]),
    "pdearena_navier_stokes": (["smoke", "velocity_x", "velocity_y"], [], ["buo_y"], [[WALL, WALL], [WALL, WALL]]),
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


def open_split(well: Path, dataset: str, split: str, normaliser: type | None = None) -> WellDataset:
    # the_well finds only its own datasets by name; burgers is none of them, and any folder can be given by its path.
    known = dataset in WELL_DATASETS
    return WellDataset(
        path=None if known else str(well / dataset),
        well_base_path=str(well) if known else None,
        well_dataset_name=dataset if known else None,
        well_split_name=split,
        use_normalization=normaliser is not None,
        normalization_type=normaliser,
    )


def test_every_system_is_expected() -> None:
    assert set(EXPECTED) == set(SYSTEMS)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_the_wells_reader_takes_every_split(full_well: Path, dataset: str, split: str) -> None:
    channels, constants, scalars, boundary = EXPECTED[dataset]
    preset = load_system(dataset).presets["tiny"]
    reader = open_split(full_well, dataset, split)
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
        _first_interval(full_well, dataset, split), rel=1e-5
    )


def _first_interval(full_well: Path, dataset: str, split: str) -> float:
    path = sorted((full_well / dataset / "data" / split).glob("*.hdf5"))[0]
    with h5py.File(path) as file:
        time = file["dimensions/time"][:].astype(float)
    assert np.allclose(np.diff(time), time[1] - time[0], rtol=1e-4)
    return float(time[1] - time[0])


@pytest.mark.parametrize("dataset", DATASETS)
def test_files_follow_the_wells_layout(full_well: Path, dataset: str) -> None:
    system = load_system(dataset)
    for path in (full_well / dataset / "data").glob("*/*.hdf5"):
        assert broken_rules(path) == []
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
def test_normalisers_of_the_well_standardise_the_train_split(full_well: Path, dataset: str) -> None:
    scored, scaled = (open_split(full_well, dataset, "train", kind) for kind in (ZScoreNormalization, RMSNormalization))
    raw = open_split(full_well, dataset, "train")
    frames = torch.stack([raw[i]["input_fields"][0] for i in range(len(raw))])
    first = scored[0]["input_fields"]
    stats = yaml.safe_load((full_well / dataset / "stats.yaml").read_text())
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
def test_stats_are_the_moments_of_the_train_split(full_well: Path, dataset: str) -> None:
    """Against numpy over all values at once."""
    orders = load_system(dataset).tensor_orders
    stats = yaml.safe_load((full_well / dataset / "stats.yaml").read_text())
    assert list(stats) == ["mean", "mean_delta", "rms", "rms_delta", "std", "std_delta"]
    files = list(read_arrays(full_well, dataset, "train").values())
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
def test_frames_move_but_not_like_noise(full_well: Path, dataset: str) -> None:
    """Every state field varies, and the last frame as a forecast is neither perfect nor useless (VRMSE)."""
    for split in SPLITS:
        for fields in read_arrays(full_well, dataset, split).values():
            for name in load_system(dataset).tensor_orders:
                values = fields[name].astype(np.float64)
                error = (np.diff(values, axis=1) ** 2).mean(axis=(2, 3))
                ratio = np.sqrt(error / (values[:, 1:].var(axis=(2, 3)) + 1e-7))
                assert (values.std(axis=(2, 3)).max(axis=1) > 1e-4).all(), name
                assert (np.median(ratio, axis=1) > 5e-3).all(), name
                assert (np.median(ratio, axis=1) < 1.5).all(), name


@pytest.mark.parametrize("dataset", DATASETS)
def test_no_trajectory_occurs_twice(full_well: Path, dataset: str) -> None:
    leading = next(iter(load_system(dataset).tensor_orders))
    seen = [
        trajectory[-1].tobytes()
        for split in SPLITS
        for fields in read_arrays(full_well, dataset, split).values()
        for trajectory in fields[leading]
    ]
    assert len(set(seen)) == len(seen)
