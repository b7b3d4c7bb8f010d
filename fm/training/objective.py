"""Training objectives: a model rolled out over a window, and the loss of its steps (paper Appendix G).

The length of an unroll, the inputs that are the truth, and the noise on them are functions of (seed, step, draw, place
in the global batch). They do not depend on the number of processes, and a continued run repeats them.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data_pipeline.errors import UserError
from data_pipeline.hashing import stream_key, uniform
from fm.config import FinetuneSettings, LossSettings
from fm.model.imports import ImportSettings, construct, import_class
from fm.model.loss import LossTerms, wavelit_loss
from fm.model.surrogate import Surrogate, next_frames

SIGMOID_STEEPNESS = 10.0


def unroll_length(step: int, steps: int, settings: FinetuneSettings | None, dataset: str) -> int:
    """Return the model steps K of a window of `dataset` at optimizer step `step` of `steps`; 1 in pretraining.

    With unroll_start, K grows by one at a time. Each length lasts an equal part of the first `unroll_growth` of the
    run. With unroll_random, each step but the last draws its K from 1 to this length. All datasets and processes take
    the same share of their range, so that processes finish a step together.
    """
    if settings is None:
        return 1
    full = settings.unroll_of(dataset)
    if settings.unroll_start is not None and settings.unroll_start < full:
        lengths = full - settings.unroll_start + 1
        grown = int(lengths * step / (settings.unroll_growth * steps))
        full = min(settings.unroll_start + grown, full)
    if settings.unroll_random and step < steps - 1:  # a dry run of the last step needs the memory of the longest
        full = 1 + int(full * uniform(stream_key("unroll length"), np.array([step], dtype=np.uint64))[0])
    return full


def forcing_prob(step: int, steps: int, settings: FinetuneSettings | None) -> float:
    """Return the probability that an input is the truth at optimizer step `step` of `steps`.

    It is 0 except for scheduled sampling. There it goes from forcing_start at the first step to forcing_end at the
    last: linearly, by half a cosine, or by the inverse sigmoid of Bengio et al. (2015), shifted and scaled.
    """
    if settings is None or settings.objective != "scheduled_sampling":
        return 0.0
    fraction = min(step / max(steps - 1, 1), 1.0)
    if settings.forcing == "linear":
        left = 1 - fraction
    elif settings.forcing == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * fraction))
    else:
        high, low, at = (1 / (1 + math.exp(SIGMOID_STEEPNESS * (x - 0.5))) for x in (0.0, 1.0, fraction))
        left = (at - low) / (high - low)
    return settings.forcing_end + (settings.forcing_start - settings.forcing_end) * left


def forcing_coins(seed: int, draw: int, batch: int, unroll_steps: int, prob: float) -> np.ndarray:
    """Return which inputs of a global batch are the truth, (batch, unroll_steps) bool. The first input always is."""
    slots = np.arange(batch * unroll_steps, dtype=np.uint64)
    coins = uniform(stream_key("teacher forcing", seed, draw), slots).reshape(batch, unroll_steps) < prob
    coins[:, 0] = True
    return coins


def input_noise(
    seed: int, draw: int, places: np.ndarray, shape: tuple[int, ...], scale: float, device: torch.device
) -> Tensor:
    """Return Gaussian noise of std `scale` for the windows at `places` of a draw, (len(places), *shape) float32.

    The noise is drawn on `device`, so CPUs and GPUs have different numbers.
    """
    noise = torch.empty(len(places), *shape, device=device)
    for row, place in enumerate(places.tolist()):
        key = int(stream_key("jitter", seed, draw, place)) >> 1  # torch takes 63 bits
        noise[row].normal_(std=scale, generator=torch.Generator(device).manual_seed(key))
    return noise


class Unroll(nn.Module):
    """Loss over the K model steps of windows of n + K frames, for a model of n input frames.

    Model step k = 1 ... K predicts frame n + k of the window from the n frames before it. Frames 1 ... n are the truth;
    a later input frame is the truth or the model's own prediction, and stays what it is while later steps read it. L_k
    is the loss of step k against the truth, and every mean is over the windows of a batch.

        scheduled_sampling  mean over k of L_k; each input is the truth with a probability (Bengio et al. 2015)
        bptt                mean over k of L_k; only the first n input frames are the truth
        causal_bptt         mean over k of exp(-eps * sum over j < k of L_j) L_k, the weights without gradient: later
                            steps count once earlier ones are right (Wang, Sankaran and Perdikaris 2024)
        pushforward         L_K, without gradient through the steps before K (Brandstetter, Worrall and Welling 2022)

    Gradients flow through predictions that are inputs, except for pushforward. K = 1 is one-step training for every
    objective. The class owns the model, so that one forward of the (DDP-wrapped) objective spans the whole unroll.
    """

    def __init__(
        self,
        model: Surrogate,
        loss: LossSettings | ImportSettings,
        finetune: FinetuneSettings | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Take the objective from `finetune`, or one-step training if None; `autocast` is the dtype of products.

        UserError if the class that `loss` imports cannot be made.
        """
        super().__init__()
        self.model = model
        self.weights = loss if isinstance(loss, LossSettings) else LossSettings()
        self.own_loss = None if isinstance(loss, LossSettings) else make_loss(loss, next(model.parameters()).device)
        self.autocast = autocast
        self.kind = finetune.objective if finetune else "bptt"
        self.causal_eps = finetune.causal_eps if finetune else 0.0
        self.checkpoints = finetune is not None and finetune.checkpoint_activations

    def forward(
        self,
        fields: Tensor,
        constants: Tensor,
        forced: Tensor,
        dataset: str,
        noise: Tensor | None = None,
        scalars: Tensor | None = None,
    ) -> Mapping[str, Tensor]:
        """Return the losses of one batch.

        fields (B, n + K, C, H, W) and constants (B, c, H, W) in raw units; forced (B, K) bool is True where the newest
        input frame of a step is the truth; noise (B, n + K - 1, C, H, W), normalized, is added to true input frames;
        scalars (B, P) as `Surrogate.normalize_scalars` returns them.
        Returns scalars: loss (with gradient), mse and wavelet_l1 (means over windows and model steps, detached).
        """
        # Autocast stands here and not around the caller, since DeepSpeed ends an autocast that it did not start.
        with torch.autocast(fields.device.type, self.autocast, enabled=self.autocast is not None):
            terms = self._unrolled(fields, constants, forced, dataset, noise, scalars)
        total = torch.stack([term.total for term in terms])  # (K, B), or (1, B) for pushforward
        if self.kind == "causal_bptt":
            total = total * causal_weights(total, self.causal_eps)
        parts = {name: torch.stack([getattr(term, name) for term in terms]).mean() for name in ("mse", "wavelet_l1")}
        return {"loss": total.mean(), **parts}

    def _unrolled(
        self,
        fields: Tensor,
        constants: Tensor,
        forced: Tensor,
        dataset: str,
        noise: Tensor | None,
        scalars: Tensor | None,
    ) -> list[LossTerms]:
        """Return the losses of the model steps that have one: all, or for pushforward the last."""
        fields = self.model.normalize(fields, dataset)
        constants = self.model.normalize_constants(constants, dataset)
        context, last = self.model.context, fields.shape[1] - self.model.context - 1
        inputs = fields[:, :-1] if noise is None else fields[:, :-1] + noise
        given = () if scalars is None else (scalars,)
        terms: list[LossTerms] = []
        frames = inputs[:, :context]
        prediction = frames[:, -1]
        for k in range(last + 1):
            if k > 0:
                truth = inputs[:, context + k - 1]
                frames = next_frames(frames, torch.where(forced[:, k, None, None, None], truth, prediction))
            if self.kind == "pushforward" and k < last:
                with torch.no_grad():
                    prediction = self.model(frames, constants, dataset, *given)
                continue
            if self.checkpoints:
                prediction = checkpoint(self.model, frames, constants, dataset, *given, use_reentrant=False)
            else:
                prediction = self.model(frames, constants, dataset, *given)
            terms.append(self._loss(prediction, fields[:, context + k], self.model.residual_scale(dataset)))
        return terms

    def _loss(self, prediction: Tensor, target: Tensor, scale: Tensor) -> LossTerms:
        """Return the loss of one model step; `total` is the recipe's own loss where it imports one."""
        terms = wavelit_loss(
            prediction if self.own_loss is None else prediction.detach(),
            target,
            scale,
            mse_weight=self.weights.mse,
            wavelet_weight=self.weights.wavelet_l1,
            wavelet=self.model.wavelet,
            rmse_weight=self.weights.rmse,
            levels=self.model.levels,
        )
        if self.own_loss is None:
            return terms
        with torch.autocast(prediction.device.type, enabled=False):
            value = self.own_loss(prediction.float() * scale, target.float() * scale)
        if not isinstance(value, Tensor) or value.shape[:1] not in ((), (len(prediction),)):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"loss.import: expected {type(self.own_loss).__name__} to return a number, or one for each of the "
                f"{len(prediction)} windows, got {found}"
            )
        total = value.expand(len(prediction)) if value.ndim == 0 else value.reshape(len(prediction), -1).mean(1)
        return terms._replace(total=total)


def make_loss(settings: ImportSettings, device: torch.device) -> nn.Module:
    """Return the loss that a recipe imports: a torch.nn.Module that is made as `cls(**args)`.

    It is called as `loss(prediction, target)`, both (B, C, H, W) float32, normalized, and divided by the standard
    deviation of the change if the model predicts changes. It returns one number per window (B,), which may have more
    axes, whose mean is taken, or the mean over the windows. UserError if it cannot be made.
    """
    cls: type[nn.Module] = import_class(settings, nn.Module, "loss.import")
    return construct(cls, settings, "loss").to(device).requires_grad_(False)


def causal_weights(losses: Tensor, eps: float) -> Tensor:
    """Return exp(-eps * sum of the losses of earlier steps), without gradient; losses and weights are (K, B)."""
    losses = losses.detach()
    return torch.exp(-eps * (losses.cumsum(0) - losses))
