"""Simulate how long processes wait for each other in a step, and for their gradients, on The Well's eight datasets.

    python tests/benchmarks/simulate_ranks.py [--ranks 8 64 1024] [--windows 1 4 16] [--overhead-ms 5] [--bandwidth 25]

No data and no GPU: grids and window counts are the cards', the draws are those of the real schedule (sqrt shares), and
who takes which windows comes from data_pipeline/windows/division.py. What a step costs is a model:

    busy time of a rank = pieces x overhead + tokens of its windows / tokens per second
    all-reduce          = 2 (R - 1) / R x bytes / bandwidth + 2 log2(R) x latency

A piece is what goes through the model at once: windows of one draw on one rank. The overhead is what a piece takes
however few its tokens are, launching kernels above all: forward and backward are about 2,600 operations, which a slow
host launches in 20 ms; that a GPU hides them behind long pieces is not modeled. The speed, unless given, is the
paper's: 1M steps of batch 4 in 41 h on one GPU, each of one piece with the tokens of the sqrt mixture's mean window.
The bytes are all gradients in float32, over links that give every rank the bandwidth (25 GB/s is 200 Gb/s InfiniBand;
NVLink within a node has more); the bandwidth term is a ring's, or a double tree's, the latency term a tree's. Nothing
of it overlaps with the backward pass, as it does under DDP, so the time for gradients is an upper bound. All ranks are
equally fast, reading costs nothing, and a window costs what its tokens cost, whatever its channels.

Ways: global and per_rank as in `sampling.draw`; whole is the naive one, a whole draw of its own for each rank, whatever
the others got. Draws of a step: global 1, and as many as leave every rank a window of each, up to 8; per_rank 8, and 64
from 64 ranks on, which mix most or all datasets; whole one for each rank. All ways have the same global batch.

Columns: datasets that are mixed in a step, pieces of a rank, both in the mean; the step; idle, 1 - mean busy time /
longest busy time; gradients, the all-reduce's share of the step; on tokens, the share of the step in which the mean
rank computes, without overhead, wait and all-reduce. Sums over all steps, so long steps count for more.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.inspect import DATASETS
from data_pipeline.registry import Card, load_registry
from data_pipeline.windows.division import Division, assign_by_cost
from data_pipeline.windows.schedule import Schedule, Source, sampling_shares
from fm.config import Recipe, load_recipe
from fm.model.spec import DatasetSpec
from fm.model.wavelit import WaveLiTFM

PAPER_SECONDS = 41 * 3600  # of fm_pretrain.yaml's steps and batch
SCHEME = "sqrt"
GRADIENT_BYTES = 4  # of one parameter
COLUMNS = (
    *("ranks", "windows per rank", "way", "draws", "datasets per step", "pieces per rank"),
    *("step, ms", "idle", "gradients", "on tokens"),
)


@dataclass(frozen=True)
class Setting:
    """One row: `windows` is the mean number of a rank and step."""

    ranks: int
    windows: int
    way: str
    draws: int

    @property
    def batch(self) -> int:
        """Return the windows of a draw."""
        return self.ranks * self.windows // self.draws


@dataclass(frozen=True)
class Costs:
    """What pieces, tokens and gradients take, in seconds."""

    piece: float
    token: float
    bandwidth: float  # bytes per second
    latency: float
    gradients: int  # bytes

    def all_reduce(self, ranks: int) -> float:
        return 2 * (ranks - 1) / ranks * self.gradients / self.bandwidth + 2 * math.log2(ranks) * self.latency


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 4, 16], help="windows of a rank and step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--overhead-ms", type=float, default=5.0, help="of a piece (default 5)")
    parser.add_argument("--tokens-per-s", type=float, help="of a rank, without the overhead (default: the paper's)")
    parser.add_argument("--bandwidth", type=float, default=25.0, help="GB/s of a rank (default 25)")
    parser.add_argument("--latency-us", type=float, default=10.0, help="of a hop (default 10)")
    options = parser.parse_args()
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "fm_pretrain.yaml")
    cards = load_registry().select(DATASETS)
    sources = [Source(card.name, card.windows, card.tokens, (card.windows,)) for card in cards]
    shares = sampling_shares(sources, SCHEME)
    tokens = sum(shares[source.name] * source.tokens for source in sources)
    seconds = PAPER_SECONDS / recipe.train.steps
    piece = options.overhead_ms / 1e3
    speed = options.tokens_per_s or recipe.train.batch * tokens / (seconds - piece)
    parameters = num_parameters(recipe, cards)
    costs = Costs(piece, 1 / speed, options.bandwidth * 1e9, options.latency_us / 1e6, GRADIENT_BYTES * parameters)
    sizes = [source.tokens for source in sources]
    reduced = ", ".join(f"{1e3 * costs.all_reduce(ranks):.2f} ms on {ranks:,}" for ranks in options.ranks)
    print(f"a window: {tokens:,.0f} tokens in the mean of the {SCHEME} mixture, {min(sizes):,} to {max(sizes):,}")
    print(f"the paper's step: {1e3 * seconds:.1f} ms for {recipe.train.batch} windows")
    print(f"a rank: {1e3 * piece:g} ms a piece, {speed:,.0f} tokens/s, so {1e3 * tokens / speed:.1f} ms a mean window")
    print(f"gradients: {parameters:,} parameters, {costs.gradients / 1e6:.1f} MB; all-reduce {reduced}")
    print(f"{options.steps} steps each\n\n| {' | '.join(COLUMNS)} |\n|{'-:|' * 2}:-|{'-:|' * 7}")
    for setting in settings(options.ranks, options.windows):
        print(row(setting, sources, costs, options.steps), flush=True)


def num_parameters(recipe: Recipe, cards: Sequence[Card]) -> int:
    """Return the number of parameters of the recipe's model for these datasets."""
    specs = []
    for card in cards:
        channels = (*card.state_channels, *card.constant_channels)
        stats = {name: dict.fromkeys(channels, 1.0) for name in ("mean", "std", "mean_delta", "std_delta")}
        specs.append(DatasetSpec(card.name, card.state_channels, card.constant_channels, card.boundary, stats))
    assert recipe.model is not None
    return WaveLiTFM(recipe.model, specs).num_parameters()


