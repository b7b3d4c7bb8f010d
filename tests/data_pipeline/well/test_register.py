"""Card drafts: what they take from the files, what they leave to a person, and what they refuse."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from handmade_well import StoredField, write_layout

from data_pipeline.errors import UserError
from data_pipeline.registry import VARIABLE, Card, load_registry
from data_pipeline.well.register import Registered, register

EIGHT = [card.name for card in load_registry().select(None)]
FRAMES, GRID = 5, (16, 32)


def strings(names: list[str]) -> np.ndarray:
    return np.array(names, dtype=h5py.string_dtype())


def write_file(
    path: Path,
    fields: Mapping[str, int],
    constants: Mapping[str, np.ndarray] | None = None,
    grid: tuple[int, int] = GRID,
    time: np.ndarray | None = None,
    walls: bool = True,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Two trajectories of random fields (name -> tensor order) and a scalar; x periodic, y between walls."""
    rng = np.random.default_rng(len(path.name))
    time = np.arange(FRAMES) * 0.25 if time is None else time
    stored = {}
    for name, order in fields.items():
        values = rng.standard_normal((2, len(time), *grid, *(2,) * order))
        stored[name] = StoredField(order, (arrays or {}).get(name, values))
    for name, values in (constants or {}).items():
        stored[name] = StoredField(0, values, time_varying=False, sample_varying=False)
    boundary = {"x": "PERIODIC", "y": "WALL"} if walls else {}
    return write_layout(path, stored, grid, 2, time, {"nu": 0.1}, boundary)


def draft(source: Path, directory: Path, name: str | None = None) -> tuple[Registered, Card]:
    made = register(source, name, directory)
    return made, load_registry(directory).card(made.name)


def refusal(source: Path, directory: Path, name: str | None = None) -> str:
    """The complaint; nothing may have been written."""
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        register(source, name, directory)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    return str(caught.value)


@pytest.mark.parametrize("dataset", EIGHT)
def test_the_eight_are_drafted_as_their_cards_say(tiny_well: Path, tmp_path: Path, dataset: str) -> None:
    packaged = load_registry().card(dataset)
    made, card = draft(tiny_well / dataset, tmp_path / "cards", name="another")
    assert made.paths == (tmp_path / "cards" / "datasets" / "another.yaml",)  # no channel is new
    assert (card.fields, card.boundary, card.scalars) == (packaged.fields, packaged.boundary, packaged.scalars)
    with h5py.File(next((tiny_well / dataset).glob("data/train/*.hdf5"))) as file:
        times = file["dimensions/time"][:]
        assert card.grid == (file["dimensions/x"].size, file["dimensions/y"].size)
    assert card.num_frames == (times.size,)
    if card.dt is None:
        assert dataset == "helmholtz_staircase"  # omega differs from file to file
        assert any("the time step differs, from " in line for line in made.decisions)
    else:
        assert card.dt == pytest.approx(times[1] - times[0], rel=1e-4)


def test_names_decide_what_is_canonical_and_the_rest_is_proposed(tmp_path: Path) -> None:
    fields = {"density": 0, "rho": 0, "Pressure": 0, "velocity": 1, "momentum": 1, "vel": 1, "S": 2, "C": 2}
    symmetric = np.random.default_rng(0).standard_normal((2, FRAMES, *GRID, 2, 2))
    symmetric[..., 1, 0] = symmetric[..., 0, 1]
    source = write_file(
        tmp_path / "brew" / "data" / "train" / "a.hdf5",
        fields,
        {"mask": np.zeros(GRID), "depth": np.full(GRID, 3.0)},
        arrays={"S": symmetric},
    )
    made, card = draft(source.parents[2], tmp_path / "cards")
    assert (card.name, card.abbreviation, card.grid, card.dt, card.train) == (
        "brew",
        "brew",
        GRID,
        0.25,
        ((2, FRAMES),),
    )
    assert card.boundary == (("PERIODIC", "PERIODIC"), ("WALL", "WALL"))
    assert card.scalars == ("nu",)
    assert card.constant_channels == ("mask", "brew_depth")
    assert card.state_channels[:5] == ("density", "brew_rho", "brew_Pressure", "velocity_x", "velocity_y")
    registry = load_registry(tmp_path / "cards")
    new = registry.channels[len(load_registry().channels) :]
    own = {"rho", "Pressure", "depth", "momentum_x", "momentum_y", "vel_x", "vel_y"}
    tensors = {f"{name}_{ij}" for name in "SC" for ij in ("xx", "xy", "yx", "yy")}  # C: one letter is generic
    assert set(new) == {f"brew_{name}" for name in own | tensors}
    assert registry.channel_cards["brew_S_yx"].duplicate_of == "brew_S_xy"
    said = "\n".join(made.decisions)
    assert (
        "velocity_x, velocity_y: taken for the canonical channels (velocity along x; velocity along y); the same"
        in said
    )
    assert "brew_momentum_x, brew_momentum_y: proposed, for this dataset alone; write description and unit in" in said
    for name, near in (("rho", "density"), ("Pressure", "pressure"), ("vel_x", "velocity_x"), ("vel_y", "velocity_y")):
        assert f"brew_{name}: is it {near} (" in said
    assert "momentum_x: is it" not in said
    assert "brew_S_yx: equals brew_S_xy in the sample; always?" in said
    text = made.paths[0].read_text()
    assert all(f"#   - {line}" in text for line in made.decisions)


