"""Numbers that others published: on their own, or beside ours where they are comparable.

Scores of a dataset are in its card, and the other tables of the paper in paper.yaml. What was lost in the text at hand
and inferred is marked, and never set beside ours.

A published number is comparable if protocol, context, split, grid and number of trajectories are those of ours.
Otherwise a note gives the reasons why it is not.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path

from data_pipeline.registry import Card, PublishedTable, Registry, load_registry
from data_pipeline.schema import read_yaml
from data_pipeline.tables import Cell, Document, Marked, Table, render
from fm.evaluation.protocol import PROTOCOLS, Protocol, load_protocol
from fm.evaluation.scores import ONE_STEP, DatasetScores
from fm.evaluation.tables import Runs, compare_document, load_runs, vrmse_cell

CARD_ONE_STEP = "one_step"  # as cards call it
INFERRED = "inferred"
JOINT, BESPOKE = "FM-PT", "9.5M-PT"  # models of the cards: one on all eight datasets, and one of its trunk on each


def comparison(
    paths: Sequence[Path], protocol: str | None, statistic: str | None, labels: Sequence[str] | None, form: str
) -> str:
    """Return the scores of evaluated runs, and beside them published ones, as text.

    Without `paths`, all published scores. `protocol` is a name or a file, None for that of the first run; `form` is md,
    csv, json or latex.
    """
    if not paths:
        return render(published_document(load_registry()), form)
    runs = load_runs(paths, load_protocol(protocol) if protocol else None, statistic, labels)
    document = compare_document(runs)
    tables, notes = beside_published(runs, load_registry())
    return render(replace(document, tables=[*document.tables, *tables], notes=[*document.notes, *notes]), form)


def published_document(registry: Registry) -> Document:
    """Return all that is published: of the cards a table for each source and window, then the paper's other tables."""
    found: dict[tuple[str, str, str], dict[str, dict[str, Cell]]] = {}
    for card in registry.cards.values():
        for table in card.published:
            for window, vrmse in table.vrmse.items():
                inferred = {model: Marked(value, INFERRED) for model, value in table.inferred.get(window, {}).items()}
                found.setdefault((table.table, table.protocol, window), {})[card.name] = {**vrmse, **inferred}
    tables = []
    for (source, protocol, window), datasets in found.items():
        models = list(dict.fromkeys(model for vrmse in datasets.values() for model in vrmse))
        rows: list[list[Cell]] = [[name, *(vrmse.get(model) for model in models)] for name, vrmse in datasets.items()]
        block = "one step" if window == CARD_ONE_STEP else f"rollout, {window}"
        title = f"{source}: {block} (protocol {protocol} v{_version(protocol)})"
        tables.append(Table(title, ["dataset", *models], rows, exact=True))
    paper = read_yaml(files("fm.evaluation") / "paper.yaml")
    notes = [f"The WaveLiT paper: {paper['source']}."]
    for one in paper["tables"]:
        unit = f" ({one['unit']})" if "unit" in one else ""
        title = f"WaveLiT paper, {one['table']}, {one['section']}: {one['title']}{unit}"
        rows = [
            [Marked(cell[INFERRED], INFERRED) if isinstance(cell, dict) else cell for cell in row]
            for row in one["rows"]
        ]
        tables.append(Table(title, one["columns"], rows, exact=True))
        notes += [f"{one['table']}: {one['note']}"] if "note" in one else []
    about = (
        "Published numbers. Scores of datasets are VRMSE on the test split, lower is better. Inferred: lost in the "
        "text at hand, and reconstructed."
    )
    return Document(about, tables, notes)


def beside_published(runs: Runs, registry: Registry) -> tuple[list[Table], list[str]]:
    """Return tables of our runs beside the published models, where comparable; and notes of sources and reasons."""
    protocol = next(iter(runs.values())).protocol
    parts = {name: part for scores in runs.values() for name, part in scores.datasets.items()}
    cards = [card for name, card in registry.cards.items() if name in parts and card.published]
    differences = {card.name: _differences(card, parts[card.name], protocol) for card in cards}
    notes = [
        f"{name}: not comparable with published scores: {'; '.join(reasons)}."
        for name, reasons in differences.items()
        if reasons
    ]
    comparable = [card for card in cards if not differences[card.name]]
    sources: dict[str, int] = {}
    tables = []
    for block in [ONE_STEP, *protocol.windows]:
        covered = [
            card for card in comparable if block == ONE_STEP or _same_steps(card, parts[card.name], protocol, block)
        ]
        tables += _block_tables(runs, block, covered, protocol, sources)
        notes += [
            f"{card.name}, {block}: not comparable with published scores, which are of other steps: published "
            f"trajectories have {' or '.join(map(str, card.num_frames))} frames."
            for card in comparable
            if card not in covered
        ]
    notes += [f"Source [{number}]: {source}." for source, number in sources.items()]
    return tables, notes


