"""`fm figure`: truth, prediction and error of one rollout, as a picture for a paper or a talk.

The fields are those that an evaluation has stored (samples.npz). For another channel, trajectory or step the model is
rolled out again on the shards. The picture is 7 inches wide, the width of a page of two columns, or narrower; its text
is text in a PDF, and outlines in an SVG, which look the same on every machine.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

from data_pipeline.errors import UserError
from data_pipeline.files import file_name, inside, write_whole
from data_pipeline.schema import nearest
from data_pipeline.windows.reader import ShardReader
from fm.datasets import check_channels, check_direction
from fm.evaluation.errors import ERRORS_FILE, ErrorFile
from fm.evaluation.measure import (
    ShownRollout,
    choose_shown,
    dataset_errors,
    make_sample,
    measure_rollouts,
    rollout_steps,
)
from fm.evaluation.plots import without_formulas
from fm.evaluation.protocol import Protocol, load_protocol
from fm.evaluation.rollout_figure import rollout_figure
from fm.evaluation.samples import SAMPLES_FILE, Sample, evenly_spaced, load_samples
from fm.evaluation.trained import TrainedModel
from fm.model.files import is_exported

FORMATS = ("pdf", "svg", "png")
DPI = 300  # of a PNG, and of the fields in a PDF or SVG
SHOWN_STEPS = 5  # by default
MOST_STEPS = 8  # that have room in a figure
FIGURES = "figures"  # a folder in that of the report
# No dates and no random names in the files: the same rollout gives the same bytes.
SETTINGS = {"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "wavelit-fm"}
METADATA: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}


@dataclass(frozen=True)
class FigureRequest:
    """What is drawn; None: what the evaluation has stored, and SHOWN_STEPS evenly spaced steps."""

    dataset: str
    channel: str | None = None
    trajectory: int | None = None
    steps: tuple[int, ...] | None = None  # 1-based, ascending

    def __post_init__(self) -> None:
        """Raise UserError for steps or a trajectory that no rollout has."""
        if self.steps is not None:
            ascending = list(self.steps) == sorted(set(self.steps))
            if not ascending or not 1 <= len(self.steps) <= MOST_STEPS or self.steps[0] < 1:
                raise UserError(
                    f"--steps: expected 1 to {MOST_STEPS} steps of a rollout, ascending and from 1 on, such as "
                    f"1,5,20; got {','.join(map(str, self.steps)) or 'none'}"
                )
        if self.trajectory is not None and self.trajectory < 0:
            raise UserError(f"--trajectory: expected a number from 0 on, got {self.trajectory}")

    def fits(self, sample: Sample) -> bool:
        """Return whether a stored sample holds all that is drawn."""
        return (
            sample.dataset == self.dataset
            and self.channel in (None, sample.channel)
            and self.trajectory in (None, sample.trajectory)
            and set(self.steps or ()) <= set(sample.steps)
        )


def draw_figure(
    source: str, request: FigureRequest, form: str = "pdf", shards: str | None = None, out: Path | None = None
) -> Path:
    """Draw a rollout into a file, print where the fields come from, and return the file.

    `source` is a run, a checkpoint, an exported model, hf://organization/name, or a folder with a samples.npz. `form`
    is one of FORMATS. `out` defaults to `figures/<dataset>_<channel>_<trajectory>.<form>` in the folder of the report.
    Raises UserError if neither the stored samples nor the model and its shards have what is asked for.
    """
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise UserError(f"--out {out}: expected a file to write in an existing folder")
    report, trained = _find(source)
    stored = _stored(report, trained)
    sample = next((one for one in stored if request.fits(one)), None)
    if sample is None:
        sample = _rolled_out(source, trained, request, shards, stored)
    steps = sample.steps if request.steps is None else request.steps
    shown = [sample.steps.index(step) for step in steps]
    if request.steps is None:
        shown = evenly_spaced(len(sample.steps), SHOWN_STEPS)
    name = file_name(f"{sample.dataset}_{sample.channel}_{sample.trajectory}.{form}")
    if out is None:
        out = inside(report, f"{FIGURES}/{name}")
        out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, encoded(sample, shown, form))
    return out


def encoded(sample: Sample, shown: Sequence[int], form: str) -> bytes:
    """Return the figure of a sample, at the steps of these indices, as the bytes of a file of one of FORMATS."""
    figure, file = rollout_figure(sample, shown), io.BytesIO()
    without_formulas(figure)
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(file, format=form, dpi=DPI, metadata=METADATA[form])
    return file.getvalue()


def _find(source: str) -> tuple[Path, TrainedModel | None]:
    """Return the folder of the report, which may not exist, and the model if it had to be opened to know the folder."""
    place = Path(source)
    for folder in (place, place / "report"):
        if (folder / SAMPLES_FILE).is_file() and not is_exported(place):
            return folder, None
    trained = TrainedModel.open(source)
    return trained.report, trained


def _stored(report: Path, trained: TrainedModel | None) -> list[Sample]:
    """Return the samples of a report; none if it is not a report of this model's weights, as far as that is known."""
    if not (report / SAMPLES_FILE).is_file():
        return []
    origin = ErrorFile.load(report / ERRORS_FILE).origin if (report / ERRORS_FILE).is_file() else {}
    if trained is not None and origin.get("weights") != trained.weights:
        return []
    step = f", of the weights of step {origin['step']}" if "step" in origin else ""
    print(f"stored fields: {report / SAMPLES_FILE}{step}")
    return load_samples(report / SAMPLES_FILE)


