"""Run a sweep: each variant with each seed is a run in a process of its own, trained, then evaluated.

Finished work is kept: a finished run is not trained again, and the trainer continues an interrupted one. A run that
fails is reported, and the next one follows. fm/lab/sweep_file.py lists the files.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.files import only_process, write_whole
from data_pipeline.progress import progress_bar
from data_pipeline.tables import render
from data_pipeline.windows.loader import shard_places
from fm.checkpoint import find_checkpoint
from fm.config import recipe_to_dict
from fm.distributed import EXIT_DONE, EXIT_INTERRUPTED, Interrupted, StopSignal
from fm.lab.sweep_file import Probe, Sweep, Trial, find_changes, plan, read_scores
from fm.lab.sweep_table import sweep_document, sweep_results
from fm.training.runlog import parse_lines, seconds_spent

EXIT_FAILED = 1
WARM_UP, PROBE = 5, 30  # steps of a probe: the first ones, which are slow and left out, and those timed
POLL_SECONDS = 0.2
LAST_LINES = 15  # of a failed process's output, printed
TAIL_BYTES = 4096  # of the log of a run, where its last step stands
STEP = re.compile(rb'"step": (\d+)')


class ProcessFailed(Exception):
    """A process of a trial ended with an error; the message has its last lines."""


def run_sweep(
    sweep: Sweep,
    out: Path,
    overrides: Sequence[str] = (),
    only: Collection[str] = (),
    launch_config: Path | None = None,
) -> int:
    """Train and evaluate the trials that are not finished, print the table and write it; return the exit code.

    `only` names the variants to run (default: all); the table has all that are done. `launch_config` is accelerate's,
    for training. 0: done, 1: a run failed, 130: interrupted. Raises UserError, before anything runs, if the sweep does
    not fit together or a run in `out` has other settings.
    """
    chosen = [sweep.variant(name) for name in only]
    trials = plan(sweep, out, overrides)
    wanted = [trial for trial in trials if trial.variant in chosen] if only else trials
    failed = finish_trials(sweep, wanted, out, launch_config)
    if failed is None:
        return EXIT_INTERRUPTED
    results = sweep_results(sweep, trials, failed)
    text = f"# {sweep.title}\n\n{render(sweep_document(sweep, results), 'md')}"
    write_whole(out / "table.md", text.encode())
    write_whole(out / "table.json", f"{json.dumps(results, indent=1, allow_nan=False)}\n".encode())
    print(f"{text}\ntable: {out / 'table.md'}")
    return EXIT_FAILED if failed else EXIT_DONE


def finish_trials(
    sweep: Sweep,
    trials: Sequence[Trial],
    out: Path,
    launch_config: Path | None,
    title: str = "sweep",
    processes: int = 1,
) -> set[str] | None:
    """Train and evaluate the trials that are not finished; return the names of those that failed, None if interrupted.

    The progress on stderr is called `title`. `processes` share each trial, unless there is a `launch_config`. Raises
    UserError, before anything runs, if a pretrained model is missing or a run in `out` has other settings.
    """
    for trial in trials:
        _check_startable(trial, sweep)
    scored = {trial.name for trial in trials if read_scores(trial, sweep) is not None}
    failed: set[str] = set()
    with (
        only_process(out, "sweep"),
        StopSignal().listen() as stop,
        progress_bar(total=len(trials), initial=len(scored), desc=title, unit="run") as bar,
    ):
        runner = Runner(sweep, launch_config, stop, bar, processes)
        for trial in trials:
            try:
                runner.finish(trial)
            except ProcessFailed as failure:
                failed.add(trial.name)
                bar.write(f"{trial.name} failed: {failure}", file=sys.stderr)
            except Interrupted:
                bar.write("interrupted; the same command continues from here", file=sys.stderr)
                return None
            bar.update(trial.name not in scored)
    return failed


def _check_startable(trial: Trial, sweep: Sweep) -> None:
    if trial.recipe.finetune is not None:
        try:
            find_checkpoint(trial.recipe.finetune.pretrained)
        except UserError as error:
            raise UserError(f"variant {trial.variant.name!r}: finetune.pretrained: {error}") from error
    if changes := find_changes(trial, sweep):
        lines = "\n  ".join(changes)
        raise UserError(
            f"{trial.directory} was trained with other settings than {sweep.file} gives {trial.variant.name!r} now:\n"
            f"  {lines}\nRemove that folder, or sweep into another one (--out)."
        )


class Runner:
    """Finish trials, each in processes of its own, which end when `stop` is received; `bar` shows where they are."""

    def __init__(
        self, sweep: Sweep, launch_config: Path | None, stop: StopSignal, bar: Any, processes: int = 1
    ) -> None:
        self.sweep, self.stop, self.bar = sweep, stop, bar
        self.launcher = [sys.executable]
        if launch_config is not None:
            accelerate = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(launch_config)]
            self.launcher += accelerate
        self.shared = ["--processes", str(processes)] if processes > 1 else []

    def finish(self, trial: Trial) -> None:
        """Train and evaluate a trial as far as needed. Raises ProcessFailed or Interrupted."""
        if not trial.variant.only_evaluate:
            if self.sweep.seconds is not None:
                trial = trial.with_settings({"train.steps": self._probed_steps(trial, self.sweep.seconds)})
            if not trial.is_trained():
                self._train(trial)
        if read_scores(trial, self.sweep) is None:
            command = [sys.executable, "-m", "fm", "evaluate", str(trial.model), "--out", str(trial.report)]
            places = [word for place in shard_places(trial.recipe.data.shards) for word in ("--shards", place)]
            command += [*places, "--protocol", self.sweep.protocol]
            command += ["--windows", str(self.sweep.windows)] if self.sweep.windows is not None else []
            command += self.shared
            self._run(command, trial.directory / "evaluate.out", lambda: f"{trial.name}, evaluation")

    def _probed_steps(self, trial: Trial, seconds: float) -> int:
        """Return train.steps for `seconds` of training: the stored choice, or that of a new probe.

        A probe is a short run of the trial, of which only the pace is kept.
        """
        settings = recipe_to_dict(trial.recipe)
        del settings["run"], settings["train"]["steps"]
        probe = Probe.load(trial.probe)
        if probe is None or probe.seconds != seconds or probe.settings != settings:
            directory = trial.probe.with_suffix("")
            shutil.rmtree(directory, ignore_errors=True)  # of a probe that was killed
            length = {"train.steps": WARM_UP + PROBE, "tracking.every": WARM_UP}
            self._train(trial.with_settings({"run.dir": str(directory), **length}))
            lines, _ = parse_lines((directory / "events.jsonl").read_text())
            shutil.rmtree(directory)
            paces = [line for line in lines if line["kind"] == "pace" and line["step"] > WARM_UP]
            pace = sum(map(seconds_spent, paces)) / sum(line["steps"] for line in paces)
            probe = Probe(seconds, pace, max(1, round(seconds / pace)), settings)
            probe.save(trial.probe)
            self.bar.write(f"{trial.variant.name}: {pace:.3g} s a step, {probe.steps} steps", file=sys.stderr)
        return probe.steps

    def _train(self, trial: Trial) -> None:
        command = [*self.launcher, "-m", "fm", "train", str(trial.variant.base), *trial.overrides, *self.shared]
        folder, steps = trial.recipe.run.directory, trial.recipe.train.steps
        self._run(
            command, folder / "train.out", lambda: f"{trial.name}, step {_last_step(folder / 'log.jsonl')}/{steps}"
        )

    def _run(self, command: Sequence[str], output: Path, state: Callable[[], str]) -> None:
        """Run a command to its end and append what it prints to `output`; `state` tells the bar where it is.

        Raises ProcessFailed or Interrupted.
        """
        if self.stop.received:
            raise Interrupted
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab") as stream:
            # In a session of its own, a launcher and its processes get a Ctrl-C once, from here.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                self._wait(process, state)
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

    def _wait(self, process: subprocess.Popen[bytes], state: Callable[[], str]) -> None:
        """Wait for the end of the process. When `stop` is received it gets one SIGTERM; training then saves first."""
        signaled = False
        while True:
            try:
                process.wait(POLL_SECONDS)
                return
            except subprocess.TimeoutExpired:
                self.bar.set_postfix_str(state(), refresh=False)
                self.bar.refresh()
                if self.stop.received and not signaled:
                    os.killpg(process.pid, signal.SIGTERM)
                    signaled = True


def _last_step(log: Path) -> int:
    """Return the last step in a run's log.jsonl, which may be written just now; 0 before the first."""
    if not log.is_file():
        return 0
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        steps = STEP.findall(file.read())
    return int(steps[-1]) if steps else 0
