"""artefact.json: what an exported model consists of, and whether it is whole.

It names every file of the folder with size and SHA-256, under `files`. README.md is on the list and may change: people
mend the words of a model card, also in the browser.

The files of a model: model.json beside safetensors, in a folder here or in a repository of the Hugging Face Hub.

A folder that `fm export` wrote has more, which fm/model/files.py knows.
"""

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub import ModelHubMixin
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.files import sha256_file
from fm.model.spec import check_keys

EXPORT_FILE = "artefact.json"
CARD_FILE = "README.md"
RECIPE_FILE = "recipe.yaml"
SCORES_FILE = "scores.json"
CARDS = "cards"  # a registry folder, which load_folders reads
FORMAT = 1
KEYS = ("name", "step", "licence", "datasets", "lineage")


def is_exported(folder: Path) -> bool:
    """Whether `fm export` wrote this folder; it may be damaged."""
    return (folder / EXPORT_FILE).is_file()


def read_exported(folder: Path) -> dict[str, Any]:
    """artefact.json, checked. FileNotFoundError where there is none, ValueError where it is of another format, or
    damaged, or names a file outside its folder.
    """
    file = folder / EXPORT_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {EXPORT_FILE} in {folder}: expected a folder that `fm export` wrote")
    try:
        content = json.loads(file.read_text())
        number, missing = content["format"], [name for name in KEYS if name not in content]
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: expected a list of files with their sizes and SHA-256, got {error!r}") from error
    if number != FORMAT:
        raise ValueError(
            f"{file} has format {number}, this version reads {FORMAT}; install the version of the project that wrote "
            "it, or export the run again"
        )
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise ValueError(f"{file}: expected paths inside {folder}, got {name!r}")
    missing += [name for name in (MODEL_FILE, WEIGHTS_FILE) if name not in files]
    if missing:
        raise ValueError(f"{file}: it is incomplete, {', '.join(missing)} is missing")
    return content


def verify_exported(folder: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """Compare files, all but the model card by default, with artefact.json, and return what that holds.

    As `read_exported`, and ValueError naming the file that is missing or not what was exported.
    """
    content = read_exported(folder)
    for name, expected in content["files"].items():
        if name == CARD_FILE or (names is not None and name not in names):
            continue
        file = folder / name
        if not file.is_file() or file.stat().st_size != expected["bytes"]:
            size = f"{file.stat().st_size} bytes" if file.is_file() else "no such file"
            raise ValueError(f"{file}: expected {expected['bytes']} bytes, found {size}; fetch or export it again")
        if sha256_file(file) != expected["sha256"]:
            raise ValueError(f"{file}: its bytes differ from the SHA-256 in {EXPORT_FILE}; fetch or export it again")
    return content


def settle_companions(folder: Path, origin: Path | None) -> None:
    """After weights were written to `folder`: what is listed beside them (cards, scores, pictures) must be of them.

    What an earlier export of other weights left in `folder` goes; what `origin` lists comes, if it was written for
    these. As `read_exported`, and FileNotFoundError for a file that `origin` has lost.
    """
    weights = sha256_file(folder / WEIGHTS_FILE)
    if is_exported(folder):
        files = read_exported(folder)["files"]
        if files[WEIGHTS_FILE]["sha256"] == weights:
            return
        for name in (EXPORT_FILE, *files):
            if name not in (MODEL_FILE, WEIGHTS_FILE):
                (folder / name).unlink(missing_ok=True)
    if origin is None or not is_exported(origin):
        return
    files = read_exported(origin)["files"]
    if files[WEIGHTS_FILE]["sha256"] == weights:
        for name in (EXPORT_FILE, *files):
            if name != WEIGHTS_FILE:  # model.json, too: its digest is listed
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(origin / name, folder / name)


MODEL_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
CONFIG_FORMAT = 2
BASELINE = "baseline"  # key of model.json that only baselines have
HUB = "hf://"
# What an upload may have beside the model: cards, scores, pictures of another model must not stay there.
OURS = ["README.md", "LICENSE", "artefact.json", "recipe.yaml", "scores.json", "cards/*", "pictures/*", "programs/*"]
_REPOSITORY = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?/?")


def locate(source: Path | str) -> Path:
    """The local folder of a model: `source` itself, or what `hf://organisation/name[@revision]` holds, fetched.

    FileNotFoundError where the repository or revision does not exist, ConnectionError where the Hub cannot be reached
    and nothing was fetched before, ValueError for an address of another form.
    """
    if not str(source).startswith(HUB):
        return Path(source)
    match = _REPOSITORY.fullmatch(str(source))
    if match is None:
        raise ValueError(f"{source}: expected an address such as hf://organisation/name or hf://organisation/name@main")
    repository, revision = match.groups()
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{source}: no such repository or revision at {huggingface_hub.constants.ENDPOINT}, or it is private: "
            "look at the name, or log in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"{source}: {huggingface_hub.constants.ENDPOINT} cannot be reached, and this model was not fetched before "
            f"({type(error).__name__}). Fetch it where there is a network, and give the folder instead."
        ) from error


def read_description(directory: Path | str) -> dict[str, Any]:
    """model.json as a dict with keys format, config, datasets; a baseline's has its name as `baseline`.

    FileNotFoundError where there is none, ValueError where it is of another format or not such a file.
    """
    file = Path(directory) / MODEL_FILE
    if not file.is_file():
        hint = ""
        if (Path(directory) / "checkpoints").is_dir():
            hint = f": {directory} is a run; export it (fm export), or name one of its checkpoints/step_*"
        raise FileNotFoundError(f"no {MODEL_FILE} in {directory}{hint or ': expected a folder of save_pretrained'}")
    try:
        description = json.loads(file.read_text())
        number = description["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected a model's description with a format, got {error}") from error
    check_keys(str(file), description, ("format", "config", "datasets"), optional=(BASELINE,))
    if number != CONFIG_FORMAT:
        raise ValueError(
            f"{file} has format {number}, this version reads {CONFIG_FORMAT}; install the version of the project that "
            "wrote it, or a later one"
        )
    return description


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors by name. FileNotFoundError where there are none, ValueError where the file is torn."""
    if not file.is_file():
        raise FileNotFoundError(f"no weights at {file}")
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    return tensors


def write_model(directory: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: str) -> None:
    """Write model.json and the weights into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MODEL_FILE).write_text(json.dumps(description, indent=1) + "\n")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, directory / weights)


class HubFolder(ModelHubMixin):
    """A model's folder as huggingface_hub's mixin takes it: `push_to_hub` makes the repository and uploads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save_pretrained(self, save_directory: Path | str, **options: Any) -> None:
        """What `push_to_hub` calls for a copy; `options` are a configuration and a card, which the folder has."""
        shutil.copytree(self.folder, save_directory, dirs_exist_ok=True)


def upload(folder: Path, repository: str, **options: Any) -> str:
    """Make `organisation/name` hold a model's folder; returns the commit's address.

    What an earlier upload had beside its model is deleted where the folder has it not. `options` are those of
    ModelHubMixin.push_to_hub. ValueError for a name of another form, ConnectionError where the Hub does not take it.
    """
    try:
        return str(HubFolder(folder).push_to_hub(repository, **{"delete_patterns": OURS, **options}))
    except ValueError:
        raise
    except Exception as error:  # which errors there are depends on the HTTP client of huggingface_hub's version
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConnectionError(
            f"{repository}: {huggingface_hub.constants.ENDPOINT} did not take the upload ({reason}). Look at the "
            "network, the name, and whether you are logged in (`hf auth login`) and may write there."
        ) from error
