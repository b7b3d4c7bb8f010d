"""Sweep files: what they become, what is refused, and that every shipped one is made of valid, different recipes."""

import json
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from fm.config import load_recipe, recipe_to_dict
from fm.evaluation.published import published_document
from fm.lab.sweep_file import load_sweep, plan
from fm.model.spec import DatasetSpec
from fm.model.wavelit import WaveLiTFM

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "recipes" / "ablations").glob("*.yaml"))
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


def write(folder: Path, text: str) -> Path:
    file = folder / "sweep.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_sweep_is_made_of_recipes_that_differ(file: Path, tmp_path: Path) -> None:
    sweep = load_sweep(file.with_suffix(""))  # as on the command line
    trials = plan(sweep, tmp_path)
    trained = []
    for trial in trials:
        recipe = trial.recipe
        assert recipe.run.directory == tmp_path / trial.name
        if recipe.model is not None:
            assert WaveLiTFM(recipe.model, [_spec()]).num_parameters() > 0
        if not trial.variant.only_evaluate:
            trained.append(json.dumps({**recipe_to_dict(recipe), "run": recipe.run.seed}, sort_keys=True))
    assert len(set(trained)) == len(trained)


def test_the_papers_ablations_have_the_papers_frame_loss_and_optimizer(tmp_path: Path) -> None:
    files = [file for file in SHIPPED if file.stem.startswith("table")]
    assert len(files) == 7
    for trial in (trial for file in files for trial in plan(load_sweep(file), tmp_path)):
        recipe, changed = trial.recipe, trial.variant.overrides
        assert recipe.data.context == 1
        assert (recipe.train.optimizer, recipe.train.augment) == ("adamw", False)
        assert recipe.loss.rmse == 0
        assert (recipe.loss.mse, recipe.loss.wavelet_l1) == (1, 1) or "loss.mse" in changed
        if recipe.model is not None:
            assert (recipe.model.decoder, recipe.model.pointwise) == ("wavelet", False)
            assert recipe.model.pyramid_levels == 1 or "model.pyramid_levels" in changed


def test_the_papers_ablations_carry_the_papers_numbers() -> None:
    """Every variant has a number of the paper's table, which the tables of `fm compare --published` print, too."""
    tables = published_document(load_registry()).tables
    for name, others in {"1": (), "2": (), "3": (), "11": ("12",), "13": (), "14": ()}.items():
        sweep = load_sweep(ROOT / "recipes" / "ablations" / f"table{name}")
        titles = tuple(f"WaveLiT paper, Table {number}, " for number in (name, *others))
        printed = {cell for table in tables if table.title.startswith(titles) for row in table.rows for cell in row}
        for numbers in (sweep.published, *sweep.published_windows.values()):
            assert numbers is not None
            assert list(numbers) == list(sweep.variants)
            assert set(numbers.values()) < printed
    assert list(load_sweep(ROOT / "recipes" / "ablations" / "table11").published_windows) == ["2:8", "9:26", "27:56"]


def test_the_ablations_of_pdearena_run_on_it_as_their_comments_say(tmp_path: Path) -> None:
    """Tables 1, 2, 3 and 13: the two commands in the file make the shards that its trials read."""
    files = [file for file in SHIPPED if "PDEArena" in (load_sweep(file).paper or "")]
    assert [file.stem for file in files] == ["table1", "table13", "table2", "table3"]
    for file in files:
        commands = [line.removeprefix("#   ") for line in file.read_text().splitlines() if "#   data-pipeline" in line]
        assert [command.split()[1] for command in commands] == ["simulate", "shard"], file
        assert "--datasets pdearena_navier_stokes" in commands[0]
        made = commands[1].split("--out ")[1]
        assert {trial.recipe.data.shards for trial in plan(load_sweep(file), tmp_path)} == {made}
        assert made == load_recipe(ROOT / "recipes" / "pdearena_1m.yaml").data.shards


def test_what_is_nearer_wins(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        f"title: T\nbase: {QUICKSTART}\nseeds: [3, 5]\nwindows: 2\noverrides: {{train.steps: 7, model.depth: 2}}\n"
        "variants:\n  plain: {}\n  No CPE (x): {model.cpe: false, model.depth: 3}\n",
    )
    sweep = load_sweep(file)
    trials = plan(sweep, tmp_path / "out", ["train.clip=2.5"])
    assert [trial.name for trial in trials] == ["plain_seed3", "plain_seed5", "no_cpe_x_seed3", "no_cpe_x_seed5"]
    first, last = trials[0].recipe, trials[-1].recipe
    assert (first.model.depth, last.model.depth) == (2, 3)
    assert (first.model.cpe, last.model.cpe) == (True, False)
    assert first.train.steps == last.train.steps == 7
    assert first.train.clip == last.train.clip == 2.5
    assert (first.run.seed, last.run.seed) == (3, 5)
    assert first.model.width == load_recipe(QUICKSTART).model.width
    assert not first.tracking.progress
    assert (sweep.windows, sweep.protocol, sweep.seconds, sweep.published) == (2, "thirds", None, None)