def test_a_generic_name_is_no_canonical_channel_without_the_users_word(tmp_path: Path) -> None:
    source, cards = write_file(tmp_path / "one.hdf5", {"A": 0, "density": 0}), tmp_path / "cards"
    drafts = {"d0": ["d0_A", "density"], "d1 A": ["A", "d1_density"], "d2 none": ["d2_A", "d2_density"]}
    for typed, channels in {**drafts, "d3 all": ["A", "density"]}.items():
        name, *share = typed.split()
        register(source, name, cards, share)
        assert load_registry(cards).card(name).state_channels == tuple(channels)
    with pytest.raises(UserError, match=r"--share u: expected fields with .* of a canonical channel \(A, density\)"):
        register(source, "d4", cards, ["u"])


def test_figures_are_those_of_the_data(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((2, 4, *GRID)) * 7 + 100  # 4 frames of 2: all are sampled
    source = write_file(tmp_path / "heat.hdf5", {"heat": 0}, arrays={"heat": values}, time=np.arange(4) * 1e-5)
    made, card = draft(source, tmp_path / "cards")
    shown = f"mean {values.mean():.4g}, std {values.std():.4g}, from {values.min():.4g} to {values.max():.4g}"
    assert f"#   heat_heat: {shown}" in made.paths[0].read_text()
    assert f"# {shown}\nheat_heat: {{description: heat" in made.paths[1].read_text()
    assert card.dt == pytest.approx(1e-5, rel=1e-5)  # 1e-05 would be a text in YAML


def test_a_second_dataset_adds_to_the_channels_and_keeps_what_a_person_wrote(tmp_path: Path) -> None:
    cards = tmp_path / "cards"
    draft(write_file(tmp_path / "one.hdf5", {"salt": 0}), cards)
    edited = (cards / "channels.yaml").read_text().replace("salt (to be described)", "sea salt") + "# mine\n"
    edited += "sugar: {description: what a person shares, unit: kg}"
    (cards / "channels.yaml").write_text(edited)
    draft(write_file(tmp_path / "two.hdf5", {"salt": 0, "sugar": 0}), cards)
    assert (cards / "channels.yaml").read_text().startswith(edited)
    registry = load_registry(cards)
    assert registry.channel_cards["one_salt"].description == "sea salt"
    assert registry.card("one").state_channels == ("one_salt",)  # the salt of two may be another quantity
    assert registry.card("two").state_channels == ("two_salt", "sugar")


def test_a_channels_file_that_cannot_be_appended_to_is_left_alone(tmp_path: Path) -> None:
    cards = tmp_path / "cards"
    cards.mkdir()
    (cards / "channels.yaml").write_text("{salt: {description: a, unit: b}}\n")
    source = write_file(tmp_path / "one.hdf5", {"sugar": 0})
    assert "channels.yaml: the proposed channels cannot be added at its end" in refusal(source, cards)


def test_the_folder_is_the_argument_else_the_first_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    source = write_file(tmp_path / "sea.hdf5", {"salt": 0})
    with pytest.raises(UserError, match=rf"name one with --registry, or in {VARIABLE}"):
        register(source, None, None)
    one, two = tmp_path / "one", tmp_path / "two"
    draft(write_file(tmp_path / "brine.hdf5", {"salt": 0}), two)
    monkeypatch.setenv(VARIABLE, f"{one}{os.pathsep}{two}")
    assert register(source, None, None).paths == (one / "datasets" / "sea.yaml", one / "channels.yaml")
    assert register(source, "lake", two).paths == (two / "datasets" / "lake.yaml", two / "channels.yaml")
    assert register(write_file(tmp_path / "pond.hdf5", {"density": 0}), None, None).paths == (
        one / "datasets" / "pond.yaml",
    )
    assert {"brine", "sea"} <= load_registry().cards.keys()


def test_where_files_may_lie_and_what_must_be_moved(tmp_path: Path) -> None:
    file = write_file(tmp_path / "flat" / "a.h5", {"density": 0})
    made, card = draft(tmp_path / "flat", tmp_path / "cards")
    assert (made.name, card.train) == ("flat", ())  # no split says which files are for training
    assert any("reads <folder>/flat/data/{train,valid,test}/*.hdf5; move them there" in line for line in made.decisions)
    assert draft(file, tmp_path / "cards")[0].name == "a"
    write_file(tmp_path / "tree" / "data" / "test" / "a.hdf5", {"density": 0})
    made, card = draft(tmp_path / "tree", tmp_path / "cards")
    assert (made.name, card.train) == ("tree", ())
    assert not [line for line in made.decisions if line.startswith("files:")]
    assert "the datasets tree; give one of them" in refusal(tmp_path, tmp_path / "cards", "x")
    assert "got none of them" in refusal(tmp_path / "nowhere", tmp_path / "cards")
    file.rename(tmp_path / "flat" / "run 1.h5")
    assert "the name 'run 1': expected up to 64 letters" in refusal(tmp_path / "flat" / "run 1.h5", tmp_path / "cards")


def test_a_link_names_the_dataset_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "store" / "f00d" / "data" / "train" / "a.hdf5", {"density": 0})
    (tmp_path / "lava").symlink_to(tmp_path / "store" / "f00d")
    (tmp_path / "flat").symlink_to(tmp_path / "store" / "f00d" / "data" / "train")
    for name in ("lava", "flat"):
        assert draft(tmp_path / name, tmp_path / "cards")[0].name == name
    monkeypatch.chdir(tmp_path / "store" / "f00d")
    assert draft(Path("."), tmp_path / "cards")[0].name == "f00d"


