"""Cards: the packaged ones against the paper's counts, the user's own, and the message for every mistake in one."""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from handmade_cards import CARD, CHANNELS, complaint, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.registry import VARIABLE, Card, Conserved, Registry, load_folders, load_registry
from data_pipeline.well.hdf5 import WellFile


@pytest.fixture(scope="module")
def packaged() -> Registry:
    return load_registry()


def test_eight_cards_have_the_published_windows_tokens_and_frames(packaged: Registry) -> None:
    found = {card.abbreviation: (card.windows, card.tokens, card.num_frames) for card in packaged.select(None)}
    assert found == {
        "AM": (14000, 16384, (81,)),
        "GS": (960000, 4096, (1001,)),
        "RB": (278600, 16384, (200,)),
        "SF": (178304, 32768, (200,)),
        "TRL2D": (7200, 12288, (101,)),
        "VI": (6487, 65536, (20, 60)),
        "ASM": (321600, 16384, (202,)),
        "HS": (20384, 65536, (50,)),
    }


def test_state_channels_are_in_the_order_of_the_wells_reader(packaged: Registry) -> None:
    channels = {card.abbreviation: " ".join(card.state_channels) for card in packaged.select(None)}
    assert channels == {
        "AM": "concentration velocity_x velocity_y D_xx D_xy D_yx D_yy E_xx E_xy E_yx E_yy",
        "GS": "A B",
        "RB": "buoyancy pressure velocity_x velocity_y",
        "SF": "tracer pressure velocity_x velocity_y",
        "TRL2D": "density pressure velocity_x velocity_y",
        "VI": "pressure c_zz velocity_x velocity_y C_xx C_xy C_yx C_yy",
        "ASM": "pressure velocity_x velocity_y",
        "HS": "pressure_re pressure_im",
    }
    constants = {card.abbreviation: card.constant_channels for card in packaged.select(None) if card.constant}
    assert constants == {"ASM": ("density", "speed_of_sound"), "HS": ("mask",)}


def test_canonical_channels_are_the_union_of_what_the_datasets_use(packaged: Registry) -> None:
    used = {channel for card in packaged.select(None) for channel in card.state_channels + card.constant_channels}
    assert len(packaged.channels) == 26
    assert used == set(packaged.channels)
    twins = {name: channel.duplicate_of for name, channel in packaged.channel_cards.items() if channel.duplicate_of}
    assert twins == {"D_yx": "D_xy", "E_yx": "E_xy", "C_yx": "C_xy"}


def test_boundaries_are_those_the_wells_reader_finds(packaged: Registry) -> None:
    codes = {"WALL": "0", "OPEN": "1", "PERIODIC": "2"}
    found = {
        card.abbreviation: "".join(codes[side] for axis in card.boundary for side in axis)
        for card in packaged.select(None)
    }
    assert found == {
        "AM": "2222",
        "GS": "2222",
        "SF": "2222",
        "RB": "2200",
        "VI": "2200",
        "TRL2D": "2211",
        "ASM": "0101",
        "HS": "1111",
    }


def published_scores(card: Card, protocol: str, window: str) -> dict[str, float]:
    tables = [table for table in card.published if table.protocol == protocol]
    return {model: score for table in tables for model, score in table.vrmse.get(window, {}).items()}


def test_published_scores_by_protocol_and_window(packaged: Registry) -> None:
    card = packaged.card("turbulent_radiative_layer_2D")
    assert published_scores(card, "wavelit", "one_step")["Walrus"] == 0.0831
    assert published_scores(card, "wavelit", "1:20")["9.5M-PT"] == 0.3362
    assert published_scores(card, "wavelit", "21:60")["Walrus"] == 0.8648
    assert published_scores(card, "well", "one_step")["CNextU-net"] == 0.1956
    assert published_scores(card, "well", "21:60") == {}
    contexts = {(table.protocol, table.context) for each in packaged.select(None) for table in each.published}
    assert contexts == {("wavelit", 1), ("well", 4)}
    joint = [published_scores(each, "wavelit", "one_step")["joint 1.2M sqrt"] for each in packaged.select(None)]
    assert sum(sorted(joint)[3:5]) / 2 == pytest.approx(0.0285, abs=5e-5)  # the median that Table 10 prints


