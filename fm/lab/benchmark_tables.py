"""A benchmark as people read it: what it ran on, a line for each variant, a table for each, sentences.

A benchmark on the console and in files.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from textwrap import fill

from data_pipeline.files import UserError, atomic_file
from data_pipeline.tables import DASH, markdown
from fm.lab.benchmark import KINDS, MIXTURE, Benchmark, Row, feed_text
from fm.lab.plan_tables import PAPER_BATCH, PAPER_HOURS, PAPER_STEPS, WIDTH, digits

HEAD = ("dataset", "fwd", "bwd", "opt", "data", "step", "±%", "ktok/s", "{}FLOP/s", "%", "GB/s", "%", "GB", "floor")
UNITS = {"T": 1e12, "G": 1e9}
MEANING = (
    "Milliseconds: forward, backward, optimizer (clip, AdamW, averaged weights), data (copy to the device), the whole "
    "step; ±%: half the distance of its quartiles. FLOP/s of matrix products and convolutions, GB/s of all other "
    "operations as if none were fused, each with its share of the ceiling. GB: peak memory of the GPU. Mixture: "
    "expected at the recipe's sampling shares."
)
FLOOR = (
    "The floor, in milliseconds: each matrix product and convolution of both passes takes the longer of its arithmetic "
    "and of reading and writing its tensors once, at the ceilings; all else in the passes is free, as if fused; the "
    "optimizer takes what it reads and writes. Attention's products are float32 whatever the precision. Traffic: the "
    "share that memory bandwidth bounds, not arithmetic. Unfused: what all but linear layers and attention's products "
    "would take at the bandwidth, each reading and writing by itself."
)


def benchmark_text(found: Benchmark) -> str:
    """The whole benchmark as Markdown that ends in a newline, at most 120 columns wide."""
    variants = list(dict.fromkeys(row.variant for row in found.rows))
    measured = [row for row in found.rows if row.seconds is not None]
    first = [row for row in found.rows if row.variant == variants[0]]  # of which the floor is shown
    parts = [
        _about(found),
        _summary([row for row in found.rows if row.dataset == MIXTURE]) if first else "",
        *(_variant(found, variant) for variant in variants if any(row.variant == variant for row in measured)),
        _wrapped(MEANING) if measured else "",
        _floor(first, found.ceilings.bandwidth) if first else "",
        feed_text(found.feeding, found.pace) if found.feeding else "",
        "\n".join(f"- profile: {file}" for file in found.profiles),
        "\n".join(_wrapped(f"- warning: {warning}", "  ") for warning in found.warnings()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def floor_table(rows: Sequence[Row], bandwidth: float) -> str:
    """What each dataset's floor is made of, for rows of one variant; bandwidth in bytes/s."""
    unit = _unit([row.work.flops for row in rows])
    parts = [*KINDS, "opt", "floor", "traffic %", "unfused"]
    return markdown(["dataset", "grid", f"{unit}FLOP", *parts], [_floor_cells(row, unit, bandwidth) for row in rows])


def _floor(rows: Sequence[Row], bandwidth: float) -> str:
    return f"The floor of {rows[0].variant}\n\n{floor_table(rows, bandwidth)}\n\n{_wrapped(FLOOR)}"


def _floor_cells(row: Row, unit: str, bandwidth: float) -> list[str]:
    least = row.work.floor
    parts = [digits(1e3 * getattr(least, name)) for name in (*KINDS, "optimizer", "seconds")]
    grid = f"{row.grid[0]} x {row.grid[1]}" if row.grid else ""
    unfused = 1e3 * row.work.moved_bytes / bandwidth
    traffic = f"{100 * least.traffic / least.seconds:.0f}"
    return [row.dataset, grid, digits(row.work.flops / UNITS[unit]), *parts, traffic, digits(unfused)]


def _about(found: Benchmark) -> str:
    rates, machine = found.ceilings.flops, found.machine
    unit = _unit(rates.values())
    products = ", ".join(f"{digits(rate / UNITS[unit])} {unit}FLOP/s {name}" for name, rate in rates.items())
    lines = [
        f"{found.recipe}, {found.size} grids, {found.parameters:,} parameters",
        f"on {machine['device']}, torch {machine['torch']}, load {machine['load']:.1f}" if "torch" in machine else "",
        f"ceilings, {found.ceilings.of}: {products}, {digits(found.ceilings.bandwidth / 1e9)} GB/s",
    ]
    return "\n".join(f"- {line}" for line in lines if line)


