"""Recipes: the YAML-and-Python form, strictness, overrides, and that every shipped recipe builds its model."""

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fuzzing import CHANGES, EDITS, Guard, cases, edited, mutated, same
from hypothesis import given
from hypothesis import strategies as st
from paper_constants import PAPER, constants

from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from fm.cli import main
from fm.config import changed_settings, dump_recipe, load_recipe, recipe_to_dict
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
        ("data.shards=3", "data.shards: Input should be a valid string (got 3)"),
        ("data.shards=[]", "data.shards: List should have at least 1 item after validation, not 0 (got [])"),
        ("data.shards=[a, 3]", "data.shards.1: Input should be a valid string (got 3)"),
        ("run.name=[", "override 'run.name=[': expected plain YAML in UTF-8, got something else"),
        ("run.name=../outside", "run.name: expected a name that a folder can have, got '../outside'"),
        ("run.name=\x1b[31m", "expected plain YAML in UTF-8"),
        ("train.steps=true", "train.steps: Input should be a valid integer (got True)"),
        ("train.steps='10'", "train.steps: Input should be a valid integer (got '10')"),
        ("train.steps=010", "train.steps: Input should be a valid integer (got '010')"),
        ("train.steps=1:30", "train.steps: Input should be a valid integer (got '1:30')"),
        (f"train.steps={'9' * 1000}", "a number of more than 40 digits"),
        ("train.steps=&a [*a]", "anchors and aliases are not used"),
        ("model.lepe=1", "model.lepe: Input should be a valid boolean (got 1)"),
        ("train={steps: 3, steps: 4}", "key 'steps' twice"),
    ],
)
def test_a_wrong_override_says_where_what_and_what_instead(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, [override])
    assert message in str(caught.value)


