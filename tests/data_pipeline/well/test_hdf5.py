"""HDF5 files are read by field name, as the_well reads them, and bad ones are refused by name."""

import re
import shutil
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from obstacles import compress_with_blosc, opened_for_writing, ordinary_user
from the_well.data import WellDataset

from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from data_pipeline.well.download import damage
from data_pipeline.well.hdf5 import WellFile, dataset_folders, split_files
from data_pipeline.well.stats import compute_stats, read_stats
from data_pipeline.well.survey import read_header

CARDS = {card.name: card for card in load_registry().select(None)}  # of the eight, which the_well knows by name
CARD = CARDS["gray_scott_reaction_diffusion"]
CODES = {"WALL": 0, "OPEN": 1, "PERIODIC": 2}


@pytest.fixture
def copy_of(tiny_well: Path, tmp_path: Path):
    """Copies the first train file of a dataset, so that a test may spoil it."""

    def copy(dataset: str) -> Path:
        return Path(shutil.copy(split_files(tiny_well / dataset, "train")[0], tmp_path / "file.hdf5"))

    return copy


@pytest.mark.parametrize("dataset", CARDS)
def test_read_as_the_well_does(tiny_well: Path, dataset: str) -> None:
    theirs = WellDataset(
        well_base_path=str(tiny_well), well_dataset_name=dataset, well_split_name="test", n_steps_output=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the_well warns of a boundary mask over both axes
        sample = theirs[3]  # the windows of trajectory 0 start at frames 0..6
    card = CARDS[dataset]
    with WellFile(split_files(tiny_well / dataset, "test")[0], card) as file:
        frames = file.read(0, 3, 6)
        constants = file.constants(0)
        codes = [[CODES[kind] for kind in sides] for sides in file.boundary]
        scalars = file.scalars(0)
    names = theirs.metadata.field_names
    assert [name for order in range(3) for name in names[order]] == list(card.state_channels)
    expected = np.concatenate([sample["input_fields"], sample["output_fields"]])
    assert np.array_equal(np.moveaxis(frames, 1, -1), expected)
    if card.constant_channels:
        assert np.array_equal(np.moveaxis(constants, 0, -1), sample["constant_fields"])
    assert codes == sample["boundary_conditions"].tolist()
    assert list(scalars.values()) == sample.get("constant_scalars", np.empty(0)).tolist()


def test_field_order_of_the_file_does_not_matter(copy_of) -> None:
    path = copy_of("active_matter")
    card = CARDS["active_matter"]
    with WellFile(path, card) as file:
        expected = file.read(0, 0, 9)
    with h5py.File(path, "r+") as file:
        file["t2_fields"].attrs["field_names"] = ["E", "D"]
    with WellFile(path, card) as file:
        assert np.array_equal(file.read(0, 0, 9), expected)


def test_field_stored_without_an_axis_is_repeated_along_it(copy_of) -> None:
    path = copy_of("shear_flow")
    profile = np.arange(9 * 64, dtype=np.float32).reshape(1, 9, 64)
    with h5py.File(path, "r+") as file:
        attributes = dict(file["t0_fields/tracer"].attrs)
        count = file.attrs["n_trajectories"]
        del file["t0_fields/tracer"]
        tracer = file["t0_fields"].create_dataset("tracer", data=np.repeat(profile, count, axis=0))
        tracer.attrs.update(attributes | {"dim_varying": [False, True]})
    with WellFile(path, CARDS["shear_flow"]) as file:
        assert np.array_equal(file.read(0, 2, 4)[:, 0], np.repeat(profile[0, 2:4, None], 32, axis=1))


def test_wall_must_cover_a_whole_side(copy_of) -> None:
    path = copy_of("helmholtz_staircase")
    with h5py.File(path, "r+") as file:
        group = file["boundary_conditions"]
        for name in list(group):
            del group[name]
        for name, kind, mask in (("a", "wall", [[1, 1], [1, 0]]), ("b", "periodic", [[0, 0], [0, 1]])):
            group.create_group(name)["mask"] = np.array(mask, dtype=bool)
            group[name].attrs.update({"bc_type": kind, "associated_dims": ["x", "y"]})
    with WellFile(path, CARDS["helmholtz_staircase"]) as file:
        assert file.boundary == (("WALL", "PERIODIC"), ("WALL", "PERIODIC"))


def test_texts_may_be_bytes(copy_of) -> None:
    """As HDF5 libraries without variable-length strings write them."""
    path = copy_of("viscoelastic_instability")
    card = CARDS["viscoelastic_instability"]
    with WellFile(path, card) as file:
        expected = file.boundary, file.scalars(0)
    with h5py.File(path, "r+") as file:
        file["dimensions"].attrs["spatial_dims"] = np.array([b"x", b"y"])
        for group in file["boundary_conditions"].values():
            group.attrs["bc_type"] = np.bytes_(group.attrs["bc_type"])
            group.attrs["associated_dims"] = np.array([name.encode() for name in group.attrs["associated_dims"]])
        for name in ("scalars", "t0_fields", "t1_fields", "t2_fields"):
            file[name].attrs["field_names"] = np.array([one.encode() for one in file[name].attrs["field_names"]])
    with WellFile(path, card) as file:
        assert (file.boundary, file.scalars(0)) == expected
    assert damage(path, None) is None
    assert [field.name for field in read_header(path)] == [field.name for field in card.fields]


@pytest.mark.parametrize("place", ["bc_type", "spatial_dims", "field_names"])
def test_texts_of_a_file_cannot_control_the_terminal(copy_of, place: str) -> None:
    path = copy_of("helmholtz_staircase")
    with h5py.File(path, "r+") as file:
        group = {"bc_type": file["boundary_conditions"], "spatial_dims": file["dimensions"]}.get(
            place, file["t0_fields"]
        )
        group = next(iter(group.values())) if place == "bc_type" else group
        group.attrs[place] = ["\x1b]0;owned\x07", "\x9b2J"]
    with (
        pytest.raises(UserError, match=r"(?i)\\x1b\]0;owned") as caught,
        WellFile(path, CARDS["helmholtz_staircase"]) as file,
    ):
        assert file.boundary
    assert str(caught.value).replace("\n", "").isprintable()


def test_times_may_differ_between_trajectories(copy_of) -> None:
    path = copy_of("viscoelastic_instability")
    with h5py.File(path, "r+") as file:
        count = int(file.attrs["n_trajectories"])
        del file["dimensions/time"]
        file["dimensions/time"] = np.arange(9) * (1.0 + np.arange(count)[:, None])
        file["dimensions/time"].attrs["sample_varying"] = True
    with WellFile(path, CARDS["viscoelastic_instability"]) as file:
        assert [file.dt(trajectory) for trajectory in range(count)] == [1.0 + i for i in range(count)]
        assert file.num_frames == 9


def _link_elsewhere(file: h5py.File) -> None:
    del file["t0_fields/A"]
    file["t0_fields/A"] = h5py.ExternalLink("/etc/hostname", "/A")


def _rename(file: h5py.File) -> None:
    file["t0_fields"].move("B", "C")
    file["t0_fields"].attrs["field_names"] = ["A", "C"]


def _drop(file: h5py.File) -> None:
    file["t0_fields"].attrs["field_names"] = ["A"]


def _as_float64(file: h5py.File) -> None:
    values, attributes = file["t0_fields/A"][:], dict(file["t0_fields/A"].attrs)
    del file["t0_fields/A"]
    file["t0_fields"].create_dataset("A", data=values.astype(np.float64)).attrs.update(attributes)


def _shorten(file: h5py.File) -> None:
    del file["dimensions/time"]
    file["dimensions/time"] = np.arange(8.0)


def _empty(file: h5py.File) -> None:
    file.attrs["n_trajectories"] = 0


def _turn(file: h5py.File) -> None:
    file["dimensions"].attrs["spatial_dims"] = ["y", "x"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_link_elsewhere, "t0_fields/A is a link to another file"),
        (_rename, "its state fields are not those of the card"),
        (_drop, "its state fields are not those of the card"),
        (_as_float64, "field A: expected float32.*got float64"),
        (_shorten, r"field A: expected the shape \(\d, 8, 32, 32\)"),
        (_empty, "no trajectory in it"),
        (_turn, "expected the spatial axes x, y, got y, x"),
        (lambda file: file.pop("scalars"), "not in the Well's layout: the file has no 'scalars'"),
        (lambda file: file.pop("dimensions"), "not in the Well's layout"),
        (
            lambda file: file["t0_fields/A"].attrs.update({"time_varying": "False"}),
            "t0_fields/A: attribute time_varying: expected a boolean, got 'False'; store a boolean",
        ),
        (
            lambda file: file["t0_fields/B"].attrs.update({"dim_varying": np.bytes_("True")}),
            "t0_fields/B: attribute dim_varying: expected 2 booleans, got b'True'",
        ),
        (lambda file: file["t0_fields/B"].attrs.pop("sample_varying"), "t0_fields/B has no attribute sample_varying"),
        (lambda file: file["t1_fields"].attrs.pop("field_names"), "t1_fields has no attribute field_names"),
        (lambda file: file.attrs.pop("n_trajectories"), "the file has no attribute n_trajectories"),
        (lambda file: file["scalars/F"].attrs.pop("time_varying"), "scalars/F has no attribute time_varying"),
        (
            lambda file: _replace(file, "dimensions/x", data=np.ones((32, 32), np.float32)),
            r"dimensions/x: expected the shape \(points,\) or \(\d, points\), got \(32, 32\); interpolate curved",
        ),
        (
            lambda file: file["dimensions/y"].attrs.update({"time_varying": True}),
            r"dimensions/y: .* got \(32,\) that varies in time; interpolate curved or moving grids first",
        ),
    ],
)
def test_wrong_content_is_refused(copy_of, spoil, message: str) -> None:
    path = copy_of("gray_scott_reaction_diffusion")
    with h5py.File(path, "r+") as file:
        spoil(file)
    with pytest.raises(UserError, match=message) as caught, WellFile(path, CARD) as file:
        file.scalars(0)
    assert str(path) in str(caught.value)
    assert "gray_scott_reaction_diffusion" in str(caught.value)


