"""Training objectives: a model rolled out over a window, and the loss of its steps.

The objective owns the model, so that one forward of the (DDP-wrapped) objective spans the whole unroll.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.hashing import stream_key, uniform
from fm.losses import wavelit_loss
from fm.model import WaveLiTFM
from fm.settings import FinetuneSettings, LossSettings


def forcing_prob(step: int, steps: int, settings: FinetuneSettings) -> float:
    """Probability of teacher forcing at optimiser step `step` of `steps`: linear from forcing_start to forcing_end."""
    fraction = step / max(steps - 1, 1)
    return settings.forcing_start + (settings.forcing_end - settings.forcing_start) * min(fraction, 1.0)


def forcing_coins(seed: int, draw: int, batch: int, unroll_steps: int, prob: float) -> np.ndarray:
    """Which inputs of a global batch are the truth: (batch, unroll_steps) bool.

    The first input always is. A coin is a hash of (seed, draw, slot in the global batch, model step), so it does not
    depend on the number of processes and a resumed run throws the same ones.
    """
    slots = np.arange(batch * unroll_steps, dtype=np.uint64)
    coins = uniform(stream_key("teacher forcing", seed, draw), slots).reshape(batch, unroll_steps) < prob
    coins[:, 0] = True
    return coins


class Unroll(nn.Module):
    """Mean loss over the K model steps of a window of K + 1 frames.

    Each step's input is the truth where `forced`, else the model's own prediction, through which gradients flow
    (scheduled sampling, paper Appendix G). K = 1 is one-step pretraining.
    """

    def __init__(self, model: WaveLiTFM, weights: LossSettings, autocast: torch.dtype | None = None) -> None:
        """`autocast` is what matrix products are cast to, if anything."""
        super().__init__()
        self.model = model
        self.weights = weights
        self.autocast = autocast

    def forward(self, fields: Tensor, constants: Tensor, forced: Tensor, dataset: str) -> Mapping[str, Tensor]:
        """Losses of one batch.

        fields (B, K + 1, C, H, W) and constants (B, c, H, W) in raw units, forced (B, K) bool.
        Returns scalars: loss (with gradient), mse and wavelet_l1 (unweighted, detached).
        """
        # Not around the caller: DeepSpeed ends an autocast that it does not know of.
        with torch.autocast(fields.device.type, self.autocast, enabled=self.autocast is not None):
            return self._losses(fields, constants, forced, dataset)

    def _losses(self, fields: Tensor, constants: Tensor, forced: Tensor, dataset: str) -> Mapping[str, Tensor]:
        fields = self.model.normalise(fields, dataset)
        constants = self.model.normalise_constants(constants, dataset)
        scale = self.model.residual_scale(dataset)
        terms = []
        prediction = fields[:, 0]
        for k in range(fields.shape[1] - 1):
            truth = forced[:, k, None, None, None]
            state = fields[:, k] if k == 0 else torch.where(truth, fields[:, k], prediction)
            prediction = self.model(state, constants, dataset)
            terms.append(
                wavelit_loss(
                    prediction,
                    fields[:, k + 1],
                    scale,
                    mse_weight=self.weights.mse,
                    wavelet_weight=self.weights.wavelet_l1,
                    wavelet=self.model.config.wavelet,
                )
            )
        mean = {name: torch.stack([getattr(t, name) for t in terms]).mean() for name in ("total", "mse", "wavelet_l1")}
        return {"loss": mean["total"], "mse": mean["mse"].detach(), "wavelet_l1": mean["wavelet_l1"].detach()}
