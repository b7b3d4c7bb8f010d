"""Recipes: the YAML-and-Python form, strictness, overrides, and that every shipped recipe builds its model."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from paper_constants import PAPER, constants

from data_pipeline.files import UserError
from data_pipeline.registry import load_registry
from fm.config import changed_settings, dump_recipe, load_recipe
from fm.model.spec import DatasetSpec, ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.training.objective import forcing_prob

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(
        'launch: 0; from fm.recipe import run; run(__file__); r"""\n'
        "run: {name: small}\ndata: {shards: nowhere}\ntrain: {steps: 10, learning_rate: 1e-3}\n"
        '# """\n'
    )
    return file


def test_overrides_win_over_the_file_and_the_file_over_defaults(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file, ["train.steps=20", "data.datasets=[shear_flow]", "model.width=32", "model.heads=2"]
    )
    assert recipe.train.steps == 20
    assert recipe.train.learning_rate == pytest.approx(1e-3)
    assert recipe.train.weight_decay == 1e-5
    assert recipe.data.datasets == ["shear_flow"]
    assert recipe.model == ModelConfig(width=32, heads=2)
    assert recipe.run.directory == Path("runs/small")


def test_the_resolved_recipe_is_again_a_recipe(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["model.width=32", "model.heads=2", "run.dir=there"])
    written = tmp_path / "again.yaml"
    written.write_text(dump_recipe(recipe))
    assert load_recipe(written) == recipe
    compile(written.read_text(), str(written), "exec")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown key train.stepz (value 3); did you mean train.steps?"),
        ("trian.steps=3", "unknown key trian (value {'steps': 3}); did you mean train?"),
        ("train.steps=many", "train.steps: Input should be a valid integer"),
        ("train.steps=0", "train.steps: Input should be greater than 0 (got 0)"),
        ("train.steps=2.5", "train.steps"),
        ("sampling.scheme=sqr", "did you mean sqrt?"),
        ("sampling.weights={shear_flow: 1}", "weights: give dataset weights with scheme: weights"),
        ("train.decay=1.5", "train.decay: Input should be less than or equal to 1 (got 1.5)"),
        ("train.ema=1.0", "train.ema: Input should be less than 1 (got 1.0)"),
        ("train.clip=0", "train.clip: Input should be greater than 0 (got 0)"),
        ("loss.mse=-1", "loss.mse: Input should be greater than or equal to 0 (got -1)"),
        ("loss={mse: 0, wavelet_l1: 0}", "loss: mse, wavelet_l1 and rmse: expected weights that are not all 0"),
        ("train.jitter=.nan", "train.jitter: Input should be a finite number (got nan)"),
        ("model.wavelet=db4", "wavelet"),
        ("model.width=30", "width"),
        ("finetune.unroll_steps=2", "finetune.pretrained is missing"),
        ("train", "expected section.key=value"),
        ("--steps=3", "expected section.key=value"),
        ("train.steps.x=3", "steps is not a section"),
        ("train=3", "train"),
        ("run.name=[", "not valid YAML"),
    ],
)
def test_a_wrong_override_says_where_what_and_what_instead(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a list", "expected a mapping"), ("a: [", "not valid YAML"), ("run: {name: x}", "train is missing")],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(file)
    with pytest.raises(UserError, match="cannot read the recipe"):
        load_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_shipped_recipe_loads_builds_its_model_and_is_a_program(file: Path) -> None:
    recipe = load_recipe(file)
    compile(file.read_text(), str(file), "exec")
    assert yaml.safe_load(file.read_text())["launch"].startswith("0; from fm.recipe import run; run(__file__)")
    assert recipe.run.name == file.stem
    model = WaveLiTFM(recipe.model or ModelConfig(), _specs(recipe.data.datasets), context=recipe.data.context)
    assert model.num_parameters() > 0
    sizes = {"fm_pretrain": 9.4e6, "fm_best": 9.8e6, "bespoke_1m": 1.2e6, "bespoke_9m": 9.5e6}
    if file.stem in sizes:
        assert model.num_parameters() == pytest.approx(sizes[file.stem], rel=0.03)


def test_the_papers_recipes_say_what_the_paper_says() -> None:
    """Paper Appendix E, Tables 4, 5 and 8: the numbers that define the runs."""
    folder = RECIPES[0].parent
    for name, steps in (("fm_pretrain", 1_000_000), ("bespoke_1m", 500_000), ("bespoke_9m", 500_000)):
        train = load_recipe(folder / f"{name}.yaml").train
        assert (train.steps, train.global_batch, train.clip) == (steps, 4, 1.0)
        assert (train.learning_rate, train.warmup_steps, train.decay, train.decay_every) == (1e-3, 5000, 0.99, 2000)
    for name in ("fm_finetune", "bespoke_1m_finetune", "bespoke_9m_finetune"):
        recipe = load_recipe(folder / f"{name}.yaml")
        assert recipe.finetune is not None
        assert recipe.finetune.pretrained == f"runs/{'fm_pretrain' if name[0] == 'f' else name[:10]}"
        assert (recipe.train.steps, recipe.finetune.unroll_steps) == (50_000, 8)
        assert [forcing_prob(step, 50_000, recipe.finetune) for step in (0, 49_999)] == [1, 0]
    joint = load_recipe(folder / "fm_pretrain.yaml")
    assert joint.sampling.scheme == "sqrt"
    assert joint.data.datasets == sorted(load_registry().cards)
    assert joint.model == load_recipe(folder / "bespoke_9m.yaml").model  # paper, section 4.2: one architecture


@pytest.mark.parametrize("name", PAPER)
def test_every_constant_of_the_papers_recipes_names_its_source(name: str) -> None:
    """Settings of where and how a run is made (files, checkpoints, validations) are no constants of the paper."""
    file = RECIPES[0].parent / f"{name}.yaml"
    document = yaml.safe_load(file.read_text())
    sections = {key: document[key] for key in ("sampling", "model", "loss", "finetune", "train") if key in document}
    expected = {f"{section}.{key}" for section, keys in sections.items() for key in keys} - {"finetune.pretrained"}
    found = constants(file)
    assert expected | {"data.datasets", "data.context"} <= set(found)
    assert {origin for _, origin, _ in found.values()} == {"paper", "inferred"}
    if name == "fm_pretrain":  # and those that are no settings
        others = set(found) - expected
        assert {"model.lambda", "model.kernel gate", "model.rotary positions", "model.upsampling"} < others
        assert found["train.ema"][:2] == ("0.999", "inferred")


def test_missing_shards_end_in_one_message_and_exit_code_2(tmp_path: Path) -> None:
    recipe = RECIPES[0].parent / "fm_pretrain.yaml"
    done = subprocess.run([sys.executable, recipe], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "data/well/shards" in done.stderr
    assert "data-pipeline shard" in done.stderr
    assert "data-pipeline simulate" in done.stderr


def _specs(names: list[str] | None) -> list[DatasetSpec]:
    """Specifications with unit statistics, from the registry's cards."""
    specs = []
    for card in load_registry().select(names):
        channels = [*card.state_channels, *card.constant_channels]
        stats = {key: dict.fromkeys(channels, 1.0) for key in ("mean", "std", "mean_delta", "std_delta")}
        specs.append(DatasetSpec(card.name, card.state_channels, card.constant_channels, card.boundary, stats))
    assert all(dataclasses.is_dataclass(spec) for spec in specs)
    return specs


def test_changed_settings_name_what_was_added_and_taken_away() -> None:
    before = {"train": {"steps": 5}, "finetune": {"unroll_override": {"maze": 3}}}
    after = {"train": {"steps": 6}, "finetune": {"unroll_override": {"layer": 2}}}
    assert changed_settings(before, before) == []
    assert changed_settings(before, after) == [
        "train.steps: 5 -> 6",
        "finetune.unroll_override.maze: 3 -> None",
        "finetune.unroll_override.layer: None -> 2",
    ]
