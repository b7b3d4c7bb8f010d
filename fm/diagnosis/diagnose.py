"""Diagnose one dataset of a run: measure, say what it means, write the page."""

import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_file
from data_pipeline.windows.reader import ShardReader
from fm.diagnosis.figures import sheet
from fm.diagnosis.measure import diagnose, work
from fm.diagnosis.page import DPI, key_numbers, page
from fm.diagnosis.result import Diagnosis
from fm.diagnosis.sentences import findings
from fm.diagnosis.subject import Subject, choose_trajectories
from fm.diagnosis.true_flow import sibling_well, twins_of
from fm.evaluation.runs import Trained
from fm.specs import check_channels


def diagnose_run(
    run: Path | str,
    dataset: str,
    shards: str | Path | None = None,
    out: Path | None = None,
    trajectories: int = 4,
    well: Path | None = None,
) -> Path:
    """Diagnose the averaged weights of a run's newest checkpoint on one dataset's test split; prints the sentences.

    `shards` defaults to the recipe's, `out` to <run>/report/diagnosis, `well`, the folder of the simulated HDF5 files,
    to the folder `well` beside the shards. Writes <out>/<dataset>.{json,png,html} and returns the HTML file's path.
    UserError where there is no checkpoint, no data, or they do not fit together.
    """
    if trajectories < 1:
        raise UserError(f"--trajectories: expected at least 1, got {trajectories}")
    trained = Trained.open(run)
    model = trained.model
    if dataset not in model.specs:
        raise UserError(f"--dataset: expected one that {run} was trained on, {', '.join(model.specs)}; got {dataset!r}")
    shards = shards or trained.recipe.data.shards
    test, train = (trained.readers([dataset], split, shards)[dataset] for split in ("test", "train"))
    spec = model.specs[dataset]
    check_channels(test, spec.state_channels, spec.constant_channels, "the model was trained on")
    card = trained.registry().card(dataset)
    subject = Subject(model, test, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = choose_trajectories(test, trajectories)
    num_steps = test.num_frames(chosen[0]) - 1
    origin: dict[str, object] = {
        "checkpoint": str(trained.checkpoint),
        "step": trained.step,
        "data": test.manifest.digest[:12],
    }
    known = well or sibling_well(shards)
    total = work(num_steps, len(chosen)) + (len(chosen) if known else 0)
    with tqdm(total=total, desc=f"diagnose {dataset}", leave=False) as bar:
        twins = _twins(test, known, chosen, bar, required=well is not None)
        diagnosis = diagnose(subject, train, card, chosen, twins, origin, bar.update)
    return _write(diagnosis, out or trained.report / "diagnosis")


def _twins(
    reader: ShardReader, well: Path | None, chosen: tuple[int, ...], bar: tqdm, required: bool
) -> np.ndarray | None:
    """Twins of the chosen trajectories; None where they cannot be made and nobody said that they can."""
    if well is None:
        return None
    try:
        return twins_of(reader, well, chosen, bar.update)
    except UserError as error:
        if required:
            raise
        tqdm.write(f"without twins of the true flow: {error}")
        return None


def _write(diagnosis: Diagnosis, out: Path) -> Path:
    """The three files; prints what they begin with."""
    found = findings(diagnosis)
    content = {**diagnosis.to_json(), "findings": {one.subject: one.text for one in found}}
    with atomic_file(out / f"{diagnosis.dataset}.json") as file:
        file.write(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False).encode() + b"\n")
    with atomic_file(out / f"{diagnosis.dataset}.png") as file:
        sheet(diagnosis).savefig(file, format="png", dpi=DPI)
    with atomic_file(out / f"{diagnosis.dataset}.html") as file:
        file.write(page(diagnosis, found).encode())
    print("\n".join(f"{one.subject}: {one.text}" for one in found), end="\n\n")
    rows = key_numbers(diagnosis)
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows), end="\n\n")
    print(f"diagnosis: {out / diagnosis.dataset}.html")
    return out / f"{diagnosis.dataset}.html"
