"""Where a step's time goes: torch's profiler over a few steps, as a Chrome trace and a table of the top kernels."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from data_pipeline.errors import UserError
from fm.benchmark.trial import WARM_UP
from fm.planning.tables import digits
from fm.planning.workload import Workload
from fm.scores.formats import markdown
from fm.settings import Recipe
from fm.training.exercise import Exercise, exercise_state

STEPS = 3
ROWS = 25
NAME_WIDTH = 70


def profile_step(
    name: str, recipe: Recipe, workload: Workload, dataset: str, accelerator: Accelerator, folder: Path
) -> Path:
    """Profile a dataset's step; writes <name>-<dataset>.json, for chrome://tracing or Perfetto, and .md beside it.

    Returns the table's path. UserError where the folder cannot be written.
    """
    on_gpu = accelerator.device.type == "cuda"
    state, work = exercise_state(recipe, workload.model(), accelerator), workload.datasets[dataset]
    exercise = Exercise(recipe, work.spec, work.grid, accelerator)
    for _ in range(WARM_UP[accelerator.device.type]):
        exercise.step(state).read()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as found:
        for _ in range(STEPS):
            exercise.step(state)
        if on_gpu:
            torch.cuda.synchronize()
    table = folder / f"{name}-{dataset}.md"
    title = f"{name}, {dataset}, {work.grid[0]} x {work.grid[1]}, {recipe.train.global_batch} windows a step"
    try:
        found.export_chrome_trace(str(table.with_suffix(".json")))
        table.write_text(f"{title}\n\n{_kernels(found, on_gpu)}\n")
    except (OSError, RuntimeError) as error:
        raise UserError(f"--profile: cannot write into {folder}: {error}") from error
    return table


def _kernels(found: profile, on_gpu: bool) -> str:
    """The kernels, on a CPU the operators, with the most time of their own."""
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    times = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in found.key_averages()
        if event.device_type == kind
    }
    total = sum(spent for spent, _ in times.values())
    top = sorted(times.items(), key=lambda item: -item[1][0])[:ROWS]
    body = [
        [key[:NAME_WIDTH], f"{count / STEPS:g}", digits(spent / STEPS / 1e3), f"{100 * spent / total:.1f}"]
        for key, (spent, count) in top
        if spent > 0
    ]
    return markdown(["kernel" if on_gpu else "operator", "calls", "ms a step", "share %"], body)
