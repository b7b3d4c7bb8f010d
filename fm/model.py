"""WaveLiT and WaveLiT-FM: one-step surrogates of 2D PDEs that mix wavelet tokens by ridge-corrected linear attention.

What is special:
- tokens are wavelet coefficients of the dataset's own channels, lifted by rows that belong to canonical channel names;
- every dataset has a task vector and an output head, everything between is shared, and everything is keyed by name: the
  order in which datasets are listed changes neither the initial weights nor an output;
- each block runs on a pyramid of token grids with the same weights, on any even grid from 16 x 16;
- a bespoke WaveLiT is the same class with one dataset.

Fields are (B, C, H, W). Statistics, wavelets, norms and the ridge solve are float32 whatever the autocast state.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from math import sqrt
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fm.model_config import PRESETS, DatasetSpec, ModelConfig, check_keys
from fm.nn.dwt import NOT_PERIODIC, Periodic, analysis, patches, synthesis, unpatches
from fm.nn.heads import Head
from fm.nn.lifting import Lifting
from fm.nn.pyramid import Pyramid, pyramid_tables

__all__ = ["MIN_GRID", "PRESETS", "DatasetSpec", "ModelConfig", "WaveLiTFM"]

MODEL_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
FORMAT = 1
STD_FLOOR = 1e-4  # the_well's
DELTA_FLOOR = 1e-2  # of the channel's std, so that a channel that hardly moves is not amplified more than 100 times
MIN_GRID = 16

# Initial weights, see init_weights.
LIFTING_STD = 0.2
TASK_STD = 0.1
CPE_GAIN = 0.15  # of the usual 1/3: these convolutions act on the residual stream itself, twice a block
COARSE_INIT = 0.1  # weight of each coarse level beside 1 for the fine one


class Moments(nn.Module):
    """Statistics of one dataset as float32 buffers (C, 1, 1); rebuilt from the specification, never in the weights."""

    mean: Tensor
    std: Tensor
    constant_mean: Tensor
    constant_std: Tensor
    delta_scale: Tensor
    delta_shift: Tensor

    def __init__(self, spec: DatasetSpec, delta: bool) -> None:
        super().__init__()
        mean, std = (spec.moment(key, spec.state_channels) for key in ("mean", "std"))
        std = std.clamp_min(STD_FLOOR)
        scale, shift = torch.ones_like(std), torch.zeros_like(std)
        if delta:
            scale = (spec.moment("std_delta", spec.state_channels).clamp_min(STD_FLOOR) / std).clamp_min(DELTA_FLOOR)
            shift = spec.moment("mean_delta", spec.state_channels) / std
        tensors = {
            "mean": mean,
            "std": std,
            "constant_mean": spec.moment("mean", spec.constant_channels),
            "constant_std": spec.moment("std", spec.constant_channels).clamp_min(STD_FLOOR),
            "delta_scale": scale,
            "delta_shift": shift,
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.float(), persistent=False)


class WaveLiTFM(nn.Module):
    """The model for the given datasets; `seed` draws the initial weights, each named part from its own generator."""

    def __init__(self, config: ModelConfig, datasets: Sequence[DatasetSpec], seed: int = 0) -> None:
        super().__init__()
        if not datasets or len({spec.name for spec in datasets}) != len(datasets):
            raise ValueError(f"datasets must be one or more with different names, got {[s.name for s in datasets]}")
        self.config = config
        self.specs = {spec.name: spec for spec in sorted(datasets, key=lambda spec: spec.name)}
        self.delta = {name: config.predict_override.get(name, config.predict) == "delta" for name in self.specs}
        width, subbands = config.width, config.subbands
        self.moments = nn.ModuleDict({name: Moments(spec, self.delta[name]) for name, spec in self.specs.items()})
        channels = [c for spec in datasets for c in (*spec.state_channels, *spec.constant_channels)]
        self.lifting = Lifting(channels, subbands, width)
        self.task_vectors = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name in self.specs})
        self.blocks = nn.ModuleList(Pyramid(config.block(), config.pyramid_levels) for _ in range(config.depth))
        self.heads = nn.ModuleDict(
            {name: Head(width, len(spec.state_channels), subbands) for name, spec in self.specs.items()}
        )
        self.init_weights(seed)

    def forward(self, state: Tensor, constants: Tensor, dataset: str) -> Tensor:
        """The next state.

        state (B, C, H, W) and constants (B, K, H, W) normalised, channels in the order of the dataset's specification;
        returns (B, C, H, W), normalised, float32. ValueError for another channel count, an odd side, or one below 16.
        """
        spec = self._spec(dataset)
        self._check_inputs(spec, state, constants)
        size = state.shape[-2:]
        periodic = spec.periodic if self.config.padding == "boundary" else NOT_PERIODIC
        coefficients = self._tokenize(torch.cat([state, constants], dim=1).float(), spec)  # (B, C + K, S, h, w)
        x = self.lifting(coefficients, (*spec.state_channels, *spec.constant_channels))  # (B, h, w, D)
        x = x + self.task_vectors[dataset]
        head_width = self.config.width // self.config.heads
        ropes = pyramid_tables(x.shape[1], x.shape[2], self.config.pyramid_levels, head_width, x.device)
        for block in self.blocks:
            x = block(x, ropes, periodic)
        output = self._untokenize(self.heads[dataset](x).float(), spec, size)  # (B, C, H, W)
        if not self.delta[dataset]:
            return output
        moments = self._moments(dataset)
        return torch.addcmul(state.float() + moments.delta_shift, output, moments.delta_scale)

    def _tokenize(self, x: Tensor, spec: DatasetSpec) -> Tensor:
        """Fields (B, C, H, W) to coefficients (B, C, S, h, w)."""
        wraps = self._wraps(spec)
        if self.config.tokenizer == "conv":
            return patches(x, self.config.levels, wraps)
        return analysis(x, self.config.wavelet, self.config.levels, wraps)

    def _untokenize(self, coefficients: Tensor, spec: DatasetSpec, size: Sequence[int]) -> Tensor:
        """Inverse of `_tokenize`."""
        if self.config.tokenizer == "conv":
            return unpatches(coefficients, self.config.levels, size)
        return synthesis(coefficients, self.config.wavelet, self.config.levels, size, self._wraps(spec))

    def _wraps(self, spec: DatasetSpec) -> Periodic:
        return spec.periodic if self.config.extension == "boundary" else NOT_PERIODIC

    def _spec(self, dataset: str) -> DatasetSpec:
        if dataset not in self.specs:
            raise ValueError(f"the model has no dataset {dataset!r}: it knows {', '.join(self.specs)}")
        return self.specs[dataset]

    def _moments(self, dataset: str) -> Moments:
        return cast(Moments, self.moments[self._spec(dataset).name])

    def _check_inputs(self, spec: DatasetSpec, state: Tensor, constants: Tensor) -> None:
        for tensor, names, role in (
            (state, spec.state_channels, "state"),
            (constants, spec.constant_channels, "constant"),
        ):
            if tensor.ndim != 4 or tensor.shape[1] != len(names):
                raise ValueError(
                    f"dataset {spec.name}: expected {role} fields (B, {len(names)}, H, W) for channels "
                    f"({', '.join(names)}), got {tuple(tensor.shape)}"
                )
        height, width = state.shape[-2:]
        if constants.shape[-2:] != state.shape[-2:]:
            raise ValueError(
                f"dataset {spec.name}: constants on {tuple(constants.shape[-2:])}, state on {height} x {width}"
            )
        if height % 2 or width % 2 or min(height, width) < MIN_GRID:
            raise ValueError(
                f"dataset {spec.name}: the grid must have even sides of at least {MIN_GRID}, got {height} x {width}"
            )

    def normalise(self, fields: Tensor, dataset: str) -> Tensor:
        """State fields (..., C, H, W) in raw units to zero mean and unit variance, float32."""
        moments = self._moments(dataset)
        return (fields.float() - moments.mean) / moments.std

    def denormalise(self, fields: Tensor, dataset: str) -> Tensor:
        """Inverse of `normalise`."""
        moments = self._moments(dataset)
        return fields.float() * moments.std + moments.mean

    def normalise_constants(self, constants: Tensor, dataset: str) -> Tensor:
        """Constant fields (B, K, H, W) in raw units to zero mean and unit variance, float32."""
        moments = self._moments(dataset)
        return (constants.float() - moments.constant_mean) / moments.constant_std

    def residual_scale(self, dataset: str) -> Tensor:
        """(C, 1, 1): what the loss multiplies errors of normalised next states by; std / std_delta, or 1 for states."""
        return self._moments(dataset).delta_scale.reciprocal()

    def parameters_by_datasets(self) -> dict[frozenset[str], list[nn.Parameter]]:
        """The parameters in groups that the same datasets use in their forward passes, by those datasets."""
        groups: dict[frozenset[str], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            groups.setdefault(self._datasets_using(name), []).append(parameter)
        return groups

    def _datasets_using(self, parameter: str) -> frozenset[str]:
        part, _, rest = parameter.partition(".")
        if part == "lifting":
            channel = rest.removeprefix("rows.")
            users = (s.name for s in self.specs.values() if channel in (*s.state_channels, *s.constant_channels))
            return frozenset(users)
        return frozenset({rest.partition(".")[0]} if part in ("task_vectors", "heads") else self.specs)

    def num_parameters(self) -> int:
        """All trainable numbers, of every dataset."""
        return sum(parameter.numel() for parameter in self.parameters())

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every parameter from a generator seeded by (seed, its own name), so that other parts do not matter.

        Heads start at zero: an untrained model predicts persistence (delta) or the mean (state).
        """
        for name, parameter in self.named_parameters():
            if name.startswith("heads.") or name.endswith(("bias", "log_lambda")):
                parameter.zero_()
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("level_weights"):
                parameter.fill_(COARSE_INIT)[0] = 1.0
            else:
                parameter.copy_(self._init_std(name, parameter) * _noise(seed, name, parameter.shape))

    def _init_std(self, name: str, parameter: Tensor) -> float:
        if name.startswith("lifting."):
            return LIFTING_STD
        if name.startswith("task_vectors."):
            return TASK_STD
        std = 1 / sqrt(parameter[0].numel())  # fan-in of linear maps and depthwise convolutions
        if name.endswith(("output.weight", "contract.weight")):
            return std / sqrt(2 * self.config.depth)  # so that the residual stream does not grow with depth
        return std * CPE_GAIN if ".cpe" in name else std

    def adapted_to(self, datasets: Sequence[DatasetSpec]) -> "WaveLiTFM":
        """A model for `datasets` with this one's weights wherever the names agree; other parts are drawn afresh.

        A dataset that this model knows keeps its statistics, so its predictions do not change. ValueError if its
        channels differ.
        """
        for spec in datasets:
            known = self.specs.get(spec.name, spec)
            own, given = ((s.state_channels, s.constant_channels) for s in (known, spec))
            if own != given:
                raise ValueError(f"dataset {spec.name}: the model has the channels {own}, the data {given}")
        model = WaveLiTFM(self.config, [self.specs.get(spec.name, spec) for spec in datasets])
        weights = self.state_dict()
        model.load_state_dict({name: weights.get(name, tensor) for name, tensor in model.state_dict().items()})
        return model

    def description(self) -> dict[str, Any]:
        """What model.json holds: format, configuration and dataset specifications, as JSON types."""
        datasets = [spec.to_json() for spec in self.specs.values()]
        return {"format": FORMAT, "config": json.loads(json.dumps(asdict(self.config))), "datasets": datasets}

    def save_pretrained(
        self, directory: Path | str, weights: str = WEIGHTS_FILE, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write model.json (configuration and dataset specifications) and `weights` (safetensors) into `directory`.

        `state` replaces the model's own weights, with the same keys (an EMA, say).
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MODEL_FILE).write_text(json.dumps(self.description(), indent=1) + "\n")
        tensors = self.state_dict() if state is None else dict(state)
        self._check_state({name: tuple(tensor.shape) for name, tensor in tensors.items()}, "the state to be saved")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, directory / weights)

    @classmethod
    def from_pretrained(cls, directory: Path | str, weights: str | None = None) -> "WaveLiTFM":
        """A model on the CPU from a directory with model.json and weights: `weights`, or the EMA's, or the model's own.

        FileNotFoundError if a file is missing; ValueError if model.json is of another format or the weights do not fit.
        """
        directory = Path(directory)
        description = read_description(directory)
        if weights is None:
            weights = EMA_FILE if (directory / EMA_FILE).exists() else WEIGHTS_FILE
        check_keys(f"config of {directory / MODEL_FILE}", description["config"], (f.name for f in fields(ModelConfig)))
        config = ModelConfig(**description["config"])
        model = cls(config, [DatasetSpec.from_json(spec) for spec in description["datasets"]])
        model.load_weights(directory / weights)
        return model

    def load_weights(self, file: Path | str) -> None:
        """Load a safetensors file whose keys and shapes must be exactly the model's."""
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"no weights at {file}")
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
        self._check_state({name: tuple(tensor.shape) for name, tensor in tensors.items()}, str(file))
        self.load_state_dict(tensors)

    def _check_state(self, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
        own = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        problems = [f"missing {name} {own[name]}" for name in own if name not in shapes]
        problems += [f"unexpected {name} {shapes[name]}" for name in shapes if name not in own]
        problems += [
            f"{name} is {shapes[name]}, the model's is {own[name]}"
            for name in own
            if name in shapes and shapes[name] != own[name]
        ]
        if problems:
            listed = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise ValueError(
                f"{where} does not fit the model (width {self.config.width}, depth {self.config.depth}): {listed}"
            )


def read_description(directory: Path | str) -> dict[str, Any]:
    """model.json as a dict with keys format, config, datasets."""
    file = Path(directory) / MODEL_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {MODEL_FILE} in {directory}: expected a directory written by save_pretrained")
    description = json.loads(file.read_text())
    check_keys(str(file), description, ("format", "config", "datasets"))
    if description["format"] != FORMAT:
        raise ValueError(f"{file} has format {description['format']}, this version reads {FORMAT}")
    return description


def _noise(seed: int, name: str, shape: torch.Size) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator, device="cpu")