def test_unknown_dataset_names_the_nearest(packaged: Registry) -> None:
    with pytest.raises(UserError, match=r"'rayleigh_bernard'.*Did you mean 'rayleigh_benard'\?"):
        packaged.card("rayleigh_bernard")
    with pytest.raises(UserError, match=r"'zzz'.*Valid: acoustic_scattering_maze, active_matter"):
        packaged.select(["shear_flow", "zzz"])


def test_select_sorts_and_defaults_to_all_but_the_extras(packaged: Registry) -> None:
    assert [card.name for card in packaged.select(["shear_flow", "active_matter"])] == ["active_matter", "shear_flow"]
    assert [card.name for card in packaged.select(None)] == sorted(set(packaged.cards) - {"pdearena_navier_stokes"})
    (extra,) = packaged.select(["pdearena_navier_stokes"])
    assert extra.extra
    assert (extra.windows, extra.tokens) == (5200 * 13, 4096)


def test_snapshot_is_json_and_ignores_prose(packaged: Registry) -> None:
    snapshot = packaged.snapshot()
    assert json.loads(json.dumps(snapshot)) == snapshot
    reworded = {name: dataclasses.replace(card, quirks=("?",)) for name, card in packaged.cards.items()}
    assert dataclasses.replace(packaged, cards=reworded).snapshot() == snapshot
    assert snapshot["cards"]["helmholtz_staircase"]["fields"][2] == ["mask", 0, "constant", ["mask"]]


MINE = """
name: mine
description: a system of mine
state:
  t0: {density: [density], salinity: [salinity]}
boundary: {x: [PERIODIC, PERIODIC], y: [WALL, WALL]}
grid: [64, 64]
dt: 0.5
"""
SALINITY = "salinity: {description: salt in water, unit: grams per litre}\n"


def test_a_users_folder_adds_to_the_packaged_cards(packaged: Registry, tmp_path: Path) -> None:
    registry = load_registry(write(tmp_path, MINE, SALINITY, "mine"))
    assert registry.channels == (*packaged.channels, "salinity")
    assert list(registry.cards) == sorted([*packaged.cards, "mine"])
    card = registry.card("mine")
    assert (card.abbreviation, card.train, card.source, card.num_frames) == ("mine", (), "", ())
    assert (card.domain, card.test_trajectories, card.conserved) == (None, None, ())
    assert card.state_channels == ("density", "salinity")
    assert {name: registry.card(name) for name in packaged.cards} == packaged.cards


def test_the_folder_comes_from_the_argument_else_the_environment(
    packaged: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = write(tmp_path / "mine", MINE, SALINITY, "mine")
    other = tmp_path / "other"
    (other / "datasets").mkdir(parents=True)
    (other / "datasets" / "burgers.yaml").write_text(MINE.replace("name: mine", "name: burgers"))
    monkeypatch.setenv(VARIABLE, str(mine))
    assert "mine" in load_registry().cards
    monkeypatch.setenv(VARIABLE, f"{other}{os.pathsep}{mine}")  # the first takes its channel from the second
    assert {"mine", "burgers"} <= load_registry().cards.keys()
    assert "burgers" not in load_registry(mine).cards
    monkeypatch.setenv(VARIABLE, "")
    assert load_registry() == packaged


def test_the_same_channel_in_two_folders_is_one_channel(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, MINE.replace("name: mine", f"name: {name}"), SALINITY, name) for name in "ab"]
    registry = load_registry(os.pathsep.join(map(str, folders)))
    assert registry.channels.count("salinity") == 1
    (folders[1] / "channels.yaml").write_text(SALINITY.replace("grams", "kilograms"))
    with pytest.raises(UserError) as caught:
        load_registry(os.pathsep.join(map(str, folders)))
    assert re.search(r"b/channels.yaml: salinity: a channel of this name.*is in .*a/channels.yaml", str(caught.value))


