"""State fields as float16: (value - mean) / std of each channel, with the error measured as it is made.

float16 has 11 significant bits: a value z standard deviations from the mean is off by up to z * 2^-11 of them. So data
with rare, far values are refused rather than blurred.
"""

from collections.abc import Sequence

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.well.stats import Stats

MAX_ERROR = 1e-2  # in std of the channel; reached 16 to 32 std from the mean


def encoding_of(channels: Sequence[str], stats: Stats) -> dict[str, tuple[float, float]]:
    """Channel -> (offset, scale): value = stored * scale + offset, in float32. A channel without spread has scale 1."""
    return {
        name: (float(np.float32(stats["mean"][name])), float(np.float32(stats["std"][name])) or 1.0)
        for name in channels
    }


class Encoder:
    """Encodes frames and keeps the worst error of each channel, in units of its std."""

    def __init__(self, channels: Sequence[str], stats: Stats) -> None:
        self.channels = tuple(channels)
        pairs = encoding_of(channels, stats).values()
        self._offset = np.array([offset for offset, _ in pairs], np.float32)[:, None, None]
        self._scale = np.array([scale for _, scale in pairs], np.float32)[:, None, None]
        self.worst = np.zeros(len(self.channels))

    def encode(self, frames: np.ndarray, where: str) -> np.ndarray:
        """float32 (T, C, H, W) -> float16; NaN and Inf stay what they are.

        Raises UserError, naming `where`, when a finite value overflows or is off by more than MAX_ERROR.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            stored = ((frames - self._offset) / self._scale).astype("<f2")
            error = np.abs(decode(stored, self._offset, self._scale) - frames) / self._scale
        error[~np.isfinite(frames)] = 0
        worst = error.max(axis=(0, 2, 3))
        for channel in np.flatnonzero(~(worst <= MAX_ERROR)).tolist():
            got = "overflows" if not np.isfinite(worst[channel]) else f"is off by {worst[channel]:.3g} std"
            raise UserError(
                f"{where}: channel {self.channels[channel]}: a value {got} as float16, expected at most {MAX_ERROR:g} "
                "std; use --dtype float32 for this dataset"
            )
        self.worst = np.maximum(self.worst, worst)
        return stored


def decode(stored: np.ndarray, offset: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float16 (..., C, H, W) -> float32; offset and scale are float32 (C, 1, 1)."""
    return np.asarray(stored.astype(np.float32) * scale + offset)
