"""Scores on the valid split while training: a few windows and rollouts per dataset, by evaluation's own code."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from data_pipeline.windows.reader import ShardReader
from fm.evaluation.measure import one_step_errors, one_step_windows, rollout_errors, rollout_steps
from fm.evaluation.shown import Recorder, as_sample, shown_channel
from fm.report.sample import Sample, spread_over
from fm.scores.errors import DatasetErrors, ErrorFile
from fm.scores.protocol import Protocol, load_protocol
from fm.scores.scoring import score
from fm.settings import ValidationSettings
from fm.surrogate import Surrogate

SHOWN_STEPS = 16  # of one rollout, for TensorBoard's pictures


@dataclass(frozen=True)
class ValidationResult:
    """Scores as `fm.scores.scoring.score` gives them, and of each dataset one rollout to look at."""

    scores: Mapping[str, Any]
    samples: Mapping[str, Sample]

    @property
    def mean_ratio(self) -> float | None:
        """Geometric mean over datasets of one-step VRMSE over persistence; None where a prediction was not finite."""
        return self.scores["geometric_mean_ratio_to_persistence"]

    def ratios(self) -> dict[str, float | None]:
        """One-step VRMSE over persistence's by dataset; None where it is not finite."""
        return {name: part["one_step"]["ratio_to_persistence"] for name, part in self.scores["datasets"].items()}

    def one_step(self) -> dict[str, dict[str, float | None]]:
        """One-step VRMSE, and that over persistence's, by dataset; None where it is not finite."""
        lead = self.scores["protocol"]["trajectories"]
        return {
            name: {"vrmse": part["one_step"][lead], "over_persistence": part["one_step"]["ratio_to_persistence"]}
            for name, part in self.scores["datasets"].items()
        }

    def scalars(self) -> dict[str, float]:
        """TensorBoard tags and values; NaN where there is no finite score."""
        lead = self.scores["protocol"]["trajectories"]
        values: dict[str, float | None] = {"valid_over_persistence/geometric_mean": self.mean_ratio}
        for name, part in self.scores["datasets"].items():
            values[f"valid_vrmse/{name}"] = part["one_step"][lead]
            values[f"valid_over_persistence/{name}"] = part["one_step"]["ratio_to_persistence"]
            for channel, cell in part["one_step"]["per_channel"].items():
                values[f"valid_vrmse_field/{name}/{channel}"] = cell[lead]
            for window, cell in part["windows"].items():
                if cell is not None:
                    values[f"rollout_vrmse/{name}/{window}"] = cell[lead]
        return {tag: float("nan") if value is None else value for tag, value in values.items()}


def protocol_windows(name: str) -> list[str]:
    """Names of the rollout windows of a protocol, by its name or file. UserError where there is none."""
    return list(load_protocol(name).windows)


def validate(
    model: Surrogate, readers: Mapping[str, ShardReader], settings: ValidationSettings, device: torch.device
) -> ValidationResult:
    """Score `settings.windows` windows, evenly spaced, and `settings.rollouts` rollouts of each dataset."""
    protocol = replace(load_protocol(settings.protocol), split="valid", one_step_windows=settings.windows)
    datasets, samples = {}, {}
    for name, reader in sorted(readers.items()):
        trajectories = list(range(min(settings.rollouts, reader.num_trajectories)))
        recorder = _recorder(reader, protocol)
        one_step = one_step_errors(model, reader, one_step_windows(reader, protocol), device)
        rollouts = rollout_errors(model, reader, trajectories, protocol, device, watch=recorder)
        manifest, ids = reader.manifest, np.array(trajectories, np.int64)
        datasets[name] = DatasetErrors(manifest.state_channels, ids, one_step, rollouts, manifest.digest, manifest.grid)
        fields = recorder.stacked()
        if fields is not None:
            samples[name] = as_sample(reader, recorder, fields, rollouts.vrmse("model", protocol.eps)[0])
    return ValidationResult(score(ErrorFile(protocol, datasets)), samples)


def _recorder(reader: ShardReader, protocol: Protocol) -> Recorder:
    """Keeps some steps of the first trajectory."""
    shown = spread_over(rollout_steps(reader, 0, protocol), SHOWN_STEPS)
    return Recorder(0, shown_channel(reader.manifest), tuple(index + 1 for index in shown))
