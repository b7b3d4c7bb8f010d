"""A network and a loss of your own, for recipes/tutorials/own_network.yaml; fm/model/network.py states the contract."""

from torch import Tensor, nn
from torch.nn import functional as F


class OwnNetwork(nn.Module):
    """Convolutions on half the grid, for any number of channels."""

    grid_multiple = 2  # fields are extended to even sides

    def __init__(self, dim_in: int, dim_out: int, width: int = 32) -> None:
        super().__init__()
        self.down = nn.Conv2d(dim_in, width, 4, stride=2, padding=1, padding_mode="circular")
        self.mix = nn.Conv2d(width, width, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose2d(width, dim_out, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized fields (B, dim_in, H, W) to normalized changes (B, dim_out, H, W)."""
        x = F.gelu(self.down(x))
        return self.up(x + F.gelu(self.mix(x)))


class OwnLoss(nn.Module):
    """Huber loss of the fields, and of their means, one number per window."""

    def __init__(self, mean_weight: float = 0.1) -> None:
        super().__init__()
        self.mean_weight = mean_weight

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Map normalized fields (B, C, H, W) to losses (B,)."""
        fields = F.huber_loss(prediction, target, reduction="none").mean((1, 2, 3))
        means = F.huber_loss(prediction.mean((2, 3)), target.mean((2, 3)), reduction="none").mean(1)
        return fields + self.mean_weight * means