def _rolled_out(
    source: str, trained: TrainedModel | None, request: FigureRequest, shards: str | None, stored: Sequence[Sample]
) -> Sample:
    """Return the rollout that is asked for, by the model on the shards of its protocol's split."""
    name = request.dataset
    try:
        trained = trained or TrainedModel.open(source)
        if name not in trained.model.specs:
            raise UserError(f"--dataset: the model knows no {name!r}. {nearest(name, trained.model.specs)}")
        protocol = load_protocol(trained.recipe.validation.protocol).for_context(trained.model.context)
        reader = trained.readers([name], protocol.split, shards)[name]
    except UserError as error:
        held = [
            f"channel {one.channel}, trajectory {one.trajectory}, steps {' '.join(map(str, one.steps))}"
            for one in stored
            if one.dataset == name
        ]
        note = f"\nWithout the model and its shards, this can be drawn of {name}: {held[0]}" if held else ""
        raise UserError(f"{error}{note}") from error
    return _roll_out(trained, reader, protocol, request)


def _roll_out(trained: TrainedModel, reader: ShardReader, protocol: Protocol, request: FigureRequest) -> Sample:
    spec, channels = trained.model.specs[request.dataset], reader.manifest.state_channels
    check_channels(reader, spec.state_channels, spec.constant_channels, "the model was trained on")
    check_direction(reader, spec)
    if request.channel is not None and request.channel not in channels:
        raise UserError(
            f"--channel: {request.dataset} has no {request.channel!r}. {nearest(request.channel, channels)}"
        )
    if request.trajectory is not None and request.trajectory >= reader.num_trajectories:
        raise UserError(
            f"--trajectory: the {protocol.split} split of {request.dataset} has the trajectories 0 to "
            f"{reader.num_trajectories - 1}, got {request.trajectory}"
        )
    shown = choose_shown(reader, protocol, trajectory=request.trajectory)
    longest = rollout_steps(reader, shown.trajectory, protocol)
    steps = sorted({*shown.steps, *(request.steps or ())})
    if not shown.steps or steps[-1] > longest:
        raise UserError(
            f"--steps: trajectory {shown.trajectory} of {request.dataset} has {longest} steps to predict, got "
            f"{','.join(map(str, request.steps or ()))}"
        )
    channel = shown.channel if request.channel is None else channels.index(request.channel)
    shown = ShownRollout(shown.trajectory, channel, tuple(steps))
    print(f"rolling out: {longest} steps of {trained.checkpoint.name} on {reader.folder}")
    frames = measure_rollouts(trained.model, reader, [shown.trajectory], protocol, torch.device("cpu"), shown=shown)
    errors = dataset_errors(reader, [shown.trajectory], protocol, [], [frames])
    try:
        registry = trained.registry()
    except UserError as error:
        print(f"no physical axes and units: {error}")
        registry = None
    sample = make_sample(reader, shown, [frames], errors, protocol.eps, registry=registry)
    assert sample is not None
    return sample
