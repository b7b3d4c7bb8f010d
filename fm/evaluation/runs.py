"""What is done with a run once it is trained: score it, and compare it with another."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import UserError
from data_pipeline.windows.loader import open_readers
from fm.checkpoint import find_checkpoint, load_pretrained, verify_checkpoint
from fm.evaluation.evaluate import evaluate_model
from fm.recipe_file import resolve
from fm.scores.protocol import get_protocol
from fm.scores.tables import compare_table, score_table


def evaluate_run(
    run: Path,
    shards: str | Path | None = None,
    out: Path | None = None,
    protocol: str | None = None,
    split: str | None = None,
    windows: int | None = None,
) -> Path:
    """Score the averaged weights of a run's newest checkpoint and print the table. Returns the report's folder.

    `shards`, `protocol` default to the recipe's, `split` to the protocol's, `out` to <run>/report. With `windows`, so
    many one-step windows of each dataset are scored, not all. A report of the same weights, data and protocol is not
    made again. UserError if there is no checkpoint or there are no shards.
    """
    if windows is not None and windows < 1:
        raise UserError(f"--windows: expected at least 1 one-step window per dataset, got {windows}")
    checkpoint = find_checkpoint(run)
    state = verify_checkpoint(checkpoint)
    recipe = resolve(state["recipe"], str(checkpoint / "state.json"))
    chosen = get_protocol(protocol or recipe.validation.protocol)
    chosen = replace(chosen, split=split or chosen.split, one_step_windows=windows)
    model = load_pretrained(checkpoint)
    stream = recipe.data.stream(recipe.sampling.shuffle, recipe.sampling.shards_per_block)
    readers = open_readers(shards or recipe.data.shards, sorted(model.specs), chosen.split, stream=stream)
    out = out or (run if run != checkpoint else checkpoint.parent.parent) / "report"
    origin = {
        "checkpoint": str(checkpoint),
        "step": state["step"],
        "weights": state["files"]["ema.safetensors"]["sha256"],
    }
    identity = {
        "origin": origin,
        "protocol": chosen.to_json(),
        "data": {name: reader.manifest.digest for name, reader in readers.items()},
    }
    found = _read_scores(out / "scores.json") if (out / "scores.json").is_file() else None
    if found is not None and _identity(found) == json.loads(json.dumps(identity)):
        print(f"{out} already holds the scores of {checkpoint.name}:\n\n{score_table(found)}")
        return out
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scores = evaluate_model(model, readers, out, chosen, device, origin=origin)
    print(f"{checkpoint}, averaged weights:\n\n{score_table(scores)}\nreport: {out}")
    return out


def compare_runs(before: Path, after: Path) -> str:
    """The table of two evaluated runs side by side. UserError where one is not evaluated or they do not compare."""
    first, second = (_read_scores(run / "report" / "scores.json") for run in (before, after))
    return compare_table(first, second)


def _identity(scores: Mapping[str, Any]) -> dict[str, Any]:
    data = {name: part["data_digest"] for name, part in scores["datasets"].items()}
    return {"origin": scores.get("origin"), "protocol": scores["protocol"], "data": data}


def _read_scores(file: Path) -> dict[str, Any]:
    try:
        scores = json.loads(file.read_text())
        _identity(scores)
    except OSError as error:
        raise UserError(f"no scores at {file} ({error.strerror}); make them with `fm evaluate RUN`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a report's scores.json ({error}); remove it and evaluate again") from error
    return scores
