"""What the command modules share.

A command module has `add(commands)`, which declares its arguments, and imports what it needs when it runs: `--help`
answers at once.

fm train: run a recipe in this process.

fm status: how a run stands.

fm plan: what a run will cost, before it is launched.

fm benchmark: how fast this machine trains, and what stops it from being faster.

fm evaluate: measure a run, and write its report.

fm score: scores from stored errors, under any protocol that the same rollouts can serve, without the model.

fm compare: scores of evaluated runs side by side, and beside published ones.

fm rollout: predict from the states of a file.

fm export: a run as a folder that others can use.

fm extend: a trained model learns to know more datasets, and stays the same on those it knows.

fm few-shot: from how few trajectories does a pretrained model learn a dataset?

fm transfer: does training together help or hurt, and whom?

fm sweep: variants of a recipe, trained, scored and ranked.

fm diagnose: why rollouts of one dataset diverge.

fm replay: one step of a run again.

The `fm` command.

Exit codes: 0 done, 2 the user's mistake (one message on stderr), 130 interrupted; `train` has more (fm/recipe.py).
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from data_pipeline.files import UserError

Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"


class CommandParser(argparse.ArgumentParser):
    """The parser of a command; where it takes `overrides`, they may stand before, between and after options.

    argparse alone wants all positional arguments side by side.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, rest = super().parse_known_args(args, namespace)
        if hasattr(options, "overrides"):
            found = [word for word in rest if "=" in word and not word.startswith("-")]
            options.overrides = [*options.overrides, *found]
            rest = [word for word in rest if word not in found]
        return options, rest


def _add_train(commands: Commands) -> None:
    train = commands.add_parser("train", help="run a recipe, as `accelerate launch RECIPE` does, in this process")
    train.add_argument("recipe", help="a recipe, such as recipes/quickstart.yaml")
    train.add_argument("overrides", nargs="*", help="section.key=value")
    train.set_defaults(command=_run_train)


def _run_train(options: argparse.Namespace) -> int:
    from fm.recipe import main as train_recipe

    return train_recipe(options.recipe, options.overrides)


def _add_status(commands: Commands) -> None:
    status = commands.add_parser("status", help="how a run stands: step, rate, time left, checkpoint, scores, events")
    status.add_argument("run", type=Path, help="run directory")
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.set_defaults(command=_run_status)


def _run_status(options: argparse.Namespace) -> int:
    from fm.lab.status import read_status, status_json, status_text

    status = read_status(options.run)
    print(status_json(status) if options.json else status_text(status))
    return 0


def _add_plan(commands: Commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="what a run will cost, before it is launched: work, time, memory",
        usage="fm plan [-h] [options] RECIPE [section.key=value ...]",
    )
    plan.add_argument("recipe", type=Path, help="a recipe, such as recipes/fm_pretrain.yaml")
    plan.add_argument("overrides", nargs="*", help="section.key=value")
    plan.add_argument(
        "--gpu", metavar="NAME", help="on this GPU (a100, h200, ...), by its data sheet; default: measured here"
    )
    plan.add_argument(
        "--utilisation",
        type=float,
        default=0.3,
        metavar="U",
        help="with --gpu: share of the peak that matrix products are assumed to reach (default: 0.3)",
    )
    plan.add_argument(
        "--probe-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="without --gpu: how long steps are measured here, at most and about (default: 60)",
    )
    plan.add_argument(
        "--shards", metavar="DIR", help="shards that are there, in place of the recipe's, which may not be"
    )
    plan.add_argument("--processes", type=int, default=1, metavar="N", help="that share each step (default: 1)")
    plan.add_argument(
        "--network",
        type=float,
        default=50.0,
        metavar="GBS",
        help="with --gpu: GB/s of each GPU to other nodes (default: 50, InfiniBand of 400 Gb/s)",
    )
    plan.add_argument("--json", type=Path, metavar="FILE", help="also write every number to this file")
    plan.set_defaults(command=_run_plan)


