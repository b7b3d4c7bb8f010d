"""The training objectives against unrolls by hand: a linear model, whose gradients are known in closed form."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fm.config import FinetuneSettings, LossSettings
from fm.distributed import precision
from fm.model.spec import DatasetSpec, ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.training.objective import Unroll, causal_weights

FACTOR, STEPS, WINDOWS = 1.1, 4, 3
OLDEST = 0.3  # factor of the oldest of several input frames
MOMENTS = ("mean", "std", "mean_delta", "std_delta")


class Linear(nn.Module):
    """x(t + 1) = a x(t) + b x(t - n + 1) in normalised units, which are those of the fields; b is 0 for one frame."""

    def __init__(self, context: int = 1) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(FACTOR, dtype=torch.float64))
        self.wavelet, self.levels, self.context = "haar", 1, context

    def forward(self, frames: Tensor, constants: Tensor, dataset: str) -> Tensor:
        assert frames.shape[1] == self.context
        newest = self.factor * frames[:, -1]
        return newest if self.context == 1 else newest + OLDEST * frames[:, 0]

    def normalize(self, fields: Tensor, dataset: str) -> Tensor:
        return fields

    normalize_constants = normalize

    def residual_scale(self, dataset: str) -> Tensor:
        return torch.ones(1, 1, 1)


@pytest.fixture(scope="module")
def fields() -> np.ndarray:
    """(B, K + 1, C, H, W)"""
    return np.random.default_rng(3).standard_normal((WINDOWS, STEPS + 1, 1, 16, 16))


def unrolled(fields: np.ndarray, forced: np.ndarray, noise: np.ndarray | None = None, **settings: Any) -> Any:
    """Loss and gradient of our objective, mean squared errors alone."""
    model: Any = Linear()
    finetune = FinetuneSettings(pretrained="x", **settings)
    objective = Unroll(model, LossSettings(mse=1.0, wavelet_l1=0.0), finetune)
    tensors = [None if array is None else torch.from_numpy(array) for array in (fields, forced, noise)]
    terms = objective(tensors[0], torch.zeros(WINDOWS, 0, 16, 16), tensors[1], "any", tensors[2])
    terms["loss"].backward()
    return terms["loss"].item(), float(model.factor.grad), float(terms["mse"])


def by_hand(fields: np.ndarray, forced: np.ndarray, noise: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """L_k and dL_k/da of every window, (K, B): n steps from x make a^n x, whose derivative is n a^(n-1) x."""
    losses, slopes = np.empty((2, STEPS, WINDOWS))
    shifted = fields[:, :-1] + noise
    for window in range(WINDOWS):
        for k in range(STEPS):
            since = max(j for j in range(k + 1) if j == 0 or forced[window, j])  # where the truth was last fed
            n, start = k + 1 - since, shifted[window, since]
            error = FACTOR**n * start - fields[window, k + 1]
            losses[k, window] = (error**2).mean()
            slopes[k, window] = (2 * error * n * FACTOR ** (n - 1) * start).mean()
    return losses, slopes


FREE = np.zeros((WINDOWS, STEPS), bool)
COINS = np.array([[1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 1, 0]], bool)


def test_scheduled_sampling_is_the_mean_over_steps_with_gradients_through_free_ones(fields: np.ndarray) -> None:
    losses, slopes = by_hand(fields, COINS)
    loss, slope, mse = unrolled(fields, COINS, objective="scheduled_sampling")
    assert loss == pytest.approx(losses.mean(), rel=1e-6)
    assert slope == pytest.approx(slopes.mean(), rel=1e-6)
    assert mse == pytest.approx(losses.mean(), rel=1e-6)


def test_bptt_is_scheduled_sampling_without_the_truth(fields: np.ndarray) -> None:
    losses, slopes = by_hand(fields, FREE)
    loss, slope, _ = unrolled(fields, FREE, objective="bptt")
    assert loss == pytest.approx(losses.mean(), rel=1e-6)
    assert slope == pytest.approx(slopes.mean(), rel=1e-6)


def test_causal_bptt_weighs_each_window_by_its_own_earlier_losses_without_gradient(fields: np.ndarray) -> None:
    losses, slopes = by_hand(fields, FREE)
    weights = np.exp(-0.3 * (losses.cumsum(0) - losses))
    loss, slope, mse = unrolled(fields, FREE, objective="causal_bptt", causal_eps=0.3)
    assert loss == pytest.approx((weights * losses).mean(), rel=1e-6)
    assert slope == pytest.approx((weights * slopes).mean(), rel=1e-6)
    assert mse == pytest.approx(losses.mean(), rel=1e-6)  # what is logged is not weighted
    assert (weights[0] == 1).all()
    assert (np.diff(weights, axis=0) < 0).all()
    assert causal_weights(torch.from_numpy(losses), 0.3).numpy() == pytest.approx(weights)
    assert unrolled(fields, FREE, objective="causal_bptt", causal_eps=0.0)[1] == pytest.approx(slopes.mean(), rel=1e-6)


def test_pushforward_has_the_gradient_of_its_last_step_alone(fields: np.ndarray) -> None:
    start, target = fields[:, 0], fields[:, -1]
    error = FACTOR**STEPS * start - target
    loss, slope, mse = unrolled(fields, FREE, objective="pushforward")
    assert loss == pytest.approx((error**2).mean(), rel=1e-6)
    assert slope == pytest.approx((2 * error * FACTOR ** (STEPS - 1) * start).mean(), rel=1e-6)
    assert mse == loss


def test_noise_is_added_to_inputs_that_are_the_truth_and_to_nothing_else(fields: np.ndarray) -> None:
    noise = 0.1 * np.random.default_rng(5).standard_normal(fields[:, 1:].shape)
    losses, slopes = by_hand(fields, COINS, noise)
    loss, slope, _ = unrolled(fields, COINS, noise, objective="scheduled_sampling")
    assert loss == pytest.approx(losses.mean(), rel=1e-6)
    assert slope == pytest.approx(slopes.mean(), rel=1e-6)


@pytest.mark.parametrize("objective", ["scheduled_sampling", "bptt", "causal_bptt", "pushforward"])
def test_all_objectives_are_one_for_one_step_and_with_checkpointed_activations(
    fields: np.ndarray, objective: str
) -> None:
    one, first = fields[:, :2], COINS[:, :1]
    error = FACTOR * one[:, 0] - one[:, 1]
    loss, slope, _ = unrolled(one, first, objective=objective)
    assert loss == pytest.approx((error**2).mean(), rel=1e-6)
    assert slope == pytest.approx((2 * error * one[:, 0]).mean(), rel=1e-6)
    coins = COINS if objective == "scheduled_sampling" else FREE
    whole = unrolled(fields, coins, objective=objective)
    assert unrolled(fields, coins, objective=objective, checkpoint_activations=True) == whole


def test_checkpointed_activations_keep_one_model_step_in_memory() -> None:
    spec = DatasetSpec("flow", ("a", "b"), (), (("PERIODIC",) * 2,) * 2, {key: {"a": 1.0, "b": 1.0} for key in MOMENTS})
    model = WaveLiTFM(ModelConfig(width=16, depth=2, heads=2, wavelet="haar"), [spec])
    windows = torch.randn(2, STEPS + 1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    kept = {}
    for checkpoints in (False, True):
        settings = FinetuneSettings(pretrained="x", objective="bptt", checkpoint_activations=checkpoints)
        objective, kept[checkpoints] = Unroll(model, LossSettings(), settings), 0

        def keep(tensor: Tensor, checkpoints: bool = checkpoints) -> Tensor:
            kept[checkpoints] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            objective(windows, windows[:, 0, :0], torch.zeros(2, STEPS, dtype=torch.bool), "flow")
    assert kept[True] < kept[False] / STEPS


class _Waits(TorchDispatchMode):
    """Names the operations whose result the host must see, or whose shape depends on the data."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name in self.NAMES or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["scheduled_sampling", "causal_bptt", "pushforward"])
