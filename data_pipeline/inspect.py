"""Tables of `shard --dry-run` and `inspect`: shards to come, shards that are there, and the paper's Tables 7 to 9."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.files import free_bytes
from data_pipeline.registry import Card, Registry
from data_pipeline.remote import RemoteFolder, is_url
from data_pipeline.shards.build import finished_manifest
from data_pipeline.shards.convert import measure_speed
from data_pipeline.shards.format import MANIFEST_NAME, Manifest
from data_pipeline.shards.plan import Settings, SplitPlan, plan_all
from data_pipeline.shards.review import TEXT_COLUMNS, across_splits, count_severities, find_manifests, findings_table
from data_pipeline.tables import markdown, plain
from data_pipeline.well.hdf5 import SPLITS
from data_pipeline.well.stats import read_stats
from data_pipeline.windows.reader import WindowIndex
from data_pipeline.windows.schedule import Source, sampling_shares
from data_pipeline.workers import available_cores

FORECAST_COLUMNS = ("dataset", "split", "files", "trajectories", "windows", "shards", "MB", "state")
PROBE_BYTES = 128 * 2**20  # read, audited and checksummed for the estimate of the time


def forecast(
    well: str | Path,
    out: Path,
    datasets: Sequence[str] | None,
    splits: Sequence[str] | None,
    jobs: int | None,
    settings: Settings,
    registry: Registry,
) -> str:
    """Return a table of what `build_shards` would write, the free disk, and the time from a short dry run.

    UserError where `build_shards` would before it writes: for files that are damaged or not the cards', and for
    shards of other files or settings.
    """
    plans = plan_all(well, out, datasets, splits, settings, registry)
    pending = [plan for plan in plans if finished_manifest(plan) is None]
    rows = [_forecast_row(plan, plan in pending) for plan in plans]
    needed = sum(plan.stored_bytes for plan in pending)
    free = free_bytes(out)
    verdict = "" if needed < free else ": NOT ENOUGH, choose another --out or fewer --datasets"
    lines = [
        plain(FORECAST_COLUMNS, rows, TEXT_COLUMNS),
        f"{needed / 1e9:.2f} GB to write, {free / 1e9:.1f} GB free under {out}{verdict}",
    ]
    if pending:
        lines.append(_time(pending, jobs or available_cores()))
    return "\n".join([*lines, "nothing was written (--dry-run)"])


def _forecast_row(plan: SplitPlan, pending: bool) -> list[str]:
    return [
        plan.card.name,
        plan.split,
        str(len(plan.files)),
        str(len(plan.trajectories)),
        str(sum(one.frames - 1 for one in plan.trajectories)),
        str(len(plan.shards)),
        f"{plan.stored_bytes / 1e6:.1f}",
        "to write" if pending else "already there",
    ]


def _time(plans: Sequence[SplitPlan], jobs: int) -> str:
    """Return how long it takes by the speed of the largest plan's first frames."""
    probed = max(plans, key=lambda plan: plan.stored_bytes)
    path = probed.stats_source.file
    num_bytes, seconds = measure_speed(probed, None if path is None else read_stats(path, probed.card), PROBE_BYTES)
    total = sum(plan.source_bytes(shard) for plan in plans for shard in range(len(plan.shards)))
    without = {plan.card.name for plan in plans if plan.stats_source.file is None}
    jobs = min(jobs, sum(len(plan.shards) for plan in plans))
    rate = num_bytes / seconds
    needed = total / rate / jobs
    text = (
        f"about {f'{needed / 60:.0f} min' if needed > 100 else f'{math.ceil(needed)} s'} with --jobs {jobs}, from a "
        f"trial of {num_bytes / 1e6:.1f} MB of {probed.card.name} at {rate / 1e6:.0f} MB/s, reading and checking "
        "without writing; a slower disk takes longer"
    )
    if without:
        text += f"; and once more the reading of the train files of {', '.join(sorted(without))}, for the statistics"
    return text


