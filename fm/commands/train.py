"""fm train: run a recipe in this process."""

import argparse

from fm.commands.arguments import Commands


def add(commands: Commands) -> None:
    train = commands.add_parser("train", help="run a recipe, as `accelerate launch RECIPE` does, in this process")
    train.add_argument("recipe", help="a recipe, such as recipes/quickstart.yaml")
    train.add_argument("overrides", nargs="*", help="section.key=value")
    train.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from fm.recipe import main as train_recipe

    return train_recipe(options.recipe, options.overrides)
