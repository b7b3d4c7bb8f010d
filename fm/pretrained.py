"""The files of a model: model.json beside safetensors, in a folder here or in a repository of the Hugging Face Hub.

A folder that `fm export` wrote has more, which fm/artefact.py knows.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
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

from fm.model_config import check_keys

MODEL_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
FORMAT = 2
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

    One of an older format is brought up to this one. FileNotFoundError where there is none, ValueError where it is of a
    later format or not such a file.
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
    if number not in (1, FORMAT):
        raise ValueError(
            f"{file} has format {number}, this version reads 1 to {FORMAT}; install the version of the project that "
            "wrote it, or a later one"
        )
    if number == 1:  # did not know what the data were sampled at
        description["datasets"] = [{**spec, "grid": None, "dt": None} for spec in description["datasets"]]
    return {**description, "format": FORMAT}


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
