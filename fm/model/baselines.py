"""Baselines: networks to compare WaveLiT with, trained by the same trainer, loss and scores.

    unet_convnext, unet_classic, fno, tfno, avit   the_well's benchmark models
    wno                                            a Wavelet Neural Operator, written here

One network serves all its datasets. It reads the union of their canonical channels and frames, each in its own slot,
zero where a dataset has none, and the dataset as one-hot channels. It writes the union of the state channels, of which
a dataset's own are taken, as a change or a state in the units that WaveLiT's heads have.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any, Literal

import ptwt
import pywt
import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from data_pipeline.errors import UserError
from fm.model.files import BASELINE
from fm.model.spec import STRICT, DatasetSpec, Predict, Wavelet
from fm.model.surrogate import Surrogate

# Name -> sizes and their defaults. Those of the_well's models are arguments of its classes, with its values; where it
# has none (modes1, modes2), those of its benchmark.
SIZES: dict[str, dict[str, int]] = {
    "unet_convnext": {"stages": 4, "blocks_per_stage": 1, "blocks_at_neck": 1, "init_features": 32},
    "unet_classic": {"init_features": 32},
    "fno": {"modes1": 16, "modes2": 16, "hidden_channels": 64},
    "tfno": {"modes1": 16, "modes2": 16, "hidden_channels": 64},
    "avit": {"hidden_dim": 768, "num_heads": 12, "processor_blocks": 8},
    "wno": {"width": 64, "depth": 4, "levels": 4},
}
UPSTREAM = {
    "unet_convnext": "UNetConvNext",
    "unet_classic": "UNetClassic",
    "fno": "FNO",
    "tfno": "TFNO",
    "avit": "AViT",
}
FLOAT32 = ("fno", "tfno", "wno")  # Fourier and wavelet transforms need it
AVIT_GROUPS = 12  # of the_well's group norms in the patch embedding, over hidden_dim / 4 channels
AVIT_PATCH = 16
AVIT_POSITIONS = 8  # patches along each side of the grid on which AViT's positions are learned


@dataclass(frozen=True, config=STRICT)
class BaselineConfig:
    """A baseline by name, and its training target, as WaveLiT has it."""

    name: Literal["unet_convnext", "unet_classic", "fno", "tfno", "avit", "wno"]
    sizes: Mapping[str, PositiveInt] = field(default_factory=dict)  # given: those that differ from SIZES
    wavelet: Wavelet = "bior2.2"  # of the loss
    predict: Predict = "delta"  # delta (the change, in units of its own std) or state (the next frame)

    def __post_init__(self) -> None:
        for key in self.sizes:
            if key not in SIZES[self.name]:
                known = ", ".join(SIZES[self.name])
                raise ValueError(f"sizes: {self.name} has the sizes {known}, got {key!r}")
        sizes = {**SIZES[self.name], **self.sizes}
        if self.name == "avit":
            width, heads = sizes["hidden_dim"], sizes["num_heads"]
            if width % (4 * AVIT_GROUPS) or width % heads:
                raise ValueError(
                    f"sizes.hidden_dim of avit must be a multiple of {4 * AVIT_GROUPS} and of num_heads, got "
                    f"{width} with {heads} heads"
                )
        object.__setattr__(self, "sizes", sizes)  # files hold all of them, so that a default may change


class WaveletMixing(nn.Module):
    """Transform by a wavelet, mix channels by one matrix R for each subband of the coarsest level, transform back.

    Finer details stay as they are, as published. There R has a matrix for each coefficient, which ties it to one grid.
    """

    wavelet = "db4"  # the paper's, with symmetric extension

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.weights = nn.Parameter(torch.randn(4, width, width) / width**0.5)  # of LL, LH, HL, HH

    def forward(self, v: Tensor) -> Tensor:
        """Map (B, D, H, W) to the same shape, float32. A small grid gets as many levels as it has room for."""
        height, width = v.shape[-2:]
        levels = max(1, min(self.levels, pywt.dwtn_max_level((height, width), self.wavelet)))
        approximation, coarsest, *finer = ptwt.wavedec2(v, self.wavelet, mode="symmetric", level=levels)
        subbands = torch.stack([approximation, *coarsest])  # (4, B, D, h, w)
        mixed = torch.einsum("sbihw,sio->sbohw", subbands, self.weights).unbind()
        coefficients = (mixed[0], ptwt.WaveletDetailTuple2d(*mixed[1:]), *finer)
        return ptwt.waverec2(coefficients, self.wavelet)[..., :height, :width]


class WNO(nn.Module):
    """Wavelet Neural Operator (Tripura and Chakraborty 2022) with weights that do not depend on the grid.

        v_0 = P u,   v_{j+1} = GELU( W^-1[ R_j W v_j ] + K_j v_j ),   output = Q v_n

    W is a wavelet transform of several levels, K_j a 1 x 1 convolution, P and Q are pointwise networks.
    """

    projection_width = 128  # hidden channels of Q, as published

    def __init__(self, dim_in: int, dim_out: int, width: int, depth: int, levels: int) -> None:
        super().__init__()
        hidden = self.projection_width
        self.lifting = nn.Conv2d(dim_in, width, 1)
        self.mixings = nn.ModuleList(WaveletMixing(width, levels) for _ in range(depth))
        self.pointwise = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(depth))
        self.projection = nn.Sequential(nn.Conv2d(width, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map fields (B, dim_in, H, W) on any grid to (B, dim_out, H, W)."""
        v = self.lifting(x)
        for mixing, pointwise in zip(self.mixings, self.pointwise, strict=True):
            v = F.gelu(mixing(v) + pointwise(v))
        return self.projection(v)


