"""`fm finetune`: a trained model learns new datasets in one command, and what does not fit is refused at once."""

import json
from pathlib import Path

import pytest
from forked import Forked
from hub_server import HubServer
from whole_runs import DATASETS, finish, log, small

from fm.checkpoint import find_checkpoint, load_pretrained
from fm.cli import main as fm
from fm.evaluation.scores import Scores
from fm.share.export import export_run
from fm.share.finetune import plan_finetuning
from fm.training.trainer import train

NEW = "shear_flow"
QUICK = ["train.steps=4", "adapt.alone_steps=2", "validation.every=0", "--windows=2"]


@pytest.fixture(scope="module")
def run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two datasets, of two frames, with Muon. Read only."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    muon = {"steps": 2, "optimizer": "muon", "learning_rate": 2e-3, "muon_learning_rate": 3e-2}
    assert train(small(tiny_shards, folder, data={"datasets": DATASETS, "context": 2}, train=muon)) == 0
    return folder


@pytest.fixture(scope="module")
def data(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the new dataset alone. Read only."""
    folder = tmp_path_factory.mktemp("new")
    (folder / NEW).symlink_to(tiny_shards / NEW)
    return folder


@pytest.fixture(scope="module")
def old(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the datasets that the model knows, and of one more. Read only."""
    folder = tmp_path_factory.mktemp("old")
    for name in (*DATASETS, "active_matter"):
        (folder / name).symlink_to(tiny_shards / name)
    return folder


def test_a_new_dataset_is_learned_beside_the_old_ones_and_scored_before_and_after(
    run: Path, data: Path, old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    command = ["finetune", str(run), f"--out={out}", f"--replay={old}", "--freeze=trunk", "--data", str(data), *QUICK]
    assert fm(command) == 0
    printed = capsys.readouterr().out
    drawn = [set(line["dataset"].split("+")) for line in log(out)]
    assert len(drawn) == 4
    assert drawn[:2] == [{NEW}, {NEW}]  # alone at first
    assert set.union(*drawn) <= {NEW, *DATASETS}  # active_matter is none of the model's
    before, after = load_pretrained(run), load_pretrained(find_checkpoint(out))
    assert set(after.specs) == {NEW, *DATASETS}
    weights, moved = before.state_dict(), after.state_dict()
    trunk = [name for name in weights if name.split(".")[0] not in ("lifting", "task_vectors", "heads")]
    assert trunk
    assert all(weights[name].equal(moved[name]) for name in trunk)
    extended = load_pretrained(out / "extended").state_dict()
    assert any(not extended[name].equal(moved[name]) for name in moved if name.startswith(f"heads.{NEW}."))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    table = {(row[0], row[2]): row for row in rows if row[1] in ("new", "replayed")}
    start, end = (Scores.load(out / folder / "scores.json") for folder in ("before", "report"))
    for name in (NEW, *DATASETS):
        cells = table[name, "one step"]
        for scores, cell in ((start, cells[4]), (end, cells[5])):
            block = scores.datasets[name].one_step
            assert block is not None
            assert cell.startswith(f"{block.vrmse(scores.statistic):.4f}")
        assert cells[1] == ("new" if name == NEW else "replayed")
    assert printed.count("Finetuning") == 1
    written = (out / "report" / "scores.json").stat().st_mtime_ns
    assert fm(command) == 0  # what is done is kept
    assert (out / "report" / "scores.json").stat().st_mtime_ns == written
    assert fm(["finetune", str(out), f"--out={run}", "--data", str(old)]) == 2
    assert f"--out {run}: expected a new folder, found another run" in capsys.readouterr().err
    assert fm([*command, f"--data={old}"]) == 2
    assert f"--out {out}: expected a new folder, or the run of an earlier call" in capsys.readouterr().err


@pytest.mark.usefixtures("forked_runs")
def test_few_trajectories_are_compared_with_training_from_scratch(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    command = ["finetune", str(run), "--data", str(data), *QUICK, "--few-shot=1", f"--out={out}"]
    assert fm([*command, "train.learning_rate=0.004"]) == 0
    printed = capsys.readouterr().out
    assert set(load_pretrained(find_checkpoint(out)).specs) == {NEW}
    assert f"The finetuned model does not know {', '.join(DATASETS)}: not replayed (--replay)." in printed
    study = json.loads((out / "few_shot" / NEW / "few_shot.json").read_text())
    assert (study["counts"], study["steps"]) == ([1], 4)
    assert study["pretrained"] == str(out / "extended")
    text = (out / "few_shot" / NEW / "few_shot.md").read_text()  # the rate given, and the model's own
    assert "peak learning rate 0.004, Muon's 0.03. From scratch: peak learning rate 0.004, Muon's 0.03" in text
    models = [load_pretrained(out / "few_shot" / NEW / f"{arm}_1_seed0") for arm in ("pretrained", "from_scratch")]
    assert [model.context for model in models] == [2, 2]
    pretrained, scratch = (study["vrmse"][arm]["one step"][0] for arm in ("pretrained", "from scratch"))
    assert f"{pretrained:.4f} |" in printed
    assert f"{scratch:.4f} |" in printed


def test_two_processes_finetune_a_model_of_the_hub(run: Path, data: Path, tmp_path: Path) -> None:
    model = export_run(run, tmp_path / "model")
    files = {str(file.relative_to(model)): file.read_bytes() for file in model.rglob("*") if file.is_file()}
    script = tmp_path / "finetune.py"
    script.write_text("import sys; from fm.cli import main; sys.exit(main())")
    with HubServer() as hub:
        hub.repositories["me/model"] = [files]
        command = ["finetune", "hf://me/model", "--data", str(data), f"--out={tmp_path / 'tuned'}"]
        process = Forked(script, *command, *QUICK, "--processes=2", environment=hub.environment(tmp_path / "cache"))
        assert finish(process)[0] == 0, process.communicate()
    assert json.loads((tmp_path / "tuned" / "run.json").read_text())["world_size"] == 2
    assert len(log(tmp_path / "tuned")) == 4
    assert set(load_pretrained(find_checkpoint(tmp_path / "tuned")).specs) == {NEW}
    assert json.loads((tmp_path / "tuned" / "extended" / "artefact.json").read_text())["lineage"]["model"] == command[1]


def test_settings_follow_the_models_recipe_and_the_number_of_steps(
    run: Path, data: Path, old: Path, tmp_path: Path
) -> None:
    plan = plan_finetuning(str(run), [str(data)], out=tmp_path / "x", overrides=["train.steps=100"])
    source, chosen = plan.trained.recipe, plan.recipe
    assert (plan.new, plan.replayed) == ((NEW,), ())
    assert chosen.loss == source.loss
    assert chosen.train.learning_rate == source.train.learning_rate
    assert (chosen.train.steps, chosen.train.warmup_steps, chosen.validation.every) == (100, 4, 50)
    assert chosen.adapt is not None
    assert (chosen.adapt.alone_steps, chosen.adapt.share, chosen.adapt.rates.trunk) == (20, None, 1.0)
    kept = plan_finetuning(str(run), [str(data)], str(old)).recipe  # old datasets are replayed, so that it keeps them
    assert kept.train.learning_rate == source.train.learning_rate / 4
    assert kept.train.muon_learning_rate == source.train.muon_learning_rate / 4
    assert kept.adapt is not None
    assert kept.adapt.rates.trunk == 0.25
    frozen = plan_finetuning(str(run), [str(data)], freeze=["embedding", "trunk"]).recipe.adapt
    assert frozen is not None
    assert (frozen.rates.embedding, frozen.rates.trunk, frozen.rates.head) == (0.0, 0.0, 1.0)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--data", "DATA"], "no checkpoint found: looked for nowhere/model.json"),
        (["RUN", "--data", "EMPTY"], "no train shards under"),
        (["RUN", "--data", "KNOWN"], "expected a dataset that RUN does not know, got only datasets that it knows"),
        (
            ["RUN", "--data", "DATA", "DATA2"],
            f"{NEW}: expected its shards in one place, got them in two: DATA and DATA2",
        ),
        (["RUN", "--data", "DATA", "--replay", "EMPTY"], "no train shards under EMPTY"),
        (["RUN", "--data", "DATA", "--replay", "DATA"], "--replay DATA: expected shards of datasets that RUN knows"),
        (
            ["RUN", "--data", "DATA", "--freeze", "trunc"],
            "--freeze: expected some of embedding, trunk, got 'trunc'",
        ),
        (["RUN", "--data", "DATA", "--freeze", "trunk,head"], "got 'head': the heads of new datasets begin at zero"),
        (["RUN", "--data", "DATA", "--windows", "0"], "--windows: expected at least 1 one-step window per dataset"),
        (["RUN", "--data", "TRAIN"], f"no test shards under TRAIN: expected, and did not find,\n  TRAIN/{NEW}/test/"),
        (["RUN", "--data", "DATA", "--few-shot", "1,99"], f"--few-shot: {NEW} has 2 training trajectories, expected"),
        (["RUN", "--data", "DATA", "--few-shot", "none"], "--few-shot: expected numbers above 0, or all"),
        (
            ["RUN", "--data", "DATA", "--few-shot", "1", "finetune.unroll_steps=2"],
            f"few-shot {NEW}: expected a recipe that goes on from a pretrained model one step at a time",
        ),
        (["RUN", "--data", "DATA", "--scratch-learning-rate=0"], "--scratch-learning-rate: expected a number above 0"),
        (["RUN", "--data", "DATA", "--scratch-learning-rate=1"], "--scratch-learning-rate: expected --few-shot beside"),
        (["RUN", "--data", "DATA", "nowhere"], "--data nowhere: expected a folder of shards, or its URL; there is no"),
        (["RUN", "--data", "DATA", "--processes=0"], "--processes: expected a number above 0, got 0"),
        (["RUN", "--data", "DATA", "loss={import: a:B}"], "the recipe of RUN: a:B is no code of this project"),
        (["RUN", "--data", "DATA", "run.seed=3"], "override 'run.seed=3': fm finetune sets run.seed itself"),
        (["RUN", "--data", "DATA", "train.stepz=3"], "unknown key train.stepz (value 3); did you mean train.steps?"),
    ],
)
def test_what_does_not_fit_is_one_message_and_nothing_is_written(
    run: Path,
    data: Path,
    tiny_shards: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {name: tmp_path / name.lower() for name in ("EMPTY", "KNOWN", "DATA2", "TRAIN")}
    for folder in places.values():
        folder.mkdir()
    (places["KNOWN"] / DATASETS[0]).symlink_to(tiny_shards / DATASETS[0])
    (places["DATA2"] / NEW).symlink_to(tiny_shards / NEW)
    (places["TRAIN"] / NEW).mkdir()
    for split in ("train", "valid"):
        (places["TRAIN"] / NEW / split).symlink_to(tiny_shards / NEW / split)
    places |= {"RUN": run, "DATA": data}
    command = [str(places.get(word, word)) for word in arguments]
    assert fm(["finetune", *command, f"--out={tmp_path / 'out'}"]) == 2
    for name in sorted(places, key=len, reverse=True):
        message = message.replace(name, str(places[name]))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
