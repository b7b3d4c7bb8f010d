"""Networks other than WaveLiT: the built-in baselines, and classes that a recipe imports (`model: {import: ...}`).

`Network` is what such a class must be. `NetworkSurrogate` makes a surrogate of it, so that the trainer, rollouts,
scores and exports treat it as they treat WaveLiT. One network serves all its datasets. It reads the union of their
canonical channels and frames, each in its own slot, zero where a dataset has none, and the dataset as one-hot channels.
It writes the union of the state channels, of which a dataset's own are taken.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from data_pipeline.errors import UserError
from fm.model import files
from fm.model.files import IMPORTED
from fm.model.imports import ImportSettings, check_allowed, construct, import_class
from fm.model.spec import STRICT, DatasetSpec, Predict, Wavelet
from fm.model.surrogate import Surrogate


class Network(Protocol):
    """The contract of a network: a torch.nn.Module that is made as `cls(dim_in, dim_out, **args)`.

    The input x is (B, dim_in, H, W): the last frame of each state channel, the changes from the frames before it, the
    constant channels, and one channel for each dataset, which is 1 for the dataset of the batch and else 0. Fields have
    zero mean and unit variance over the training data, changes have unit variance. The output is (B, dim_out, H, W): a
    channel for each state channel, which is its change to the next frame in units of the change's standard deviation,
    or with `predict: state` the next frame. H and W differ by dataset.

    The constructor draws the initial weights from torch's generator, which the recipe's seed has set. Checkpoints hold
    the parameters. Buffers are constants, which the constructor makes again.
    """

    # Both are optional attributes of the class or of the object.
    grid_multiple: int  # H and W are extended to multiples of it, by wrapping on periodic axes; 1 where it is missing
    float32: bool  # whether train.precision: bf16 has no effect on the network; False where it is missing

    def __init__(self, dim_in: int, dim_out: int) -> None: ...

    def __call__(self, x: Tensor) -> Tensor:
        """Map fields (B, dim_in, H, W) to (B, dim_out, H, W)."""


class NetworkSurrogate(Surrogate):
    """A `Network` for the given datasets; `seed` draws the initial weights."""

    def __init__(self, config: Any, datasets: Sequence[DatasetSpec], seed: int = 0, context: int = 1) -> None:
        super().__init__(datasets, config.predict, {}, config.wavelet, context)
        self.config = config
        self.blocks = nn.ModuleList()
        specs = self.specs.values()
        self.slots = sorted({name for spec in specs for name in spec.inputs(context)})
        self.outputs = sorted({name for spec in specs for name in spec.state_channels})
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.network = self.make_network(len(self.slots) + len(self.specs), len(self.outputs))

    @abstractmethod
    def make_network(self, dim_in: int, dim_out: int) -> nn.Module:
        """Return a new network for the configuration. UserError if it cannot be made."""

    def output(self, inputs: Tensor, spec: DatasetSpec, scalars: Tensor | None = None) -> Tensor:
        """Return the network's output (B, C, H, W) for the dataset's state channels; see `Surrogate.output`."""
        height, width = inputs.shape[-2:]
        x = _padded(self._joint_input(inputs, spec), getattr(self.network, "grid_multiple", 1), spec.periodic)
        device = x.device.type
        autocast = torch.is_autocast_enabled(device) and not getattr(self.network, "float32", False)
        with torch.autocast(device, enabled=autocast):
            output = self.network(x)
        expected = (len(x), len(self.outputs), *x.shape[-2:])
        if not isinstance(output, Tensor) or output.shape != expected:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(
                f"{type(self.network).__name__}: expected an output (B, dim_out, H, W) = {expected} for fields "
                f"{tuple(x.shape)}, got {found}"
            )
        own = [self.outputs.index(name) for name in spec.state_channels]
        return output[:, own, :height, :width].float()

    def _joint_input(self, inputs: Tensor, spec: DatasetSpec) -> Tensor:
        """Put the dataset's inputs in their slots, beside the one-hot dataset: (B, slots + datasets, H, W)."""
        x = inputs.new_zeros(len(inputs), len(self.slots) + len(self.specs), *inputs.shape[-2:])
        x[:, [self.slots.index(name) for name in spec.inputs(self.context)]] = inputs
        x[:, len(self.slots) + list(self.specs).index(spec.name)] = 1.0
        return x

    def adapted_to(self, datasets: Sequence[DatasetSpec]) -> Self:
        """Return this model with all its datasets, whose union its slots are. ValueError for another dataset."""
        adapted = {spec.name: spec for spec in self._adapted_specs(datasets)}
        unknown = [name for name in adapted if name not in self.specs]
        if unknown:
            raise ValueError(
                f"this network has input and output slots for the datasets it was made for ({', '.join(self.specs)}), "
                f"none for {', '.join(unknown)}: train one on all of them"
            )
        specs = [adapted.get(name, spec) for name, spec in self.specs.items()]
        model = type(self)(self.config, specs, context=self.context)
        model.load_state_dict(self.state_dict())
        return model