def settings(all_ranks: Sequence[int], all_windows: Sequence[int]) -> Iterator[Setting]:
    for ranks in all_ranks:
        for windows in all_windows:
            for draws in sorted({1, min(windows, 8)}):
                yield Setting(ranks, windows, "global", draws)
            for draws in (8, 64):
                if draws <= ranks:
                    yield Setting(ranks, windows, "per_rank", draws)
            yield Setting(ranks, windows, "whole", ranks)


def row(setting: Setting, sources: Sequence[Source], costs: Costs, steps: int) -> str:
    if setting.batch * setting.draws != setting.ranks * setting.windows:
        raise SystemExit(f"{setting}: the windows of a step do not divide into its draws; choose powers of two")
    schedule = Schedule(sources, setting.batch, seed=0, scheme=SCHEME)
    mean = longest = computing = 0.0
    pieces, datasets = [], []
    for step in range(steps):
        tokens, taken = work(setting, schedule, step)  # (R,) each
        busy = taken * costs.piece + tokens * costs.token
        mean, longest = mean + busy.mean(), longest + busy.max()
        computing += tokens.mean() * costs.token
        pieces.append(taken.mean())
        drawn = range(step * setting.draws, (step + 1) * setting.draws)
        datasets.append(len({schedule.source(index).name for index in drawn}))
    gradients = steps * costs.all_reduce(setting.ranks)
    total = longest + gradients
    cells = [f"{setting.ranks:,}", str(setting.windows), setting.way, f"{setting.draws:,}"]
    cells += [f"{np.mean(datasets):.1f}", f"{np.mean(pieces):.1f}", f"{1e3 * total / steps:.1f}"]
    cells += [f"{100 * share:.1f} %" for share in (max(0.0, 1 - mean / longest), gradients / total, computing / total)]
    return f"| {' | '.join(cells)} |"


def work(setting: Setting, schedule: Schedule, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and number of pieces of each rank in a step, (R,) each."""
    first = step * setting.draws
    sizes = [schedule.source(first + draw).tokens for draw in range(setting.draws)]
    ranks = shares(setting, schedule, step)
    tokens = [sum(windows * sizes[draw] for draw, windows in mine.items()) for mine in ranks]
    return np.array(tokens), np.array([len(mine) for mine in ranks])


def shares(setting: Setting, schedule: Schedule, step: int) -> list[dict[int, int]]:
    """Return, for each rank, the number of windows that it takes of each draw of a step."""
    first = step * setting.draws
    if setting.way == "whole":
        return [{draw: setting.windows} for draw in range(setting.ranks)]
    if setting.way == "global":  # the same for all
        mine = Division(schedule, 0, setting.ranks, setting.draws, "global").micro_batches(step)
        return [{piece.draw - first: len(piece.places) for piece in mine}] * setting.ranks
    sizes = [schedule.source(first + draw).tokens for draw in range(setting.draws)]
    ranks = assign_by_cost(sizes, setting.batch, setting.ranks)  # what Division asks for one rank at a time
    return [{draw: len(places) for draw, places in mine.items()} for mine in ranks]


if __name__ == "__main__":
    main()
