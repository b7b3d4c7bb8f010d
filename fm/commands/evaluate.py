"""fm evaluate: measure a run, and write its report."""

import argparse
import sys
from pathlib import Path

from fm.commands.arguments import Commands


def add(commands: Commands) -> None:
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
    evaluate.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    if options.truth is not None or Path(options.run).suffix in (".hdf5", ".h5", ".nc", ".zarr"):
        return _score_prediction(options)
    from fm.evaluation.runs import evaluate_run
    from fm.runtime import EXIT_DONE, EXIT_INTERRUPTED, EXIT_LOST, ProcessLost

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
    from data_pipeline.errors import UserError
    from fm.prediction.scored import evaluate_prediction

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
