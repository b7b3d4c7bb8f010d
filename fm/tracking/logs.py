"""What a run writes of itself, step by step: log.jsonl and events.jsonl.

Both hold one JSON object a line and are cut back to the checkpoint that a run continues from.

    log.jsonl     {"step", "dataset", "windows", "loss", "lr"}, a line an optimiser step. Nothing in it depends on the
                  clock or the machine: undisturbed, killed and continued runs leave the same lines. loss: null where
                  it is not finite; windows: digest of the window ids
    events.jsonl  {"kind", "step", "time"} (seconds since 1970) and, by kind:
        start       text                      the process began, or continued, at this step
        pace        steps, seconds, samples   since the line before: of stepping, without validations and saves
        save        scalars, texts, pending   before a checkpoint is written: what TensorBoard has of this step, and the
                                              steps whose means it does not have yet
        validation  mean_ratio, datasets      {name: {"vrmse", "over_persistence"}}, one step, averaged weights
        cosine      datasets, matrix, norms   of the datasets' gradients (training/conflict.py); null where one is zero
        guard       text, refused, reason, action, windows   a refused step; windows: {dataset: [window ids]}
        shares, warning, gate, message     text
        end         state, text               finished | interrupted | failed; a killed process leaves none
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from data_pipeline.files import atomic_file

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
        validations = [line for line in lines if line.get("kind") == "validation"]
        self.scores: Mapping[str, Any] = validations[-1].get("datasets", {}) if validations else {}  # the last ones
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
