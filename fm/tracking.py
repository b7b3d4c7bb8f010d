"""What a run writes while it trains: log.jsonl (every step), TensorBoard, the progress bar. Main process only."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class StepLog:
    """log.jsonl: one JSON line an optimiser step."""

    def __init__(self, file: Path, resume_step: int) -> None:
        """Open for appending after dropping lines past `resume_step` (steps that a killed run took in vain)."""
        if file.exists():
            kept = [line for line in file.read_text().splitlines() if _step_of_line(line) <= resume_step]
            temporary = file.with_suffix(".tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            os.replace(temporary, file)
        self._stream: TextIO = file.open("a", buffering=1)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line; a non-finite loss is written as null."""
        self._stream.write(json.dumps({k: _json_number(v) for k, v in entry.items()}) + "\n")

    def close(self) -> None:
        self._stream.close()


def _step_of_line(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the torn last line of a killed run


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


class Dashboard:
    """The TensorBoard of a run (tags: README, "Watch")."""

    def __init__(self, directory: Path, datasets: Iterable[str], windows: Iterable[str], resume_step: int) -> None:
        """`windows` are the rollout windows of the validation protocol. Events past `resume_step` are purged."""
        self.writer = SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else None, flush_secs=10)
        names = sorted(datasets)
        if not resume_step:
            self.writer.add_custom_scalars(_layout(names, list(windows)))

    def text(self, tag: str, body: str, step: int) -> None:
        self.writer.add_text(tag, body, step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write finite and non-finite values alike, under their tags."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def fields(self, dataset: str, truth: np.ndarray, prediction: np.ndarray, step: int) -> None:
        """Images of one field (X, Y): truth and prediction on the truth's colour range, and the error."""
        low, high = float(truth.min()), float(truth.max())
        spread = max(high - low, 1e-12)
        error = prediction - truth
        limit = max(float(np.abs(error).max()), 1e-12)
        self._image(f"{dataset}/truth", colormaps["viridis"]((truth - low) / spread), step)
        self._image(f"{dataset}/prediction", colormaps["viridis"]((prediction - low) / spread), step)
        self._image(f"{dataset}/error", colormaps["RdBu_r"](0.5 + 0.5 * error / limit), step)

    def spectrum(self, dataset: str, truth: np.ndarray, prediction: np.ndarray, step: int) -> None:
        """Radially averaged power spectra of truth, prediction and error for one field (X, Y)."""
        figure = Figure(figsize=(4, 3), dpi=100, layout="constrained")
        axes = figure.subplots()
        for label, values in (("truth", truth), ("prediction", prediction), ("error", prediction - truth)):
            wavenumber, power = radial_spectrum(values)
            axes.loglog(wavenumber, np.maximum(power, 1e-20), label=label)
        axes.set(xlabel="cycles per grid length", ylabel="power", title=dataset)
        axes.legend(frameon=False)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self.writer.add_image(f"{dataset}/spectrum", np.asarray(canvas.buffer_rgba())[..., :3], step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()

    def _image(self, tag: str, rgba: np.ndarray, step: int) -> None:
        upright = np.flip(np.swapaxes(rgba[..., :3], 0, 1), axis=0)  # x to the right, y up
        scale = max(1, round(256 / max(upright.shape[:2])))
        large = upright.repeat(scale, axis=0).repeat(scale, axis=1)
        self.writer.add_image(tag, (large * 255).astype(np.uint8), step, dataformats="HWC")


def radial_spectrum(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Power of a field (X, Y) in rings of the wavenumber, counted in cycles per grid length of the shorter axis."""
    nx, ny = values.shape
    power = np.abs(np.fft.fft2(values - values.mean()) / values.size) ** 2
    shorter = min(nx, ny)
    kx, ky = np.fft.fftfreq(nx) * shorter, np.fft.fftfreq(ny) * shorter
    ring = np.rint(np.hypot(kx[:, None], ky[None, :])).astype(int)
    rings = np.arange(1, shorter // 2 + 1)
    return rings, np.bincount(ring.ravel(), weights=power.ravel(), minlength=shorter)[rings]


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
