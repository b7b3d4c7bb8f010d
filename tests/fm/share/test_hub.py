"""Exported models on a stand-in for the Hugging Face Hub, each step in a process of its own, as on several machines."""

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from forked import Forked
from hub_server import HubServer

LOAD = """
import sys
from fm import WaveLiTFM
model = WaveLiTFM.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[2])
"""
LOAD_ANY_KIND = "import sys, fm; fm.load(sys.argv[1]).save_pretrained(sys.argv[2])"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def python(code: str, *arguments: object, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    with TemporaryDirectory() as folder:
        script = Path(folder) / "script.py"
        script.write_text(code)
        process = Forked(script, *map(str, arguments), environment=environment)
        out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode or 0, out, err)


def command(*arguments: object, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return python("import sys; from fm.cli import main; sys.exit(main())", *arguments, environment=environment)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_pushed_model_is_loaded_elsewhere_with_all_its_files(
    hub: HubServer, exported_model: Path, tmp_path: Path
) -> None:
    push = 'import sys; from fm import WaveLiTFM; print(WaveLiTFM.from_pretrained(sys.argv[1]).push_to_hub("me/model"))'
    pushed = python(push, exported_model, environment=hub.environment(tmp_path / "sender"))
    assert pushed.returncode == 0, pushed.stderr
    assert f"{hub.url}/me/model/commit/" in pushed.stdout
    assert hub.repositories["me/model"][-1] == tree(exported_model)
    receiver = hub.environment(tmp_path / "receiver")
    loaded = python(LOAD, "hf://me/model@main", tmp_path / "copy", environment=receiver)
    assert loaded.returncode == 0, loaded.stderr
    assert tree(tmp_path / "copy") == tree(exported_model)

    hub.stop()
    again = python(LOAD_ANY_KIND, "hf://me/model", tmp_path / "again", environment=receiver)
    assert again.returncode == 0, again.stderr
    assert tree(tmp_path / "again") == tree(exported_model)
    empty = python(LOAD, "hf://me/model", tmp_path / "no", environment=hub.environment(tmp_path / "third"))
    assert "ConnectionError: hf://me/model: http://127.0.0.1" in empty.stderr
    assert "cannot be reached, and this model was not fetched before" in empty.stderr
    refused = command("evaluate", "hf://me/model", environment=hub.environment(tmp_path / "third"))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: hf://me/model: ")


def test_export_pushes_and_evaluate_takes_the_address(hub: HubServer, run: Path, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path / "cache")
    pushed = command("export", run, tmp_path / "model", "--push", "me/two", environment=environment)
    assert pushed.returncode == 0, pushed.stderr
    assert "pushed: " in pushed.stdout
    assert 'fm.load("hf://me/two")' in hub.repositories["me/two"][-1]["README.md"].decode()
    done = command("evaluate", "hf://me/two", "--out", tmp_path / "report", environment=environment)
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        json.loads((folder / "scores.json").read_text()) for folder in (tmp_path / "report", run / "report")
    )
    assert ours["datasets"] == theirs["datasets"]


def test_what_the_hub_refuses_is_told(hub: HubServer, exported_model: Path, run: Path, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path / "cache")
    unknown = python(LOAD, "hf://me/nothing", tmp_path / "copy", environment=environment)
    assert "FileNotFoundError: hf://me/nothing: no such repository or revision" in unknown.stderr
    hub.repositories["me/model"] = [tree(exported_model)]
    revision = python(LOAD, "hf://me/model@v9", tmp_path / "copy", environment=environment)
    assert "FileNotFoundError: hf://me/model@v9: no such repository or revision" in revision.stderr
    stranger = {**environment, "HF_TOKEN": "hf_stranger"}
    refused = command("export", run, tmp_path / "model", "--push", "me/model", environment=stranger)
    assert refused.returncode == 2
    assert "did not take the upload" in refused.stderr
    assert f"The export in {tmp_path / 'model'} is whole" in refused.stderr
    assert (tmp_path / "model/artefact.json").is_file()


def test_a_damaged_download_is_refused(hub: HubServer, exported_model: Path, tmp_path: Path) -> None:
    files = tree(exported_model)
    files["model.safetensors"] = files["model.safetensors"][:-1] + b"\0"
    hub.repositories["me/model"] = [files]
    damaged = python(LOAD, "hf://me/model", tmp_path / "copy", environment=hub.environment(tmp_path / "cache"))
    assert "ValueError" in damaged.stderr
    assert "model.safetensors: its bytes differ from the SHA-256 in artefact.json" in damaged.stderr


def test_a_changed_model_does_not_keep_the_scores_of_the_one_before(
    hub: HubServer, exported_model: Path, tmp_path: Path
) -> None:
    push = """
import sys, torch
from fm import WaveLiTFM
model = WaveLiTFM.from_pretrained(sys.argv[1])
with torch.no_grad():
    next(model.parameters()).add_(1)
model.push_to_hub("me/model")
"""
    hub.repositories["me/model"] = [tree(exported_model)]
    environment = hub.environment(tmp_path / "cache")
    pushed = python(push, "hf://me/model", environment=environment)
    assert pushed.returncode == 0, pushed.stderr
    assert set(hub.repositories["me/model"][-1]) == {"model.json", "model.safetensors"}
    loaded = python(LOAD, "hf://me/model", tmp_path / "copy", environment=environment)  # a plain model, no export
    assert loaded.returncode == 0, loaded.stderr
    assert tree(tmp_path / "copy") == hub.repositories["me/model"][-1]
