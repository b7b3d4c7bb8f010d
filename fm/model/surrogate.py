"""One-step surrogate: normalization, the predicted step, rollouts, and files, whatever the network.

The trainer, rollouts and scores use a model through this class alone. A model of context n predicts the next state from
the last n frames: it reads the last one, and the changes from frame to frame before it in units of the change's own
standard deviation. A subclass implements `output`, its network on these inputs, which is the next state, or the change.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from fm.model import files
from fm.model.constraints import Constraints
from fm.model.fields import Fields, GivenFields, given_fields
from fm.model.scalars import Scalars, normalized_scalars
from fm.model.spec import DatasetSpec, from_json, to_json

STD_FLOOR = 1e-4  # the_well's
DELTA_FLOOR = 1e-2  # of the channel's std, so that a channel that hardly moves is not amplified more than 100 times
MIN_GRID = 16


def next_frames(frames: Tensor, state: Tensor) -> Tensor:
    """Return the input of the next step, (B, n, C, H, W): frames without the oldest one, and the state (B, C, H, W)."""
    return state[:, None] if frames.shape[1] == 1 else torch.cat([frames[:, 1:], state[:, None]], dim=1)


class ChannelMoments(nn.Module):
    """Statistics of one dataset as float32 buffers (C, 1, 1), made from its specification and not saved as weights."""

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
    """A model of the given datasets. Subclasses are made as `cls(config, datasets, seed, context)`."""

    section: ClassVar[str]  # the recipe's section that holds `config`: model or baseline
    kind: ClassVar[str | None] = None  # key that model.json has for this kind of model, one of files.KINDS
    config_class: ClassVar[type]
    config: Any
    blocks: nn.ModuleList  # parts that FSDP gathers one at a time; where it is empty, processes hold the whole model

    def __init__(
        self,
        datasets: Sequence[DatasetSpec],
        predict: str,
        predict_override: Mapping[str, str],
        wavelet: str,
        context: int = 1,
        constraints: bool = False,
        levels: int = 1,
    ) -> None:
        """`predict` and, by dataset, `predict_override` are delta or state; `wavelet` and `levels` are the loss's.

        `constraints` holds predictions to the conserved quantities and ranges of the specifications.

        ValueError for a context below 1, and for datasets of one name.
        """
        super().__init__()
        if context < 1:
            raise ValueError(f"context: expected at least 1 input frame, got {context}")
        self.context = context  # number of input frames n
        self.origin: Path | None = None  # the folder that it was loaded from
        if not datasets or len({spec.name for spec in datasets}) != len(datasets):
            raise ValueError(f"datasets must be one or more with different names, got {[s.name for s in datasets]}")
        self.wavelet, self.levels = wavelet, levels
        self.specs = {spec.name: spec for spec in sorted(datasets, key=lambda spec: spec.name)}
        self.delta = {name: predict_override.get(name, predict) == "delta" for name in self.specs}
        self.moments = nn.ModuleDict(
            {name: ChannelMoments(spec, self.delta[name]) for name, spec in self.specs.items()}
        )
        held = [name for name, spec in self.specs.items() if constraints and (spec.conserved or spec.ranges)]
        self.constraints = nn.ModuleDict(
            {name: Constraints(self.specs[name], self._moments(name).mean, self._moments(name).std) for name in held}
        )

    @abstractmethod
    def output(self, inputs: Tensor, spec: DatasetSpec, scalars: Tensor | None = None) -> Tensor:
        """Return the network's output (B, C, H, W), float32, for inputs (B, n * C + K, H, W) as `inputs` returns them.

        The output is the next state, or its change: the mean change subtracted, divided by `delta_scale`. `scalars` are
        those of `forward`.
        """

    def forward(self, frames: Tensor, constants: Tensor, dataset: str, scalars: Tensor | None = None) -> Tensor:
        """Return the next state (B, C, H, W), normalized, float32.

        frames (B, n, C, H, W), the oldest first, and constants (B, K, H, W) are normalized, with channels in the order
        of the dataset's specification. A model of context 1 also takes its frame as (B, C, H, W). `scalars` (B, P)
        are what `normalize_scalars` returns; None has the effect of zeros. ValueError for another number of frames or
        channels, an odd side, or one below 16.
        """
        spec = self._spec(dataset)
        frames = self._with_time(frames)
        self._check_inputs(spec, frames, constants)
        given = () if scalars is None else (scalars,)  # so a network that no scalars condition need not know of them
        state = self.output(self.inputs(frames, constants, dataset), spec, *given)
        last = frames[:, -1].float()
        if self.delta[dataset]:
            moments = self._moments(dataset)
            state = torch.addcmul(last + moments.delta_shift, state, moments.delta_scale)
        return self.constraints[dataset](state, last) if dataset in self.constraints else state

    def inputs(self, frames: Tensor, constants: Tensor, dataset: str) -> Tensor:
        """Return what the network reads, (B, n * C + K, H, W) float32, in the order of `DatasetSpec.inputs`.

        The last frame; the change to it from the frame before, and so on back in time, each in the units of a predicted
        change; the constants. Frames that are close to each other would differ too little in their own units: with
        changes, two frames gave 17 % lower one-step errors on the mini-Well (tests/benchmarks/RESULTS.md).
        """
        parts = [frames[:, -1].float()]
        if frames.shape[1] > 1:
            moments = self._moments(dataset)
            changes = (frames.diff(dim=1).float() - moments.delta_shift) / moments.delta_scale
            parts.append(changes.flip(1).flatten(1, 2))
        return torch.cat([*parts, constants.float()], dim=1)

    def _with_time(self, frames: Tensor) -> Tensor:
        """Return frames (B, n, C, H, W); a single frame (B, C, H, W) gets the axis of time."""
        return frames[:, None] if self.context == 1 and frames.ndim == 4 else frames

    def _spec(self, dataset: str) -> DatasetSpec:
        if dataset not in self.specs:
            raise ValueError(f"the model has no dataset {dataset!r}: it knows {', '.join(self.specs)}")
        return self.specs[dataset]

    def _moments(self, dataset: str) -> ChannelMoments:
        return cast(ChannelMoments, self.moments[self._spec(dataset).name])

    def _check_inputs(self, spec: DatasetSpec, frames: Tensor, constants: Tensor) -> None:
        one_frame = self.context == 1 and frames.ndim == 5 and frames.shape[1] == 1
        time = () if self.context == 1 else (self.context,)
        given = (
            ("state", frames[:, 0] if one_frame else frames, time, spec.state_channels),
            ("constant", constants, (), spec.constant_channels),
        )
        for role, tensor, axes, names in given:
            sizes = (*axes, len(names))
            if tensor.ndim != len(sizes) + 3 or tensor.shape[1:-2] != sizes:
                raise ValueError(
                    f"dataset {spec.name}: expected {role} fields (B, {', '.join(map(str, sizes))}, H, W) for channels "
                    f"({', '.join(names)}), got {tuple(tensor.shape)}"
                )
        height, width = frames.shape[-2:]
        if constants.shape[-2:] != frames.shape[-2:]:
            raise ValueError(
                f"dataset {spec.name}: constants on {tuple(constants.shape[-2:])}, state on {height} x {width}"
            )
        if height % 2 or width % 2 or min(height, width) < MIN_GRID:
            raise ValueError(
                f"dataset {spec.name}: the grid must have even sides of at least {MIN_GRID}, got {height} x {width}"
            )

    def normalize(self, fields: Tensor, dataset: str) -> Tensor:
        """Scale state fields (..., C, H, W) in raw units to zero mean and unit variance, float32."""
        moments = self._moments(dataset)
        return (fields.float() - moments.mean) / moments.std

    def denormalize(self, fields: Tensor, dataset: str) -> Tensor:
        """Undo `normalize`."""
        moments = self._moments(dataset)
        return fields.float() * moments.std + moments.mean

    def normalize_constants(self, constants: Tensor, dataset: str) -> Tensor:
        """Scale constant fields (B, K, H, W) in raw units to zero mean and unit variance, float32."""
        moments = self._moments(dataset)
        return (constants.float() - moments.constant_mean) / moments.constant_std

    def normalize_scalars(self, raw: Scalars | None, dataset: str, batch: int, device: torch.device) -> Tensor | None:
        """Return a dataset's scalars (B, P) for `forward`, by `normalized_scalars`; None if its model takes none."""
        stats = self._spec(dataset).scalars
        return normalized_scalars(raw or {}, stats, batch, device) if stats else None

    def residual_scale(self, dataset: str) -> Tensor:
        """Return the loss's factor (C, 1, 1) on errors of normalized next states: std / std_delta, or 1 for states."""
        return self._moments(dataset).delta_scale.reciprocal()

    def parameters_by_datasets(self) -> dict[frozenset[str], list[nn.Parameter]]:
        """Return the parameters in groups that the same datasets use in their forward passes, by those datasets."""
        groups: dict[frozenset[str], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            groups.setdefault(self._datasets_using(name), []).append(parameter)
        return groups

    def _datasets_using(self, parameter: str) -> frozenset[str]:
        """Return the datasets whose forward pass uses the named parameter: all, unless a subclass overrides this."""
        return frozenset(self.specs)

    def num_parameters(self) -> int:
        """Count all trainable numbers, of every dataset."""
        return sum(parameter.numel() for parameter in self.parameters())

    @abstractmethod
    def adapted_to(self, datasets: Sequence[DatasetSpec]) -> Self:
        """Return a model for `datasets` that begins with this one's weights.

        A dataset that this model knows keeps its statistics, so its predictions do not change. ValueError if its
        channels differ.
        """

    def _adapted_specs(self, datasets: Sequence[DatasetSpec]) -> list[DatasetSpec]:
        """Return the given specifications; a known dataset's is the model's own, at the given grid and time step.

        ValueError if the channels of a known dataset differ.
        """
        for spec in datasets:
            known = self.specs.get(spec.name, spec)
            own, given = ((s.state_channels, s.constant_channels) for s in (known, spec))
            if own != given:
                raise ValueError(f"dataset {spec.name}: the model has the channels {own}, the data {given}")
        adapted = []
        for spec in datasets:
            known = self.specs.get(spec.name, spec)
            adapted.append(replace(known, grid=spec.grid, dt=spec.dt, spacing=spec.spacing or known.spacing))
        return adapted

    def description(self) -> dict[str, Any]:
        """Return the content of model.json: format, context, configuration and dataset specifications, as JSON."""
        datasets = [to_json(spec) for spec in self.specs.values()]
        config = to_json(self.config)
        return {"format": files.MODEL_FORMAT, "context": self.context, "config": config, "datasets": datasets}

    def predict(
        self, fields: Fields, dataset: str, steps: int = 1, dt: float | None = None, scalars: Scalars | None = None
    ) -> Fields:
        """Return the next `steps` states of one or many initial states, in physical units, by channel name.

        fields: the initial state and the constant fields, each under its canonical channel's name: a dictionary of
        numpy arrays or tensors (H, W), or (B, H, W) for B of them, or an xarray Dataset with dimensions x, y and at
        most one more. A model of context n > 1 takes the last n frames, the oldest first: (n, H, W) or (B, n, H, W)
        for a state channel, or the dimension `time` of a Dataset. Returns the state channels in the same form:
        (steps, H, W) or (B, steps, H, W); in a Dataset the dimension `time` stands before x and y. `dt` is the time
        between your frames, if you want it compared. `scalars` are PDE parameters of a model that they condition
        (model.condition): numbers or (B,) by name. ValueError for a dataset the model does not know, missing or unknown
        channels or scalars, another number of frames, shapes that do not fit, NaN; FieldsWarning where grid, dt, units
        or scalars differ much from the training data.
        """
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        given = given_fields(fields, self._spec(dataset), dt, self.context, scalars=scalars)
        return given.series(torch.stack(list(self._iterate(given, dataset, steps)), dim=1))

    def rollout(
        self,
        fields: Fields,
        dataset: str,
        steps: int | None = None,
        dt: float | None = None,
        scalars: Scalars | None = None,
    ) -> Iterator[Fields]:
        """Yield the states of `predict` one by one, (H, W) or (B, H, W), in constant memory; None: without end."""
        given = given_fields(fields, self._spec(dataset), dt, self.context, scalars=scalars)
        return (given.frame(state, step) for step, state in enumerate(self._iterate(given, dataset, steps), start=1))

    def iterate(
        self, initial: Tensor, constants: Tensor, dataset: str, steps: int | None, scalars: Scalars | None = None
    ) -> Iterator[Tensor]:
        """Yield the next `steps` states (B, C, H, W) in raw units, without gradients; None: without end.

        initial, frames (B, n, C, H, W) with the oldest first, and constants (B, K, H, W) are in raw units; a model of
        context 1 also takes its frame as (B, C, H, W). `scalars` as for `normalize_scalars`. The state stays normalized
        from step to step. Nothing is clipped: a diverging rollout yields the model's output, infinities included.
        """
        with torch.no_grad():
            frames = self.normalize(self._with_time(initial), dataset)
            fixed = self.normalize_constants(constants, dataset)
            numbers = self.normalize_scalars(scalars, dataset, len(initial), initial.device)
            given = () if numbers is None else (numbers,)
        for _ in count() if steps is None else range(steps):
            with torch.no_grad():  # around each step alone, since the caller's code runs between them
                state = self(frames, fixed, dataset, *given)
                frames = next_frames(frames, state)
                raw = self.denormalize(state, dataset)
            yield raw

    def _iterate(self, given: GivenFields, dataset: str, steps: int | None) -> Iterator[Tensor]:
        """Yield as `iterate` does, from the device of the fields to the model's and back."""
        own, theirs = next(self.parameters()).device, given.frames.device
        for state in self.iterate(given.frames.to(own), given.constants.to(own), dataset, steps, given.scalars):
            yield state.to(theirs)

    def save_pretrained(
        self, directory: Path | str, weights: str = files.WEIGHTS_FILE, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write model.json (configuration and dataset specifications) and `weights` (safetensors) into `directory`.

        `state` replaces the model's own weights, with the same keys (an EMA, say). Cards, scores and pictures of the
        exported model that this one was loaded from are copied, too, if it has the same weights; those of other weights
        that lay in `directory` are deleted.
        """
        directory = Path(directory)
        tensors = self.state_dict() if state is None else dict(state)
        self._check_state(tensors, "the state to be saved")
        files.write_model(directory, self.description(), tensors, weights, self.origin)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes to `organization/name` on the Hugging Face Hub; return its address.

        `options` are those of huggingface_hub's ModelHubMixin.push_to_hub (private, token, commit_message, branch,
        create_pr, delete_patterns: by default the files of an earlier upload beside its model). ValueError for a name
        of another form, ConnectionError where the Hub refuses the upload.
        """
        from fm.model.hub import upload  # here, since a local model does not need huggingface_hub

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(Path(folder), repository, **options)

    @classmethod
    def from_pretrained(cls, source: Path | str, weights: str | None = None) -> Self:
        """Return a model on the CPU, in eval mode, from an exported folder, a checkpoint, or `hf://organization/name`.

        `weights` is a file in it; by default the averaged ones. OSError if a file is missing or the Hub does not give
        it; ValueError if model.json is of another format or another kind of model, the weights do not fit, or are not
        those that were exported. `fm.load` opens any kind, and a run's folder.
        """
        directory = files.locate(source)
        exported = files.is_exported(directory)
        if weights is None:
            averaged = not exported and (directory / files.EMA_FILE).exists()
            weights = files.EMA_FILE if averaged else files.WEIGHTS_FILE
        if exported:
            files.verify_exported(directory, (files.MODEL_FILE, weights))
        description, where = files.read_description(directory), str(directory / files.MODEL_FILE)
        kind = files.kind_of(description)
        if kind != cls.kind:
            found = "a WaveLiT" if kind is None else f"the {files.KINDS[kind]} {description[kind]!r}"
            raise ValueError(f"{where} is of {found}, not of a {cls.__name__}; fm.load opens either")
        specs = [from_json(DatasetSpec, spec, f"datasets of {where}") for spec in description["datasets"]]
        config: Any = from_json(cls.config_class, description["config"], f"config of {where}")
        cls.check_origin(config, directory)
        subclass: Any = cls  # subclasses are made alike
        make = partial(subclass, config, specs, context=description["context"])
        shapes = files.read_shapes(file := directory / weights)
        model = cls.make_within(make, shapes, description["context"], file).eval()
        model.load_weights(file)
        model.origin = directory
        return model

    @classmethod
    def check_origin(cls, config: Any, directory: Path) -> None:
        """Raise UserError if a model with the configuration `config` must not be made from files in `directory`."""

    @classmethod
    def make_within(
        cls, make: Callable[[], Self], shapes: Mapping[str, tuple[int, ...]], context: int, file: Path
    ) -> Self:
        """Return `make()`, a model that has exactly the weights of `shapes`, in `file`; else ValueError before it."""
        files.make_on_meta(make, shapes, context, str(file)).check_shapes(shapes, str(file))
        return make()

    def load_weights(self, file: Path | str) -> None:
        """Load a safetensors file whose keys and shapes must be exactly the model's."""
        tensors = files.read_weights(Path(file))
        self._check_state(tensors, str(file))
        self.load_state_dict(tensors)

    def _check_state(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self.check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, where)

    def check_shapes(self, given: Mapping[str, tuple[int, ...]], where: str) -> None:
        """ValueError, naming `where`, unless these are the names and shapes of the model's weights."""
        own = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        files.compare_shapes(own, given, f"{where} does not fit the model ({self._sizes()})")

    @abstractmethod
    def _sizes(self) -> str:
        """Return the model's sizes, for error messages."""