def test_oddities_are_pointed_out(tmp_path: Path) -> None:
    source = write_file(
        tmp_path / "odd.hdf5",
        {"density": 0},
        grid=(15, 16),
        time=np.array([0.0, 1, 1, 1]),
        walls=False,
        arrays={"density": np.where(np.arange(16) == 3, np.nan, np.ones((2, 4, 15, 16)))},
    )
    with h5py.File(source, "r+") as file:
        file["dimensions/y"][:] = np.cos(np.linspace(0, np.pi, 16))
    write_file(tmp_path / "flat" / "a.hdf5", {"density": 0}, time=np.zeros(3))
    made, card = draft(source, tmp_path / "cards")
    said = "\n".join(made.decisions)
    assert "model_grid: whole split: 15 x 16 points: the models need even numbers of at least 16 along" in said
    assert "drafted by `data-pipeline register`. It cannot be used as it is: " in made.paths[0].read_text()
    assert "axes: odd.hdf5: y runs backward, from 1 to -1; points along y are not equally spaced" in said
    assert "times: odd.hdf5, trajectory 1, frames 2-3: 2 of 4 frames are not later than one before them" in said
    assert "density: the sample holds NaN or Inf" in said
    assert (
        "boundary: x OPEN-OPEN, y OPEN-OPEN (lower and upper end); OPEN is also what files get that say nothing" in said
    )
    assert "#   density: no frame without NaN or Inf" in made.paths[0].read_text()
    assert card.grid == (15, 16)
    made, card = draft(tmp_path / "flat", tmp_path / "cards")
    assert card.dt is None
    assert "all 3 frames are at time 0: were the times ever written?; dt is null" in "\n".join(made.decisions)


def test_names_that_yaml_takes_for_something_else(tmp_path: Path) -> None:
    _, card = draft(write_file(tmp_path / "null.hdf5", {"on": 0, "null": 1, "y": 0, "No": 2}), tmp_path / "cards")
    assert card.name == "null"
    names = ("on", "y", "null_x", "null_y", "No_xx", "No_xy", "No_yx", "No_yy")
    assert card.state_channels == tuple(f"null_{name}" for name in names)


def spoil(path: Path, change: Any) -> Path:
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def three_axes(file: h5py.File) -> None:
    file["dimensions"].attrs["spatial_dims"] = strings(["x", "y", "z"])


