"""Hostile and damaged cards, statistics, lists of URLs and URLs end in success or in UserError, and reach nothing."""

from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from fuzzing import CHANGES, EDITS, TEXTS, Guard, cases, edited, mutated
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.registry import load_folders, load_registry, packaged_folder
from data_pipeline.remote import PROTOCOLS, RemoteFolder, is_url
from data_pipeline.schema import read_yaml
from data_pipeline.well.download import url_registry
from data_pipeline.well.stats import read_stats
from data_pipeline.windows.loader import open_readers

MAZE = "acoustic_scattering_maze"
CARD = load_registry().card(MAZE)


def spoilt(content: bytes, changes: list, edits: list | None) -> bytes:
    """YAML with its values changed, or its bytes."""
    if edits is None:
        return yaml.safe_dump(mutated(yaml.safe_load(content), changes), sort_keys=False).encode()
    return edited(content, edits)


@pytest.fixture(scope="module")
def folder(guard: Guard) -> Path:
    """A user's registry folder with the maze's card and its channels."""
    folder = Path(guard.root) / "registry"
    (folder / "datasets").mkdir(parents=True)
    channels = {name: {"description": "a quantity", "unit": "none"} for name in CARD.state_channels}
    channels |= {name: {"description": "a material", "unit": "none"} for name in CARD.constant_channels}
    channels["velocity_y"]["duplicate_of"] = "velocity_x"
    (folder / "channels.yaml").write_text(yaml.safe_dump(channels, sort_keys=False))
    card = packaged_folder() / "datasets" / f"{MAZE}.yaml"
    (folder / "datasets" / f"{MAZE}.yaml").write_bytes(card.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["channels.yaml", f"datasets/{MAZE}.yaml"])
@cases(380)
@given(changes=CHANGES, edits=st.none() | EDITS)
def test_cards(guard: Guard, folder: Path, name: str, changes: list, edits: list | None) -> None:
    path = folder / name
    content = path.read_bytes()
    assert guard.check(lambda: load_folders([folder]))
    path.write_bytes(spoilt(content, changes, edits))
    guard.check(lambda: load_folders([folder]).snapshot())
    path.write_bytes(content)


def test_yaml_is_nested_32_deep_at_most(tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    for depth in (31, 32):
        path.write_text("[" * depth + "]" * depth)
        assert str(read_yaml(path)) == "[" * depth + "]" * depth
    for depth in (33, 500, 20_000):
        path.write_text("[" * depth + "]" * depth)
        with pytest.raises(UserError, match="nested more than 32 deep"):
            read_yaml(path)


LETTERS = "abcdefgh"  # a list of nine lists of nine lists ...: a few hundred bytes that stand for 9^8 numbers
BOMB = "a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0]\n" + "".join(
    f"{outer}: &{outer} [{', '.join([f'*{inner}'] * 9)}]\n" for inner, outer in pairwise(LETTERS)
)


@cases(150)
@given(changes=CHANGES, edits=st.none() | EDITS)
def test_stats(guard: Guard, tiny_well: Path, changes: list, edits: list | None) -> None:
    content = (tiny_well / MAZE / "stats.yaml").read_bytes()
    path = Path(guard.root) / "stats.yaml"
    path.write_bytes(spoilt(content, changes, edits))
    guard.check(lambda: read_stats(path, CARD))


@pytest.mark.parametrize("raw", [BOMB + "mean: {pressure: *h}", "2020-99-99: 1", "mean: 0x_", "9" * 5000, "? [a]\n: 1"])
def test_stats_that_only_look_right(guard: Guard, raw: str) -> None:
    path = Path(guard.root) / "stats.yaml"
    path.write_text(raw)
    assert not guard.check(lambda: read_stats(path, CARD))


@cases(120)
@given(changes=CHANGES, edits=st.none() | EDITS)
def test_url_registries(guard: Guard, changes: list, edits: list | None) -> None:
    base = "https://example.org/the_well/datasets/maze"
    files = {split: [f"{base}/data/{split}/a_{number}.hdf5" for number in (1, 2)] for split in ("train", "valid")}
    content = {"maze": {"stats": [f"{base}/stats.yaml"], **files}, "other": {"stats": [f"{base}/stats.yaml"]}}
    path = Path(guard.root) / "registry.yaml"
    raw = yaml.safe_dump(mutated(content, changes)).encode()
    path.write_bytes(raw if edits is None else edited(raw, edits))
    guard.check(lambda: url_registry(path))


URL_PARTS = (
    *("pipe:", "file://", "ssh://", "http://", "https://", "s3://", "hf://", "simplecache::", "zip://", "git+ssh://"),
    *("touch secret", "/etc/passwd", "user:word@", "host", "/", "//", "/..", "/%2e%2e", "?x", "#x", ":80", "\\", "\n"),
    "|",
)


@cases(250)
@given(
    parts=st.lists(st.sampled_from(URL_PARTS) | st.text(max_size=4), min_size=1, max_size=6),
    name=st.sampled_from(TEXTS),
)
def test_urls(guard: Guard, parts: list[str], name: str) -> None:
    url = "".join(parts)
    if not is_url(url):
        return
    if guard.check(lambda: RemoteFolder(url)):
        folder = RemoteFolder(url)
        assert folder.url.startswith(tuple(f"{protocol}://" for protocol in PROTOCOLS))
        assert ".." not in folder.url.replace("%2e", ".").split("/")
        assert "word@" not in f"{folder} {folder!r}"
        guard.check(lambda: folder.file(name))
        guard.check(lambda: folder / name)
    else:
        assert not guard.check(lambda: open_readers(url, None, "train"))
