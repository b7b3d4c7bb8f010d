"""The commands that start from a trained model: they extend it, finetune it, or draw a figure of its rollouts."""

import re
import sys
from argparse import Namespace
from pathlib import Path

from data_pipeline.errors import UserError
from fm.parser import MODEL_HELP, OVERRIDES, PROCESSES, arg, check_above_zero, command

PEAK_RATES = ("train.learning_rate=", "train.muon_learning_rate=")
OVERRIDE = re.compile(r"[a-z_]+(\.\w+)*=")  # among the values of --data, which takes all words that follow it


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
    arg("model", metavar="MODEL", help=MODEL_HELP),
    OVERRIDES,
    arg("--data", nargs="+", required=True, metavar="DIR", help="folders or URLs of shards with the new datasets"),
    arg("--replay", metavar="SHARDS", help="folder or URL with the model's old datasets, to train on them too"),
    arg("--freeze", metavar="PART,...", help="parts that keep their weights: embedding, trunk"),
    arg(
        "--few-shot", metavar="N,...", help="also compare with training from scratch on N trajectories, such as 2,8,all"
    ),
    arg("--scratch-learning-rate", type=float, metavar="RATE", help="peak from scratch (default: the other arm's)"),
    arg("--out", type=Path, metavar="DIR", help="run directory (default: runs/finetune_NAME)"),
    arg("--windows", type=int, metavar="N", help="number of one-step windows to score (default: the protocol's)"),
    arg("--registry", metavar="FOLDER", help="folder of your own cards (default: the run's, or WAVELIT_REGISTRY)"),
    PROCESSES,
    usage="fm finetune [-h] MODEL --data DIR [DIR ...] [options] [section.key=value ...]",
)
def finetune(options: Namespace) -> int:
    """Teach a trained model the datasets in DIR that it does not know, and print its scores before and after.

    The model is extended as by `fm extend`, trained with the loss and optimizer of its own recipe for 500 steps
    (train.steps), one step ahead, and scored. First the parts that only the new datasets use are trained, then all that
    are not frozen. With --replay, three of four draws are of the model's old datasets, so that it keeps them; without,
    the finetuned model knows only the new datasets. With --few-shot, the extended model and one from scratch are also
    trained on some trajectories of each new dataset alone, for as many steps, all parts at the model's own learning
    rate, and a table and a page with both curves are made. The same command continues what was interrupted.
    """
    from fm.distributed import EXIT_DONE, EXIT_INTERRUPTED
    from fm.lab.few_shot import check_few_shot, run_few_shot
    from fm.share.finetune import finetune, plan_finetuning

    check_above_zero("--scratch-learning-rate", options.scratch_learning_rate)
    check_above_zero("--processes", options.processes)
    if options.scratch_learning_rate is not None and options.few_shot is None:
        raise UserError(
            "--scratch-learning-rate: expected --few-shot beside it, whose runs from scratch have this rate"
        )
    overrides = [word for word in options.data if OVERRIDE.match(word) and not Path(word).exists()]
    options.overrides += overrides
    data = [word for word in options.data if word not in overrides]
    if not data:
        raise UserError("--data: expected folders or URLs of shards, got none")
    if options.windows is not None and options.windows < 1:
        raise UserError(f"--windows: expected at least 1 one-step window per dataset, got {options.windows}")
    freeze = options.freeze.split(",") if options.freeze is not None else []
    places = (data, options.replay, freeze, options.out, options.registry)
    plan = plan_finetuning(options.model, *places, options.overrides)
    studied = plan.new if options.few_shot is not None else ()
    for name in studied:
        check_few_shot(plan.recipe, name, options.few_shot)
    try:
        code = finetune(plan, options.windows, options.processes)
        for name in studied:
            if code == EXIT_DONE:
                rates = [word for word in options.overrides if word.startswith(PEAK_RATES)]
                settings = (rates, options.scratch_learning_rate, options.windows, options.processes)
                run, out = plan.out / "recipe.yaml", plan.out / "few_shot" / name
                code = run_few_shot(run, name, options.few_shot, out, *settings)
        return code
    except KeyboardInterrupt:
        print("\ninterrupted; what is finished is kept: the same command goes on", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED


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