@dataclass(frozen=True, config=STRICT)
class ImportedConfig(ImportSettings):
    """A network by the name of its class, and its training target, as WaveLiT has it."""

    predict: Predict = "delta"  # delta (the change, in units of its own std) or state (the next frame)
    wavelet: Wavelet = "bior2.2"  # of the loss


class ImportedModel(NetworkSurrogate):
    """A surrogate whose network is a class that the recipe imports."""

    section = "model"
    kind = IMPORTED
    config_class = ImportedConfig
    config: ImportedConfig

    def make_network(self, dim_in: int, dim_out: int) -> nn.Module:
        """Import the class and make the network. UserError as of `import_class` and `construct`."""
        cls: type[nn.Module] = import_class(self.config, nn.Module, "model.import")
        network = construct(cls, self.config, "model", dim_in, dim_out)
        for name, module in network.named_modules():
            if getattr(module, "track_running_stats", False):
                raise UserError(
                    f"{self.config.import_}: {name} ({type(module).__name__}) keeps running averages, which "
                    "checkpoints do not hold, and which would mix the datasets; use nn.GroupNorm, or "
                    "track_running_stats=False"
                )
            module._non_persistent_buffers_set.update(module._buffers)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise UserError(f"{self.config.import_}: expected a network with parameters to train, got none")
        names = {name for name, _ in network.named_parameters(remove_duplicate=False)}
        if shared := sorted(names - {name for name, _ in network.named_parameters()}):
            raise UserError(
                f"{self.config.import_}: {shared[0]} is another name of a parameter, and checkpoints hold each "
                "parameter under one name; call one module twice instead"
            )
        return network

    def output(self, inputs: Tensor, spec: DatasetSpec, scalars: Tensor | None = None) -> Tensor:
        """Return the network's output (B, C, H, W); UserError if the network changes its buffers while it trains."""
        before = self._buffer_versions() if self.training else None
        output = super().output(inputs, spec, scalars)
        if before is not None and before != self._buffer_versions():
            raise UserError(
                f"{self.config.import_}: its forward changes a buffer, and checkpoints hold parameters only, so a "
                "resumed run would differ; keep what changes out of the network"
            )
        return output

    def _buffer_versions(self) -> list[tuple[int, int]]:
        return [(id(buffer), buffer._version) for buffer in self.network.buffers()]

    @classmethod
    def check_origin(cls, config: ImportedConfig, directory: Path) -> None:
        """Raise UserError unless the user allowed the import that model.json in `directory` names."""
        is_of_run = directory.parent.name in ("checkpoints", "best", "incidents")
        folder = directory.parent.parent if is_of_run else directory
        check_allowed(config, str(directory / files.MODEL_FILE), folder)

    @classmethod
    def make_within(
        cls, make: Callable[[], Self], shapes: Mapping[str, tuple[int, ...]], context: int, file: Path
    ) -> Self:
        """Return the model; its class need not be able to run on the meta device. ValueError as of `make_on_meta`."""
        with files.limited_to(shapes, context, str(file)):
            model = make()
        model.check_shapes(shapes, str(file))
        return model

    def description(self) -> dict[str, Any]:
        """Return the content of model.json: as a WaveLiT's, and the name of the class."""
        return {IMPORTED: self.config.import_, **super().description()}

    def _sizes(self) -> str:
        return f"{self.config.import_}, args {dict(self.config.args)}"


def _padded(x: Tensor, multiple: int, periodic: tuple[bool, bool]) -> Tensor:
    """Extend fields at their upper ends to multiples: by the lower end on a periodic axis, else by the last value."""
    for dim, wraps in zip((-2, -1), periodic, strict=True):
        side = x.shape[dim]
        if side % multiple:
            longer = torch.arange(side + -side % multiple, device=x.device)
            x = x.index_select(dim, longer % side if wraps else longer.clamp_max(side - 1))
    return x
