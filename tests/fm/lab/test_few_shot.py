"""The few-shot curve: a real study of two runs, and how others are planned and refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from html_reader import Reader
from PIL import Image
from whole_runs import DATASETS, log, small

from data_pipeline.errors import UserError
from data_pipeline.windows.loader import open_readers
from fm.checkpoint import find_checkpoint, load_pretrained
from fm.config import dump_recipe
from fm.lab.few_shot import few_shot_figure, plan_few_shot, run_few_shot
from fm.lab.sweep_file import plan
from fm.training.trainer import train

pytestmark = pytest.mark.usefixtures("forked_runs")
NEW = "shear_flow"


@pytest.fixture(scope="module")
def recipe(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that extends a model of two datasets by a third, with settings that a run of one cannot have."""
    folder = tmp_path_factory.mktemp("few_shot")
    assert train(small(tiny_shards, folder / "pretrained", train={"steps": 3, "learning_rate": 2e-3})) == 0
    weights = {"scheme": "weights", "weights": {DATASETS[0]: 1.0, DATASETS[1]: 1.0, NEW: 2.0}}
    whole = small(
        tiny_shards,
        folder / "unused",
        data={"datasets": [*DATASETS, NEW]},
        train={"steps": 3},
        sampling=weights,
        finetune={"pretrained": str(folder / "pretrained"), "unroll_steps": 1, "unroll_override": {DATASETS[0]: 2}},
        adapt={"datasets": [NEW], "alone_steps": 1, "share": 0.5, "rates": {"trunk": 0.1}},
        validation={"every": 2, "windows": 2},
        tracking={"gradient_cosine_every": 2},
    )
    (folder / "extend.yaml").write_text(dump_recipe(whole))
    return folder / "extend.yaml"


