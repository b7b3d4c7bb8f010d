"""A run that is evaluated and exported, a model that moves, and files to predict from. All are read only."""

import json
import shutil
from pathlib import Path

import pytest
from extensions import CARD, CHANNELS, saved
from handmade import stir
from handmade_export import exported
from whole_runs import rewrite_state, small

from data_pipeline.miniwell.generate import simulate
from data_pipeline.registry import load_registry
from data_pipeline.shards.build import build_shards
from data_pipeline.well.hdf5 import split_files
from data_pipeline.windows.loader import open_readers
from fm.datasets import dataset_specs
from fm.evaluation.evaluate import evaluate_run
from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.share.export import export_run
from fm.training.trainer import train

PREDICTED = ["acoustic_scattering_maze", "helmholtz_staircase", "viscoelastic_instability"]


@pytest.fixture(scope="session")
def run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two datasets with its report. Read only."""
    directory = tmp_path_factory.mktemp("exported") / "run"
    assert train(small(tiny_shards, directory)) == 0
    evaluate_run(directory)
    return directory


@pytest.fixture(scope="session")
def exported_model(run: Path) -> Path:
    """Its export. Read only."""
    return export_run(run, run.parent / "model")


@pytest.fixture
def of_other_cards(run: Path, tmp_path: Path) -> Path:
    """The run as if it had been trained with another card of helmholtz_staircase than there is."""
    other = tmp_path / "run"
    shutil.copytree(run, other)
    for checkpoint in (other / "checkpoints").iterdir():
        registry = json.loads((checkpoint / "state.json").read_text())["registry"]
        registry["cards"]["helmholtz_staircase"]["boundary"][0] = ["WALL", "WALL"]
        rewrite_state(checkpoint / "state.json", registry=registry)
    return other


@pytest.fixture(scope="session")
def predicting_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, evaluated under the protocol thirds. Read only."""
    directory = tmp_path_factory.mktemp("runs") / "predicting"
    recipe = small(tiny_shards, directory, data={"datasets": PREDICTED}, train={"steps": 2, "warmup_steps": 0})
    assert train(recipe) == 0
    evaluate_run(directory)
    return directory


@pytest.fixture(scope="session")
def model(tiny_shards: Path) -> WaveLiTFM:
    """A model that moves: the start of a training predicts next to nothing. Read only."""
    readers = open_readers(tiny_shards, PREDICTED, "train")
    return stir(WaveLiTFM(ModelConfig(16, 1, 2), dataset_specs(readers, load_registry()))).eval()


@pytest.fixture(scope="session")
def folder(model: WaveLiTFM, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """That model, exported. Read only."""
    return str(exported(model, tmp_path_factory.mktemp("models") / "stirred", tiny_shards))


@pytest.fixture(scope="session")
def maze(tiny_well: Path) -> Path:
    """The train file of acoustic_scattering_maze: two trajectories of 9 frames. Read only."""
    return split_files(tiny_well / PREDICTED[0], "train")[0]


@pytest.fixture(scope="session")
def trained(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model of three datasets. Read only."""
    return saved(tiny_shards, tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture(scope="session")
def burgers(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cards` of burgers, in channels of its own, and `shards`: burgers', beside the eight's. Read only."""
    root = tmp_path_factory.mktemp("burgers")
    (root / "cards" / "datasets").mkdir(parents=True)
    (root / "cards" / "channels.yaml").write_text(CHANNELS)
    (root / "cards" / "datasets" / "burgers.yaml").write_text(CARD)
    simulate(root / "well", preset="tiny", datasets=["burgers"], jobs=1)
    build_shards(root / "well", root / "shards", jobs=1, registry=load_registry(root / "cards"))
    for folder in tiny_shards.iterdir():
        (root / "shards" / folder.name).symlink_to(folder)
    return root
