"""Evaluation: measure once, store the errors, and derive scores, tables and pictures from them.

`evaluate_run` is the command `fm evaluate`. `evaluate_model` evaluates one model; its processes divide its parts
(fm/evaluation/parts.py), each finished part is stored, and the main process writes the report. If it is killed at any
moment, the same command continues. `validate` scores some windows and rollouts of the valid split during training.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from data_pipeline.errors import UserError
from data_pipeline.files import inside, only_process, sha256
from data_pipeline.progress import progress_bar
from data_pipeline.registry import Domain, Registry
from data_pipeline.windows.loader import ShardPlaces, open_readers
from data_pipeline.windows.reader import ShardReader
from data_pipeline.windows.streaming import default_cache
from fm.config import ValidationSettings
from fm.datasets import check_channels, check_direction
from fm.distributed import StopSignal, broadcast_from_main, detect_lost_processes, make_accelerator
from fm.evaluation.errors import ERRORS_FILE, FORMAT, TASKS, DatasetErrors, ErrorFile, check_names
from fm.evaluation.measure import (
    FrameErrors,
    ShownRollout,
    choose_shown,
    dataset_errors,
    make_sample,
    measure_rollouts,
    measure_windows,
    one_step_windows,
    rollout_batches,
)
from fm.evaluation.page import PAGE
from fm.evaluation.parts import EvaluationPart, PartFolder, cut, divide, remove_parts
from fm.evaluation.protocol import Protocol, load_protocol
from fm.evaluation.samples import Sample
from fm.evaluation.scores import SCORES_FILE, Scores, score
from fm.evaluation.stencil_choice import DatasetStencils, linear_stencils
from fm.evaluation.tables import score_table
from fm.evaluation.trained import FitReaders, TrainedModel
from fm.model.spec import DatasetSpec
from fm.model.surrogate import Surrogate

BATCH_SIZE = 8
VALIDATION_STEPS_SHOWN = 16  # of one rollout, for TensorBoard's pictures


def evaluate_run(
    run: Path | str,
    shards: ShardPlaces | None = None,
    out: Path | None = None,
    protocol: str | None = None,
    split: str | None = None,
    windows: int | None = None,
    datasets: Sequence[str] | None = None,
    quiet: bool = False,
) -> Path:
    """Score the averaged weights of a run or an exported model, print the table, and return the report's folder.

    Under a launcher all processes share the work. `shards` and `protocol` (a name or a file) default to the recipe's,
    `split` to the protocol's, `out` to <run>/report, for an exported model to <name>_report in the current folder. With
    `windows`, only so many one-step windows of each dataset are scored, and with `datasets` only these of the model's;
    shards of others are not needed. A report of the same weights, data and protocol is not made again; an interrupted
    one is continued. With `quiet` nothing is printed. UserError if checkpoint, datasets or shards are missing.
    """
    if windows is not None and windows < 1:
        raise UserError(f"--windows: expected at least 1 one-step window per dataset, got {windows}")
    trained = TrainedModel.open(run)
    chosen = load_protocol(protocol or trained.recipe.validation.protocol).for_context(trained.model.context)
    chosen = replace(chosen, split=split or chosen.split, one_step_windows=windows or chosen.one_step_windows)
    readers = trained.readers(trained.select(datasets), chosen.split, shards)
    out = out or inside(trained.report.parent, trained.report.name)
    with detect_lost_processes(), StopSignal().listen(at_once=True):
        accelerator = make_accelerator(trained.recipe.train.clip)  # nothing is clipped, but DeepSpeed needs the value
        log = print if accelerator.is_main_process and not quiet else lambda text: None
        fit_readers = trained.fit_readers(sorted(readers), shards, log)
        if broadcast_from_main(accelerator, lambda: _is_complete(out, trained, chosen, readers, fit_readers)):
            if accelerator.is_main_process:
                remove_parts(out)  # left by an evaluation that was killed after its report was written
            held = f"{out} already holds the scores of {trained.checkpoint.name}"
            log(f"{held}:\n\n{score_table(Scores.load(out / SCORES_FILE))}")
        else:
            # Sums are float64, which Apple's GPUs do not have.
            device = accelerator.device if accelerator.device.type == "cuda" else torch.device("cpu")
            origin = {"checkpoint": str(trained.checkpoint), "step": trained.step, "weights": trained.weights}
            scores = evaluate_model(
                trained.model,
                readers,
                out,
                chosen,
                device,
                origin=origin,
                registry=_registry(trained, log),
                accelerator=accelerator,
                fit_readers=fit_readers,
                cache=trained.recipe.stream().cache,
            )
            log(f"{trained.checkpoint}, averaged weights:\n\n{score_table(scores)}\nreport: {out}")
        accelerator.end_training()
    return out


def _is_complete(
    out: Path, trained: TrainedModel, protocol: Protocol, readers: Mapping[str, ShardReader], fits: FitReaders
) -> bool:
    """Whether the report of these weights, wherever they are, of this protocol and of these data is there and whole.

    One of an older format, or without the linear stencil of a dataset that has train and valid shards, is not.
    """
    if not inside(out, SCORES_FILE).is_file():
        return False
    scores = Scores.load(out / SCORES_FILE)
    try:
        ErrorFile.load(out / ERRORS_FILE)
    except UserError:
        return False
    whole = scores.format == FORMAT and (out / PAGE).is_file()
    whole &= all(part.stencil is not None or name not in fits for name, part in scores.datasets.items())
    weights = scores.origin.get("step"), scores.origin.get("weights")
    data = {name: part.data_digest for name, part in scores.datasets.items()}
    same_data = data == {name: reader.manifest.digest for name, reader in readers.items()}
    return whole and weights == (trained.step, trained.weights) and scores.protocol == protocol and same_data


def _registry(trained: TrainedModel, log: Callable[[str], object]) -> Registry | None:
    """Return the cards, whose extents and units pictures show; None without them, for a model can be scored so too."""
    try:
        return trained.registry()
    except UserError as error:
        log(f"pictures will have no physical axes: {error}")
        return None


def evaluate_model(
    model: Surrogate,
    readers: Mapping[str, ShardReader],
    out: Path,
    protocol: Protocol,
    device: torch.device,
    progress: bool = True,
    origin: Mapping[str, Any] | None = None,
    registry: Registry | None = None,
    accelerator: Accelerator | None = None,
    fit_readers: FitReaders | None = None,
    cache: Path | None = None,
) -> Scores:
    """Score the model on every reader's dataset under the protocol, write the report into `out`, return the scores.

    It measures the protocol's one-step windows of the split and one rollout of each trajectory, except the parts that
    an interrupted evaluation of the same model, data and protocol has finished. With an `accelerator`, all its
    processes call this function and share the work. `origin` (plain JSON), whose scores they are, is stored with
    them; pictures have the extents and units of the `registry`. The linear stencils are fitted on `fit_readers` by the
    main process and kept in `cache`, by default the user's; datasets without such readers have none. The model stays on
    `device`; its training mode is restored. UserError if model, data and protocol do not fit together, or the disk is
    full.
    """
    readers, protocol = dict(sorted(readers.items())), protocol.for_context(model.context)
    _check(model, readers)
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    wait: Callable[[], object] = accelerator.wait_for_everyone if accelerator else lambda: None
    fits = {name: splits for name, splits in (fit_readers or {}).items() if name in readers}
    given = protocol.last_given  # the last frame that rollouts start from
    fit = partial(linear_stencils, fits, protocol, given, device, cache or default_cache(), progress)
    stencils = broadcast_from_main(accelerator, fit) if accelerator else fit()
    evaluation = _Evaluation(model, readers, protocol, device, stencils)
    parts, folder = cut(readers, protocol, BATCH_SIZE), PartFolder(out, evaluation.identity())
    with only_process(out, "evaluation") if rank == 0 else nullcontext():
        if rank == 0:
            folder.prepare()
        wait()
        folder.check()
        evaluation.measure_share(parts, folder, rank, processes, progress)
        wait()
        if rank == 0:
            datasets, samples = evaluation.collect(parts, folder, registry)
            from fm.evaluation.report import write_report  # here, since validations and other processes draw nothing

            errors = ErrorFile(protocol, datasets, dict(origin or {}))
            write_report(out, errors, score(errors), samples)
            remove_parts(out)
        wait()
    return Scores.load(out / SCORES_FILE)


def _check(model: Surrogate, readers: Mapping[str, ShardReader]) -> None:
    for name, reader in readers.items():
        try:
            check_names(name, reader.manifest.state_channels)
        except ValueError as error:
            raise UserError(f"{reader.folder}: {error}: pictures and errors are kept under it") from error
        spec = model.specs[name]
        check_channels(reader, spec.state_channels, spec.constant_channels, "the model was trained on")
        check_direction(reader, spec)


@dataclass(frozen=True)
class _Evaluation:
    """The settings of one evaluation, and its work on one process."""

    model: Surrogate
    readers: Mapping[str, ShardReader]
    protocol: Protocol
    device: torch.device
    stencils: Mapping[str, DatasetStencils]

    def identity(self) -> dict[str, Any]:
        """Return all that the errors depend on: parts of another identity must not be used."""
        weights = [json.dumps(self.model.description(), sort_keys=True).encode()]
        for name, tensor in sorted(self.model.state_dict().items()):
            weights.append(name.encode() + tensor.cpu().numpy().tobytes())
        return {
            "model": sha256(*weights),
            "protocol": self.protocol.to_json(),
            "data": {name: reader.manifest.digest for name, reader in self.readers.items()},
            "batch_size": BATCH_SIZE,
            "device": self.device.type,
            "linear_stencils": {name: stencils.key for name, stencils in self.stencils.items()},
        }

    def measure_share(
        self, parts: Sequence[EvaluationPart], folder: PartFolder, rank: int, processes: int, progress: bool
    ) -> None:
        """Measure and store the parts of this process; the main process's bar counts the frames of all processes."""
        share = [part for part in divide(parts, processes)[rank] if folder.load(part) is None]
        finished = folder.finished(parts)
        if rank == 0 and finished:
            print(f"{folder.folder}: {len(finished)} of {len(parts)} parts are there, measuring the rest")
        bar = progress_bar(
            total=sum(part.frames for part in parts),
            initial=sum(part.frames for part in finished),
            desc="evaluate" if processes == 1 else f"evaluate ({processes} processes)",
            unit="frame",
            disable=rank > 0 or not progress,
            leave=False,
        )
        training = self.model.training
        self.model.to(self.device).eval()
        try:
            with bar:
                for part in share:
                    bar.set_postfix_str(f"{part.dataset}, {part.task}")
                    folder.save(part, self._measure(part, bar.update))
                    bar.update(sum(one.frames for one in folder.finished(parts)) - bar.n)  # by the other processes
        finally:
            self.model.train(training)

    def _measure(self, part: EvaluationPart, advance: Callable[[int], object]) -> FrameErrors:
        reader, stencils = self.readers[part.dataset], self.stencils.get(part.dataset)
        if part.task == "one_step":
            windows = np.array(part.ids, np.int64)
            linear = stencils.one_step.to(self.device) if stencils else None
            return measure_windows(self.model, reader, windows, self.device, BATCH_SIZE, advance, linear)
        linear, shown = stencils.rollout.to(self.device) if stencils else None, choose_shown(reader, self.protocol)
        return measure_rollouts(self.model, reader, part.ids, self.protocol, self.device, advance, shown, linear)

    def collect(
        self, parts: Sequence[EvaluationPart], folder: PartFolder, registry: Registry | None
    ) -> tuple[dict[str, DatasetErrors], list[Sample]]:
        """Return the errors of each dataset and the samples for pictures, from all parts."""
        datasets, samples = {}, []
        for name, reader in self.readers.items():
            one_step, rollouts = (
                [folder.require(part) for part in parts if (part.dataset, part.task) == (name, task)] for task in TASKS
            )
            everything = range(reader.num_trajectories)
            choice = self.stencils[name].choice if name in self.stencils else None
            datasets[name] = dataset_errors(reader, everything, self.protocol, one_step, rollouts, choice)
            shown, eps = choose_shown(reader, self.protocol), self.protocol.eps
            sample = make_sample(reader, shown, rollouts, datasets[name], eps, registry=registry)
            if sample is not None:
                samples.append(sample)
        return datasets, samples


