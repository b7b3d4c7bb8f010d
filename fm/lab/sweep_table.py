"""The table of a sweep: what each variant costs and reaches, and whether the paper's order is ours.

Variants are ranked by the geometric mean over datasets of one-step VRMSE over persistence's. Datasets that not every
scored variant knows are left out. Scores of several seeds are averaged, and their standard deviation is given.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

from fm.checkpoint import load_pretrained
from fm.lab.sweep_file import Sweep, Trial
from fm.lab.sweep_state import model_of, read_scores
from fm.scores.formats import DASH, Cell, Document, Marked, Table, number
from fm.scores.protocol import get_protocol
from fm.scores.ranks import spearman
from fm.scores.scoring import geometric_mean
from fm.tracking import parse_lines

DONE, FAILED, NOT_RUN = "done", "failed", "not run"
ONE_STEP = "one step"


def sweep_results(sweep: Sweep, trials: Sequence[Trial], failed: Collection[str] = ()) -> dict[str, Any]:
    """All numbers as strict JSON; `failed` names the trials that failed.

    `variants` has a row per variant: its `runs`, one per seed, and over those that are scored the mean `parameters`,
    `steps` and training `seconds`, and `scores.<block>` with `over_persistence`, its `spread` over seeds and `vrmse` by
    dataset. A block is "one step" or a window of the protocol; null is what is not finite or not there.
    """
    scores = {trial.name: read_scores(trial, sweep) for trial in trials}
    known = [set(part["datasets"]) for part in scores.values() if part is not None]
    datasets = sorted(set.intersection(*known)) if known else []
    blocks = [ONE_STEP, *get_protocol(sweep.protocol).windows]
    rows = []
    for variant in sweep.variants:
        mine = [trial for trial in trials if trial.variant == variant]
        runs = [_run_result(trial, scores[trial.name], trial.name in failed, datasets, blocks) for trial in mine]
        rows.append({"variant": variant.name, **_over_seeds(runs, datasets, blocks), "runs": runs})
    ours = _ranks({row["variant"]: _lead(row) for row in rows if row["status"] == DONE})
    theirs = _ranks(sweep.published or {})
    for row in rows:
        name = row["variant"]
        row |= {"rank": ours.get(name), "paper": (sweep.published or {}).get(name), "paper_rank": theirs.get(name)}
    return {
        "title": sweep.title,
        "paper": sweep.paper,
        "protocol": replace(get_protocol(sweep.protocol), one_step_windows=sweep.windows).to_json(),
        "seconds": sweep.seconds,
        "blocks": blocks,
        "references": _references([part for part in scores.values() if part is not None], datasets, blocks),
        "variants": rows,
        "spearman": _agreement(rows),
    }


def sweep_document(sweep: Sweep, results: Mapping[str, Any]) -> Document:
    """The same for people: a table of the variants, and one of the datasets for each block."""
    rows, blocks = results["variants"], results["blocks"]
    protocol = replace(get_protocol(sweep.protocol), one_step_windows=sweep.windows)
    several = f", mean over seeds {', '.join(map(str, sweep.seeds))} (± their standard deviation)"
    about = (
        f"VRMSE, lower is better. {protocol.describe()}. In the first table it is over persistence's, as the geometric "
        f"mean over the datasets below{several if len(sweep.seeds) > 1 else ''}; seconds are of training, without "
        "validations and saves."
    )
    head = ["variant", "rank", "parameters", "steps", "seconds", *blocks]
    table = [
        [row["variant"], _place(row), *_costs(row), *(_ratio(row, block, results) for block in blocks)] for row in rows
    ]
    if sweep.published:
        head += ["paper", "paper's rank"]
        table = [[*cells, row["paper"], row["paper_rank"]] for cells, row in zip(table, rows, strict=True)]
    done = [row for row in rows if row["status"] == DONE]
    tables = [Table("Variants", head, table)]
    tables += [_datasets_table(block, done, results) for block in blocks] if done else []
    return Document(about, tables, _notes(sweep, results))


def _run_result(
    trial: Trial, scores: Mapping[str, Any] | None, failed: bool, datasets: Sequence[str], blocks: Sequence[str]
) -> dict[str, Any]:
    result: dict[str, Any] = {"run": str(trial.directory), "seed": trial.seed}
    if scores is None:
        return {**result, "status": FAILED if failed else NOT_RUN}
    lead = scores["protocol"]["trajectories"]
    cells = {block: {name: _cell(scores["datasets"][name], block) for name in datasets} for block in blocks}
    return {
        **result,
        "status": DONE,
        "parameters": load_pretrained(model_of(trial)).num_parameters(),
        "steps": 0 if trial.variant.only_evaluate else scores["origin"]["step"],
        "seconds": _training_seconds(trial),
        "scores": {
            block: {
                "over_persistence": geometric_mean([cell.get("ratio_to_persistence") for cell in part.values()]),
                "vrmse": {name: cell.get(lead) for name, cell in part.items()},
            }
            for block, part in cells.items()
        },
    }


def _over_seeds(runs: Sequence[Mapping[str, Any]], datasets: Sequence[str], blocks: Sequence[str]) -> dict[str, Any]:
    """Means over the runs that are scored; a variant is done when one of them is."""
    done = [run for run in runs if run["status"] == DONE]
    if not done:
        return {"status": FAILED if any(run["status"] == FAILED for run in runs) else NOT_RUN}
    return {
        "status": DONE,
        **{key: mean(run[key] for run in done) for key in ("parameters", "steps", "seconds")},
        "scores": {
            block: {
                "over_persistence": _mean([run["scores"][block]["over_persistence"] for run in done]),
                "spread": _spread([run["scores"][block]["over_persistence"] for run in done]),
                "vrmse": {name: _mean([run["scores"][block]["vrmse"][name] for run in done]) for name in datasets},
            }
            for block in blocks
        },
    }


def _references(scores: Sequence[Mapping[str, Any]], datasets: Sequence[str], blocks: Sequence[str]) -> dict[str, Any]:
    """Of persistence and the mean field, which are the same for all variants: dataset -> block -> predictor."""
    return {
        name: {
            block: {key: _cell(scores[0]["datasets"][name], block).get(key) for key in ("persistence", "mean_field")}
            for block in blocks
        }
        for name in datasets
    }


def _cell(part: Mapping[str, Any], block: str) -> Mapping[str, Any]:
    """A dataset's scores in a block; empty where no trajectory covers the window."""
    return part["one_step"] if block == ONE_STEP else part["windows"][block] or {}


