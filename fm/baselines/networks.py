"""The baselines' networks by name: fields (B, dim_in, H, W) to (B, dim_out, H, W), on any grid of their multiple.

U-Nets, FNO and TFNO of the_well know no grid. AViT learns a position for each patch; here these are of an 8 x 8 grid
and interpolated to the patches that a field has. UNetClassic's batch norms become group norms of one group: over the
windows of one dataset a batch norm takes away what tells the dataset, and its running averages mix all of them.
"""

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fm.baselines.config import BaselineConfig
from fm.baselines.upstream import upstream_class
from fm.baselines.wno import WNO

UPSTREAM = {
    "unet_convnext": "UNetConvNext",
    "unet_classic": "UNetClassic",
    "fno": "FNO",
    "tfno": "TFNO",
    "avit": "AViT",
}
FLOAT32 = ("fno", "tfno", "wno")  # Fourier and wavelet transforms need it
PATCH = 16  # of AViT
POSITIONS = 8  # patches along each side of the grid that AViT's positions are learnt on


def build_network(config: BaselineConfig, dim_in: int, dim_out: int) -> nn.Module:
    """A new network, its weights drawn by its own code from torch's generator. UserError if a package is missing."""
    if config.name == "wno":
        return WNO(dim_in, dim_out, **config.sizes)
    side = PATCH * POSITIONS  # read by AViT alone
    network = upstream_class(config.name, UPSTREAM[config.name])(
        dim_in=dim_in, dim_out=dim_out, n_spatial_dims=2, spatial_resolution=(side, side), **config.sizes
    )
    if config.name == "avit":
        return AnyGridAViT(network)
    return _with_group_norms(network)


def grid_multiple(config: BaselineConfig) -> int:
    """What the sides of the network's grids must be multiples of."""
    return {"unet_convnext": 2 ** config.sizes.get("stages", 0), "unet_classic": 16, "avit": PATCH}.get(config.name, 1)


class AnyGridAViT(nn.Module):
    """The_well's AViT with its positions interpolated to the patches of the field, and channels first."""

    def __init__(self, avit: nn.Module) -> None:
        super().__init__()
        self.avit = avit

    def forward(self, x: Tensor) -> Tensor:
        patches = (x.shape[-2] // PATCH, x.shape[-1] // PATCH)
        learnt = self.avit.get_parameter("absolute_pe").movedim(-1, 0)  # (D, 8, 8)
        positions = F.interpolate(learnt[None], size=patches, mode="bilinear", align_corners=False)[0].movedim(0, -1)
        output = functional_call(self.avit, {"absolute_pe": positions}, (x.movedim(1, -1),))
        return output.movedim(-1, 1)


def _with_group_norms(network: nn.Module) -> nn.Module:
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    return network