def _replace(file: h5py.File, name: str, **options: object) -> None:
    """The same dataset, or another, under the same name with the same attributes."""
    attributes = dict(file[name].attrs)
    del file[name]
    file.create_dataset(name, **options).attrs.update(attributes)


def test_causes_are_named_each_with_its_way_out(copy_of, tmp_path: Path) -> None:
    path = copy_of(CARD.name)

    def complaint() -> str:
        with pytest.raises(UserError) as caught, WellFile(path, CARD) as file:
            file.read(0, 0, 1)
        assert str(path) in str(caught.value)
        return str(caught.value)

    with opened_for_writing(path):
        locked = complaint()
    path.chmod(0)
    with ordinary_user():
        forbidden = complaint()
    path.chmod(0o600)
    with h5py.File(path, "r+") as file:
        compress_with_blosc(file, "t0_fields/A")
    filtered = complaint()
    path.write_bytes(path.read_bytes()[:3000])
    cut = complaint()
    path.unlink()
    gone = complaint()
    path.mkdir()
    folder = complaint()
    expected = {
        locked: "another program has it open for writing: wait until",
        forbidden: r"you have no permission to read it: `chmod u\+r` it",
        filtered: r"t0_fields/A: it is compressed with the HDF5 filter 32001 .* `h5repack -f GZIP=4 FILE NEW`",
        cut: "cannot be read, so it is truncated or no HDF5 file .* get it again",
        gone: "there is no such file",
        folder: "it is a folder, where a file was expected",
    }
    for said, words in expected.items():
        assert re.search(words, said), said
        assert ("truncated" in said) == (said == cut)


