"""A model's files: model.json, the list of files of an exported folder, and hostile ones that reach nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import CHANGES, EDITS, Guard, cases, edited, mutated, same
from handmade import make_spec, stir
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from data_pipeline.errors import UserError
from data_pipeline.files import sha256
from fm.checkpoint import find_checkpoint, load_pretrained, verify_model
from fm.model.files import (
    EARLIER,
    EARLIER_CONFIG,
    EARLIER_SPEC,
    EXPORT_FILE,
    locate,
    read_description,
    verify_exported,
)
from fm.model.hub import upload
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


@pytest.mark.parametrize("name", ["README.md", "pictures/growth.png", "scores.json"])
def test_a_link_out_of_a_received_model_is_not_followed(model: WaveLiTFM, tmp_path: Path, name: str) -> None:
    folder, key = exported(model, tmp_path / "received"), tmp_path / "id_rsa"
    loaded = WaveLiTFM.from_pretrained(folder)
    key.write_bytes((folder / name).read_bytes())  # even one of the listed digest
    (folder / name).unlink()
    (folder / name).symlink_to("../" * (1 + name.count("/")) + "id_rsa")
    with pytest.raises(ValueError, match=r"received: expected paths inside it, got .*, which leads out of it"):
        loaded.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    with pytest.raises(ValueError, match="leads out of it"):
        upload(folder, "me/model")
    with pytest.raises(UserError, match="leads out of it"):
        load_pretrained(folder)


def test_what_an_exported_model_lists_is_verified_before_it_is_copied(model: WaveLiTFM, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "received")
    loaded = WaveLiTFM.from_pretrained(folder)
    flip(folder / "pictures/growth.png")
    with pytest.raises(ValueError, match=r"growth\.png: its bytes differ from the SHA-256"):
        loaded.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_nothing_outside_is_written_or_deleted_through_a_link(model: WaveLiTFM, tmp_path: Path) -> None:
    folder, outside = exported(model, tmp_path / "earlier"), tmp_path / "outside"
    (folder / "pictures").rename(outside)
    (folder / "pictures").symlink_to(outside)
    other = stir(WaveLiTFM(ModelConfig(16, 1, 4), [SPEC]))
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"earlier: expected paths inside it, got 'pictures/growth.png'"):
        other.save_pretrained(folder)
    assert tree(tmp_path) == before
    (tmp_path / "plain").mkdir()
    (outside / "weights").write_bytes(b"mine")
    (tmp_path / "plain/model.safetensors").symlink_to(outside / "weights")
    other.save_pretrained(tmp_path / "plain")  # a link is replaced
    assert (outside / "weights").read_bytes() == b"mine"
    WaveLiTFM.from_pretrained(tmp_path / "plain")
    for name, target in (("model.safetensors", "model.safetensors"), ("model.json", "model.json")):
        shutil.copytree(tmp_path / "plain", tmp_path / "linked")
        (tmp_path / "linked" / name).unlink()
        (tmp_path / "linked" / name).symlink_to(tmp_path / "plain" / target)
        with pytest.raises(ValueError, match="leads out of it"):
            WaveLiTFM.from_pretrained(tmp_path / "linked")
        shutil.rmtree(tmp_path / "linked")


def test_an_exported_model_reads_no_file_that_it_does_not_list(model: WaveLiTFM, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "received")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path / "changed")
    shutil.copyfile(tmp_path / "changed/model.safetensors", folder / "ema.safetensors")  # a checkpoint's name
    kept = WaveLiTFM.from_pretrained(folder)
    assert not torch.equal(next(kept.parameters()), next(model.parameters()))
    with pytest.raises(ValueError, match=r"ema\.safetensors: expected a file that artefact\.json lists"):
        WaveLiTFM.from_pretrained(folder, "ema.safetensors")
    (folder / "cards").mkdir()
    (folder / "cards/channels.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"channels\.yaml: artefact\.json does not list it"):
        verify_model(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("width", 10**12, "model.json declares a larger one"),
        ("width", 10**30, "model.json declares a larger one"),
        ("depth", 10**9, "model.json declares a larger one"),
        ("mlp_ratio", 1e15, "model.json declares a larger one"),
        ("mlp_ratio", 1e300, "model.json declares a larger one"),
        ("depth", 2, "does not fit the model"),
        ("depth", True, r"depth: Input should be a valid integer \(got True\)"),
        ("depth", "1", r"depth: Input should be a valid integer \(got '1'\)"),
        ("lepe", 1, r"lepe: Input should be a valid boolean \(got 1\)"),
        ("wavelet", ["x" * 10**5], r"wavelet: .*\.\.\."),
        ("predict_override", "x" * 10**5, r"predict_override: .*\.\.\."),
    ],
)
def test_sizes_are_compared_with_the_weights_before_memory_is_allocated(
    model: WaveLiTFM, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.json"
    description = json.loads(file.read_text())
    file.write_text(json.dumps({**description, "config": {**description["config"], key: value}}))
    with pytest.raises(ValueError, match=message) as caught:
        WaveLiTFM.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 1500
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 10**9}, "model.json declares a larger one"),
        ({"context": True}, "context: expected a number of input frames, got True"),
        ({"config": [1]}, r"config: expected settings by name, got \[1\]"),
        ({"config": None}, "config: expected settings by name, got None"),
        ({"datasets": {}}, r"datasets: expected a list of specifications, got \{\}"),
        ({"datasets": [3]}, r"datasets: expected a list of specifications, got \[3\]"),
        ({"datasets": []}, "datasets must be one or more"),
        ({"format": 2.0}, "format 2.0, this version reads 2"),
        ({"baseline": 3}, "baseline: expected the name in config"),
        ({"x" * 10**5: 1}, r"unexpected keys \['x+\.\.\.x+'\]"),
    ],
)
def test_parts_of_another_type_end_in_one_message(
    model: WaveLiTFM, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(tmp_path)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("text", ["", "[", "3", "[" * 10**5, '{"format": 2, "format": 2}', "9" * 5000, "\xff"])
def test_a_description_that_is_no_json_ends_in_one_message(model: WaveLiTFM, tmp_path: Path, text: str) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "model.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"model\.json: expected a model's description with a format"):
        load_pretrained(tmp_path)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    """Of a folder with a model of two datasets and a small exported one; a secret lies beside it."""
    root = tmp_path_factory.mktemp("models") / "root"
    two = stir(WaveLiTFM(ModelConfig(16, 1, 2), [SPEC, make_spec("acoustic_scattering_maze")]))
    two.save_pretrained(root / "plain")
    exported(two, root / "exported")
    (root.parent / "secret").write_text("secret")
    WaveLiTFM.from_pretrained(root / "plain")
    return Guard(root)


def spoilt(content: bytes, changes: list, edits: list | None) -> bytes:
    """JSON with its values changed, or its bytes."""
    return json.dumps(mutated(json.loads(content), changes)).encode() if edits is None else edited(content, edits)


@cases(40)
@given(changes=CHANGES, edits=st.none() | EDITS)
def test_a_spoilt_description_is_refused_or_is_what_the_model_then_is(
    guard: Guard, changes: list, edits: list | None
) -> None:
    """Files beside model.json do not say what it was, so what is accepted must be used as it stands."""
    folder, loaded = Path(guard.root) / "plain", []
    content, weights = (folder / "model.json").read_bytes(), load_file(folder / "model.safetensors")
    (folder / "model.json").write_bytes(raw := spoilt(content, changes, edits))
    try:
        if guard.check(lambda: loaded.append(load_pretrained(folder))):
            [model] = loaded
            stated = {**EARLIER, **json.loads(raw)}
            stated["config"] = {**EARLIER_CONFIG, **stated["config"]}
            stated["datasets"] = [
                {**EARLIER_SPEC, **spec} for spec in sorted(stated["datasets"], key=lambda x: x["name"])
            ]
            assert same(model.description(), stated)
            assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    finally:
        (folder / "model.json").write_bytes(content)


@cases(40)
@given(
    changes=CHANGES, edits=st.none() | EDITS, name=st.sampled_from([EXPORT_FILE] * 4 + ["model.json", "scores.json"])
)
def test_a_spoilt_exported_model_is_refused_or_is_as_its_list_says(
    guard: Guard, changes: list, edits: list | None, name: str
) -> None:
    folder, found = Path(guard.root) / "exported", []
    content, weights = (folder / name).read_bytes(), load_file(folder / "model.safetensors")
    (folder / name).write_bytes(raw := spoilt(content, changes, edits))
    try:
        if guard.check(lambda: found.append((verify_model(folder), load_pretrained(folder)))):
            [((digest, facts), model)] = found
            assert name == EXPORT_FILE or raw == content
            assert digest == sha256((folder / "model.safetensors").read_bytes())
            assert same(facts, json.loads((folder / EXPORT_FILE).read_bytes()))
            assert type(facts["step"]) is int
            assert (folder / f"{facts['name']}_report").parent == folder
            for path, listed in facts["files"].items():
                data = (folder / path).read_bytes()
                assert path == "README.md" or (len(data), sha256(data)) == (listed["bytes"], listed["sha256"])
            assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    finally:
        (folder / name).write_bytes(content)
