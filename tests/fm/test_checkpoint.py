"""Saving from a thread: the bytes, the consistency, the ways a save can fail, kills, and what a run says of them."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import make_spec
from safetensors.torch import save as serialize_tensors
from whole_runs import file_size_limit, saved_steps

from data_pipeline.errors import UserError
from fm.checkpoint import (
    CheckpointWriter,
    Snapshot,
    list_checkpoints,
    load_checkpoint,
    load_pretrained,
    look_at_newest,
    newest_checkpoint,
    prune_checkpoints,
    take_snapshot,
    verify_checkpoint,
    write_checkpoint,
)
from fm.lab.status import read_status
from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.training.parallel import named_state

NOBODY = 65534


FACTS: dict[str, Any] = {  # what a run adds to its state, without a word of content
    **{name: {} for name in ("recipe", "shards", "symmetries", "sampling")},
    "registry": {"channels": [], "cards": {}},
    "guard": {"refused": [], "history": {}},
    "gate": {"before": None, "best": None, "failed": False, "limit": None, "scored": []},
}


def make_state(width: int = 16) -> tuple[WaveLiTFM, WaveLiTFM, torch.optim.Optimizer]:
    """A model, its average, and an optimizer that has moved all parameters but one."""
    specs = [make_spec("shear_flow"), make_spec("active_matter")]
    model, ema = (WaveLiTFM(ModelConfig(width=width, depth=2, heads=2), specs, seed) for seed in (0, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in list(model.parameters())[1:]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, ema, optimizer


def make_snapshot(step: int, width: int = 16) -> Snapshot:
    return snapshot_of(step, *make_state(width), FACTS)


def snapshot_of(
    step: int, model: WaveLiTFM, ema: WaveLiTFM, optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> Snapshot:
    moments = named_state(model, optimizer)
    return take_snapshot(step, model.description(), model.state_dict(), ema.state_dict(), moments, facts)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def lossy_write_bytes(path: Path, content: bytes) -> int:
    """Write as a disk that takes a megabyte and gives back another bit, and says nothing of it."""
    with path.open("wb") as file:
        return file.write(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_disk_that_gives_back_other_bytes_is_noticed_when_it_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, make_snapshot(1))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lossy_write_bytes)
        with pytest.raises(UserError, match=r"could not save the checkpoint .*its bytes differ from the SHA-256"):
            write_checkpoint(tmp_path, make_snapshot(2))
    assert saved_steps(tmp_path) == [1]


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_with_one_other_byte_is_passed_over_for_the_one_before(tmp_path: Path, name: str) -> None:
    reports: list[str] = []
    for step in (1, 2):
        write_checkpoint(tmp_path, make_snapshot(step))
    file = tmp_path / "step_00000002" / name
    lossy_write_bytes(file, file.read_bytes())
    assert newest_checkpoint(tmp_path, reports.append) == tmp_path / "step_00000001"
    assert [f"{name}: its bytes differ from the SHA-256" in report for report in reports] == [True]


def test_a_state_of_another_step_or_without_its_digest_is_passed_over(tmp_path: Path) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, make_snapshot(step))
    file, reports = tmp_path / "step_00000002" / "state.json", list[str]()
    state = json.loads(file.read_text())
    whole = {key: value for key, value in state.items() if key != "digest"}
    other, early = {**state, "step": 1}, {**whole, "format_version": 2}
    for content in (other, whole, {**early, "step": 1}, {**early, "digest": state["digest"]}):
        file.write_text(json.dumps(content))
        assert newest_checkpoint(tmp_path, reports.append) == tmp_path / "step_00000001"
    assert len(reports) == 4
    for key in ("symmetries", "gate"):  # that the first checkpoints of format 2 lack
        del early[key]
    file.write_text(json.dumps(early))
    assert newest_checkpoint(tmp_path, refuse) == tmp_path / "step_00000002"
    assert load_checkpoint(tmp_path / "step_00000002", *make_state()[:2])[0]["gate"]["before"] is None


def refuse(report: str) -> None:
    raise AssertionError(report)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Forbid writing to the folder, to root as well, which is somebody else for as long."""
    mode, is_root = folder.stat().st_mode, os.geteuid() == 0
    folder.chmod(0o555)
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(mode)


