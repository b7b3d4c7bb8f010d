"""The `fm` command: one function for each subcommand, with its arguments above it (fm/parser.py).

The functions import what they need when they run, so that `--help` does not load torch. Exit codes: 0 done, 2 a mistake
of the user (one message on stderr), 130 interrupted; `train` and `evaluate` have more (fm/recipe.py).
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fm.cli_model  # noqa: F401  declares its commands
from data_pipeline.errors import UserError, run_command
from data_pipeline.files import write_whole
from fm.parser import MODEL_HELP, OVERRIDES, PARSER, PROCESSES, arg, check_above_zero, command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""

    def run() -> int | None:
        options = PARSER.parse_args(arguments)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
        code: int | None = options.command(options)
        return code

    return run_command(run)


def _write_results(content: dict[str, Any], file: Path | None) -> None:
    if file is not None:
        write_whole(file, (json.dumps(content, indent=1) + "\n").encode())


JSON_FILE = arg("--json", type=Path, metavar="FILE", help="also write every number to this file")


@command(
    arg("recipe", type=Path, help="a recipe, such as recipes/fm_pretrain.yaml"),
    OVERRIDES,
    arg("--gpu", metavar="NAME", help="GPU (a100, h200, ...) whose data sheet is used (default: measure this machine)"),
    arg("--utilisation", type=float, default="0.3", metavar="U", help="with --gpu: reached share of its peak FLOP/s"),
    arg("--probe-seconds", type=float, default="60", metavar="S", help="without --gpu: seconds to measure, at most"),
    arg("--shards", metavar="DIR", help="existing shards to use instead of the recipe's"),
    arg("--processes", type=int, default=1, metavar="N", help="number of processes that share each step"),
    arg("--network", type=float, default="50", metavar="GBS", help="with --gpu: GB/s of each GPU to other nodes"),
    JSON_FILE,
    usage="fm plan [-h] [options] RECIPE [section.key=value ...]",
)
def plan(options: Namespace) -> None:
    """Estimate the work, time and memory of a run before it is launched."""
    from fm.datasets import load_own_recipe
    from fm.lab.hardware import AssumedSpeed, find_gpu
    from fm.lab.plan import estimated_plan, measured_plan
    from fm.lab.plan_tables import plan_text

    if not 0 < options.utilisation <= 1:
        raise UserError(f"--utilisation: expected a share in (0, 1], got {options.utilisation}")
    check_above_zero("--probe-seconds", options.probe_seconds, "seconds")
    check_above_zero("--processes", options.processes)
    check_above_zero("--network", options.network, "GB/s")
    overrides = [*options.overrides, *([f"data.shards={options.shards}"] if options.shards else [])]
    shared = {"processes": options.processes, "require_shards": options.shards is not None}
    recipe = load_own_recipe(options.recipe, overrides)
    if options.gpu is None:
        found = measured_plan(recipe, options.probe_seconds, **shared)
    else:
        speed = AssumedSpeed(find_gpu(options.gpu), options.utilisation, recipe.train.precision != "float32")
        found = estimated_plan(recipe, speed, options.network, **shared)
    print(plan_text(found), end="")
    _write_results(found.to_json(), options.json)


@command(
    OVERRIDES,
    arg("--recipe", type=Path, metavar="R", help="(default: recipes/fm_pretrain.yaml on a GPU, else quickstart.yaml)"),
    arg("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there is one"),
    arg("--gpu", metavar="NAME", help="run nothing, but print the least time on this GPU by its data sheet"),
    arg("--datasets", nargs="+", metavar="NAME", help="some of the recipe's datasets (default: all)"),
    arg("--grid", choices=("full", "mini"), help="published grids or the mini-Well's (default: full on a GPU)"),
    arg("--variants", nargs="+", metavar="NAME", help="float32, bf16, batch8, ... or none"),
    arg("--seconds", type=float, metavar="S", help="seconds of steps, about (default: 45 on a CPU, 300 on a GPU)"),
    arg("--data", metavar="SHARDS", help="also measure how long training waits for the loader of these shards"),
    arg("--step-ms", type=float, default="36", metavar="MS", help="with --data on a CPU: milliseconds of a step"),
    arg("--profile", type=Path, metavar="DIR", help="also write traces and a table of kernels to this folder"),
    JSON_FILE,
    arg("--markdown", type=Path, metavar="FILE", help="also write the tables to this file"),
    usage="fm benchmark [-h] [options] [section.key=value ...]",
)
def benchmark(options: Namespace) -> None:
    """Measure how fast this machine trains on each dataset, and what limits the speed."""
    from fm.lab.benchmark import BenchmarkOptions, benchmark, floors
    from fm.lab.benchmark_tables import benchmark_text

    check_above_zero("--seconds", options.seconds)
    check_above_zero("--step-ms", options.step_ms)
    for option, file in (("--json", options.json), ("--markdown", options.markdown)):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{option}: no folder {file.parent}; make it first")
    chosen = BenchmarkOptions(
        recipe=options.recipe,
        overrides=tuple(options.overrides),
        device=options.device,
        size=options.grid,
        datasets=options.datasets and tuple(options.datasets),
        variants=options.variants and tuple(options.variants),
        seconds=options.seconds,
        profile=options.profile,
        shards=options.data,
        step_seconds=options.step_ms / 1e3,
    )
    found = floors(options.gpu, chosen) if options.gpu else benchmark(chosen)
    text = benchmark_text(found)
    print(text, end="")
    _write_results(found.to_json(), options.json)
    if options.markdown is not None:
        write_whole(options.markdown, text.encode())


@command(arg("recipe", help="a recipe, such as recipes/quickstart.yaml"), OVERRIDES, PROCESSES)
def train(options: Namespace) -> int:
    """Run a recipe in one process, or in N of this machine; launch/README.md has more ways."""
    from fm.recipe import main as run_recipe

    return run_recipe(options.recipe, options.overrides, options.processes)


@command(
    arg("run", type=Path, help="run directory"),
    arg("--json", action="store_true", help="print one JSON object"),
)
def status(options: Namespace) -> None:
    """Print the state of a run: step, rate, time left, checkpoint, scores, events."""
    from fm.lab.status import read_status, status_text

    status = read_status(options.run)
    print(json.dumps(asdict(status), indent=1) if options.json else status_text(status))


@command(
    arg("run", type=Path, help="run directory"),
    arg("--step", type=int, required=True, metavar="N", help="number of the step, counted from 1"),
    arg("--shards", help="folder or URL of the shards (default: the recipe's)"),
)
def replay(options: Namespace) -> None:
    """Run one step of a run again, and print its data, losses and gradient norms."""
    from fm.lab.replay import replay, replay_text

    print(replay_text(replay(options.run, options.step, options.shards)))


@command(
    arg("run", type=Path, metavar="RUN", help="run directory, or one of its checkpoints"),
    arg("folder", type=Path, metavar="DIR", help="folder to write; an earlier export is replaced"),
    arg("--report", type=Path, metavar="FOLDER", help="scores and pictures (default: RUN/report)"),
    arg("--program", action="append", metavar="DATASET", help="dataset to export for torch alone too; may be repeated"),
    arg("--push", metavar="ORG/NAME", help="also upload to the Hugging Face Hub (`hf auth login`)"),
    arg("--licence", default="MIT", metavar="SPDX", help="license of the weights"),
)
def export(options: Namespace) -> None:
    """Write a run's averaged weights with cards, scores and a model card, for others to use.

    The folder needs no shards and none of your cards: WaveLiTFM.from_pretrained(DIR), fm evaluate DIR and
    finetune.pretrained accept it. --program also writes one step of a dataset as a program of torch.export.
    """
    from fm.model.hub import upload
    from fm.share.export import export_run

    what, address = (options.run, options.folder, options.report), f"hf://{options.push}" if options.push else None
    folder = export_run(*what, options.program or [], options.licence, address)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB; read {folder / 'README.md'}")
    if options.push:
        try:
            print(f"pushed: {upload(folder, options.push)}")
        except (OSError, ValueError) as error:
            raise UserError(f"--push: {error}. The export in {folder} is whole; push it again.") from error


@command(
    arg("model", metavar="MODEL", help=MODEL_HELP),
    arg("--input", type=Path, required=True, metavar="FILE", help="a .hdf5, .h5, .nc or .zarr to predict from"),
    arg("--out", type=Path, required=True, metavar="PRED", help="a .hdf5, .h5, .nc or .zarr to write"),
    arg("--steps", type=int, required=True, metavar="N", help="number of steps to predict"),
    arg("--dataset", metavar="NAME", help="dataset of the file (default: the name in the file)"),
    arg("--trajectory", nargs="+", metavar="I", help="numbers of trajectories, or all (default: all)"),
    arg("--start", type=int, metavar="T", help="last frame given, counted from 0 (default: the first possible)"),
    arg("--registry", metavar="FOLDER", help="folder of your own cards (default: the model's cards)"),
    arg("--force", action="store_true", help="replace PRED if it exists"),
    arg("--scalar", action="append", default=[], metavar="NAME=VALUE", help="PDE parameter; may be repeated"),
)
def rollout(options: Namespace) -> None:
    """Predict from the states of a file, into a file.

    The input is one frame of a Well HDF5, netCDF (.nc) or zarr file. The output, in the format of its suffix, holds
    that frame and the predicted ones. `fm evaluate PRED --truth FILE` scores a Well file.
    """
    from fm.share.rollout import RolloutRequest, parse_scalars, predict_file

    words, trajectories = options.trajectory or ["all"], None
    if words != ["all"]:
        if not all(word.isdecimal() for word in words):
            raise UserError(f"--trajectory: expected numbers from 0 on, or all; got {' '.join(words)}")
        trajectories = tuple(map(int, words))
    given = options.dataset, trajectories, options.start, options.force, parse_scalars(options.scalar)
    request = RolloutRequest(options.input, options.out, options.steps, *given)
    print(predict_file(options.model, request, options.registry))


@command(
    arg("run", help=f"{MODEL_HELP}; with --truth a .hdf5"),
    arg("--truth", type=Path, metavar="FILE", help="the Well HDF5 that holds what was predicted"),
    arg("--shards", action="append", help="folder or URL of the shards (default: the recipe's); may be repeated"),
    arg("--datasets", metavar="A,B", help="some of the model's datasets; others need no shards (default: all)"),
    arg("--out", type=Path, help="folder of the report (default: RUN/report; NAME_report of a model or file NAME)"),
    arg("--protocol", help="name, or .yaml file with a protocol (default: the recipe's validation.protocol; thirds)"),
    arg("--split", help="split to score (default: the protocol's, test)"),
    arg("--windows", type=int, metavar="N", help="number of one-step windows per dataset (default: the protocol's)"),
    PROCESSES,
)
def evaluate(options: Namespace) -> int:
    """Score a run's averaged weights, one step and rolled out, or a file of predictions.

    A report is written. If the command is interrupted, the same command continues. With --truth, the rollouts in a file
    of `fm rollout` are scored, whose frames are found in the truth by their time. Exit codes: 0 done, 2 your mistake, 3
    another process is lost, 130 interrupted.
    """
    if options.truth is not None or Path(options.run).suffix in (".hdf5", ".h5", ".nc", ".zarr"):
        from fm.share.predictions import evaluate_prediction

        others = [name for name in ("shards", "datasets", "split", "windows") if getattr(options, name) is not None]
        if others:
            raise UserError(f"--{others[0]}: is of an evaluation of a run; with --truth the two files say all")
        evaluate_prediction(Path(options.run), options.truth, options.protocol, options.out)
        return 0
    from fm.distributed import EXIT_DONE, EXIT_INTERRUPTED, EXIT_LOST, ProcessLost, launch
    from fm.evaluation.evaluate import evaluate_run

    if options.processes != 1:
        names = {"datasets", "out", "protocol", "split", "windows"}
        given = [f"--{name}={value}" for name, value in vars(options).items() if name in names and value is not None]
        given += [f"--shards={place}" for place in options.shards or ()]
        return launch(options.processes, ["evaluate", options.run, *given])
    settings = (options.shards, options.out, options.protocol, options.split, options.windows)
    try:
        evaluate_run(options.run, *settings, options.datasets.split(",") if options.datasets is not None else None)
    except KeyboardInterrupt:
        print("\ninterrupted; what is finished is kept: the same command goes on", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except ProcessLost as lost:
        print(f"\nerror: {lost}. What is finished is kept: the same command goes on", file=sys.stderr, flush=True)
        return EXIT_LOST
    return EXIT_DONE


@command(
    arg("errors", type=Path, help="errors.npz, a report folder, or a run that was evaluated"),
    arg("--protocol", metavar="NAME_OR_FILE", help="name, or .yaml file with a protocol (default: the errors' own)"),
    arg("--eps", type=float, help="number added to the variance of the target (default: the protocol's)"),
    arg("--out", type=Path, metavar="DIR", help="folder for a report: errors, scores, tables, pictures"),
)
def score(options: Namespace) -> None:
    """Print scores from the stored errors of an evaluation, without the model."""
    from fm.evaluation.report import rescore_errors

    print(rescore_errors(options.errors, options.protocol, options.eps, options.out), end="")


@command(
    arg("runs", type=Path, nargs="*", metavar="RUN", help="run, report folder or errors.npz"),
    arg("--protocol", metavar="NAME_OR_FILE", help="protocol of all scores (default: the first run's)"),
    arg("--statistic", help="median or mean over trajectories (default: the protocol's)"),
    arg("--labels", metavar="A,B", help="names of the columns (default: the runs')"),
    arg("--format", default="md", help="md, csv, json or latex"),
    arg("--out", type=Path, metavar="FILE", help="file to write instead of printing"),
    arg("--published", action="store_true", help="only list the published scores, with their sources"),
)
def compare(options: Namespace) -> None:
    """Print scores of evaluated runs side by side, and beside published ones."""
    from fm.evaluation.published import comparison

    if options.out is not None and options.out.is_dir():
        raise UserError(f"--out {options.out}: expected a file to write, got a folder: name a file in it")
    if bool(options.runs) == options.published:
        raise UserError("compare: expected runs, or --published alone")
    labels = options.labels.split(",") if options.labels else None
    text = comparison(options.runs, options.protocol, options.statistic, labels, options.format)
    if options.out is None:
        print(text, end="")
    else:
        write_whole(options.out, text.encode())


@command(
    arg("run", help=MODEL_HELP),
    arg("--dataset", required=True, metavar="NAME", help="a dataset that the run was trained on"),
    arg("--shards", help="folder or URL of the shards (default: the recipe's)"),
    arg("--out", type=Path, help="folder (default: RUN/report/diagnosis; of an exported model NAME_report/diagnosis)"),
    arg("--trajectories", type=int, default=4, metavar="N", help="number of test trajectories to roll out"),
    arg("--well", type=Path, help="simulated HDF5 files, for twins of the flow (default: `well` beside the shards)"),
)
def diagnose(options: Namespace) -> None:
    """Show why rollouts of one dataset diverge, in numbers and on a page of pictures."""
    from fm.lab.diagnosis.measure import diagnose_run

    diagnose_run(options.run, options.dataset, options.shards, options.out, options.trajectories, options.well)


@command(
    arg("file", help="a sweep, such as recipes/ablations/table14 (.yaml may be left out)"),
    arg("overrides", nargs="*", help="section.key=value, for all variants"),
    arg("--out", type=Path, metavar="DIR", help="folder of the runs (default: runs/sweeps/<file>)"),
    arg("--only", action="append", metavar="VARIANT", help="run only this variant; may be repeated"),
    arg("--seconds", type=float, metavar="S", help="seconds to train each variant (default: the file's time or steps)"),
    arg("--launch-config", type=Path, metavar="FILE", help="configuration of accelerate launch"),
    usage="fm sweep [-h] [options] FILE [section.key=value ...]",
)
def sweep(options: Namespace) -> int:
    """Train and score the variants of a recipe, resumable, and print their table."""
    from fm.lab.sweep import run_sweep
    from fm.lab.sweep_file import load_sweep

    sweep = load_sweep(options.file)
    check_above_zero("--seconds", options.seconds, "seconds of training")
    if options.seconds is not None:
        sweep = replace(sweep, seconds=options.seconds)
    out = options.out or Path("runs/sweeps") / sweep.file.stem
    return run_sweep(sweep, out, options.overrides, options.only or [], options.launch_config)


@command(
    arg("joint", type=Path, metavar="FM_RUN", help="run directory of several datasets"),
    arg("runs", type=Path, nargs="+", metavar="RUN", help="runs of one of them each, and joint runs of other seeds"),
    arg("--out", type=Path, help="folder of the report (default: FM_RUN/report/transfer)"),
    arg("--format", default="md", help="format of the printed table: md, csv, json or latex"),
)
def transfer(options: Namespace) -> None:
    """Compare a joint run with runs of one dataset each: which datasets gain, and which lose."""
    from fm.lab.transfer import transfer

    print(transfer(options.joint, options.runs, options.out, options.format), end="")
