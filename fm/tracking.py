"""What a run writes while it trains: log.jsonl, events.jsonl, run.json, TensorBoard, the bar. Main process only.

Both logs hold one JSON object a line and are cut back to the checkpoint that a run continues from.

    log.jsonl     {"step", "dataset", "windows", "loss", "lr"}, a line an optimiser step. Nothing in it depends on the
                  clock or the machine: undisturbed, killed and continued runs leave the same lines. loss: null where
                  it is not finite; windows: digest of the window ids
    events.jsonl  {"kind", "step", "time"} (seconds since 1970) and, by kind:
        start       text                      the process began, or continued, at this step
        pace        steps, seconds, samples   since the line before: of stepping, without validations and saves
        save        scalars, texts, pending   before a checkpoint is written: what TensorBoard has of this step, and the
                                              steps whose means it does not have yet
        validation  mean_ratio, datasets      {name: {"vrmse", "over_persistence"}}, one step, averaged weights
        cosine      datasets, matrix, norms   of the datasets' gradients (fm/conflict.py); null where one is zero
        guard       text, refused, reason, action, windows   a refused step; windows: {dataset: [window ids]}
        shares, warning, gate, message     text
        end         state, text               finished | interrupted | failed; a killed process leaves none
    run.json      the process that trains, or trained last: host, pid, its start, world size, spread, versions
"""

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import psutil
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data_pipeline.files import atomic_file
from fm.report.cosines import Cosines, cosine_figure
from fm.report.sample import Sample
from fm.report.spectra import draw_spectra
from fm.report.strips import ROWS, error_scale, field_scale
from fm.report.video import gif

_OF_A_PROCESS = ("start", "end")  # true whatever step a later process continues from
# made at a checkpoint's own step, and again by a run that continues there
_MADE_AGAIN = ("validation", "gate", "cosine", "shares", "warning")


class StepLog:
    """log.jsonl: one JSON line an optimiser step."""

    def __init__(self, file: Path, resume_step: int) -> None:
        """Open for appending after dropping lines past `resume_step` (steps that a killed run took in vain)."""
        self._stream = _open_cut(file, lambda line: line["step"] <= resume_step)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line; a non-finite loss is written as null."""
        self._stream.write(json.dumps({k: _json_number(v) for k, v in entry.items()}) + "\n")

    def close(self) -> None:
        self._stream.close()


class EventLog:
    """events.jsonl: what happened, and when."""

    def __init__(self, file: Path, resume_step: int) -> None:
        """Open for appending after dropping what a run that continues from `resume_step` does again."""
        self._stream = _open_cut(file, lambda line: _happened(line, resume_step))
        lines, _ = parse_lines(file.read_text(errors="replace"))
        saves = [line for line in lines if line.get("kind") == "save" and line["step"] == resume_step]
        self.saved: Mapping[str, Any] = {"scalars": {}, "texts": [], "pending": []}  # at `resume_step`
        if saves and saves[-1].keys() >= self.saved.keys():
            self.saved = saves[-1]
        # what earlier roll backs to `resume_step` said, after its checkpoint was written
        refusals = [line["text"] for line in lines if line.get("kind") == "guard" and line["step"] == resume_step]
        self.refusals = [text for text in refusals if ["events", text] not in self.saved["texts"]]

    def write(self, kind: str, step: int, **facts: Any) -> None:
        """Append one line; NaN and infinity are written as Python's json does."""
        self._stream.write(json.dumps({"kind": kind, "step": step, "time": time.time(), **facts}) + "\n")

    def close(self) -> None:
        self._stream.close()


def lacks_validation(file: Path, step: int) -> bool:
    """Whether an events.jsonl tells of no validation after `step` steps. A run without the file is not judged."""
    if not file.is_file():
        return False
    lines, _ = parse_lines(file.read_text(errors="replace"))
    return not any(line.get("kind") == "validation" and line["step"] == step for line in lines)


