"""Sweeps of real runs: trained, scored, kept, refused, interrupted; every number of the table; the command line."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import whole_runs
from whole_runs import rewrite_state, small

from data_pipeline.errors import UserError
from data_pipeline.tables import render
from fm.cli import main
from fm.config import dump_recipe, load_recipe, recipe_to_dict
from fm.lab.sweep import run_sweep
from fm.lab.sweep_file import Sweep, Trial, check_same_data, load_sweep, plan, read_scores
from fm.lab.sweep_table import sweep_document, sweep_results

pytestmark = pytest.mark.usefixtures("forked_runs")
PYTHON = sys.executable  # a fresh one
BROKEN = "data.datasets: [shear_flaw]"


def scored_copy(
    run: Path, trial: Trial, one_step: dict[str, Any], first_third: Mapping[str, Any] | None = None, **changes: Any
) -> None:
    """A trained and scored run as that of another trial, with some of its scores replaced on all datasets."""
    shutil.copytree(run, trial.directory, dirs_exist_ok=True)
    for state in trial.directory.glob("checkpoints/*/state.json"):
        rewrite_state(state, recipe=recipe_to_dict(trial.recipe))
    file = trial.report / "scores.json"
    scores = json.loads(file.read_text())
    for part in scores["datasets"].values():
        part["one_step"].update(one_step)
        part["windows"]["first_third"].update(first_third or {})
        part.update(changes)
    file.write_text(json.dumps(scores))


@pytest.fixture(scope="module")
def folder(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base recipe, of three steps on two datasets, and one that finetunes what `done` has trained."""
    folder = tmp_path_factory.mktemp("sweep")
    base = small(tiny_shards, folder / "unused", train={"steps": 3})
    (folder / "base.yaml").write_text(dump_recipe(base))
    finetune = small(tiny_shards, folder / "unused", finetune={"pretrained": str(folder / "done" / "full_seed0")})
    (folder / "finetune.yaml").write_text(dump_recipe(finetune))
    return folder


@pytest.fixture(scope="module")
def sweep(folder: Path) -> Sweep:
    file = folder / "three.yaml"
    file.write_text(
        "title: Three variants\nbase: base.yaml\nwindows: 2\npaper: a book\npublished: {full: 0.1, no ridge: 0.2}\n"
        f"variants:\n  full: {{}}\n  no ridge: {{model.ridge: none}}\n  broken: {{{BROKEN}}}\n"
    )
    return load_sweep(file)


@pytest.fixture(scope="module")
def done(folder: Path, sweep: Sweep, forked_runs: None) -> Path:
    """The sweep, its two good variants run once."""
    assert run_sweep(sweep, folder / "done", only=["full", "no ridge"]) == 0
    return folder / "done"


def test_variants_are_trained_and_scored(done: Path) -> None:
    for name, ridge in (("full_seed0", "ridge"), ("no_ridge_seed0", "none")):
        recipe = load_recipe(done / name / "recipe.yaml")
        assert (recipe.run.name, recipe.model.ridge) == (name, ridge)
        assert len(whole_runs.log(done / name)) == 3
        assert (done / name / "report" / "errors.npz").is_file()
    text = (done / "table.md").read_text()
    assert text.startswith("# Three variants\n\nVRMSE, lower is better. protocol thirds v1")
    assert f"not run: {done / 'broken_seed0'}" in text
    assert "- Paper: a book." in text


