"""`fm score` and `fm compare` as a user types them, where torch cannot be imported."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from error_files import error_file

from data_pipeline.files import UserError
from fm.cli import main
from fm.evaluation.errors import ErrorFile
from fm.evaluation.protocol import PROTOCOLS
from fm.evaluation.samples import Sample, load_samples, save_samples
from fm.evaluation.scores import score
from fm.evaluation.tables import rescore

WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is not there")

sys.meta_path.insert(0, NoTorch())
from fm.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def fm(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process where `import torch` raises."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An evaluated run: errors at a variance of 1e-6 and, of one rollout, two frames."""
    file = error_file(shear_flow=0.5, active_matter=0.25, variance=1e-6)
    file.save(tmp_path / "run" / "report" / "errors.npz")
    fields = np.random.default_rng(0).random((2, 16, 16))
    sample = Sample("shear_flow", "b", 1, 0.5, (1, 9), fields, fields + 0.1, np.array([0.5, 0.5]))
    save_samples(tmp_path / "run" / "report" / "samples.npz", [sample])
    return tmp_path / "run"


def test_score_writes_a_report_without_torch(run: Path, tmp_path: Path) -> None:
    protocol = tmp_path / "early.yaml"
    protocol.write_text('name: early\nversion: 1\nwindows: {"1:2": [1, 2]}\nmax_steps: 2\n')
    out = tmp_path / "early"
    done = fm("score", run, "--protocol", protocol, "--eps", "1e-5", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "protocol early v1: VRMSE in physical units, eps 1e-05" in done.stdout
    scores = json.loads((out / "scores.json").read_text())
    expected = 0.5 * (1e-6 / 1.1e-5) ** 0.5
    assert scores["datasets"]["shear_flow"]["windows"]["1:2"]["median"] == pytest.approx(expected)
    stored = ErrorFile.load(out / "errors.npz")
    assert score(stored) == scores
    (sample,) = load_samples(out / "samples.npz")
    assert sample.vrmse == pytest.approx([expected, expected])
    assert done.stdout.strip() in (out / "scores.md").read_text()
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert float(rows[1]["median"]) == scores["datasets"]["shear_flow"]["one_step"]["median"]
    assert r"shear\_flow & 27 &" in (out / "scores.tex").read_text()
    assert (out / "pictures" / "shear_flow.png").is_file()


def test_score_prints_the_stored_files_own_scores_and_writes_nothing(run: Path) -> None:
    before = sorted(path.name for path in (run / "report").iterdir())
    done = fm("score", run / "report")
    assert done.returncode == 0, done.stderr
    assert "protocol thirds v1" in done.stdout
    assert sorted(path.name for path in (run / "report").iterdir()) == before


def test_compare_needs_no_torch_either(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    done = fm("compare", run, run, "--labels", "a,b", "--protocol", "wavelit", "--format", "json", "--out", out)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    whole = json.loads(out.read_text())
    assert whole["tables"][0]["head"] == ["dataset", "a", "b", "change", "persistence", "mean field"]
    assert (
        "shear_flow: not comparable with published scores: grid 16 x 16, published 256 x 512; 3 tr" in whole["notes"][1]
    )
    listed = fm("compare", "--published")
    assert listed.returncode == 0, listed.stderr
    assert "Walrus" in listed.stdout
    for arguments in ((), (run, "--published")):
        failed = fm("compare", *arguments)
        assert (failed.returncode, failed.stderr) == (2, "error: compare: expected runs, or --published alone\n")


@pytest.mark.parametrize("change", [{"dataset": "rayleigh_benard"}, {"trajectory": 7}, {"steps": (1, 99)}])
def test_samples_of_another_evaluation_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    stored = run / "report" / "samples.npz"
    (sample,) = load_samples(stored)
    save_samples(stored, [dataclasses.replace(sample, **change)])
    assert main(["score", str(run), "--out", str(tmp_path / "out")]) == 2
    assert f"{stored}: expected fields of rollouts in the errors.npz beside it, got" in capsys.readouterr().err


def test_a_folder_and_a_file_are_not_taken_for_each_other(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert main(["score", str(run), "--out", str(file)]) == 2
    assert f"--out {file}: expected a folder to write a report into, got a file" in capsys.readouterr().err
    assert main(["compare", str(run), "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path}: expected a file to write, got a folder" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_an_evaluation_is_not_replaced_by_another_protocols(run: Path) -> None:
    done = fm("score", run, "--eps", "0", "--out", run / "report")
    assert done.returncode == 2
    assert "expected another folder than that of" in done.stderr
    assert "measured under protocol thirds: that evaluation would be replaced" in done.stderr
    assert fm("score", run, "--out", run / "report").returncode == 0
    assert ErrorFile.load(run / "report" / "errors.npz").protocol == PROTOCOLS["thirds"]


def test_what_was_not_measured_is_refused() -> None:
    file = error_file(dataclasses.replace(PROTOCOLS["thirds"], max_steps=9), shear_flow=0.5)
    with pytest.raises(UserError, match=r"protocol wavelit needs rollouts of 60 steps; these errors .* at most 9"):
        rescore(file, "wavelit", None)
    with pytest.raises(UserError, match="protocol well needs start 3"):
        rescore(file, "well", None)
    for eps in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--eps: expected a number of at least 0, got"):
            rescore(file, None, eps)
