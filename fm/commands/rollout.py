"""fm rollout: predict from the states of a file."""

import argparse
from pathlib import Path

from fm.commands.arguments import Commands


def add(commands: Commands) -> None:
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
    rollout.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from fm.prediction.rollout import Request, predict_file

    trajectories = _trajectories(options.trajectory)
    request = Request(
        options.input, options.out, options.steps, options.dataset, trajectories, options.start, options.force
    )
    print(predict_file(options.model, request, options.registry))
    return 0


def _trajectories(words: list[str]) -> tuple[int, ...] | None:
    from data_pipeline.errors import UserError

    if words == ["all"]:
        return None
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--trajectory: expected numbers from 0 on, or all; got {' '.join(words)}")
    return tuple(map(int, words))
