"""The Wavelet Neural Operator: against PyWavelets, and on any grid."""

import numpy as np
import pytest
import pywt
import torch

from fm.model.baselines import WNO, WaveletMixing


@pytest.mark.parametrize(
    ("grid", "levels"), [((64, 64), 3), ((64, 32), 2), ((16, 48), 1), ((18, 22), 1), ((34, 50), 2)]
)
def test_mixes_the_coarsest_subbands_and_keeps_the_finer(grid: tuple[int, int], levels: int) -> None:
    """Levels are three, or as many as the smaller side has room for."""
    torch.manual_seed(0)
    mixing = WaveletMixing(3, levels=3)
    v = torch.randn(2, 3, *grid)
    approximation, coarsest, *finer = pywt.wavedec2(v.numpy(), "db4", mode="symmetric", level=levels)
    weights = mixing.weights.detach().numpy()
    mixed = [np.einsum("bihw,io->bohw", part, weights[i]) for i, part in enumerate((approximation, *coarsest))]
    expected = pywt.waverec2([mixed[0], tuple(mixed[1:]), *finer], "db4", mode="symmetric")[..., : grid[0], : grid[1]]
    torch.testing.assert_close(mixing(v), torch.from_numpy(expected), atol=1e-4, rtol=1e-4)


def test_one_set_of_weights_serves_every_grid() -> None:
    torch.manual_seed(0)
    model = WNO(5, 2, width=6, depth=2, levels=3)
    for grid in ((16, 16), (64, 32), (18, 46)):
        output = model(torch.randn(2, 5, *grid))
        assert output.shape == (2, 2, *grid)
        output.sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in model.parameters())
