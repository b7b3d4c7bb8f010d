"""What an optimizer step's unroll looks like: its length, which inputs are the truth, and the noise on those.

All are functions of (seed, step, draw, place in the global batch): they depend on no number of processes, and a run
that is continued has the same.

Training objectives: a model rolled out over a window, and the loss of its steps (paper Appendix G).

Model step k = 1 ... K makes frame k of the window from its input: frame k - 1 of the truth, or the model's own last
prediction. With the loss L_k of step k against the truth, and every mean over the windows of a batch:

    scheduled_sampling  mean over k of L_k; inputs are the truth by chance (Bengio et al. 2015)
    bptt                mean over k of L_k; only the first input is the truth
    causal_bptt         mean over k of exp(-eps * sum over j < k of L_j) L_k, the weights without gradient: later steps
                        count once earlier ones are right (Wang, Sankaran and Perdikaris 2024). Each window has its own
    pushforward         L_K, and no gradient through the steps before K (Brandstetter, Worrall and Welling 2022)

Gradients flow through predictions that are inputs, but for pushforward. K = 1 is one-step training, whatever the
objective.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.hashing import stream_key, uniform
from fm.config import FinetuneSettings, LossSettings
from fm.model.loss import LossTerms, wavelit_loss
from fm.model.surrogate import Surrogate

SIGMOID_STEEPNESS = 10.0


def unroll_length(step: int, steps: int, settings: FinetuneSettings, dataset: str) -> int:
    """Model steps of a window of `dataset` at optimizer step `step` of `steps`.

    With unroll_start it grows by one at a time, each length for an equal part of the first `unroll_growth` of the run.
    """
    full = settings.unroll_of(dataset)
    if settings.unroll_start is None or settings.unroll_start >= full:
        return full
    lengths = full - settings.unroll_start + 1
    grown = int(lengths * step / (settings.unroll_growth * steps))
    return min(settings.unroll_start + grown, full)


def forcing_prob(step: int, steps: int, settings: FinetuneSettings) -> float:
    """Probability that an input is the truth at optimizer step `step` of `steps`; 0 but for scheduled sampling.

    From forcing_start at the first step to forcing_end at the last: linearly, by half a cosine, or by the inverse
    sigmoid of Bengio et al. (2015), shifted and scaled so that it begins and ends there.
    """
    if settings.objective != "scheduled_sampling":
        return 0.0
    fraction = min(step / max(steps - 1, 1), 1.0)
    left = {"linear": _linear, "cosine": _cosine, "inverse_sigmoid": _inverse_sigmoid}[settings.forcing](fraction)
    return settings.forcing_end + (settings.forcing_start - settings.forcing_end) * left


def _linear(fraction: float) -> float:
    return 1 - fraction


def _cosine(fraction: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * fraction))


def _inverse_sigmoid(fraction: float) -> float:
    high, low = (1 / (1 + math.exp(SIGMOID_STEEPNESS * (at - 0.5))) for at in (0.0, 1.0))
    return (1 / (1 + math.exp(SIGMOID_STEEPNESS * (fraction - 0.5))) - low) / (high - low)


def forcing_coins(seed: int, draw: int, batch: int, unroll_steps: int, prob: float) -> np.ndarray:
    """Which inputs of a global batch are the truth: (batch, unroll_steps) bool. The first input always is."""
    slots = np.arange(batch * unroll_steps, dtype=np.uint64)
    coins = uniform(stream_key("teacher forcing", seed, draw), slots).reshape(batch, unroll_steps) < prob
    coins[:, 0] = True
    return coins


def input_noise(
    seed: int, draw: int, places: np.ndarray, shape: tuple[int, ...], scale: float, device: torch.device
) -> Tensor:
    """Gaussian noise with std `scale` for the windows at `places` of a draw's batch, (len(places), *shape) float32.

    It is drawn on `device`, so CPUs and GPUs have different numbers.
    """
    noise = torch.empty(len(places), *shape, device=device)
    for row, place in enumerate(places.tolist()):
        key = int(stream_key("jitter", seed, draw, place)) >> 1  # torch takes 63 bits
        noise[row].normal_(std=scale, generator=torch.Generator(device).manual_seed(key))
    return noise


class Unroll(nn.Module):
    """Loss over the K model steps of windows of K + 1 frames.

    It owns the model, so that one forward of the (DDP-wrapped) objective spans the whole unroll.
    """

    def __init__(
        self,
        model: Surrogate,
        weights: LossSettings,
        finetune: FinetuneSettings | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        """`finetune` names the objective, None is one-step training; `autocast` is what products are cast to."""
        super().__init__()
        self.model = model
        self.weights = weights
        self.autocast = autocast
        self.kind = finetune.objective if finetune else "bptt"
        self.causal_eps = finetune.causal_eps if finetune else 0.0
        self.checkpoints = finetune is not None and finetune.checkpoint_activations

    def forward(
        self, fields: Tensor, constants: Tensor, forced: Tensor, dataset: str, noise: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """Losses of one batch.

        fields (B, K + 1, C, H, W) and constants (B, c, H, W) in raw units; forced (B, K) bool, where the input is the
        truth; noise (B, K, C, H, W), normalised, is added to inputs that are.
        Returns scalars: loss (with gradient), mse and wavelet_l1 (means over windows and model steps, detached).
        """
        # Not around the caller: DeepSpeed ends an autocast that it does not know of.
        with torch.autocast(fields.device.type, self.autocast, enabled=self.autocast is not None):
            terms = self._unrolled(fields, constants, forced, dataset, noise)
        total = torch.stack([term.total for term in terms])  # (K, B), or (1, B) for pushforward
        if self.kind == "causal_bptt":
            total = total * causal_weights(total, self.causal_eps)
        parts = {name: torch.stack([getattr(term, name) for term in terms]).mean() for name in ("mse", "wavelet_l1")}
        return {"loss": total.mean(), **parts}

    def _unrolled(
        self, fields: Tensor, constants: Tensor, forced: Tensor, dataset: str, noise: Tensor | None
    ) -> list[LossTerms]:
        """The losses of the model steps that have one."""
        fields = self.model.normalize(fields, dataset)
        constants = self.model.normalize_constants(constants, dataset)
        last = fields.shape[1] - 2
        terms = []
        prediction = fields[:, 0]
        for k in range(last + 1):
            truth = fields[:, k] if noise is None else fields[:, k] + noise[:, k]
            state = truth if k == 0 else torch.where(forced[:, k, None, None, None], truth, prediction)
            if self.kind == "pushforward" and k < last:
                with torch.no_grad():
                    prediction = self.model(state, constants, dataset)
                continue
            prediction = self._step(state, constants, dataset)
            terms.append(self._loss(prediction, fields[:, k + 1], dataset))
        return terms

    def _step(self, state: Tensor, constants: Tensor, dataset: str) -> Tensor:
        if not self.checkpoints:
            return self.model(state, constants, dataset)
        return checkpoint(self.model, state, constants, dataset, use_reentrant=False)

    def _loss(self, prediction: Tensor, target: Tensor, dataset: str) -> LossTerms:
        return wavelit_loss(
            prediction,
            target,
            self.model.residual_scale(dataset),
            mse_weight=self.weights.mse,
            wavelet_weight=self.weights.wavelet_l1,
            wavelet=self.model.wavelet,
        )


def causal_weights(losses: Tensor, eps: float) -> Tensor:
    """exp(-eps * sum of the losses of earlier steps), without gradient; losses and weights (K, B)."""
    losses = losses.detach()
    return torch.exp(-eps * (losses.cumsum(0) - losses))
