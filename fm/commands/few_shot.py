"""fm few-shot: from how few trajectories does a pretrained model learn a dataset?"""

import argparse
from pathlib import Path

from fm.commands.arguments import Commands


def add(commands: Commands) -> None:
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
    few_shot.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
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
