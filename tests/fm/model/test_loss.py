"""The training loss through PyWavelets, and VRMSE through the_well."""

import numpy as np
import pytest
import pywt
import torch
from the_well.benchmark.metrics import VRMSE
from the_well.data.datasets import WellMetadata

from fm.evaluation.errors import DatasetErrors, ErrorFile, Errors
from fm.evaluation.protocol import PROTOCOLS
from fm.evaluation.scores import score
from fm.model.loss import squared_error_and_variance, vrmse, wavelit_loss


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize(("wavelet", "border"), [("haar", 0), ("bior2.2", 1), ("bior4.4", 2)])
def test_loss_is_mse_plus_mean_absolute_coefficient_of_each_subband(wavelet: str, border: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 2, 3, 20, 24, generator=generator)
    scale = torch.tensor([1.0, 2.0, 5.0]).view(3, 1, 1)
    terms = wavelit_loss(prediction, target, scale, 0.5, 2.0, wavelet, levels=levels)
    error = ((prediction - target) * scale).double().numpy()
    inner = slice(border, -border or None)
    low, bands = error, []
    for _ in range(levels):
        parts = pywt.dwt2(low, wavelet, mode="reflect")
        low, *details = (band[..., inner, inner] for band in (parts[0], *parts[1]))
        bands += details
    assert len(bands) == 3 * levels
    wavelet_l1 = sum(np.abs(band).mean() for band in (low, *bands))
    assert terms.mse.numpy() == pytest.approx((error**2).mean((1, 2, 3)), rel=1e-5)
    assert terms.wavelet_l1.mean().item() == pytest.approx(wavelet_l1, rel=1e-5)
    assert terms.total.mean().item() == pytest.approx(0.5 * np.mean(error**2) + 2 * wavelet_l1, rel=1e-5)


def test_the_root_mean_squared_error_is_taken_of_each_channel_of_each_window() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 2, 3, 18, 22, generator=generator)
    scale = torch.tensor([1.0, 2.0, 5.0]).view(3, 1, 1)
    total = wavelit_loss(prediction, target, scale, 0.0, 0.0, rmse_weight=2.0).total
    error = ((prediction - target) * scale).double().numpy()
    by_hand = [np.mean([np.linalg.norm(channel) / np.sqrt(18 * 22) for channel in window]) for window in error]
    assert total.numpy() == pytest.approx(2 * np.array(by_hand), rel=1e-4)  # RMSE_FLOOR changes less
    exact = target.clone().requires_grad_()
    wavelit_loss(exact, target, scale, 0.0, 0.0, rmse_weight=1.0).total.sum().backward()
    assert exact.grad is not None
    assert (exact.grad == 0).all()  # and not NaN, where a root has no slope


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


def the_wells_vrmse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """the_well computes on channels-last fields (B, T, H, W, C)."""
    metadata = WellMetadata(
        dataset_name="x",
        n_spatial_dims=2,
        spatial_resolution=tuple(target.shape[-2:]),
        scalar_names=[],
        constant_scalar_names=[],
        field_names={0: ["a", "b", "c"], 1: [], 2: []},
        constant_field_names={0: [], 1: [], 2: []},
        boundary_condition_types=["PERIODIC"],
        n_files=1,
        n_trajectories_per_file=[1],
        n_steps_per_trajectory=[1],
    )
    return VRMSE.eval(prediction.movedim(2, -1), target.movedim(2, -1), metadata)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_equals_the_wells(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = scale * torch.randn(2, 4, 5, 3, 32, 48, generator=generator) + scale
    ours, theirs = vrmse(prediction, target), the_wells_vrmse(prediction, target)
    assert ours.shape == (4, 5, 3)
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-6)


def test_equals_the_wells_where_the_target_hardly_varies() -> None:
    """Constant, then with the standard deviation of active_matter's concentration, then of a channel of its own."""
    generator = torch.Generator().manual_seed(0)
    noise, error = torch.randn(2, 4, 5, 3, 32, 48, generator=generator)
    target = 0.1 + noise * torch.tensor([0.0, 3e-3, 1.0])[:, None, None]
    prediction = target + 1e-3 * error
    ours = vrmse(prediction, target)
    np.testing.assert_allclose(ours.numpy(), the_wells_vrmse(prediction, target).numpy(), rtol=1e-5)
    assert ours[..., 0].mean().item() == pytest.approx(1e-3 / 1e-7**0.5, rel=0.01)


def test_stored_errors_average_to_the_wells() -> None:
    """From float64 squares and variances by trajectory, step and channel: the_well's VRMSE, averaged by NumPy."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = 1e3 * torch.randn(2, 5, 7, 3, 32, 48, generator=generator) + 1e4
    target[0, 0, 0] = 1e4  # of no variance
    squared, variance = (part.numpy() for part in squared_error_and_variance(prediction, target))
    assert squared.dtype == variance.dtype == np.float64
    errors = Errors(variance, squared, variance, variance, variance)
    part = DatasetErrors(("a", "b", "c"), np.arange(5), errors, errors, "x", (32, 48))
    cells = score(ErrorFile(PROTOCOLS["thirds"], {"x": part})).datasets["x"]
    frames = the_wells_vrmse(prediction.double(), target.double()).numpy().mean(-1)  # (R, S)
    assert cells.one_step.median == pytest.approx(np.median(frames), rel=1e-9)
    assert cells.one_step.mean == pytest.approx(frames.mean(), rel=1e-9)
    last = cells.windows["last_third"]
    assert (last.first, last.last) == (5, 7)
    assert last.median == pytest.approx(np.median(frames[:, 4:], axis=0).mean(), rel=1e-9)


def test_the_mean_field_scores_about_one_and_a_perfect_one_zero() -> None:
    target = torch.randn(6, 64, 64, generator=torch.Generator().manual_seed(0))
    mean = target.mean((-2, -1), keepdim=True).expand_as(target)
    assert vrmse(mean, target).numpy() == pytest.approx(1.0, abs=1e-3)
    assert vrmse(target, target).max() == 0


def test_eps_is_that_of_a_constant_target() -> None:
    target = torch.zeros(1, 16, 16)
    assert vrmse(target + 1e-3, target).item() == pytest.approx(1e-3 / 1e-7**0.5, rel=1e-5)
    assert vrmse(target + 1e-3, target, eps=1e-5).item() == pytest.approx(1e-3 / 1e-5**0.5, rel=1e-5)


def test_error_and_variance_are_numpys_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 16, 20, generator=generator) + 1e4  # float32 sums would lose digits
    error, variance = squared_error_and_variance(prediction, target)
    a, b = prediction.double().numpy(), target.double().numpy()
    np.testing.assert_allclose(error.numpy(), ((a - b) ** 2).mean((-2, -1)), rtol=1e-12)
    np.testing.assert_allclose(variance.numpy(), b.reshape(3, -1).var(-1, ddof=1), rtol=1e-9)
    with pytest.raises(ValueError, match="must have one shape"):
        vrmse(prediction, target[:1])
