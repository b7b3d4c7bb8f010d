"""An extended run or export is an exported model: its files, scores, card, licence, lineage, and the Hub."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from forked import Forked
from hub_server import HubServer
from huggingface_hub import ModelCard
from whole_runs import DATASETS

from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from fm.evaluation.evaluate import evaluate_run
from fm.evaluation.trained import TrainedModel
from fm.model.files import verify_exported
from fm.model.wavelit import WaveLiTFM
from fm.share.export import export_run
from fm.share.extend import extend

NEW = "shear_flow"


THREE = sorted([*DATASETS, NEW])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def extended(run: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, extended by a dataset. Read only."""
    folder = tmp_path_factory.mktemp("extended") / "models" / "three"
    extend(str(run), [NEW], str(tiny_shards), folder, "nearest")
    return folder


def test_a_run_and_its_export_become_the_same_model(
    run: Path, exported_model: Path, extended: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    extend(str(exported_model), [NEW], str(tiny_shards), tmp_path / "three", "nearest")
    of_run, of_export = tree(extended), tree(tmp_path / "three")
    assert of_run.keys() == of_export.keys()
    assert {name for name in of_run if of_run[name] != of_export[name]} == {"README.md", "artefact.json"}
    ours, theirs = (verify_exported(folder) for folder in (extended, tmp_path / "three"))
    assert (ours["lineage"].pop("model"), theirs["lineage"].pop("model")) == (str(run), str(exported_model))
    assert {**ours, "files": None} == {**theirs, "files": None}


def test_it_is_opened_as_an_exported_model(run: Path, extended: Path, tiny_shards: Path) -> None:
    content = verify_exported(extended)
    assert set(content["files"]) == set(tree(extended)) - {"artefact.json"}
    source, trained = TrainedModel.open(run), TrainedModel.open(extended)
    assert (content["name"], content["step"], content["licence"]) == ("three", 8, "MIT")
    assert content["lineage"]["weights"] == source.weights
    assert (content["lineage"]["added"], content["lineage"]["earlier"]) == ([NEW], None)
    assert trained.report == Path("three_report")
    assert (trained.recipe.data.shards, trained.recipe.data.datasets) == (str(tiny_shards), THREE)
    assert trained.shards.items() > source.shards.items()
    assert trained.shards[NEW] == trained.readers([NEW], "train")[NEW].manifest.digest
    assert sorted(trained.registry().cards) == THREE
    assert all(trained.registry().cards[name] == load_registry().cards[name] for name in THREE)


def test_the_old_datasets_score_as_in_the_runs_report(run: Path, extended: Path, tmp_path: Path) -> None:
    evaluate_run(extended, out=tmp_path / "report")
    before, after = (json.loads((out / "scores.json").read_text()) for out in (run / "report", tmp_path / "report"))
    assert {name: after["datasets"][name] for name in DATASETS} == before["datasets"]


def test_its_card_says_what_was_added_and_not_trained(run: Path, extended: Path) -> None:
    card = ModelCard.load(extended / "README.md")
    assert card.data.license == "mit"
    assert "# three" in card.text
    assert f"It is `{run}`, extended by {NEW}. **Not trained yet: {NEW}.**" in card.text
    assert f"it predicts for {NEW} the given state moved by the data's mean change." in card.text
    assert "None are known" in card.text
    assert f"Before it was extended by {NEW}: width 16" in card.text
    assert '"helmholtz_staircase", steps=10' in card.text


def test_another_extension_keeps_licence_and_lineage(run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "one", license="CC-BY-4.0")
    extend(str(tmp_path / "one"), [NEW], str(tiny_shards), tmp_path / "two", "zero")
    extend(str(tmp_path / "two"), ["active_matter"], str(tiny_shards), tmp_path / "three", "zero")
    content = verify_exported(tmp_path / "three")
    assert content["licence"] == "CC-BY-4.0"
    assert not (tmp_path / "three" / "LICENSE").exists()
    assert content["lineage"]["earlier"] == verify_exported(tmp_path / "two")["lineage"]
    text = (tmp_path / "three" / "README.md").read_text()
    assert (
        f"It is `{tmp_path / 'two'}`, extended by active_matter. **Not trained yet: active_matter and {NEW}.**" in text
    )
    with pytest.raises(UserError, match="is an exported model already"):
        export_run(tmp_path / "three", tmp_path / "four")


def test_what_lies_beside_the_weights_stays_with_them(exported_model: Path, extended: Path, tmp_path: Path) -> None:
    model = WaveLiTFM.from_pretrained(extended)
    shutil.copytree(exported_model, tmp_path / "copy")
    model.save_pretrained(tmp_path / "copy")  # over an export with scores and pictures
    assert tree(tmp_path / "copy") == tree(extended)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path / "copy")
    assert set(tree(tmp_path / "copy")) == {"model.json", "model.safetensors"}


def test_a_pushed_extension_takes_the_place_of_what_it_extended(
    exported_model: Path, extended: Path, tmp_path: Path
) -> None:
    script = tmp_path / "push.py"
    script.write_text('import sys, fm; fm.WaveLiTFM.from_pretrained(sys.argv[1]).push_to_hub("me/model")')
    with HubServer() as hub:
        hub.repositories["me/model"] = [tree(exported_model)]
        environment = {**os.environ, **hub.environment(tmp_path / "cache")}
        process = Forked(script, str(extended), environment=environment)
        _, said = process.communicate()
        assert process.returncode == 0, said
        assert hub.repositories["me/model"][-1] == tree(extended)


def test_a_card_that_says_something_else_now_is_not_extended(
    of_other_cards: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"helmholtz_staircase\.yaml: fields or boundary are not those"):
        extend(str(of_other_cards), [NEW], str(tiny_shards), tmp_path / "three", "zero")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_model_without_a_recipe_is_not_extended(extended: Path, tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    for name in ("model.json", "model.safetensors"):
        shutil.copy(extended / name, tmp_path / "plain")
    with pytest.raises(UserError, match="plain: expected a run, one of its checkpoints, or an exported model"):
        extend(str(tmp_path / "plain"), ["active_matter"], str(tiny_shards), tmp_path / "new", "zero")
