"""The wavelet transform against PyWavelets and ptwt, and its exact inverse."""

import numpy as np
import ptwt
import pytest
import pywt
import torch

from fm.model.wavelets import WAVELETS, analysis, depth_to_space, patches, space_to_depth, synthesis, unpatches

GRIDS = [(16, 16), (18, 46), (64, 22), (128, 384)]


def crop(wavelet: str, *subbands: torch.Tensor) -> torch.Tensor:
    """Drop the mirrored border coefficients of mode="reflect" and stack as (LL, LH, HL, HH)."""
    border = (pywt.Wavelet(wavelet).dec_len - 2) // 4
    inner = slice(border, -border or None)
    return torch.stack([torch.as_tensor(band)[..., inner, inner] for band in subbands], dim=-3)


def fields(grid: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("grid", GRIDS)
def test_one_level_equals_pywavelets_and_ptwt_inside_the_border(wavelet: str, grid: tuple[int, int]) -> None:
    x = fields(grid)
    ours = analysis(x, wavelet)
    low, (along_x, along_y, both) = pywt.dwt2(x.double().numpy(), wavelet, mode="reflect")
    np.testing.assert_allclose(ours.numpy(), crop(wavelet, low, along_y, along_x, both).numpy(), atol=5e-6)
    coarse, (along_x, along_y, both) = ptwt.wavedec2(x, wavelet, mode="reflect", level=1)
    torch.testing.assert_close(ours, crop(wavelet, coarse, along_y, along_x, both), atol=5e-6, rtol=0)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_two_levels_equal_pywavelets_applied_twice(wavelet: str) -> None:
    x = fields((20, 48))
    ours = analysis(x, wavelet, levels=2)
    low, (along_x, along_y, both) = pywt.dwt2(x.double().numpy(), wavelet, mode="reflect")
    first = crop(wavelet, low, along_y, along_x, both)
    low, (along_x, along_y, both) = pywt.dwt2(first[..., 0, :, :].numpy(), wavelet, mode="reflect")
    second = crop(wavelet, low, along_y, along_x, both)
    assert ours.shape == (2, 3, 16, 5, 12)
    np.testing.assert_allclose(ours[..., :4, :, :].numpy(), second.numpy(), atol=1e-5)
    for band in range(1, 4):
        folded = ours[..., 4 * band : 4 * band + 4, :, :]
        np.testing.assert_allclose(depth_to_space(folded).numpy(), first[..., band, :, :].numpy(), atol=1e-5)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_periodic_axes_equal_periodic_filtering(wavelet: str) -> None:
    """On a doubly periodic field the coefficients are those of the endless field, read inside a 3 x 3 tiling."""
    x = fields((16, 20))
    tiled = analysis(x.repeat(1, 1, 3, 3), wavelet)
    ours = analysis(x, wavelet, periodic=(True, True))
    torch.testing.assert_close(ours, tiled[..., 8:16, 10:20], atol=5e-6, rtol=0)


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("periodic", [(False, False), (True, False), (False, True), (True, True)])
def test_synthesis_undoes_analysis(wavelet: str, levels: int, periodic: tuple[bool, bool]) -> None:
    for grid in GRIDS[:3]:
        x = fields(grid)
        coefficients = analysis(x, wavelet, levels, periodic)
        assert coefficients.shape[-3:] == (4**levels, -(-grid[0] // 2**levels), -(-grid[1] // 2**levels))
        torch.testing.assert_close(synthesis(coefficients, wavelet, levels, grid, periodic), x, atol=4e-6, rtol=0)


def test_constants_have_no_details() -> None:
    coefficients = analysis(torch.full((1, 1, 16, 18), 3.0), "bior2.2")
    torch.testing.assert_close(coefficients[0, 0, 0], torch.full((8, 9), 6.0))
    torch.testing.assert_close(coefficients[0, 0, 1:], torch.zeros(3, 8, 9))


def test_details_are_high_pass_along_the_axis_they_name() -> None:
    along_x = torch.tensor([1.0, -1.0]).repeat(8)[:, None].expand(16, 16)
    low_low, low_high, high_low, high_high = analysis(along_x[None], "haar")[0]
    assert high_low.abs().min() > 1
    assert max(low_low.abs().max(), low_high.abs().max(), high_high.abs().max()) < 1e-6


def test_stays_float32_under_bfloat16_autocast() -> None:
    x = fields((16, 16))
    expected = analysis(x, "bior4.4")
    with torch.autocast("cpu", torch.bfloat16):
        coefficients = analysis(x, "bior4.4")
        back = synthesis(coefficients, "bior4.4", 1, (16, 16))
    assert coefficients.dtype == back.dtype == torch.float32
    assert torch.equal(coefficients, expected)


@pytest.mark.parametrize("levels", [1, 2])
def test_patches_are_a_rearrangement(levels: int) -> None:
    x = fields((18, 46))
    folded = patches(x, levels)
    assert folded.shape[-3] == 4**levels
    assert torch.equal(unpatches(folded, levels, (18, 46)), x)


def test_space_to_depth_order() -> None:
    x = torch.arange(4.0).view(2, 2)
    assert space_to_depth(x).flatten().tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((17, 16), "haar", 1), "even grid, got 17 x 16"),
        (((16, 16), "db3", 1), "unknown wavelet 'db3': choose one of haar, bior2.2, bior4.4"),
        (((16, 16), "haar", 3), "levels must be 1 or 2, got 3"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple, message: str) -> None:
    grid, wavelet, levels = arguments
    with pytest.raises(ValueError, match=message):
        analysis(torch.zeros(1, *grid), wavelet, levels)
