"""Calculate the time of a step of the paper's model on 8 to 1,024 GPUs, and how the GPUs spend it.

    python tests/benchmarks/scaling_on_gpus.py [--gpu h200] [--utilisation 0.3 | --step-ms MS] [--network 50]
        [--gradients float32 | bf16] [--graphs] [--plot FILE.png]

No GPU is needed. The model:

    compute   by AssumedSpeed of fm/lab/hardware.py: FLOPs at the assumed utilization, bytes at the memory's bandwidth,
              and at least the time to start the kernels one by one. --graphs leaves that time out, because CUDA graphs
              start all kernels at once. --step-ms scales all times to the mixture's mean step of 4 windows, measured
              on one GPU (`fm benchmark` prints it)
    exchange  by Interconnect of fm/lab/hardware.py: buckets of 25 MB, NVLink in nodes of 8, --network GB/s each between
              them. The part that the backward pass of the last micro-batch does not hide lengthens the step
    waiting   real draws of the sqrt mixture on the published grids, divided as in training; the step ends with the
              slowest process. `global`: all have equal work. `per_rank`: each has windows of other datasets
    left out  reading, validation, checkpoints, GPUs or links that are slower than others

Weak scaling: 4 windows a GPU, so the global batch grows with the GPUs. Strong scaling: the same global batch on all;
4 windows, the paper's, feed 4 GPUs at most. At most 4 windows go through the model at once.

    efficiency   windows/s of a GPU over those of one GPU alone with the paper's batch of 4
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from simulate_ranks import SCHEME, Setting, shares

from data_pipeline.windows.schedule import Schedule, Source
from fm.config import load_recipe
from fm.lab.hardware import INFINIBAND, STATE_TOUCHES, AssumedSpeed, Interconnect, buckets, find_gpu
from fm.lab.workload import FLOAT_BYTES, Footprint, footprint, read_workload
from fm.training.flops import BACKWARD, forward_flops
from fm.training.objective import Unroll

RECIPE = Path(__file__).parents[2] / "recipes" / "fm_pretrain.yaml"
MICRO_BATCH = 4  # windows at once, the paper's batch
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
STRONG_BATCH = 1024
COUNTED = 2  # windows of which traffic is counted
COLORS = ("#0072B2", "#D55E00", "#009E73", "#595959")  # Okabe and Ito 2008
COLUMNS = ("GPUs", "global batch", "draws", "step, ms", "waiting", "exchange, ms", "not hidden, ms", "efficiency")


@dataclass(frozen=True)
class Costs:
    """The costs of compute and exchange."""

    flops: dict[str, float]  # dataset -> of a training step's window
    traffic: dict[str, Footprint]  # of COUNTED windows
    speed: AssumedSpeed
    links: Interconnect
    state: float  # bytes that an optimizer step touches
    gradients: float  # bytes
    factor: float = 1.0  # of measured compute over the estimate

    def piece(self, dataset: str, windows: int) -> float:
        moved = windows / COUNTED * self.traffic[dataset].moved_bytes + self.state
        seconds = self.speed.seconds(windows * self.flops[dataset], moved, self.traffic[dataset].operations)
        return self.factor * seconds

    def pieces(self, dataset: str, windows: int) -> float:
        """Return the seconds of some windows of one draw, at most MICRO_BATCH at once."""
        whole, rest = divmod(windows, MICRO_BATCH)
        return whole * self.piece(dataset, MICRO_BATCH) + (self.piece(dataset, rest) if rest else 0.0)


@dataclass(frozen=True)
class Outcome:
    """Means over steps."""

    setting: Setting
    step: float  # seconds
    waiting: float  # share of the mean process's time before the exchange
    exchange: float  # seconds, hidden or not
    exposed: float  # seconds, not hidden

    @property
    def rate(self) -> float:
        """Return the windows/s of a GPU."""
        return self.setting.windows / self.step


def simulate(setting: Setting, sources: Sequence[Source], costs: Costs, steps: int) -> Outcome:
    """Simulate steps of the real schedule."""
    schedule = Schedule(sources, setting.batch, seed=0, scheme=SCHEME)
    sent = buckets(costs.gradients)
    mean = longest = exposed = 0.0
    for step in range(steps):
        first = step * setting.draws
        names = [schedule.source(first + draw).name for draw in range(setting.draws)]
        busy, last = [], []  # of each rank: seconds; of its last piece
        for mine in shares(setting, schedule, step):
            busy.append(sum(costs.pieces(names[draw], windows) for draw, windows in mine.items()))
            draw, windows = list(mine.items())[-1]
            last.append(costs.piece(names[draw], (windows - 1) % MICRO_BATCH + 1))
        slowest = int(np.argmax(busy))
        mean, longest = mean + float(np.mean(busy)), longest + busy[slowest]
        backward = BACKWARD / (1 + BACKWARD) * last[slowest]
        exposed += costs.links.after_backward(sent, backward, setting.ranks)
    exchange = sum(costs.links.all_reduce(size, setting.ranks) for size in sent)
    return Outcome(setting, (longest + exposed) / steps, max(0.0, 1 - mean / longest), exchange, exposed / steps)


def settings() -> dict[str, list[Setting]]:
    """Return the settings of each curve, by its name."""
    return {
        "weak, one draw for all (the default)": [Setting(gpus, MICRO_BATCH, "global", 1) for gpus in GPUS],
        "weak, four draws for all": [Setting(gpus, MICRO_BATCH, "global", 4) for gpus in GPUS],
        "weak, draws for each (per_rank)": [Setting(gpus, MICRO_BATCH, "per_rank", min(gpus, 64)) for gpus in GPUS],
        f"strong, {STRONG_BATCH:,} windows": [Setting(gpus, STRONG_BATCH // gpus, "global", 1) for gpus in GPUS],
        "strong, the paper's 4 windows": [Setting(gpus, MICRO_BATCH // gpus, "global", 1) for gpus in (1, 2, 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h200", help="of the table of `fm plan` (default h200)")
    parser.add_argument("--utilisation", type=float, default=0.3, help="assumed (default 0.3)")
    parser.add_argument("--step-ms", type=float, help="measured, for the mean step of 4 windows on one GPU")
    parser.add_argument("--network", type=float, default=INFINIBAND, help="GB/s of a GPU to other nodes (default 50)")
    parser.add_argument("--gradients", choices=("float32", "bf16"), default="float32", help="as they are sent")
    parser.add_argument("--graphs", action="store_true", help="starting kernels costs nothing")
    parser.add_argument("--steps", type=int, default=200, help="that are simulated (default 200)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the efficiencies")
    options = parser.parse_args()
    costs, sources = read_costs(options)
    alone = simulate(Setting(1, MICRO_BATCH, "global", 1), sources, costs, options.steps)
    if options.step_ms:
        factor = options.step_ms / 1e3 / alone.step
        costs = replace(costs, factor=factor)
        alone = simulate(alone.setting, sources, costs, options.steps)
    print_assumptions(options, costs, alone)
    curves = {}
    for name, some in settings().items():
        curves[name] = [simulate(setting, sources, costs, options.steps) for setting in some]
        print(f"\n{name}\n\n| {' | '.join(COLUMNS)} |\n|{'---:|' * len(COLUMNS)}")
        for outcome in curves[name]:
            print(row(outcome, alone), flush=True)
    if options.plot:
        efficiency_figure(curves, alone, options.gpu).savefig(options.plot, dpi=110)


def read_costs(options: argparse.Namespace) -> tuple[Costs, list[Source]]:
    """Count the costs of the recipe's model on the published grids."""
    workload = read_workload(load_recipe(RECIPE, ["data.shards=nowhere"]))
    model, datasets = workload.fake_model(), workload.datasets.values()
    objective = Unroll(model, workload.recipe.loss, autocast=torch.bfloat16)
    traffic = {one.name: footprint(objective, one.name, one.grid, COUNTED) for one in datasets}
    if options.graphs:
        traffic = {name: replace(one, operations=0) for name, one in traffic.items()}
    speed = AssumedSpeed(find_gpu(options.gpu), options.utilisation, bf16=True)
    costs = Costs(
        flops={one.name: (1.0 + BACKWARD) * forward_flops(model, one.name, one.grid) for one in datasets},
        traffic=traffic,
        speed=speed,
        links=Interconnect(speed.gpu.link, options.network),
        state=float(STATE_TOUCHES * FLOAT_BYTES * model.num_parameters()),
        gradients=float((4 if options.gradients == "float32" else 2) * model.num_parameters()),
    )
    return costs, [one.source for one in datasets]


