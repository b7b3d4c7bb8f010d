"""Training objectives: a model rolled out over a window, and the loss of its steps (paper Appendix G).

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

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fm.losses import LossTerms, wavelit_loss
from fm.settings import FinetuneSettings, LossSettings
from fm.surrogate import Surrogate


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
        fields = self.model.normalise(fields, dataset)
        constants = self.model.normalise_constants(constants, dataset)
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