class AnyGridAViT(nn.Module):
    """The_well's AViT, which learns a position for each patch, on any grid of its patches, and channels first.

    Positions are learned on a grid of 8 x 8 patches and interpolated to the patches of the field.
    """

    def __init__(self, avit: nn.Module) -> None:
        super().__init__()
        self.avit = avit

    def forward(self, x: Tensor) -> Tensor:
        """Map fields (B, dim_in, H, W) to (B, dim_out, H, W)."""
        patches = (x.shape[-2] // AVIT_PATCH, x.shape[-1] // AVIT_PATCH)
        learned = self.avit.get_parameter("absolute_pe").movedim(-1, 0)  # (D, 8, 8)
        positions = F.interpolate(learned[None], size=patches, mode="bilinear", align_corners=False)[0].movedim(0, -1)
        output = functional_call(self.avit, {"absolute_pe": positions}, (x.movedim(1, -1),))
        return output.movedim(-1, 1)


MODELS = "the_well.benchmark.models"
INSTALL = "run ./launch/setup baselines (or pip install 'wavelit-fm[baselines]')"
# Modules that the_well's package imports, with the names it takes from them. The models here use none of these: timm's
# DropPath at rates above 0 only, wandb for plots, torch_harmonics on spheres.
UNUSED = {
    "timm": [],
    "timm.layers": ["DropPath"],
    "timm.models": [],
    "timm.models.layers": ["DropPath"],
    "torch_harmonics": ["RealSHT", "InverseRealSHT"],
    "wandb": [],
}


def upstream_class(module: str, name: str) -> type:
    """Return the class `name` of the_well's model `module`. UserError if a package that it needs is not installed."""
    try:
        with _stand_ins():
            return getattr(importlib.import_module(f"{MODELS}.{module}"), name)
    except ImportError as error:
        raise UserError(f"the baseline {module} needs packages that are not installed ({error}): {INSTALL}") from error


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Let the_well's model files be imported one by one within the block; imported modules are as before after it.

    The package that holds them imports all eight, and with them timm, torchvision (which must be built for exactly this
    torch), wandb and torch_harmonics. Within the block it and neuralop are there without having been run, and the
    packages in UNUSED are empty.
    """
    modules = {name: ModuleType(name) for name in UNUSED}
    for name, unused in UNUSED.items():
        vars(modules[name]).update(dict.fromkeys(unused))
    for spec in filter(None, map(find_spec, (MODELS, "neuralop"))):
        modules[spec.name] = module_from_spec(spec)
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def build_network(config: BaselineConfig, dim_in: int, dim_out: int) -> nn.Module:
    """Return a new network: fields (B, dim_in, H, W) to (B, dim_out, H, W), on any grid of `grid_multiple`.

    Its own code draws its weights from torch's generator. UserError if a package is missing.
    """
    if config.name == "wno":
        return WNO(dim_in, dim_out, **config.sizes)
    side = AVIT_PATCH * AVIT_POSITIONS  # the other models do not read it
    network = upstream_class(config.name, UPSTREAM[config.name])(
        dim_in=dim_in, dim_out=dim_out, n_spatial_dims=2, spatial_resolution=(side, side), **config.sizes
    )
    if config.name == "avit":
        return AnyGridAViT(network)
    # UNetClassic's batch norms become group norms of one group: over the windows of one dataset a batch norm takes away
    # what distinguishes the dataset, and its running averages mix all of them.
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    return network


def grid_multiple(config: BaselineConfig) -> int:
    """Return the number that the sides of the network's grids must be multiples of."""
    multiples = {"unet_convnext": 2 ** config.sizes.get("stages", 0), "unet_classic": 16, "avit": AVIT_PATCH}
    return multiples.get(config.name, 1)


class Baseline(Surrogate):
    """The baseline for the given datasets; `seed` draws the initial weights."""

    section = BASELINE
    config_class = BaselineConfig
    config: BaselineConfig

    def __init__(
        self, config: BaselineConfig, datasets: Sequence[DatasetSpec], seed: int = 0, context: int = 1
    ) -> None:
        super().__init__(datasets, config.predict, {}, config.wavelet, context)
        self.config = config
        self.blocks = nn.ModuleList()
        specs = self.specs.values()
        self.slots = sorted({name for spec in specs for name in spec.inputs(context)})
        self.outputs = sorted({name for spec in specs for name in spec.state_channels})
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.network = build_network(config, len(self.slots) + len(self.specs), len(self.outputs))

    def output(self, inputs: Tensor, spec: DatasetSpec, scalars: Tensor | None = None) -> Tensor:
        """Return the network's output (B, C, H, W) for the dataset's state channels; see `Surrogate.output`."""
        height, width = inputs.shape[-2:]
        x = _padded(self._joint_input(inputs, spec), grid_multiple(self.config), spec.periodic)
        device = x.device.type
        autocast = torch.is_autocast_enabled(device) and self.config.name not in FLOAT32
        with torch.autocast(device, enabled=autocast):
            output = self.network(x)
        own = [self.outputs.index(name) for name in spec.state_channels]
        return output[:, own, :height, :width].float()

    def _joint_input(self, inputs: Tensor, spec: DatasetSpec) -> Tensor:
        """Put the dataset's inputs in their slots, beside the one-hot dataset: (B, slots + datasets, H, W)."""
        x = inputs.new_zeros(len(inputs), len(self.slots) + len(self.specs), *inputs.shape[-2:])
        x[:, [self.slots.index(name) for name in spec.inputs(self.context)]] = inputs
        x[:, len(self.slots) + list(self.specs).index(spec.name)] = 1.0
        return x

    def adapted_to(self, datasets: Sequence[DatasetSpec]) -> "Baseline":
        """Return this model with all its datasets, whose union its slots are. ValueError for another dataset."""
        adapted = {spec.name: spec for spec in self._adapted_specs(datasets)}
        unknown = [name for name in adapted if name not in self.specs]
        if unknown:
            raise ValueError(
                f"a baseline has input and output slots for the datasets it was made for ({', '.join(self.specs)}), "
                f"none for {', '.join(unknown)}: train one on all of them"
            )
        specs = [adapted.get(name, spec) for name, spec in self.specs.items()]
        model = Baseline(self.config, specs, context=self.context)
        model.load_state_dict(self.state_dict())
        return model

    def description(self) -> dict[str, Any]:
        """Return the content of model.json: as a WaveLiT's, and the baseline's name."""
        return {BASELINE: self.config.name, **super().description()}

    def _sizes(self) -> str:
        return ", ".join([self.config.name, *(f"{name} {value}" for name, value in self.config.sizes.items())])


def _padded(x: Tensor, multiple: int, periodic: tuple[bool, bool]) -> Tensor:
    """Extend fields at their upper ends to multiples: by the lower end on a periodic axis, else by the last value."""
    for dim, wraps in zip((-2, -1), periodic, strict=True):
        side = x.shape[dim]
        if side % multiple:
            longer = torch.arange(side + -side % multiple, device=x.device)
            x = x.index_select(dim, longer % side if wraps else longer.clamp_max(side - 1))
    return x
