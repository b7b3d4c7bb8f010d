"""Other trackers beside TensorBoard, by accelerate's names for them: `tracking.log_with: [wandb]`.

TensorBoard's Custom Scalars page. Its first part answers: is it learning, on all datasets, how fast, until when?

TensorBoard's HParams page: the settings by which runs are told apart, beside their last scores.

They have an event file of their own, made anew by each process that trains: of what this page reads, TensorBoard keeps
the first that it finds, so a run that failed and was continued would stay failed.

TensorBoard's pictures: small enough that those of a run of any length stay below 120 MB, and thinned out evenly.

A panel has the area of a square of 224 pixels, one byte each before compression: at most 50 kB, if it is nothing but
noise. A moving rollout, 16 steps of three panels of 64 x 64 pixels, is 205 kB at most. With their spectra, eight
datasets make 3 MB, and the 40 occasions of `tracking.pictures` 120 MB.

The TensorBoard of a run (tags: README, "Watch").
"""

import io
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from torch.utils.tensorboard import FileWriter, SummaryWriter

from data_pipeline.files import UserError
from fm.config import FinetuneSettings
from fm.evaluation.pictures import NOT_FINITE, ROWS, Sample, Scale, error_scale, field_scale, gif
from fm.evaluation.plots import Cosines, cosine_figure, draw_spectra

PROJECT = "wavelit-fm"
# what a tracker calls the name that a run has within the project
_RUN_NAME = {"wandb": "name", "mlflow": "run_name", "trackio": "name", "swanlab": "experiment_name"}


def check_trackers(names: Sequence[str]) -> None:
    """UserError where accelerate does not know a tracker, or its package is not installed here."""
    available = sorted(str(name) for name in get_available_trackers())
    for name in names:
        if name not in available:
            known = f"expected trackers among {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            problem = f"the package of {name} is not installed" if name in LOGGER_TYPE_TO_CLASS else known
            raise UserError(
                f"tracking.log_with: {problem}, got {name!r}; available here: {', '.join(available)}. Install what is "
                "missing into this environment, or leave it out: TensorBoard's files are written in any case."
            )


class Trackers:
    """The trackers of a run on its main process. A process that continues a run begins a new one in each of them."""

    def __init__(self, names: Sequence[str], run_name: str, directory: Path, config: Mapping[str, Any]) -> None:
        """Those that keep files put them into `directory`; `config` is the resolved recipe, flat."""
        self._trackers = []
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            place = {"logging_dir": str(directory)} if kind.requires_logging_directory else {}
            tracker = kind(PROJECT, **place, **({_RUN_NAME[name]: run_name} if name in _RUN_NAME else {}))
            tracker.start()
            tracker.store_init_configuration(dict(config))
            self._trackers.append(tracker)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def custom_scalars(datasets: Iterable[str], windows: Iterable[str]) -> dict[str, Any]:
    """Titles of the charts and the tags in them; `windows` are the rollout windows of the validation protocol."""
    names = sorted(datasets)

    def by_dataset(template: str) -> list[Any]:
        # tags are regular expressions, and one dataset's name may begin with another's
        return ["Multiline", [template.format(name) + "$" for name in names]]

    def one(*tags: str) -> list[Any]:
        return ["Multiline", [f"{tag}$" for tag in tags]]

    return {  # three charts a row
        "is it learning, on all datasets, how fast, until when": {
            "one-step VRMSE / persistence (1: no better)": by_dataset("valid_over_persistence/{}"),
            "the same, geometric mean over datasets": one("valid_over_persistence/geometric_mean"),
            "training loss by dataset": by_dataset("train_loss/{}"),
            "training loss and its terms": one("train/loss", "train/mse", "train/wavelet_l1"),
            "tokens per second": one("throughput/tokens_per_s"),
            "hours left": one("throughput/hours_left"),
        },
        "learning": {
            "one-step VRMSE (valid)": by_dataset("valid_vrmse/{}"),
            "gradient norm before clipping": one("train/grad_norm"),
            "learning rate": one("train/lr"),
        },
        "rollout VRMSE (valid)": {window: by_dataset("rollout_vrmse/{}/" + window) for window in windows},
        "speed": {
            "samples per second": one("throughput/samples_per_s"),
            "share of time waiting for data": one("throughput/data_wait_fraction"),
            "peak memory, GB": one("throughput/peak_memory_gb"),
        },
        "sampling": {
            "target share": by_dataset("sampling/target_share/{}"),
            "passes over the data": by_dataset("sampling/passes/{}"),
        },
        "target share and share drawn so far": {
            name: one(*(f"sampling/{kind}_share/{name}" for kind in ("target", "drawn"))) for name in names
        },
    }