def parse_lines(text: str) -> tuple[list[dict[str, Any]], int]:
    """The lines of a log that are JSON objects with a step, and the number of others."""
    lines, damaged = [], 0
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            if not isinstance(entry["step"], int):
                raise TypeError
            lines.append(entry)
        except (ValueError, KeyError, TypeError, IndexError):
            damaged += 1
    return lines, damaged


def _happened(line: Mapping[str, Any], resume_step: int) -> bool:
    kind, step = line.get("kind"), line["step"]
    return kind in _OF_A_PROCESS or step < resume_step or (step == resume_step and kind not in _MADE_AGAIN)


def _open_cut(file: Path, keep: Callable[[dict[str, Any]], bool]) -> TextIO:
    """Open a log for appending, without the lines that `keep` refuses and those that a kill has torn."""
    if file.exists():
        lines, _ = parse_lines(file.read_text(errors="replace"))
        with atomic_file(file, durable=False) as stream:
            stream.write("".join(f"{json.dumps(line)}\n" for line in lines if keep(line)).encode())
    return file.open("a", buffering=1)


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_process(file: Path, spread: str) -> None:
    """Write run.json: what is needed to tell whether this process still lives, and how it was started."""
    own = psutil.Process()
    facts = {
        "host": socket.gethostname(),
        "pid": own.pid,
        "process_start": own.create_time(),  # a later process may get the same pid
        "started": time.time(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "spread": spread,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "command": sys.argv,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
    with atomic_file(file, durable=False) as stream:
        stream.write(json.dumps(facts, indent=1).encode())


def process_lives(facts: Mapping[str, Any]) -> bool | None:
    """Whether the process that wrote run.json lives; None if it is, or was, on another machine."""
    if facts["host"] != socket.gethostname():
        return None
    try:
        process = psutil.Process(facts["pid"])
        same = abs(process.create_time() - facts["process_start"]) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Dashboard:
    """The TensorBoard of a run (tags: README, "Watch")."""

    def __init__(
        self,
        directory: Path,
        datasets: Iterable[str],
        windows: Iterable[str],
        resume_step: int,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        """`windows` are the rollout windows of the validation protocol.

        Events from `resume_step` on are purged: a killed run may have written any of them. `saved` (see `settle`) is
        what that step had when its checkpoint was written; its validation is made again.
        """
        self.writer = SummaryWriter(str(directory), purge_step=resume_step, flush_secs=10)
        self._step, self._scalars, self._texts = resume_step, dict[str, float](), list[tuple[str, str]]()
        if not resume_step:
            self.writer.add_custom_scalars(_layout(sorted(datasets), list(windows)))
        elif saved:
            self.scalars(saved["scalars"], resume_step)
            for tag, body in saved["texts"]:
                self.text(tag, body, resume_step)

    def text(self, tag: str, body: str, step: int) -> None:
        self._at(step)
        self._texts.append((tag, body))
        self.writer.add_text(tag, body, step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write finite and non-finite values alike, under their tags."""
        self._at(step)
        self._scalars.update(values)
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def settle(self, step: int) -> dict[str, Any]:
        """Let the files hold all that was written; returns the scalars and texts of `step`, for `saved`."""
        self._at(step)
        self.writer.flush()
        return {"scalars": dict(self._scalars), "texts": list(self._texts)}

    def _at(self, step: int) -> None:
        if step != self._step:
            self._step, self._scalars, self._texts = step, {}, []

    def rollout(self, sample: Sample, step: int) -> None:
        """Pictures of a rollout: three fields and their spectra a third of the way into it, and all of it moving."""
        still = sample.at([len(sample.steps) // 3])
        self.fields(still, step)
        self.spectrum(still, step)
        # 16 steps of 3 panels of 64 x 64 pixels are 200 000 pixels: 80 to 140 kB, 205 kB if they are nothing but noise.
        # Nine datasets and 100 validations, in a run of a million steps, are 9 x 100 x 0.205 MB = 185 MB at most.
        self.video(sample.dataset, gif(sample, side=64, labelled=False), step)

    def fields(self, sample: Sample, step: int) -> None:
        """Images of the sample's first step: truth and prediction on the truth's colour range, and the error."""
        truth, prediction = sample.truth[0], sample.prediction[0]
        error = prediction - truth
        scales = (field_scale(truth), field_scale(truth), error_scale(error, truth))
        for name, field, scale in zip(ROWS, (truth, prediction, error), scales, strict=True):
            self._image(f"{sample.dataset}/{name}", scale.cmap(scale.norm(field)), step)

    def spectrum(self, sample: Sample, step: int) -> None:
        """Power spectra of the sample's first step: truth, prediction and error."""
        figure = Figure(figsize=(4, 3), dpi=100, layout="constrained")
        axes = figure.subplots()
        draw_spectra(axes, sample.at([0]))
        axes.set(ylabel="power", title=sample.dataset)
        axes.legend(frameon=False)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        self.writer.add_image(f"{sample.dataset}/spectrum", pixels, step, dataformats="HWC")

    def video(self, dataset: str, animation: bytes, step: int) -> None:
        """A GIF among the images, as it is: a browser plays it."""
        width, height = (int.from_bytes(animation[at : at + 2], "little") for at in (6, 8))
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=animation)
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=f"{dataset}/rollout", image=image)]), step)

    def cosines(self, cosines: Cosines, step: int) -> None:
        """A heat map of the cosines between the datasets' gradients, and each dataset's mean with the others."""
        means = cosines.with_others()
        self.scalars({f"gradients/mean_cosine/{name}": value for name, value in means.items()}, step)
        canvas = FigureCanvasAgg(cosine_figure(cosines, f"step {step}"))
        canvas.figure.set_dpi(100)
        canvas.draw()
        self.writer.add_image("gradients/cosine", np.asarray(canvas.buffer_rgba())[..., :3], step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()

    def _image(self, tag: str, rgba: np.ndarray, step: int) -> None:
        upright = np.flip(np.swapaxes(rgba[..., :3], 0, 1), axis=0)  # x to the right, y up
        scale = max(1, round(256 / max(upright.shape[:2])))
        large = upright.repeat(scale, axis=0).repeat(scale, axis=1)
        self.writer.add_image(tag, (large * 255).astype(np.uint8), step, dataformats="HWC")


def _layout(datasets: list[str], windows: list[str]) -> dict[str, Any]:
    """The Custom Scalars page: is it learning, on all datasets, at what speed, on which data?"""

    def lines(template: str) -> list[Any]:
        # tags are regular expressions, and one dataset's name may begin with another's
        return ["Multiline", [template.format(name) + "$" for name in datasets]]

    def shares(name: str) -> list[Any]:
        return ["Multiline", [f"sampling/{kind}_share/{name}$" for kind in ("target", "drawn")]]

    return {
        "learning": {
            "loss": ["Multiline", ["train/loss", "train/mse", "train/wavelet_l1"]],
            "training loss per dataset": lines("train_loss/{}"),
            "one-step VRMSE (valid)": lines("valid_vrmse/{}"),
            "gradient norm before clipping": ["Multiline", ["train/grad_norm"]],
            "learning rate": ["Multiline", ["train/lr"]],
        },
        "rollout VRMSE (valid)": {window: lines("rollout_vrmse/{}/" + window) for window in windows},
        "speed": {
            "samples per second": ["Multiline", ["throughput/samples_per_s"]],
            "share of time waiting for data": ["Multiline", ["throughput/data_wait_fraction"]],
        },
        "sampling": {
            "target share": lines("sampling/target_share/{}"),
            "passes over the data": lines("sampling/passes/{}"),
        },
        "target share and share drawn so far": {name: shares(name) for name in datasets},
    }


def progress_bar(total: int, initial: int, name: str, *, shown: bool) -> tqdm:
    """A bar over optimiser steps: rate, time left, and what `set_postfix` adds."""
    return tqdm(total=total, initial=initial, desc=name, unit="step", disable=not shown, dynamic_ncols=True)
