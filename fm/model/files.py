"""The files of a model, in a folder.

    model.json         format, context, configuration and dataset specifications; a baseline's has its name, too
    model.safetensors  weights; a checkpoint also has ema.safetensors, the averaged ones
    artefact.json      only in a folder that `fm export` wrote: size and SHA-256 of every file, and more facts

What `fm export` wrote is checked against artefact.json before it is used, all but README.md: users edit the words of a
model card, also in the browser. fm/checkpoint.py checks checkpoints by the same function, `verify_files`.
"""

import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.files import sha256_file

MODEL_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
MODEL_FORMAT = 2
BASELINE = "baseline"  # key of model.json that only baselines have
# Keys that model.json of earlier versions lacks, with the values that reproduce those models. Defaults may change.
EARLIER = {"context": 1}
EARLIER_CONFIG = {"pointwise": False, "decoder": "wavelet", "decoder_width": 32, "constraints": False}  # of a WaveLiT
EARLIER_SPEC: dict[str, Any] = {"conserved": [], "ranges": {}, "spacing": None}  # of each dataset

EXPORT_FILE = "artefact.json"
CARD_FILE = "README.md"
RECIPE_FILE = "recipe.yaml"
SCORES_FILE = "scores.json"
CARDS = "cards"  # a registry folder, which load_folders reads
EXPORT_FORMAT = 1
EXPORT_KEYS = ("name", "step", "licence", "datasets", "lineage")


@dataclass(frozen=True)
class ListedFile:
    """Size and digest of a file, as artefact.json and a checkpoint's state.json hold them."""

    bytes: int
    sha256: str


_LISTING = TypeAdapter(dict[str, ListedFile])


