"""A plan as people read it: two tables, then sentences.

`fm plan`: a recipe in, its plan printed, and written as JSON where that is asked for.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from data_pipeline.files import UserError, atomic_file
from data_pipeline.tables import markdown
from fm.config import load_recipe
from fm.lab.hardware import HOP_SECONDS, INFINIBAND, LAUNCH_SECONDS, NODE, Ceiling, find_gpu
from fm.lab.plan import USABLE, DatasetPlan, Plan, Planner, local_bf16, read_workload

WIDTH = 110
PREFIXES = {1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"}
# WaveLiT paper, section 4: its joint model, in JAX
PAPER_HOURS, PAPER_STEPS, PAPER_BATCH, PAPER_PARAMETERS, PAPER_DATASETS = 41.0, 1_000_000, 4, 10.0e6, 8


def plan_text(plan: Plan) -> str:
    """The whole plan as text of at most 120 columns, ending in a newline."""
    parts = [
        f"{plan.run}: {plan.steps:,} steps of {plan.global_batch} windows on {_processes(plan.processes)}",
        "\n".join(f"note: {note}" for note in plan.notes),
        "A step that draws only this dataset (mixture: at the shares), all processes together",
        _work_table(plan),
        f"On {plan.machine}; memory is that of one process",
        _machine_table(plan),
        "\n".join(fill(sentence, WIDTH, subsequent_indent="  ") for sentence in _sentences(plan)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def digits(value: float, count: int = 3) -> str:
    """A number of at least 0 with so many significant digits and no exponent."""
    rounded = float(f"{value:.{count}g}")
    return f"{rounded:,.0f}" if rounded >= 10 ** (count - 1) else f"{rounded:#.{count}g}"


def _work_table(plan: Plan) -> str:
    parts = list(plan.datasets.values())
    total = sum(one.windows for one in parts)
    passes = plan.steps * plan.global_batch / total
    columns = [
        ["grid", *(f"{one.grid[0]} x {one.grid[1]}" for one in parts), ""],
        ["windows", *(f"{one.windows:,}" for one in parts), f"{total:,}"],
        ["share %", *(f"{100 * one.share:.1f}" for one in parts), "100"],
        ["draws", *(f"{one.draws:,}" for one in parts), f"{sum(one.draws for one in parts):,}"],
        ["passes", *(digits(one.passes) for one in parts), digits(passes)],
        _scaled("tokens", [*(one.tokens for one in parts), plan.mean("tokens")]),
        _scaled("FLOP", [*(one.flops for one in parts), plan.mean("flops")]),
        _scaled("B read", [*(one.read_bytes for one in parts), plan.mean("read_bytes")]),
    ]
    return _table(plan, columns)


def _machine_table(plan: Plan) -> str:
    parts, count = list(plan.datasets.values()), _digits_known(plan)
    mean = plan.mean("seconds")
    rest = plan.state_bytes + plan.input_bytes
    unit, size = ("s", 1.0) if mean >= 10 else ("ms", 1e-3)
    held = [one.activation_bytes for one in parts]
    columns = [
        [
            f"{unit}/step",
            *(_marked(one, digits(one.seconds / size, count)) for one in parts),
            digits(mean / size, count),
        ],
        ["windows/s", *(digits(plan.global_batch / one.seconds, count) for one in parts)],
        _scaled("FLOP/s", [*(one.flops / one.seconds for one in parts), plan.mean("flops") / mean], count),
        ["GB activations", *(digits(one / 1e9) for one in held), digits(max(held) / 1e9)],
        ["GB in all", *(digits((one + rest) / 1e9) for one in held), digits(plan.needed_bytes / 1e9)],
        ["own parameters", *(f"{one.own_parameters:,}" for one in parts), f"{plan.parameters:,} in all"],
    ]
    columns[1].append(digits(plan.global_batch / mean, count))
    return _table(plan, columns)


def _table(plan: Plan, columns: Sequence[Sequence[str]]) -> str:
    """Columns, each with its header, beside the names of datasets."""
    rows = zip(["dataset", *plan.datasets, "mixture"], *columns, strict=True)
    head, *body = [list(row) for row in rows]
    return markdown(head, body)


def _scaled(unit: str, values: Sequence[float], count: int = 3) -> list[str]:
    """A column in the unit with the prefix that suits its largest value."""
    scale, prefix = next(((size, name) for size, name in PREFIXES.items() if max(values) >= size), (1.0, ""))
    return [f"{prefix}{unit}" if unit[0].isupper() or not prefix else f"{prefix} {unit}"] + [
        digits(value / scale, count) for value in values
    ]


def _marked(one: DatasetPlan, text: str) -> str:
    return f"~{text}" if one.extrapolated else text


def _digits_known(plan: Plan) -> int:
    """Of times: a ceiling or an extrapolation does not know more than two."""
    rough = plan.utilisation is not None or any(one.extrapolated for one in plan.datasets.values())
    return 2 if rough else 3


def _sentences(plan: Plan) -> list[str]:
    mean, count = plan.mean("seconds"), _digits_known(plan)
    lines = [
        f"- time: {_duration(plan.seconds, count)}, of which training {_duration(plan.training_seconds, count)}, at "
        f"{digits(1 / mean, count)} steps/s",
        f"- reading: {digits(plan.mean('read_bytes') / mean / 1e6, count)} MB/s, "
        f"{digits(plan.global_batch / mean, count)} windows/s, all processes together",
        f"- validation: {plan.validations} of {_duration(plan.validation_seconds, count)} on one process (the model "
        "calls alone)"
        if plan.validations
        else "- validation: none",
        f"- checkpoints: {plan.checkpoints} of {digits(plan.checkpoint_bytes / 1e6)} MB stay on disk; "
        "written while training goes on",
        f"- memory: {_memory(plan)}",
        *_exchange(plan),
        *_assumptions(plan),
        _reference(plan),
    ]
    return lines


def _memory(plan: Plan) -> str:
    state = digits(plan.state_bytes / 1e9)
    needed = f"{digits(plan.needed_bytes / 1e9)} GB with {plan.micro_batch} windows at once"
    needed += f", {state} GB of it weights, gradients, moments and averages, beside what libraries take"
    if plan.fits:
        return f"{needed}; fits in {digits(plan.memory_bytes / 1e9)} GB"
    if plan.fitting_micro_batch:
        way = f"set train.micro_batch={plan.fitting_micro_batch}"
    else:
        way = "not even one window fits: a smaller model, or a larger machine"
    if plan.checkpointing_helps:
        way = (
            f"set finetune.checkpoint_activations=true, or {way}"
            if plan.fitting_micro_batch
            else ("set finetune.checkpoint_activations=true and plan again")
        )
    return f"{needed}; DOES NOT FIT in {USABLE:.0%} of {digits(plan.memory_bytes / 1e9)} GB: {way}"


def _exchange(plan: Plan) -> list[str]:
    if plan.exchange is None:
        return []
    one = plan.exchange
    return [
        f"- exchange of gradients: {digits(one.bytes / 1e6)} MB a step in {digits(1e3 * one.seconds, 2)} ms, of which "
        f"the backward pass leaves {digits(1e3 * plan.mean('exchange_seconds'), 2)} ms, counted above; assumed, for "
        f"each GPU: {one.link:g} GB/s within nodes of {NODE}, {one.network:g} GB/s between them (--network), "
        f"{1e6 * HOP_SECONDS:.0f} us a hop"
    ]


def _assumptions(plan: Plan) -> list[str]:
    lines = []
    if plan.utilisation is not None:
        lines.append(
            f"- assumed, not known: matrix products reach {plan.utilisation:.0%} of the peak (--utilisation), other "
            f"operations run unfused at the memory's bandwidth, kernels start at least "
            f"{1e6 * LAUNCH_SECONDS:.0f} us apart"
        )
    if any(one.extrapolated for one in plan.datasets.values()):
        lines.append(
            "- ~: too large for the probe; two smaller steps were measured, and a line in FLOPs drawn through them"
        )
    if plan.processes > 1 and plan.exchange is None:
        lines.append("- not counted: the exchange of gradients; each process is taken to have a device of its own")
    return lines


def _reference(plan: Plan) -> str:
    """What the paper's own run took, and if this is that run, however long, what its steps would take at that pace."""
    pace = 3600 * PAPER_HOURS / PAPER_STEPS
    line = (
        f"- the paper: {PAPER_HOURS} h on one B200 for 1M steps of batch 4 with 10M parameters in JAX, "
        f"{1e3 * pace:.0f} ms a step"
    )
    same = (
        plan.published
        and len(plan.datasets) == PAPER_DATASETS
        and plan.global_batch == PAPER_BATCH
        and abs(plan.parameters / PAPER_PARAMETERS - 1) < 0.02
    )
    if not same:
        return line
    return f"{line}; at that pace these {plan.steps:,} steps take {_duration(pace * plan.steps, 3)}"