@dataclass(frozen=True)
class ValidationResult:
    """Scores of the valid split, and of each dataset one rollout to look at."""

    scores: Scores
    samples: Mapping[str, Sample]

    def ratios(self) -> dict[str, float | None]:
        """Return one-step VRMSE over persistence's by dataset; None if it is not finite."""
        return {name: scores["over_persistence"] for name, scores in self.one_step().items()}

    def one_step(self) -> dict[str, dict[str, float | None]]:
        """Return one-step VRMSE, and that over persistence's, by dataset; None if it is not finite."""
        return {
            name: {"vrmse": block.vrmse(self.scores.statistic), "over_persistence": block.ratio_to_persistence}
            for name, part in self.scores.datasets.items()
            if (block := part.one_step) is not None
        }

    def scalars(self) -> dict[str, float]:
        """Return values by TensorBoard tag; NaN if a score is not finite."""
        statistic = self.scores.statistic
        mean = self.scores.geometric_mean_ratio_to_persistence
        values: dict[str, float | None] = {"valid_over_persistence/geometric_mean": mean}
        for name, part in self.scores.datasets.items():
            if part.one_step is not None:
                values[f"valid_vrmse/{name}"] = part.one_step.vrmse(statistic)
                values[f"valid_over_persistence/{name}"] = part.one_step.ratio_to_persistence
                for channel, scores in part.one_step.per_channel.items():
                    values[f"valid_vrmse_field/{name}/{channel}"] = scores.vrmse(statistic)
            for window, block in part.windows.items():
                if block is not None:
                    values[f"rollout_vrmse/{name}/{window}"] = block.vrmse(statistic)
        return {tag: float("nan") if value is None else value for tag, value in values.items()}