def _run_plan(options: argparse.Namespace) -> int:
    from data_pipeline.files import UserError
    from fm.lab.plan_tables import plan_run

    if not 0 < options.utilisation <= 1:
        raise UserError(f"--utilisation: expected a share in (0, 1], got {options.utilisation}")
    if not 0 < options.probe_seconds < float("inf"):
        raise UserError(f"--probe-seconds: expected seconds above 0, got {options.probe_seconds}")
    if options.processes < 1:
        raise UserError(f"--processes: expected a number of at least 1, got {options.processes}")
    if not 0 < options.network < float("inf"):
        raise UserError(f"--network: expected GB/s above 0, got {options.network}")
    overrides = [*options.overrides, *([f"data.shards={options.shards}"] if options.shards else [])]
    speed = options.probe_seconds if options.gpu is None else (options.gpu, options.utilisation)
    shards = options.shards is not None
    plan_run(options.recipe, overrides, speed, options.processes, shards, options.json, options.network)
    return 0


def _add_benchmark(commands: Commands) -> None:
    benchmark = commands.add_parser(
        "benchmark",
        help="how fast this machine trains, dataset by dataset, and what stops it from being faster",
        usage="fm benchmark [-h] [options] [section.key=value ...]",
    )
    benchmark.add_argument("overrides", nargs="*", help="section.key=value")
    benchmark.add_argument(
        "--recipe", type=Path, metavar="R", help="default: recipes/fm_pretrain.yaml on a GPU, else quickstart.yaml"
    )
    benchmark.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: a GPU if any")
    benchmark.add_argument("--gpu", metavar="NAME", help="run nothing: the floor on this GPU, by its data sheet")
    benchmark.add_argument("--datasets", nargs="+", metavar="NAME", help="some of the recipe's; default: all")
    benchmark.add_argument(
        "--grid", choices=("full", "mini"), help="published grids or the mini-Well's; default: full on a GPU"
    )
    benchmark.add_argument("--variants", nargs="+", metavar="NAME", help="float32, bf16, batch8, ... or none")
    benchmark.add_argument(
        "--seconds", type=float, metavar="S", help="of taking steps, about (default: 45 on a CPU, 300 on a GPU)"
    )
    benchmark.add_argument("--data", metavar="SHARDS", help="also: how long training waits for the loader of these")
    benchmark.add_argument(
        "--step-ms", type=float, default=36.0, metavar="MS", help="with --data on a CPU: pace (default: 36)"
    )
    benchmark.add_argument("--profile", type=Path, metavar="DIR", help="also: traces and top kernels into this folder")
    benchmark.add_argument("--json", type=Path, metavar="FILE", help="also write every number to this file")
    benchmark.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to this file")
    benchmark.set_defaults(command=_run_benchmark)


