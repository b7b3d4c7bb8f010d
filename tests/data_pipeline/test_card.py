"""A card of one's own: what it may say, and every complaint about a wrong one."""

import re
from pathlib import Path

import pytest
from handmade_cards import CARD, CHANNELS, complaint, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.files import UserError
from data_pipeline.registry import Conserved, load_folders


def test_a_users_card_loads(tmp_path: Path) -> None:
    card = load_folders([write(tmp_path)]).card("burgers")
    assert (card.windows, card.tokens, card.num_frames) == (42, 128, (3, 11))
    assert card.state_channels == ("temperature", "velocity_x", "velocity_y", "S_xx", "S_xy", "S_yx", "S_yy")
    assert (card.constant_channels, card.scalars, card.dt, card.license) == (("porosity",), ("nu",), 0.5, "")
    assert card.boundary == (("PERIODIC", "PERIODIC"), ("WALL", "OPEN"))
    assert card.published_scores("wavelit", "1:20") == {"U-net": 0.75}
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
    assert "missing: S; unknown: 'salt\\x1b'; of another tensor order: velocity\n" in message
    with pytest.raises(
        UserError, match=r"constant fields(.|\n)*names: porosity \(t0\)\n(.|\n)*holds: none(.|\n)*porosity"
    ):
        card.check_fields({"temperature": 0, "velocity": 1, "S": 2}, {}, "a.hdf5")


MISTAKES = [
    # text replaced, its replacement, place and reason in the message
    ("scalars:", "scalers:", r"unknown key 'scalers'. Did you mean 'scalars'\?"),
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
    ("[0, null]", "[0, 1e3]", r"ranges.temperature\[1\]: expected a number, got '1e3'. YAML reads 1e-3 as text"),
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
    ("dt: 0.5", "dt: 5e-1", r"dt: expected a number above 0, got '5e-1'. YAML reads 1e-3 as text"),
    ("dt: 0.5", "dt: .nan", r"dt: expected a number above 0, got nan"),
    ("dt: 0.5", "dt: -1", r"dt: expected a number above 0, got -1"),
    ("dt: 0.5", "dt: 2020-99-99", r"expected plain YAML"),
    ("frames: 3", "frames: 1", r"train\[1\].frames: expected a whole number of at least 2, got 1"),
    ("protocol: wavelit", "protokol: wavelit", r"published\[0\]: missing key 'protocol'"),
    (
        "protocol: wavelit",
        "protocol: wavelit\n    context: 0",
        r"published\[0\].context: expected a whole number of at l",
    ),
    ('"1:20"', "1:20", r"expected a text as key, got 1:20; put it in quotes .*line 29"),
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
