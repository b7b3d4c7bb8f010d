"""Classes that recipes import: which may be imported, and what is said where one cannot be used."""

import json
import shutil
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import make_inputs, make_spec
from whole_runs import fm as fm_command
from whole_runs import small, written

import fm
from data_pipeline.errors import UserError
from data_pipeline.files import sha256
from fm.checkpoint import find_checkpoint
from fm.config import Recipe, dump_recipe, load_recipe, recipe_to_dict, resolve
from fm.datasets import imported_sections, load_own_recipe, new_model
from fm.model.imports import (
    VARIABLE,
    ImportedOptimizer,
    allow_imports,
    allowed_imports,
    remember_imports,
    remembered_file,
)
from fm.model.network import ImportedConfig
from fm.share.export import export_run
from fm.training.trainer import train

NET = "own_classes:Net"
SPEC = make_spec("acoustic_scattering_maze")


@pytest.fixture(autouse=True)
def _nothing_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def imported(shards: Path, directory: Path, name: str = NET, **sections: dict[str, Any]) -> Recipe:
    """A run of seconds whose network is imported."""
    document = recipe_to_dict(small(shards, directory, **{"train": {"steps": 2}, **sections}))
    document["model"] = {"import": name, "args": {"width": 3}, "wavelet": "haar"}
    return resolve(document, "the test")


@pytest.fixture(scope="module")
def folders(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of an imported network, and its export."""
    folder = tmp_path_factory.mktemp("imported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, NET)
        assert train(imported(tiny_shards, folder / "run")) == 0
        export_run(folder / "run", folder / "exported")
    return folder / "run", folder / "exported"


def made(name: str, **args: Any) -> torch.nn.Module:
    allow_imports([f"own_classes:{name}"])
    return new_model(ImportedConfig(**{"import": f"own_classes:{name}", "args": args}), [SPEC])


def test_a_recipe_keeps_its_imports_and_refuses_misspelled_keys(tiny_shards: Path, tmp_path: Path) -> None:
    optimizer = {"import": "torch.optim:Muon", "args": {"lr": 0.01}, "parameters": "matrices"}
    recipe = imported(tiny_shards, tmp_path / "run", train={"steps": 2, "optimizer": optimizer})
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe
    assert isinstance(recipe.train.optimizer, ImportedOptimizer)
    assert recipe_to_dict(recipe)["model"]["import"] == NET
    for override, message in {
        "model={import: own_classes:Net, arg: {}}": r"unknown key model\.arg .*did you mean model\.args\?",
        "model={imprt: own_classes:Net}": r"unknown key model\.imprt .*did you mean model\.import\?",
        "model={import_: own_classes:Net}": r"unknown key model\.import_",
        "model={widht: 8}": r"unknown key model\.widht .*did you mean model\.width\?",
        "model={import: own_classes}": r"model\.import: expected the name of a class, such as mypkg\.net:MyNet",
        "loss={import: a:B, mse: 1}": r"unknown key loss\.mse .*valid here: import, args",
        "train.optimizer=adamm": r"train\.optimizer: .*did you mean adamw\?",
        "train.optimizer={import: a:B, parameters: some}": r"train\.optimizer\.parameters: Input should be 'all' or",
    }.items():
        with pytest.raises(UserError, match=message):
            load_recipe(file, [override])


def test_files_of_a_run_or_export_choose_no_import(folders: tuple[Path, Path], tmp_path: Path) -> None:
    run, exported = folders
    sys.modules.pop("own_classes", None)
    for source in (run, find_checkpoint(run), exported):
        with pytest.raises(UserError, match=rf"model\.json: {NET} is no code of this project.*--allow-import {NET}"):
            fm.load(source)
    refused = fm_command("evaluate", str(exported), "--shards", "anywhere")
    assert refused.returncode == 2
    assert f"own_classes.py), add --allow-import {NET} to the command" in refused.stderr
    assert "own_classes" not in sys.modules
    assert load_own_recipe(exported / "recipe.yaml").model == load_own_recipe(run / "recipe.yaml").model
    assert not allowed_imports()  # recipes beside a run or an export are no permission
    (tmp_path / "copy.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    load_own_recipe(tmp_path / "copy.yaml")
    assert allowed_imports() == {NET}


def test_training_remembers_its_imports(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later command opens the run; it opens no model with other arguments or of code in other files."""
    code = (Path(__file__).parents[1] / "helpers" / "own_classes.py").read_text()
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "remembered_net.py").write_text(code)
    monkeypatch.chdir(tmp_path / "own")
    name = "remembered_net:Net"
    recipe = imported(tiny_shards, tmp_path / "own" / "run", name)
    assert fm_command("train", str(written(recipe))).returncode == 0
    file = remembered_file()
    assert file == tmp_path / "state" / "wavelit" / "imports.json"
    assert file.stat().st_mode & 0o777 == 0o600
    content = file.read_bytes()

    def opens(folder: Path = tmp_path / "own" / "run") -> bool:
        """Whether a command of another process, in which nothing is allowed, opens a model."""
        monkeypatch.setenv(VARIABLE, "")
        sys.modules.pop("remembered_net", None)
        monkeypatch.setattr(sys, "path", [place for place in sys.path if str(tmp_path) not in place])
        try:
            fm.load(folder)
        except UserError as error:
            assert f"{name} is no code of this project" in str(error)  # noqa: PT017
            return False
        return True

    assert opens()
    received = tmp_path / "received"
    shutil.copytree(find_checkpoint(recipe.run.directory), received)
    assert opens(received)
    description = json.loads((received / "model.json").read_text())
    description["config"]["args"] = {"width": 4}
    (received / "model.json").write_text(json.dumps(description))
    assert not opens(received)
    monkeypatch.chdir(tmp_path / "other")
    assert not opens()
    monkeypatch.chdir(tmp_path / "own")
    file.chmod(0o666)  # anyone could have written it
    assert not opens()
    file.chmod(0o600)
    file.write_bytes(content[:-9])
    assert not opens()
    assert fm_command("train", str(written(recipe))).returncode == 0  # there is nothing to train
    assert file.read_bytes() == content