def one_sided(file: h5py.File) -> None:
    mask = file["boundary_conditions/x_PERIODIC/mask"]
    mask[-1] = False


def float64(file: h5py.File) -> None:
    values, attributes = file["t0_fields/density"][()], dict(file["t0_fields/density"].attrs)
    del file["t0_fields/density"]
    file["t0_fields/density"] = values.astype(np.float64)
    file["t0_fields/density"].attrs.update(attributes)


def linked(file: h5py.File) -> None:
    del file["dimensions/x"]
    file["dimensions/x"] = h5py.ExternalLink("/etc/passwd", "/x")


REFUSED = {
    "3D": (three_axes, r"expected 2D data on a cartesian grid, axes x, y; got 3D data .* axes 'x, y, z'"),
    "polar axes": (
        lambda f: f["dimensions"].attrs.update({"spatial_dims": strings(["r", "theta"])}),
        r"got 2D data on the grid 'cartesian', axes 'r, theta'",
    ),
    "spherical": (lambda f: f.attrs.update({"grid_type": "spherical"}), r"on the grid 'spherical'"),
    "no fields": (lambda f: f["t0_fields"].attrs.update({"field_names": strings([])}), r"got none; there is nothing"),
    "constant": (lambda f: f["t0_fields/density"].attrs.update({"time_varying": False}), r"fields that change in time"),
    "no layout": (lambda f: f.pop("dimensions"), r"not in the Well's layout"),
    "odd attribute": (lambda f: f["t0_fields"].attrs.update({"field_names": 3}), r"field '3': expected up to 64 lett"),
    "spaces": (
        lambda f: f["t0_fields"].attrs.update({"field_names": strings(["mass \x1b[2J density"])}),
        r"field 'mass \\+x1b\[2J density': expected up to 64 letters",
    ),
    "one-sided": (one_sided, r"x is PERIODIC at its lower and OPEN at its upper end; expected PERIODIC at both"),
    "float64": (float64, r"density: expected float32"),
    "link": (linked, r"dimensions/x is a link to another file, which is not followed"),
    "shape": (lambda f: f.attrs.update({"n_trajectories": 7}), r"expected the shape \(7, 5, 16, 32\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_cannot_be_registered_are_refused(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    path = spoil(write_file(tmp_path / "fluid.hdf5", {"density": 0}), change)
    said = refusal(path, tmp_path / "cards")
    assert "fluid.hdf5" in said
    assert re.search(message, said), said


def test_text_truncation_and_files_that_disagree_are_refused(tmp_path: Path) -> None:
    (tmp_path / "page.hdf5").write_text("<html>404</html>")
    assert "page.hdf5: cannot be read, so it is truncated or no HDF5 file" in refusal(
        tmp_path / "page.hdf5", tmp_path / "cards"
    )
    whole = write_file(tmp_path / "whole.hdf5", {"density": 0})
    whole.write_bytes(whole.read_bytes()[:5000])
    assert "whole.hdf5" in refusal(whole, tmp_path / "cards")
    write_file(tmp_path / "two" / "a.hdf5", {"density": 0})
    write_file(tmp_path / "two" / "b.hdf5", {"density": 0}, grid=(16, 16))
    assert "b.hdf5: expected grid and boundaries as in" in refusal(tmp_path / "two", tmp_path / "cards")
    write_file(tmp_path / "two" / "b.hdf5", {"pressure": 0})
    said = refusal(tmp_path / "two", tmp_path / "cards")
    assert "the card names: density (t0)\n  the file holds: pressure (t0)\n" in said
    clash = write_file(tmp_path / "clash.hdf5", {"velocity_x": 0, "velocity": 1})
    assert "velocity_x and velocity would both be the channel velocity_x" in refusal(clash, tmp_path / "cards")


def test_names_that_are_taken_and_drafts_that_are_there_are_kept(tmp_path: Path) -> None:
    source = write_file(tmp_path / "shear_flow.hdf5", {"density": 0})
    assert "there is a card 'shear_flow' already, and is not overwritten" in refusal(source, tmp_path / "cards")
    assert "there is a card 'GS' already" in refusal(source, tmp_path / "cards", "GS")
    made, _ = draft(source, tmp_path / "cards", "mine")
    made.paths[0].write_text(made.paths[0].read_text() + "# edited\n")
    assert "mine.yaml is already there, and is not overwritten" in refusal(source, tmp_path / "cards", "mine")