def test_both_arms_see_the_same_windows_and_the_study_is_written(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.progress.LINE_SECONDS", 0.0)
    out = tmp_path / "study"
    assert run_few_shot(recipe, NEW, "1", out) == 0
    printed, progress = capsys.readouterr()
    assert re.search(rf"^few-shot {NEW}: 0 of 2 runs in .*, pretrained_1_seed0, step \d/3$", progress, re.MULTILINE)
    assert re.search(
        rf"^few-shot {NEW}: 1 of 2 runs in .* left, from_scratch_1_seed0, evaluation$", progress, re.MULTILINE
    )
    logs = {arm: log(out / f"{arm}_1_seed0") for arm in ("pretrained", "from_scratch")}
    assert [line["windows"] for line in logs["pretrained"]] == [line["windows"] for line in logs["from_scratch"]]
    assert {line["dataset"] for line in logs["pretrained"]} == {NEW}
    models = [load_pretrained(find_checkpoint(out / f"{arm}_1_seed0")) for arm in ("pretrained", "from_scratch")]
    assert models[0].config == models[1].config
    assert models[0].num_parameters() == models[1].num_parameters()
    study = json.loads((out / "few_shot.json").read_text())
    assert (study["counts"], study["steps"], study["seen"]) == ([1], 3, 12)
    for arm, folder in (("pretrained", "pretrained_1_seed0"), ("from scratch", "from_scratch_1_seed0")):
        scores = json.loads((out / folder / "report" / "scores.json").read_text())
        one_step = scores["datasets"][NEW]["one_step"]
        assert study["vrmse"][arm]["one step"] == [one_step[scores["protocol"]["trajectories"]]]
        assert study["persistence"]["one step"] == one_step["persistence"]
    ours, theirs = (study["vrmse"][arm]["one step"][0] for arm in ("pretrained", "from scratch"))
    for text in (printed, (out / "few_shot.md").read_text()):
        assert f"{ours:.4f} |" in text
        assert f"{theirs:.4f} |" in text
        assert "peak learning rate 0.002. From scratch: peak learning rate 0.002" in text  # the pretrained model's
        assert "3 steps, 12 windows of shear_flow alone, the same windows in the same order" in text
    page = Reader((out / "index.html").read_text())
    assert f"{ours:.4f}" in page.texts
    assert len(page.of("img")) == 1
    assert Image.open(out / "few_shot.png").size[0] > 500
    times = {path: path.stat().st_mtime_ns for path in out.rglob("log.jsonl")}
    assert run_few_shot(recipe, NEW, "1", out) == 0  # what is done is kept
    assert {path: path.stat().st_mtime_ns for path in out.rglob("log.jsonl")} == times


def test_runs_differ_in_their_start_and_rate_alone(recipe: Path, tiny_shards: Path, tmp_path: Path) -> None:
    total = open_readers(tiny_shards, [NEW], "train")[NEW].num_trajectories
    study = plan_few_shot(recipe, NEW, "all, 1", ["train.steps=5"])
    assert study.counts == (1, total)
    trials = plan(study.sweep, tmp_path)
    assert [trial.name for trial in trials][:2] == ["pretrained_1_seed0", "from_scratch_1_seed0"]
    for ours, theirs in zip(trials[::2], trials[1::2], strict=True):
        assert ours.recipe.data == theirs.recipe.data
        assert ours.recipe.train.steps == theirs.recipe.train.steps == 5
        assert ours.recipe.sampling == theirs.recipe.sampling
        assert ours.recipe.finetune is not None
        assert theirs.recipe.finetune is None
        assert ours.recipe.adapt is None  # there is nothing to protect
        assert theirs.recipe.adapt is None
        assert ours.recipe.train == theirs.recipe.train
    assert study.rates == {"pretrained": 2e-3, "from scratch": 2e-3}
    faster = plan_few_shot(recipe, NEW, "1", ["train.learning_rate=0.25"], scratch_rate=0.5)
    assert [trial.recipe.train.learning_rate for trial in plan(faster.sweep, tmp_path)] == [0.25, 0.5]


def test_a_model_of_two_frames_trained_with_muon_lends_both_rates_and_its_windows(
    tiny_shards: Path, tmp_path: Path
) -> None:
    muon = {"steps": 2, "optimizer": "muon", "learning_rate": 2e-3, "muon_learning_rate": 3e-2}
    two = {"datasets": DATASETS, "context": 2}
    assert train(small(tiny_shards, tmp_path / "pretrained", data=two, train=muon)) == 0
    finetune = {"pretrained": str(tmp_path / "pretrained"), "unroll_steps": 1}
    slow = {"steps": 2, "optimizer": "muon", "learning_rate": 1e-4, "muon_learning_rate": 5e-4}
    file = tmp_path / "extend.yaml"
    data = {"datasets": [*DATASETS, NEW], "context": 2}
    file.write_text(dump_recipe(small(tiny_shards, tmp_path / "unused", data=data, train=slow, finetune=finetune)))

    def trained_rates(*overrides: str, scratch: float | None = None) -> list[tuple[float, float]]:
        study = plan_few_shot(file, NEW, "1", overrides, scratch)
        trains = [trial.recipe.train for trial in plan(study.sweep, tmp_path / "study")]
        assert [one.learning_rate for one in trains] == list(study.rates.values())
        assert [one.muon_learning_rate for one in trains] == list(study.muon_rates.values())
        return [(one.learning_rate, one.muon_learning_rate) for one in trains]

    assert trained_rates() == [(2e-3, 3e-2), (2e-3, 3e-2)]
    assert trained_rates("train.muon_learning_rate=0.25") == [(2e-3, 0.25), (2e-3, 0.25)]
    assert trained_rates("train.learning_rate=0.25", scratch=0.5) == [(0.25, 3e-2), (0.5, 6e-2)]

    frames = open_readers(tiny_shards, [NEW], "train")[NEW].num_frames(0)
    assert plan_few_shot(file, NEW, "1").windows == (frames - 2,)  # two given frames and one to predict
    with pytest.raises(UserError, match=r"data\.context: the recipe has 1 input frames, but .* trained with 2"):
        plan_few_shot(file, NEW, "1", ["data.context=1"])


def test_more_trajectories_than_there_are_are_refused(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"--few-shot: shear_flow has (\d+) training .* up to \1, or all; got 4000"):
        plan_few_shot(recipe, NEW, "1,4000")


@pytest.mark.parametrize("text", ["0", "one", "", "1,,2", "-1"])
def test_numbers_of_trajectories_are_numbers(recipe: Path, text: str) -> None:
    with pytest.raises(UserError, match="--few-shot: expected numbers above 0, or all, with commas between, got"):
        plan_few_shot(recipe, NEW, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["finetune=null", "adapt=null"], "expected a recipe that goes on from a pretrained model one step at a time"),
        (["finetune.unroll_steps=2"], "expected a recipe that goes on from a pretrained model one step at a time"),
        (["run.seed=3"], "override 'run.seed=3': few-shot names and places its runs"),
        (["data.datasets=[shear_flow]"], "few-shot names and places its runs, chooses their data itself"),
        (["adapt.rates.trunk=0.5"], "and lets all parts of the model move"),
        (["finetune.pretrained=nowhere"], "no checkpoint found"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    recipe: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        run_few_shot(recipe, NEW, "1", tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_the_picture_has_the_curves_and_leaves_out_what_is_not_covered() -> None:
    curves: dict[str, dict[str, Any]] = {
        "pretrained": {"one step": [0.2, 0.1], "1:20": [None, 0.5]},
        "from scratch": {"one step": [0.4, 0.3], "1:20": [0.9, 0.8]},
    }
    figure = few_shot_figure([1, 4], curves, {"one step": 0.5, "1:20": None}, "equal steps")
    (axes,) = figure.axes
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(drawn["pretrained"]) == [0.2, 0.1]
    assert list(drawn["from scratch"]) == [0.4, 0.3]
    assert list(drawn["persistence"]) == [0.5, 0.5]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "4"]