def _summary(rows: Sequence[Row]) -> str:
    """The mixture under each variant, and why some were not measured."""
    head = ["mixture", "windows", "step ms", "±%", "windows/s", "floor ms", "h for 1M steps"]
    pace = 3600e3 * PAPER_HOURS / PAPER_STEPS
    paper = [f"{PAPER_BATCH}", digits(pace), DASH, digits(1e3 * PAPER_BATCH / pace), DASH, f"{PAPER_HOURS}"]
    table = markdown(head, [*map(_mixture_cells, rows), ["the paper, full grids, B200", *paper]])
    reasons = [_wrapped(f"- {row.variant}: {row.reason}", "  ") for row in rows if row.reason]
    return "\n".join([table, *(["", *reasons] if reasons else [])])


def _mixture_cells(row: Row) -> list[str]:
    name, least = [row.variant, f"{row.work.windows:g}"], digits(1e3 * row.work.floor.seconds)
    if row.seconds is None:
        return [*name, DASH, DASH, DASH, least, DASH]
    step = row.seconds.whole
    noise, speed = f"{100 * row.spread:.0f}", digits(row.work.windows / step)
    return [*name, digits(1e3 * step), noise, speed, least, _cell(row.hours())]


def _variant(found: Benchmark, variant: str) -> str:
    rows = [row for row in found.rows if row.variant == variant]
    unit = _unit([row.flops_per_s() or 0.0 for row in rows])
    head = [name.format(unit) for name in HEAD]
    return f"{variant}\n\n{markdown(head, [_cells(found, row, unit) for row in rows])}"


def _cells(found: Benchmark, row: Row, unit: str) -> list[str]:
    if row.seconds is None:
        return [row.dataset, *[DASH] * (len(HEAD) - 2), digits(1e3 * row.work.floor.seconds)]
    seconds, rates = row.seconds, found.ceilings
    phases = (seconds.forward, seconds.backward, seconds.optimizer, seconds.data, seconds.whole)
    flops, moved = row.flops_per_s() or 0.0, row.bytes_per_s() or 0.0
    return [
        row.dataset,
        *map(_milliseconds, phases),
        f"{100 * row.spread:.0f}",
        _cell((row.tokens_per_s() or 0.0) / 1e3),
        _short(flops / UNITS[unit]),
        f"{100 * flops / rates.flops[row.dtype]:.0f}",
        _short(moved / 1e9),
        f"{100 * moved / rates.bandwidth:.0f}",
        _cell(row.memory / 1e9 if row.memory else None),
        _milliseconds(row.work.floor.seconds),
    ]


def _unit(values: Collection[float]) -> str:
    """The prefix of FLOP that suits the largest."""
    return "T" if max(values) >= UNITS["T"] else "G"


def _milliseconds(seconds: float) -> str:
    return _short(1e3 * seconds)


def _short(value: float) -> str:
    """Three digits, but not more than two decimals."""
    return digits(value) if value >= 1 else f"{value:.2f}"


def _cell(value: float | None) -> str:
    return DASH if value is None else digits(value)


def _wrapped(text: str, indent: str = "") -> str:
    return fill(text, WIDTH, subsequent_indent=indent)


def check_targets(json_file: Path | None, markdown_file: Path | None, profiles: Path | None) -> None:
    """Make the folder of profiles. UserError, before minutes are spent, where that of a file is missing."""
    for option, file in (("--json", json_file), ("--markdown", markdown_file)):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{option}: no folder {file.parent}; make it first")
    try:
        if profiles is not None:
            profiles.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--profile: cannot make the folder {profiles}: {error.strerror}") from error


def write(found: Benchmark, json_file: Path | None, markdown_file: Path | None) -> None:
    """Print the tables, and write them and every number where that is asked for."""
    text = benchmark_text(found)
    print(text, end="")
    for option, file, content in (
        ("--json", json_file, json.dumps(found.to_json(), indent=1) + "\n"),
        ("--markdown", markdown_file, text),
    ):
        if file is None:
            continue
        try:
            with atomic_file(file, durable=False) as out:
                out.write(content.encode())
        except OSError as error:
            raise UserError(f"{option}: cannot write {file}: {error.strerror}") from error
