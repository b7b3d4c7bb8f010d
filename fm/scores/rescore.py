"""Stored errors scored again, under another protocol or another eps."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_file
from fm.scores.errors import ErrorFile
from fm.scores.formats import render
from fm.scores.protocol import load_protocol
from fm.scores.scoring import score
from fm.scores.tables import score_document

TABLES = {"scores.csv": "csv", "scores.tex": "latex"}  # beside the scores.json and scores.md that a report has anyway


def rescore(measured: ErrorFile, protocol: str | None, eps: float | None) -> tuple[ErrorFile, dict[str, Any]]:
    """The same errors under a protocol (a name or a file, their own by default), and their scores.

    UserError where the protocol needs rollouts that were not measured.
    """
    wanted = measured.protocol if protocol is None else load_protocol(protocol)
    if eps is not None:
        if not 0 <= eps < math.inf:
            raise UserError(f"--eps: expected a number of at least 0, got {eps}")
        wanted = replace(wanted, eps=eps)
    scores = score(measured, wanted)
    return replace(measured, protocol=wanted), scores


def write_tables(out: Path, scores: Mapping[str, Any]) -> None:
    """The score tables for programs and for papers, under `out`."""
    document = score_document(scores)
    for name, form in TABLES.items():
        with atomic_file(out / name) as stream:
            stream.write(render(document, form).encode())
