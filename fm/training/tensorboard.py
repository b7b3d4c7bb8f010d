"""TensorBoard's files of a run, and the other trackers that accelerate supports (`tracking.log_with: [wandb]`).

`Dashboard` writes scalars, texts and pictures (tags: README, "Watch") and what two of TensorBoard's pages need: the
charts of Custom Scalars and the settings of HParams. Truth, prediction and error have together at most 130 kB (350
pixels wide and about as high, of one byte), a moving rollout 205 kB (16 steps of three panels of 64 x 64). So the
pictures of eight datasets and 40 validations (tracking.pictures) stay below 120 MB, for a run of any length.
"""

import io
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from google.protobuf.json_format import ParseDict
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from data_pipeline.errors import UserError
from fm.config import FinetuneSettings
from fm.evaluation.cosines import Cosines
from fm.evaluation.samples import Sample
from fm.training.runlog import AppendedFile

Setting = str | int | float | bool

PROJECT = "wavelit-fm"
# how a tracker names the argument for the name of a run within the project
RUN_NAME_ARGUMENT = {"wandb": "name", "mlflow": "run_name", "trackio": "name", "swanlab": "experiment_name"}

ONE_IMAGE = ("aim", "clearml")  # trackers of which accelerate takes an image where it takes a list from the others

HPARAMS_SUFFIX = ".hparams"
HPARAMS_SECTIONS = ("train", "model", "baseline", "loss", "finetune")
HPARAMS_SINGLE = (("run", "seed"), ("sampling", "scheme"), ("sampling", "draw"))
# The HParams page shows five columns at first: those that are marked as different, then the others by name.
HPARAMS_FIRST = ("finetune.objective", "model.width", "sampling.scheme", "train.learning_rate", "train.steps")


class EventFile:
    """An event file of TensorBoard.

    The SummaryWriter of torch writes from a thread that ends for good when the disk is full once, with what it held.
    """

    VERSION = "brain.Event:2"

    def __init__(
        self, directory: Path, number: int, report: Callable[[str], object], suffix: str = "", purge_step: int = -1
    ) -> None:
        """Begin file `number` of this second; events of earlier files from `purge_step` >= 0 on are not shown."""
        directory.mkdir(parents=True, exist_ok=True)
        name = f"{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{number}{suffix}"
        self._file = AppendedFile(directory / f"events.out.tfevents.{name}", report)
        self._records = RecordWriter(self._file)
        self._write(Event(file_version=self.VERSION))
        if purge_step >= 0:
            self._write(Event(step=purge_step, file_version=self.VERSION))
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, content: Summary, step: int = 0) -> None:
        """Append an event."""
        self._write(Event(summary=content, step=step))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