def test_what_is_packaged_cannot_be_redefined(tmp_path: Path) -> None:
    write(tmp_path, MINE, "density: {description: population, unit: heads}\n", "mine")
    with pytest.raises(UserError, match=r"channels.yaml: density: .* is in .*cards/channels.yaml. If it is the same"):
        load_registry(tmp_path)
    card = MINE.replace("name: mine", "name: shear_flow").replace(", salinity: [salinity]", "")
    (tmp_path / "channels.yaml").unlink()
    (tmp_path / "datasets" / "mine.yaml").unlink()
    (tmp_path / "datasets" / "shear_flow.yaml").write_text(card)
    with pytest.raises(UserError) as caught:
        load_registry(tmp_path)
    where = (
        rf"{re.escape(str(tmp_path))}/datasets/shear_flow.yaml: name: 'shear_flow' is taken by .*cards/datasets/shear"
    )
    assert re.search(where, str(caught.value))


def test_taken_abbreviations_and_folders_without_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    write(tmp_path, CARD.replace("name: burgers", "name: burgers_two"), name="burgers_two")
    assert re.search(r"abbreviation: 'BU' is taken by .*burgers.yaml", complaint(tmp_path))
    with pytest.raises(UserError, match=r"nowhere: expected a folder of your own cards .* found no folder.*--registry"):
        load_registry(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "empty"))
    with pytest.raises(UserError, match=rf"empty: .* found neither in it. It is named by {VARIABLE}"):
        load_registry()


def test_packaged_cards_are_complete_and_have_ranges(packaged: Registry) -> None:
    for card in packaged.select(None):
        assert card.train, card.name
        assert card.source.startswith("https://"), card.name
        assert card.citation, card.name
        assert card.abbreviation.isupper() or card.abbreviation == "TRL2D"
        assert card.ranges, card.name
        assert card.domain, card.name
        # Of viscoelastic_instability's 47 trajectories in valid and test, nobody says how many are which.
        assert (card.test_trajectories is None) == (card.abbreviation == "VI")
    assert packaged.card("turbulent_radiative_layer_2D").ranges == {"density": (0.0, None), "pressure": (0.0, None)}
    assert packaged.card("helmholtz_staircase").ranges == {"mask": (0.0, 1.0)}


def test_the_mini_wells_data_lie_within_the_ranges(packaged: Registry, tiny_well: Path) -> None:
    checked = set()
    for card in packaged.select(None):
        for path in sorted((tiny_well / card.name).glob("data/*/*.hdf5")):
            with WellFile(path, card) as file:
                for trajectory in range(file.num_trajectories):
                    state = file.read(trajectory, 0, file.num_frames)
                    constants = file.constants(trajectory)
                    values = dict(zip(card.state_channels, state.swapaxes(0, 1), strict=True))
                    values |= dict(zip(card.constant_channels, constants, strict=True))
                    for name, (lowest, highest) in card.ranges.items():
                        assert lowest is None or values[name].min() >= lowest, (path, name)
                        assert highest is None or values[name].max() <= highest, (path, name)
                        checked.add((card.name, name))
    assert checked == {(card.name, name) for card in packaged.select(None) for name in card.ranges}


def test_the_mini_wells_data_conserve_what_the_cards_say(packaged: Registry, tiny_well: Path) -> None:
    kinds = set()
    for card in packaged.select(None):
        path = sorted((tiny_well / card.name).glob("data/test/*.hdf5"))[0]
        with WellFile(path, card) as file:
            state = file.read(0, 0, file.num_frames).astype(np.float64)
        fields = dict(zip(card.state_channels, state.swapaxes(0, 1), strict=True))  # channel -> (T, X, Y)
        for conserved in card.conserved:
            kinds.add(conserved.kind)
            values = [fields[name] for name in conserved.channels]
            if conserved.kind == "divergence":
                assert divergence(values, card).std() < 0.2 * gradient_x(values[0], card).std(), card.name
                continue
            kept = values if conserved.kind == "mean" else [sum(value**2 for value in values)]
            for value in kept:
                mean = value.mean(axis=(1, 2))
                assert np.abs(mean - mean[0]).max() < 1e-6 * value.std(), (card.name, conserved)
    assert kinds == {"mean", "mean_square", "divergence"}


