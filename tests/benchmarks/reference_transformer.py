"""Compare training steps of the quickstart's model with those of a plain PyTorch transformer of the same FLOPs.

    python tests/benchmarks/reference_transformer.py SHARDS [--steps 10] [--rounds 7] [--threads N]

The reference is a standard transformer: layers of nn.LayerNorm, nn.Linear, scaled_dot_product_attention over windows of
8 x 8 tokens, and a GELU MLP. It has the quickstart's patches, width, heads and depth. The width of its MLP makes its
forward pass cost the same FLOPs. On the grid, frames and channels of each dataset of the shards, both use the
quickstart's loss, AdamW and random data, normalized (never zeros), in batches of the quickstart's size.
They train in turn, `--steps` steps each, `--rounds` times after one that does not count.

    FLOPs     of one window's forward pass, counted by torch; a step counts three times as many for each window
    steps/s   median over rounds; in brackets the smallest and the largest
    ratio     our steps/s over the reference's, median of neighboring rounds; the last column is by CPU seconds,
              which other load on the machine disturbs less
"""

import argparse
import os
import time
from collections.abc import Callable
from math import gcd
from pathlib import Path
from statistics import geometric_mean, median

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.registry import load_registry
from data_pipeline.windows.loader import open_readers
from fm.config import LossSettings, Recipe, load_recipe
from fm.datasets import dataset_specs
from fm.model.loss import wavelit_loss
from fm.model.spec import DatasetSpec, ModelConfig
from fm.model.wavelit import WaveLiTFM

WINDOW = 8  # tokens along each side of an attention window, where the grid allows it
RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
Network = Callable[[Tensor], Tensor]  # (B, I, H, W), all inputs as `Surrogate.output` has them, to (B, C, H, W)


