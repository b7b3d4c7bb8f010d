"""The command `fm figure`, declared as those of fm/cli.py are."""

from argparse import Namespace
from pathlib import Path

from data_pipeline.errors import UserError
from fm.parser import arg, command


@command(
    arg("model", metavar="RUN_OR_EXPORT", help="run, checkpoint, exported model, hf://organization/name, or a report"),
    arg("--dataset", required=True, metavar="NAME", help="a dataset of the model"),
    arg("--channel", metavar="NAME", help="a state channel of the dataset (default: the stored one)"),
    arg("--trajectory", type=int, metavar="I", help="number of a trajectory (default: the stored one)"),
    arg("--steps", metavar="N,...", help="rollout steps, such as 1,5,20 (default: five, evenly spaced)"),
    arg("--format", choices=("pdf", "svg", "png"), default="pdf", help="format of the file"),
    arg("--shards", metavar="DIR", help="folder or URL of the shards of other rollouts (default: the recipe's)"),
    arg("--out", type=Path, metavar="FILE", help="file to write (default: a file in the report's folder `figures`)"),
)
def figure(options: Namespace) -> None:
    """Draw truth, prediction and error of a rollout, for a paper or a talk.

    The figure has physical axes, color bars with units, the parameters of the trajectory, the VRMSE of each step, and
    the time until the correlation with the truth falls below 0.8. It shows the fields that `fm evaluate` has stored.
    For another channel, trajectory or step, the model is rolled out on the shards.
    """
    from fm.share.figure import FigureRequest, draw_figure

    try:
        steps = None if options.steps is None else tuple(int(word) for word in options.steps.split(","))
    except ValueError:
        raise UserError(f"--steps: expected numbers with commas between, such as 1,5,20; got {options.steps}") from None
    request = FigureRequest(options.dataset, options.channel, options.trajectory, steps)
    print(draw_figure(options.model, request, options.format, options.shards, options.out))