def _training_seconds(trial: Trial) -> float:
    file = trial.directory / "events.jsonl"
    lines, _ = parse_lines(file.read_text()) if file.is_file() else ([], 0)
    return sum(line["seconds"] for line in lines if line["kind"] == "pace")


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return mean(finite) if len(finite) == len(values) else None


def _spread(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return stdev(finite) if 1 < len(finite) == len(values) else None


def _lead(row: Mapping[str, Any]) -> float | None:
    return row["scores"][ONE_STEP]["over_persistence"]


def _ranks(values: Mapping[str, float | None]) -> dict[str, int]:
    """1 for the lowest; what is not finite comes last."""
    finite = {name: math.inf if value is None else value for name, value in values.items()}
    return {name: rank for rank, name in enumerate(sorted(finite, key=finite.__getitem__), start=1)}


def _agreement(rows: Sequence[Mapping[str, Any]]) -> float | None:
    both = [row for row in rows if row["status"] == DONE and row["paper"] is not None]
    return spearman([_lead(row) for row in both], [row["paper"] for row in both]) if len(both) > 1 else None


def _place(row: Mapping[str, Any]) -> Cell:
    return row["rank"] if row["status"] == DONE else row["status"]


def _costs(row: Mapping[str, Any]) -> list[Cell]:
    if row["status"] != DONE:
        return [None] * 3
    return [round(row["parameters"]), round(row["steps"]), round(row["seconds"])]


def _ratio(row: Mapping[str, Any], block: str, results: Mapping[str, Any]) -> Cell:
    if row["status"] != DONE:
        return None
    score = row["scores"][block]
    if score["spread"] is not None:
        return Marked(score["over_persistence"], f"± {number(score['spread'])}")
    covered = all(part[block]["persistence"] is not None for part in results["references"].values())
    return _finite(score["over_persistence"], covered)


def _finite(value: float | None, covered: bool) -> Cell:
    """A score, or why there is none."""
    return value if value is not None else "diverged" if covered else DASH


def _datasets_table(block: str, done: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Table:
    """VRMSE by dataset, a column per variant."""
    rows = [
        [
            name,
            *(_finite(row["scores"][block]["vrmse"][name], part[block]["persistence"] is not None) for row in done),
            part[block]["persistence"],
            part[block]["mean_field"],
        ]
        for name, part in results["references"].items()
    ]
    last = ["geometric mean / persistence", *(_ratio(row, block, results) for row in done), None, None]
    head = ["dataset", *(row["variant"] for row in done), "persistence", "mean field"]
    return Table("One step" if block == ONE_STEP else f"Rollout, {block}", head, [*rows, last])


def _notes(sweep: Sweep, results: Mapping[str, Any]) -> list[str]:
    notes = [sweep.note] if sweep.note else []
    if sweep.paper:
        notes.append(f"Paper: {sweep.paper}.")
    if sweep.seconds is not None:
        notes.append(f"Each variant has as many steps as {sweep.seconds:g} s would hold, by a probe on this machine.")
    runs = [run for row in results["variants"] for run in row["runs"]]
    for status in (FAILED, NOT_RUN):
        names = [run["run"] for run in runs if run["status"] == status]
        notes += [f"{status}: {', '.join(names)}"] if names else []
    with_paper = [row for row in results["variants"] if row["status"] == DONE and row["paper"] is not None]
    agreement = "Spearman's rank correlation with the paper's order: "
    if not sweep.published:
        return [*notes, agreement + "not known, the paper's numbers are not at hand."]
    if results["spearman"] is None:
        return [*notes, agreement + "not known, it takes two variants that are done and have a number of the paper's."]
    return [*notes, f"{agreement}{results['spearman']:.2f} over {len(with_paper)} variants."]