_SUFFIX = ".hparams"
_SECTIONS = ("train", "model", "baseline", "loss", "finetune")
_SINGLE = (("run", "seed"), ("sampling", "scheme"), ("sampling", "draw"))
# The page shows five columns until it is asked for more: those said to differ, then the others by name.
_FIRST = ("finetune.objective", "model.width", "sampling.scheme", "train.learning_rate", "train.steps")

Setting = str | int | float | bool


def telling_settings(recipe: Mapping[str, Any], datasets: Iterable[str]) -> dict[str, Setting]:
    """`section.key` -> value of a resolved recipe's settings that are a number, a word or a switch."""
    names = list(datasets)
    found: dict[str, Any] = {"data.datasets": names[0] if len(names) == 1 else f"{len(names)} datasets"}
    found |= {f"{section}.{key}": recipe[section][key] for section, key in _SINGLE}
    for section in _SECTIONS:
        found |= {f"{section}.{key}": value for key, value in (recipe.get(section) or {}).items()}
    return {key: value for key, value in found.items() if isinstance(value, Setting)}


def final_scores(datasets: Iterable[str]) -> list[str]:
    """Tags whose last values are shown beside the settings."""
    return [f"valid_over_persistence/{name}" for name in ("geometric_mean", *sorted(datasets))] + ["train/loss"]