COLUMNS = (
    *("dataset", "split", "trajectories", "frames", "windows", "grid", "channels", "shards", "MB"),
    *("boundary x", "boundary y", "stats", "stored", "findings", "skipped", "share"),
)
USUAL = {"stats": "stats.yaml", "stored": "float32", "skipped": "0"}  # a column that holds nothing else is left out
LEGEND = "windows: pairs of neighboring frames; channels: state+constant; share: of the draws of a training on all"
FEW = 4  # errors and warnings of a dataset that are shown unless all findings are asked for


def overview(shards: str | Path, known: Sequence[str], all_findings: bool = False) -> str:
    """Return a line per dataset and split: counts, grid, channels, bytes, boundaries, findings and share.

    A few errors and warnings follow the table, or all findings. `known` names the datasets that are looked for behind a
    URL, which may not list its folders. UserError as from `find_manifests`.
    """
    found_there = _manifests_behind(str(shards), known) if is_url(shards) else find_manifests(Path(shards))
    manifests = list(found_there.values())
    shares = _shares([manifest for manifest in manifests if manifest.split == "train"])
    rows = [_row(manifest, shares) for manifest in manifests]
    num_bytes = sum(shard.bytes for manifest in manifests for shard in manifest.shards)
    found = [(one.dataset, one.split, finding) for one in manifests for finding in one.findings]
    found += across_splits(manifests)
    listed = findings_table(found, None if all_findings else FEW)
    num_datasets = len({one.dataset for one in manifests})
    total = f"{num_datasets} datasets, {len(rows)} splits, {num_bytes / 1e6:.1f} MB in {shards}"
    return "\n".join([_table(rows), total, LEGEND, *([f"\n{listed}"] if listed else [])])


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return the table without the columns that hold only USUAL values."""
    columns = [(name, [row[number] for row in rows]) for number, name in enumerate(COLUMNS)]
    shown = [(name, cells) for name, cells in columns if set(cells) != {USUAL.get(name)}]
    rows_shown = list(zip(*(cells for _, cells in shown), strict=True))
    return plain([name for name, _ in shown], rows_shown, TEXT_COLUMNS)


def _manifests_behind(url: str, known: Sequence[str]) -> Mapping[RemoteFolder, Manifest]:
    """Return what `find_manifests` does, for the known datasets behind a URL."""
    folders = [RemoteFolder(url) / name / split for name in sorted(known) for split in SPLITS]
    found = {folder: folder.file(MANIFEST_NAME) for folder in folders}
    manifests = {folder: Manifest.load(file) for folder, file in found.items() if file.exists()}
    if not manifests:
        raise UserError(
            f"{url}: expected <dataset>/<split>/{MANIFEST_NAME} of {', '.join(sorted(known))}, got none; upload shards "
            "made with `data-pipeline shard`, or name your own cards with --registry"
        )
    return manifests


def _shares(manifests: Sequence[Manifest]) -> dict[str, float]:
    found = []
    for manifest in manifests:
        trajectories = manifest.trajectories
        index = WindowIndex([one.segments for one in trajectories], 2, [one.shard for one in trajectories])
        if len(index):
            tokens = manifest.grid[0] * manifest.grid[1] // 4
            found.append(Source(manifest.dataset, len(index), tokens, index.shard_windows))
    return sampling_shares(found, "sqrt") if found else {}


def _row(manifest: Manifest, shares: dict[str, float]) -> list[str]:
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    lengths = sorted({trajectory.frames for trajectory in manifest.trajectories})
    constants = f"+{len(manifest.constant_channels)}" if manifest.constant_channels else ""
    return [
        manifest.dataset,
        manifest.split,
        str(len(manifest.trajectories)),
        "/".join(map(str, lengths)),
        str(manifest.num_windows(2)),
        f"{manifest.grid[0]}x{manifest.grid[1]}",
        f"{len(manifest.state_channels)}{constants}",
        str(len(manifest.shards)),
        f"{num_bytes / 1e6:.1f}",
        *("-".join(dict.fromkeys(sides)).lower() for sides in manifest.boundary),
        manifest.stats_source,
        manifest.dtype,
        count_severities(manifest.findings),
        str(manifest.num_skipped_windows(2)),
        f"{shares.get(manifest.dataset, 0):.3f}" if manifest.split == "train" else "",
    ]


DATASETS = (  # the paper's eight, in the order of its tables; cards beyond them do not belong in these tables
    "active_matter",
    "gray_scott_reaction_diffusion",
    "rayleigh_benard",
    "shear_flow",
    "turbulent_radiative_layer_2D",
    "viscoelastic_instability",
    "acoustic_scattering_maze",
    "helmholtz_staircase",
)
TEMPERATURE = 0.2
SCHEMES = {"proportional": "prop", "uniform": "uniform", "temperature": f"temp {TEMPERATURE}", "sqrt": "sqrt"}
PAPER_NOTE = (
    "Source: WaveLiT paper (arXiv:2605.25949), Appendix F; computed from the cards. The text at hand had lost what is\n"
    "marked as inferred, and the temperature. All else is as printed there."
)


def paper_tables(registry: Registry) -> str:
    """Return Tables 7, 8 and 9 as Markdown text. UserError if the registry lacks one of the eight datasets.

    Table 7: training examples (pairs of neighboring frames), tokens per example and in all. Table 8: the share of each
    dataset under four sampling schemes, and how far each scheme is from proportional sampling. Table 9: that share over
    the proportional one.
    """
    cards = [registry.card(name) for name in DATASETS]
    sources = [Source(card.name, card.windows, card.tokens, (card.windows,)) for card in cards]
    shares = {scheme: sampling_shares(sources, scheme, TEMPERATURE) for scheme in SCHEMES}
    parts = ["Table 7. Training data", _table7(cards), "Table 8. Sampling shares", _table8(cards, shares)]
    return "\n\n".join([*parts, "Table 9. Share over proportional share", _table9(cards, shares), PAPER_NOTE]) + "\n"


def _table7(cards: Sequence[Card]) -> str:
    totals = [card.windows * card.tokens for card in cards]
    rows = [
        [card.name, card.abbreviation, f"{card.windows:,}", f"{card.tokens:,}", f"{total:,}"]
        for card, total in zip(cards, totals, strict=True)
    ]
    rows.append(["total", "", f"{sum(card.windows for card in cards):,}", "", f"{sum(totals):,}"])
    return markdown(
        ["dataset", "", "examples", "tokens / example", "total tokens (inferred)"], rows, num_text_columns=2
    )


def _table8(cards: Sequence[Card], shares: Mapping[str, Mapping[str, float]]) -> str:
    head, rows = ["dataset", "", *SCHEMES.values()], []
    for card in cards:
        rows.append([card.name, card.abbreviation, *(f"{shares[scheme][card.name]:.4f}" for scheme in SCHEMES)])
    divergence = [_divergence(shares[scheme], shares["proportional"]) for scheme in SCHEMES]
    rows.append(["KL(q, prop) in nats", "", *(f"{value:.4f}" for value in divergence)])
    return markdown(head, rows, num_text_columns=2)


def _table9(cards: Sequence[Card], shares: Mapping[str, Mapping[str, float]]) -> str:
    usual, rows = shares["proportional"], []
    for card in cards:
        ratios = [shares[scheme][card.name] / usual[card.name] for scheme in SCHEMES]
        rows.append([card.name, card.abbreviation, *(f"{ratio:.2f}" for ratio in ratios)])
    return markdown(["dataset", "", *(f"{name} (inferred)" for name in SCHEMES.values())], rows, num_text_columns=2)


def _divergence(q: Mapping[str, float], p: Mapping[str, float]) -> float:
    """Return the Kullback-Leibler divergence KL(q || p) in nats."""
    return sum(share * math.log(share / p[name]) for name, share in q.items())
