"""The files of a model, in a folder.

    model.json         format, context, configuration and dataset specifications; a baseline's has its name, too, and
                       that of an imported network the name of its class
    model.safetensors  weights; a checkpoint also has ema.safetensors, the averaged ones
    artefact.json      only in a folder that `fm export` wrote: size and SHA-256 of every file, and more facts

What `fm export` wrote is checked against artefact.json before it is used, all but README.md: users edit the words of a
model card, also in the browser. fm/checkpoint.py checks checkpoints by the same function, `verify_files`.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import AfterValidator, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from data_pipeline.errors import UserError, brief, shortened
from data_pipeline.files import atomic_file, file_name, inside, parse_json, read_plain_file, sha256, sha256_file
from fm.model.spec import from_plain

MODEL_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
MODEL_FORMAT = 2
BASELINE = "baseline"  # key of model.json that only baselines have
IMPORTED = "imported"  # key of model.json that only networks have whose class a recipe imports
KINDS = {BASELINE: "baseline", IMPORTED: "imported network"}  # a WaveLiT has no such key
# Keys that model.json of earlier versions lacks, with the values that reproduce those models. Defaults may change.
EARLIER = {"context": 1}
EARLIER_CONFIG = {  # of a WaveLiT
    "attention": "linear",
    "pointwise": False,
    "decoder": "wavelet",
    "decoder_width": 32,
    "constraints": False,
}
EARLIER_SPEC: dict[str, Any] = {"conserved": [], "ranges": {}, "spacing": None}  # of each dataset

EXPORT_FILE = "artefact.json"
CARD_FILE = "README.md"
RECIPE_FILE = "recipe.yaml"
SCORES_FILE = "scores.json"
CARDS = "cards"  # a registry folder, which load_folders reads
EXPORT_FORMAT = 1
Made = TypeVar("Made", bound=nn.Module)


@dataclass(frozen=True)
class ListedFile:
    """Size and digest of a file, as artefact.json and a checkpoint's state.json hold them."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


@dataclass(frozen=True)
class Listing:
    """The part of artefact.json or state.json that lists the other files of the folder."""

    files: dict[str, ListedFile]


@dataclass(frozen=True)
class _ExportedDataset:
    shards: str | None


@dataclass(frozen=True)
class _Lineage:
    added: list[str] = field(default_factory=list)
    model: str = ""
    earlier: "_Lineage | None" = None


@dataclass(frozen=True)
class _ExportFacts(Listing):
    """What is read of artefact.json; it holds more."""

    name: Annotated[str, AfterValidator(file_name)]  # a report's folder is called after it
    step: Annotated[int, Field(ge=0)]
    licence: str
    datasets: dict[str, _ExportedDataset]
    lineage: _Lineage


@contextmanager
def _value_errors() -> Iterator[None]:
    """Raise the UserError of a block as ValueError: the callers of a model's Python interface expect that."""
    try:
        yield
    except UserError as error:
        raise ValueError(str(error)) from error


def path_inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a model's folder. ValueError if the name or a link leads out of the folder."""
    with _value_errors():
        return inside(folder, name)


def read_listing(file: Path, content: Any) -> dict[str, ListedFile]:
    """Return `files` of a JSON file's content. ValueError if it is none, or names a path outside the file's folder."""
    try:
        listing = from_plain(Listing, content).files
    except ValueError as error:
        raise ValueError(f"{file}: expected a list of files with their sizes and SHA-256: {error}") from error
    for name in listing:
        path_inside(file.parent, name)
    return listing


def verify_files(file: Path, content: Any, names: Collection[str] | None = None, remedy: str = "") -> None:
    """Compare the files beside `file`, all or those in `names`, with their sizes and digests in its content.

    ValueError, ending with `remedy`, names the first one that differs, is missing or is not listed.
    """
    listing = read_listing(file, content)
    for name in listing if names is None else names:
        path = file.parent / name
        if name not in listing:
            raise ValueError(f"{path}: expected a file that {file.name} lists, with its SHA-256{remedy}")
        listed = listing[name]
        if not path.is_file() or path.stat().st_size != listed.bytes:
            size = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            raise ValueError(f"{path}: expected {listed.bytes} bytes, found {size}{remedy}")
        if sha256_file(path) != listed.sha256:
            raise ValueError(f"{path}: its bytes differ from the SHA-256 in {file.name}{remedy}")


def _read_json(folder: Path, name: str, number: int, what: str) -> dict[str, Any]:
    """Return the JSON object of a file, `what` in words, of format `number`. ValueError for anything else."""
    file = path_inside(folder, name)
    try:
        with _value_errors():
            content = parse_json(read_plain_file(file.resolve()), str(file))
        found = content["format"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file}: expected {what} with a format, got {error!r}") from error
    if type(found) is not int or found != number:
        raise ValueError(
            f"{file} has format {brief(found)}, this version reads {number}; install the version of the project that "
            "wrote it"
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
    content = _read_json(folder, EXPORT_FILE, EXPORT_FORMAT, "a list of files")
    files = read_listing(file, content)
    missing = [name for name in (MODEL_FILE, WEIGHTS_FILE) if name not in files]
    if missing:
        raise ValueError(f"{file}: it is incomplete, {', '.join(missing)} is missing")
    try:
        from_plain(_ExportFacts, content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return content


def verify_exported(folder: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """Compare files, by default all but the model card, with artefact.json; return what that holds.

    Errors as of `read_exported` and `verify_files`.
    """
    content = read_exported(folder)
    if names is None:
        cards = (path.relative_to(folder).as_posix() for path in (folder / CARDS).rglob("*.yaml"))
        surplus = [name for name in (*cards, RECIPE_FILE) if name not in content["files"] and (folder / name).exists()]
        if surplus:
            raise ValueError(f"{folder / surplus[0]}: {EXPORT_FILE} does not list it; remove it, or export again")
    checked = content["files"].keys() - {CARD_FILE} if names is None else names
    verify_files(folder / EXPORT_FILE, content, checked, remedy="; fetch or export it again")
    return content


def _stale_companions(folder: Path, weights: str) -> list[Path]:
    """Return the files that an export of other weights than those of SHA-256 `weights` left in `folder`."""
    if not is_exported(folder):
        return []
    files = read_exported(folder)["files"]
    if files[WEIGHTS_FILE]["sha256"] == weights:
        return []
    return [path_inside(folder, name) for name in {EXPORT_FILE, *files} - {MODEL_FILE, WEIGHTS_FILE}]


def _companions(origin: Path | None, folder: Path, weights: str) -> dict[str, bytes]:
    """Return the files beside the weights of SHA-256 `weights` by path, if `origin` was exported with them.

    Everything that `origin` lists is verified, except for the words of the model card. Nothing for `folder` itself.
    """
    if origin is None or not is_exported(origin) or origin.resolve() == folder.resolve():
        return {}
    files = read_exported(origin)["files"]
    if files[WEIGHTS_FILE]["sha256"] != weights:
        return {}
    verify_exported(origin)
    names = {EXPORT_FILE, *files} - {WEIGHTS_FILE}  # model.json, too: its digest is listed
    return {name: read_plain_file(path_inside(origin, name).resolve()) for name in sorted(names)}


def read_description(directory: Path | str) -> dict[str, Any]:
    """Return model.json: a dict with format, context, config, datasets, and one of KINDS unless it is a WaveLiT's.

    Keys that an earlier version did not write get the values of its models. FileNotFoundError where there is none,
    ValueError where it is of another format or not such a file.
    """
    directory = Path(directory)
    file = directory / MODEL_FILE
    if not file.is_file():
        hint = "expected a folder of save_pretrained"
        if (directory / "checkpoints").is_dir():
            hint = f"{directory} is a run; export it (fm export), or name one of its checkpoints/step_*"
        raise FileNotFoundError(f"no {MODEL_FILE} in {directory}: {hint}")
    description = {**EARLIER, **_read_json(directory, MODEL_FILE, MODEL_FORMAT, "a model's description")}
    keys = {"format", "context", "config", "datasets"}
    kind = kind_of(description)
    if set(description) - {kind} != keys:
        missing, unexpected = sorted(keys - set(description)), sorted(set(description) - keys - {kind})
        raise ValueError(f"{file}: missing keys {missing}, unexpected keys {brief(unexpected)}")
    config, datasets = description["config"], description["datasets"]
    if type(description["context"]) is not int or description["context"] < 1:
        raise ValueError(f"{file}: context: expected a number of input frames, got {brief(description['context'])}")
    if not isinstance(config, dict):
        raise ValueError(f"{file}: config: expected settings by name, got {brief(config)}")
    if not isinstance(datasets, list) or not all(isinstance(spec, dict) for spec in datasets):
        raise ValueError(f"{file}: datasets: expected a list of specifications, got {brief(datasets)}")
    named = config.get("import" if kind == IMPORTED else "name")
    if kind is None:
        description["config"] = {**EARLIER_CONFIG, **config}
    elif description[kind] != named:
        raise ValueError(f"{file}: {kind}: expected the name in config, {brief(named)}, got {brief(description[kind])}")
    description["datasets"] = [{**EARLIER_SPEC, **spec} for spec in datasets]
    return description


def kind_of(description: Mapping[str, Any]) -> str | None:
    """Return which of KINDS a model's description is of; None for a WaveLiT."""
    return next((kind for kind in KINDS if kind in description), None)


def write_model(
    folder: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: str, origin: Path | None
) -> None:
    """Write model.json and the weights into `folder`, and what belongs to them (cards, scores, pictures).

    If `weights` is the exported model's name of weights, files that `origin` lists are copied, if `origin` was exported
    with the same weights, and those that an earlier export of other weights left in `folder` are deleted. Errors as of
    `verify_exported`; then nothing has been written. Links are replaced and never written through.
    """
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    written = {MODEL_FILE: (json.dumps(description, indent=1) + "\n").encode(), weights: data}
    stale: list[Path] = []
    if weights == WEIGHTS_FILE:
        digest = sha256(data)
        stale = _stale_companions(folder, digest)
        written |= _companions(origin, folder, digest)
    paths = {path_inside(folder, str(Path(name).parent)) / Path(name).name: data for name, data in written.items()}
    for path in stale:
        path.unlink(missing_ok=True)
    for path, content in paths.items():
        with atomic_file(path, durable=False) as file:
            file.write(content)


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a file by name, from its header alone. Errors as of `read_weights`."""
    with _opened_weights(file) as path, safe_open(path, "pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def compare_shapes(own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], what: str) -> None:
    """ValueError, which begins with `what`, unless the weights of a file are a model's own, by name and shape."""
    problems = [f"missing {name} {shape}" for name, shape in own.items() if name not in given]
    problems += [f"unexpected {name} {shape}" for name, shape in given.items() if name not in own]
    problems += [
        f"{name} is {given[name]}, the model's is {shape}"
        for name, shape in own.items()
        if given.get(name, shape) != shape
    ]
    if problems:
        listed = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{what}: {listed}")


def make_on_meta(make: Callable[[], Made], shapes: Mapping[str, tuple[int, ...]], context: int, where: str) -> Made:
    """Return the model that `make` returns, without memory for its parameters.

    model.json may come from a stranger and declare any size. So the model is first made on the meta device, which holds
    shapes alone, and no further than the weights' file has parameters and numbers: then ValueError, naming `where`.
    """
    try:
        with limited_to(shapes, context, where), torch.device("meta"):
            return make()
    except (RuntimeError, OverflowError, MemoryError, TypeError) as error:  # sizes beyond those of any tensor
        raise ValueError(f"{_too_large(where)} ({shortened(str(error), 200)})") from error


def _too_large(where: str) -> str:
    return f"{where} does not fit the model: model.json declares a larger one"


@contextmanager
def limited_to(shapes: Mapping[str, tuple[int, ...]], context: int, where: str) -> Iterator[None]:
    """Raise ValueError, naming `where`, where the block makes parameters far beyond those of `shapes`.

    A model of `context` input frames that is too many for `shapes` is refused before the block runs.
    """
    # Twice as many, since networks may replace some of their parts while they are made.
    room = [2 * len(shapes), 2 * sum(map(prod, shapes.values()))]

    def count_down(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            room[0] -= 1
            room[1] -= parameter.numel()
            if min(room) < 0:
                raise ValueError(_too_large(where))

    # Each input frame has parameters of its own (WaveLiT) or columns in the first ones (other networks).
    if context > max([len(shapes), *(side for shape in shapes.values() for side in shape)]):
        raise ValueError(_too_large(where))
    hook = register_module_parameter_registration_hook(count_down)
    try:
        yield
    finally:
        hook.remove()


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return tensors by name. FileNotFoundError where there are none, ValueError where the file is torn or a link."""
    with _opened_weights(file) as path:
        tensors: dict[str, Tensor] = load_file(path)
    return tensors


@contextmanager
def _opened_weights(file: Path) -> Iterator[Path]:
    path = path_inside(file.parent, file.name)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {file}")
    try:
        yield path
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


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
