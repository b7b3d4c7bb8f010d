"""What every one-step surrogate is, whatever network it holds: normalisation, the step it predicts, its files.

The trainer, rollouts and scores know a model by this class alone. A subclass gives `output`: what its network says of a
normalised state, which is the next state, or its change in units of the change's own standard deviation.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fm.model_config import DatasetSpec, check_keys

MODEL_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
FORMAT = 1
BASELINE = "baseline"  # key of model.json that only baselines have
STD_FLOOR = 1e-4  # the_well's
DELTA_FLOOR = 1e-2  # of the channel's std, so that a channel that hardly moves is not amplified more than 100 times
MIN_GRID = 16


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


class Surrogate(nn.Module, ABC):
    """A model of the given datasets. Subclasses are made as `cls(config, datasets, seed)`."""

    section: ClassVar[str]  # of a recipe: where `config` stands
    config: Any  # the subclass's own, with to_json
    blocks: nn.ModuleList  # parts that sharding gathers one at a time; where there are none, processes hold the whole

    def __init__(
        self, datasets: Sequence[DatasetSpec], predict: str, predict_override: Mapping[str, str], wavelet: str
    ) -> None:
        """`predict` and, by dataset, `predict_override` are delta or state; `wavelet` is the loss's."""
        super().__init__()
        if not datasets or len({spec.name for spec in datasets}) != len(datasets):
            raise ValueError(f"datasets must be one or more with different names, got {[s.name for s in datasets]}")
        self.wavelet = wavelet
        self.specs = {spec.name: spec for spec in sorted(datasets, key=lambda spec: spec.name)}
        self.delta = {name: predict_override.get(name, predict) == "delta" for name in self.specs}
        self.moments = nn.ModuleDict({name: Moments(spec, self.delta[name]) for name, spec in self.specs.items()})

    @abstractmethod
    def output(self, state: Tensor, constants: Tensor, spec: DatasetSpec) -> Tensor:
        """What the network says of a normalised state (B, C, H, W) and constants (B, K, H, W): (B, C, H, W), float32.

        The next state, or its change over `delta_scale` after the mean change is taken off.
        """

    def forward(self, state: Tensor, constants: Tensor, dataset: str) -> Tensor:
        """The next state.

        state (B, C, H, W) and constants (B, K, H, W) normalised, channels in the order of the dataset's specification;
        returns (B, C, H, W), normalised, float32. ValueError for another channel count, an odd side, or one below 16.
        """
        spec = self._spec(dataset)
        self._check_inputs(spec, state, constants)
        output = self.output(state, constants, spec)
        if not self.delta[dataset]:
            return output
        moments = self._moments(dataset)
        return torch.addcmul(state.float() + moments.delta_shift, output, moments.delta_scale)

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
        """The datasets whose forward pass the named parameter takes part in: all, unless a subclass knows better."""
        return frozenset(self.specs)

    def num_parameters(self) -> int:
        """All trainable numbers, of every dataset."""
        return sum(parameter.numel() for parameter in self.parameters())

    @abstractmethod
    def adapted_to(self, datasets: Sequence[DatasetSpec]) -> Self:
        """A model for `datasets` that begins with this one's weights.

        A dataset that this model knows keeps its statistics, so its predictions do not change. ValueError if its
        channels differ.
        """

    def _check_channels(self, datasets: Sequence[DatasetSpec]) -> None:
        for spec in datasets:
            known = self.specs.get(spec.name, spec)
            own, given = ((s.state_channels, s.constant_channels) for s in (known, spec))
            if own != given:
                raise ValueError(f"dataset {spec.name}: the model has the channels {own}, the data {given}")

    def description(self) -> dict[str, Any]:
        """What model.json holds: format, configuration and dataset specifications, as JSON types."""
        datasets = [spec.to_json() for spec in self.specs.values()]
        return {"format": FORMAT, "config": self.config.to_json(), "datasets": datasets}

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
    def from_pretrained(cls, directory: Path | str, weights: str | None = None) -> Self:
        """A model on the CPU from a directory with model.json and weights: `weights`, or the EMA's, or the model's own.

        FileNotFoundError if a file is missing; ValueError if model.json is of another format or the weights do not fit.
        """
        directory = Path(directory)
        description = read_description(directory)
        if weights is None:
            weights = EMA_FILE if (directory / EMA_FILE).exists() else WEIGHTS_FILE
        model = cls._described(description, str(directory / MODEL_FILE))
        model.load_weights(directory / weights)
        return model

    @classmethod
    @abstractmethod
    def _described(cls, description: Mapping[str, Any], where: str) -> Self:
        """A new model as model.json, at `where`, says."""

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
            raise ValueError(f"{where} does not fit the model ({self._sizes()}): {listed}")

    @abstractmethod
    def _sizes(self) -> str:
        """The model's sizes, for error messages."""


def read_description(directory: Path | str) -> dict[str, Any]:
    """model.json as a dict with keys format, config, datasets; a baseline's has its name as `baseline`."""
    file = Path(directory) / MODEL_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {MODEL_FILE} in {directory}: expected a directory written by save_pretrained")
    description = json.loads(file.read_text())
    check_keys(str(file), description, ("format", "config", "datasets"), optional=(BASELINE,))
    if description["format"] != FORMAT:
        raise ValueError(f"{file} has format {description['format']}, this version reads {FORMAT}")
    return description
