"""What defines a baseline: its name and sizes.

The_well's benchmark models, imported one by one.

The package that holds them imports all eight when it is imported, and with them timm and torchvision (which must be
built for exactly this torch), wandb and torch_harmonics. The five models taken here need nothing of these: timm's
DropPath at rates above 0 only, wandb for plots, torch_harmonics on spheres. So while a model's file is imported, its
package and neuralop are there without having been run, and the packages it does not use are empty.

A Wavelet Neural Operator (Tripura and Chakraborty 2022) whose weights do not depend on the grid.

    v_0 = P u,   v_{j+1} = GELU( W^-1[ R_j W v_j ] + K_j v_j ),   output = Q v_n

W is a discrete wavelet transform of several levels, K_j a 1 x 1 convolution, P and Q pointwise networks. R_j acts on
the approximation and the three details of the coarsest level and leaves finer details as they are, as published; there
it has a matrix for each coefficient, which ties it to one grid, here one matrix for each of the four subbands.

The baselines' networks by name: fields (B, dim_in, H, W) to (B, dim_out, H, W), on any grid of their multiple.

U-Nets, FNO and TFNO of the_well know no grid. AViT learns a position for each patch; here these are of an 8 x 8 grid
and interpolated to the patches that a field has. UNetClassic's batch norms become group norms of one group: over the
windows of one dataset a batch norm takes away what tells the dataset, and its running averages mix all of them.

A baseline as a surrogate: one network for all its datasets.

It reads the union of the datasets' canonical channels, each in its own slot, zero where a dataset has none, and the
dataset as one-hot channels; it writes the union of the state channels, of which a dataset's own are taken. What comes
out is a change or a state in the units that WaveLiT's heads have, so trainer, loss and scores are the same.
"""

import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

import ptwt
import pywt
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from data_pipeline.files import UserError
from fm.model.files import BASELINE
from fm.model.spec import DatasetSpec, check_keys
from fm.model.surrogate import Surrogate
from fm.model.wavelets import WAVELETS

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
AVIT_GROUPS = 12  # of the_well's group norms in the patch embedding, over hidden_dim / 4 channels


@dataclass(frozen=True)
class BaselineConfig:
    """A baseline by name; what it is trained towards is what WaveLiT is."""

    name: str  # unet_convnext, unet_classic, fno, tfno, avit or wno
    sizes: Mapping[str, int] = field(default_factory=dict)  # those that differ from SIZES; resolved, all of them
    wavelet: str = "bior2.2"  # of the loss: haar, bior2.2 or bior4.4
    predict: str = "delta"  # delta (the change, in units of its own std) or state (the next frame)

    def __post_init__(self) -> None:
        choices = {"name": tuple(SIZES), "wavelet": tuple(WAVELETS), "predict": ("delta", "state")}
        for key, valid in choices.items():
            if getattr(self, key) not in valid:
                raise ValueError(f"baseline.{key} must be one of {', '.join(valid)}, got {getattr(self, key)!r}")
        for key, value in self.sizes.items():
            if key not in SIZES[self.name]:
                known = ", ".join(SIZES[self.name])
                raise ValueError(f"baseline.sizes: {self.name} has the sizes {known}, got {key!r}")
            if value < 1:
                raise ValueError(f"baseline.sizes.{key} must be at least 1, got {value}")
        sizes = {**SIZES[self.name], **self.sizes}
        if self.name == "avit":
            width, heads = sizes["hidden_dim"], sizes["num_heads"]
            if width % (4 * AVIT_GROUPS) or width % heads:
                raise ValueError(
                    f"baseline.sizes.hidden_dim of avit must be a multiple of {4 * AVIT_GROUPS} and of num_heads, got "
                    f"{width} with {heads} heads"
                )
        object.__setattr__(self, "sizes", sizes)  # so that files say all of them

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> "BaselineConfig":
        """Inverse of `to_json`. ValueError, naming `where`, for unknown or missing keys."""
        check_keys(f"config of {where}", value, (f.name for f in fields(cls)))
        return cls(**value)


MODELS = "the_well.benchmark.models"
INSTALL = "run ./launch/setup baselines (or pip install 'wavelit-fm[baselines]')"
# Module -> what is imported from it and never used.
UNUSED = {
    "timm": (),
    "timm.layers": ("DropPath",),
    "timm.models": (),
    "timm.models.layers": ("DropPath",),
    "torch_harmonics": ("RealSHT", "InverseRealSHT"),
    "wandb": (),
}


def upstream_class(module: str, name: str) -> type:
    """The class `name` of the_well's model `module`. UserError if what it needs is not installed."""
    try:
        with _alone():
            return getattr(importlib.import_module(f"{MODELS}.{module}"), name)
    except ImportError as error:
        raise UserError(f"the baseline {module} needs packages that are not installed ({error}): {INSTALL}") from error


@contextmanager
def _alone() -> Iterator[None]:
    """Within it, imports find stand-ins for the packages above; after it, what was there before."""
    stand_ins = {name: _empty(name, unused) for name, unused in UNUSED.items()}
    for package in (MODELS, "neuralop"):
        spec = find_spec(package)
        if spec is not None:
            stand_ins[package] = module_from_spec(spec)
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def _empty(name: str, unused: tuple[str, ...]) -> ModuleType:
    module = ModuleType(name)
    for attribute in unused:
        setattr(module, attribute, None)
    return module


WAVELET = "db4"  # the paper's, with symmetric extension
PROJECTION = 128  # hidden channels of Q, as published