def joint_over_bespoke(card: Card) -> Cell:
    """Return the one-step VRMSE of JOINT over that of BESPOKE; marked if one was inferred, None if it is not known."""
    for table in card.published:
        inferred = table.inferred.get(CARD_ONE_STEP, {})
        vrmse = {**table.vrmse.get(CARD_ONE_STEP, {}), **inferred}
        if JOINT in vrmse and BESPOKE in vrmse:
            ratio = vrmse[JOINT] / vrmse[BESPOKE]
            return Marked(ratio, INFERRED) if {JOINT, BESPOKE} & inferred.keys() else ratio
    return None


def _block_tables(
    runs: Runs, block: str, cards: Sequence[Card], protocol: Protocol, sources: dict[str, int]
) -> list[Table]:
    """Our runs above the published models, a column for each dataset; no table if nothing is published.

    `sources` numbers the sources in the order in which they are cited, and is extended here.
    """
    window = CARD_ONE_STEP if block == ONE_STEP else block
    published: dict[tuple[str, str], dict[str, float]] = {}  # model, source -> dataset -> VRMSE
    for card in cards:
        for table in _same_protocol(card, protocol):
            for model, vrmse in table.vrmse.get(window, {}).items():
                published.setdefault((model, table.table), {})[card.name] = vrmse
    if not published:
        return []
    ours: list[list[Cell]] = [
        [label, "", *(vrmse_cell(scores.block(card.name, block), protocol.trajectories) for card in cards)]
        for label, scores in runs.items()
    ]
    theirs: list[list[Cell]] = [
        [model, f"[{sources.setdefault(source, len(sources) + 1)}]", *(vrmse.get(card.name) for card in cards)]
        for (model, source), vrmse in published.items()
    ]
    head = ["model", "source", *(card.abbreviation for card in cards)]
    return [Table(f"Beside published scores: {block}", head, ours + theirs)]


def _same_protocol(card: Card, protocol: Protocol) -> list[PublishedTable]:
    return [table for table in card.published if (table.protocol, table.context) == (protocol.name, protocol.context)]


def _differences(card: Card, part: DatasetScores, protocol: Protocol) -> list[str]:
    """Why our scores of a dataset cannot be compared with the published ones; empty if they can."""

    def text(value: object) -> str:
        return "all" if value is None else str(value)

    def size(grid: Sequence[int]) -> str:
        return " x ".join(map(str, grid))

    reasons = []
    contexts = dict.fromkeys(str(table.context) for table in card.published if table.protocol == protocol.name)
    if not contexts or protocol.version != _version(protocol.name):
        followed = dict.fromkeys(f"{table.protocol} v{_version(table.protocol)}" for table in card.published)
        reasons.append(f"protocol {protocol.name} v{protocol.version}, published under {' and '.join(followed)}")
    elif not _same_protocol(card, protocol):
        reasons.append(f"context {protocol.context}, published {' and '.join(contexts)}")
    named = PROTOCOLS.get(protocol.name, protocol)
    for name in (field.name for field in fields(Protocol)):
        ours, theirs = getattr(protocol, name), getattr(named, name)
        if ours != theirs and name not in ("version", "windows", "context"):
            reasons.append(f"{name} {text(ours)}, published {text(theirs)}")
    if part.grid != card.grid:
        reasons.append(f"grid {size(part.grid)}, published {size(card.grid)}")
    if card.test_trajectories is None:
        reasons.append("the number of published trajectories is not known")
    elif card.test_trajectories != part.trajectories:
        reasons.append(f"{part.trajectories} trajectories, published {card.test_trajectories}")
    return reasons


def _version(protocol: str) -> int:
    """Return the version of a protocol that a card names: the newest is closest to what was published."""
    return PROTOCOLS[protocol].version if protocol in PROTOCOLS else 1


def _same_steps(card: Card, part: DatasetScores, protocol: Protocol, window: str) -> bool:
    """Whether a window was scored over the steps that it has in the shortest published trajectory."""
    if not card.num_frames:
        return True
    shortest = card.num_frames[0] - 1 - protocol.last_given
    published = protocol.windows[window].steps(shortest, shortest if protocol.short == "cut" else None)
    ours = part.windows[window]
    return ours is not None and published == (ours.first, ours.last)