class Dashboard:
    """Writes scalars, texts and pictures by step; scalars and still pictures go to the other trackers too."""

    def __init__(
        self,
        directory: Path,
        datasets: Iterable[str],
        windows: Iterable[str],
        resume_step: int,
        saved: Mapping[str, Any] | None = None,
        settings: Mapping[str, Setting] | None = None,
        trackers: Sequence[GeneralTracker] = (),
        report: Callable[[str], object] = print,
    ) -> None:
        """Open the files; `windows` are the rollout windows of the validation protocol, `settings` the HParams.

        `report` gets a message when a file cannot be written.

        Events from `resume_step` on are purged, since a killed run may have written any of them. `saved` is what
        `flush` returned for that step; it is written again.
        """
        names = sorted(datasets)
        _wait_for_a_new_second(directory)
        self._hparams = HParams(directory, settings or {}, names, report)  # before the file below, see there
        self._file = EventFile(directory, 1, report, purge_step=resume_step)
        self._step, self._scalars, self._texts = resume_step, dict[str, float](), list[tuple[str, str]]()
        self._trackers: Sequence[GeneralTracker] = ()  # they have received `saved` already
        if not resume_step:
            self._file.add(summary.custom_scalars(custom_scalars(names, windows)))
        elif saved:
            self.scalars(saved["scalars"], resume_step)
            for tag, body in saved["texts"]:
                self.text(tag, body, resume_step)
        self._trackers = trackers

    def text(self, tag: str, body: str, step: int) -> None:
        """Write a text in Markdown."""
        self._go_to(step)
        self._texts.append((tag, body))
        self._file.add(summary.text(tag, body), step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write values by tag, non-finite ones too; one event for all of them takes half the bytes."""
        self._go_to(step)
        self._scalars.update(values)
        parts = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._file.add(Summary(value=parts), step)
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def rollout(self, sample: Sample, step: int) -> None:
        """Write the pictures of a rollout."""
        # Here, since a run without validations, and all processes but the main one, need no matplotlib.
        from fm.training.pictures import TRACKER_WIDTH, rollout_pictures, still_pictures

        for name, encoded in rollout_pictures(sample).items():
            self._picture(f"{sample.dataset}/{name}", encoded, step)
        if self._trackers:
            stills = still_pictures(sample, TRACKER_WIDTH)
            self._track({f"{sample.dataset}/{name}": image for name, image in stills.items()}, step)

    def cosines(self, cosines: Cosines, step: int, picture: bool) -> None:
        """Write each dataset's mean cosine with the others' gradients and, with `picture`, a heat map of all pairs."""
        means = cosines.with_others()
        self.scalars({f"gradients/mean_cosine/{name}": value for name, value in means.items()}, step)
        if picture:
            from fm.training.pictures import cosine_picture

            encoded = cosine_picture(cosines, f"step {step}")
            self._picture("gradients/cosine", encoded, step)
            self._track({"gradients/cosine": Image.open(io.BytesIO(encoded))}, step)

    def flush(self, step: int) -> dict[str, Any]:
        """Return the scalars and texts of `step`, for `saved`."""
        self._go_to(step)
        return {"scalars": dict(self._scalars), "texts": list(self._texts)}

    def close(self, succeeded: bool | None = None) -> None:
        """Close the files; the HParams page shows a run as succeeded, failed or, for None, still to be continued."""
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()
        self._hparams.close(succeeded)

    def _go_to(self, step: int) -> None:
        if step != self._step:
            self._step, self._scalars, self._texts = step, {}, []

    def _picture(self, tag: str, encoded: bytes, step: int) -> None:
        """Write an encoded PNG or GIF as it is; browsers play the GIF."""
        width, height = Image.open(io.BytesIO(encoded)).size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
        self._file.add(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def _track(self, images: Mapping[str, Image.Image], step: int) -> None:
        """Send images to the trackers that take any: accelerate's trackers have `log_images` where they do."""
        for tracker in self._trackers:
            if not hasattr(tracker, "log_images"):
                continue
            for tag, image in images.items():
                pixels = np.asarray(image.convert("RGB"))  # (H, W, 3)
                if tracker.name in ONE_IMAGE:
                    tracker.log_images({tag: pixels}, step=step)
                elif tracker.name == "tensorboard":
                    tracker.log_images({tag: pixels[None]}, step=step, dataformats="NHWC")
                else:
                    tracker.log_images({tag: [pixels]}, step=step)


def _wait_for_a_new_second(directory: Path) -> None:
    """Wait for the next second if an event file was begun in this one: TensorBoard reads the files by their seconds."""
    begun = [int(file.name.split(".")[3]) for file in directory.glob("events.out.tfevents.*")]
    time.sleep(min(max(max(begun, default=0) + 1 - time.time(), 0), 1))  # at most 1 s, where a clock was set back


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError if accelerate does not support a tracker or the tracker's package is not installed."""
    available = sorted(str(name) for name in get_available_trackers())
    for name in names:
        if name not in available:
            known = f"expected trackers among {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            problem = f"the package of {name} is not installed" if name in LOGGER_TYPE_TO_CLASS else known
            raise UserError(
                f"tracking.log_with: {problem}, got {name!r}; available here: {', '.join(available)}. Install what is "
                "missing into this environment, or leave it out: TensorBoard's files are written in any case."
            )


def start_trackers(
    names: Sequence[str], run_name: str, directory: Path, settings: Mapping[str, Setting]
) -> list[GeneralTracker]:
    """Return the named trackers of a run; those that keep files write them into `directory`.

    A process that continues a run begins a new run in each of them.
    """
    trackers = []
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": str(directory)} if kind.requires_logging_directory else {}
        name_argument = {RUN_NAME_ARGUMENT[name]: run_name} if name in RUN_NAME_ARGUMENT else {}
        trackers.append(kind(PROJECT, **place, **name_argument))
        trackers[-1].start()
        trackers[-1].store_init_configuration(dict(settings))
    return trackers


def custom_scalars(datasets: Sequence[str], windows: Iterable[str]) -> dict[str, Any]:
    """Return the Custom Scalars page: titles of the charts and the tags in them.

    TensorBoard colors curves by run, not by tag. So each dataset has a chart of its own: runs can be compared in it,
    and no reader has to find one of eight curves of one color. The first part shows whether the run learns, how fast
    and until when; the second one, on which datasets.
    """

    def one(*tags: str) -> list[Any]:
        # tags are regular expressions, and the name of one dataset may begin with the name of another
        return ["Multiline", [f"{re.escape(tag)}$" for tag in tags]]

    def by_dataset(*templates: str) -> dict[str, list[Any]]:
        return {name: one(*(template.format(name) for template in templates)) for name in datasets}

    rollouts = {f"rollout VRMSE (valid), {window}": by_dataset("rollout_vrmse/{}/" + window) for window in windows}
    return {  # three charts a row
        "is it learning, how fast, until when": {
            "geometric mean of VRMSE / persistence": one("valid_over_persistence/geometric_mean"),
            "tokens per second": one("throughput/tokens_per_s"),
            "hours left": one("throughput/hours_left"),
            "training loss": one("train/loss"),
            "gradient norm before clipping": one("train/grad_norm"),
            "learning rate": one("train/lr"),
        },
        "one-step VRMSE / persistence (valid), 1: no better": by_dataset("valid_over_persistence/{}"),
        "training loss": by_dataset("train_loss/{}"),
        **rollouts,
        "speed": {
            "samples per second": one("throughput/samples_per_s"),
            "share of time waiting for data": one("throughput/data_wait_fraction"),
            "peak memory, GB": one("throughput/peak_memory_gb"),
        },
        "target share and share drawn so far": by_dataset("sampling/target_share/{}", "sampling/drawn_share/{}"),
        "passes over the data": by_dataset("sampling/passes/{}"),
        "terms of the loss, whatever their weights": {
            "MSE": one("train/mse"),
            "wavelet L1": one("train/wavelet_l1"),
        },
    }


def flat_settings(recipe: Mapping[str, Any], datasets: Sequence[str]) -> dict[str, Setting]:
    """Return `section.key` -> value for the settings of a resolved recipe that are a number, a word or a switch."""
    found: dict[str, Any] = {"data.datasets": datasets[0] if len(datasets) == 1 else f"{len(datasets)} datasets"}
    found |= {f"{section}.{key}": recipe[section][key] for section, key in HPARAMS_SINGLE}
    for section in HPARAMS_SECTIONS:
        found |= {f"{section}.{key}": value for key, value in (recipe.get(section) or {}).items()}
    return {key: value for key, value in found.items() if isinstance(value, Setting)}


class HParams:
    """One process's entry on the HParams page: the settings of a run beside its last scores.

    It has an event file of its own, which each process that trains writes anew. TensorBoard keeps the first entry that
    it finds, so with the old file a run that failed and was continued would be shown as failed. The file must be opened
    before the directory's other event file: TensorBoard may go on reading only the file whose name comes last, and
    names begin with the time.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Setting],
        datasets: Sequence[str],
        report: Callable[[str], object],
    ) -> None:
        for earlier in directory.glob(f"*{HPARAMS_SUFFIX}"):
            earlier.unlink()
        self._file = EventFile(directory, 0, report, HPARAMS_SUFFIX)
        self._write(metadata.EXPERIMENT_TAG, experiment=self._experiment(settings, datasets))
        start = ParseDict({"start_time_secs": time.time(), "hparams": settings}, SessionStartInfo())
        self._write(metadata.SESSION_START_INFO_TAG, session_start_info=start)

    def close(self, succeeded: bool | None) -> None:
        """Close the file; None leaves the run unfinished on the page."""
        if succeeded is not None:
            status = api_pb2.STATUS_SUCCESS if succeeded else api_pb2.STATUS_FAILURE
            end = SessionEndInfo(status=status, end_time_secs=time.time())
            self._write(metadata.SESSION_END_INFO_TAG, session_end_info=end)
        self._file.close()

    def _write(self, tag: str, **part: Any) -> None:
        about = metadata.create_summary_metadata(HParamsPluginData(**part))
        self._file.add(Summary(value=[Summary.Value(tag=tag, metadata=about)]))

    @staticmethod
    def _experiment(settings: Mapping[str, Setting], datasets: Sequence[str]) -> api_pb2.Experiment:
        """Return the columns. TensorBoard takes one run's columns for all runs, so finetuning's are always included."""
        finetuning = {f"finetune.{key}": value for key, value in asdict(FinetuneSettings("")).items()}
        columns = {key: value for key, value in (finetuning | dict(settings)).items() if isinstance(value, Setting)}
        kinds = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
        infos = [
            api_pb2.HParamInfo(
                name=name, type=kinds.get(type(value), api_pb2.DATA_TYPE_FLOAT64), differs=name in HPARAMS_FIRST
            )
            for name, value in columns.items()
        ]
        tags = [*(f"valid_over_persistence/{name}" for name in ("geometric_mean", *datasets)), "train/loss"]
        metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in tags]
        return api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics)