def _run_benchmark(options: argparse.Namespace) -> int:
    from data_pipeline.files import UserError
    from fm.lab.benchmark import Request, benchmark, floors
    from fm.lab.benchmark_tables import check_targets, write

    for name, value in (("--seconds", options.seconds), ("--step-ms", options.step_ms)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name}: expected a number above 0, got {value}")
    check_targets(options.json, options.markdown, options.profile)
    request = Request(
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
    write(floors(options.gpu, request) if options.gpu else benchmark(request), options.json, options.markdown)
    return 0


def _add_evaluate(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score a run's averaged weights: one-step and rollout VRMSE; or a file of predictions",
        description="Score a run's averaged weights, one step and rolled out, and write a report. Interrupted, the "
        "same command goes on. Several processes share the work: `accelerate launch --config_file launch/cpu2.yaml "
        "-m fm evaluate RUN` (launch/README.md). With --truth, score the rollouts in a file of `fm rollout`, "
        "whose frames are found in the truth by their time. Exit codes: 0 done, 2 your mistake, 3 another process is "
        "lost, 130 interrupted.",
    )
    evaluate.add_argument(
        "run", help="run, one of its checkpoints, exported model, hf://organisation/name, or with --truth a .hdf5"
    )
    evaluate.add_argument("--truth", type=Path, metavar="FILE", help="the Well HDF5 that holds what was predicted")
    evaluate.add_argument("--shards", help="folder or URL of the shards to score on (default: the recipe's)")
    evaluate.add_argument(
        "--out",
        type=Path,
        help="folder of the report (default: RUN/report; of an exported model ./NAME_report, of a file FILE_report)",
    )
    evaluate.add_argument(
        "--protocol",
        help="named protocol, or a .yaml file with one (default: the recipe's validation.protocol; thirds)",
    )
    evaluate.add_argument("--split", help="split to score (default: the protocol's, test)")
    evaluate.add_argument(
        "--windows",
        type=int,
        metavar="N",
        help="score N evenly spaced one-step windows per dataset, as validation does (default: the protocol's, all)",
    )
    evaluate.set_defaults(command=_run_evaluate)


def _run_evaluate(options: argparse.Namespace) -> int:
    if options.truth is not None or Path(options.run).suffix in (".hdf5", ".h5", ".nc", ".zarr"):
        return _score_prediction(options)
    from fm.distributed import EXIT_DONE, EXIT_INTERRUPTED, EXIT_LOST, ProcessLost
    from fm.evaluation.evaluate import evaluate_run

    try:
        evaluate_run(options.run, options.shards, options.out, options.protocol, options.split, options.windows)
    except KeyboardInterrupt:
        print("\ninterrupted; what is finished is kept: the same command goes on", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except ProcessLost as lost:
        print(f"\nerror: {lost}. What is finished is kept: the same command goes on", file=sys.stderr, flush=True)
        return EXIT_LOST
    return EXIT_DONE


def _score_prediction(options: argparse.Namespace) -> int:
    from data_pipeline.files import UserError
    from fm.share.predictions import evaluate_prediction

    prediction = Path(options.run)
    if prediction.suffix not in (".hdf5", ".h5"):
        raise UserError(f"{prediction}: expected the rollouts in a Well file: `fm rollout --out PRED.hdf5` writes one")
    if options.truth is None:
        raise UserError(f"{prediction}: expected --truth FILE, the file that holds what was predicted")
    others = [name for name in ("shards", "split", "windows") if getattr(options, name) is not None]
    if others:
        raise UserError(f"--{others[0]}: is of an evaluation of a run; with --truth the two files say all")
    evaluate_prediction(prediction, options.truth, options.protocol, options.out)
    return 0


if TYPE_CHECKING:
    from fm.evaluation.errors import ErrorFile


def _add_score(commands: Commands) -> None:
    score = commands.add_parser("score", help="scores from an evaluation's stored errors, without the model")
    score.add_argument("errors", type=Path, help="errors.npz, a report folder, or a run that was evaluated")
    score.add_argument("--protocol", metavar="NAME_OR_FILE", help="a name or a .yaml file (default: the errors' own)")
    score.add_argument("--eps", type=float, help="added to the variance of the target (default: the protocol's)")
    score.add_argument("--out", type=Path, metavar="DIR", help="write a report there: errors, scores, tables, pictures")
    score.set_defaults(command=_run_score)


def _run_score(options: argparse.Namespace) -> int:
    from fm.evaluation.errors import ErrorFile, find_errors
    from fm.evaluation.tables import rescore, score_table

    file = find_errors(options.errors)
    measured = ErrorFile.load(file)
    errors, scores = rescore(measured, options.protocol, options.eps)
    if options.out is not None:
        if options.out.exists() and not options.out.is_dir():
            raise UserError(f"--out {options.out}: expected a folder to write a report into, got a file")
        if options.out.resolve() == file.resolve().parent and errors.protocol != measured.protocol:
            raise UserError(
                f"--out {options.out}: expected another folder than that of {file}, whose errors were measured under "
                f"protocol {measured.protocol.name}: that evaluation would be replaced"
            )
        _write(options.out, errors, scores, file.with_name("samples.npz"))
    print(score_table(scores), end="")
    return 0


def _write(out: Path, errors: "ErrorFile", scores: Mapping[str, Any], stored: Path) -> None:
    """A report as the evaluation's own, with pictures where it kept their fields, and the tables in more formats."""
    from fm.evaluation.pictures import load_samples
    from fm.evaluation.report import write_report
    from fm.evaluation.tables import write_tables

    samples = []
    for sample in load_samples(stored) if stored.is_file() else []:
        try:
            part = errors.datasets[sample.dataset]
            vrmse = part.rollout_vrmse(sample.trajectory, sample.channel, sample.steps, errors.protocol.eps)
        except (LookupError, ValueError):
            raise UserError(
                f"{stored}: expected fields of rollouts in the errors.npz beside it, got {sample.dataset}, trajectory "
                f"{sample.trajectory}, {sample.channel}, which that does not have: bring the two files of one "
                "evaluation together, or remove samples.npz for a report without pictures of fields"
            ) from None
        samples.append(dataclasses.replace(sample, vrmse=vrmse))
    write_tables(out, scores)
    write_report(out, errors, scores, samples)


def _add_compare(commands: Commands) -> None:
    compare = commands.add_parser("compare", help="scores of evaluated runs side by side, and beside published ones")
    compare.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run, report folder or errors.npz")
    compare.add_argument("--protocol", metavar="NAME_OR_FILE", help="protocol of all scores (default: the first run's)")
    compare.add_argument("--statistic", help="median or mean over trajectories (default: the protocol's)")
    compare.add_argument("--labels", metavar="A,B", help="names of the columns (default: the runs')")
    compare.add_argument("--format", default="md", help="md, csv, json or latex (default: md)")
    compare.add_argument("--out", type=Path, metavar="FILE", help="write there instead of printing")
    compare.add_argument("--published", action="store_true", help="only list the published scores, with their sources")
    compare.set_defaults(command=_run_compare)


def _run_compare(options: argparse.Namespace) -> int:
    from data_pipeline.files import atomic_file
    from data_pipeline.registry import load_registry
    from data_pipeline.tables import render
    from fm.evaluation.protocol import load_protocol
    from fm.evaluation.published import beside_published, published_document
    from fm.evaluation.tables import compare_document, load_scores

    if options.out is not None and options.out.is_dir():
        raise UserError(f"--out {options.out}: expected a file to write, got a folder: name a file in it")
    if bool(options.runs) == options.published:
        raise UserError("compare: expected runs, or --published alone")
    if options.published:
        document = published_document(load_registry())
    else:
        protocol = load_protocol(options.protocol) if options.protocol else None
        labels = options.labels.split(",") if options.labels else None
        runs = load_scores(options.runs, protocol, options.statistic, labels)
        document = compare_document(runs)
        tables, notes = beside_published(runs, load_registry())
        document = dataclasses.replace(document, tables=[*document.tables, *tables], notes=[*document.notes, *notes])
    text = render(document, options.format)
    if options.out is None:
        print(text, end="")
    else:
        with atomic_file(options.out) as file:
            file.write(text.encode())
    return 0


def _add_rollout(commands: Commands) -> None:
    rollout = commands.add_parser(
        "rollout",
        help="predict from the states of a file, into a file",
        description="Predict from one frame of a Well HDF5, netCDF (.nc) or zarr file. The output, in the format of "
        "its suffix, holds that frame and the predicted ones. `fm evaluate PRED --truth FILE` scores a Well file.",
    )
    rollout.add_argument(
        "model", metavar="MODEL", help="run directory, checkpoint, exported model, or hf://organisation/name"
    )
    rollout.add_argument("--input", type=Path, required=True, metavar="FILE", help="a .hdf5, .h5, .nc or .zarr")
    rollout.add_argument("--out", type=Path, required=True, metavar="PRED", help="a .hdf5, .h5, .nc or .zarr to write")
    rollout.add_argument("--steps", type=int, required=True, metavar="N", help="how many steps to predict")
    rollout.add_argument("--dataset", metavar="NAME", help="what the file is of (default: what it says)")
    rollout.add_argument(
        "--trajectory", nargs="+", default=["all"], metavar="I", help="numbers of trajectories, or all (default: all)"
    )
    rollout.add_argument(
        "--start", type=int, default=0, metavar="T", help="frame to start from (default: 0, the first)"
    )
    rollout.add_argument("--registry", metavar="FOLDER", help="folder of your own cards (default: the model's cards)")
    rollout.add_argument("--force", action="store_true", help="replace PRED where it is there already")
    rollout.set_defaults(command=_run_rollout)


def _run_rollout(options: argparse.Namespace) -> int:
    from fm.share.rollout import Request, predict_file

    trajectories = _trajectories(options.trajectory)
    request = Request(
        options.input, options.out, options.steps, options.dataset, trajectories, options.start, options.force
    )
    print(predict_file(options.model, request, options.registry))
    return 0


def _trajectories(words: list[str]) -> tuple[int, ...] | None:
    from data_pipeline.files import UserError

    if words == ["all"]:
        return None
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--trajectory: expected numbers from 0 on, or all; got {' '.join(words)}")
    return tuple(map(int, words))


def _add_export(commands: Commands) -> None:
    export = commands.add_parser(
        "export",
        help="a run's averaged weights with cards, scores and a model card, for others to use",
        description="Write a run's averaged weights to a folder that needs no shards and none of your cards: "
        "WaveLiTFM.from_pretrained(DIR), fm evaluate DIR and finetune.pretrained take it.",
    )
    export.add_argument("run", type=Path, metavar="RUN", help="run directory, or one of its checkpoints")
    export.add_argument("folder", type=Path, metavar="DIR", help="folder to write; an earlier export is replaced")
    export.add_argument("--report", type=Path, metavar="FOLDER", help="scores and pictures (default: RUN/report)")
    export.add_argument(
        "--program",
        action="append",
        default=[],
        metavar="DATASET",
        help="also export this dataset's step as a program for torch alone (torch.export); may be repeated",
    )
    export.add_argument("--push", metavar="ORG/NAME", help="upload to the Hugging Face Hub, too (`hf auth login`)")
    export.add_argument("--licence", default="MIT", metavar="SPDX", help="licence of the weights (default: MIT)")
    export.set_defaults(command=_run_export)


def _run_export(options: argparse.Namespace) -> int:
    from fm.model.files import upload
    from fm.share.export import export_run

    address = f"hf://{options.push}" if options.push else None
    folder = export_run(options.run, options.folder, options.report, options.program, options.licence, address)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB; read {folder / 'README.md'}")
    if options.push:
        try:
            print(f"pushed: {upload(folder, options.push)}")
        except (OSError, ValueError) as error:
            raise UserError(f"--push: {error}. The export in {folder} is whole; push it again.") from error
    return 0


def _add_extend(commands: Commands) -> None:
    extend = commands.add_parser(
        "extend",
        help="add datasets and their channels to a trained model",
        description="Add datasets and their channels to a trained model. What it knows stays the same bit for bit, "
        "which is proved by a step on every old dataset and printed; where a bit differs, nothing is written. The "
        "added datasets begin at persistence or the mean. DIR is an exported model: finetune.pretrained=DIR trains it.",
    )
    extend.add_argument(
        "model", metavar="MODEL", help="run directory, checkpoint, exported model, or hf://organisation/name"
    )
    extend.add_argument(
        "--dataset",
        action="append",
        required=True,
        dest="datasets",
        metavar="NAME_OR_CARD",
        help="a dataset with a card, or the card itself, FOLDER/datasets/NAME.yaml; may be given again",
    )
    extend.add_argument("--shards", required=True, metavar="DIR", help="folder or URL with shards of their train split")
    extend.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, whole or not at all")
    extend.add_argument(
        "--rows",
        default="nearest",
        metavar="zero|nearest|drawn|NEW=OLD,...",
        help="lifting rows of channels that the model has not seen: zeros, those of the nearest channel (same unit, "
        "similar name), those drawn for a new model, or those of a channel of yours; where there is no nearest channel "
        "and yours are not named, they are drawn (default: nearest)",
    )
    extend.add_argument("--seed", type=int, default=0, help="draws what is drawn (default: 0)")
    extend.add_argument("--registry", metavar="DIR", help="folders of cards of your own (default: WAVELIT_REGISTRY)")
    extend.set_defaults(command=_run_extend)


def _run_extend(options: argparse.Namespace) -> int:
    from fm.share.extend import extend

    extend(
        options.model,
        options.datasets,
        options.shards,
        options.out,
        options.rows,
        seed=options.seed,
        registry=options.registry,
    )
    return 0


def _add_few_shot(commands: Commands) -> None:
    few_shot = commands.add_parser(
        "few-shot",
        help="the error on a dataset against the trajectories trained on, with a pretrained model and from scratch",
        usage="fm few-shot [-h] --dataset NAME [options] RECIPE [section.key=value ...]",
        description="Train on 1, 4, 16 and all trajectories of a dataset, each time from the pretrained model of the "
        "recipe and from scratch, with the same steps and windows, and score on the test split. What is done is kept; "
        "interrupted, the same command goes on.",
    )
    few_shot.add_argument("recipe", type=Path, help="one with the section finetune, such as extend_finetune.yaml")
    few_shot.add_argument("overrides", nargs="*", help="section.key=value, of all runs")
    few_shot.add_argument("--dataset", required=True, metavar="NAME", help="the dataset to learn; no other is drawn")
    few_shot.add_argument(
        "--trajectories", default="1,4,16,all", metavar="N,...", help="how many to train on (default: 1,4,16,all)"
    )
    few_shot.add_argument(
        "--scratch-learning-rate",
        type=float,
        metavar="RATE",
        help="peak learning rate from scratch (default: that of both, with which the pretrained model was trained)",
    )
    few_shot.add_argument("--out", type=Path, metavar="DIR", help="folder (default: runs/few_shot/NAME)")
    few_shot.add_argument(
        "--launch-config", type=Path, metavar="FILE", help="train under this configuration of accelerate launch"
    )
    few_shot.set_defaults(command=_run_few_shot)


def _run_few_shot(options: argparse.Namespace) -> int:
    from fm.lab.few_shot import run_few_shot

    out = options.out or Path("runs/few_shot") / options.dataset
    return run_few_shot(
        options.recipe,
        options.dataset,
        options.trajectories,
        out,
        options.overrides,
        options.scratch_learning_rate,
        options.launch_config,
    )


def _add_transfer(commands: Commands) -> None:
    transfer = commands.add_parser("transfer", help="a joint run beside runs of one dataset: who gains, who loses")
    transfer.add_argument("joint", type=Path, metavar="FM_RUN", help="run directory of several datasets")
    transfer.add_argument(
        "bespoke", type=Path, nargs="+", metavar="BESPOKE_RUN", help="run directories of one of its datasets each"
    )
    transfer.add_argument("--out", type=Path, help="folder of the report (default: FM_RUN/report/transfer)")
    transfer.add_argument("--format", default="md", help="of the printed table: md, csv, json or latex (default: md)")
    transfer.set_defaults(command=_run_transfer)


def _run_transfer(options: argparse.Namespace) -> int:
    from fm.lab.transfer import transfer

    print(transfer(options.joint, options.bespoke, options.out, options.format), end="")
    return 0


def _add_sweep(commands: Commands) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="train and score the variants of a recipe, resumable, and print their table",
        usage="fm sweep [-h] [options] FILE [section.key=value ...]",
    )
    sweep.add_argument("file", help="a sweep, such as recipes/ablations/table14 (.yaml may be left out)")
    sweep.add_argument("overrides", nargs="*", help="section.key=value, of all variants")
    sweep.add_argument("--out", type=Path, metavar="DIR", help="folder of the runs (default: runs/sweeps/<file>)")
    sweep.add_argument(
        "--only", action="append", default=[], metavar="VARIANT", help="run this variant, and others so named"
    )
    sweep.add_argument(
        "--seconds", type=float, metavar="S", help="train each variant for S seconds, not for the file's time or steps"
    )
    sweep.add_argument(
        "--launch-config", type=Path, metavar="FILE", help="train under this configuration of accelerate launch"
    )
    sweep.set_defaults(command=_run_sweep)


def _run_sweep(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from data_pipeline.files import UserError
    from fm.lab.sweep import run_sweep
    from fm.lab.sweep_file import load_sweep

    sweep = load_sweep(options.file)
    if options.seconds is not None:
        if not 0 < options.seconds < float("inf"):
            raise UserError(f"--seconds: expected seconds of training above 0, got {options.seconds}")
        sweep = replace(sweep, seconds=options.seconds)
    out = options.out or Path("runs/sweeps") / sweep.file.stem
    return run_sweep(sweep, out, options.overrides, options.only, options.launch_config)


def _add_diagnose(commands: Commands) -> None:
    diagnose = commands.add_parser(
        "diagnose", help="why rollouts of one dataset diverge: numbers, and a page of pictures"
    )
    diagnose.add_argument("run", help="run, one of its checkpoints, exported model, or hf://organisation/name")
    diagnose.add_argument("--dataset", required=True, metavar="NAME", help="a dataset that the run was trained on")
    diagnose.add_argument("--shards", help="folder or URL of the shards (default: the recipe's)")
    diagnose.add_argument(
        "--out",
        type=Path,
        help="folder of the page (default: RUN/report/diagnosis; of an exported model ./NAME_report/diagnosis)",
    )
    diagnose.add_argument(
        "--trajectories", type=int, default=4, metavar="N", help="how many test trajectories to roll out (default: 4)"
    )
    diagnose.add_argument(
        "--well",
        type=Path,
        help="folder of the simulated HDF5 files, for twins of the true flow (default: `well` beside the shards)",
    )
    diagnose.set_defaults(command=_run_diagnose)


def _run_diagnose(options: argparse.Namespace) -> int:
    from fm.lab.diagnosis.measure import diagnose_run

    diagnose_run(options.run, options.dataset, options.shards, options.out, options.trajectories, options.well)
    return 0


def _add_replay(commands: Commands) -> None:
    replay = commands.add_parser("replay", help="run one step of a run again, and print what went through it")
    replay.add_argument("run", type=Path, help="run directory")
    replay.add_argument("--step", type=int, required=True, metavar="N", help="number of the step, counted from 1")
    replay.add_argument("--shards", help="folder or URL of the shards (default: the recipe's)")
    replay.set_defaults(command=_run_replay)


def _run_replay(options: argparse.Namespace) -> int:
    from fm.lab.replay import replay, replay_text

    print(replay_text(replay(options.run, options.step, options.shards)))
    return 0


COMMANDS = (
    *(_add_plan, _add_benchmark, _add_train, _add_status, _add_replay),
    *(_add_export, _add_rollout, _add_extend),
    *(_add_evaluate, _add_score, _add_compare),
    *(_add_diagnose, _add_sweep, _add_few_shot, _add_transfer),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fm", description="Train and evaluate WaveLiT-FM.")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=CommandParser)
    for add_command in COMMANDS:
        add_command(commands)
    return parser
