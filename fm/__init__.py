"""WaveLiT-FM: small foundation models for 2D PDEs.

`load` opens any trained model, `WaveLiTFM` is the model's class; both have `predict`. `train` runs a recipe, `evaluate`
scores a model, and `Windows` gives the windows of shards to a training loop of your own.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.windows.dataset import Windows
    from data_pipeline.windows.loader import ShardPlaces
    from fm.evaluation.scores import Scores
    from fm.model.surrogate import Surrogate
    from fm.model.wavelit import WaveLiTFM

__version__ = "0.1.0"
__all__ = ["WaveLiTFM", "Windows", "evaluate", "load", "train"]


def load(path_or_hub_id: "Path | str", allow_import: str | Iterable[str] = ()) -> "Surrogate":
    """Return a trained model in eval mode on the CPU, of any kind, with its averaged weights.

    `path_or_hub_id` is a run, one of its checkpoints, an exported model, or `hf://organization/name`. `allow_import`
    names classes of yours that its files may import, such as "mypkg.net:MyNet" (fm/model/imports.py). UserError (of
    data_pipeline.errors) if there is no model, its files are damaged, or they import a class that is not allowed.
    """
    from fm.checkpoint import load_pretrained
    from fm.model.imports import allow_imports

    allow_imports([allow_import] if isinstance(allow_import, str) else allow_import)
    return load_pretrained(path_or_hub_id)


def train(recipe: "Path | str | Mapping[str, Any]", overrides: Sequence[str] = ()) -> Path:
    """Train a recipe in this process and return the run's folder, which `load` opens. An interrupted run is continued.

    `recipe` is a recipe's file, or its sections by name as nested dictionaries; `overrides` are "section.key=value".
    UserError for what you can correct, KeyboardInterrupt after a signal, when the run has saved its state.
    """
    from fm.config import apply_override, resolve
    from fm.datasets import allow_recipe, imported_sections, load_own_recipe
    from fm.model.imports import remember_imports
    from fm.training.trainer import train as run

    if isinstance(recipe, Mapping):
        document = copy.deepcopy(dict(recipe))
        for one in overrides:
            apply_override(document, one)
        chosen = resolve(document, "fm.train")
        allow_recipe(chosen)
    else:
        chosen = load_own_recipe(Path(recipe), overrides)
    remember_imports(imported_sections(chosen))
    if run(chosen):
        raise KeyboardInterrupt(f"{chosen.run.directory} is saved; train it again to continue")
    return chosen.run.directory


def evaluate(
    model: "Surrogate | Path | str",
    shards: "ShardPlaces",
    datasets: Sequence[str] | None = None,
    protocol: str = "wavelit",
    split: str | None = None,
    windows: int | None = None,
) -> "Scores":
    """Return the scores of a model on shards: one step, rollouts, and the baselines. Nothing is written.

    `model` is a model or what `load` opens; `shards` is a folder or URL, or a list of them; `datasets` are some of the
    model's datasets, by default those in `shards`. The protocol's split is scored unless `split` is given, and with
    `windows` only so many one-step windows of each dataset. UserError where model, shards and protocol do not fit.
    """
    from fm.evaluation.evaluate import score_model

    opened = load(model) if isinstance(model, str | Path) else model
    return score_model(opened, shards, datasets, protocol, split, windows)


def __getattr__(name: str) -> Any:
    """Import a class when it is used first (PEP 562), so that `fm --help` does not wait for torch."""
    if name == "WaveLiTFM":
        from fm.model.wavelit import WaveLiTFM

        return WaveLiTFM
    if name == "Windows":
        from data_pipeline.windows.dataset import Windows

        return Windows
    raise AttributeError(f"module 'fm' has no attribute {name!r}")
