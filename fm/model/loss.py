"""Training loss and score of a prediction.

wavelit_loss  mean squared error plus the mean absolute error of each wavelet subband (WaveLiT, section 3.4), and, if
              it has a weight, the root mean squared error of each channel
vrmse         root mean squared error over the target's deviation, as the_well.benchmark.metrics defines it
"""

from typing import NamedTuple

from torch import Tensor

from fm.model.wavelets import analysis

EPS = 1e-7  # the_well's
RMSE_FLOOR = 1e-4  # added under the root, in squared units of the error, so that its slope is at most 50


class LossTerms(NamedTuple):
    """One number per window, (B,). `total` carries the gradient; the parts are detached, for logging."""

    total: Tensor
    mse: Tensor
    wavelet_l1: Tensor


def wavelit_loss(
    prediction: Tensor,
    target: Tensor,
    scale: Tensor,
    mse_weight: float = 1.0,
    wavelet_weight: float = 1.0,
    wavelet: str = "bior2.2",
    rmse_weight: float = 0.0,
    levels: int = 1,
) -> LossTerms:
    """Return mse_weight * mean e^2 + wavelet_weight * sum over subbands of mean |DWT(e)| + rmse_weight * RMSE(e).

    The subbands are those of the model's tokens: 4 at one level of the transform, 7 at two.
    RMSE(e) is the mean over channels of sqrt(mean e^2 + RMSE_FLOOR). Its gradient does not vanish with the error, as
    the mean squared error's does, and it weighs all points of a field by their error, as the score does.

    e = (prediction - target) * scale, with normalized prediction and target (B, C, H, W) and scale (C, 1, 1) from
    `Surrogate.residual_scale`. float32 whatever the autocast state. ValueError if the shapes differ.
    """
    _check_shapes(prediction, target)
    error = (prediction.float() - target.float()) * scale
    coefficients = analysis(error, wavelet, levels).abs()  # (B, C, 4, h, w), or 16 at two levels
    mse = error.square().flatten(1).mean(1)
    wavelet_l1 = coefficients[:, :, :4].flatten(1).mean(1) * 4
    if levels == 2:  # each of the 3 details of the first level is folded into 4 of the other 12
        wavelet_l1 = wavelet_l1 + coefficients[:, :, 4:].flatten(1).mean(1) * 3
    total = mse_weight * mse + wavelet_weight * wavelet_l1
    if rmse_weight:
        total = total + rmse_weight * (error.square().mean((-2, -1)) + RMSE_FLOOR).sqrt().mean(1)
    return LossTerms(total, mse.detach(), wavelet_l1.detach())


def squared_error_and_variance(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean squared error over (x, y) and the unbiased variance of the target: (..., H, W) to (...) float64.

    An evaluation stores both, so that any eps, window or average can be computed from them later.
    """
    _check_shapes(prediction, target)
    prediction, target = prediction.double(), target.double()
    return (prediction - target).square().mean((-2, -1)), target.flatten(-2).var(-1)


def vrmse(prediction: Tensor, target: Tensor, eps: float = EPS) -> Tensor:
    """Return sqrt(mean (prediction - target)^2 / (var(target) + eps)) over (x, y): raw (..., H, W) to (...) float64."""
    error, variance = squared_error_and_variance(prediction, target)
    return (error / (variance + eps)).sqrt()


def _check_shapes(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:  # broadcasting would hide a mistake
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must have one shape")
