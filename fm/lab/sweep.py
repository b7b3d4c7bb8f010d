"""Runs a sweep: each variant with each seed is a run in a process of its own, trained, then evaluated.

What is there is kept: a finished run is not trained again, and the trainer continues an interrupted one by itself. A
run that fails is shown and passed over. fm/lab/sweep_state.py says which files there are.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from tqdm import tqdm

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_file, only_process
from fm.checkpoint import find_checkpoint
from fm.lab.sweep_file import Sweep, Trial, plan
from fm.lab.sweep_state import (
    Probe,
    check_unchanged,
    is_trained,
    model_of,
    probe_file,
    probed_settings,
    read_probe,
    read_scores,
)
from fm.lab.sweep_table import sweep_document, sweep_results
from fm.runtime import EXIT_DONE, EXIT_INTERRUPTED, StopSignal
from fm.scores.formats import render
from fm.tracking.logs import parse_lines

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