def test_the_files_hold_the_state_when_the_save_began(tmp_path: Path) -> None:
    model, ema, optimizer = make_state()
    facts: dict[str, Any] = {**FACTS, "shards": {"a": "1"}, "sampling": [0.5]}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    moments = {
        f"{names[index]}/{key}": value.clone()
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    with CheckpointWriter(tmp_path / "run" / "checkpoints", 3, None) as writer:
        writer.start(snapshot_of(7, model, ema, optimizer, facts))
        for parameter in model.parameters():  # training goes on
            parameter.detach().zero_()
            parameter.grad = torch.full_like(parameter, 3.0)
        optimizer.step()
        facts["sampling"].append(0.25)
    files = contents(tmp_path / "run/checkpoints/step_00000007")
    state = json.loads(files.pop("state.json"))
    assert files == {
        "model.json": json.dumps(model.description(), indent=1).encode(),
        "model.safetensors": serialize_tensors(weights),
        "ema.safetensors": serialize_tensors(dict(ema.state_dict())),
        "optimizer.safetensors": serialize_tensors(moments),
    }
    digests = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    content = {**FACTS, "format_version": 3, "step": 7, "shards": {"a": "1"}, "sampling": [0.5], "files": digests}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n"
    assert state == {**content, "digest": hashlib.sha256(canonical.encode()).hexdigest()}
    assert f"{names[0]}/exp_avg" not in moments
    assert f"{names[1]}/exp_avg" in moments


def test_the_loop_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    model, ema, optimizer = make_state(width=256)
    with CheckpointWriter(tmp_path, 3, None) as writer:
        writer.start(snapshot_of(1, model, ema, optimizer, FACTS))
        assert not list_checkpoints(tmp_path)  # 25 MB to hash and sync
        assert writer.wait() is None
        assert saved_steps(tmp_path) == [1]
    other, average, _ = make_state(width=256)
    facts, moments = load_checkpoint(tmp_path / "step_00000001", other, average)
    assert facts["step"] == 1
    assert moments.keys() == named_state(model, optimizer).keys()


def test_pruning_keeps_the_newest_the_milestones_and_what_is_newer(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, keep=2, keep_every=4) as writer:
        for step in (3, 4, 5, 6, 7):
            writer.start(make_snapshot(step))
            assert writer.wait() is None
        assert saved_steps(tmp_path) == [4, 6, 7]
        writer.start(make_snapshot(5))  # a run that starts over in the same folder
        assert writer.wait() is None
    assert saved_steps(tmp_path) == [4, 5, 6, 7]
    assert not list(tmp_path.glob("*.tmp"))
    prune_checkpoints(tmp_path, tmp_path / "step_00000004", keep=1, keep_every=None)
    assert saved_steps(tmp_path) == [4, 5, 6, 7]


def test_a_full_disk_leaves_what_was_there_and_the_next_save_works(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, keep=1, keep_every=None) as writer:
        writer.start(make_snapshot(1))
        assert writer.wait() is None
        before = contents(tmp_path / "step_00000001")
        for limit in (100, len(before["model.safetensors"]) - 1, len(before["optimizer.safetensors"]) - 1):
            with file_size_limit(limit):
                writer.start(make_snapshot(2))
                message = str(writer.wait())
            assert "could not save the checkpoint" in message
            assert "step_00000002: File too large" in message
            assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
            assert contents(tmp_path / "step_00000001") == before
        writer.start(make_snapshot(2))
        assert writer.wait() is None
    assert saved_steps(tmp_path) == [2]


def test_a_read_only_folder_leaves_what_was_there() -> None:
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is closed to others than its owner
        root = Path(folder) / "checkpoints"
        Path(folder).chmod(0o755)
        with CheckpointWriter(root, keep=1, keep_every=None) as writer:
            writer.start(make_snapshot(1))
            assert writer.wait() is None
            with read_only(root):
                writer.start(make_snapshot(2))
                assert "step_00000002: Permission denied" in str(writer.wait())
            assert saved_steps(root) == [1]
            write_checkpoint(root, make_snapshot(2))
            with read_only(root):
                with pytest.raises(UserError, match=r"could not delete old checkpoints in .*: Permission denied"):
                    prune_checkpoints(root, root / "step_00000002", keep=1, keep_every=None)
                assert saved_steps(root) == [1, 2]


def test_a_vanished_folder_is_made_again(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    with CheckpointWriter(root, keep=1, keep_every=None) as writer:
        for step in (1, 2):
            writer.start(make_snapshot(step))
            assert writer.wait() is None
            assert saved_steps(root) == [step]
            shutil.rmtree(tmp_path / "run")


def test_a_failure_is_handed_out_once_as_soon_as_it_is_known(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    writer = CheckpointWriter(tmp_path / "checkpoints", keep=1, keep_every=None)
    assert writer.failure() is None
    writer.start(make_snapshot(1))
    deadline = time.monotonic() + 30
    while (failure := writer.failure()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert "step_00000001: Not a directory" in str(failure)
    assert writer.failure() is None
    assert writer.wait() is None
    with pytest.raises(UserError, match="could not save"), writer:  # nobody asked
        writer.start(make_snapshot(1))


def save_and_fail(root: Path) -> None:
    with CheckpointWriter(root, keep=1, keep_every=None) as writer:
        writer.start(make_snapshot(1))
        raise ZeroDivisionError


def test_an_error_elsewhere_waits_for_the_save_and_hides_no_failure(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        save_and_fail(tmp_path)
    assert saved_steps(tmp_path) == [1]
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ZeroDivisionError):
        save_and_fail(tmp_path / "file")
    assert "could not save the checkpoint" in capsys.readouterr().err


def test_a_snapshot_that_cannot_be_written_as_json_is_our_fault(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 1, None)
    writer.start(snapshot_of(1, *make_state(), {**FACTS, "shards": object()}))
    with pytest.raises(ValueError, match="Unable to serialize unknown type"):
        writer.wait()


def test_the_folder_is_read_again_if_the_checkpoint_found_disappears(tmp_path: Path) -> None:
    found = [write_checkpoint(tmp_path, make_snapshot(1))]

    def look(path: Path) -> Path:
        if len(found) == 1:
            found.append(write_checkpoint(tmp_path, make_snapshot(2)))
            prune_checkpoints(tmp_path, found[1], keep=1, keep_every=None)
        verify_checkpoint(path)
        return path

    assert look_at_newest(tmp_path, refuse, look) == found[1]


def test_a_run_is_read_while_it_deletes_its_checkpoints(tmp_path: Path, capsys: Any) -> None:
    """With one checkpoint kept and a save after another, most of what is found disappears before it is read."""
    (tmp_path / "recipe.yaml").write_text("train: {steps: 9}")
    root, done = tmp_path / "checkpoints", threading.Event()
    snapshot = make_snapshot(1)
    write_checkpoint(root, snapshot)

    def save_for_ever() -> None:
        step = 1
        while not done.is_set():
            step += 1
            newest = write_checkpoint(root, replace(snapshot, step=step))
            prune_checkpoints(root, newest, keep=1, keep_every=None)

    thread = threading.Thread(target=save_for_ever)
    thread.start()
    try:
        for _ in range(40):
            assert load_pretrained(tmp_path).num_parameters() > 0
            assert read_status(tmp_path).checkpoint is not None
    finally:
        done.set()
        thread.join()
    assert "damaged" not in capsys.readouterr().out


def save_for_ever(root: Path) -> None:
    """Save steps 1, 2, 3, ... after the newest there; `done` holds the last that ended."""
    torch.set_num_threads(1)
    model, ema, optimizer = make_state(width=64)
    newest = newest_checkpoint(root, refuse)
    step = int(newest.name.removeprefix("step_")) if newest else 0
    writer = CheckpointWriter(root, keep=1, keep_every=None)
    while True:
        step += 1
        writer.start(snapshot_of(step, model, ema, optimizer, FACTS))
        assert writer.wait() is None
        (root.parent / "done").write_text(f"{step:08d}")


def test_kills_during_saves_leave_the_checkpoint_before_or_the_one_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 at random moments of asynchronous saves that keep one checkpoint only."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the fork server imports this file, once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    root, done, rng, torn = tmp_path / "checkpoints", tmp_path / "done", random.Random(0), 0
    for _ in range(6):
        before = done.read_text() if done.exists() else ""
        process = context.Process(target=save_for_ever, args=(root,), daemon=True)
        process.start()
        deadline = time.monotonic() + 60
        while not done.exists() or done.read_text() in ("", before):
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        torn += bool(list(root.glob("*.tmp")))
        newest = newest_checkpoint(root, refuse)  # no damaged one at all
        assert newest is not None
        assert int(newest.name.removeprefix("step_")) >= int(done.read_text() or 0)
        load_checkpoint(newest, *make_state(width=64)[:2])
    assert torn > 0
    write_checkpoint(root, make_snapshot(10**6))
    assert not list(root.glob("*.tmp"))
