"""What is measured: the datasets of a recipe at their published grids or the mini-Well's, without any data."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from data_pipeline.cards.registry import Card, load_registry
from data_pipeline.errors import UserError
from data_pipeline.miniwell.task import EIGHT, SYSTEMS, load_system
from data_pipeline.strict_yaml import nearest
from fm.planning.workload import Workload, planned_config, published_work
from fm.settings import Recipe

Size = Literal["full", "mini"]


def sized_workload(recipe: Recipe, size: Size, datasets: Sequence[str] | None = None) -> Workload:
    """The recipe's workload with grids and windows from the cards, or from the mini-Well's presets.

    `datasets` are some of the recipe's, which without any are the eight. UserError for an unknown one, and for one that
    has no such size.
    """
    registry = load_registry(recipe.data.registry)
    known = recipe.data.datasets or list(EIGHT)
    for name in datasets or ():
        if name not in known:
            raise UserError(f"--datasets: {name!r} is none of the recipe's datasets. {nearest(name, known)}")
    cards = [registry.card(name) for name in sorted({*(datasets or known)})]
    works = [published_work(recipe, card if size == "full" else _mini(card)) for card in cards]
    config, notes = planned_config(recipe)
    return Workload(recipe, {work.name: work for work in works}, config, tuple(notes))


def _mini(card: Card) -> Card:
    """The card as the mini-Well's simulation of the dataset would have it."""
    if card.name not in SYSTEMS:
        raise UserError(f"--grid mini: the mini-Well has no {card.name}; take --grid full, or other --datasets")
    preset = load_system(card.name).presets["mini"]
    trajectories = sum(one.num_trajectories["train"] for one in preset.parameter_sets)
    return replace(card, grid=preset.grid, train=((trajectories, preset.num_frames),))