FIRST, LAST = 'launch: 0; from fm.recipe import run; run(__file__); r"""', '# """'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "expected plain YAML"),
        ("a: [", "expected plain YAML"),
        ("run: {name: x}", "train is missing"),
        (f"run: {{name: {'x' * 2001}}}", "a value of more than 2000 characters"),
        ("# " + "x" * 70_000, "expected at most 65536 bytes"),
        (f"run: {'[' * 40}{']' * 40}", "nested more than 32 deep"),
        ("run: {name: a}\nrun: {name: b}", "key 'run' twice"),
        ("a: &a [0, 0]\nb: [*a, *a]", "anchors and aliases are not used"),
        ("run: !!python/object/apply:os.getcwd []", "tags are not used"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(f"{FIRST}\n{text}\n{LAST}\n")
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(file)
    assert len(str(caught.value)) < 2000
    with pytest.raises(UserError, match="expected a YAML file, found none"):
        load_recipe(tmp_path / "absent.yaml")


CODE = "import pathlib; pathlib.Path('ran').touch()"


@pytest.mark.parametrize(
    ("first", "body", "last", "message"),
    [
        (f'launch: 0; {CODE}; r"""', "", LAST, "expected as its first line launch: 0; from fm.recipe"),
        (FIRST.replace("run(__file__)", f"{CODE}; run(__file__)"), "", LAST, "expected as its first line"),
        (f"# coding: utf-7\n{FIRST}", "", LAST, "expected as its first line"),
        (f"\ufeff{FIRST}", "", LAST, "expected as its first line"),
        (f"{FIRST}\r{CODE}", "", LAST, "expected as its first line"),
        (FIRST, "", f'# """; {CODE}', 'expected as its last line # """, got'),
        (FIRST, f'\n# """; {CODE}; r"""', LAST, 'expected """ in the first and the last line only'),
        (FIRST, f'\n# """\n{CODE}\nr"""', LAST, 'expected """ in the first and the last line only'),
        (FIRST, "", f"{LAST}\n{CODE}", 'expected as its last line # """, got'),
        ("run: {name: x}", "", "train: {steps: 1}", "expected as its first line"),
        ("", "", "", "expected as its first line"),
    ],
)
def test_a_recipe_that_would_run_other_code_is_refused(
    recipe_file: Path, first: str, body: str, last: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    middle = recipe_file.read_text().split("\n", 1)[1].rpartition("\n# ")[0]
    recipe_file.write_text(f"{first}\n{middle}{body}\n{last}\n", newline="")
    for command in (["plan"], ["train"], ["benchmark", "--recipe"]):
        assert main([*command, str(recipe_file)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "copy both from recipes/quickstart.yaml; launch no stranger's file" in error
    recipe_file.write_bytes(f"{FIRST}\r\n{middle}\r\n{LAST}\r\n".encode())  # of an editor on Windows
    assert load_recipe(recipe_file).run.name == "small"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_shipped_recipe_loads_builds_its_model_and_is_a_program(file: Path) -> None:
    recipe = load_recipe(file)
    compile(file.read_text(), str(file), "exec")
    assert yaml.safe_load(file.read_text())["launch"].startswith("0; from fm.recipe import run; run(__file__)")
    assert recipe.run.name == file.stem
    model = WaveLiTFM(recipe.model or ModelConfig(), _specs(recipe.data.datasets), context=recipe.data.context)
    assert model.num_parameters() > 0
    sizes = {"fm_pretrain": 9.4e6, "fm_best": 9.8e6, "bespoke_1m": 1.2e6, "bespoke_9m": 9.5e6, "pdearena_1m": 1.2e6}
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
    smoke, bespoke = (load_recipe(folder / f"{name}_1m.yaml") for name in ("pdearena", "bespoke"))
    assert (smoke.data.datasets, smoke.train.steps) == (["pdearena_navier_stokes"], 200_000)  # Table 13
    assert (smoke.model, smoke.loss) == (bespoke.model, bespoke.loss)
    joint = load_recipe(folder / "fm_pretrain.yaml")
    assert joint.sampling.scheme == "sqrt"
    assert joint.data.datasets == [card.name for card in load_registry().select(None)]
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


def test_the_last_words_before_accelerates_traceback_say_whose_it_is(tmp_path: Path) -> None:
    """accelerate ends so for every exit code but 0; what it starts cannot keep it from that."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1", "--cpu"]
    command = [*launcher, RECIPES[0].parent / "fm_pretrain.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    ours, _, theirs = done.stderr.partition("Traceback (most recent call last)")
    assert "CalledProcessError" in theirs
    last = ours.splitlines()[-1]
    assert last.startswith("A traceback above or below this line is accelerate's")
    assert "`fm train RECIPE`" in last


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


PLAIN = recipe_to_dict(load_recipe(RECIPES[0].parent / "quickstart.yaml"))


@cases(60)
@given(changes=CHANGES, edits=st.none() | EDITS)
def test_a_spoilt_recipe_is_refused_or_is_what_it_says(
    tmp_path_factory: pytest.TempPathFactory, changes: list, edits: list | None
) -> None:
    """Launched, an accepted file runs nothing but the training; its settings are the file's, of the same types."""
    root = tmp_path_factory.getbasetemp() / "recipes"
    root.mkdir(exist_ok=True)
    tree, loaded, file = mutated(PLAIN, changes), [], root / "recipe.yaml"
    raw = "\n".join(
        [FIRST, *(f"{json.dumps(key)}: {json.dumps(part)}" for key, part in tree.items()), LAST, ""]
    ).encode()
    file.write_bytes(raw if edits is None else (raw := edited(raw, edits)))
    if not Guard(root).check(lambda: loaded.append(load_recipe(file))):
        return
    assert [type(line) for line in ast.parse(raw).body] == [ast.AnnAssign, ast.ImportFrom, ast.Expr, ast.Expr]
    if edits is None:
        made = recipe_to_dict(loaded[0])
        assert all(same(made[section][key], value) for section in tree for key, value in (tree[section] or {}).items())