def test_the_table_says_what_the_reports_say(done: Path) -> None:
    results = json.loads((done / "table.json").read_text())
    rows = {row["variant"]: row for row in results["variants"]}
    leads = {}
    for name in ("full", "no ridge"):
        run = done / f"{name.replace(' ', '_')}_seed0"
        scores = json.loads((run / "report" / "scores.json").read_text())
        row = rows[name]
        assert scores["protocol"]["one_step_windows"] == 2
        assert row["scores"]["one step"]["over_persistence"] == pytest.approx(
            scores["geometric_mean_ratio_to_persistence"]
        )
        for window, ratio in scores["geometric_mean_ratio_to_persistence_windows"].items():
            assert row["scores"][window]["over_persistence"] == pytest.approx(ratio)
        for dataset, part in scores["datasets"].items():
            assert row["scores"]["one step"]["vrmse"][dataset] == part["one_step"]["median"]
            assert results["references"][dataset]["one step"]["persistence"] == part["one_step"]["persistence"]
            window = part["windows"]["last_third"]
            assert row["scores"]["last_third"]["vrmse"][dataset] == window["median"]
        paces = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines() if '"pace"' in line]
        assert row["seconds"] == pytest.approx(sum(line["cpu_seconds"] for line in paces))
        assert row["steps"] == 3
        assert row["scores"]["one step"]["spread"] is None
        leads[name] = row["scores"]["one step"]["over_persistence"]
    # Without the ridge each block lacks one lambda a head: one block of two heads.
    assert rows["full"]["parameters"] - rows["no ridge"]["parameters"] == 2
    better = min(leads, key=leads.__getitem__)
    assert rows[better]["rank"] == 1
    assert (rows["full"]["paper"], rows["full"]["paper_rank"], rows["no ridge"]["paper_rank"]) == (0.1, 1, 2)
    assert rows[better]["rank_beside_paper"] == 1
    assert results["spearman"] is None  # of two
    text = (done / "table.md").read_text()
    assert "it takes 3 variants that are done and have a number of the paper's, got 2" in text
    assert "of other data, protocol and unit; only the order may be compared" in text


def test_what_is_done_is_kept(done: Path, sweep: Sweep) -> None:
    files = [file for file in done.rglob("*_seed0/**/*") if file.is_file()]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert run_sweep(sweep, done, only=["no ridge", "full"]) == 0
    assert {file: file.stat().st_mtime_ns for file in files} == before


