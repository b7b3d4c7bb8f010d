"""WaveLiT-FM: small foundation models for 2D PDEs.

`load` opens any trained model, `WaveLiTFM` is the model's class; both have `predict`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fm.model.surrogate import Surrogate
    from fm.model.wavelit import WaveLiTFM

__version__ = "0.1.0"
__all__ = ["WaveLiTFM", "load"]


def load(path_or_hub_id: "Path | str") -> "Surrogate":
    """Return a trained model in eval mode on the CPU: a WaveLiT or a baseline, with its averaged weights.

    `path_or_hub_id` is a run, one of its checkpoints, an exported model, or `hf://organization/name`. UserError (of
    data_pipeline.errors) if there is none, or its files are damaged.
    """
    from fm.checkpoint import load_pretrained

    return load_pretrained(path_or_hub_id)


def __getattr__(name: str) -> Any:
    """Import `fm.WaveLiTFM` when it is used first (PEP 562), so that `fm --help` does not wait for torch."""
    if name == "WaveLiTFM":
        from fm.model.wavelit import WaveLiTFM

        return WaveLiTFM
    raise AttributeError(f"module 'fm' has no attribute {name!r}")
