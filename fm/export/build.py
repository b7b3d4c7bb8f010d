"""A run's averaged weights, and all that is known of them, as an exported model."""

import re
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from fm.artefact import CARDS, is_artefact
from fm.evaluation.runs import Trained
from fm.export.cards import Cards, find_cards
from fm.export.facts import Facts
from fm.export.folder import LICENCE, check_folder, write_export
from fm.export.program import step_program
from fm.export.scores import report_files
from fm.pretrained import EMA_FILE

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
    facts = Facts(
        trained.model, trained.recipe, _cards(trained), trained.step, trained.shards, licence, trained.lineage
    )
    more = _scores(report, trained)
    more |= {f"programs/{name}.pt2": step_program(trained.model, name) for name in dict.fromkeys(programs)}
    write_export(folder, facts, (trained.checkpoint / EMA_FILE).read_bytes(), more, address)
    return folder


def _cards(trained: Trained) -> Cards:
    """The cards of the run's datasets; those that its registry lacks come from the exported model it was made from."""
    names = list(trained.model.specs)
    sources = [(names, trained.card_folders())]
    pretrained = trained.lineage.get("pretrained")
    if pretrained is not None and is_artefact(Path(pretrained)):
        sources.append((names, [Path(pretrained) / CARDS]))
    cards = find_cards(sources)
    cards.check_unchanged(names, trained.checkpoint)
    return cards


def _scores(report: Path | None, trained: Trained) -> dict[str, bytes]:
    """Those of a given report, or of the run's if it has a fitting one; what is missing is said."""
    try:
        return report_files(report or trained.report, trained)
    except UserError as error:
        if report is not None:
            raise
        print(f"exported without scores and pictures: {error}")
        return {}
