"""The text of a plan: a table of work, a table of times and memory, then sentences."""

from collections.abc import Sequence
from textwrap import fill

from data_pipeline.tables import digits, markdown
from fm.lab.hardware import HOP_SECONDS, LAUNCH_SECONDS, NODE
from fm.lab.plan import USABLE, Plan
from fm.lab.workload import PAPER_BATCH, PAPER_HOURS, PAPER_PARAMETERS, PAPER_STEPS

WIDTH = 110
PREFIXES = {1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"}


def plan_text(plan: Plan) -> str:
    """Return the plan as text of at most 120 columns, which ends in a newline."""
    processes = "one process" if plan.processes == 1 else f"{plan.processes} processes"
    parts = [
        f"{plan.run}: {plan.steps:,} steps of {plan.global_batch} windows on {processes}",
        "\n".join(f"note: {note}" for note in plan.notes),
        "A step that draws only this dataset (mixture: at the shares), all processes together",
        _work_table(plan),
        f"On {plan.machine}; memory is that of one process",
        _machine_table(plan),
        "\n".join(fill(f"- {sentence}", WIDTH, subsequent_indent="  ") for sentence in _sentences(plan)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _work_table(plan: Plan) -> str:
    datasets, windows = plan.datasets.values(), sum(dataset.windows for dataset in plan.datasets.values())
    columns = [
        ["dataset", *plan.datasets, "mixture"],
        ["grid", *(f"{dataset.grid[0]} x {dataset.grid[1]}" for dataset in datasets), ""],
        ["windows", *(f"{dataset.windows:,}" for dataset in datasets), f"{windows:,}"],
        ["share %", *(f"{100 * dataset.share:.1f}" for dataset in datasets), "100"],
        ["draws", *(f"{dataset.draws:,}" for dataset in datasets), f"{sum(dataset.draws for dataset in datasets):,}"],
        ["passes", *(digits(dataset.passes) for dataset in datasets), digits(plan.steps * plan.global_batch / windows)],
        _scaled("tokens", plan.with_mean("tokens")),
        _scaled("FLOP", plan.with_mean("flops")),
        _scaled("B read", plan.with_mean("read_bytes")),
    ]
    return _table(columns)


def _machine_table(plan: Plan) -> str:
    datasets, count = plan.datasets.values(), _digits_known(plan)
    seconds, flops = plan.with_mean("seconds"), plan.with_mean("flops")
    marks = [*("~" if dataset.extrapolated else "" for dataset in datasets), ""]
    activations = [dataset.activation_bytes for dataset in datasets]
    activations.append(max(activations))
    unit, size = ("s", 1.0) if seconds[-1] >= 10 else ("ms", 1e-3)
    columns = [
        ["dataset", *plan.datasets, "mixture"],
        [f"{unit}/step", *(mark + digits(one / size, count) for mark, one in zip(marks, seconds, strict=True))],
        ["windows/s", *(digits(plan.global_batch / one, count) for one in seconds)],
        _scaled("FLOP/s", [one / time for one, time in zip(flops, seconds, strict=True)], count),
        ["GB activations", *(digits(one / 1e9) for one in activations)],
        ["GB in all", *(digits((one + plan.state_bytes + plan.input_bytes) / 1e9) for one in activations)],
        ["own parameters", *(f"{dataset.own_parameters:,}" for dataset in datasets), f"{plan.parameters:,} in all"],
    ]
    return _table(columns)


def _table(columns: Sequence[Sequence[str]]) -> str:
    head, *rows = zip(*columns, strict=True)
    return markdown(head, rows)


def _scaled(unit: str, values: Sequence[float], count: int = 3) -> list[str]:
    """Return a column in the unit with the prefix that suits its largest value."""
    scale, prefix = next(((size, name) for size, name in PREFIXES.items() if max(values) >= size), (1.0, ""))
    space = "" if unit[0].isupper() or not prefix else " "
    return [f"{prefix}{space}{unit}", *(digits(value / scale, count) for value in values)]


def _digits_known(plan: Plan) -> int:
    """Return the significant digits of times: an estimate or an extrapolation has two."""
    rough = plan.utilisation is not None or any(dataset.extrapolated for dataset in plan.datasets.values())
    return 2 if rough else 3


def _sentences(plan: Plan) -> list[str]:
    mean, count = plan.mean("seconds"), _digits_known(plan)
    lines = [
        f"time: {_duration(plan.seconds, count)}, of which training {_duration(plan.training_seconds, count)}, at "
        f"{digits(1 / mean, count)} steps/s",
        f"reading: {digits(plan.mean('read_bytes') / mean / 1e6, count)} MB/s, "
        f"{digits(plan.global_batch / mean, count)} windows/s, all processes together",
        f"validation: {plan.validations} of {_duration(plan.validation_seconds, count)} on one process (the model "
        "calls alone)"
        if plan.validations
        else "validation: none",
        f"checkpoint: {digits(plan.checkpoint_bytes / 1e6)} MB on disk, written while training goes on",
        f"memory: {_memory(plan)}",
    ]
    if plan.exchange is not None:
        sent = plan.exchange
        lines.append(
            f"exchange of gradients: {digits(sent.bytes / 1e6)} MB a step in {digits(1e3 * sent.seconds, 2)} ms, of "
            f"which the backward pass leaves {digits(1e3 * plan.mean('exchange_seconds'), 2)} ms, counted above; "
            f"assumed, for each GPU: {sent.link:g} GB/s within nodes of {NODE}, {sent.network:g} GB/s between them "
            f"(--network), {1e6 * HOP_SECONDS:.0f} us a hop"
        )
    if plan.utilisation is not None:
        lines.append(
            f"assumed, not measured: matrix products reach {plan.utilisation:.0%} of the peak (--utilisation), other "
            f"operations run unfused at the memory's bandwidth, kernels start at least "
            f"{1e6 * LAUNCH_SECONDS:.0f} us apart"
        )
    if any(dataset.extrapolated for dataset in plan.datasets.values()):
        lines.append("~: too large for a dry run; two smaller steps were measured, and a line in FLOPs extrapolated")
    if plan.processes > 1 and plan.exchange is None:
        lines.append("not counted: the exchange of gradients; each process is assumed to have a device of its own")
    pace = 3600 * PAPER_HOURS / PAPER_STEPS
    paper = (
        f"the paper: {PAPER_HOURS} h on one B200 for 1M steps of batch {PAPER_BATCH} with 10M parameters in JAX, "
        f"{1e3 * pace:.0f} ms a step"
    )
    as_large = 0.9 < plan.parameters / PAPER_PARAMETERS < 1.1
    if plan.published and plan.global_batch == PAPER_BATCH and as_large:
        paper += f"; at that pace these {plan.steps:,} steps take {_duration(pace * plan.steps, 3)}"
    return [*lines, paper]


def _memory(plan: Plan) -> str:
    needed = (
        f"{digits(plan.needed_bytes / 1e9)} GB with {plan.micro_batch} windows at once, "
        f"{digits(plan.state_bytes / 1e9)} GB of it weights, gradients, moments and averages, beside what libraries "
        "take"
    )
    if plan.fits:
        return f"{needed}; fits in {digits(plan.memory_bytes / 1e9)} GB"
    way = f"set train.micro_batch={plan.fitting_micro_batch}"
    if not plan.fitting_micro_batch:
        way = "not even one window fits: checkpoint activations (finetuning), a smaller model, or a larger machine"
    return f"{needed}; DOES NOT FIT in {USABLE:.0%} of {digits(plan.memory_bytes / 1e9)} GB: {way}"


def _duration(seconds: float, count: int) -> str:
    for least, unit, size in ((48 * 3600, "days", 86400), (3600, "h", 3600), (60, "min", 60)):
        if seconds >= least:
            return f"{digits(seconds / size, count)} {unit}"
    return f"{digits(seconds, count)} s"
