"""WaveLiT and WaveLiT-FM: one-step surrogates of 2D PDEs that mix wavelet tokens by ridge-corrected linear attention.

What is special:
- tokens are wavelet coefficients of the dataset's own channels, embedded by rows that belong to canonical channels;
- every dataset has a task vector and an output head, and everything between is shared. All are keyed by name: the order
  in which datasets are listed changes neither the initial weights nor an output. PDE parameters may add to the task
  vector (fm/model/scalars.py);
- a dataset may also have low-rank updates of the blocks' matrices (`adapter_rank`), which start at zero;
- each block runs on a pyramid of token grids with the same weights, on any even grid from 16 x 16;
- a bespoke WaveLiT is the same class with one dataset;
- instead of the paper's linear heads, two convolutions at full resolution can make the output (`decoder: conv`).

Fields are (B, C, H, W). Statistics, wavelets, embedding, heads, norms and the ridge solve are float32 whatever the
autocast state. Embedding and heads are about a thousandth of the products.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import sqrt
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fm.model.attention import Linear, linear
from fm.model.block import Block, BlockAdapter, Pyramid, pad_fields, pyramid_tables
from fm.model.scalars import ScalarEmbedding
from fm.model.spec import DatasetSpec, ModelConfig
from fm.model.surrogate import Surrogate
from fm.model.wavelets import NOT_PERIODIC, Periodic, analysis, patches, synthesis, unpatches

# Initial weights, see init_weights.
EMBEDDING_STD = 0.2
TASK_STD = 0.1
CPE_GAIN = 0.15  # of the usual 1/3: these convolutions act on the residual stream itself, twice a block
COARSE_INIT = 0.1  # weight of each coarse level beside 1 for the fine one
# AdamW moves every number by about the learning rate; with this factor a pointwise map, whose entries are about 1 where
# it matters, gets there in hundreds of steps.
POINTWISE_GAIN = 10.0


class ChannelEmbedding(nn.Module):
    """Map wavelet coefficients to tokens through rows (S, D) of each canonical channel (WaveLiT-FM, section 3.5).

        x_n = sum over the present channels c and subbands s of W[c][s] * coefficient[c, s, n],   no bias

    The change of a channel from an earlier frame has rows of its own (`DatasetSpec.inputs` names it). Gathering the
    rows of the present channels equals padding absent channels with zeros, without the work.
    """

    def __init__(self, channels: Iterable[str], subbands: int, width: int) -> None:
        super().__init__()
        names = sorted(set(channels))
        self.rows = nn.ParameterDict({name: nn.Parameter(torch.zeros(subbands, width)) for name in names})

    def forward(self, coefficients: Tensor, channels: Sequence[str]) -> Tensor:
        """Map coefficients (B, C, S, h, w) of the named channels to tokens (B, h, w, D)."""
        weight = torch.cat([self.rows[name] for name in channels])  # (C * S, D)
        with torch.autocast(coefficients.device.type, enabled=False):
            return linear(coefficients.to(weight.dtype).flatten(1, 2).permute(0, 2, 3, 1), weight.t())


class ConvDecoder(nn.Module):
    """Two 3x3 convolutions at full resolution, from the inputs and the tokens' feature maps to one dataset's output.

        output = W_out * GELU(W_mix * (inputs, features) + bias)

    The feature maps are interpolated linearly between the centers of the tokens' patches. So a prediction has no edges
    of patches, and its details come from the inputs. The convolutions wrap on periodic axes and repeat the last value
    at the others.
    """

    def __init__(self, inputs: int, width: int, channels: int, patch: int) -> None:
        """Take the numbers of inputs, of feature maps (and channels between the convolutions), and of outputs.

        `patch` is the number of points along a side of a token's patch.
        """
        super().__init__()
        self.patch = patch
        self.mix = nn.Parameter(torch.zeros(width, inputs + width, 3, 3))
        self.bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Parameter(torch.zeros(channels, width, 3, 3))

    def forward(self, inputs: Tensor, features: Tensor, periodic: Periodic) -> Tensor:
        """Map inputs (B, nC + K, H, W) and features of tokens (B, F, h, w) to the output (B, C, H, W), float32."""
        with torch.autocast(inputs.device.type, enabled=False):
            along_x, along_y = (
                interpolation(inputs.shape[axis], features.shape[axis], self.patch, wraps, inputs.device)
                for axis, wraps in zip((-2, -1), periodic, strict=True)
            )
            features = along_x @ features.float() @ along_y.t()  # products, whose order is fixed on a GPU, too
            x = pad_fields(torch.cat([inputs, features], dim=1), 1, periodic)
            return F.conv2d(pad_fields(F.gelu(F.conv2d(x, self.mix, self.bias)), 1, periodic), self.out)


def interpolation(points: int, tokens: int, patch: int, wraps: bool, device: torch.device) -> Tensor:
    """Return the matrix (points, tokens) that interpolates linearly between the centers of patches of `patch` points.

    Beyond the first and the last center it goes on to the other end of a periodic axis, or keeps the value.
    """
    place = (torch.arange(points, device=device) + 0.5) / patch - 0.5  # in tokens
    if not wraps:
        place = place.clamp(0, tokens - 1)
    distance = (place[:, None] - torch.arange(tokens, device=device)).abs()
    if wraps:
        distance = torch.minimum(distance, tokens - distance)
    return (1 - distance).clamp_min(0)


class Head(nn.Module):
    """Map tokens to the output of one dataset's state channels.

    `linear` gives the wavelet coefficients of the output, or the feature maps that `decoder` reads. `pointwise` adds a
    map of the inputs.
    """

    def __init__(self, config: ModelConfig, spec: DatasetSpec, context: int) -> None:
        super().__init__()
        channels, inputs = len(spec.state_channels), len(spec.inputs(context))
        convolves = config.decoder == "conv"
        self.subbands = 1 if convolves else config.subbands
        self.linear = Linear(config.width, config.decoder_width if convolves else channels * config.subbands)
        self.decoder = ConvDecoder(inputs, config.decoder_width, channels, 2**config.levels) if convolves else None
        self.pointwise = nn.Parameter(torch.zeros(channels, context * channels)) if config.pointwise else None

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, h, w, D) to coefficients (B, C, S, h, w), or feature maps (B, F, 1, h, w); float32.

        bf16 would round them by more than the paper's errors on helmholtz_staircase and gray_scott_reaction_diffusion.
        """
        with torch.autocast(x.device.type, enabled=False):
            coefficients = self.linear(x.to(self.linear.weight.dtype))
            return coefficients.permute(0, 3, 1, 2).unflatten(1, (-1, self.subbands))

    def of_points(self, inputs: Tensor) -> Tensor:
        """Apply one C x nC matrix, with the gain, at every point of the inputs (B, nC + K, H, W); float32."""
        assert self.pointwise is not None
        states = inputs[:, : self.pointwise.shape[1]].float()
        with torch.autocast(states.device.type, enabled=False):
            return torch.einsum("ij,bjhw->bihw", POINTWISE_GAIN * self.pointwise, states)


