"""The table of a sweep: the cost and the scores of each variant, and the agreement with the paper's order.

Variants are ranked by the geometric mean of their one-step VRMSE over persistence's, over the datasets that all scored
variants have. Scores of several seeds are averaged, with their standard deviation. A run that was trained with other
settings than the sweep has now is named below the table and not ranked.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from data_pipeline.tables import DASH, Cell, Document, Marked, Table, format_number
from fm.checkpoint import load_pretrained
from fm.evaluation.errors import BASELINES
from fm.evaluation.protocol import load_protocol
from fm.evaluation.scores import ONE_STEP, RATIO_FLOOR, Scores, mean_ranks, mean_ratio, spearman
from fm.evaluation.tables import BASELINE_HEADS, short_windows
from fm.lab.sweep_file import Sweep, Trial, check_same_data, find_changes, read_scores
from fm.training.runlog import parse_lines, seconds_spent

DONE, OTHER, FAILED, NOT_RUN = "done", "other settings", "failed", "not run"
MIN_AGREEMENT = 3  # variants that a rank correlation needs: any two are in the same order or in the opposite one


def sweep_results(sweep: Sweep, trials: Sequence[Trial], failed: Collection[str] = ()) -> dict[str, Any]:
    """Return all numbers as strict JSON; `failed` names the trials that failed.

    `variants` has a row for each variant: its `runs`, one per seed, and over those with scores the mean `parameters`,
    `steps` and training `seconds`, and `scores.<block>` with `over_persistence`, its `spread` over seeds, `vrmse` by
    dataset, and by dataset how many of the `count` trajectories (or windows) of all seeds `diverged`. A block is "one
    step" or a window of the protocol. Null stands for a number that is not finite or missing. `paper_rank` and
    `rank_beside_paper` are ranks among the variants that are done and have a number of the paper's. Raises UserError if
    two runs were scored on different data. `spearman` is of one step, `spearman_windows` of rollouts.
    """
    scores: dict[str, Scores] = {}
    changes: dict[str, list[str]] = {}
    for trial in trials:
        if (found := read_scores(trial, sweep)) is not None:
            changes[trial.name] = find_changes(trial, sweep)
            if not changes[trial.name]:
                scores[trial.name] = found
    check_same_data(scores, sweep)
    datasets = sorted(set.intersection(*(set(part.datasets) for part in scores.values()))) if scores else []
    blocks = [ONE_STEP, *load_protocol(sweep.protocol).windows]
    rows = []
    for name in sweep.variants:
        runs = []
        for trial in (trial for trial in trials if trial.variant.name == name):
            run: dict[str, Any] = {"run": str(trial.directory), "seed": trial.seed}
            if trial.name in scores:
                run |= {"status": DONE, **_scored_run(trial, scores[trial.name], datasets, blocks)}
            elif changes.get(trial.name):
                run |= {"status": OTHER, "changes": changes[trial.name]}
            else:
                run["status"] = FAILED if trial.name in failed else NOT_RUN
            runs.append(run)
        rows.append({"variant": name, **_over_seeds(runs, datasets, blocks), "runs": runs})
    agreement = _add_ranks(rows, sweep.published or {})
    for row in rows:
        row["paper_windows"] = {name: numbers.get(row["variant"]) for name, numbers in sweep.published_windows.items()}
    # References are the same for all runs.
    parts = next(iter(scores.values())).datasets if datasets else {}
    references = {
        name: {block: {key: getattr(parts[name].blocks()[block], key, None) for key in BASELINES} for block in blocks}
        for name in datasets
    }
    return {
        "title": sweep.title,
        "paper": sweep.paper,
        "protocol": sweep.scored_protocol().to_json(),
        "seconds": sweep.seconds,
        "blocks": blocks,
        "references": references,
        "variants": rows,
        "spearman_windows": {
            name: _agreement(_scores_of(rows, name), numbers) for name, numbers in sweep.published_windows.items()
        },
        "short_windows": short_windows(scores.values()),
        "spearman": agreement,
    }


def _scored_run(trial: Trial, scores: Scores, datasets: Sequence[str], blocks: Sequence[str]) -> dict[str, Any]:
    """Return the cost of one run, and its scores by block."""
    file = trial.directory / "events.jsonl"
    events, _ = parse_lines(file.read_text()) if file.is_file() else ([], 0)
    by_block = {}
    for block in blocks:
        parts = {name: scores.block(name, block) for name in datasets}
        by_block[block] = {
            "over_persistence": mean_ratio([one.ratio_to_persistence if one else None for one in parts.values()]),
            "vrmse": {name: one.vrmse(scores.statistic) if one else None for name, one in parts.items()},
            "diverged": {name: one.diverged if one else 0 for name, one in parts.items()},
            "count": {name: one.count if one else 0 for name, one in parts.items()},
        }
    return {
        "context": scores.protocol.context,
        "parameters": load_pretrained(trial.model).num_parameters(),
        "steps": 0 if trial.variant.only_evaluate else scores.origin["step"],
        "seconds": sum(seconds_spent(line) for line in events if line["kind"] == "pace"),
        "scores": by_block,
    }


def _over_seeds(runs: Sequence[Mapping[str, Any]], datasets: Sequence[str], blocks: Sequence[str]) -> dict[str, Any]:
    """Return means over the runs with scores. A variant is done if there is one; a mean needs all values."""
    done = [run for run in runs if run["status"] == DONE]
    if not done:
        found = [run["status"] for run in runs]
        return {"status": next(status for status in (OTHER, FAILED, NOT_RUN) if status in found)}
    by_block = {}
    for block in blocks:
        parts = [run["scores"][block] for run in done]
        ratios = [part["over_persistence"] for part in parts]
        vrmse = {name: [part["vrmse"][name] for part in parts] for name in datasets}
        by_block[block] = {
            "over_persistence": None if None in ratios else mean(ratios),
            "spread": None if None in ratios or len(ratios) < 2 else stdev(ratios),
            "vrmse": {name: None if None in values else mean(values) for name, values in vrmse.items()},
            "diverged": {name: sum(part["diverged"][name] for part in parts) for name in datasets},
            "count": {name: sum(part["count"][name] for part in parts) for name in datasets},
        }
    costs = {key: mean(run[key] for run in done) for key in ("parameters", "steps", "seconds")}
    return {"status": DONE, **costs, "scores": by_block}


def _add_ranks(rows: Sequence[dict[str, Any]], published: Mapping[str, float]) -> float | None:
    """Add the ranks and the paper's numbers to the rows; return the rank correlation with the paper, if any."""
    leads = _scores_of(rows, ONE_STEP)
    ours = {name: value for name, value in leads.items() if name in published}
    theirs = {name: published[name] for name in ours}
    columns = {
        "rank": _ranks(leads),
        "paper": published,
        "paper_rank": _ranks(theirs),
        "rank_beside_paper": _ranks(ours),
    }
    for row in rows:
        row |= {key: column.get(row["variant"]) for key, column in columns.items()}
    return _agreement(leads, published)