def _processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"


def _duration(seconds: float, count: int) -> str:
    for size, unit in ((48 * 3600.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{digits(seconds / (86400.0 if unit == 'days' else size), count)} {unit}"
    return f"{digits(seconds, count)} s"


def plan_run(
    recipe: Path,
    overrides: Sequence[str],
    speed: float | tuple[str, float],
    processes: int = 1,
    require_shards: bool = False,
    file: Path | None = None,
    network: float = INFINIBAND,
) -> Plan:
    """Print a recipe's plan and return it.

    `speed` is how many seconds to measure on this machine, or a GPU's name and the utilisation assumed of it, of which
    each exchanges gradients with other nodes at `network` GB/s; the plan is also written to `file` as JSON. UserError
    for a broken recipe, an unknown GPU, shards that are required and not there, or a global batch that the processes
    cannot share.
    """
    if isinstance(speed, tuple):
        find_gpu(speed[0])  # before the counting, which takes seconds
    resolved = load_recipe(recipe, overrides)
    workload = read_workload(resolved, require_shards)
    if isinstance(speed, tuple):
        bf16 = resolved.train.precision != "float32"
        ceiling = Ceiling(find_gpu(speed[0]), speed[1], bf16)
        plan = Planner(workload, processes, bf16).ceiling(ceiling, network)
    else:
        plan = Planner(workload, processes, local_bf16(resolved)).probe(speed)
    print(plan_text(plan), end="")
    if file is not None:
        _write(plan, file)
    return plan


def _write(plan: Plan, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file, durable=False) as out:
            out.write((json.dumps(plan.to_json(), indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"--json: cannot write {file}: {error.strerror}") from error