def test_a_variant_may_have_a_recipe_of_its_own_and_one_may_not_be_trained(tmp_path: Path) -> None:
    finetune = ROOT / "recipes" / "quickstart_finetune.yaml"
    file = write(
        tmp_path,
        f"title: T\nvariants:\n  before: {{base: {finetune}, only_evaluate: true}}\n"
        f"  after: {{base: {finetune}}}\n  other: {{base: {QUICKSTART}}}\n",
    )
    trials = plan(load_sweep(file), tmp_path, [])
    assert [trial.name for trial in trials] == ["before", "after_seed0", "other_seed0"]
    assert trials[0].recipe.finetune.pretrained == "runs/quickstart"
    assert trials[2].recipe.finetune is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: T\nvariants: {a: {}}\n", "variants.a: expected a base, since the file has none"),
        ("title: T\nbase: Q\nvariants: {}\n", "variants: expected at least one variant"),
        ("title: T\nbase: Q\nvariants: {a: {}}\nseed: [1]\n", "unknown key 'seed'. Did you mean 'seeds'?"),
        ("title: T\nbase: Q\nvariants: {a: {}}\nseeds: [1, 1]\n", "seeds: expected one or more different seeds"),
        ("title: T\nbase: Q\nvariants: {a: {run.seed: 1}}\n", "expected no key of run"),
        ("title: T\nbase: Q\nvariants: {a b: {}, a_b: {}}\n", "differs from the others in letters or digits"),
        (
            "title: T\nbase: Q\nvariants: {a: {}}\npublished: {b: 1}\n",
            "published.b: expected the name of a variant, got 1",
        ),
        (
            "title: T\nbase: Q\nvariants: {a: {}}\npublished_windows: {last: {a: 1}}\n",
            "published_windows.last: expected a window of protocol thirds, first_third, middle_third, last_third",
        ),
        (
            "title: T\nbase: Q\nvariants: {a: {}}\nprotocol: third\n",
            "protocol: expected one of wavelit, appendix_g, well, thirds, or an earlier version",
        ),
        ("title: T\nbase: Q\nvariants: {a: {only_evaluate: 1}}\n", "only_evaluate: expected true, or no such key"),
        (
            "title: T\nbase: Q\nvariants: {a: {}}\nseconds: 9\noverrides: {train.steps: 3}\n",
            "seconds: expected no seconds beside train.steps",
        ),
        ("title: T\nbase: Q\nvariants: {a: {}}\nseconds: -1\n", "seconds: expected a number above 0"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_sweep(write(tmp_path, text.replace("Q", str(QUICKSTART))))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("variants", "overrides", "message"),
    [
        ("a: {model.widht: 32}", [], "variant 'a': .* unknown key model.widht .*did you mean model.width"),
        ("a: {only_evaluate: true}", [], "variant 'a': only_evaluate is for sweeps of finetuning"),
        ("a: {data.shards: here}\n  b: {}", [], "expected one folder of shards for all variants"),
        ("a: {model.cpe: false}", ["model.cpe=true"], "model.cpe is what variant 'a' of .* sets"),
        ("a: {model.cpe: false}", ["model={}"], "model.cpe is what variant 'a' of .* sets"),
        ("a: {}", ["run.seed=3"], "a sweep names, places and seeds its own runs"),
        ("a: {}", ["train.stepz=3"], "unknown key train.stepz"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(
    tmp_path: Path, variants: str, overrides: list[str], message: str
) -> None:
    sweep = load_sweep(write(tmp_path, f"title: T\nbase: {QUICKSTART}\nvariants:\n  {variants}\n"))
    with pytest.raises(UserError, match=message):
        plan(sweep, tmp_path, overrides)


def test_steps_are_not_given_beside_seconds(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path, f"title: T\nbase: {QUICKSTART}\nseconds: 5\nvariants: {{a: {{}}}}\n"))
    with pytest.raises(UserError, match=r"a probe chooses train\.steps for 5 seconds"):
        plan(sweep, tmp_path, ["train.steps=3"])


def test_a_variant_that_is_not_there(tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path, f"title: T\nbase: {QUICKSTART}\nvariants: {{no ridge: {{}}}}\n"))
    with pytest.raises(UserError, match=r"no variant 'no rigde'\. Did you mean 'no ridge'\?"):
        sweep.variant("no rigde")
    with pytest.raises(UserError, match="expected a YAML file, found none"):
        load_sweep(tmp_path / "absent")


def _spec() -> DatasetSpec:
    stats = {key: {"density": 1.0} for key in ("mean", "std", "mean_delta", "std_delta")}
    sides = (("PERIODIC", "PERIODIC"), ("WALL", "WALL"))
    return DatasetSpec("one", ("density",), (), sides, stats)


def test_runs_on_the_available_datasets_are_all_told_the_same_names(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for name in ("helmholtz_staircase", "shear_flow"):
        (tmp_path / "shards" / name).symlink_to(tiny_shards / name)
    paper = ROOT / "recipes" / "fm_pretrain.yaml"
    text = f"title: two\nbase: {paper}\nvariants: {{one: {{}}, no ridge: {{model.ridge: none}}}}\n"
    sweep = load_sweep(write(tmp_path, text))
    for trial in plan(sweep, tmp_path / "out", [f"data.shards={tmp_path / 'shards'}", "data.datasets=available"]):
        assert trial.recipe.data.datasets == ["helmholtz_staircase", "shear_flow"]
        assert load_recipe(paper, trial.overrides) == trial.recipe