def test_a_gpu_never_makes_the_host_wait_in_forward_and_backward(objective: str) -> None:
    moments = {key: {"a": 1.0, "b": 1.0, "c": 1.0} for key in MOMENTS}
    spec = DatasetSpec(
        "flow",
        ("a", "b"),
        ("c",),
        (("PERIODIC",) * 2, ("WALL",) * 2),
        moments,
        conserved=(("mean", ("a",)), ("mean_square", ("b",)), ("divergence", ("a", "b"))),
        ranges={"a": (None, 9.0)},
        spacing=(1.0, 0.5),
    )
    config = ModelConfig(width=16, depth=1, heads=2, pointwise=True, decoder="conv", constraints=True)
    model = WaveLiTFM(config, [spec])
    unroll = Unroll(model, LossSettings(), FinetuneSettings(pretrained="x", objective=objective), torch.bfloat16)
    windows = torch.randn(2, STEPS + 1, 2, 16, 16)
    with _Waits() as waits:
        unroll(windows, windows[:, 0, :1], torch.ones(2, STEPS, dtype=torch.bool), "flow")["loss"].backward()
    assert not waits.found
    with _Waits() as waits:
        float(windows.sum())
        windows[windows > 0]
    assert waits.found == ["_local_scalar_dense", "index"]


def test_tf32_is_for_a_bf16_step_and_ends_with_it() -> None:
    for autocast, expected in ((None, "highest"), (torch.bfloat16, "high")):
        with precision(autocast):
            assert torch.get_float32_matmul_precision() == expected
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("context", [2, 3])
@pytest.mark.parametrize("objective", ["scheduled_sampling", "pushforward"])
def test_a_model_of_several_frames_reads_the_truth_then_what_the_coins_chose(context: int, objective: Any) -> None:
    generator = np.random.default_rng(5)
    fields = generator.standard_normal((WINDOWS, context + STEPS, 1, 16, 16))
    noise = 0.1 * generator.standard_normal((WINDOWS, context + STEPS - 1, 1, 16, 16))
    coins = COINS if objective == "scheduled_sampling" else FREE

    def loss(factor: float) -> float:
        """Step by step and window by window, as the frames of a window are chosen."""
        losses = np.empty((STEPS, WINDOWS))
        for window in range(WINDOWS):
            read = list(fields[window, :context] + noise[window, :context])
            for k in range(STEPS):
                predicted = factor * read[-1] + OLDEST * read[-context]
                losses[k, window] = ((predicted - fields[window, context + k]) ** 2).mean()
                if k + 1 < STEPS:
                    truth = fields[window, context + k] + noise[window, context + k]
                    read.append(truth if coins[window, k + 1] else predicted)
        return float(losses[-1].mean() if objective == "pushforward" else losses.mean())

    model: Any = Linear(context)
    unroll = Unroll(model, LossSettings(mse=1.0, wavelet_l1=0.0), FinetuneSettings(pretrained="x", objective=objective))
    tensors = [torch.from_numpy(array) for array in (fields, coins, noise)]
    found = unroll(tensors[0], torch.zeros(WINDOWS, 0, 16, 16), tensors[1], "any", tensors[2])["loss"]
    assert float(found.detach()) == pytest.approx(loss(FACTOR), rel=1e-5)  # the loss is float32
    found.backward()
    if objective == "scheduled_sampling":
        slope = (loss(FACTOR + 1e-5) - loss(FACTOR - 1e-5)) / 2e-5
        assert float(model.factor.grad) == pytest.approx(slope, rel=1e-4)