def test_a_run_that_fails_is_shown_and_passed_over(
    done: Path, sweep: Sweep, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.progress.LINE_SECONDS", 0.0)
    assert run_sweep(sweep, done) == 1
    shown = capsys.readouterr()
    assert "sweep: 2 of 3 runs in " in shown.err
    assert " left" not in shown.err  # the two runs of an earlier sweep say nothing about the time of the third
    output = done / "broken_seed0" / "train.out"
    assert f"broken_seed0 failed: exit code 2, {output} ends with\n" in shown.err
    assert output.read_text().splitlines()[-1] in shown.err
    assert "shear_flaw" in shown.err
    assert f"failed: {done / 'broken_seed0'}" in shown.out
    rows = json.loads((done / "table.json").read_text())["variants"]
    assert [row["status"] for row in rows] == ["done", "done", "failed"]


def test_a_sweep_that_changed_is_refused(done: Path, folder: Path, sweep: Sweep) -> None:
    with pytest.raises(UserError) as caught:
        run_sweep(sweep, done, ["model.width=32", "train.clip=2"])
    assert "full_seed0 was trained with other settings" in str(caught.value)
    assert "model.width: 16 -> 32\n" in str(caught.value)
    assert "train.clip: 1.0 -> 2.0\n" in str(caught.value)
    with pytest.raises(UserError, match=r"seconds: None -> 5\.0"):
        run_sweep(replace(sweep, seconds=5.0), done)


def test_a_damaged_report_is_named(done: Path, tmp_path: Path, sweep: Sweep) -> None:
    shutil.copytree(done / "full_seed0", tmp_path / "full_seed0")
    (tmp_path / "full_seed0" / "report" / "scores.json").write_text("{}")
    with pytest.raises(UserError, match=r"scores\.json: not a report's scores\.json \(format: Field required\)"):
        run_sweep(sweep, tmp_path, only=["full"])


def test_seeds_are_averaged_and_their_spread_is_given(done: Path, tmp_path: Path, sweep: Sweep, folder: Path) -> None:
    """Two more runs, copied from the first with scores of our own."""
    out, ratios = tmp_path / "out", [0.2, 0.4, 0.8]
    seeded = replace(sweep, seeds=(0, 1, 2))
    trials = plan(seeded, out)
    for trial, ratio in zip(trials, ratios, strict=False):
        one_step = {"ratio_to_persistence": ratio, "median": None if trial.seed == 2 else ratio / 2}  # one diverged
        scored_copy(done / "full_seed0", trial, {**one_step, "count": 3, "diverged": 2 if trial.seed == 2 else 0})
    results = sweep_results(seeded, trials, failed=["no_ridge_seed1"])
    full, no_ridge, _ = results["variants"]
    score = full["scores"]["one step"]
    assert score["over_persistence"] == pytest.approx(mean(ratios))
    assert score["spread"] == pytest.approx(stdev(ratios))
    assert set(score["vrmse"].values()) == {None}
    assert (set(score["diverged"].values()), set(score["count"].values())) == ({2}, {9})
    assert full["runs"][1]["scores"]["one step"]["over_persistence"] == pytest.approx(0.4)
    assert no_ridge["status"] == "failed"
    assert results["spearman"] is None
    text = render(sweep_document(seeded, results), "md")
    assert f"{mean(ratios):.4f} (± {stdev(ratios):.4f}, 4 of 18 diverged)" in text
    assert " 2 of 9 diverged |" in text
    assert "it takes 3 variants that are done" in text
    unpublished = replace(seeded, published=None)
    text = render(sweep_document(unpublished, sweep_results(unpublished, plan(unpublished, out))), "md")
    assert "not known, the paper's numbers are not at hand" in text
    assert "paper's rank" not in text


def test_ranks_are_shared_and_compared_among_the_papers(done: Path, tmp_path: Path, folder: Path) -> None:
    file = folder / "five.yaml"
    variants = "".join(f"  v{n}: {{train.clip: {n}}}\n" for n in range(1, 6))
    file.write_text(
        f"title: F\nbase: base.yaml\nwindows: 2\npublished: {{v1: 3, v3: 2, v4: 1, v5: 0.5}}\n"
        "published_windows: {first_third: {v1: 0.3, v2: 0.2, v4: 0.1}, last_third: {v1: 0.1}}\n"
        f"variants:\n{variants}"
    )
    five = load_sweep(file)
    trials = plan(five, tmp_path / "out")
    ratios = [(0.4, 0.5), (0.1, 0.6), (0.4, 0.1), (0.2, 0.3)]
    for trial, (one_step, first_third) in zip(trials, ratios, strict=False):  # v5 is not run
        scored = ({"ratio_to_persistence": ratio} for ratio in (one_step, first_third))
        scored_copy(done / "full_seed0", trial, *scored)
    results = sweep_results(five, trials)
    rows = results["variants"]
    assert [row["rank"] for row in rows] == [3.5, 1, 3.5, 2, None]
    assert [row["paper_rank"] for row in rows] == [3, None, 2, 1, None]
    assert [row["rank_beside_paper"] for row in rows] == [2.5, None, 2.5, 1, None]
    assert results["spearman"] == pytest.approx(3**0.5 / 2)
    assert results["spearman_windows"] == {"first_third": pytest.approx(0.5), "last_third": None}  # of one variant
    assert rows[1]["paper_windows"] == {"first_third": 0.2, "last_third": None}
    text = render(sweep_document(five, results), "md")
    assert "paper's order: 0.87 over 3 variants." in text
    assert "The same for first_third: 0.50." in text
    assert "The same for last_third: not known." in text
    assert " paper, first_third |" in text
    assert " 3.5 |" in text


def test_a_run_of_other_settings_is_named_and_not_ranked(
    done: Path, tmp_path: Path, sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for trial in plan(sweep, out)[:2]:
        scored_copy(done / trial.name, trial, {})
    changed = plan(sweep, out, ["train.clip=2"])
    scored_copy(done / "full_seed0", changed[0], {})
    assert run_sweep(sweep, out, ["train.clip=2"], only=["full"]) == 0
    full, no_ridge, _ = json.loads((out / "table.json").read_text())["variants"]
    assert (full["status"], full["rank"]) == ("done", 1)
    assert (no_ridge["status"], no_ridge["rank"], no_ridge["paper_rank"]) == ("other settings", None, None)
    told = f"other settings than the sweep gives now: {out / 'no_ridge_seed0'} (train.clip: 1.0 -> 2.0). Remove"
    assert told in capsys.readouterr().out


def test_scores_of_other_data_are_not_taken(done: Path, tmp_path: Path, sweep: Sweep) -> None:
    trial, other = plan(sweep, tmp_path / "out")[:2]
    scored_copy(done / "full_seed0", trial, {})
    assert read_scores(trial, sweep) is not None
    scored_copy(done / "no_ridge_seed0", other, {}, data_digest="f" * 64)
    assert read_scores(other, sweep) is None
    # At a URL the present data are not read; the runs are compared with each other.
    remote = [
        replace(one, recipe=replace(one.recipe, data=replace(one.recipe.data, shards="s3://b")))
        for one in (trial, other)
    ]
    assert read_scores(remote[1], sweep) is not None
    scores = {one.name: read_scores(one, sweep) for one in remote}
    with pytest.raises(
        UserError, match=r"all runs scored on the same \w+ data, .* in full_seed0 and f{12} in no_ridge"
    ):
        check_same_data(scores, sweep)


def test_a_pretrained_model_is_a_row_without_training(done: Path, folder: Path, sweep: Sweep) -> None:
    file = folder / "from.yaml"
    file.write_text("title: F\nbase: finetune.yaml\nwindows: 2\nvariants: {pretrained: {only_evaluate: true}}\n")
    assert run_sweep(load_sweep(file), folder / "from") == 0
    (row,) = json.loads((folder / "from" / "table.json").read_text())["variants"]
    (full, *_) = json.loads((done / "table.json").read_text())["variants"]
    assert (row["steps"], row["seconds"]) == (0, 0)
    assert row["scores"]["one step"]["vrmse"] == pytest.approx(full["scores"]["one step"]["vrmse"])
    with pytest.raises(UserError, match=r"variant 'pretrained': finetune\.pretrained: no checkpoint found"):
        run_sweep(load_sweep(file), folder / "nowhere", [f"finetune.pretrained={folder / 'absent'}"])


def test_seconds_choose_the_steps_by_a_probe(folder: Path, tmp_path: Path) -> None:
    file = folder / "timed.yaml"
    file.write_text("title: T\nbase: base.yaml\nwindows: 2\nseconds: 0.3\nvariants: {full: {}}\n")
    sweep, out = load_sweep(file), tmp_path / "out"
    only_one = ["data.datasets=[helmholtz_staircase]"]
    assert run_sweep(sweep, out, only_one) == 0
    probe = json.loads((out / "probes" / "full.json").read_text())
    assert probe["steps"] == max(1, round(0.3 / probe["seconds_per_step"]))
    assert load_recipe(out / "full_seed0" / "recipe.yaml").train.steps == probe["steps"]
    assert len(whole_runs.log(out / "full_seed0")) == probe["steps"]
    assert [path.name for path in (out / "probes").iterdir()] == ["full.json"]
    before = (out / "full_seed0" / "train.out").stat().st_mtime_ns
    assert run_sweep(sweep, out, only_one) == 0
    assert json.loads((out / "probes" / "full.json").read_text()) == probe
    assert (out / "full_seed0" / "train.out").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"seconds: 0\.3 -> 0\.6"):
        run_sweep(replace(sweep, seconds=0.6), out, only_one)
    (out / "probes" / "full.json").write_text("{}")
    with pytest.raises(UserError, match=r"full\.json: not the probe of a sweep"):
        run_sweep(sweep, out, only_one)


def test_ctrl_c_saves_the_run_and_ends_the_sweep(folder: Path, sweep: Sweep, tmp_path: Path) -> None:
    command = [PYTHON, "-m", "fm", "sweep", str(sweep.file.with_suffix("")), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([*command, "train.steps=5000"], stderr=subprocess.PIPE, text=True)
    run = tmp_path / "out" / "full_seed0"
    whole_runs.wait_for(lambda: (run / "log.jsonl").is_file() and (run / "log.jsonl").stat().st_size, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the same command continues from here" in err
    assert json.loads((run / "events.jsonl").read_text().splitlines()[-1])["state"] == "interrupted"
    assert list((run / "checkpoints").glob("step_*"))
    assert not (tmp_path / "out" / "table.md").exists()


SWEEP = str(Path(__file__).parents[3] / "recipes" / "ablations" / "table14")


@pytest.mark.parametrize("words", [[SWEEP, "run.seed=3", "--out", "o"], [SWEEP, "--out", "o", "run.seed=3"]])
def test_overrides_stand_anywhere(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *words]) == 2
    assert "override 'run.seed=3': a sweep names, places and seeds its own runs" in capsys.readouterr().err


def test_what_is_no_override_is_no_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", SWEEP, "--out", "o", "--step=3"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --step=3" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_seconds_are_above_0(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", SWEEP, f"--seconds={seconds}"]) == 2
    assert "--seconds: expected seconds of training above 0" in capsys.readouterr().err


def test_an_unknown_variant_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", SWEEP, "--only", "C1: fulll"]) == 2
    assert "Did you mean 'C1: full'?" in capsys.readouterr().err
