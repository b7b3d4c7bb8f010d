"""A run's averaged weights, and all that is known of them, as one folder, written whole or not at all."""

import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fm
from data_pipeline.errors import UserError
from data_pipeline.files import sync_directory
from fm.artefact import ARTEFACT_FILE, CARD_FILE, CARDS, FORMAT, RECIPE_FILE, digest, is_artefact
from fm.checkpoint import read_state
from fm.evaluation.runs import Trained
from fm.export.cards import card_files, channel_cards
from fm.export.licence import MIT
from fm.export.model_card import model_card
from fm.export.program import step_program
from fm.export.scores import report_files
from fm.pretrained import EMA_FILE, MODEL_FILE, WEIGHTS_FILE
from fm.settings import dump_recipe

LICENCE = "MIT"
_SPDX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


def export_run(
    run: Path | str,
    folder: Path,
    report: Path | None = None,
    programs: Sequence[str] = (),
    licence: str = LICENCE,
    address: str | None = None,
) -> Path:
    """Write an exported model of a run's newest checkpoint to `folder`, and return that.

    `report` is one that `fm evaluate` made, by default the run's; `programs` are datasets whose step is exported as a
    program; `address` is where the model will be found, for the words of its card. UserError where there is no
    checkpoint, a card is missing or has changed, `report` is of other weights, or `folder` holds something else.
    """
    if _SPDX.fullmatch(licence) is None:
        raise UserError(f"--licence: expected an SPDX identifier, such as MIT or CC-BY-4.0, got {licence!r}")
    check_folder(folder)
    trained = Trained.open(run)
    if is_artefact(trained.checkpoint):
        raise UserError(f"{run}: is an exported model already; copy it, or push it: model.push_to_hub(...)")
    files = _model_files(trained)
    state = read_state(trained.checkpoint)
    cards = card_files(sorted(trained.model.specs), trained.recipe.data.registry, state["registry"])
    files |= {f"{CARDS}/{name}": data for name, data in cards.items()}
    files |= _scores(report, trained)
    files |= {f"programs/{name}.pt2": step_program(trained.model, name) for name in dict.fromkeys(programs)}
    if licence == LICENCE:
        files["LICENSE"] = MIT.format(name=trained.recipe.run.name).encode()
    facts = _facts(trained, state, licence)
    files[CARD_FILE] = model_card(trained, facts, files, address or folder.name).encode()
    listing = {name: {"bytes": len(data), "sha256": digest(data)} for name, data in sorted(files.items())}
    content = {**facts, "files": listing}
    files[ARTEFACT_FILE] = (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
    _write_whole(folder, files)
    return folder


def check_folder(folder: Path) -> None:
    """UserError where `folder` holds something that is no export, and so must not be replaced."""
    if folder.exists() and not is_artefact(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"{folder}: expected a folder that is not there yet, or an earlier export, found something else"
        )


def _model_files(trained: Trained) -> dict[str, bytes]:
    """The averaged weights byte for byte, so that their digest stays; model.json in the present format."""
    return {
        MODEL_FILE: (json.dumps(trained.model.description(), indent=1) + "\n").encode(),
        WEIGHTS_FILE: (trained.checkpoint / EMA_FILE).read_bytes(),
        RECIPE_FILE: dump_recipe(trained.recipe).encode(),
    }


def _scores(report: Path | None, trained: Trained) -> dict[str, bytes]:
    """Those of a given report, or of the run's if it has a fitting one; what is missing is said."""
    try:
        return report_files(report or trained.report, trained)
    except UserError as error:
        if report is not None:
            raise
        print(f"exported without scores and pictures: {error}")
        return {}


def _facts(trained: Trained, state: dict[str, Any], licence: str) -> dict[str, Any]:
    """artefact.json, but for the list of files."""
    specs = trained.model.specs.values()
    names = {name for spec in specs for name in (*spec.state_channels, *spec.constant_channels)}
    channels = channel_cards(trained.registry(), names)
    finetune = trained.recipe.finetune
    return {
        "format": FORMAT,
        "name": trained.recipe.run.name,
        "step": trained.step,
        "licence": licence,
        "datasets": {
            spec.name: {
                "shards": state["shards"].get(spec.name),
                "grid": spec.grid,
                "dt": spec.dt,
                "boundary": spec.boundary,
                "state_channels": spec.state_channels,
                "constant_channels": spec.constant_channels,
            }
            for spec in specs
        },
        "channels": {
            name: {"description": channel.description, "unit": channel.unit}
            for name, channel in channels.items()
            if name in names
        },
        "versions": {"wavelit-fm": fm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "lineage": {"pretrained": finetune.pretrained} if finetune else {},
    }


def _write_whole(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files beside `folder` and rename, in place of an earlier export. UserError if that fails."""
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
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); nothing half written was kept"
        ) from error
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