def gradient_x(field: np.ndarray, card: Card) -> np.ndarray:
    """Centred differences (T, X, Y) along x, which is periodic in every dataset with a divergence."""
    lower, upper = card.domain[0]
    return (np.roll(field, -1, 1) - np.roll(field, 1, 1)) * field.shape[1] / (2 * (upper - lower))


def divergence(velocity: Sequence[np.ndarray], card: Card) -> np.ndarray:
    """By centred differences (T, X, Y - 2), off the ends of y, where there may be walls."""
    lower, upper = card.domain[1]
    along_y = (velocity[1][:, :, 2:] - velocity[1][:, :, :-2]) * velocity[1].shape[2] / (2 * (upper - lower))
    return gradient_x(velocity[0], card)[:, :, 1:-1] + along_y


def test_a_users_card_loads(tmp_path: Path) -> None:
    card = load_folders([write(tmp_path)]).card("burgers")
    assert (card.windows, card.tokens, card.num_frames) == (42, 128, (3, 11))
    assert card.state_channels == ("temperature", "velocity_x", "velocity_y", "S_xx", "S_xy", "S_yx", "S_yy")
    assert (card.constant_channels, card.scalars, card.dt, card.license) == (("porosity",), ("nu",), 0.5, "")
    assert card.boundary == (("PERIODIC", "PERIODIC"), ("WALL", "OPEN"))
    assert published_scores(card, "wavelit", "1:20") == {"U-net": 0.75}
    assert [table.context for table in card.published] == [1]
    assert (card.domain, card.test_trajectories) == (((0.0, 4.0), (-1.0, 1.0)), 2)
    assert card.conserved == (Conserved("mean", ("temperature",)), Conserved("mean_square", ("S_xx", "S_yy")))


def test_check_fields_accepts_any_order_and_prints_both_lists(tmp_path: Path) -> None:
    card = load_folders([write(tmp_path)]).card("burgers")
    card.check_fields({"S": 2, "velocity": 1, "temperature": 0}, {"porosity": 0}, "a.hdf5")
    with pytest.raises(UserError) as caught:
        card.check_fields({"temperature": 0, "velocity": 2, "salt\x1b": 0}, {"porosity": 0}, "a.hdf5, burgers")
    message = str(caught.value)
    assert message.startswith("a.hdf5, burgers: its state fields are not those of the card 'burgers'")
    assert "the card names: temperature (t0), velocity (t1), S (t2)\n" in message
    assert "the file holds: temperature (t0), velocity (t2), 'salt\\x1b' (t0)\n" in message
    with pytest.raises(UserError, match=r"constant fields(.|\n)*names: porosity \(t0\)\n(.|\n)*holds: none"):
        card.check_fields({"temperature": 0, "velocity": 1, "S": 2}, {}, "a.hdf5")


