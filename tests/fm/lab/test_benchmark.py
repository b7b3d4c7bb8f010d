"""`fm benchmark`: real steps of seconds, their tables and JSON, profiles, and training that waits for shards or not."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from whole_runs import DATASETS, small

from data_pipeline.errors import UserError
from data_pipeline.miniwell.generate import EIGHT, load_system
from data_pipeline.registry import load_registry, packaged_folder
from fm.cli import main
from fm.config import Recipe, dump_recipe, load_recipe, recipe_to_dict
from fm.lab.benchmark import (
    MIXTURE,
    VARIANTS,
    BenchmarkOptions,
    benchmark,
    chosen_variants,
    floors,
    medians,
    spread,
)
from fm.lab.benchmark_tables import benchmark_text
from fm.lab.workload import PAPER_HOURS, sized_workload
from fm.training.dry_run import StepSeconds

ROW_KEYS = {
    *("dataset", "variant", "dtype", "grid", "windows", "tokens", "flops", "moved_bytes", "steps", "reason"),
    *("data_ms", "forward_ms", "backward_ms", "optimizer_ms", "step_ms", "noise_percent", "peak_memory_gb"),
    *("tokens_per_s", "tflops_per_s", "share_of_flops_ceiling", "gb_per_s", "share_of_bandwidth_ceiling"),
    *("floor_ms", "floor_parts_ms", "hours_per_million_steps"),
}
REPORT_KEYS = {
    *("recipe", "size", "machine", "ceilings", "parameters", "shares", "rows", "feeding", "pace", "profiles"),
    "warnings",
}


def options(folder: Path, **choices: object) -> BenchmarkOptions:
    """Return the options to measure a tiny model on the mini grids of two datasets."""
    file = folder / "small.yaml"
    file.write_text(dump_recipe(small(folder / "none", folder / "run")))
    return BenchmarkOptions(**{"recipe": file, "device": "cpu", "seconds": 0.5, **choices})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, Path]:
    """All of the command, once: its JSON, its Markdown, and the folder of its profiles."""
    folder = tmp_path_factory.mktemp("benchmark")
    recipe = options(folder).recipe
    files = ["--json", str(folder / "out.json"), "--markdown", str(folder / "out.md")]
    choices = ["--device", "cpu", "--seconds", "8", "--variants", "float32", "batch8", "--profile", str(folder / "p")]
    assert main(["benchmark", "--recipe", str(recipe), "train.clip=0.5", *choices, *files]) == 0
    return json.loads((folder / "out.json").read_text()), (folder / "out.md").read_text(), folder / "p"


def test_a_row_for_each_dataset_and_variant(whole: tuple[dict, str, Path]) -> None:
    found, _, _ = whole
    assert set(found) == REPORT_KEYS
    rows = {(row["variant"], row["dataset"]): row for row in found["rows"]}
    assert list(rows) == [(variant, name) for variant in ("float32", "batch8") for name in [*DATASETS, MIXTURE]]
    for row in rows.values():
        assert set(row) == ROW_KEYS
        phases = sum(row[f"{phase}_ms"] for phase in ("data", "forward", "backward", "optimizer"))
        assert 0 < phases < 3 * row["step_ms"]
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["tokens"] / row["step_ms"])
        assert row["tflops_per_s"] == pytest.approx(row["flops"] / row["step_ms"] / 1e9)
        assert row["share_of_flops_ceiling"] == pytest.approx(
            1e12 * row["tflops_per_s"] / found["ceilings"]["flops"][row["dtype"]]
        )
        assert row["gb_per_s"] == pytest.approx(row["moved_bytes"] / row["step_ms"] / 1e6)
        assert row["hours_per_million_steps"] == pytest.approx(row["step_ms"] / 3.6)
        parts = row["floor_parts_ms"]
        assert row["floor_ms"] == pytest.approx(sum(parts.values()) - parts["traffic"])
        assert 0 < parts["traffic"] <= row["floor_ms"]
        assert row["steps"] >= 1
        assert row["reason"] is None


def test_a_batch_of_8_is_twice_the_work(whole: tuple[dict, str, Path]) -> None:
    rows = {(row["variant"], row["dataset"]): row for row in whole[0]["rows"]}
    for name in (*DATASETS, MIXTURE):
        four, eight = rows["float32", name], rows["batch8", name]
        assert (four["windows"], eight["windows"]) == (4, 8)
        for key in ("tokens", "flops", "moved_bytes"):
            assert eight[key] == pytest.approx(2 * four[key])


def test_the_mixture_is_what_the_shares_expect(whole: tuple[dict, str, Path]) -> None:
    found, _, _ = whole
    assert sum(found["shares"].values()) == pytest.approx(1)
    rows = {row["dataset"]: row for row in found["rows"] if row["variant"] == "float32"}
    for key in ("step_ms", "forward_ms", "flops", "tokens", "moved_bytes", "floor_ms"):
        expected = sum(share * rows[name][key] for name, share in found["shares"].items())
        assert rows[MIXTURE][key] == pytest.approx(expected)


def test_tables_fit_and_compare_with_the_paper(whole: tuple[dict, str, Path]) -> None:
    text = whole[1]
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= 120
    assert f" {PAPER_HOURS} |" in text
    for word in (*DATASETS, MIXTURE, "ceilings, measured in this run", "h for 1M steps", "The floor of float32"):
        assert word in text


def test_profiles_are_traces_and_tables(whole: tuple[dict, str, Path]) -> None:
    found, text, folder = whole
    assert len(found["profiles"]) == 2
    for file in map(Path, found["profiles"]):
        assert file.parent == folder
        assert str(file) in text
        events = json.loads(file.with_suffix(".json").read_text())["traceEvents"]
        assert any(event.get("name") == "aten::bmm" for event in events)
        head, _, *body = file.read_text().splitlines()[2:]
        assert [cell.strip() for cell in head.split("|")[1:-1]] == ["operator", "calls", "ms a step", "share %"]
        shares = [float(line.split("|")[4]) for line in body]
        assert shares == sorted(shares, reverse=True)
        assert 50 < sum(shares) <= 100.5


def test_what_has_no_time_says_so(tmp_path: Path) -> None:
    """The first variant is measured all the same, and so are those that are asked for by name."""
    found = benchmark(options(tmp_path, seconds=1e-3))
    for row in found.rows:
        assert (row.step_ms is not None) == (row.variant == "float32")
        assert row.reason == (None if row.variant == "float32" else "no time for it within the seconds given")
    named = benchmark(options(tmp_path, seconds=1e-3, variants=("bf16", "batch16")))
    assert all(row.step_ms is not None for row in named.rows)
    assert "no time for it" in benchmark_text(found)
    unmeasured = found.to_json()["rows"][-1]
    assert unmeasured["step_ms"] is None
    assert unmeasured["hours_per_million_steps"] is None


def test_a_mixture_lacks_what_a_dataset_lacks(tmp_path: Path) -> None:
    found = floors("h200", options(tmp_path, datasets=tuple(DATASETS[:1])))
    assert [row.dataset for row in found.rows] == [DATASETS[0], MIXTURE]
    assert found.rows[-1] == replace(found.rows[0], dataset=MIXTURE, grid=None)
    assert found.rows[-1].reason == "counted, not measured"


def test_floors_run_nothing_and_grow_with_the_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = options(tmp_path)
    full, mini = floors("h200", wanted), floors("H200", BenchmarkOptions(recipe=wanted.recipe, size="mini"))
    for large, little in zip(full.rows, mini.rows, strict=True):
        assert large.floor_ms > 2 * little.floor_ms
        assert large.dtype == "bfloat16"
    float32 = floors("h200", BenchmarkOptions(recipe=wanted.recipe, overrides=("train.precision=float32",)))
    assert float32.rows[0].floor_parts_ms["linear"] > full.rows[0].floor_parts_ms["linear"]
    assert float32.rows[0].floor_parts_ms["attention"] == full.rows[0].floor_parts_ms["attention"]
    assert main(["benchmark", "--recipe", str(wanted.recipe), "--gpu", "b200"]) == 0
    assert "ceilings, b200, data sheet: 75.0 TFLOP/s float32, 2,250 TFLOP/s bfloat16" in capsys.readouterr().out


def test_real_shards_feed_a_consumer(tiny_shards: Path, tmp_path: Path) -> None:
    wanted = options(tmp_path, variants=("none",), shards=str(tiny_shards), step_seconds=0.002, feed_seconds=0.1)
    found = benchmark(wanted)
    assert found.rows == ()
    assert [fed.workers for fed in found.feeding] == [0, 1, 2, 4]
    for fed in found.feeding:
        assert fed.steps == 50
        assert 0 <= fed.waited < 1
        assert 0 < fed.median_wait < 10
        assert 0 < fed.windows_per_s < 4 / 0.002
        assert fed.bytes_per_s > 0
        assert 0 < fed.cores < 8
    assert found.pace == "with a consumer that takes 2 ms a step"
    text = benchmark_text(found)
    assert "Data wait, with a consumer that takes 2 ms a step; the aim is below 2%" in text
    assert found.to_json()["feeding"][3]["workers"] == 4


def test_mini_grids_are_the_mini_wells_and_full_ones_the_cards(recipe: Recipe) -> None:
    cards = load_registry().cards
    for size in ("mini", "full"):
        works = sized_workload(recipe, size).datasets  # type: ignore[arg-type]
        assert sorted(works) == sorted(EIGHT)
        for name, work in works.items():
            assert work.grid == (load_system(name).presets["mini"].grid if size == "mini" else cards[name].grid)
            assert work.source.tokens == math.prod(work.grid) // 4
    assert works["shear_flow"].source.windows == cards["shear_flow"].windows


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(options(tmp_path).recipe or Path(), ["data.datasets=null"])


def test_mini_windows_are_those_of_its_shards(recipe: Recipe) -> None:
    """shear_flow: 5 trajectories of 28 frames."""
    assert sized_workload(recipe, "mini", ["shear_flow"]).datasets["shear_flow"].source.windows == 9 * 27


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_variants_are_overrides_that_recipes_know(overrides: tuple[str, ...], tmp_path: Path) -> None:
    file = options(tmp_path).recipe
    assert file is not None
    found = recipe_to_dict(load_recipe(file, overrides))["train"]
    assert {f"train.{key}={value}" for key, value in found.items()} >= set(overrides)


def test_defaults_depend_on_the_device() -> None:
    on_cpu, on_gpu = (chosen_variants(None, device) for device in ("cpu", "cuda"))
    assert on_cpu[0] == on_gpu[0] == "float32"
    assert set(on_cpu) < set(on_gpu) < set(VARIANTS)
    assert chosen_variants(["bf16"], "cpu") == ["bf16"]


def test_medians_and_spread() -> None:
    times = [StepSeconds(0, one, 2 * one, 1, 3 * one + 1) for one in (1.0, 5.0, 2.0)]
    assert medians(times) == StepSeconds(0, 2.0, 4.0, 1, 7.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1 / 3)
    assert spread([3.0]) == 0


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["--variants", "float23"], r"--variants: no variant 'float23'. Did you mean 'float32'\?"),
        (["--datasets", "helmholz_staircase"], r"none of the recipe's datasets. Did you mean 'helmholtz_staircase'\?"),
        (["--gpu", "h20"], r"--gpu: no GPU 'h20' in the table"),
        (["--seconds", "0"], "--seconds: expected a number above 0, got 0.0"),
        (["--step-ms", "nan"], "--step-ms: expected a number above 0, got nan"),
        (["--json", "nowhere/out.json"], "--json: no folder nowhere; make it first"),
        (["--markdown", "nowhere/out.md"], "--markdown: no folder nowhere; make it first"),
        (["--profile", "/proc/nowhere"], "--profile: cannot make the folder /proc/nowhere"),
        (["--data", "nowhere"], "no train shards under nowhere"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml: expected a YAML file, found none"),
        (["train.clips=1"], "train.clips"),
    ],
)
def test_mistakes(choices: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = options(tmp_path).recipe
    assert main(["benchmark", "--recipe", str(file), "--device", "cpu", "--seconds", "0.1", *choices]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="--device cuda: torch finds no GPU here"):
        benchmark(options(tmp_path, device="cuda"))


def test_a_card_of_ones_own_has_no_mini_grid(recipe: Recipe, tmp_path: Path) -> None:
    card = packaged_folder().joinpath("datasets", "shear_flow.yaml").read_text()
    card = card.replace("shear_flow", "my_flow").replace("abbreviation: SF", "abbreviation: MF")
    (tmp_path / "cards" / "datasets").mkdir(parents=True)
    (tmp_path / "cards" / "datasets" / "my_flow.yaml").write_text(card)
    own = replace(recipe, data=replace(recipe.data, registry=str(tmp_path / "cards"), datasets=["my_flow"]))
    with pytest.raises(UserError, match="--grid mini: the mini-Well has no my_flow; take --grid full"):
        sized_workload(own, "mini")
    assert sized_workload(own, "full").datasets["my_flow"].grid == load_registry().cards["shear_flow"].grid
