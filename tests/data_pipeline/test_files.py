"""Files and folders that appear whole or not at all, their digests, ways out of a folder, and messages."""

import hashlib
import os
import signal
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import UserError, printable_stdout
from data_pipeline.files import atomic_file, atomic_path, inside, parse_json, sha256, sha256_file, write_whole


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


def replace_until_killed(target: Path, renames: int) -> None:
    """Replace a folder in another process, which is killed when it is about to rename for the last time of these."""

    def die(event: str, arguments: object) -> None:
        if event == "os.rename" and next(countdown) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    countdown = iter(range(renames - 1, -1, -1))
    child = os.fork()
    if child == 0:
        sys.addaudithook(die)
        try:
            with atomic_path(target) as path:
                path.mkdir()
                (path / "new").write_text("new")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("renames", [1, 2])
def test_a_folder_that_a_killed_process_moved_away_is_put_back(tmp_path: Path, renames: int) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    replace_until_killed(target, renames)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ZeroDivisionError), atomic_path(target):
        raise ZeroDivisionError
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["target", "target/old"]
    replace_until_killed(target, renames)
    with atomic_path(target) as path:
        path.mkdir()
        (path / "newer").write_text("newer")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["target", "target/newer"]


def test_what_a_process_that_runs_is_writing_stays(tmp_path: Path) -> None:
    half = tmp_path / f"target.{os.getppid()}.tmp"
    half.write_text("half")
    (tmp_path / "target.notes.tmp").write_text("not ours")
    write_whole(tmp_path / "target", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["target", "target.notes.tmp", half.name])


def test_content_is_on_the_disk_before_its_name_and_the_name_when_the_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(("sync", os.fstat(descriptor).st_ino))

    def noting_replace(source: Path, target: Path) -> None:
        replace(source, target)
        done.append(("rename", target.stat().st_ino))

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    write_whole(tmp_path / "file", b"content")
    file, folder = (tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino
    assert done == [("sync", file), ("rename", file), ("sync", folder)]


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


def test_no_way_out_of_a_folder_is_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "root_of_another"
    (root / "deeper").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (root / "file").write_text("own")
    (root / "own").symlink_to("file")
    (root / "folder").symlink_to(outside)
    (root / "secret").symlink_to("../root_of_another/secret")
    (root / "chain").symlink_to("secret")
    (root / "circle").symlink_to("circle")
    (tmp_path / "link").symlink_to(root)
    for name in ("file", "own", "deeper", "deeper/absent", "."):
        assert inside(root, name) == root / name
        assert inside(tmp_path / "link", name) == tmp_path / "link" / name  # the user's own link
    ways = ("..", "../root", "deeper/../../x", str(outside / "secret"), str(root / "file"), "folder", "folder/secret")
    for name in (*ways, "secret", "chain", "a\\b", "a\0b", "x" * 10_000 + "/../../.."):
        with pytest.raises(UserError, match=r"expected (a path|paths) inside it") as caught:
            inside(root, name)
        assert len(str(caught.value)) < 1000


def test_links_of_the_hubs_cache_lead_to_its_own_blobs_alone(tmp_path: Path) -> None:
    snapshot, other = tmp_path / "models--a--b/snapshots/main", tmp_path / "models--c--d/blobs"
    for folder in (snapshot, snapshot.parents[1] / "blobs", other):
        folder.mkdir(parents=True)
        (folder / "1").write_text("blob")
    (snapshot / "own").symlink_to("../../blobs/1")
    (snapshot / "other").symlink_to("../../../models--c--d/blobs/1")
    assert inside(snapshot, "own").read_text() == "blob"
    with pytest.raises(UserError, match="leads out of it"):
        inside(snapshot, "other")
    (snapshot.parents[1] / "blobs/1").unlink()
    (snapshot.parents[1] / "blobs").rmdir()
    (snapshot.parents[1] / "blobs").symlink_to(other)
    with pytest.raises(UserError, match="leads out of it"):
        inside(snapshot, "own")


HOSTILE = "a\x1b[31m\x9b2J\r\x07\x00\u202e\ud800b\n\tc é"


def test_a_message_and_what_is_printed_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    clean = "a\\x1b[31m\\x9b2J\\r\\x07\\x00\\u202e\\ud800b\n\tc é"
    assert str(UserError(HOSTILE)) == clean
    with printable_stdout():
        print(HOSTILE)
    assert capsys.readouterr().out == f"{clean}\n"


def test_a_message_has_an_end() -> None:
    message = str(UserError("x" * 10**6))
    assert len(message) < 6100
    assert message.endswith("... (1000000 characters)")


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 1}}', '{"a": NaN}', "[" * 10**5, "9" * 5000])
def test_json_with_two_values_or_without_end_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="here: cannot be read as JSON"):
        parse_json(text.encode(), "here")
