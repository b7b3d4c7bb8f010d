"""The table of a sweep: what each variant costs and reaches, and whether the paper's order is ours.

Variants are ranked by the geometric mean over datasets of one-step VRMSE over persistence's. Datasets that not every
scored variant knows are left out. Scores of several seeds are averaged, and their standard deviation is given. A run
that was trained with other settings than the sweep gives it now is named, and has no part in the table.

Runs a sweep: each variant with each seed is a run in a process of its own, trained, then evaluated.

What is there is kept: a finished run is not trained again, and the trainer continues an interrupted one by itself. A
run that fails is shown and passed over. fm/lab/sweep_file.py says which files there are.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tqdm import tqdm

from data_pipeline.files import UserError, atomic_file, only_process
from data_pipeline.tables import DASH, Cell, Document, Marked, Table, format_number, render
from fm.checkpoint import find_checkpoint, load_pretrained
from fm.distributed import EXIT_DONE, EXIT_INTERRUPTED, StopSignal
from fm.evaluation.protocol import load_protocol
from fm.evaluation.scores import ONE_STEP, Scores, geometric_mean, mean_ranks, spearman
from fm.lab.sweep_file import (
    Probe,
    Sweep,
    Trial,
    check_same_data,
    check_unchanged,
    find_changes,
    is_trained,
    model_of,
    plan,
    probe_file,
    probed_settings,
    read_probe,
    read_scores,
)
from fm.training.runlog import parse_lines

DONE, OTHER, FAILED, NOT_RUN = "done", "other settings", "failed", "not run"
MIN_AGREEMENT = 3  # variants: any two are in the same order or in the opposite one


def sweep_results(sweep: Sweep, trials: Sequence[Trial], failed: Collection[str] = ()) -> dict[str, Any]:
    """All numbers as strict JSON; `failed` names the trials that failed.

    `variants` has a row per variant: its `runs`, one per seed, and over those that are scored the mean `parameters`,
    `steps` and training `seconds`, and `scores.<block>` with `over_persistence`, its `spread` over seeds and `vrmse` by
    dataset, and by dataset how many of the `count` trajectories (or windows) of all seeds `diverged`. A block is "one
    step" or a window of the protocol; null is what is not finite or not there. `paper_rank` and `rank_beside_paper`
    are among the variants that are done and have a number of the paper's. UserError where two runs were scored on
    different data.
    """
    scores = {trial.name: part for trial in trials if (part := read_scores(trial, sweep)) is not None}
    found = {trial.name: find_changes(trial, sweep, trial.directory.parent) for trial in trials if trial.name in scores}
    changes = {name: lines for name, lines in found.items() if lines}
    scores = {name: part for name, part in scores.items() if name not in changes}
    check_same_data(scores, sweep)
    known = [set(part.datasets) for part in scores.values()]
    datasets = sorted(set.intersection(*known)) if known else []
    blocks = [ONE_STEP, *load_protocol(sweep.protocol).windows]
    rows = []
    for variant in sweep.variants:
        mine = [trial for trial in trials if trial.variant == variant]
        runs = [
            _run_result(trial, scores[trial.name], datasets, blocks)
            if trial.name in scores
            else _without_scores(trial, changes.get(trial.name, []), trial.name in failed)
            for trial in mine
        ]
        rows.append({"variant": variant.name, **_over_seeds(runs, datasets, blocks), "runs": runs})
    leads = {row["variant"]: _lead(row) for row in rows if row["status"] == DONE}
    published = sweep.published or {}
    both = [name for name in leads if name in published]
    columns = {
        "rank": _ranks(leads),
        "paper": published,
        "paper_rank": _ranks({name: published[name] for name in both}),
        "rank_beside_paper": _ranks({name: leads[name] for name in both}),
    }
    for row in rows:
        row |= {key: column.get(row["variant"]) for key, column in columns.items()}
    return {
        "title": sweep.title,
        "paper": sweep.paper,
        "protocol": replace(load_protocol(sweep.protocol), one_step_windows=sweep.windows).to_json(),
        "seconds": sweep.seconds,
        "blocks": blocks,
        "references": _references(list(scores.values()), datasets, blocks),
        "variants": rows,
        "spearman": _agreement([leads[name] for name in both], [published[name] for name in both]),
    }


def sweep_document(sweep: Sweep, results: Mapping[str, Any]) -> Document:
    """The same for people: a table of the variants, and one of the datasets for each block."""
    rows, blocks = results["variants"], results["blocks"]
    protocol = replace(load_protocol(sweep.protocol), one_step_windows=sweep.windows)
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
        head += ["paper", "paper's rank", "our rank beside it"]
        table = [
            [*cells, row["paper"], _rank(row["paper_rank"]), _rank(row["rank_beside_paper"])]
            for cells, row in zip(table, rows, strict=True)
        ]
    done = [row for row in rows if row["status"] == DONE]
    tables = [Table("Variants", head, table)]
    tables += [_datasets_table(block, done, results) for block in blocks] if done else []
    return Document(about, tables, _notes(sweep, results))


def _without_scores(trial: Trial, changes: Sequence[str], failed: bool) -> dict[str, Any]:
    run = {"run": str(trial.directory), "seed": trial.seed}
    if changes:
        return {**run, "status": OTHER, "changes": list(changes)}
    return {**run, "status": FAILED if failed else NOT_RUN}


def _run_result(trial: Trial, scores: Scores, datasets: Sequence[str], blocks: Sequence[str]) -> dict[str, Any]:
    found = {block: {name: scores.block(name, block) for name in datasets} for block in blocks}
    return {
        "run": str(trial.directory),
        "seed": trial.seed,
        "status": DONE,
        "parameters": load_pretrained(model_of(trial)).num_parameters(),
        "steps": 0 if trial.variant.only_evaluate else scores.origin["step"],
        "seconds": _training_seconds(trial),
        "scores": {
            block: {
                "over_persistence": geometric_mean(
                    [one.ratio_to_persistence if one else None for one in part.values()]
                ),
                "vrmse": {name: one.vrmse(scores.statistic) if one else None for name, one in part.items()},
                "diverged": {name: one.diverged if one else 0 for name, one in part.items()},
                "count": {name: one.count if one else 0 for name, one in part.items()},
            }
            for block, part in found.items()
        },
    }


def _over_seeds(runs: Sequence[Mapping[str, Any]], datasets: Sequence[str], blocks: Sequence[str]) -> dict[str, Any]:
    """Means over the runs that are scored; a variant is done when one of them is."""
    done = [run for run in runs if run["status"] == DONE]
    if not done:
        told = [run["status"] for run in runs]
        return {"status": next(status for status in (OTHER, FAILED, NOT_RUN) if status in told)}
    return {
        "status": DONE,
        **{key: mean(run[key] for run in done) for key in ("parameters", "steps", "seconds")},
        "scores": {
            block: {
                "over_persistence": _mean([run["scores"][block]["over_persistence"] for run in done]),
                "spread": _spread([run["scores"][block]["over_persistence"] for run in done]),
                "vrmse": {name: _mean([run["scores"][block]["vrmse"][name] for run in done]) for name in datasets},
                **{
                    key: {name: sum(run["scores"][block][key][name] for run in done) for name in datasets}
                    for key in ("diverged", "count")
                },
            }
            for block in blocks
        },
    }


def _references(scores: Sequence[Scores], datasets: Sequence[str], blocks: Sequence[str]) -> dict[str, Any]:
    """Of persistence and the mean field, which are the same for all variants: dataset -> block -> predictor."""
    return {
        name: {
            block: {key: getattr(scores[0].block(name, block), key, None) for key in ("persistence", "mean_field")}
            for block in blocks
        }
        for name in datasets
    }


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


def _ranks(values: Mapping[str, float | None]) -> dict[str, float]:
    """1 for the lowest; equal ones share their mean rank, and what is not finite comes last."""
    return dict(zip(values, mean_ranks([list(values.values())]), strict=True)) if values else {}


def _agreement(ours: Sequence[float | None], theirs: Sequence[float]) -> float | None:
    return spearman(ours, theirs) if len(ours) >= MIN_AGREEMENT else None


def _place(row: Mapping[str, Any]) -> Cell:
    return _rank(row["rank"]) if row["status"] == DONE else row["status"]


def _rank(rank: float | None) -> Cell:
    return None if rank is None else f"{rank:g}"


def _costs(row: Mapping[str, Any]) -> list[Cell]:
    if row["status"] != DONE:
        return [None] * 3
    return [round(row["parameters"]), round(row["steps"]), round(row["seconds"])]


def _ratio(row: Mapping[str, Any], block: str, results: Mapping[str, Any]) -> Cell:
    if row["status"] != DONE:
        return None
    score = row["scores"][block]
    marks = [f"± {format_number(score['spread'])}"] if score["spread"] is not None else []
    marks += _diverged(sum(score["diverged"].values()), sum(score["count"].values()))
    covered = all(part[block]["persistence"] is not None for part in results["references"].values())
    return _finite(score["over_persistence"], covered, marks)


def _diverged(diverged: int, count: int) -> list[str]:
    return [f"{diverged} of {count} diverged"] if diverged else []


def _finite(value: float | None, covered: bool, marks: Sequence[str]) -> Cell:
    """A score with its marks, or why there is none."""
    if marks and covered:
        return Marked(value, ", ".join(marks))
    return value if value is not None else "diverged" if covered else DASH


def _vrmse(score: Mapping[str, Any], name: str, covered: bool) -> Cell:
    return _finite(score["vrmse"][name], covered, _diverged(score["diverged"][name], score["count"][name]))


def _datasets_table(block: str, done: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Table:
    """VRMSE by dataset, a column per variant."""
    rows = [
        [
            name,
            *(_vrmse(row["scores"][block], name, part[block]["persistence"] is not None) for row in done),
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
    if sweep.published:
        notes.append("The paper's numbers are of other data, protocol and unit; only the order may be compared.")
    if sweep.seconds is not None:
        notes.append(f"Each variant has as many steps as {sweep.seconds:g} s would hold, by a probe on this machine.")
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
    with_paper = [row for row in results["variants"] if row["paper_rank"] is not None]
    agreement = "Spearman's rank correlation with the paper's order: "
    if not sweep.published:
        return [*notes, agreement + "not known, the paper's numbers are not at hand."]
    if results["spearman"] is None:
        why = (
            f"it takes {MIN_AGREEMENT} variants that are done and have a number of the paper's, got {len(with_paper)}"
            if len(with_paper) < MIN_AGREEMENT
            else "all are equal"
        )
        return [*notes, f"{agreement}not known, {why}."]
    return [*notes, f"{agreement}{results['spearman']:.2f} over {len(with_paper)} variants."]


EXIT_FAILED = 1
WARM_UP, PROBE = 5, 30  # steps of a probe: the first ones, which are slow and left out, and those timed
POLL_SECONDS = 0.2
LAST_LINES = 15  # of a failed process, shown


class Interrupted(Exception):
    """The sweep was asked to stop, and its process has ended."""


class ProcessFailed(Exception):
    """A process of a trial ended with an error; the message has its last lines."""


def run_sweep(
    sweep: Sweep,
    out: Path,
    overrides: Sequence[str] = (),
    only: Collection[str] = (),
    launch_config: Path | None = None,
) -> int:
    """Train and evaluate what is not done yet, print the table and write it. Returns the exit code.

    `only` names the variants to run (default: all); the table has all that are done. `launch_config` is accelerate's,
    for training. 0: done, 1: a run failed, 130: interrupted. UserError, before anything runs, where the sweep does not
    fit together or a run in `out` has begun with other settings.
    """
    chosen = [sweep.variant(name) for name in only] or sweep.variants
    trials = plan(sweep, out, overrides)
    failed = finish_trials(sweep, [trial for trial in trials if trial.variant in chosen], out, launch_config)
    if failed is None:
        return EXIT_INTERRUPTED
    _write_table(sweep, trials, failed, out)
    return EXIT_FAILED if failed else EXIT_DONE


def finish_trials(sweep: Sweep, trials: Sequence[Trial], out: Path, launch_config: Path | None) -> set[str] | None:
    """Train and evaluate what is not done yet; returns the names of the trials that failed, None where interrupted.

    UserError, before anything runs, where a run in `out` has begun with other settings.
    """
    for trial in trials:
        _check_pretrained(trial)
        check_unchanged(trial, sweep, out)
    failed: set[str] = set()
    with (
        only_process(out, "sweep"),
        StopSignal().listen() as stop,
        tqdm(total=len(trials), desc="sweep", unit="run", disable=None) as bar,
    ):
        runner = Runner(sweep, out, launch_config, stop, bar)
        for trial in trials:
            bar.set_postfix_str(trial.name)
            try:
                runner.finish(trial)
            except ProcessFailed as failure:
                failed.add(trial.name)
                bar.write(f"{trial.name} failed: {failure}", file=sys.stderr)
            except Interrupted:
                bar.write("interrupted; the same command continues from here", file=sys.stderr)
                return None
            bar.update()
    return failed


class Runner:
    """Finishes trials, each in processes of its own; `stop` ends the present one, `bar` is kept alive meanwhile."""

    def __init__(self, sweep: Sweep, out: Path, launch_config: Path | None, stop: StopSignal, bar: tqdm) -> None:
        self.sweep, self.out, self.stop, self.bar = sweep, out, stop, bar
        self.launcher = [sys.executable]
        if launch_config is not None:
            accelerate = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(launch_config)]
            self.launcher += accelerate

    def finish(self, trial: Trial) -> None:
        """Do what is left of a trial. Raises ProcessFailed, or Interrupted."""
        if not trial.variant.only_evaluate:
            if self.sweep.seconds is not None:
                trial = trial.with_overrides(train={"steps": self._probed_steps(trial)})
            if not is_trained(trial):
                self._train(trial)
        if read_scores(trial, self.sweep) is None:
            self._evaluate(trial)

    def _probed_steps(self, trial: Trial) -> int:
        """train.steps for the seconds that the sweep gives: the stored choice, or that of a probe."""
        assert self.sweep.seconds is not None
        file, settings = probe_file(self.out, trial), probed_settings(trial)
        probe = read_probe(file)
        if probe is None or probe.seconds != self.sweep.seconds or probe.settings != settings:
            pace = self._pace(trial, file.with_suffix(""))
            probe = Probe(self.sweep.seconds, pace, max(1, round(self.sweep.seconds / pace)), settings)
            probe.save(file)
            self.bar.write(f"{trial.variant.name}: {pace:.3g} s a step, {probe.steps} steps", file=sys.stderr)
        return probe.steps

    def _pace(self, trial: Trial, directory: Path) -> float:
        """Seconds per step of a short run of a trial, of which nothing else is kept."""
        shutil.rmtree(directory, ignore_errors=True)  # of a probe that was killed
        steps, place = {"steps": WARM_UP + PROBE}, {"dir": str(directory)}
        self._train(trial.with_overrides(run=place, train=steps, tracking={"every": WARM_UP}))
        lines, _ = parse_lines((directory / "events.jsonl").read_text())
        paces = [line for line in lines if line["kind"] == "pace" and line["step"] > WARM_UP]
        shutil.rmtree(directory)
        return sum(line["seconds"] for line in paces) / sum(line["steps"] for line in paces)

    def _train(self, trial: Trial) -> None:
        command = [*self.launcher, "-m", "fm", "train", str(trial.variant.base), *trial.overrides]
        self._run(command, trial.recipe.run.directory / "train.out")

    def _evaluate(self, trial: Trial) -> None:
        command = [sys.executable, "-m", "fm", "evaluate", str(model_of(trial)), "--out", str(trial.report)]
        command += ["--shards", trial.recipe.data.shards, "--protocol", self.sweep.protocol]
        command += ["--windows", str(self.sweep.windows)] if self.sweep.windows is not None else []
        self._run(command, trial.directory / "evaluate.out")

    def _run(self, command: Sequence[str], output: Path) -> None:
        """Run a command to its end, what it prints in `output`. Raises ProcessFailed, or Interrupted."""
        if self.stop.received:
            raise Interrupted
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab") as stream:
            # A session of its own, so that a launcher and its processes hear of a Ctrl-C once, from here.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                self._wait(process)
            finally:
                if process.poll() is None:  # a second Ctrl-C
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if self.stop.received:
            raise Interrupted
        if process.returncode:
            lines = output.read_text(errors="replace").replace("\r", "\n").splitlines()
            last = "\n  ".join([line for line in lines if line.strip()][-LAST_LINES:])
            raise ProcessFailed(f"exit code {process.returncode}, {output} ends with\n  {last}")

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        """Until the process has ended; asked to stop, it is told once, and training saves first."""
        told = False
        while True:
            try:
                process.wait(POLL_SECONDS)
                return
            except subprocess.TimeoutExpired:
                self.bar.refresh()
                if self.stop.received and not told:
                    os.killpg(process.pid, signal.SIGTERM)
                    told = True


def _check_pretrained(trial: Trial) -> None:
    if trial.recipe.finetune is not None:
        try:
            find_checkpoint(trial.recipe.finetune.pretrained)
        except UserError as error:
            raise UserError(f"variant {trial.variant.name!r}: finetune.pretrained: {error}") from error


def _write_table(sweep: Sweep, trials: Sequence[Trial], failed: Collection[str], out: Path) -> None:
    results = sweep_results(sweep, trials, failed)
    text = f"# {sweep.title}\n\n{render(sweep_document(sweep, results), 'md')}"
    for name, content in (("table.md", text), ("table.json", json.dumps(results, indent=1, allow_nan=False) + "\n")):
        with atomic_file(out / name) as file:
            file.write(content.encode())
    print(f"{text}\ntable: {out / 'table.md'}")
