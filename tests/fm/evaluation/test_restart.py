"""An evaluation shared by processes, killed and started again, writes what one process does that nothing disturbs."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn
from whole_runs import DATASETS, ROOT, SignalInEvaluation, fm, small, wait_for

from data_pipeline.errors import UserError
from data_pipeline.files import only_process
from data_pipeline.windows.loader import open_readers
from fm.checkpoint import load_pretrained
from fm.evaluation.errors import ErrorFile
from fm.evaluation.evaluate import evaluate_model, evaluate_run
from fm.evaluation.parts import EvaluationPart, cut, divide
from fm.evaluation.protocol import PROTOCOLS
from fm.evaluation.samples import load_samples
from fm.training.trainer import train

CPU = torch.device("cpu")
THIRDS = PROTOCOLS["thirds"]
FOUR = sorted([*DATASETS, "active_matter", "rayleigh_benard"])  # eight parts


@pytest.fixture(scope="module")
def run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on four datasets, evaluated by one process."""
    directory = tmp_path_factory.mktemp("runs") / "one_step"
    model = {"width": 48, "depth": 4, "heads": 4}  # slow enough to be killed in the middle
    recipe = small(tiny_shards, directory, data={"datasets": FOUR}, model=model, train={"steps": 1, "warmup_steps": 0})
    assert train(recipe) == 0
    evaluate_run(directory)
    return directory


def assert_same_report(out: Path, expected: Path) -> None:
    ours, theirs = (ErrorFile.load(folder / "errors.npz") for folder in (out, expected))
    assert list(ours.datasets) == list(theirs.datasets)
    for name, errors in ours.datasets.items():
        for task in ("one_step", "rollout"):
            for part in ("variance", "model", "persistence", "mean_field"):
                one, other = (getattr(getattr(each, task), part) for each in (errors, theirs.datasets[name]))
                np.testing.assert_allclose(one, other, rtol=1e-6)
    assert json.loads((out / "scores.json").read_text()) == json.loads((expected / "scores.json").read_text())
    for one, other in zip(*(load_samples(folder / "samples.npz") for folder in (out, expected)), strict=True):
        np.testing.assert_allclose(one.prediction, other.prediction, rtol=1e-6)
    assert not (out / "parts").exists()


