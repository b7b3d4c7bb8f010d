"""`fm evaluate` and `fm compare` on real runs, as a user types them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_server import FaultyServer
from whole_runs import fm

import fm as fm_package
from data_pipeline.errors import UserError
from fm.checkpoint import find_checkpoint, load_pretrained
from fm.cli import main
from fm.config import resolve
from fm.evaluation.errors import ErrorFile
from fm.evaluation.evaluate import evaluate_run
from fm.evaluation.scores import Scores, score
from fm.evaluation.tables import load_runs
from fm.training.trainer import train

DATASETS = ["acoustic_scattering_maze", "helmholtz_staircase"]


@pytest.fixture(scope="module")
def run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of two steps. Its report folder is the tests'; the rest is read only."""
    directory = tmp_path_factory.mktemp("runs") / "two_steps"
    recipe = {
        "run": {"name": "two_steps", "dir": str(directory)},
        "data": {"shards": str(tiny_shards), "datasets": DATASETS},
        "model": {"width": 16, "depth": 1, "heads": 2},
        "train": {"steps": 2, "warmup_steps": 0},
        "checkpoint": {"every": 1},
        "validation": {"every": 0, "protocol": "thirds"},
        "tracking": {"progress": False},
    }
    assert train(resolve(recipe, "the test")) == 0
    return directory


