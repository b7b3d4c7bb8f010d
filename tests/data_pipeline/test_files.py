"""Files and folders that appear whole or not at all, and their digests."""

import hashlib
from pathlib import Path

import pytest

from data_pipeline.files import UserError, atomic_file, atomic_path, sha256, sha256_file, write_whole


@pytest.mark.parametrize("folder", [False, True])
def test_a_path_is_replaced_only_by_what_is_whole(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "target"

    def write(path: Path, text: str) -> None:
        if folder:
            (path / "deeper").mkdir(parents=True)
        (path / "deeper" / text if folder else path).write_text(text)

    def found() -> str:
        (text,) = [file.read_text() for file in ((target / "deeper").iterdir() if folder else [target])]
        return text

    def write_half() -> None:
        with atomic_path(target) as path:
            write(path, "half")
            raise ValueError("halfway")

    write(target, "old")
    with pytest.raises(ValueError, match="halfway"):
        write_half()
    assert (found(), [one.name for one in tmp_path.iterdir()]) == ("old", ["target"])
    with atomic_path(target) as path:
        write(path, "whole")
    assert (found(), [one.name for one in tmp_path.iterdir()]) == ("whole", ["target"])


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").write_text("kept")
    with pytest.raises(IsADirectoryError), atomic_file(tmp_path / "target") as file:
        file.write(b"new")
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "kept"]


def test_a_folder_that_cannot_be_written_ends_in_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/new: cannot be written \(.*\); choose a folder that can"):
        write_whole(tmp_path / "file" / "new", b"content")
    write_whole(tmp_path / "made" / "new", b"content")
    assert (tmp_path / "made" / "new").read_bytes() == b"content"


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one")
    expected = hashlib.sha256(b"onetwo").hexdigest()
    assert sha256(b"one", memoryview(b"two")) == sha256_file(tmp_path / "file", b"two") == expected