@contextmanager
def two_processes(run: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """`fm evaluate` in two processes; none of them outlives the test."""
    command = [sys.executable, "-m", "fm", "evaluate", str(run), "--out", str(out), "--processes", "2"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **streams) as launcher:
        try:
            yield launcher
        finally:
            for process in psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else []:
                process.kill()
            launcher.kill()


def finished(out: Path) -> list[Path]:
    return list((out / "parts").glob("*.npz"))


def has_finished(out: Path, count: int) -> bool:
    time.sleep(0.01)
    return len(finished(out)) >= count


def test_two_processes_that_are_killed_and_started_again_write_what_one_writes(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    with two_processes(run, out) as launcher:
        wait_for(lambda: has_finished(out, 2), launcher)
        ranks = {one.environ().get("RANK"): one for one in psutil.Process(launcher.pid).children(recursive=True)}
        ranks["0"].kill()
        _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 1, said
    assert "Traceback" not in said
    assert not any(process.is_running() for process in ranks.values())
    assert not (out / "scores.json").exists()
    kept = len(finished(out))
    assert 2 <= kept < 8
    with two_processes(run, out) as launcher:
        table, said = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, said
    assert f"parts: {kept} of 8 parts are there, measuring the rest" in table
    assert table.count("### One step") == 1  # the main process alone prints
    assert_same_report(out, run / "report")


def test_a_signal_ends_an_evaluation_which_the_same_command_continues(run: Path, tmp_path: Path) -> None:
    kept = 0
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with SignalInEvaluation(number, 12) as sent:
            stopped = fm("evaluate", str(run), "--out", str(tmp_path))
        assert (stopped.returncode, sent.count) == (130, 12)
        assert stopped.stderr.endswith("interrupted; what is finished is kept: the same command goes on\n")
        assert (f"{kept} of 8 parts are there" in stopped.stdout) == (kept > 0)
        assert len(finished(tmp_path)) > kept
        kept = len(finished(tmp_path))


class Steps:
    """Counts the steps of a model, and interrupts at one of them as Ctrl-C does."""

    def __init__(self, model: nn.Module, interrupt_at: int | None = None) -> None:
        self.count, self.interrupt_at = 0, interrupt_at
        self.hook = model.register_forward_pre_hook(self)

    def __call__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.count += 1
        if self.count == self.interrupt_at:
            self.hook.remove()
            raise KeyboardInterrupt


def steps(item: EvaluationPart) -> int:
    """Of batches of 8 windows, or of one batch of rollouts through 9 frames."""
    return -(-len(item.ids) // 8) if item.task == "one_step" else 8


def test_finished_parts_are_not_measured_again_and_damaged_ones_are(
    run: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = load_pretrained(run), tmp_path / "report"
    readers = open_readers(tiny_shards, DATASETS, "test")
    (*items, last) = divide(cut(readers, THIRDS, 8), 1)[0]
    whole = Steps(model)
    evaluate_model(model, readers, tmp_path / "whole", THIRDS, CPU, progress=False)
    whole.hook.remove()
    Steps(model, interrupt_at=whole.count)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(model, readers, out, THIRDS, CPU, progress=False)
    parts = sorted(finished(out))
    assert [part.stem for part in parts] == sorted(item.name for item in items)
    assert not list((out / "parts").glob("*.tmp"))
    parts[0].write_bytes(parts[0].read_bytes()[:-100])
    rest = Steps(model)
    evaluate_model(model, readers, out, THIRDS, CPU, progress=False)
    assert rest.count == sum(steps(item) for item in [last, *items] if item is last or item.name == parts[0].stem)
    said = capsys.readouterr().out
    assert f"{parts[0]}: removing a damaged part" in said
    assert f"{out / 'parts'}: 2 of 4 parts are there, measuring the rest" in said
    assert_same_report(out, tmp_path / "whole")


def test_a_part_of_other_weights_or_another_protocol_is_not_taken_over(
    run: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, readers = load_pretrained(run), open_readers(tiny_shards, DATASETS, "test")

    def interrupted() -> str:
        Steps(model, interrupt_at=9)
        with pytest.raises(KeyboardInterrupt):
            evaluate_model(model, readers, tmp_path, THIRDS, CPU, progress=False)
        return capsys.readouterr().out

    interrupted()
    assert len(finished(tmp_path)) == 1
    identity = tmp_path / "parts" / "identity.json"
    identity.write_text(identity.read_text().replace('"cpu"', '"cuda"'))
    assert "removing what another evaluation left (other device)" in interrupted()
    with torch.no_grad():
        model.task_vectors[DATASETS[0]][0] += 1e-6
    assert "removing what another evaluation left (other model)" in interrupted()
    evaluate_model(model, readers, tmp_path, replace(THIRDS, max_steps=2), CPU, progress=False)
    assert "removing what another evaluation left (other protocol)" in capsys.readouterr().out


def test_one_evaluation_writes_in_a_folder_at_a_time(run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    model, readers = load_pretrained(run), open_readers(tiny_shards, DATASETS, "test")
    with only_process(tmp_path, "evaluation"), pytest.raises(UserError, match="another evaluation is writing here"):
        evaluate_model(model, readers, tmp_path, THIRDS, CPU, progress=False)


def test_what_a_kill_after_the_report_left_is_tidied_up(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = run / "report" / "parts" / "helmholtz_staircase-rollout-00000.npz"
    left.parent.mkdir()
    left.write_bytes(b"of no use")
    evaluate_run(run)
    assert "already holds the scores of step_00000001" in capsys.readouterr().out
    assert not left.parent.exists()


def test_scores_that_are_none_are_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a report.s scores\.json"):
        evaluate_run(run, out=tmp_path)


def test_pictures_have_the_axes_of_the_cards(run: Path) -> None:
    domains = {sample.dataset: sample.domain for sample in load_samples(run / "report" / "samples.npz")}
    assert sorted(domains) == FOUR
    assert domains["rayleigh_benard"] == ((0, 4), (0, 1))