def _noise(seed: int, name: str, shape: torch.Size) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator, device="cpu")


class WaveLiTFM(Surrogate):
    """The model for the given datasets, which predicts from the last `context` frames.

    `seed` draws the initial weights, each named part from its own generator.
    """

    section = "model"
    config_class = ModelConfig
    config: ModelConfig

    def __init__(self, config: ModelConfig, datasets: Sequence[DatasetSpec], seed: int = 0, context: int = 1) -> None:
        switches = (config.predict, config.predict_override, config.wavelet, context, config.constraints, config.levels)
        super().__init__(datasets, *switches)
        self.config = config
        width, subbands = config.width, config.subbands
        specs = self.specs.values()
        # Attribute names are part of the file format: weights are stored under them.
        inputs = (name for spec in specs for name in spec.inputs(context))
        self.lifting = ChannelEmbedding(inputs, subbands, width)
        self.task_vectors = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name in self.specs})
        self.scalars = ScalarEmbedding((name for spec in specs for name in spec.scalars), width)
        self.blocks = nn.ModuleList(Pyramid(config.block(), config.pyramid_levels) for _ in range(config.depth))
        self.heads = nn.ModuleDict({spec.name: Head(config, spec, context) for spec in specs})
        # The adapters stand outside the blocks, which FSDP gathers whole: a step needs those of one dataset.
        self.adapters = nn.ModuleDict(
            {name: self._new_adapters() for name in self.specs} if config.adapter_rank else {}
        )
        self.init_weights(seed)

    def _new_adapters(self) -> nn.ModuleList:
        """Return one dataset's adapter of each block."""
        blocks = (cast(Block, pyramid.block) for pyramid in self.blocks)
        return nn.ModuleList(BlockAdapter(block, self.config.adapter_rank) for block in blocks)

    def output(self, inputs: Tensor, spec: DatasetSpec, scalars: Tensor | None = None) -> Tensor:
        """Return the output (B, C, H, W) of the dataset's head; see `Surrogate.output`."""
        config = self.config
        coefficients = self._tokenize(inputs, spec)  # wavelet transform: (B, n * C + K, S, h, w)
        x = self.lifting(coefficients, spec.inputs(self.context))  # embedding: (B, h, w, D)
        x = x + self.task_vectors[spec.name]
        if scalars is not None:
            x = x + self.scalars(scalars, list(spec.scalars))[:, None, None]  # (B, 1, 1, D)
        ropes = pyramid_tables(x.shape[1], x.shape[2], config.pyramid_levels, config.width // config.heads, x.device)
        periodic = spec.periodic if config.padding == "boundary" else NOT_PERIODIC
        adapters = cast(nn.ModuleList, self.adapters[spec.name]) if config.adapter_rank else None
        for place, block in enumerate(self.blocks):
            x = block(x, ropes, periodic, adapters[place]() if adapters is not None else None)
        head = cast(Head, self.heads[spec.name])
        if head.decoder is None:
            output = self._untokenize(head(x), spec, inputs.shape[-2:])  # inverse transform: (B, C, H, W)
        else:
            output = head.decoder(inputs, head(x)[:, :, 0], periodic)
        return output if head.pointwise is None else output + head.of_points(inputs)

    def _tokenize(self, x: Tensor, spec: DatasetSpec) -> Tensor:
        """Turn fields (B, C, H, W) into coefficients (B, C, S, h, w)."""
        if self.config.tokenizer == "conv":
            return patches(x, self.config.levels, self._wraps(spec))
        return analysis(x, self.config.wavelet, self.config.levels, self._wraps(spec))

    def _untokenize(self, coefficients: Tensor, spec: DatasetSpec, size: Sequence[int]) -> Tensor:
        """Undo `_tokenize`."""
        if self.config.tokenizer == "conv":
            return unpatches(coefficients, self.config.levels, size)
        return synthesis(coefficients, self.config.wavelet, self.config.levels, size, self._wraps(spec))

    def _wraps(self, spec: DatasetSpec) -> Periodic:
        """Tell on which axes the wavelets wrap."""
        return spec.periodic if self.config.extension == "boundary" else NOT_PERIODIC

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every parameter from a generator seeded by (seed, its own name), so that other parts do not matter.

        Heads, or the last convolutions of decoders, start at zero: an untrained model predicts persistence (delta) or
        the mean (state). So do adapters' matrices B.
        """
        for name, parameter in self.named_parameters():
            if parameter.is_meta:  # of a model that is made for its shapes alone
                continue
            drawn = self.config.decoder == "conv" and name.endswith((".linear.weight", ".mix"))
            zero = name.endswith(("bias", "log_lambda")) or name.startswith("scalars.")
            zero |= name.startswith("adapters.") and ".up." in name
            if zero or (name.startswith("heads.") and not drawn):
                parameter.zero_()
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("level_weights"):
                parameter.fill_(COARSE_INIT)[0] = 1.0
            else:
                parameter.copy_(self._init_std(name, parameter) * _noise(seed, name, parameter.shape))

    def _init_std(self, name: str, parameter: Tensor) -> float:
        if name.startswith("lifting."):
            return EMBEDDING_STD
        if name.startswith("task_vectors."):
            return TASK_STD
        std = 1 / sqrt(parameter[0].numel())  # fan-in of linear maps and depthwise convolutions
        if name.endswith(("output.weight", "contract.weight")):
            return std / sqrt(2 * self.config.depth)  # so that the residual stream does not grow with depth
        return std * CPE_GAIN if ".cpe" in name else std

    def _datasets_using(self, parameter: str) -> frozenset[str]:
        part, _, rest = parameter.partition(".")
        if part == "lifting":
            channel = rest.removeprefix("rows.")
            return frozenset(name for name, spec in self.specs.items() if channel in spec.inputs(self.context))
        if part == "scalars":
            return frozenset(name for name, spec in self.specs.items() if rest.removeprefix("rows.") in spec.scalars)
        return frozenset({rest.partition(".")[0]} if part in ("task_vectors", "heads", "adapters") else self.specs)

    def adapted_to(self, datasets: Sequence[DatasetSpec], adapter_rank: int | None = None) -> "WaveLiTFM":
        """Return a model for `datasets` with this one's weights wherever the names agree; the others are drawn anew.

        A dataset that this model knows keeps its statistics, so its predictions do not change. `adapter_rank` gives
        adapters to a model that has none; they start at zero. ValueError if the channels of a known dataset differ.
        """
        config = self.config if adapter_rank is None else replace(self.config, adapter_rank=adapter_rank)
        model = WaveLiTFM(config, self._adapted_specs(datasets), context=self.context)
        weights = self.state_dict()
        model.load_state_dict({name: weights.get(name, tensor) for name, tensor in model.state_dict().items()})
        return model

    def _sizes(self) -> str:
        return f"width {self.config.width}, depth {self.config.depth}, context {self.context}"
