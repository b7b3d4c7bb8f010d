"""Print the memory that training needs on each GPU: model state by launch configuration, activations by grid.

    python tests/benchmarks/memory_table.py [--gpus 8]

Nothing is measured: parameters are counted, and activations are the bytes that autograd keeps for the backward pass,
both on torch's fake tensors, which have shapes but no memory. bf16 is counted with the casts of CPU autocast. Left out:
CUDA's context and kernels' workspaces (1 to 2 GB), what backward holds for a moment, and the allocator's fragments.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from data_pipeline.registry import Card, load_registry
from fm.config import Recipe, load_recipe
from fm.distributed import ZERO_BUCKET
from fm.lab.workload import footprint
from fm.model.spec import DatasetSpec, ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.training.objective import Unroll

RECIPE = Path(__file__).parents[2] / "recipes" / "fm_pretrain.yaml"
FLOAT = 4  # bytes; parameters, gradients, moments and averages are float32
DEEPSPEED_BUCKET = ZERO_BUCKET * FLOAT  # reduce_bucket_size, whatever the size of the model
DEEPSPEED_LIVE = 1_000_000_000 * FLOAT  # stage3_max_live_parameters
WIDTH_FACTOR = 5  # of the large model; its depth is what then makes a billion parameters


@dataclass(frozen=True)
class State:
    """Bytes on a GPU."""

    parameters: float
    gradients: float
    moments: float
    average: float
    buffers: float  # for the exchange of gradients and parameters, at the libraries' defaults

    def cells(self, copy: float) -> list[float]:
        """Return the parts, their sum, and the sum on the main process, which keeps a `copy` for validation."""
        parts = [self.parameters, self.gradients, self.moments, self.average, self.buffers]
        return [*parts, sum(parts), sum(parts) + copy]


def states(whole: float, block: float, gpus: int) -> dict[str, State]:
    """Return the state for `whole` bytes of parameters, `block` of them in one block."""
    part = whole / gpus
    live = min(whole, DEEPSPEED_LIVE)
    return {
        "DDP": State(whole, whole, 2 * whole, whole, whole),  # buckets as large as the gradients
        "ZeRO-1": State(whole + part, whole, 2 * part, whole, DEEPSPEED_BUCKET),  # its part of the parameters twice
        "ZeRO-2": State(whole + part, part, 2 * part, whole, DEEPSPEED_BUCKET),
        "ZeRO-3": State(part, part, 2 * part, part, DEEPSPEED_BUCKET + live),  # gathered and kept, at most
        "FSDP2": State(part, part, 2 * part, part, 4 * block),  # two blocks gathered, and their gradients
    }


def spec(card: Card) -> DatasetSpec:
    """Return the card's channels with arbitrary statistics."""
    names = card.state_channels + card.constant_channels
    stats = {key: dict.fromkeys(names, 1.0) for key in ("mean", "std", "mean_delta", "std_delta")}
    return DatasetSpec(card.name, card.state_channels, card.constant_channels, card.boundary, stats)


def build(config: ModelConfig, cards: list[Card]) -> WaveLiTFM:
    with FakeTensorMode():
        return WaveLiTFM(config, [spec(card) for card in cards])


def block_parameters(model: WaveLiTFM) -> int:
    return sum(parameter.numel() for parameter in model.blocks[0].parameters())


def scaled(config: ModelConfig, cards: list[Card], parameters: int) -> ModelConfig:
    """Return a wider model with heads of the same width, and the least depth with so many parameters."""
    wide = replace(config, width=WIDTH_FACTOR * config.width, heads=WIDTH_FACTOR * config.heads, depth=1)
    model = build(wide, cards)
    block = block_parameters(model)
    return replace(wide, depth=1 + -(-(parameters - model.num_parameters()) // block))


def activations(recipe: Recipe, model: WaveLiTFM, card: Card, autocast: torch.dtype | None) -> int:
    """Return the bytes of one window among several, without what does not grow with them, such as casts of weights."""
    objective = Unroll(model, recipe.loss, recipe.finetune, autocast)
    two, three = (footprint(objective, card.name, card.grid, windows).kept_bytes for windows in (2, 3))
    return three - two


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g}"


def print_table(header: list[str], rows: list[list[str]], texts: int) -> None:
    """Print a Markdown table; the first `texts` columns are text, the others numbers."""
    print(f"| {' | '.join(header)} |")
    print(f"|{'|'.join(':---' if i < texts else '---:' for i in range(len(header)))}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=8)
    options = parser.parse_args()
    recipe = load_recipe(RECIPE, ["model.mlp_ratio=4.5"])  # 10M parameters
    cards = load_registry().select(recipe.data.datasets)
    config = recipe.model or ModelConfig()
    models = [build(size, cards) for size in (config, scaled(config, cards, 1_000_000_000))]
    names = ["10M", "1B"]
    for name, model in zip(names, models, strict=True):
        size = f"width {model.config.width}, depth {model.config.depth}, heads {model.config.heads}"
        print(f"- {name}: {model.num_parameters():,} parameters, {size}, {len(cards)} datasets")
    print(f"\nGB on each of {options.gpus} GPUs, float32, without activations:\n")
    rows = []
    for name, model in zip(names, models, strict=True):
        whole = FLOAT * model.num_parameters()
        for way, state in states(whole, FLOAT * block_parameters(model), options.gpus).items():
            rows.append([name, way, *map(gigabytes, state.cells(copy=whole))])
    header = "model, way, parameters, gradients, moments, averaged weights, exchange, sum, main process"
    print_table(header.split(", "), rows, texts=2)
    print("GB of activations per window, on the GPU that computes it, however the model is spread:\n")
    grids = [pick(cards, key=lambda card: card.tokens) for pick in (min, max)]
    rows = []
    for name, model in zip(names, models, strict=True):
        for card in grids:
            cells = [gigabytes(activations(recipe, model, card, dtype)) for dtype in (None, torch.bfloat16)]
            rows.append([name, card.name, f"{card.grid[0]} x {card.grid[1]}", *cells])
    print_table(["model", "dataset", "grid", "float32", "bf16"], rows, texts=3)


if __name__ == "__main__":
    main()