def _scores_of(rows: Sequence[Mapping[str, Any]], block: str) -> dict[str, float | None]:
    """Return the mean ratio to persistence in a block of each variant that is done."""
    return {row["variant"]: row["scores"][block]["over_persistence"] for row in rows if row["status"] == DONE}


def _agreement(ours: Mapping[str, float | None], published: Mapping[str, float]) -> float | None:
    """Return the rank correlation over the variants that have a number of the paper's, if they are enough."""
    both = {name: value for name, value in ours.items() if name in published}
    theirs = [published[name] for name in both]
    return spearman(_last_if_none(both), theirs) if len(both) >= MIN_AGREEMENT else None


def _ranks(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return the ranks, 1 for the lowest. Equal values share their mean rank; None comes last."""
    ranks = mean_ranks([_last_if_none(values)]) if len(values) > 1 else [1.0] * len(values)
    return {name: rank for name, rank in zip(values, ranks, strict=True) if rank is not None}


def _last_if_none(values: Mapping[str, float | None]) -> list[float]:
    return [math.inf if value is None else value for value in values.values()]


def sweep_document(sweep: Sweep, results: Mapping[str, Any]) -> Document:
    """Return the results as tables: one of the variants, and one of the datasets for each block."""
    rows, blocks, references = results["variants"], results["blocks"], results["references"]
    several = f", mean over seeds {', '.join(map(str, sweep.seeds))} (± their standard deviation)"
    about = (
        f"VRMSE, lower is better. {sweep.scored_protocol().describe()}. In the first table it is over persistence's, "
        f"as the geometric mean over the datasets below, each at least {RATIO_FLOOR:g}"
        f"{several if len(sweep.seeds) > 1 else ''}; seconds are of training (on a CPU its own, whatever else runs), "
        "without validations and saves."
    )
    # A block has no score on a dataset whose trajectories are shorter than its window.
    covered = {block: all(part[block]["persistence"] is not None for part in references.values()) for block in blocks}
    done = [row for row in rows if row["status"] == DONE]
    lines = []
    for row in rows:
        scored = row in done
        columns: dict[str, Cell] = {
            "variant": row["variant"],
            "rank": _rank(row["rank"]) if scored else row["status"],
            **{key: round(row[key]) if scored else None for key in ("parameters", "steps", "seconds")},
            **{block: _ratio(row["scores"][block], covered[block]) if scored else None for block in blocks},
        }
        if sweep.published:
            ranks = {"paper's rank": _rank(row["paper_rank"]), "our rank beside it": _rank(row["rank_beside_paper"])}
            columns |= {"paper": row["paper"], **ranks}
        columns |= {f"paper, {window}": number for window, number in row["paper_windows"].items()}
        lines.append(columns)
    tables = [Table("Variants", list(lines[0]), [list(line.values()) for line in lines])]
    for block in blocks if done else []:
        scores = [row["scores"][block] for row in done]
        body: list[list[Cell]] = []
        for name, reference in references.items():
            persistence = reference[block]["persistence"]
            cells = [
                _score(one["vrmse"][name], persistence is not None, one["diverged"][name], one["count"][name])
                for one in scores
            ]
            body.append([name, *cells, *(reference[block].get(baseline) for baseline in BASELINES)])
        body.append(
            ["geometric mean / persistence", *(_ratio(one, covered[block]) for one in scores), *[None] * len(BASELINES)]
        )
        head = ["dataset", *(row["variant"] for row in done), *BASELINE_HEADS]
        tables.append(Table("One step" if block == ONE_STEP else f"Rollout, {block}", head, body))
    return Document(about, tables, _notes(sweep, results))


def _rank(rank: float | None) -> Cell:
    return None if rank is None else f"{rank:g}"


def _ratio(score: Mapping[str, Any], covered: bool) -> Cell:
    """Return a variant's geometric mean in a block, with its spread and its divergences."""
    diverged, count = sum(score["diverged"].values()), sum(score["count"].values())
    return _score(score["over_persistence"], covered, diverged, count, score["spread"])


def _score(value: float | None, covered: bool, diverged: int, count: int, spread: float | None = None) -> Cell:
    if not covered:
        return DASH if value is None else value
    marks = [f"± {format_number(spread)}"] if spread is not None else []
    marks += [f"{diverged} of {count} diverged"] if diverged else []
    if marks:
        return Marked(value, ", ".join(marks))
    return "diverged" if value is None else value


def _notes(sweep: Sweep, results: Mapping[str, Any]) -> list[str]:
    notes = [sweep.note] if sweep.note else []
    if sweep.paper:
        notes.append(f"Paper: {sweep.paper}.")
    if sweep.published or sweep.published_windows:
        notes.append("The paper's numbers are of other data, protocol and unit; only the order may be compared.")
    notes += results["short_windows"]
    if sweep.seconds is not None:
        notes.append(f"Each variant has as many steps as {sweep.seconds:g} s would hold, by a probe on this machine.")
    contexts = {
        row["variant"]: run["context"] for row in results["variants"] for run in row["runs"] if "context" in run
    }
    if len(set(contexts.values())) > 1:
        listed = ", ".join(f"{name} {context}" for name, context in contexts.items())
        notes.append(f"Input frames: {listed}. Rollouts begin after them, so they are not of the same frames.")
    runs = [run for row in results["variants"] for run in row["runs"]]
    for status in (FAILED, NOT_RUN):
        names = [run["run"] for run in runs if run["status"] == status]
        notes += [f"{status}: {', '.join(names)}"] if names else []
    notes += [
        f"{OTHER} than the sweep gives now: {run['run']} ({'; '.join(run['changes'])}). Remove that folder and sweep "
        "again, or sweep into another one (--out)."
        for run in runs
        if run["status"] == OTHER
    ]
    compared = sum(row["paper_rank"] is not None for row in results["variants"])
    if not sweep.published:
        agreement = "not known, the paper's numbers are not at hand"
    elif compared < MIN_AGREEMENT:
        needed = f"{MIN_AGREEMENT} variants that are done and have a number of the paper's"
        agreement = f"not known, it takes {needed}, got {compared}"
    elif results["spearman"] is None:
        agreement = "not known, all are equal"
    else:
        agreement = f"{results['spearman']:.2f} over {compared} variants"
    others = [
        f"The same for {window}: {'not known' if value is None else f'{value:.2f}'}."
        for window, value in results["spearman_windows"].items()
    ]
    return [*notes, f"Spearman's rank correlation with the paper's order: {agreement}.", *others]
