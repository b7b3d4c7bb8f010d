"""WaveLiT-FM: model, training, evaluation."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["WaveLiTFM"]


def __getattr__(name: str) -> Any:
    """`fm.WaveLiTFM`, imported when it is first asked for, so that `fm --help` does not wait for torch."""
    if name == "WaveLiTFM":
        from fm.model.wavelit import WaveLiTFM

        return WaveLiTFM
    raise AttributeError(f"module 'fm' has no attribute {name!r}")
