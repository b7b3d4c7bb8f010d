"""The folder of an exported model, written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.files import sync_directory
from fm.artefact import ARTEFACT_FILE, CARD_FILE, CARDS, RECIPE_FILE, digest, is_artefact
from fm.export.facts import Facts
from fm.export.licence import MIT
from fm.export.model_card import model_card
from fm.pretrained import MODEL_FILE, WEIGHTS_FILE
from fm.recipe_file import dump_recipe

LICENCE = "MIT"  # that which comes with its text


def write_export(
    folder: Path, facts: Facts, weights: bytes, more: Mapping[str, bytes] | None = None, address: str | None = None
) -> None:
    """Write an exported model to `folder`, in place of an earlier one.

    `weights` is the safetensors file, byte for byte, so that its digest stays; `more` are scores, pictures and programs
    by path; `address` is where the model will be found, for the words of its card. UserError where `folder` holds
    something else or cannot be written; then it is left as it was.
    """
    files = {
        MODEL_FILE: (json.dumps(facts.model.description(), indent=1) + "\n").encode(),
        WEIGHTS_FILE: weights,
        RECIPE_FILE: dump_recipe(facts.recipe).encode(),
        **{f"{CARDS}/{name}": data for name, data in facts.cards.files().items()},
        **(more or {}),
    }
    if facts.licence == LICENCE:
        files["LICENSE"] = MIT.format(name=facts.name).encode()
    files[CARD_FILE] = model_card(facts, files, address or folder.name).encode()
    listing = {name: {"bytes": len(data), "sha256": digest(data)} for name, data in sorted(files.items())}
    content = json.dumps({**facts.to_json(), "files": listing}, indent=1, ensure_ascii=False, allow_nan=False)
    files[ARTEFACT_FILE] = f"{content}\n".encode()
    _write_whole(folder, files)


def check_folder(folder: Path) -> None:
    """UserError where `folder` holds something that is no export, and so must not be replaced."""
    if folder.exists() and not is_artefact(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"{folder}: expected a folder that is not there yet, or an earlier export, found something else"
        )


def _write_whole(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files beside `folder` and rename, in place of an earlier export. UserError if that fails."""
    check_folder(folder)
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".writing_{folder.name}_", dir=folder.parent))
        (temporary / "whole").mkdir()
        for name, data in files.items():
            file = temporary / "whole" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        _replace(folder, temporary / "whole", temporary / "before")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); nothing was kept") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace(folder: Path, whole: Path, before: Path) -> None:
    """Rename `whole` to `folder`, and what is there to `before`; back again where that fails."""
    if folder.exists():
        folder.rename(before)
    try:
        whole.rename(folder)
    except OSError:
        if before.exists():
            before.rename(folder)
        raise
    sync_directory(folder.parent)
