"""`fm export`: what it writes, that others can use it, what it refuses; and steps as programs for torch alone."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade import make_spec, stir
from huggingface_hub import ModelCard
from whole_runs import DATASETS, fm, small

from data_pipeline.errors import UserError
from data_pipeline.registry import load_folders, load_registry, packaged_folder
from data_pipeline.windows.loader import open_readers
from fm.checkpoint import find_checkpoint, load_pretrained
from fm.cli import main
from fm.evaluation.trained import TrainedModel
from fm.model.files import verify_exported
from fm.model.spec import DatasetSpec, ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.share.export import export_run, find_cards, step_program
from fm.training.trainer import train


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_folder_holds_the_averaged_weights_and_lists_every_file(run: Path, exported_model: Path) -> None:
    content = verify_exported(exported_model)
    files = tree(exported_model)
    assert set(content["files"]) == set(files) - {"artefact.json"}
    assert {"LICENSE", "README.md", "recipe.yaml", "scores.json", "pictures/growth.png"} <= set(files)
    assert files["model.safetensors"] == (find_checkpoint(run) / "ema.safetensors").read_bytes()
    assert files["scores.json"] == (run / "report/scores.json").read_bytes()
    trained = TrainedModel.open(run)
    assert (content["step"], content["licence"], content["lineage"]) == (8, "MIT", {})
    assert sorted(content["datasets"]) == DATASETS
    maze = content["datasets"]["acoustic_scattering_maze"]
    reader = trained.readers(["acoustic_scattering_maze"], "train")["acoustic_scattering_maze"]
    assert maze["shards"] == reader.manifest.digest
    assert maze["grid"] == list(reader.manifest.grid)
    assert content["channels"]["mask"]["unit"] == "none"
    assert "buoyancy" not in content["channels"]
    model = load_pretrained(exported_model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in trained.model.state_dict().items())


def test_the_cards_are_a_registry_by_themselves(exported_model: Path) -> None:
    own, packaged = load_folders([exported_model / "cards"]), load_registry()
    assert sorted(own.cards) == DATASETS
    for name in DATASETS:
        assert own.cards[name] == packaged.cards[name]
    assert own.channel_cards == {name: packaged.channel_cards[name] for name in own.channels}
    assert TrainedModel.open(exported_model).registry() == own


def test_an_export_scores_as_its_run_and_is_not_changed(run: Path, exported_model: Path, tmp_path: Path) -> None:
    before = tree(exported_model)
    done = fm("evaluate", str(exported_model), "--out", str(tmp_path / "report"))
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        json.loads((folder / "scores.json").read_text()) for folder in (tmp_path / "report", run / "report")
    )
    assert ours["datasets"] == theirs["datasets"]
    assert ours["origin"]["weights"] == theirs["origin"]["weights"]
    assert tree(exported_model) == before
    assert TrainedModel.open(exported_model).report == Path("small_report")


def test_an_export_is_finetuned_as_its_run(run: Path, exported_model: Path, tiny_shards: Path, tmp_path: Path) -> None:
    finished = []
    for name, pretrained in (("of_run", run), ("of_export", exported_model)):
        finetune = {"pretrained": str(pretrained), "unroll_steps": 2}
        recipe = small(tiny_shards, tmp_path / name, finetune=finetune, train={"steps": 2})
        assert train(recipe) == 0
        finished.append(load_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(finished[0][key], finished[1][key]) for key in finished[0])
    again = export_run(tmp_path / "of_export", tmp_path / "second")
    assert verify_exported(again)["lineage"] == {"pretrained": str(exported_model)}
    assert f"Finetuned from `{exported_model}`" in (again / "README.md").read_text()


def test_the_model_card_is_valid_and_complete(exported_model: Path) -> None:
    card = ModelCard.load(exported_model / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "wavelit-fm"
    assert "pde" in card.data.tags
    assert card.data.datasets is None  # the grids are not The Well's
    text = card.text
    for part in ("## Use", "## Scores", "persistence", "## Limits", "Not The Well's own files", "CC-BY-4.0", "Agocs"):
        assert part in text
    scores = json.loads((exported_model / "scores.json").read_text())
    assert f"{scores['datasets']['helmholtz_staircase']['one_step']['median']:.4f}" in text
    assert "protocol thirds v1" in text
    linked = re.findall(r"\]\((pictures/[^)]+)\)", text)
    assert linked
    assert all((exported_model / picture).is_file() for picture in linked)
    widths = [{line.count("|") for line in block.splitlines()} for block in re.findall(r"(?:^\|.*\n)+", text, re.M)]
    assert all(len(counts) == 1 for counts in widths)


def test_the_usage_of_the_card_runs(exported_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", (exported_model / "README.md").read_text(), re.S)
    assert code is not None
    reader = open_readers(TrainedModel.open(exported_model).recipe.data.shards, ["helmholtz_staircase"], "test")
    [reader] = reader.values()
    frame, constants = reader.trajectory_frames(0, 0, 1)[0], reader.constants(0)
    names = (*reader.manifest.state_channels, *reader.manifest.constant_channels)
    given = dict(zip(names, [*frame, *constants], strict=True))
    monkeypatch.chdir(exported_model.parent)
    exec(code[1], given)
    assert given["series"]["pressure_re"].shape == (10, *reader.manifest.grid)


def test_without_a_report_of_these_weights_there_are_no_scores(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    scores = json.loads((other / "report/scores.json").read_text())
    scores["origin"]["weights"] = "another"
    (other / "report/scores.json").write_text(json.dumps(scores))
    done = fm("export", str(other), str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    assert "exported without scores and pictures" in done.stdout
    assert "a report of other weights" in done.stdout
    assert f"fm evaluate {find_checkpoint(other)} --out {other / 'report'}" in done.stdout
    assert not (tmp_path / "model/scores.json").exists()
    assert "None are known" in (tmp_path / "model/README.md").read_text()
    with pytest.raises(UserError, match="a report of other weights"):
        export_run(other, tmp_path / "asked", report=other / "report")
    with pytest.raises(UserError, match="no report there"):
        export_run(other, tmp_path / "asked", report=tmp_path / "nowhere")
    assert not (tmp_path / "asked").exists()


def test_a_link_in_a_received_run_is_not_exported(run: Path, tmp_path: Path) -> None:
    received, key = tmp_path / "run", tmp_path / "id_rsa"
    shutil.copytree(run, received)
    key.write_text("secret")
    (received / "report/pictures/key.png").symlink_to(key)
    with pytest.raises(UserError, match=r"report: expected paths inside it, got 'pictures/key.png'"):
        export_run(received, tmp_path / "model", report=received / "report")
    (received / "checkpoints").rename(tmp_path / "others")
    (received / "checkpoints").symlink_to(tmp_path / "others")
    for command in (["export", str(received), str(tmp_path / "model")], ["status", str(received)]):
        assert main(command) == 2
    assert not (tmp_path / "model").exists()


def test_an_earlier_export_is_replaced_and_nothing_else(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_run(run, tmp_path / "model", license="CC-BY-4.0")
    assert not (tmp_path / "model/LICENSE").exists()
    export_run(run, tmp_path / "model")
    assert (tmp_path / "model/LICENSE").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    for folder in (tmp_path / "mine", tmp_path / "mine/notes.txt", run):
        assert main(["export", str(run), str(folder)]) == 2
        assert "expected a folder that is not there yet, or an earlier export" in capsys.readouterr().err
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_left_as_it_was(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        export_run(run, tmp_path / "file" / "model")
    with pytest.raises(UserError, match="expected an SPDX identifier"):
        export_run(run, tmp_path / "model", license="my own!")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_an_export_is_not_exported_again(exported_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an exported model already"):
        export_run(exported_model, tmp_path / "again")


def test_a_card_that_says_something_else_now_is_refused(of_other_cards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"helmholtz_staircase\.yaml: fields or boundary are not those"):
        export_run(of_other_cards, tmp_path / "model")


def test_cards_of_ones_own_come_along(tmp_path: Path) -> None:
    mine, bundle = tmp_path / "mine", tmp_path / "bundle"
    (mine / "datasets").mkdir(parents=True)
    (mine / "channels.yaml").write_text("heat: {description: heat, unit: joule}\nunused: {description: x, unit: y}\n")
    (mine / "datasets/rods.yaml").write_text(
        "# Rods\nname: rods\ndescription: rods\nstate: {t0: {heat: [heat], other: [D_yx]}}\n"
        "boundary: {x: [WALL, WALL], y: [WALL, WALL]}\ngrid: [32, 32]\ndt: 1\n"
    )
    registry = load_registry(mine)
    cards = find_cards([(["rods", "shear_flow"], [packaged_folder(), mine])])
    files = cards.files()
    for name, data in files.items():
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(data)
    alone = load_folders([bundle / "cards"])
    assert alone.cards == {name: registry.cards[name] for name in ("rods", "shear_flow")}
    assert alone == cards.registry
    assert set(alone.channels) == {"heat", "D_xy", "D_yx", "tracer", "pressure", "velocity_x", "velocity_y"}
    assert files["cards/datasets/rods.yaml"] == (mine / "datasets/rods.yaml").read_bytes()
    with pytest.raises(UserError, match="dataset 'rods': no card of this name"):
        find_cards([(["rods"], [packaged_folder()])])


def test_the_first_source_that_has_a_card_says_what_its_channels_mean(tmp_path: Path) -> None:
    for name, unit in (("first", "joule"), ("second", "kelvin")):
        (tmp_path / name / "datasets").mkdir(parents=True)
        (tmp_path / name / "channels.yaml").write_text(f"heat: {{description: heat, unit: {unit}}}\n")
    card = "name: {}\ndescription: {}\nstate: {{t0: {{heat: [heat]}}}}\ngrid: [32, 32]\ndt: 1\n"
    card += "boundary: {{x: [WALL, WALL], y: [WALL, WALL]}}\n"
    (tmp_path / "first/datasets/rods.yaml").write_text(card.format("rods", "of the first"))
    for name in ("rods", "plates"):
        (tmp_path / f"second/datasets/{name}.yaml").write_text(card.format(name, "of the second"))
    cards = find_cards([(["rods"], [tmp_path / "first"]), (["rods", "plates"], [tmp_path / "second"])])
    assert {name: one.description for name, one in cards.registry.cards.items()} == {
        "plates": "of the second",
        "rods": "of the first",
    }
    assert cards.registry.channel_cards["heat"].unit == "joule"


SCRIPT = """
import importlib.util, sys
import numpy, torch
assert importlib.util.find_spec("fm") is None
step = torch.export.load(sys.argv[1]).module()
given = numpy.load(sys.argv[2])
numpy.savez(sys.argv[3], **{
    str(size): step(torch.from_numpy(given["state"][:size]), torch.from_numpy(given["constants"][:size])).numpy()
    for size in (1, 2, 5)
})
"""
# one axis wraps, one does not
ENDS = (("PERIODIC", "PERIODIC"), ("WALL", "OPEN"))
MAZE = replace(make_spec("acoustic_scattering_maze"), grid=(18, 22), boundary=ENDS)
SHEAR = make_spec("shear_flow")
HELD = replace(
    make_spec("rayleigh_benard"),
    grid=(18, 22),
    conserved=(
        ("mean", ("buoyancy",)),
        ("mean_square", ("pressure",)),
        ("divergence", ("velocity_x", "velocity_y")),
    ),
    ranges={"buoyancy": (-0.9, None)},
    spacing=(0.5, 0.25),
)


@pytest.fixture(scope="module")
def model() -> WaveLiTFM:
    return stir(WaveLiTFM(ModelConfig(16, 1, 4, constraints=True), [MAZE, SHEAR, HELD])).eval()


@pytest.mark.parametrize("spec", [MAZE, HELD], ids=["constants", "constraints"])
def test_the_program_gives_the_models_steps_where_the_package_is_not(
    model: WaveLiTFM, tmp_path: Path, spec: DatasetSpec
) -> None:
    (tmp_path / "step.pt2").write_bytes(step_program(model, spec.name))
    generator = torch.Generator().manual_seed(3)
    state = model.denormalize(torch.randn(5, len(spec.state_channels), 18, 22, generator=generator), spec.name)
    constants = torch.randn(5, len(spec.constant_channels), 18, 22, generator=generator)
    constants += spec.moment("mean", spec.constant_channels).float()
    np.savez(tmp_path / "given.npz", state=state.numpy(), constants=constants.numpy())
    files = [str(tmp_path / name) for name in ("step.pt2", "given.npz", "out.npz")]
    subprocess.run([sys.executable, "-I", "-c", _without_editable_installs(SCRIPT), *files], check=True, cwd=tmp_path)
    expected = next(model.iterate(state, constants, spec.name, 1))
    moved = (expected - state).abs().amax()
    scale = expected.abs().amax(dim=(0, 2, 3), keepdim=True)
    with np.load(tmp_path / "out.npz") as out:
        for size in (1, 2, 5):
            error = (torch.from_numpy(out[str(size)]) - expected[:size]).abs() / scale
            assert float(error.amax()) < 1e-6
    assert float(moved) > 1e-3


def _without_editable_installs(script: str) -> str:
    """`-I` leaves site-packages in place, and there a link to this source tree may be."""
    root = json.dumps(str(Path(__file__).parents[3]))
    cut = f"import sys; sys.path[:] = [p for p in sys.path if p != {root}]\n"
    return f"{cut}sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n{script}"


def test_what_cannot_be_a_program_is_refused(model: WaveLiTFM) -> None:
    with pytest.raises(
        UserError,
        match="expected a dataset of the model, acoustic_scattering_maze, rayleigh_benard, shear_flow; got 'x'",
    ):
        step_program(model, "x")
    with pytest.raises(UserError, match="does not know the grid"):
        step_program(model, SHEAR.name)
