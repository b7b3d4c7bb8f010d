"""Which shards there are, and tables of what the audit found in them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.shards.findings import SEVERITIES, Finding
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest
from data_pipeline.well.hdf5 import SPLITS

TEXT_COLUMNS = {"dataset", "split", "boundary x", "boundary y", "stats", "stored", "findings"}
TEXT_COLUMNS |= {"kind", "severity", "finding"}
FINDING_COLUMNS = ("dataset", "split", "severity", "kind", "finding")


def find_manifests(
    shards: Path, datasets: Sequence[str] | None = None, splits: Sequence[str] | None = None
) -> dict[Path, Manifest]:
    """Folder -> manifest of every dataset and split under `shards`, by name, splits in the order train, valid, test.

    Raises UserError if there is none, if one that was asked for is missing, or if a manifest is damaged.
    """
    if datasets is None:
        datasets = sorted({path.parts[-3] for path in shards.glob(f"*/*/{MANIFEST_NAME}")})
    folders = []
    for dataset in datasets:
        present = [split for split in SPLITS if (shards / dataset / split / MANIFEST_NAME).exists()]
        missing = [split for split in splits or () if split not in present]
        if missing or not present:
            raise UserError(
                f"{shards / dataset}: expected shards of {', '.join(missing) or 'any split'}, got "
                f"{', '.join(present) or 'none'}; make them with `data-pipeline shard`"
            )
        folders += [shards / dataset / split for split in present if splits is None or split in splits]
    if not folders:
        raise UserError(
            f"{shards}: expected <dataset>/<split>/{MANIFEST_NAME}, got none; make shards with `data-pipeline shard`"
        )
    return {folder: Manifest.load(folder / MANIFEST_NAME) for folder in folders}


Found = tuple[str, str, Finding]  # dataset, split, finding


def findings_table(found: Sequence[Found], limit: int | None) -> str:
    """A line per finding, the most severe of a dataset first; what several splits have in common stands in one line.

    `limit` is for each dataset, without notes, and the rest is counted; None shows all.
    """
    rows: list[list[str]] = []
    hidden: list[Finding] = []
    for dataset in dict.fromkeys(dataset for dataset, _, _ in found):
        splits: dict[Finding, list[str]] = {}
        for owner, split, finding in found:
            if owner == dataset:
                splits.setdefault(finding, []).append(split)
        mine = sorted(splits, key=lambda one: SEVERITIES.index(one.severity))
        shown = mine if limit is None else [one for one in mine if one.severity != "note"][:limit]
        hidden += [one for one in mine[len(shown) :] for _ in splits[one]]
        rows += [[dataset, ",".join(splits[f]), f.severity, f.kind, f"{f.where}: {f.detail}"] for f in shown]
    lines = [table(FINDING_COLUMNS, rows)] if rows else []
    if hidden:
        lines.append(f"not shown: {count_severities(hidden)}; `data-pipeline inspect DIR --findings` lists all")
    return "\n".join(lines)


def count_severities(findings: Sequence[Finding]) -> str:
    """`1 error, 2 warnings, 3 notes`, without those that are none; empty if there are none."""
    counts = Counter(finding.severity for finding in findings)
    return ", ".join(f"{counts[one]} {one}{'s' * (counts[one] > 1)}" for one in SEVERITIES if counts[one])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text to the left, of numbers to the right."""
    lines = [columns, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in TEXT_COLUMNS else cell.rjust(width)
            for name, cell, width in zip(columns, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )
