"""Commands that make something of a trained model: a larger model, a figure. Declared as those of fm/cli.py are."""

from argparse import Namespace
from pathlib import Path

from data_pipeline.errors import UserError
from fm.parser import MODEL_HELP, arg, command


@command(
    arg("model", metavar="MODEL", help=MODEL_HELP),
    arg("--dataset", action="append", required=True, metavar="NAME_OR_CARD", help="name or card; may be repeated"),
    arg("--shards", required=True, metavar="DIR", help="folder or URL with shards of their train split"),
    arg("--out", type=Path, required=True, metavar="DIR", help="folder to write, whole or not at all"),
    arg("--rows", default="nearest", metavar="zero|nearest|drawn|NEW=OLD,...", help="rows of new channels, see above"),
    arg("--seed", type=int, default=0, help="seed of what is drawn"),
    arg("--registry", metavar="DIR", help="folders of your own cards (default: WAVELIT_REGISTRY)"),
)
def extend(options: Namespace) -> None:
    """Add datasets and their channels to a trained model.

    A dataset is the name of a card, or the card itself: FOLDER/datasets/NAME.yaml. On the datasets that the model
    knows, its predictions stay the same bit for bit. This is checked with one step on each of them, and if a bit
    differs nothing is written. The added datasets begin at persistence or the mean. DIR is an exported model:
    finetune.pretrained=DIR trains it. --rows sets the embedding of channels that are new to the model: zeros, the row
    of the nearest channel (same unit, similar name), random rows as in a new model, or the rows of channels that you
    name. Channels without a nearest channel that you do not name get random rows.
    """
    from fm.share.extend import extend

    extend(options.model, options.dataset, options.shards, options.out, options.rows, options.seed, options.registry)


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
