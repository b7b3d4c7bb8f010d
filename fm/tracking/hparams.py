"""TensorBoard's HParams page: the settings by which runs are told apart, beside their last scores.

They have an event file of their own, made anew by each process that trains: of what this page reads, TensorBoard keeps
the first that it finds, so a run that failed and was continued would stay failed.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from torch.utils.tensorboard import FileWriter

from fm.settings import FinetuneSettings

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
