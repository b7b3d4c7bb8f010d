"""Whether an extended model is the old one on the old datasets: the same tensors, the same predictions, bit for bit."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.windows.reader import ShardReader
from fm.model import MIN_GRID, DatasetSpec
from fm.scores.formats import markdown
from fm.surrogate import Surrogate

FIELDS = 4  # initial states of each dataset


@dataclass(frozen=True)
class Agreement:
    """One step of both models from the same fields of one dataset, in raw units, as float32 bits."""

    dataset: str
    fields: str  # what the step was taken from
    values: int  # numbers compared
    before: str  # SHA-256 of what the old model predicts
    after: str  # and of what the extended one does
    equal: bool


@dataclass(frozen=True)
class Proof:
    """All comparisons of an old model with the extended one."""

    tensors: int  # parameters and statistics of the old model, compared byte for byte
    changed: tuple[str, ...]  # those that differ or are gone
    agreements: tuple[Agreement, ...]

    def check(self) -> None:
        """UserError where anything differs."""
        differing = [*self.changed, *(f"predictions of {one.dataset}" for one in self.agreements if not one.equal)]
        if differing:
            raise UserError(
                f"the extended model is not the old one on the old datasets: {len(differing)} of "
                f"{self.tensors + len(self.agreements)} comparisons differ ({', '.join(differing[:4])}). Nothing is "
                "written; this is a fault of this machine's arithmetic or of the project, please report it."
            )

    def table(self) -> str:
        """The comparisons for people."""
        rows = [
            [one.dataset, one.fields, f"{one.values:,}", one.before[:12], one.after[:12], "yes" if one.equal else "NO"]
            for one in self.agreements
        ]
        head = ["dataset", "one step from", "values", "before, SHA-256", "after, SHA-256", "same bits"]
        same = self.tensors - len(self.changed)
        return f"{markdown(head, rows)}\n{same} of {self.tensors} tensors of the model are byte for byte the same."

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        steps = [asdict(one) for one in self.agreements]
        return {"tensors": self.tensors, "changed": list(self.changed), "steps": steps}


def compare(old: Surrogate, extended: Surrogate, readers: Mapping[str, ShardReader]) -> Proof:
    """Compare on all datasets of `old`: on windows of `readers` where they hold them, else on random fields."""
    before, after = _tensors(old), _tensors(extended)
    changed = [name for name in before if name not in after or not same_bits(before[name], after[name])]
    agreements = [_compare_step(old, extended, spec, readers.get(spec.name)) for spec in old.specs.values()]
    return Proof(len(before), tuple(changed), tuple(agreements))


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two float32 tensors are the same bits: NaN is as NaN, and 0 is not -0."""
    return torch.equal(first.contiguous().view(torch.int32), second.contiguous().view(torch.int32))


def _tensors(model: Surrogate) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _compare_step(old: Surrogate, extended: Surrogate, spec: DatasetSpec, reader: ShardReader | None) -> Agreement:
    if reader is not None and _has_its_channels(reader, spec):
        fields, (state, constants) = "windows", _windows(reader)
    else:
        fields, (state, constants) = "random fields", _random_fields(spec)
    before, after = (next(model.iterate(state, constants, spec.name, 1)) for model in (old, extended))
    return Agreement(
        spec.name,
        f"{len(state)} {fields}",
        before.numel(),
        _sha256(before),
        _sha256(after),
        same_bits(before, after),
    )


def _has_its_channels(reader: ShardReader, spec: DatasetSpec) -> bool:
    found = tuple(reader.manifest.state_channels), tuple(reader.manifest.constant_channels)
    return found == (spec.state_channels, spec.constant_channels)


def _windows(reader: ShardReader) -> tuple[Tensor, Tensor]:
    """Evenly spaced frames of the shards: states (B, C, H, W) and constants (B, K, H, W) in raw units."""
    count = len(reader.index(1))
    batch = reader.batch(np.unique(np.linspace(0, count - 1, FIELDS).astype(np.int64)), 1)
    return batch.fields[:, 0], batch.constants


def _random_fields(spec: DatasetSpec) -> tuple[Tensor, Tensor]:
    """Noise of the dataset's mean and spread on the grid of its training data: as `_windows`."""
    generator = torch.Generator().manual_seed(0)
    grid = spec.grid or (2 * MIN_GRID, 2 * MIN_GRID)

    def noise(channels: Sequence[str]) -> Tensor:
        drawn = torch.randn(FIELDS, len(channels), *grid, generator=generator, dtype=torch.float64)
        return (spec.moment("mean", channels) + spec.moment("std", channels) * drawn).float()

    return noise(spec.state_channels), noise(spec.constant_channels)


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
