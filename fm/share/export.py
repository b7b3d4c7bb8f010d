"""The folder of an exported model, written whole or not at all.

A run's averaged weights, and all that is known of them, as an exported model.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipeline.files import UserError, sha256, sync
from fm.config import dump_recipe
from fm.evaluation.evaluate import TrainedModel
from fm.model.files import (
    CARD_FILE,
    CARDS,
    EMA_FILE,
    EXPORT_FILE,
    MODEL_FILE,
    RECIPE_FILE,
    WEIGHTS_FILE,
    is_exported,
)
from fm.share.model_card import MIT, Cards, Facts, find_cards, model_card, report_files, step_program

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
    listing = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in sorted(files.items())}
    content = json.dumps({**facts.to_json(), "files": listing}, indent=1, ensure_ascii=False, allow_nan=False)
    files[EXPORT_FILE] = f"{content}\n".encode()
    _write_whole(folder, files)


def check_folder(folder: Path) -> None:
    """UserError where `folder` holds something that is no export, and so must not be replaced."""
    if folder.exists() and not is_exported(folder) and not (folder.is_dir() and not any(folder.iterdir())):
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
    sync(folder.parent)


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
    trained = TrainedModel.open(run)
    if is_exported(trained.checkpoint):
        raise UserError(f"{run}: is an exported model already; copy it, or push it: model.push_to_hub(...)")
    facts = Facts(
        trained.model, trained.recipe, _cards(trained), trained.step, trained.shards, licence, trained.lineage
    )
    more = _scores(report, trained)
    more |= {f"programs/{name}.pt2": step_program(trained.model, name) for name in dict.fromkeys(programs)}
    write_export(folder, facts, (trained.checkpoint / EMA_FILE).read_bytes(), more, address)
    return folder


def _cards(trained: TrainedModel) -> Cards:
    """The cards of the run's datasets; those that its registry lacks come from the exported model it was made from."""
    names = list(trained.model.specs)
    sources = [(names, trained.card_folders())]
    pretrained = trained.lineage.get("pretrained")
    if pretrained is not None and is_exported(Path(pretrained)):
        sources.append((names, [Path(pretrained) / CARDS]))
    cards = find_cards(sources)
    cards.check_unchanged(names, trained.checkpoint)
    return cards


def _scores(report: Path | None, trained: TrainedModel) -> dict[str, bytes]:
    """Those of a given report, or of the run's if it has a fitting one; what is missing is said."""
    try:
        return report_files(report or trained.report, trained)
    except UserError as error:
        if report is not None:
            raise
        print(f"exported without scores and pictures: {error}")
        return {}
