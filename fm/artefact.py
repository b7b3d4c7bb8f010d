"""artefact.json: what an exported model consists of, and whether it is whole.

It names every file of the folder with size and SHA-256, under `files`. README.md is on the list and may change: people
mend the words of a model card, also in the browser.
"""

import hashlib
import json
import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from fm.pretrained import MODEL_FILE, WEIGHTS_FILE

ARTEFACT_FILE = "artefact.json"
CARD_FILE = "README.md"
RECIPE_FILE = "recipe.yaml"
SCORES_FILE = "scores.json"
CARDS = "cards"  # a registry folder, which load_folders reads
FORMAT = 1
KEYS = ("name", "step", "licence", "datasets", "lineage")


def is_artefact(folder: Path) -> bool:
    """Whether `fm export` wrote this folder; it may be damaged."""
    return (folder / ARTEFACT_FILE).is_file()


def read_artefact(folder: Path) -> dict[str, Any]:
    """artefact.json, checked. FileNotFoundError where there is none, ValueError where it is of another format, or
    damaged, or names a file outside its folder.
    """
    file = folder / ARTEFACT_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {ARTEFACT_FILE} in {folder}: expected a folder that `fm export` wrote")
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


def verify_artefact(folder: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """Compare files, all but the model card by default, with artefact.json, and return what that holds.

    As `read_artefact`, and ValueError naming the file that is missing or not what was exported.
    """
    content = read_artefact(folder)
    for name, expected in content["files"].items():
        if name == CARD_FILE or (names is not None and name not in names):
            continue
        file = folder / name
        if not file.is_file() or file.stat().st_size != expected["bytes"]:
            size = f"{file.stat().st_size} bytes" if file.is_file() else "no such file"
            raise ValueError(f"{file}: expected {expected['bytes']} bytes, found {size}; fetch or export it again")
        if digest(file.read_bytes()) != expected["sha256"]:
            raise ValueError(f"{file}: its bytes differ from the SHA-256 in {ARTEFACT_FILE}; fetch or export it again")
    return content


def settle_companions(folder: Path, origin: Path | None) -> None:
    """After weights were written to `folder`: what is listed beside them (cards, scores, pictures) must be of them.

    What an earlier export of other weights left in `folder` goes; what `origin` lists comes, if it was written for
    these. As `read_artefact`, and FileNotFoundError for a file that `origin` has lost.
    """
    weights = digest((folder / WEIGHTS_FILE).read_bytes())
    if is_artefact(folder):
        files = read_artefact(folder)["files"]
        if files[WEIGHTS_FILE]["sha256"] == weights:
            return
        for name in (ARTEFACT_FILE, *files):
            if name not in (MODEL_FILE, WEIGHTS_FILE):
                (folder / name).unlink(missing_ok=True)
    if origin is None or not is_artefact(origin):
        return
    files = read_artefact(origin)["files"]
    if files[WEIGHTS_FILE]["sha256"] == weights:
        for name in (ARTEFACT_FILE, *files):
            if name != WEIGHTS_FILE:  # model.json, too: its digest is listed
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(origin / name, folder / name)


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