class Session:
    """One process's entry on the page; open it before the directory's other event file.

    TensorBoard may go on reading only the file whose name comes last, and names begin with the time.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Setting], metrics: Iterable[str]) -> None:
        for earlier in directory.glob(f"*{_SUFFIX}"):
            earlier.unlink()
        self._writer = FileWriter(str(directory), filename_suffix=_SUFFIX)
        start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in settings.items():
            _set(start.hparams[name], value)
        self._write(metadata.EXPERIMENT_TAG, experiment=_experiment(settings, metrics))
        self._write(metadata.SESSION_START_INFO_TAG, session_start_info=start)
        self._writer.flush()

    def close(self, succeeded: bool | None) -> None:
        """Say that the run succeeded or failed; None where it is to be continued."""
        if succeeded is not None:
            status = api_pb2.STATUS_SUCCESS if succeeded else api_pb2.STATUS_FAILURE
            end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
            self._write(metadata.SESSION_END_INFO_TAG, session_end_info=end)
        self._writer.close()

    def _write(self, tag: str, **part: Any) -> None:
        content = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **part)
        plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=content.SerializeToString())
        about = SummaryMetadata(plugin_data=plugin)
        self._writer.add_summary(Summary(value=[Summary.Value(tag=tag, metadata=about)]))


def _experiment(settings: Mapping[str, Setting], metrics: Iterable[str]) -> api_pb2.Experiment:
    """The columns. TensorBoard takes one run's for all runs, so finetuning's are among them in any case."""
    finetuning = {f"finetune.{key}": value for key, value in asdict(FinetuneSettings("")).items()}
    columns = {key: value for key, value in (finetuning | dict(settings)).items() if isinstance(value, Setting)}
    kinds = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    infos = [
        api_pb2.HParamInfo(name=name, type=kinds.get(type(value), api_pb2.DATA_TYPE_FLOAT64), differs=name in _FIRST)
        for name, value in columns.items()
    ]
    scores = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics]
    return api_pb2.Experiment(hparam_infos=infos, metric_infos=scores)


def _set(cell: Any, value: Setting) -> None:
    """Put a value into a protobuf Value."""
    if isinstance(value, bool):
        cell.bool_value = value
    elif isinstance(value, str):
        cell.string_value = value
    else:
        cell.number_value = value


SIDE = 224  # pixels; a panel has the area of a square of this side
LEVELS = 255  # colours of a map; the last of a palette is for what is not finite


def is_shown(number: int, count: int, most: int) -> bool:
    """Whether the `number`-th of `count` occasions, from 1, is one of `most`: evenly spread, the last included."""
    return number * most // count > (number - 1) * most // count


def rollout_pictures(sample: Sample) -> dict[str, bytes]:
    """Encoded pictures by name: three fields and their spectra a third of the way into a rollout; all of it, moving."""
    still = sample.at([len(sample.steps) // 3])
    truth, prediction = still.truth[0], still.prediction[0]
    error = prediction - truth
    scales = (field_scale(truth), field_scale(truth), error_scale(error, truth))
    fields = zip(ROWS, (truth, prediction, error), scales, strict=True)
    pictures = {name: _field(field, scale, still.lengths) for name, field, scale in fields}
    return pictures | {"spectrum": _spectrum(still), "rollout": gif(sample, side=64, labelled=False)}


def figure_png(figure: Figure) -> bytes:
    """A figure at 100 dots an inch."""
    figure.set_dpi(100)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return _png(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))


def _field(field: np.ndarray, scale: Scale, lengths: tuple[float, float]) -> bytes:
    """A field (H, W) in the shape of its domain: x to the right, y upwards."""
    upright = np.flip(field.T, axis=0)
    holes = ~np.isfinite(upright)
    unit = np.clip(scale.norm(np.where(holes, 0, upright)), 0, 1).astype(np.float32)
    size = _size(lengths[0] / lengths[1])
    large = np.asarray(Image.fromarray(unit).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    indices = np.rint(large * (LEVELS - 1))
    torn = np.asarray(Image.fromarray(holes.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0
    image = Image.fromarray(np.where(torn, LEVELS, indices).astype(np.uint8), "P")
    colours = [*scale.cmap(np.linspace(0, 1, LEVELS))[:, :3], to_rgb(NOT_FINITE)]
    image.putpalette(np.rint(np.array(colours) * 255).astype(np.uint8).tobytes())
    return _png(image)


def _size(aspect: float) -> tuple[int, int]:
    """Width and height in pixels of a panel that is `aspect` times as wide as high."""
    short = round(SIDE * min(aspect, 1 / aspect) ** 0.5)
    return (round(short * aspect), short) if aspect > 1 else (short, round(short / aspect))


def _spectrum(sample: Sample) -> bytes:
    """Power spectra of the sample's first step: truth, prediction and error."""
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    draw_spectra(axes, sample.at([0]))
    axes.set(ylabel="power", title=sample.dataset)
    axes.legend(frameon=False)
    return figure_png(figure)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class Dashboard:
    """Scalars, texts and pictures by step. Scalars go to `trackers` too."""

    def __init__(
        self,
        directory: Path,
        datasets: Iterable[str],
        windows: Iterable[str],
        resume_step: int,
        saved: Mapping[str, Any] | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        """`windows` are the rollout windows of the validation protocol.

        Events from `resume_step` on are purged: a killed run may have written any of them. `saved` (see `settle`) is
        what that step had when its checkpoint was written; its validation is made again.
        """
        self.writer = SummaryWriter(str(directory), purge_step=resume_step, flush_secs=10)
        self._step, self._scalars, self._texts = resume_step, dict[str, float](), list[tuple[str, str]]()
        self._trackers: Trackers | None = None  # what was saved, they have been told
        if not resume_step:
            self.writer.add_custom_scalars(custom_scalars(datasets, windows))
        elif saved:
            self.scalars(saved["scalars"], resume_step)
            for tag, body in saved["texts"]:
                self.text(tag, body, resume_step)
        self._trackers = trackers

    def text(self, tag: str, body: str, step: int) -> None:
        self._at(step)
        self._texts.append((tag, body))
        self.writer.add_text(tag, body, step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write finite and non-finite values alike, under their tags; one event for all, at half the bytes."""
        self._at(step)
        self._scalars.update(values)
        parts = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.writer.file_writer.add_summary(Summary(value=parts), step)
        if self._trackers:
            self._trackers.log(values, step)

    def settle(self, step: int) -> dict[str, Any]:
        """Let the files hold all that was written; returns the scalars and texts of `step`, for `saved`."""
        self._at(step)
        self.writer.flush()
        return {"scalars": dict(self._scalars), "texts": list(self._texts)}

    def rollout(self, sample: Sample, step: int) -> None:
        """Pictures of a rollout, still and moving."""
        for name, encoded in rollout_pictures(sample).items():
            self._picture(f"{sample.dataset}/{name}", encoded, step)

    def cosines(self, cosines: Cosines, step: int, picture: bool) -> None:
        """Each dataset's mean cosine with the others' gradients; with `picture`, a heat map of them all."""
        means = cosines.with_others()
        self.scalars({f"gradients/mean_cosine/{name}": value for name, value in means.items()}, step)
        if picture:
            self._picture("gradients/cosine", figure_png(cosine_figure(cosines, f"step {step}")), step)

    def close(self) -> None:
        self.writer.close()

    def _at(self, step: int) -> None:
        if step != self._step:
            self._step, self._scalars, self._texts = step, {}, []

    def _picture(self, tag: str, encoded: bytes, step: int) -> None:
        """A PNG or a GIF as it is: a browser plays it."""
        width, height = Image.open(io.BytesIO(encoded)).size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
