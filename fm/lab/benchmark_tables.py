"""The text of a benchmark: the machine, a line for each variant, a table for each variant, the least times, notes."""

from collections.abc import Collection, Sequence
from textwrap import fill

from data_pipeline.tables import DASH, digits, markdown
from fm.lab.benchmark import MIXTURE, Benchmark, Row
from fm.lab.data_wait import data_wait_text
from fm.lab.hardware import PARTS
from fm.lab.plan_tables import WIDTH
from fm.lab.workload import PAPER_BATCH, PAPER_HOURS, PAPER_STEPS

HEAD = ("dataset", "fwd", "bwd", "opt", "data", "step", "±%", "ktok/s", "{}FLOP/s", "%", "GB/s", "%", "GB", "floor")
UNITS = {"T": 1e12, "G": 1e9}
MEANING = (
    "Milliseconds: forward, backward, optimizer (clip, update, averaged weights), data (copy to the device, "
    "symmetries), the whole step; ±%: half the distance of its quartiles. FLOP/s of matrix products and convolutions, "
    "GB/s of all other operations as if none were fused, each with its share of the ceiling. GB: peak memory of the "
    "GPU. Mixture: expected at the recipe's sampling shares."
)
FLOOR = (
    "The floor, in milliseconds: each matrix product and convolution of both passes takes the longer of its arithmetic "
    "and of reading and writing its tensors once, at the ceilings; all else in the passes is free, as if fused; the "
    "optimizer takes what it reads and writes. Attention's products are float32 whatever the precision. Traffic: the "
    "share that memory bandwidth bounds, not arithmetic. Unfused: what all but linear layers and attention's products "
    "would take at the bandwidth, each reading and writing by itself."
)


def benchmark_text(found: Benchmark) -> str:
    """Return the benchmark as Markdown of at most 120 columns, which ends in a newline."""
    variants: dict[str, list[Row]] = {}
    for row in found.rows:
        variants.setdefault(row.variant, []).append(row)
    measured = {name: rows for name, rows in variants.items() if any(row.step_ms is not None for row in rows)}
    parts = [_about(found)]
    if variants:
        parts.append(_summary([row for row in found.rows if row.dataset == MIXTURE]))
    parts += [f"{name}\n\n{_variant_table(rows)}" for name, rows in measured.items()]
    if measured:
        parts.append(fill(MEANING, WIDTH))
    if variants:
        name, rows = next(iter(variants.items()))
        parts.append(f"The floor of {name}\n\n{floor_table(rows, found.ceilings.bandwidth)}\n\n{fill(FLOOR, WIDTH)}")
    if found.feeding:
        parts.append(data_wait_text(found.feeding, found.pace))
    parts.append("\n".join(f"- profile: {file}" for file in found.profiles))
    parts.append(_list([f"warning: {warning}" for warning in found.warnings()]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(found: Benchmark) -> str:
    rates, machine = found.ceilings.flops, found.machine
    unit = _unit(rates.values())
    products = ", ".join(f"{digits(rate / UNITS[unit])} {unit}FLOP/s {name}" for name, rate in rates.items())
    lines = [
        f"- {found.recipe}, {found.size} grids, {found.parameters:,} parameters",
        f"- ceilings, {found.ceilings.of}: {products}, {digits(found.ceilings.bandwidth / 1e9)} GB/s",
    ]
    if "torch" in machine:
        lines.insert(1, f"- on {machine['device']}, torch {machine['torch']}, load {machine['load']:.1f}")
    return "\n".join(lines)


def _summary(mixtures: Sequence[Row]) -> str:
    """Return a table of each variant's mixture beside the paper's run, and why some were not measured."""
    head = ["mixture", "windows", "step ms", "±%", "windows/s", "floor ms", "h for 1M steps"]
    rows = []
    for row in mixtures:
        times = [DASH, DASH, DASH]
        if row.step_ms is not None:
            times = [digits(row.step_ms), f"{row.noise_percent:.0f}", digits(1e3 * row.windows / row.step_ms)]
        hours = _digits_or_dash(row.hours_per_million_steps)
        rows.append([row.variant, f"{row.windows:g}", *times, digits(row.floor_ms), hours])
    pace = 3600e3 * PAPER_HOURS / PAPER_STEPS  # milliseconds of a step
    paper = [str(PAPER_BATCH), digits(pace), DASH, digits(1e3 * PAPER_BATCH / pace), DASH, str(PAPER_HOURS)]
    table = markdown(head, [*rows, ["the paper, full grids, B200", *paper]])
    reasons = _list([f"{row.variant}: {row.reason}" for row in mixtures if row.reason])
    return f"{table}\n\n{reasons}" if reasons else table


def _variant_table(rows: Sequence[Row]) -> str:
    unit = _unit([1e12 * (row.tflops_per_s or 0.0) for row in rows])
    body = []
    for row in rows:
        cells = [DASH] * (len(HEAD) - 2)
        if row.step_ms is not None:
            phases = (row.forward_ms, row.backward_ms, row.optimizer_ms, row.data_ms, row.step_ms)
            cells = [
                *map(_short, phases),
                f"{row.noise_percent:.0f}",
                digits((row.tokens_per_s or 0.0) / 1e3),
                _short((row.tflops_per_s or 0.0) * 1e12 / UNITS[unit]),
                f"{100 * (row.share_of_flops_ceiling or 0.0):.0f}",
                _short(row.gb_per_s),
                f"{100 * (row.share_of_bandwidth_ceiling or 0.0):.0f}",
                _digits_or_dash(row.peak_memory_gb),
            ]
        body.append([row.dataset, *cells, _short(row.floor_ms)])
    return markdown([name.format(unit) for name in HEAD], body)


def floor_table(rows: Sequence[Row], bandwidth: float) -> str:
    """Return the parts of each dataset's least time, for rows of one variant; bandwidth in bytes/s."""
    unit = _unit([row.flops for row in rows])
    body = []
    for row in rows:
        grid = f"{row.grid[0]} x {row.grid[1]}" if row.grid else ""
        parts = [digits(milliseconds) for milliseconds in (*(row.floor_parts_ms[part] for part in PARTS), row.floor_ms)]
        traffic = f"{100 * row.floor_parts_ms['traffic'] / row.floor_ms:.0f}"
        unfused = digits(1e3 * row.moved_bytes / bandwidth)
        body.append([row.dataset, grid, digits(row.flops / UNITS[unit]), *parts, traffic, unfused])
    return markdown(["dataset", "grid", f"{unit}FLOP", *PARTS[:-1], "opt", "floor", "traffic %", "unfused"], body)


def _unit(flops: Collection[float]) -> str:
    """Return the prefix of FLOP that suits the largest."""
    return "T" if max(flops) >= UNITS["T"] else "G"


def _short(value: float | None) -> str:
    """Return a number with three digits, but at most two decimals."""
    if value is None:
        return DASH
    return digits(value) if value >= 1 else f"{value:.2f}"


def _digits_or_dash(value: float | None) -> str:
    return DASH if value is None else digits(value)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(fill(f"- {line}", WIDTH, subsequent_indent="  ") for line in lines)