def _extent(spec: DatasetSpec, reader: ShardReader) -> Domain | None:
    """Return the lengths of the grid from 0 on, which a validation knows without the dataset's card; None if unknown.

    The pictures of a validation have the shape of the domain, but no axes.
    """
    if spec.spacing is None:
        return None
    x, y = (abs(step) * points for step, points in zip(spec.spacing, reader.manifest.grid, strict=True))
    return (0.0, x), (0.0, y)


def validate(
    model: Surrogate,
    readers: Mapping[str, ShardReader],
    settings: ValidationSettings,
    device: torch.device,
    advance: Callable[[int], object] = lambda count: None,
) -> ValidationResult:
    """Score `settings.windows` windows, evenly spaced, and `settings.rollouts` rollouts of each dataset."""
    protocol = load_protocol(settings.protocol).for_context(model.context)
    protocol = replace(protocol, split="valid", one_step_windows=settings.windows)
    datasets, samples = {}, {}
    for name, reader in sorted(readers.items()):
        trajectories = range(min(settings.rollouts, reader.num_trajectories))
        shown = choose_shown(reader, protocol, VALIDATION_STEPS_SHOWN, trajectory=0)
        one_step, rollouts = _measured(model, reader, trajectories, protocol, device, advance, shown)
        datasets[name] = dataset_errors(reader, trajectories, protocol, [one_step], rollouts)
        sample = make_sample(reader, shown, rollouts, datasets[name], protocol.eps, _extent(model.specs[name], reader))
        if sample is not None:
            samples[name] = sample
    return ValidationResult(score(ErrorFile(protocol, datasets)), samples)


