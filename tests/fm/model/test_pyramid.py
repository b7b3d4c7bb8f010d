"""Pooling, repetition and the sum over levels that share one block."""

import pytest
import torch

from fm.model.block import BlockConfig, Pyramid, pool, pyramid_tables, upsample


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