def _grow(file: h5py.File) -> None:
    """Fields without spatial axes on a grid that no memory holds."""
    for axis in "xy":
        _replace(file, f"dimensions/{axis}", data=np.zeros(40000, np.float32))
    for name in ("t0_fields/A", "t0_fields/B"):
        _replace(file, name, data=file[name][:, :, 0, 0])
        file[name].attrs["dim_varying"] = [False, False]


def _multiply(file: h5py.File) -> None:
    """A single trajectory that claims to be a billion."""
    file.attrs["n_trajectories"] = 10**9
    for name in ("t0_fields/A", "t0_fields/B"):
        _replace(file, name, data=file[name][0])
        file[name].attrs["sample_varying"] = False


def _link_group(file: h5py.File) -> None:
    del file["t0_fields"]
    file["t0_fields"] = h5py.ExternalLink("/etc/hostname", "/t0_fields")


def _soft_link(file: h5py.File) -> None:
    file.move("t0_fields/A", "t0_fields/other")
    file["t0_fields/A"] = h5py.SoftLink("/t0_fields/other")


def _link_mask(file: h5py.File) -> None:
    group = next(iter(file["boundary_conditions"].values()))
    del group["mask"]
    group["mask"] = h5py.ExternalLink("/etc/hostname", "/mask")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: _replace(file, "t0_fields/A", shape=file["t0_fields/A"].shape, dtype="f4"), "was never written"),
        (
            lambda file: _replace(file, "dimensions/time", shape=(10**12,), dtype="f4", chunks=(1000,)),
            r"dimensions/time: it declares 4000000000000 bytes .* stores 0 for it",
        ),
        (
            lambda file: _replace(file, "dimensions/x", shape=(10**9,), dtype="f4", compression="gzip"),
            "dimensions/x: it declares 4000000000 bytes",
        ),
        (
            lambda file: _replace(
                file, "dimensions/x", shape=(2**27,), dtype="f4", chunks=(2**27,), compression="gzip"
            ),
            "expected HDF5 chunks of at most 268435456 bytes",
        ),
        (lambda file: _replace(file, "dimensions/time", data=np.array(["a"] * 9, "S")), "expected an array of numbers"),
        (_grow, r"expected frames of at most 1073741824 bytes, got 12800000000 \(40000x40000, 2 channels\)"),
        (_multiply, "it states 1000000000 trajectories and holds one"),
        (_link_group, "t0_fields is a link to another file"),
        (_link_mask, "boundary .*mask is a link to another file"),
        (_soft_link, "t0_fields/A is a link to another place"),
        (lambda file: file.attrs.update(n_trajectories="many"), "not in the Well's layout"),
        (lambda file: file["dimensions"].attrs.update(spatial_dims=3), "expected the spatial axes x, y"),
        (lambda file: file.create_dataset("boundary_conditions/odd", data=1.0), "odd: expected a group, got Dataset"),
    ],
)
def test_header_that_claims_more_than_the_file_holds_is_refused(copy_of, spoil, message: str) -> None:
    path = copy_of("gray_scott_reaction_diffusion")
    with h5py.File(path, "r+") as file:
        spoil(file)
    with pytest.raises(UserError, match=message) as caught:
        WellFile(path, CARD)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"chunks": True}, {"compression": "gzip", "shuffle": True}, {"compression": "lzf"}]
)
def test_chunked_and_compressed_fields_are_read(copy_of, options: dict) -> None:
    path = copy_of("viscoelastic_instability")
    card = CARDS["viscoelastic_instability"]
    with WellFile(path, card) as file:
        expected = file.read(0, 0, 9)
    with h5py.File(path, "r+") as file:
        for name in ("t0_fields/pressure", "t2_fields/C"):
            _replace(file, name, data=file[name][()], **options)
        _replace(file, "t0_fields/c_zz", data=np.zeros_like(file["t0_fields/c_zz"][()]), **options)  # packs 1000 times
    expected[:, card.state_channels.index("c_zz")] = 0
    with WellFile(path, card) as file:
        assert np.array_equal(file.read(0, 0, 9), expected)
        assert np.array_equal(file.read(0, 3, 5), expected[3:5])


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_file_is_refused(copy_of, keep: float) -> None:
    path = copy_of("shear_flow")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(UserError, match=r"file.hdf5 \(dataset shear_flow\): cannot be read, so it is truncated"):
        WellFile(path, CARDS["shear_flow"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_value_is_named(copy_of, bad: float) -> None:
    path = copy_of("shear_flow")
    with h5py.File(path, "r+") as file:
        file["t1_fields/velocity"][0, 5, 3, 7, 1] = bad
    with WellFile(path, CARDS["shear_flow"]) as file:
        file.check_finite(file.read(0, 0, 5), 0, 0)
        with pytest.raises(UserError, match=r"trajectory 0, field velocity \(velocity_y\), frame 5: .*NaN or Inf"):
            file.check_finite(file.read(0, 4, 8), 0, 4)


@pytest.mark.parametrize("dataset", ["acoustic_scattering_maze", "active_matter", "helmholtz_staircase"])
def test_computed_stats_are_the_moments_of_the_train_split(tiny_well: Path, dataset: str) -> None:
    card, files = CARDS[dataset], split_files(tiny_well / dataset, "train")
    computed = compute_stats(files, card, frames_per_chunk=4)
    everything, changes, constants = [], [], []
    for path in files:
        with WellFile(path, card) as file:
            for trajectory in range(file.num_trajectories):
                frames = file.read(trajectory, 0, file.num_frames).astype(np.float64)
                everything.append(frames)
                changes.append(np.diff(frames, axis=0))
                constants.append(file.constants(trajectory)[None].astype(np.float64))
    for suffix, values, channels in (
        ("", np.concatenate(everything), card.state_channels),
        ("_delta", np.concatenate(changes), card.state_channels),
        ("", np.concatenate(constants), card.constant_channels),
    ):
        for number, channel in enumerate(channels):
            one = values[:, number]
            assert computed[f"mean{suffix}"][channel] == pytest.approx(one.mean(), rel=1e-9, abs=1e-12)
            assert computed[f"std{suffix}"][channel] == pytest.approx(one.std(), rel=1e-9, abs=1e-12)
            assert computed[f"rms{suffix}"][channel] == pytest.approx(np.sqrt(np.mean(one**2)), rel=1e-9, abs=1e-12)
    stored = read_stats(tiny_well / dataset / "stats.yaml", card)
    for statistic, by_channel in stored.items():
        assert by_channel == pytest.approx(computed[statistic], rel=1e-4, abs=1e-7), statistic


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.pop("rms_delta"),
        lambda content: content["std"].pop("velocity"),
        lambda content: content["std"].update(velocity=[1.0]),
        lambda content: content["std"].update(velocity=[1.0, -1.0]),
        lambda content: content["mean"].update(velocity=[1.0, float("nan")]),
        lambda content: content["mean"].update(velocity="many"),
        lambda content: content.update(mean=3),
    ],
)
def test_stats_file_that_is_no_good_is_refused(tiny_well: Path, tmp_path: Path, spoil) -> None:
    content = yaml.safe_load((tiny_well / "shear_flow" / "stats.yaml").read_text())
    spoil(content)
    path = tmp_path / "stats.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"stats.yaml: \w+ of the field \w+: expected .*; remove the file"):
        read_stats(path, CARDS["shear_flow"])


@pytest.mark.parametrize("text", ["mean: [", "!!python/object/apply:os.system ['true']", "\0"])
def test_stats_file_that_is_no_yaml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "stats.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"expected plain YAML in UTF-8.*remove it to have the statistics computed"):
        read_stats(path, CARDS["shear_flow"])


def test_datasets_are_found_in_both_layouts(tmp_path: Path) -> None:
    (tmp_path / "datasets" / "shear_flow" / "data").mkdir(parents=True)
    (tmp_path / "active_matter" / "data").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    assert list(dataset_folders(tmp_path)) == ["active_matter", "shear_flow"]
    assert dataset_folders(tmp_path / "nowhere") == {}