def _measured(
    model: Surrogate,
    reader: ShardReader,
    trajectories: Sequence[int],
    protocol: Protocol,
    device: torch.device,
    advance: Callable[[int], object] = lambda count: None,
    shown: ShownRollout | None = None,
) -> tuple[FrameErrors, list[FrameErrors]]:
    """Return the errors of the protocol's one-step windows, and of the rollouts of some trajectories."""
    one_step = measure_windows(model, reader, one_step_windows(reader, protocol), device, BATCH_SIZE, advance)
    batches = rollout_batches(reader, trajectories, protocol, BATCH_SIZE)
    return one_step, [measure_rollouts(model, reader, ids, protocol, device, advance, shown) for ids in batches]


def score_model(
    model: Surrogate,
    shards: ShardPlaces,
    datasets: Sequence[str] | None = None,
    protocol: str = "wavelit",
    split: str | None = None,
    windows: int | None = None,
) -> Scores:
    """Return the scores of a model where it is, without a report and linear stencils (`fm.evaluate`).

    The arguments are those of `evaluate_run`; `datasets` are by default the model's datasets that `shards` has.
    UserError if model, shards and protocol do not fit together.
    """
    if windows is not None and windows < 1:
        raise UserError(f"windows: expected at least 1 one-step window per dataset, got {windows}")
    chosen = load_protocol(protocol).for_context(model.context)
    chosen = replace(chosen, split=split or chosen.split, one_step_windows=windows or chosen.one_step_windows)
    readers = open_readers(shards, datasets, chosen.split, known=tuple(model.specs))
    if datasets is None:
        readers = {name: reader for name, reader in readers.items() if name in model.specs} or readers
    if unknown := sorted(readers.keys() - model.specs.keys()):
        raise UserError(f"datasets: expected those of the model, {', '.join(model.specs)}; got {', '.join(unknown)}")
    _check(model, readers)
    found, training, device = {}, model.training, next(model.parameters()).device
    model.eval()
    try:
        for name, reader in sorted(readers.items()):
            trajectories = range(reader.num_trajectories)
            one_step, rollouts = _measured(model, reader, trajectories, chosen, device)
            found[name] = dataset_errors(reader, trajectories, chosen, [one_step], rollouts)
    finally:
        model.train(training)
    return score(ErrorFile(chosen, found))
