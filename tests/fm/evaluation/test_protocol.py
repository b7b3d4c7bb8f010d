"""Named protocols, and protocols in files of the user's own."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from fm.evaluation.protocol import PROTOCOLS, Protocol, Window, load_protocol


def test_windows_are_one_indexed_and_inclusive() -> None:
    assert Window(1, 20).steps(20) == (1, 20)
    assert Window(21, 60).steps(59) is None
    thirds = PROTOCOLS["thirds"].windows
    assert [thirds[name].steps(40) for name in thirds] == [(1, 13), (14, 26), (27, 40)]
    assert [thirds[name].steps(2) for name in thirds] == [None, (1, 1), (2, 2)]
    assert thirds["last_third"].steps(0) is None


@pytest.mark.parametrize("bad", [(0, 3), (4, 3), (1, 4, 3), (1, 1, -1)])
def test_impossible_windows_are_refused(bad: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="1 <= first <= last"):
        Window(*bad)


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("wavelit", [(1, 20), (21, 60)]),
        ("appendix_g", [(2, 8), (9, 26), (27, 56)]),
        ("well", [(2, 8), (9, 26)]),
        ("well@1", [(6, 12), (13, 30)]),
    ],
)
def test_named_protocols_have_the_published_windows(name: str, windows: list[tuple[int, int]]) -> None:
    protocol = load_protocol(name)
    assert [window.steps(10**6) for window in protocol.windows.values()] == windows
    assert protocol.trajectories == ("mean" if name.startswith("well") else "median")
    assert Protocol.from_json(json.loads(json.dumps(protocol.to_json()))) == protocol
    assert f"{protocol.name} v{protocol.version}" in protocol.describe()


def test_versions_of_the_papers_protocols_start_where_the_paper_does() -> None:
    """Version 2: four frames are given, so trajectories of 20 frames have 16 steps. Version 1 stays as it was."""
    for name in ("wavelit", "appendix_g"):
        assert (load_protocol(name).version, load_protocol(name).last_given) == (2, 3)
        assert (load_protocol(f"{name}@1").version, load_protocol(f"{name}@1").last_given) == (1, 0)
        assert load_protocol(f"{name}@2") is load_protocol(name)
    wavelit = load_protocol("wavelit")
    viscoelastic, helmholtz = [20 - 4, 60 - 4], [50 - 4]
    assert [wavelit.covered(window, viscoelastic) for window in wavelit.windows] == [(1, 16), None]
    assert [wavelit.covered(window, helmholtz) for window in wavelit.windows] == [(1, 20), (21, 46)]
    first = load_protocol("wavelit@1")
    assert [first.covered(window, viscoelastic) for window in first.windows] == [(1, 20), None]
    assert wavelit.covered("1:20", [0, 0]) is None
    assert wavelit.covered("1:20", [0, 30]) == (1, 20)  # a trajectory that is too short for a rollout has none


def test_bad_protocols_are_refused() -> None:
    valid = (
        r"expected one of wavelit, appendix_g, well, thirds, or an earlier version \(wavelit@1, appendix_g@1, well@1\)"
    )
    for name in ("walrus", "wavelit@3"):
        with pytest.raises(UserError, match=f"{valid}; got '{name}'"):
            load_protocol(name)
    wrong = (
        {"trajectories": "mode"},
        {"order": "both"},
        {"short": "pad"},
        {"eps": -1.0},
        {"max_steps": 0},
        {"one_step_windows": 0},
    )
    for change in wrong:
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(PROTOCOLS["thirds"], **change)


TEXT = """
name: early
version: 2
windows: {"1:5": [1, 5], first_third: {first: 1, last: 1, parts: 3}, "3:4": {first: 3, last: 4}}
start: 1
context: 1
max_steps: 30
one_step_windows: null
eps: 1.0e-5
channels: median
steps: median
trajectories: mean
order: per_trajectory
short: cut
split: valid
"""


def test_a_file_says_every_field(tmp_path: Path) -> None:
    path = tmp_path / "early.yaml"
    path.write_text(TEXT)
    windows = {"1:5": Window(1, 5), "first_third": Window(1, 1, 3), "3:4": Window(3, 4)}
    assert load_protocol(path) == Protocol(
        *("early", 2, windows, 1, 1, 30, None, 1e-5, "median", "median", "mean", "per_trajectory", "cut", "valid")
    )
    assert set(re.findall(r"^(\w+):", TEXT, re.MULTILINE)) == {field.name for field in dataclasses.fields(Protocol)}


def test_what_a_file_leaves_out_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "short.yml"
    path.write_text('name: short\nversion: 1\nwindows: {"1:20": [1, 20], "21:60": [21, 60]}\nmax_steps: 60\n')
    assert load_protocol(str(path)) == dataclasses.replace(load_protocol("wavelit@1"), name="short")


def test_a_name_is_a_named_protocol() -> None:
    assert load_protocol("wavelit") is PROTOCOLS["wavelit"]
    with pytest.raises(UserError, match=r"got 'early'. One of your own is a file that ends in \.yaml"):
        load_protocol("early")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version: 2\n", "", r"early\.yaml: missing key 'version'"),
        ("start: 1", "starts: 1", r"unknown key 'starts'\. Did you mean 'start'\?"),
        ("name: early", "name: wavelit", r"name: expected a name of its own, not one of wavelit, .* Choose another"),
        ("version: 2", "version: 0", r"version: expected a whole number of at least 1, got 0"),
        ("[1, 5]", "[1, 5, 6]", r"windows\.1:5: expected a list of 2"),
        ("[1, 5]", "[5, 1]", r"windows\.1:5: window: expected 1 <= first <= last"),
        ('"1:5"', "one_step", r"windows\.one_step: expected another name for a window than 'one_step', got"),
        ("parts: 3", "part: 3", r"windows\.first_third\.part: unknown key 'part'\. Did you mean 'parts'\?"),
        ("parts: 3", "parts: 0", r"first_third\.parts: expected a whole number of at least 1, got 0"),
        ("eps: 1.0e-5", "eps: 1_0", r"eps: expected a number, got '1_0'"),
        ("eps: 1.0e-5", "eps: -1", r"early\.yaml: protocol: expected .*eps >= 0"),
        ("steps: median\n", "steps: modus\n", r"steps: expected a statistic, got 'modus'\. Valid: mean, median"),
        ("per_trajectory", "per_traject", r"order: expected an order of averages.*Did you mean 'per_trajectory'\?"),
        (
            "max_steps: 30",
            "max_steps: 4",
            r"protocol early: expected max_steps that cover the windows, 5 at least, got",
        ),
        ("start: 1", "start: 1\nstart: 2", "key 'start' twice"),
        ("split: valid", "split: 3", "split: expected a name, got 3"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert TEXT.count(old) == 1
    path = tmp_path / "early.yaml"
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(UserError, match=message) as caught:
        load_protocol(path)
    assert str(path) in str(caught.value)


def test_no_windows_and_no_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    with pytest.raises(UserError, match=r"none\.yaml: expected a YAML file, found none"):
        load_protocol(path)
    path.write_text("name: none\nversion: 1\nwindows: {}\n")
    with pytest.raises(UserError, match=r"none\.yaml: protocol none: expected at least one window, got none"):
        load_protocol(path)
