"""What pictures show of an evaluation: one channel of the longest rollout of each dataset, at some of its steps."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from data_pipeline.shards.manifest import Manifest
from data_pipeline.windows.reader import ShardReader
from fm.evaluation.measure import rollout_steps
from fm.report.sample import Domain, Sample, spread_over
from fm.scores.protocol import Protocol

SHOWN_STEPS = 24


class Recorder:
    """Keeps one channel of one trajectory's rollout at a few steps: a watcher for `measure_rollouts`."""

    def __init__(self, trajectory: int, channel: int, steps: tuple[int, ...]) -> None:
        self.trajectory, self.channel, self.steps = trajectory, channel, steps
        self.fields: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, trajectories: Sequence[int], step: int, prediction: Tensor, truth: Tensor) -> None:
        if step in self.steps and self.trajectory in trajectories:
            row = trajectories.index(self.trajectory)
            self.fields.append((truth[row, self.channel].cpu().numpy(), prediction[row, self.channel].cpu().numpy()))

    def stacked(self) -> np.ndarray | None:
        """Truth and prediction, (2, n, H, W); None where nothing was kept."""
        return np.stack(self.fields, axis=1) if self.fields else None


def longest_recorder(reader: ShardReader, protocol: Protocol) -> Recorder:
    """Keeps what is shown of a dataset, whatever batch its longest rollout is in."""
    steps = [rollout_steps(reader, trajectory, protocol) for trajectory in range(reader.num_trajectories)]
    longest = int(np.argmax(steps))
    shown = tuple(index + 1 for index in spread_over(steps[longest], SHOWN_STEPS))
    return Recorder(longest, shown_channel(reader.manifest), shown)


def shown_channel(manifest: Manifest) -> int:
    """The channel that pictures show."""
    std, rms = manifest.stats["std"], manifest.stats["rms"]
    names = manifest.state_channels
    return varying_channel([std[name] for name in names], [rms[name] for name in names])


def varying_channel(std: Sequence[float], rms: Sequence[float]) -> int:
    """The first channel with std above a tenth of its rms, else the first.

    The Well lists scalar fields first, but active_matter's first, a concentration, is all but constant.
    """
    varying = [index for index, (one, size) in enumerate(zip(std, rms, strict=True)) if one > 0.1 * size]
    return varying[0] if varying else 0


def as_sample(
    reader: ShardReader, kept: Recorder, fields: np.ndarray, vrmse: np.ndarray, domain: Domain | None = None
) -> Sample:
    """What a recorder was to keep: `fields` (2, n, H, W) of truth and prediction, `vrmse` (S, C) of its trajectory."""
    return Sample(
        dataset=reader.dataset,
        channel=reader.manifest.state_channels[kept.channel],
        trajectory=kept.trajectory,
        dt=reader.manifest.trajectories[kept.trajectory].dt,
        steps=kept.steps,
        truth=fields[0],
        prediction=fields[1],
        vrmse=vrmse[np.array(kept.steps) - 1, kept.channel],
        domain=domain,
    )
