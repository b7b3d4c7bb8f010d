"""What is checked before the first step: dataset names, channels, grids."""

import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
import torch

from data_pipeline.errors import UserError
from data_pipeline.registry import VARIABLE, Field, load_registry
from data_pipeline.shards.build import build_shards
from data_pipeline.well.register import register
from data_pipeline.windows.loader import open_readers
from fm.datasets import check_direction, dataset_specs, new_model
from fm.evaluation.evaluate import evaluate_model
from fm.evaluation.protocol import load_protocol
from fm.model.spec import ModelConfig

NAME = "gray_scott_reaction_diffusion"


def crop_last_row(file: Path) -> None:
    """Drop the last y of every array of a Well file that has a y axis."""
    with h5py.File(file, "r+") as well:
        size = well["dimensions/y"].shape[0]
        arrays: list[str] = []
        well.visititems(lambda name, item: arrays.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in arrays:
            values, attributes = well[name][()], dict(well[name].attrs)
            along_y = name == "dimensions/y" or name.startswith(("t0_fields", "boundary_conditions/y"))
            if along_y and values.shape[-1] == size:
                del well[name]
                well[name] = values[..., :-1]
                well[name].attrs.update(attributes)


def test_specs_take_names_boundaries_and_statistics_from_the_manifest(tiny_shards: Path) -> None:
    readers = open_readers(tiny_shards, None, "train")
    specs = dataset_specs(readers, load_registry())
    assert [spec.name for spec in specs] == [card.name for card in load_registry().select(None)]
    by_name = {spec.name: spec for spec in specs}
    assert by_name["rayleigh_benard"].boundary == (("PERIODIC", "PERIODIC"), ("WALL", "WALL"))
    assert by_name["acoustic_scattering_maze"].constant_channels == ("density", "speed_of_sound")
    assert by_name[NAME].stats["mean"] == readers[NAME].manifest.stats["mean"]


def test_a_model_knows_which_way_the_axes_of_its_data_run(tiny_well: Path, tiny_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_well / NAME, tmp_path / "well" / NAME)
    for path in (tmp_path / "well").glob("*/data/*/*.hdf5"):
        with h5py.File(path, "r+") as file:
            file["dimensions/y"][:] = file["dimensions/y"][:][::-1]
            file["dimensions/time"][2:] += 1
    build_shards(tmp_path / "well", tmp_path / "shards", jobs=1)
    there, turned = (open_readers(shards, [NAME], "train") for shards in (tiny_shards, tmp_path / "shards"))
    (known,), (other,) = (dataset_specs(readers, load_registry()) for readers in (there, turned))
    assert other.spacing == (known.spacing[0], -known.spacing[1])
    assert known.dt is not None
    assert other.dt is None
    check_direction(there[NAME], known)
    with pytest.raises(UserError, match="y runs backward in these shards, and forward in the data"):
        check_direction(turned[NAME], known)
    model = new_model(ModelConfig(16, 1, 2), [known])
    with pytest.raises(UserError, match="y runs backward in these shards"):
        evaluate_model(model, turned, tmp_path / "report", load_protocol("thirds"), torch.device("cpu"), progress=False)


def test_an_odd_grid_is_refused_by_name(tiny_well: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_well / NAME, tmp_path / "well" / NAME)
    for file in (tmp_path / "well").glob("*/data/*/*.hdf5"):
        crop_last_row(file)
    build_shards(tmp_path / "well", tmp_path / "shards", jobs=1)
    readers = open_readers(tmp_path / "shards", None, "train")
    with pytest.raises(UserError, match=rf"{NAME}: the shards have a grid of 32 x 31"):
        dataset_specs(readers, load_registry())


def test_shards_of_another_card_are_refused_with_both_lists(tiny_shards: Path) -> None:
    readers = open_readers(tiny_shards, [NAME], "train")
    packaged = load_registry()
    fields = (Field("B", 0, "state", ("B",)), Field("A", 0, "state", ("A",)))
    swapped = replace(packaged, cards={NAME: replace(packaged.card(NAME), state=fields)})
    with pytest.raises(
        UserError, match=rf"{NAME}/train: the shards hold the state channels A, B, but .* channels B, A"
    ):
        dataset_specs(readers, swapped)


@pytest.mark.parametrize("name", ["half", "values", "training"])
def test_a_channel_named_as_a_method_of_torch_is_refused(tiny_well: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_well / NAME, tmp_path / "well" / "mine")
    cards = tmp_path / "cards"
    register(tmp_path / "well" / "mine", None, cards)
    card = cards / "datasets" / "mine.yaml"
    card.write_text(card.read_text().replace("A: [A]", f"A: [{name}]"))
    (cards / "channels.yaml").write_text(f"{name}: {{description: a species, unit: none}}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(cards))
        build_shards(tmp_path / "well", tmp_path / "shards", jobs=1)
    with pytest.raises(UserError, match=f"mine: the channel '{name}' has the name of a method of torch"):
        dataset_specs(open_readers(tmp_path / "shards", None, "train"), load_registry(cards))
