"""Evaluation: measure once, store the errors, derive the scores, the tables and the pictures from them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_file
from data_pipeline.shards.manifest import Manifest
from data_pipeline.windows.reader import ShardReader
from fm.evaluation.measure import one_step_errors, one_step_windows, rollout_errors, rollout_steps
from fm.model import WaveLiTFM
from fm.report.curves import growth_figure
from fm.report.sample import Sample
from fm.report.strips import overview, strip
from fm.scores.errors import DatasetErrors, ErrorFile
from fm.scores.protocol import Protocol
from fm.scores.scoring import score
from fm.scores.tables import score_table
from fm.specs import check_channels

SHOWN_STEPS = 6
DPI = 160


def evaluate_model(
    model: WaveLiTFM,
    readers: Mapping[str, ShardReader],
    out: Path,
    protocol: Protocol,
    device: torch.device,
    batch_size: int = 8,
    progress: bool = True,
    origin: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score the model on every reader's dataset under the protocol; returns what scores.json holds.

    One-step over the protocol's windows of the split, one rollout per trajectory. Writes errors.npz, scores.json,
    scores.md and pictures/{<dataset>,overview,growth}.png under `out`. `origin` (plain JSON) says whose scores they are
    and is stored with them. The model stays on `device`; its training mode is put back.
    Raises UserError where model, data and protocol do not fit together, or the disk is full.
    """
    readers = dict(sorted(readers.items()))
    _check(model, readers, protocol)
    work = sum(len(one_step_windows(r, protocol)) + sum(_all_steps(r, protocol)) for r in readers.values())
    datasets, samples = {}, []
    training = model.training
    model.to(device).eval()
    try:
        with tqdm(total=work, desc="evaluate", unit="frame", disable=not progress, leave=False) as bar:
            for name, reader in readers.items():
                bar.set_postfix_str(name)
                datasets[name], sample = _measure(model, reader, protocol, device, batch_size, bar)
                samples += [sample] if sample else []
    finally:
        model.train(training)
    errors = ErrorFile(protocol, datasets, dict(origin or {}))
    scores = score(errors)
    write_report(out, errors, scores, samples)
    return scores


def write_report(out: Path, errors: ErrorFile, scores: Mapping[str, Any], samples: list[Sample]) -> None:
    """The files of one evaluation. An older scores.json goes first, the new one comes last: where it is, all is."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").unlink(missing_ok=True)
    errors.save(out / "errors.npz")
    figures = {"overview": overview(samples)} if samples else {}
    figures["growth"] = growth_figure(errors.datasets, errors.protocol)
    figures |= {sample.dataset: strip(sample) for sample in samples}
    for name, figure in figures.items():
        with atomic_file(out / "pictures" / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=DPI)
    pictures = "\n".join(f"![{name}](pictures/{name}.png)\n" for name in figures)
    _write_text(out / "scores.md", f"# Scores\n\n{score_table(scores)}\n{pictures}")
    _write_text(out / "scores.json", json.dumps(scores, indent=1, allow_nan=False) + "\n")


class Recorder:
    """Keeps one channel of one trajectory's rollout at a few steps: a watcher for `rollout_errors`."""

    def __init__(self, trajectory: int, channel: int, steps: tuple[int, ...]) -> None:
        self.trajectory, self.channel, self.steps = trajectory, channel, steps
        self.fields: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, trajectories: Sequence[int], step: int, prediction: Tensor, truth: Tensor) -> None:
        if step in self.steps and self.trajectory in trajectories:
            row = trajectories.index(self.trajectory)
            self.fields.append((truth[row, self.channel].cpu().numpy(), prediction[row, self.channel].cpu().numpy()))


def shown_channel(manifest: Manifest) -> int:
    """The channel that pictures show: the first with std above a tenth of its rms, else the first.

    The Well lists scalar fields first, but active_matter's first, a concentration, is all but constant.
    """
    std, rms = manifest.stats["std"], manifest.stats["rms"]
    varying = [index for index, name in enumerate(manifest.state_channels) if std[name] > 0.1 * rms[name]]
    return varying[0] if varying else 0


def shown_steps(horizon: int, count: int = SHOWN_STEPS) -> tuple[int, ...]:
    """About `count` steps, evenly from the first to the last."""
    return tuple(np.unique(np.linspace(1, horizon, count).round().astype(int)).tolist())


def _measure(
    model: WaveLiTFM, reader: ShardReader, protocol: Protocol, device: torch.device, batch_size: int, bar: tqdm
) -> tuple[DatasetErrors, Sample | None]:
    """The errors of one dataset and, of the longest rollout, what its strip shows (None where there is no rollout)."""
    manifest, trajectories = reader.manifest, list(range(reader.num_trajectories))
    steps = _all_steps(reader, protocol)
    longest = int(np.argmax(steps))
    recorder = Recorder(longest, shown_channel(manifest), shown_steps(steps[longest]) if steps[longest] else ())
    windows = one_step_windows(reader, protocol)
    one_step = one_step_errors(model, reader, windows, device, batch_size, bar.update)
    rollouts = rollout_errors(model, reader, trajectories, protocol, device, batch_size, bar.update, recorder)
    errors = DatasetErrors(
        manifest.state_channels, np.array(trajectories), one_step, rollouts, manifest.digest, manifest.grid
    )
    if not recorder.steps:
        return errors, None
    truth, prediction = (np.stack(fields) for fields in zip(*recorder.fields, strict=True))
    vrmse = rollouts.vrmse("model", protocol.eps)[longest, np.array(recorder.steps) - 1, recorder.channel]
    channel = manifest.state_channels[recorder.channel]
    dt = manifest.trajectories[longest].dt
    return errors, Sample(manifest.dataset, channel, longest, dt, recorder.steps, truth, prediction, vrmse)


def _all_steps(reader: ShardReader, protocol: Protocol) -> list[int]:
    return [rollout_steps(reader, trajectory, protocol) for trajectory in range(reader.num_trajectories)]


def _check(model: WaveLiTFM, readers: Mapping[str, ShardReader], protocol: Protocol) -> None:
    if protocol.context != 1:
        raise UserError(
            f"protocol {protocol.name}: expected context 1, the frames this model sees; got {protocol.context}"
        )
    if not readers:
        raise UserError("evaluate: expected at least one dataset, got none")
    for name, reader in readers.items():
        manifest = reader.manifest
        if manifest.split != protocol.split:
            raise UserError(
                f"{reader.folder}: protocol {protocol.name} scores the split {protocol.split}, this is {manifest.split}"
            )
        if name not in model.specs:
            raise UserError(
                f"evaluate: expected datasets that the model knows ({', '.join(model.specs)}), got {name}: "
                "leave that one out"
            )
        spec = model.specs[name]
        check_channels(reader, spec.state_channels, spec.constant_channels, "the model was trained on")


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