class Layer(nn.Module):
    """x = x + Attention(LayerNorm(x)) within windows; x = x + MLP(LayerNorm(x)). Tokens (B, h, w, D) to the same."""

    def __init__(self, width: int, heads: int, hidden: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, d = x.shape
        tall, wide = self.window
        qkv = self.query_key_value(self.norm(x)).view(b, h // tall, tall, w // wide, wide, 3, self.heads, -1)
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(1, 3).flatten(3, 4)  # (B * windows, A, N, D / A)
        o = scaled_dot_product_attention(q, k, v).view(b, h // tall, w // wide, self.heads, tall, wide, -1)
        x = x + self.output(o.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, h, w, d))
        return x + self.contract(gelu(self.expand(self.mlp_norm(x))))


class Transformer(nn.Module):
    """Maps fields (B, C_in, H, W) to (B, C_out, H, W) with one token for each patch."""

    def __init__(self, config: ModelConfig, channels: tuple[int, int], grid: tuple[int, int], hidden: int) -> None:
        super().__init__()
        self.side = 2**config.levels  # points along each side of a patch
        tokens = grid[0] // self.side, grid[1] // self.side
        window = gcd(tokens[0], WINDOW), gcd(tokens[1], WINDOW)
        self.embed = nn.Linear(self.side**2 * channels[0], config.width)
        self.position = nn.Parameter(0.02 * torch.randn(*tokens, config.width))
        layers = [Layer(config.width, config.heads, hidden, window) for _ in range(config.depth)]
        self.layers = nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, self.side**2 * channels[1])

    def forward(self, fields: Tensor) -> Tensor:
        x = nn.functional.pixel_unshuffle(fields, self.side).permute(0, 2, 3, 1)
        x = self.layers(self.embed(x) + self.position)
        return nn.functional.pixel_shuffle(self.head(self.norm(x)).permute(0, 3, 1, 2), self.side)


class Ours(nn.Module):
    """Return the quickstart's network for one dataset."""

    def __init__(self, config: ModelConfig, spec: DatasetSpec, context: int) -> None:
        super().__init__()
        self.model, self.spec = WaveLiTFM(config, [spec], context=context), spec

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model.output(inputs, self.spec)


def forward_flops(network: nn.Module, fields: Tensor) -> int:
    """Return the FLOPs of matrix products and convolutions of one window (1, C_in, H, W), attention's among them."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(fields)
    return int(counter.get_total_flops())


def as_costly(config: ModelConfig, channels: tuple[int, int], fields: Tensor, flops: int) -> Transformer:
    """Return the transformer whose forward pass takes `flops`, as nearly as a whole number of hidden units allows."""
    grid = fields.shape[-2], fields.shape[-1]
    one, two = (forward_flops(Transformer(config, channels, grid, hidden), fields) for hidden in (1, 2))
    return Transformer(config, channels, grid, 1 + round((flops - one) / (two - one)))


class Contender:
    """A network in training on one batch of random data."""

    def __init__(
        self, network: nn.Module, inputs: Tensor, target: Tensor, loss: LossSettings, learning_rate: float
    ) -> None:
        self.network, self.inputs, self.target, self.loss = network, inputs, target, loss
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, fused=True)

    def steps(self, count: int) -> tuple[float, float]:
        """Return wall-clock and CPU seconds of a step, the mean of `count`."""
        wall, cpu = time.perf_counter(), time.process_time()
        weights = {"wavelet_weight": self.loss.wavelet_l1, "mse_weight": self.loss.mse, "rmse_weight": self.loss.rmse}
        for _ in range(count):
            scale = self.target.new_ones(self.target.shape[1], 1, 1)
            terms = wavelit_loss(self.network(self.inputs), self.target, scale, wavelet="haar", **weights)
            terms.total.mean().backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count


def compare(spec: DatasetSpec, recipe: Recipe, steps: int, rounds: int) -> tuple[str, float, float]:
    """Return a row of the table, and both ratios of one dataset."""
    assert spec.grid is not None
    assert recipe.model is not None
    config, context, batch = recipe.model, recipe.data.context, recipe.train.global_batch
    channels = len(spec.inputs(context)), len(spec.state_channels)
    inputs, target = (torch.randn(batch, count, *spec.grid) for count in channels)
    ours = Ours(config, spec, context)
    flops = forward_flops(ours, inputs[:1])
    reference = as_costly(config, channels, inputs[:1], flops)
    off = forward_flops(reference, inputs[:1]) / flops - 1
    pair = [Contender(network, inputs, target, recipe.loss, 1e-4) for network in (ours, reference)]
    times = [[one.steps(steps) for one in pair] for _ in range(rounds + 1)][1:]  # (rounds, 2, 2)
    speeds = [[1 / took[which][0] for took in times] for which in (0, 1)]
    wall, cpu = (median(theirs[clock] / mine[clock] for mine, theirs in times) for clock in (0, 1))
    rates = [f"{median(of):.2f} ({min(of):.2f} to {max(of):.2f})" for of in speeds]
    gflops = [f"{3e-9 * batch * flops * median(of):.1f}" for of in speeds]
    grid = f"{spec.grid[0]} x {spec.grid[1]} x {channels[0]}"
    cells = [spec.name, grid, f"{1e-6 * flops:.1f} M", f"{off:+.2%}", *rates, *gflops, f"{wall:.2f}", f"{cpu:.2f}"]
    return f"| {' | '.join(cells)} |", wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("--steps", type=int, default=10, help="steps of one turn (default 10)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default 7)")
    parser.add_argument("--threads", type=int, help="threads per operation (default: torch's)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    recipe = load_recipe(RECIPE, [f"data.shards={options.shards}"])
    specs = dataset_specs(open_readers(options.shards, None, "train"), load_registry())
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, batch {recipe.train.global_batch}\n")
    print("| dataset | grid, channels | FLOPs | reference | steps/s | reference | GFLOP/s | its | ratio | by CPU |")
    print("|:--|:--|--:|--:|--:|--:|--:|--:|--:|--:|")
    ratios = []
    for spec in specs:
        row, *found = compare(spec, recipe, options.steps, options.rounds)
        ratios.append(found)
        print(row, flush=True)
    wall, cpu = (geometric_mean(column) for column in zip(*ratios, strict=True))
    print(f"\ngeometric mean of the ratios: {wall:.2f}, by CPU seconds {cpu:.2f}; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
