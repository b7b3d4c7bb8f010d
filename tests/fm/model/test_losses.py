"""The training loss against a sum by hand through PyWavelets."""

import numpy as np
import pytest
import pywt
import torch

from fm.model.loss import wavelit_loss


@pytest.mark.parametrize(("wavelet", "border"), [("haar", 0), ("bior2.2", 1), ("bior4.4", 2)])
def test_loss_is_mse_plus_mean_absolute_coefficient_of_each_subband(wavelet: str, border: int) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 2, 3, 18, 22, generator=generator)
    scale = torch.tensor([1.0, 2.0, 5.0]).view(3, 1, 1)
    terms = wavelit_loss(prediction, target, scale, mse_weight=0.5, wavelet_weight=2.0, wavelet=wavelet)
    error = ((prediction - target) * scale).double().numpy()
    low, details = pywt.dwt2(error, wavelet, mode="reflect")
    inner = slice(border, -border or None)
    wavelet_l1 = sum(np.abs(band[..., inner, inner]).mean() for band in (low, *details))
    assert terms.mse.numpy() == pytest.approx((error**2).mean((1, 2, 3)), rel=1e-5)
    assert terms.wavelet_l1.mean().item() == pytest.approx(wavelet_l1, rel=1e-5)
    assert terms.total.mean().item() == pytest.approx(0.5 * np.mean(error**2) + 2 * wavelet_l1, rel=1e-5)


def test_only_the_total_carries_gradient_and_it_points_to_the_target() -> None:
    prediction, target = torch.randn(1, 1, 16, 16, requires_grad=True), torch.zeros(1, 1, 16, 16)
    terms = wavelit_loss(prediction, target, torch.ones(1, 1, 1))
    assert not terms.mse.requires_grad
    assert not terms.wavelet_l1.requires_grad
    (gradient,) = torch.autograd.grad(terms.total, prediction)
    step = wavelit_loss(prediction.detach() - 0.1 * gradient, target, torch.ones(1, 1, 1))
    assert step.total < terms.total
    assert wavelit_loss(target, target, torch.ones(1, 1, 1)).total == 0


def test_float32_under_autocast_and_equal_shapes_only() -> None:
    prediction = torch.randn(1, 2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        terms = wavelit_loss(prediction.bfloat16(), prediction, torch.ones(2, 1, 1))
    assert terms.total.dtype == torch.float32
    with pytest.raises(ValueError, match="must have one shape"):
        wavelit_loss(prediction, prediction[:, :1], torch.ones(2, 1, 1))