def print_assumptions(options: argparse.Namespace, costs: Costs, alone: Outcome) -> None:
    gpu = costs.speed.gpu
    how = "measured" if options.step_ms else f"estimated at {options.utilisation:.0%} of {gpu.bf16_tflops:g} TFLOP/s"
    kernels = "" if options.graphs else ", at least 5 us a kernel"
    print(f"one {gpu.name} alone: {1e3 * alone.step:.1f} ms a step of {MICRO_BATCH} windows, {how}{kernels}")
    print(f"gradients: {costs.gradients / 1e6:.1f} MB in {options.gradients}, {len(buckets(costs.gradients))} buckets")
    print(f"links of each GPU: {gpu.link:g} GB/s in nodes of 8, {options.network:g} GB/s between them, 5 us a hop")


def row(outcome: Outcome, alone: Outcome) -> str:
    setting = outcome.setting
    cells = [f"{setting.ranks:,}", f"{setting.ranks * setting.windows:,}", str(setting.draws)]
    cells += [f"{1e3 * outcome.step:.1f}", f"{100 * outcome.waiting:.1f} %", f"{1e3 * outcome.exchange:.2f}"]
    cells += [f"{1e3 * outcome.exposed:.2f}", f"{100 * outcome.rate / alone.rate:.1f} %"]
    return f"| {' | '.join(cells)} |"


def efficiency_figure(curves: dict[str, list[Outcome]], alone: Outcome, gpu: str) -> Figure:
    """Draw efficiency against GPUs, without the paper's batch, which ends at four."""
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for color, (name, outcomes) in zip(COLORS, list(curves.items())[: len(COLORS)], strict=True):
        values = [100 * outcome.rate / alone.rate for outcome in outcomes]
        axes.plot(GPUS, values, "o-", color=color, markersize=3.5, linewidth=1.3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(GPUS, [f"{count:,}" for count in GPUS], fontsize=7)
    axes.set_ylim(0, 105)
    axes.tick_params(labelsize=7, width=0.5, length=2.5)
    axes.grid(True, linewidth=0.3, color="#D0D0D0")
    axes.set_xlabel(f"GPUs ({gpu}, calculated)", fontsize=8)
    axes.set_ylabel("efficiency, %", fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="lower left")
    return figure


if __name__ == "__main__":
    main()
