"""A model's files: model.json, and the list of files of an exported folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import make_spec, stir

from data_pipeline.files import UserError, sha256
from fm.checkpoint import find_checkpoint, load_pretrained
from fm.model.files import EXPORT_FILE, locate, read_description, verify_exported
from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM

SPEC = type(make_spec("shear_flow"))(**{**vars(make_spec("shear_flow")), "grid": (18, 22), "dt": 0.3})


@pytest.fixture
def model() -> WaveLiTFM:
    return stir(WaveLiTFM(ModelConfig(16, 1, 2), [SPEC]))


def exported(model: WaveLiTFM, folder: Path) -> Path:
    """A folder with companions, as fm export lists them."""
    model.save_pretrained(folder)
    (folder / "scores.json").write_text("{}")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "growth.png").write_bytes(b"png")
    (folder / "README.md").write_text("# A model")
    names = ("model.json", "model.safetensors", "scores.json", "pictures/growth.png", "README.md")
    data = {name: (folder / name).read_bytes() for name in names}
    files = {name: {"bytes": len(content), "sha256": sha256(content)} for name, content in data.items()}
    facts = {"format": 1, "name": "a", "step": 3, "licence": "MIT", "datasets": {}, "lineage": {}}
    (folder / EXPORT_FILE).write_text(json.dumps({**facts, "files": files}))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format 3, this version reads 2; install the version of the project that wrote it"),
        ({"format": 1}, "format 1, this version reads 2"),
        ({"format": None}, "format None"),
        ({"surplus": 1}, "unexpected keys"),
    ],
)
def test_descriptions_that_are_not_known_are_refused(
    model: WaveLiTFM, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        read_description(tmp_path)


def test_an_address_of_another_form_is_refused() -> None:
    for address in ("hf://name", "hf://a/b/c", "hf://a/b@"):
        with pytest.raises(ValueError, match="expected an address such as hf://organization/name"):
            locate(address)
        with pytest.raises(UserError, match="expected an address"):
            find_checkpoint(address)


def test_a_name_on_the_hub_without_its_scheme_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the Hugging Face Hub is named hf://organization/name-2\.1"):
        WaveLiTFM.from_pretrained("organization/name-2.1")
    with pytest.raises(
        UserError, match=r"expected a run, a checkpoint or an exported model\. .* hf://organization/name"
    ):
        find_checkpoint("organization/name")


def test_companions_come_along_with_the_weights_that_they_are_of(model: WaveLiTFM, tmp_path: Path) -> None:
    loaded = WaveLiTFM.from_pretrained(exported(model, tmp_path / "exported"))
    loaded.save_pretrained(tmp_path / "copy")
    verify_exported(tmp_path / "copy")
    assert (tmp_path / "copy/pictures/growth.png").read_bytes() == b"png"
    assert (tmp_path / "copy/README.md").read_text() == "# A model"
    loaded.save_pretrained(tmp_path / "exported")  # onto itself
    verify_exported(tmp_path / "exported")
    with torch.no_grad():
        next(loaded.parameters()).add_(1)
    loaded.save_pretrained(tmp_path / "changed")
    assert {file.name for file in (tmp_path / "changed").iterdir()} == {"model.json", "model.safetensors"}
    (tmp_path / "exported/notes.txt").write_text("mine")
    loaded.save_pretrained(tmp_path / "exported")  # what is said there is not true of these weights
    left = {file.name for file in (tmp_path / "exported").rglob("*") if file.is_file()}
    assert left == {"model.json", "model.safetensors", "notes.txt"}
    WaveLiTFM.from_pretrained(tmp_path / "exported")


def test_words_of_the_card_may_change(model: WaveLiTFM, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "exported")
    (folder / "README.md").write_text("# A model\n\nBetter words.")
    assert find_checkpoint(folder) == folder
    verify_exported(folder)
    WaveLiTFM.from_pretrained(folder)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_changed_byte_of_the_weights_is_found(model: WaveLiTFM, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "exported")
    flip(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: its bytes differ from the SHA-256"):
        WaveLiTFM.from_pretrained(folder)
    with pytest.raises(UserError, match=r"model\.safetensors: its bytes differ"):
        load_pretrained(folder)


def test_a_lost_file_is_found(model: WaveLiTFM, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "exported")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: expected \d+ bytes, found no such file"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "format 9, this version reads 1"),
        ({"files": {"model.json": {"bytes": 1}}}, "expected a list of files with their sizes"),
        ({"files": {}}, r"it is incomplete, model\.json, model\.safetensors is missing"),
        ({"files": {"../outside": {"bytes": 1, "sha256": "0"}}}, r"expected paths inside .*, got '\.\./outside'"),
        ({"files": {"/etc/hosts": {"bytes": 1, "sha256": "0"}}}, "got '/etc/hosts'"),
    ],
)
def test_a_damaged_list_of_files_is_refused(
    model: WaveLiTFM, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = exported(model, tmp_path / "exported")
    file = folder / EXPORT_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        WaveLiTFM.from_pretrained(folder)
    with pytest.raises(UserError, match=message):
        load_pretrained(folder)


def test_the_list_of_files_must_be_json(model: WaveLiTFM, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "exported")
    (folder / EXPORT_FILE).write_text("{")
    with pytest.raises(UserError, match=r"artefact\.json: expected a list of files"):
        load_pretrained(folder)
    shutil.rmtree(folder / "pictures")
    (folder / EXPORT_FILE).unlink()
    WaveLiTFM.from_pretrained(folder)  # without the list it is a plain model