def read_listing(file: Path, content: Any) -> dict[str, ListedFile]:
    """Return `files` of a JSON file's content. ValueError if it is none, or names a path outside the file's folder."""
    try:
        listing = _LISTING.validate_python(content["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected a list of files with their sizes and SHA-256, got {error!r}") from error
    for name in listing:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise ValueError(f"{file}: expected paths inside {file.parent}, got {name!r}")
    return listing


def verify_files(file: Path, content: Any, names: Collection[str] | None = None, remedy: str = "") -> None:
    """Compare the files beside `file`, all or those in `names`, with their sizes and digests in its content.

    ValueError, ending with `remedy`, names the first one that differs or is missing.
    """
    for name, listed in read_listing(file, content).items():
        if names is not None and name not in names:
            continue
        path = file.parent / name
        if not path.is_file() or path.stat().st_size != listed.bytes:
            size = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            raise ValueError(f"{path}: expected {listed.bytes} bytes, found {size}{remedy}")
        if sha256_file(path) != listed.sha256:
            raise ValueError(f"{path}: its bytes differ from the SHA-256 in {file.name}{remedy}")


def _read_json(file: Path, number: int, what: str) -> dict[str, Any]:
    """Return the JSON object of a file, `what` in words, of format `number`. ValueError for anything else."""
    try:
        content = json.loads(file.read_text())
        found = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected {what} with a format, got {error!r}") from error
    if found != number:
        raise ValueError(
            f"{file} has format {found}, this version reads {number}; install the version of the project that wrote it"
        )
    return content


def is_exported(folder: Path) -> bool:
    """Return whether `fm export` wrote this folder, which may be damaged since."""
    return (folder / EXPORT_FILE).is_file()


def read_exported(folder: Path) -> dict[str, Any]:
    """Return what artefact.json holds.

    FileNotFoundError where there is none, ValueError where it is of another format, damaged or incomplete.
    """
    file = folder / EXPORT_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {EXPORT_FILE} in {folder}: expected a folder that `fm export` wrote")
    content = _read_json(file, EXPORT_FORMAT, "a list of files")
    files = read_listing(file, content)
    missing = [name for name in EXPORT_KEYS if name not in content]
    missing += [name for name in (MODEL_FILE, WEIGHTS_FILE) if name not in files]
    if missing:
        raise ValueError(f"{file}: it is incomplete, {', '.join(missing)} is missing")
    return content


def verify_exported(folder: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """Compare files, by default all but the model card, with artefact.json; return what that holds.

    Errors as of `read_exported` and `verify_files`.
    """
    content = read_exported(folder)
    checked = content["files"].keys() - {CARD_FILE} if names is None else names
    verify_files(folder / EXPORT_FILE, content, checked, remedy="; fetch or export it again")
    return content


def copy_companions(origin: Path | None, folder: Path) -> None:
    """After weights were saved to `folder`: make the files beside them (cards, scores, pictures) belong to them.

    Files that an earlier export of other weights left in `folder` are deleted. Files that `origin` lists are copied, if
    `origin` was exported with the same weights. Errors as of `read_exported`, and FileNotFoundError for a listed file
    that is missing.
    """
    weights = sha256_file(folder / WEIGHTS_FILE)
    if is_exported(folder):
        files = read_exported(folder)["files"]
        if files[WEIGHTS_FILE]["sha256"] == weights:
            return
        for name in {EXPORT_FILE, *files} - {MODEL_FILE, WEIGHTS_FILE}:
            (folder / name).unlink(missing_ok=True)
    if origin is None or not is_exported(origin):
        return
    files = read_exported(origin)["files"]
    if files[WEIGHTS_FILE]["sha256"] == weights:
        for name in {EXPORT_FILE, *files} - {WEIGHTS_FILE}:  # model.json, too: its digest is listed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin / name, folder / name)


def read_description(directory: Path | str) -> dict[str, Any]:
    """Return model.json: a dict with format, context, config, datasets; a baseline's has its name as `baseline`.

    Keys that an earlier version did not write get the values of its models. FileNotFoundError where there is none,
    ValueError where it is of another format or not such a file.
    """
    file = Path(directory) / MODEL_FILE
    if not file.is_file():
        hint = "expected a folder of save_pretrained"
        if (Path(directory) / "checkpoints").is_dir():
            hint = f"{directory} is a run; export it (fm export), or name one of its checkpoints/step_*"
        raise FileNotFoundError(f"no {MODEL_FILE} in {directory}: {hint}")
    description = {**EARLIER, **_read_json(file, MODEL_FORMAT, "a model's description")}
    keys = {"format", "context", "config", "datasets"}
    if set(description) - {BASELINE} != keys:
        missing, unexpected = sorted(keys - set(description)), sorted(set(description) - keys - {BASELINE})
        raise ValueError(f"{file}: missing keys {missing}, unexpected keys {unexpected}")
    if type(description["context"]) is not int or description["context"] < 1:
        raise ValueError(f"{file}: context: expected a number of input frames, got {description['context']!r}")
    if BASELINE not in description and isinstance(description["config"], dict):
        description["config"] = {**EARLIER_CONFIG, **description["config"]}
    if isinstance(description["datasets"], list):
        datasets = description["datasets"]
        description["datasets"] = [{**EARLIER_SPEC, **spec} if isinstance(spec, dict) else spec for spec in datasets]
    return description


def write_model(directory: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: str) -> None:
    """Write model.json and the weights into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MODEL_FILE).write_text(json.dumps(description, indent=1) + "\n")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, directory / weights)


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return tensors by name. FileNotFoundError where there are none, ValueError where the file is torn."""
    if not file.is_file():
        raise FileNotFoundError(f"no weights at {file}")
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    return tensors


def locate(source: Path | str) -> Path:
    """Return the local folder of a model: `source` itself, or `hf://organization/name[@revision]` fetched.

    Raises what `fm.model.hub.download` raises, and FileNotFoundError for `organization/name` that is no folder.
    """
    if not str(source).startswith("hf://"):
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)) and not Path(source).exists():
            raise FileNotFoundError(
                f"{source}: no such folder; expected a run, a checkpoint or an exported model. A model on the Hugging "
                f"Face Hub is named hf://{source}"
            )
        return Path(source)
    from fm.model.hub import download  # here, since a local model does not need huggingface_hub

    return download(str(source))