MISTAKES = [
    # text replaced, its replacement, place and reason in the message
    ("scalars:", "scalers:", r"unknown key 'scalers'. Did you mean 'scalars'\?"),
    ("scalars:", '"[key]":', r"\[key\]: unknown key '\[key\]'. Valid: "),
    ("grid: [32, 16]\n", "", r"burgers\.yaml: missing key 'grid'"),
    ("t2: {S", "t3: {S", r"state.t3: unknown key 't3'. Valid: t0, t1, t2"),
    ("frames: 11", "frame: 11", r"train\[0\].frame: unknown key 'frame'. Did you mean 'frames'"),
    ("name: burgers", "name: burger", r"name: expected the name of the file, 'burgers', got 'burger'"),
    ("name: burgers", "name: ../burgers", r"name: expected a name, got '../burgers'"),
    ("abbreviation: BU", "abbreviation: 7", r"abbreviation: expected a name, got 7"),
    ("Burgers turbulence", "[1, 2]", r"description: expected one line of text, got \[1, 2\]"),
    ("Burgers turbulence", r'"\ud800"', r"expected (one line of text|plain YAML)"),
    ("Burgers turbulence", r'"\e[2J"', r"description: expected one line of text"),
    ("[velocity_x, velocity_y]", "[velocity_x, velocty_y]", r"t1.velocity\[1\]: .*got 'velocty_y'. Did you mean 'velo"),
    ("[velocity_x, velocity_y]", "[velocity_x]", r"state.t1.velocity: expected a list of 2, got \['velocity_x'\]"),
    ("[S_xx, S_xy, S_yx, S_yy]", "[S_xx, S_xy, S_yy]", r"state.t2.S: expected a list of 4"),
    ("{temperature: [temperature]}", "{temperature: temperature}", r"state.t0.temperature: expected a list of 1"),
    ("{temperature: [temperature]}", "[temperature]", r"state.t0: expected a mapping"),
    ("S_yx, S_yy]", "S_xy, S_yy]", r"state.t2.S: channel 'S_xy' is already used by state.t2.S"),
    ("{porosity: [porosity]}", "{porosity: [S_xx]}", r"constant.t0.porosity: channel 'S_xx' is already used by state"),
    (
        "{porosity: [porosity]}",
        "{velocity: [porosity]}",
        r"constant.t0.velocity: field 'velocity' is already used by s",
    ),
    ("[nu]", "[nu, nu]", r"scalars: expected names of scalars, each once"),
    (
        "[WALL, OPEN]",
        "[WALL, OPENED]",
        r"boundary.y\[1\]: expected a boundary type, got 'OPENED'. Did you mean 'OPEN'\?",
    ),
    ("[WALL, OPEN]", "[WALL]", r"boundary.y: expected a list of 2"),
    ("[WALL, OPEN]", "[WALL, PERIODIC]", r"boundary.y: expected PERIODIC at both ends or at neither"),
    ("grid: [32, 16]", "grid: [32, 1]", r"grid\[1\]: expected a whole number of at least 2, got 1"),
    ("ranges: {temp", "ranges: {temq", r"ranges.temqerature: expected a channel of this card.*Did you mean 'temp"),
    ("[0, null]", "[null, null]", r"ranges.temperature: expected at least one limit"),
    ("[0, null]", "[0]", r"ranges.temperature: expected a list of 2"),
    ("[0, null]", "[1, -1.5]", r"ranges.temperature: expected the lowest value first, got \[1, -1.5\]"),
    ("[0, null]", "[.nan, 1]", r"ranges.temperature\[0\]: expected a number, got nan"),
    ("[0, null]", "[0, 1_0]", r"ranges.temperature\[1\]: expected a number, got '1_0'"),
    ("[0, null]", "[0, true]", r"ranges.temperature\[1\]: expected a number, got True"),
    ("grid: [32, 16]", "grid: [32, true]", r"grid\[1\]: expected a whole number of at least 2, got True"),
    ("grid: [32, 16]", "grid: [32, 0x" + "f" * 1990 + "]", r"grid\[1\]: expected a whole number"),
    ("grid: [32, 16]", "grid: [32, " + "9" * 5000 + "]", r"a value of more than 2000 characters"),
    ("x: [0, 4]", "x: [4, 4]", r"domain.x: expected the lower end first, \[lower, upper\], got \[4, 4\]"),
    ("x: [0, 4]", "z: [0, 4]", r"domain.z: unknown key 'z'"),
    (
        "test_trajectories: 2",
        "test_trajectories: 0",
        r"test_trajectories: expected a whole number of at least 1, got 0",
    ),
    (
        "kind: mean, ",
        "kind: maen, ",
        r"conserved\[0\].kind: expected a kind of conserved quantity.*Did you mean 'mean'",
    ),
    (
        "channels: [temperature]",
        "channels: [porosity]",
        r"channels\[0\]: expected a state channel of this card, got 'por",
    ),
    ("channels: [temperature]", "channels: []", r"conserved\[0\].channels: expected at least one channel, each once"),
    (
        "kind: mean, ",
        "kind: divergence, ",
        r"conserved\[0\].channels: expected the two channels of a velocity, x then y",
    ),
    ("dt: 0.5", "dt: 1:30", r"dt: expected a number above 0, got '1:30'"),  # 90 in YAML 1.1
    ("dt: 0.5", "dt: 010", r"dt: expected a number above 0, got '010'"),  # 8 in YAML 1.1
    ("dt: 0.5", "dt: .nan", r"dt: expected a number above 0, got nan"),
    ("dt: 0.5", "dt: -1", r"dt: expected a number above 0, got -1"),
    ("dt: 0.5", "dt: 2020-99-99", r"dt: expected a number above 0, got '2020-99-99'"),
    ("dt: 0.5", f"dt: {'9' * 41}", r"expected plain YAML .* a number of more than 40 digits"),
    ("frames: 3", "frames: 1", r"train\[1\].frames: expected a whole number of at least 2, got 1"),
    ("protocol: wavelit", "protokol: wavelit", r"published\[0\]: missing key 'protocol'"),
    (
        "protocol: wavelit",
        "protocol: wavelit\n    context: 0",
        r"published\[0\].context: expected a whole number of at l",
    ),
    ('"1:20"', "20", r"expected a text as key, got 20; put it in quotes .*line 29"),
    ("U-net: 0.5", "U-net: good", r"published\[0\].one_step.U-net: expected a number above 0, got 'good'"),
    ("dt: 0.5", "dt: 0.5\ndt: 0.25", r"key 'dt' twice"),
    ("{temperature: [temperature]}", "{a: [temperature], a: [temperature]}", r"key 'a' twice"),
    ("dt: 0.5", "dt: !!python/object/apply:os.getcwd []", r"tags are not used"),
    ("dt: 0.5", "dt: !!int ''", r"tags are not used"),
    ("grid: [32, 16]", "grid: &a [*a, *a]", r"anchors and aliases are not used"),
]


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES)
def test_a_mistake_in_a_card_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert CARD.count(old) == 1
    said = complaint(write(tmp_path, CARD.replace(old, new, 1)))
    assert "burgers.yaml" in said
    assert re.search(message, said), said
    assert len(said) < 800


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a mapping .*got None"),
        (b"- a\n- b\n", "expected a mapping"),
        (b"just words", "expected a mapping"),
        (b"\xff\xfe\x00", "expected plain YAML in UTF-8"),
        (b"a: \x00", "expected plain YAML"),
        (b"[" * 50_000, "expected plain YAML"),
        (b"a: " * 1000, "expected plain YAML"),
        (b"{1: 2}", "expected a text as key, got 1; put it in quotes"),
        (b"? {a: b}\n: c", "expected plain YAML"),
        (b"? [a, b]\n: c", "expected plain YAML"),
        (b"#" * 70_000, "expected at most 65536 bytes"),
    ],
)
def test_a_file_that_is_no_card_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    assert re.search(message, complaint(write(tmp_path, content)))


