"""The scores and pictures of a report, if it is one of the exported weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from fm.artefact import SCORES_FILE
from fm.evaluation.runs import Trained


def report_files(report: Path, trained: Trained) -> dict[str, bytes]:
    """scores.json and pictures/<name>.png by path. UserError where there are none, or they are of other weights."""
    again = f"make one: fm evaluate {trained.checkpoint} --out {report}"
    try:
        data = (report / SCORES_FILE).read_bytes()
        origin = json.loads(data)["origin"]
        of = (origin["step"], origin["weights"])
    except OSError as error:
        raise UserError(f"{report}: no report there ({error.strerror}); {again}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{report / SCORES_FILE}: not a report's scores ({error!r}); {again}") from error
    if of != (trained.step, trained.weights):
        raise UserError(f"{report}: a report of other weights, of step {of[0]}, not {trained.step}; {again}")
    pictures = sorted((report / "pictures").glob("*.png"))
    return {SCORES_FILE: data, **{f"pictures/{file.name}": file.read_bytes() for file in pictures}}


def read_scores(files: Mapping[str, bytes]) -> dict[str, Any] | None:
    """What scores.json among `files` holds, None where there is none."""
    return json.loads(files[SCORES_FILE]) if SCORES_FILE in files else None
