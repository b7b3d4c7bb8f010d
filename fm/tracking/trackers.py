"""Other trackers beside TensorBoard, by accelerate's names for them: `tracking.log_with: [wandb]`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from data_pipeline.errors import UserError

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