def test_an_odd_grid_may_be_described(tmp_path: Path) -> None:
    root = write(tmp_path, CARD.replace("grid: [32, 16]", "grid: [31, 16]"))
    assert load_folders([root]).card("burgers").grid == (31, 16)


def test_mistakes_in_channels_are_named(tmp_path: Path) -> None:
    assert "key 'S_xx' twice" in complaint(write(tmp_path, channels=CHANNELS + "S_xx: {description: a, unit: b}"))
    assert "duplicate_of: expected a channel listed above, got 'S_xz'. Did you mean 'S_xy'?" in complaint(
        write(tmp_path, channels=CHANNELS.replace("duplicate_of: S_xy", "duplicate_of: S_xz"))
    )
    assert "p: missing key 'unit'" in complaint(write(tmp_path, channels="p: {description: pressure}"))
    assert "expected a name, got 'p q'" in complaint(write(tmp_path, channels="p q: {description: a, unit: b}"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_cards_end_in_success_or_user_error(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(CARD.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        stop = data.draw(st.integers(start, min(len(content), start + 30)))
        junk = st.sampled_from(
            [b"0x_", b"<<: ", b"- ", b"? ", b"!!int ''", b"1:60:60", b"&a ", b"*a", b"{", b"]", b"9e999"]
        )
        content[start:stop] = data.draw(st.one_of(junk, st.binary(max_size=8)))
    root = write(tmp_path, bytes(content))
    try:
        channels = load_folders([root]).card("burgers").state_channels
    except UserError:
        return
    assert set(channels) <= set(re.findall(r"\w+", CHANNELS))
