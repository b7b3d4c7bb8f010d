"""The block against its formulas, and the pyramid that applies it at several resolutions."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from fm.model.attention import Linear, linear, rope_table
from fm.model.block import Block, BlockConfig, DepthwiseConv, Pyramid, pool, pyramid_tables, upsample


def random_block(config: BlockConfig) -> Block:
    torch.manual_seed(0)
    block = Block(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.parametrize("shape", [(4, 32, 8, 24), (2, 9, 11, 24), (1, 1, 1, 24)])
def test_linear_equals_pytorchs(shape: tuple[int, ...]) -> None:
    """On x86 the first shape goes through a convolution, the others do not divide by 16."""
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    layer = Linear(24, 40)
    ours, theirs = linear(x, layer.weight, layer.bias), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    cotangent = torch.randn_like(ours)
    for got, expected in zip(
        torch.autograd.grad(ours, (x, layer.weight, layer.bias), cotangent),
        torch.autograd.grad(theirs, (x, layer.weight, layer.bias), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("periodic", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("grid", [(5, 8), (1, 3), (1, 1)])
def test_depthwise_padding_is_circular_on_periodic_axes_and_zero_elsewhere(
    periodic: tuple[bool, bool], grid: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    conv = DepthwiseConv(6).double()
    torch.nn.init.normal_(conv.weight)
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(2, *grid, 6, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(2, *grid, 6, dtype=torch.float64) + conv.bias
    for i, j in itertools.product(range(grid[0]), range(grid[1])):
        for a, b in itertools.product(range(3), repeat=2):
            p, q = i + a - 1, j + b - 1
            inside = (periodic[0] or 0 <= p < grid[0]) and (periodic[1] or 0 <= q < grid[1])
            if inside:
                expected[:, i, j] += x.detach()[:, p % grid[0], q % grid[1]] * conv.weight[:, 0, a, b]
    torch.testing.assert_close(conv(x, periodic), expected)
    assert torch.autograd.gradcheck(lambda x: conv(x, periodic), (x,))


def test_block_follows_the_formulas() -> None:
    block, grid = random_block(BlockConfig(width=16, heads=2)), (4, 6)
    x, rope = torch.randn(2, *grid, 16), rope_table(*grid, 8)

    def conv(layer: DepthwiseConv, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias, padding=1, groups=16).permute(0, 2, 3, 1)

    y = x + conv(block.cpe, x)
    u = F.layer_norm(y, (16,), block.norm.weight, block.norm.bias)
    z = F.silu(conv(block.conv, F.linear(u, block.input.weight, block.input.bias)))
    o = block.attention(z.flatten(1, 2), rope).view_as(z)
    o = o * torch.sigmoid(F.linear(u, block.gate.weight, block.gate.bias)) + conv(block.lepe, z)
    o = o * F.silu(F.linear(u, block.activation.weight, block.activation.bias))
    y = y + F.linear(o, block.output.weight, block.output.bias)
    y = y + conv(block.cpe2, y)
    v = F.layer_norm(y, (16,), block.mlp_norm.weight, block.mlp_norm.bias)
    v = F.linear(
        F.gelu(F.linear(v, block.expand.weight, block.expand.bias)), block.contract.weight, block.contract.bias
    )
    torch.testing.assert_close(block(x, rope), y + v, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("switch", ["kernel_gate", "lepe", "cpe", "mila"])
def test_switches_remove_their_parameters_and_change_the_output(switch: str) -> None:
    full, without = BlockConfig(16, 2), BlockConfig(16, 2, **{switch: False})
    names = {name.split(".")[0] for name, _ in random_block(full).named_parameters()}
    kept = {name.split(".")[0] for name, _ in random_block(without).named_parameters()}
    removed = {"kernel_gate": {"gate"}, "lepe": {"lepe"}, "cpe": {"cpe", "cpe2"}, "mila": {"conv", "activation"}}
    assert names - kept == removed[switch]
    block = random_block(without)
    x, rope = torch.randn(1, 4, 6, 16, requires_grad=True), rope_table(4, 6, 8)
    block(x, rope, (True, False)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_a_block_is_equivariant_to_shifts_of_periodic_axes_without_positions() -> None:
    """With circular padding only RoPE knows where a token is; a table of no rotation takes that away."""
    block = random_block(BlockConfig(16, 2))
    still = torch.tensor([1.0, 0.0]).expand(24, 4, 2)
    x = torch.randn(1, 4, 6, 16)
    shifted = block(x.roll((1, 2), (1, 2)), still, (True, True))
    torch.testing.assert_close(shifted, block(x, still, (True, True)).roll((1, 2), (1, 2)), atol=1e-3, rtol=1e-4)


def test_block_returns_the_dtype_it_was_given() -> None:
    block, rope = random_block(BlockConfig(16, 2)), rope_table(4, 6, 8)
    x = torch.randn(1, 4, 6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x, rope).dtype == torch.float32
    assert block.bfloat16()(x.bfloat16(), rope, (True, True)).dtype == torch.bfloat16


@pytest.mark.parametrize("grid", [(8, 12), (9, 11), (5, 1)])
@pytest.mark.parametrize("factor", [2, 4, 16])
def test_pool_averages_the_cells_that_exist_and_upsample_repeats(grid: tuple[int, int], factor: int) -> None:
    x = torch.randn(2, *grid, 3)
    pooled = pool(x, factor)
    repeated = upsample(pooled, factor, *grid)
    assert pooled.shape == (2, -(-grid[0] // factor), -(-grid[1] // factor), 3)
    assert repeated.shape == x.shape
    for i in range(grid[0]):
        for j in range(grid[1]):
            rows = slice(i // factor * factor, i // factor * factor + factor)
            columns = slice(j // factor * factor, j // factor * factor + factor)
            torch.testing.assert_close(repeated[:, i, j], x[:, rows, columns].mean((1, 2)), atol=1e-6, rtol=1e-5)


def test_the_coarse_level_is_the_fine_levels_block() -> None:
    torch.manual_seed(0)
    pyramid = Pyramid(BlockConfig(16, 2), levels=2)
    for parameter in pyramid.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    alone = sum(p.numel() for p in Pyramid(BlockConfig(16, 2), levels=0).parameters())
    assert sum(p.numel() for p in pyramid.parameters()) == alone + 2  # two more scalars, no more weights
    x = torch.randn(1, 9, 11, 16)
    tables = pyramid_tables(9, 11, 2, 8, x.device)
    expected = sum(
        weight * upsample(pyramid.block(pool(x, 2**level), tables[level], (True, False)), 2**level, 9, 11)
        for level, weight in enumerate(pyramid.level_weights)
    )
    torch.testing.assert_close(pyramid(x, tables, (True, False)), expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        pyramid.level_weights.copy_(torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(pyramid(x, tables), pyramid.block(x, tables[0]))


def test_tables_are_those_of_each_grid() -> None:
    tables = pyramid_tables(9, 11, 3, 8, torch.device("cpu"))
    assert [len(table) for table in tables] == [9 * 11, 5 * 6, 3 * 3, 2 * 2]