def test_evaluate_writes_the_report_and_does_not_make_it_twice(run: Path) -> None:
    done = fm("evaluate", str(run))
    assert done.returncode == 0, done.stderr
    assert "helmholtz_staircase" in done.stdout
    assert "protocol thirds" in done.stdout
    scores = json.loads((run / "report" / "scores.json").read_text())
    for name in DATASETS:
        for cell in (scores["datasets"][name]["one_step"], *scores["datasets"][name]["windows"].values()):
            assert {"median", "persistence", "mean_field"} <= set(cell)
    assert scores["protocol"]["name"] == "thirds"
    with np.load(run / "report" / "errors.npz", allow_pickle=False) as errors:
        assert any(name.startswith("helmholtz_staircase/rollout/") for name in errors)
    assert {f"{name}.png" for name in (*DATASETS, "growth")} <= {p.name for p in (run / "report/pictures").iterdir()}
    written = (run / "report" / "scores.json").stat().st_mtime_ns
    again = fm("evaluate", str(run))
    assert again.returncode == 0
    assert "already holds the scores of step_00000002" in again.stdout
    assert (run / "report" / "scores.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("fault", ["an old format", "no page", "torn errors"])
def test_a_report_that_is_not_whole_is_made_again(run: Path, tmp_path: Path, fault: str) -> None:
    out = tmp_path / "report"
    shutil.copytree(evaluate_run(run), out)
    scores = json.loads((out / "scores.json").read_text())
    if fault == "an old format":
        (out / "scores.json").write_text(json.dumps({**scores, "format": 1}))
    elif fault == "no page":
        (out / "index.html").unlink()
    else:
        (out / "errors.npz").write_bytes((out / "errors.npz").read_bytes()[:1000])
    evaluate_run(run, out=out)
    assert json.loads((out / "scores.json").read_text()) == scores
    assert (out / "index.html").is_file()
    assert score(ErrorFile.load(out / "errors.npz")) == Scores.load(out / "scores.json")


def test_the_same_weights_elsewhere_are_not_scored_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_run(run)
    shutil.copytree(run, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for place in (Path("moved"), tmp_path / "moved"):
        evaluate_run(place)
        assert "moved/report already holds the scores of step_00000002" in capsys.readouterr().out


def test_the_pages_command_measures_the_same_again(run: Path, tmp_path: Path) -> None:
    out = evaluate_run(run, out=tmp_path / "first", windows=3)
    (command,) = re.findall(r"^fm (evaluate [^<\n]*)", (out / "index.html").read_text(), re.MULTILINE)
    assert main(command.replace("RUN", str(run)).replace("DIR", str(tmp_path / "again")).split()) == 0
    first, again = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("first", "again"))
    assert again == first


def test_another_checkpoint_protocol_or_folder_is_evaluated_anew(run: Path, tmp_path: Path) -> None:
    evaluate_run(run / "checkpoints" / "step_00000001", out=tmp_path / "first", protocol="wavelit")
    scores = json.loads((tmp_path / "first" / "scores.json").read_text())
    assert scores["protocol"]["name"] == "wavelit"
    assert scores["origin"]["step"] == 1
    found = scores["datasets"][DATASETS[0]]["windows"]  # of 9 frames, of which rollouts start at number 3
    assert (found["1:20"]["first"], found["1:20"]["last"], found["21:60"]) == (1, 5, None)


def test_a_protocol_from_a_file_and_cards_that_are_not_at_hand(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "early.yaml"
    file.write_text('{name: early, version: 3, windows: {"1:2": [1, 2]}, max_steps: 2, one_step_windows: 5}')
    monkeypatch.setenv("WAVELIT_REGISTRY", str(tmp_path / "gone"))
    evaluate_run(run, out=tmp_path / "report", protocol=str(file))
    said = capsys.readouterr().out
    assert f"pictures will have no physical axes: {tmp_path / 'gone'}: expected a folder of your own cards" in said
    scores = json.loads((tmp_path / "report" / "scores.json").read_text())
    assert (scores["protocol"]["name"], scores["protocol"]["version"]) == ("early", 3)
    for part in scores["datasets"].values():
        assert (part["one_step"]["count"], part["horizon"], list(part["windows"])) == (5, 2, ["1:2"])


def test_a_subset_of_windows_from_a_url_says_that_it_is_not_the_full_score(
    run: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with FaultyServer(tiny_shards) as server:
        out = str(tmp_path / "report")
        done = fm("evaluate", str(run), "--windows", "3", "--shards", server.url, "--out", out)
        assert server.total_requests > 0
    assert done.returncode == 0, done.stderr
    said = "one step: median over at most 3 evenly spaced windows per dataset (a subset, not the full score)"
    assert said in done.stdout
    assert said in (tmp_path / "report" / "scores.md").read_text()
    scores = json.loads((tmp_path / "report" / "scores.json").read_text())
    assert scores["protocol"]["one_step_windows"] == 3
    assert [part["one_step"]["count"] for part in scores["datasets"].values()] == [3, 3]
    evaluate_run(run)
    with pytest.raises(UserError, match=r"report.errors\.npz: protocol thirds v1 needs one_step_windows None; these"):
        load_runs([run, tmp_path])
    with pytest.raises(UserError, match="--windows: expected at least 1 one-step window per dataset, got 0"):
        evaluate_run(run, windows=0)


def test_some_datasets_are_scored_without_shards_of_the_others(run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    chosen, other = DATASETS
    for name in (chosen, "shear_flow"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).symlink_to(tiny_shards / name)
    places = [f"--shards={tmp_path / name}" for name in (chosen, "shear_flow")]
    out = tmp_path / "report"
    assert main(["evaluate", str(run), *places, f"--datasets={chosen}", f"--out={out}"]) == 0
    scores, whole = (Scores.load(folder / "scores.json") for folder in (out, evaluate_run(run)))
    assert list(scores.datasets) == [chosen]
    assert scores.datasets[chosen] == whole.datasets[chosen]
    with pytest.raises(UserError, match=rf"(?s)no test shards under .*{other}"):
        evaluate_run(run, [tmp_path / chosen], out)
    with pytest.raises(UserError, match=r"--datasets: expected datasets of the model, got 'maze'"):
        evaluate_run(run, datasets=["maze"])


def test_compare_puts_two_runs_side_by_side(run: Path) -> None:
    evaluate_run(run)
    done = fm("compare", str(run), str(run))
    assert done.returncode == 0, done.stderr
    assert "| two_steps (1) | two_steps (2) | change |" in done.stdout
    assert all(name in done.stdout for name in DATASETS)


def test_weights_load_on_a_machine_without_shards(run: Path) -> None:
    model = load_pretrained(run)
    assert sorted(model.specs) == DATASETS
    public = fm_package.WaveLiTFM.from_pretrained(find_checkpoint(run))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), public.parameters(), strict=True))
    assert find_checkpoint(run).name == "step_00000002"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "nowhere"), "no checkpoint found: looked for nowhere/model.json"),
        (("compare", "nowhere", "nowhere"), "looked for nowhere/errors.npz and nowhere/report/errors.npz"),
        (("train", "nowhere.yaml"), "nowhere.yaml: expected a YAML file, found none"),
    ],
)
def test_what_is_not_there_is_said_without_a_traceback(arguments: tuple[str, ...], message: str) -> None:
    done = fm(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_protocol_and_missing_shards_are_explained(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected one of wavelit"):
        evaluate_run(run, protocol="mine")
    with pytest.raises(UserError, match="no test shards under"):
        evaluate_run(run, shards=tmp_path)


def test_a_checkpoint_whose_files_do_not_fit_is_refused(run: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(run)
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    description = json.loads((tmp_path / "model.json").read_text())
    description["config"]["width"] = 32
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="cannot be loaded as a model"):
        load_pretrained(tmp_path)
