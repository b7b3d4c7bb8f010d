"""VRMSE as The Well defines it (the_well.benchmark.metrics): root mean squared error over the target's deviation."""

from torch import Tensor

EPS = 1e-7


def squared_error_and_variance(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error over (x, y) and unbiased variance of the target, each (...) float64, from (..., H, W).

    Everything an evaluation stores: any eps, window or average can be made of these two later.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must have one shape")
    prediction, target = prediction.double(), target.double()
    return (prediction - target).square().mean((-2, -1)), target.flatten(-2).var(-1)


def vrmse(prediction: Tensor, target: Tensor, eps: float = EPS) -> Tensor:
    """sqrt(mean (prediction - target)^2 / (var(target) + eps)) over (x, y): raw (..., H, W) to (...) float64."""
    error, variance = squared_error_and_variance(prediction, target)
    return (error / (variance + eps)).sqrt()
