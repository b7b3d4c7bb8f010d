"""The baselines' recipes: the quickstart with another network, of as many parameters."""

from pathlib import Path

import pytest
from handmade import STATE_CHANNELS, make_spec

from fm.config import Recipe, load_recipe
from fm.datasets import new_model
from fm.model.baselines import SIZES

RECIPES = Path(__file__).parents[3] / "recipes"


def load(name: str) -> Recipe:
    return load_recipe(RECIPES / "baselines" / f"{name}.yaml")


def test_there_is_a_recipe_for_each_and_one_for_reference() -> None:
    assert {file.stem for file in (RECIPES / "baselines").glob("*.yaml")} == {*SIZES, "wavelit"}


@pytest.mark.parametrize("name", [*SIZES, "wavelit"])
def test_a_recipe_is_the_quickstart_but_for_its_network(name: str) -> None:
    quickstart, recipe = load_recipe(RECIPES / "quickstart.yaml"), load(name)
    compile((RECIPES / "baselines" / f"{name}.yaml").read_text(), name, "exec")
    assert recipe.run.name == f"baseline_{name}"
    for section in ("data", "sampling", "train", "loss", "checkpoint", "validation"):
        assert getattr(recipe, section) == getattr(quickstart, section)
    network = recipe.baseline or recipe.model
    assert network is not None
    assert quickstart.model is not None
    assert (network.wavelet, network.predict) == (quickstart.model.wavelet, quickstart.model.predict)


@pytest.mark.parametrize("name", [*SIZES, "wavelit"])
def test_a_recipe_has_the_quickstarts_number_of_parameters(name: str) -> None:
    pytest.importorskip("tltorch" if name in ("fno", "tfno") else "huggingface_hub", reason="needs the extra baselines")
    specs = [make_spec(dataset) for dataset in STATE_CHANNELS]
    recipe = load(name)
    model = new_model(recipe.baseline or recipe.model, specs)
    expected = new_model(load_recipe(RECIPES / "quickstart.yaml").model, specs).num_parameters()
    assert model.num_parameters() == pytest.approx(expected, rel=0.1)
