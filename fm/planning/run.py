"""`fm plan`: a recipe in, its plan printed, and written as JSON where that is asked for."""

import json
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_file
from fm.planning.exchange import INFINIBAND
from fm.planning.gpus import Ceiling, find_gpu
from fm.planning.plan import Plan
from fm.planning.planner import Planner, local_bf16
from fm.planning.tables import plan_text
from fm.planning.workload import read_workload
from fm.recipe_file import load_recipe


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