class WaveletMixing(nn.Module):
    """W^-1[ R W v ] with a channel matrix for each subband of the coarsest level."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.weights = nn.Parameter(torch.randn(4, width, width) / width**0.5)  # of LL, LH, HL, HH

    def forward(self, v: Tensor) -> Tensor:
        """(B, D, H, W) to the same, float32. A grid too small for all levels has as many as it has room for."""
        height, width = v.shape[-2:]
        levels = max(1, min(self.levels, pywt.dwtn_max_level((height, width), WAVELET)))
        approximation, coarsest, *finer = ptwt.wavedec2(v, WAVELET, mode="symmetric", level=levels)
        subbands = torch.stack([approximation, *coarsest])  # (4, B, D, h, w)
        mixed = torch.einsum("sbihw,sio->sbohw", subbands, self.weights).unbind()
        coefficients = (mixed[0], ptwt.WaveletDetailTuple2d(*mixed[1:]), *finer)
        return ptwt.waverec2(coefficients, WAVELET)[..., :height, :width]


class WNO(nn.Module):
    """Fields (B, dim_in, H, W) to (B, dim_out, H, W) on any grid; float32 whatever the autocast state."""

    def __init__(self, dim_in: int, dim_out: int, width: int, depth: int, levels: int) -> None:
        super().__init__()
        self.lifting = nn.Conv2d(dim_in, width, 1)
        self.mixings = nn.ModuleList(WaveletMixing(width, levels) for _ in range(depth))
        self.pointwise = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(depth))
        self.projection = nn.Sequential(nn.Conv2d(width, PROJECTION, 1), nn.GELU(), nn.Conv2d(PROJECTION, dim_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        v = self.lifting(x)
        for mixing, pointwise in zip(self.mixings, self.pointwise, strict=True):
            v = F.gelu(mixing(v) + pointwise(v))
        return self.projection(v)


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


class Baseline(Surrogate):
    """The baseline for the given datasets; `seed` draws the initial weights."""

    section = "baseline"
    config: BaselineConfig

    def __init__(self, config: BaselineConfig, datasets: Sequence[DatasetSpec], seed: int = 0) -> None:
        super().__init__(datasets, config.predict, {}, config.wavelet)
        self.config = config
        self.blocks = nn.ModuleList()
        specs = self.specs.values()
        self.inputs = sorted({c for spec in specs for c in (*spec.state_channels, *spec.constant_channels)})
        self.outputs = sorted({c for spec in specs for c in spec.state_channels})
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.network = build_network(config, len(self.inputs) + len(self.specs), len(self.outputs))

    def output(self, state: Tensor, constants: Tensor, spec: DatasetSpec) -> Tensor:
        """What the network says of the dataset's state channels, (B, C, H, W); see `Surrogate.output`."""
        height, width = state.shape[-2:]
        x = _padded(self._joint_input(state, constants, spec), grid_multiple(self.config), spec.periodic)
        device = x.device.type
        autocast = torch.is_autocast_enabled(device) and self.config.name not in FLOAT32
        with torch.autocast(device, enabled=autocast):
            output = self.network(x)
        own = [self.outputs.index(name) for name in spec.state_channels]
        return output[:, own, :height, :width].float()

    def _joint_input(self, state: Tensor, constants: Tensor, spec: DatasetSpec) -> Tensor:
        """The dataset's channels in their slots, zeros, and the one-hot dataset: (B, inputs + datasets, H, W)."""
        fields = torch.cat([state, constants], dim=1).float()
        names = (*spec.state_channels, *spec.constant_channels)
        x = fields.new_zeros(len(fields), len(self.inputs) + len(self.specs), *fields.shape[-2:])
        x[:, [self.inputs.index(name) for name in names]] = fields
        x[:, len(self.inputs) + list(self.specs).index(spec.name)] = 1.0
        return x

    def adapted_to(self, datasets: Sequence[DatasetSpec]) -> "Baseline":
        """This model, all its datasets included: its slots are those of their union. ValueError for a dataset more."""
        self._check_channels(datasets)
        unknown = [spec.name for spec in datasets if spec.name not in self.specs]
        if unknown:
            raise ValueError(
                f"a baseline has input and output slots for the datasets it was made for ({', '.join(self.specs)}), "
                f"none for {', '.join(unknown)}: train one on all of them"
            )
        adapted = {spec.name: spec for spec in self._as_known(datasets)}
        model = Baseline(self.config, [adapted.get(name, spec) for name, spec in self.specs.items()])
        model.load_state_dict(self.state_dict())
        return model

    def description(self) -> dict[str, Any]:
        """What model.json holds: as a WaveLiT's, and the baseline's name."""
        return {BASELINE: self.config.name, **super().description()}

    @classmethod
    def _described(cls, description: Mapping[str, Any], where: str) -> "Baseline":
        config = BaselineConfig.from_json(description["config"], where)
        return cls(config, [DatasetSpec.from_json(spec) for spec in description["datasets"]])

    def _sizes(self) -> str:
        return ", ".join([self.config.name, *(f"{name} {value}" for name, value in self.config.sizes.items())])


def _padded(x: Tensor, multiple: int, periodic: tuple[bool, bool]) -> Tensor:
    """Fields extended at their upper ends to multiples: by the lower end on a periodic axis, else by the last value."""
    for dim, wraps in zip((-2, -1), periodic, strict=True):
        side = x.shape[dim]
        if side % multiple:
            longer = torch.arange(side + -side % multiple, device=x.device)
            x = x.index_select(dim, longer % side if wraps else longer.clamp_max(side - 1))
    return x
