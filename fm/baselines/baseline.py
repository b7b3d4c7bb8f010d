"""A baseline as a surrogate: one network for all its datasets.

It reads the union of the datasets' canonical channels, each in its own slot, zero where a dataset has none, and the
dataset as one-hot channels; it writes the union of the state channels, of which a dataset's own are taken. What comes
out is a change or a state in the units that WaveLiT's heads have, so trainer, loss and scores are the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fm.baselines.config import BaselineConfig
from fm.baselines.networks import FLOAT32, build_network, grid_multiple
from fm.model_config import DatasetSpec
from fm.pretrained import BASELINE
from fm.surrogate import Surrogate


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