def test_what_cannot_be_remembered_is_told(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file, and no folder")
    allow_imports([NET])
    with redirect_stderr(StringIO()) as printed:
        remember_imports(imported_sections(imported(tiny_shards, tmp_path / "run")))
    assert f"{NET}: not remembered, so later commands need --allow-import" in printed.getvalue()


def test_allowed_names_open_runs_and_exports(folders: tuple[Path, Path], tmp_path: Path) -> None:
    run, exported = folders
    state, constants = make_inputs(SPEC, 32, 34)
    outputs = [fm.load(source, allow_import=NET)(state, constants, SPEC.name) for source in (run, exported)]
    assert torch.equal(*outputs)
    assert outputs[0].shape == state.shape
    card = (exported / "README.md").read_text()
    assert f'fm.load("exported", allow_import="{NET}")' in card
    model = fm.load(exported)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(fm.load(tmp_path / "saved")(state, constants, SPEC.name), outputs[0])
    with pytest.raises(ValueError, match=rf"is of the imported network '{NET}', not of a WaveLiTFM; fm\.load opens"):
        fm.WaveLiTFM.from_pretrained(exported)
    with pytest.raises(UserError, match="got 'no name'"):
        fm.load(exported, allow_import="no name")


def test_code_in_the_folder_of_a_model_is_never_imported(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "received"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "stranger.py").write_text("raise SystemExit('this code must not run')\n")
    (folder / "stranger.py").symlink_to(folder / "inner" / "stranger.py")
    description = json.loads((folders[1] / "model.json").read_text())
    (folder / "model.safetensors").write_bytes((folders[1] / "model.safetensors").read_bytes())
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").write_text("raise SystemExit('this code must not run')\n")
    for cwd, module in ((folder, "stranger"), (tmp_path, "received.inner.stranger"), (folder, "package.made_later")):
        name = f"{module}:Net"
        changed = {**description, "imported": name, "config": {**description["config"], "import": name}}
        (folder / "model.json").write_text(json.dumps(changed))
        monkeypatch.chdir(cwd)
        with pytest.raises(UserError, match=r"received/.*\.py, inside the model's own folder"):
            fm.load(folder, allow_import=name)
    (folder / "model.json").write_text(json.dumps({**description, "imported": "other:Net"}))
    with pytest.raises(UserError, match=f"imported: expected the name in config, '{NET}', got 'other:Net'"):
        fm.load(folder)


def test_code_in_the_cache_of_the_hub_is_never_imported(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, the files of a model are links to `blobs`, beside its folder."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    description = json.loads((folders[1] / "model.json").read_text())
    description |= {"imported": "cached:Net", "config": {**description["config"], "import": "cached:Net"}}
    weights = (folders[1] / "model.safetensors").read_bytes()
    contents = {"model.json": json.dumps(description).encode(), "cached.py": b"raise SystemExit('must not run')\n"}
    for name, content in {**contents, "model.safetensors": weights}.items():
        (blobs / f"{name}-blob").write_bytes(content)
        (snapshot / name).symlink_to(blobs / f"{name}-blob")
    monkeypatch.chdir(snapshot)
    with pytest.raises(UserError, match=r"1/cached\.py, inside the model's own folder"):
        fm.load(snapshot, allow_import="cached:Net")


def test_a_description_of_a_larger_network_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    description = json.loads((folders[1] / "model.json").read_text())
    description["config"]["args"] = {"width": 5000}
    (tmp_path / "model.json").write_text(json.dumps(description))
    (tmp_path / "model.safetensors").write_bytes((folders[1] / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"model\.json declares a larger one"):
        fm.load(tmp_path, allow_import=NET)


def test_what_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half.py").write_text("import a_package_that_is_missing\n")
    (tmp_path / "torn.py").write_text("class Net(:\n")
    for name, message in {
        "nowhere.net:Net": r"nowhere\.net:Net cannot be imported: it is not installed, and not in the current folder",
        "own_classes:Missing": "own_classes:Missing cannot be imported: own_classes has no class Missing",
        "half:Net": "half:Net cannot be imported: it needs a_package_that_is_missing",
        "torn:Net": r"torn:Net cannot be imported: SyntaxError: .*torn\.py",
        "own_classes:not_a_class": r"model\.import: expected a subclass of torch\.nn\.Module, got own_classes:not_a",
        "subprocess:Popen": r"expected a subclass of torch\.nn\.Module, got subprocess:Popen",
    }.items():
        allow_imports([name])
        with pytest.raises(UserError, match=message):
            new_model(ImportedConfig(**{"import": name}), [SPEC])


def test_wrong_arguments_name_the_signature() -> None:
    signature = r"own_classes:Fussy\(dim_in: int, dim_out: int, width: int\) -> None"
    for args in ({}, {"width": 4, "depth": 2}):
        with pytest.raises(UserError, match=rf"model\.args: expected arguments of {signature}, got args \{{.*"):
            made("Fussy", **args)
    with pytest.raises(UserError, match=rf"{signature} accepts, got .*an odd width of 3 \(.*own_classes\.py:\d+\)"):
        made("Fussy", width=3)


def test_networks_that_checkpoints_cannot_hold_are_refused() -> None:
    with pytest.raises(UserError, match=r"own_classes:Normalized: 1 \(BatchNorm2d\) keeps running averages"):
        made("Normalized")
    with pytest.raises(UserError, match="expected a network with parameters to train, got none"):
        made("Constant")
    with pytest.raises(UserError, match=r"own_classes:Tied: 1\.weight is another name of a parameter"):
        made("Tied")
    state, constants = make_inputs(SPEC, 32, 32)
    with pytest.raises(UserError, match="own_classes:Counting: its forward changes a buffer"):
        made("Counting").train()(state, constants, SPEC.name)
    wrong = r"HalfOutput: expected an output \(B, dim_out, H, W\) = \(2, 3, 33, 33\) for .*, got \(2, 3, 33, 17\)"
    with pytest.raises(UserError, match=wrong):
        made("HalfOutput")(state, constants, SPEC.name)


def test_initial_weights_are_the_seeds_and_buffers_are_constants() -> None:
    allow_imports([NET])
    config = ImportedConfig(**{"import": NET})
    one, same, other = (new_model(config, [SPEC], seed).state_dict() for seed in (1, 1, 2))
    assert all(name.startswith("network.") for name in one)
    assert not [name for name in one if "gain" in name]
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["network.head.weight"], other["network.head.weight"])


def test_the_command_line_allows_imports(folders: tuple[Path, Path], tiny_shards: Path, tmp_path: Path) -> None:
    run, _ = folders
    exported = str(tmp_path / "exported")
    done = fm_command("export", str(run), exported, "--allow-import", NET)
    assert done.returncode == 0, done.stderr
    digest = sha256((run.parent / "exported" / "model.safetensors").read_bytes())
    assert sha256(Path(exported, "model.safetensors").read_bytes()) == digest
    plan = fm_command("plan", str(written(imported(tiny_shards, tmp_path / "planned"))), "--gpu", "h200")
    assert plan.returncode == 2
    assert "its constructor reads values of tensors, so its work cannot be counted" in plan.stderr
    optimizer = {"steps": 2, "optimizer": {"import": "own_classes:Momentum"}}
    counted = imported(tiny_shards, tmp_path / "counted", "own_classes:TokenNet", train=optimizer)
    counted = replace(counted, model=ImportedConfig(**{"import": "own_classes:TokenNet"}))
    plan = fm_command("plan", str(written(counted)), "--gpu", "h200")
    assert plan.returncode == 0, plan.stderr
    assert "own_classes:Momentum counts as AdamW" in " ".join(plan.stdout.split())
    help_text = fm_command("rollout", "--help").stdout
    assert "--allow-import" in help_text
    assert "--allow-import" not in fm_command("compare", "--help").stdout
