"""`fm plan`: with and without shards, for this machine and for GPUs of the table."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from whole_runs import DATASETS, small

from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from fm.cli import main
from fm.config import Recipe, dump_recipe, load_recipe
from fm.lab.hardware import GPUS, AssumedSpeed, Interconnect, buckets
from fm.lab.plan import Plan, estimated_plan
from fm.lab.plan_tables import plan_text
from fm.lab.workload import read_workload
from fm.training.trainer import train

H200 = AssumedSpeed(GPUS["h200"], 0.5, bf16=True)


def planned(recipe: Recipe, processes: int = 1, speed: AssumedSpeed = H200) -> Plan:
    return estimated_plan(recipe, speed, processes=processes)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Two datasets at their published sizes."""
    nowhere = tmp_path_factory.mktemp("none")
    return planned(small(nowhere / "shards", nowhere / "run", train={"steps": 10_000}))


def test_without_shards_sizes_are_the_published_ones(plan: Plan) -> None:
    cards = load_registry().cards
    assert list(plan.datasets) == DATASETS
    for name, one in plan.datasets.items():
        channels = 2 * len(cards[name].state_channels) + len(cards[name].constant_channels)
        assert (one.windows, one.grid) == (cards[name].windows, cards[name].grid)
        assert one.tokens == 4 * cards[name].tokens
        assert one.read_bytes == 4 * 4 * channels * cards[name].grid[0] * cards[name].grid[1]
    assert plan.published
    assert plan.notes[0].startswith("no shards in ")


def test_the_mixture_is_the_sum_of_shares(plan: Plan) -> None:
    """Shares go as the root of windows x tokens: sqrt(321600 x 16384) = 72589 and sqrt(20384 x 65536) = 36550."""
    parts = plan.datasets.values()
    assert [one.share for one in parts] == pytest.approx([0.665106, 0.334894], abs=1e-6)
    assert plan.mean("tokens") == pytest.approx(0.665106 * 65536 + 0.334894 * 262144, rel=1e-5)  # of 4 windows
    assert sum(one.draws for one in parts) == 10_000
    for what in ("tokens", "flops", "read_bytes", "seconds"):
        assert plan.mean(what) == pytest.approx(sum(one.share * getattr(one, what) for one in parts))
    assert plan.mean("flops") not in [one.flops for one in parts]
    assert plan.training_seconds == pytest.approx(10_000 * plan.mean("seconds"))


def test_shards_that_are_there_count(tiny_shards: Path, tmp_path: Path) -> None:
    """One process and the plan's model, windows and draws are those of a real run."""
    recipe = small(tiny_shards, tmp_path / "run")
    found = planned(recipe)
    workload = read_workload(recipe)
    assert found.parameters == workload.model().num_parameters()
    assert not found.published
    assert not found.notes
    assert train(recipe) == 0
    drawn = [json.loads(line)["dataset"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {name: drawn.count(name) for name in DATASETS} == {name: one.draws for name, one in found.datasets.items()}


def test_some_shards_and_some_cards(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / DATASETS[0]).symlink_to(tiny_shards / DATASETS[0])
    found = planned(small(tmp_path / "shards", tmp_path / "run"))
    cards = load_registry().cards
    assert found.datasets[DATASETS[0]].windows < cards[DATASETS[0]].windows
    assert found.datasets[DATASETS[1]].windows == cards[DATASETS[1]].windows
    assert found.notes[0].startswith(f"no shards of {DATASETS[1]} in ")


def test_an_unroll_multiplies_calls_and_an_objective_its_backward_passes(tiny_shards: Path, tmp_path: Path) -> None:
    name = DATASETS[0]
    assert train(small(tiny_shards, tmp_path / "pretrained", train={"steps": 1})) == 0

    def tuned(pretrained: str = "pretrained", **settings: object) -> Plan:
        finetune = {"pretrained": str(tmp_path / pretrained), **settings}
        return planned(small(tmp_path / "none", tmp_path / "run", data={"datasets": [name]}, finetune=finetune))

    one, four = tuned(unroll_steps=1).datasets[name], tuned(unroll_steps=4).datasets[name]
    assert four.tokens == 4 * one.tokens
    assert four.flops == 4 * one.flops
    assert four.activation_bytes == 4 * one.activation_bytes
    assert four.windows < one.windows
    pushed = tuned(unroll_steps=4, objective="pushforward")
    assert pushed.datasets[name].flops == 2 * one.flops
    assert pushed.datasets[name].activation_bytes == one.activation_bytes
    grown = tuned(unroll_steps=4, unroll_start=1, unroll_growth=1.0).datasets[name]
    assert grown.tokens == pytest.approx(2.5 * one.tokens)
    unknown = tuned("nowhere", unroll_steps=1)
    assert unknown.notes[1].startswith(f"no model in {tmp_path / 'nowhere'} yet: sizes are the defaults")


def test_a_model_of_two_frames_reads_a_frame_more_and_rolls_out_a_step_less(tmp_path: Path) -> None:
    def of_frames(context: int) -> Plan:
        validation = {"every": 4, "windows": 5, "rollouts": 2}
        data = {"context": context}
        return planned(small(tmp_path / "none", tmp_path / "run", data=data, validation=validation))

    one, two, cards = of_frames(1), of_frames(2), load_registry().cards
    for name in DATASETS:
        channels, grid = len(cards[name].state_channels), cards[name].grid
        before, after = one.datasets[name], two.datasets[name]
        assert after.read_bytes - before.read_bytes == 4 * 4 * channels * grid[0] * grid[1]
        assert before.windows - after.windows == sum(trajectories for trajectories, _ in cards[name].train)
        assert before.validation_calls == 5 + 2 * (cards[name].num_frames[-1] - 1)
        assert before.validation_calls - after.validation_calls == 2


def test_micro_batches_and_processes_share_memory(tmp_path: Path, plan: Plan) -> None:
    half = planned(small(tmp_path / "none", tmp_path / "run", train={"micro_batch": 2}))
    shared = planned(small(tmp_path / "none", tmp_path / "run"), processes=2)
    for name, one in plan.datasets.items():
        assert half.datasets[name].activation_bytes == pytest.approx(one.activation_bytes / 2)
        assert shared.datasets[name].activation_bytes == half.datasets[name].activation_bytes
        assert shared.datasets[name].flops == one.flops
    assert_exchange(shared)
    assert plan.exchange is None
    assert "exchange of gradients" not in plan_text(plan)
    with pytest.raises(UserError, match="a global batch of 4 windows cannot be shared evenly by 3 processes"):
        planned(small(tmp_path / "none", tmp_path / "run"), processes=3)


def assert_exchange(shared: Plan) -> None:
    """Two processes send every gradient; what the backward pass does not hide is in the step, as far as it is known."""
    links, gradients = Interconnect(450, 50), buckets(4 * shared.parameters)
    assert shared.exchange is not None
    assert shared.exchange.seconds == pytest.approx(sum(links.all_reduce(size, 2) for size in gradients))
    for one in shared.datasets.values():
        backward = 2 / 3 * one.computing_seconds
        assert one.exchange_seconds == pytest.approx(links.after_backward(gradients, backward, 2))
        assert one.exchange_seconds > 0
    text = " ".join(plan_text(shared).split())
    assert "450 GB/s within nodes of 8, 50 GB/s between them (--network)" in text
    assert "not counted: the exchange" not in text


def test_what_does_not_fit_says_what_to_lower(tmp_path: Path) -> None:
    size, l40s = {"width": 256, "depth": 1, "heads": 8}, AssumedSpeed(GPUS["l40s"], 0.3, bf16=True)

    def of_micro_batches(number: int) -> Plan:
        train = {"global_batch": 32, "micro_batch": number}
        return planned(small(tmp_path / "none", tmp_path / "run", model=size, train=train), speed=l40s)

    cramped = of_micro_batches(32)
    assert not cramped.fits
    assert "DOES NOT FIT in 90% of 48.0 GB: set train.micro_batch=24" in plan_text(cramped)
    assert of_micro_batches(24).fits


def test_this_machine_is_measured_and_what_is_too_large_marked(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, file = tmp_path / "small.yaml", tmp_path / "plan.json"
    recipe.write_text(dump_recipe(small(tiny_shards, tmp_path / "run")))
    # Small steps end after 12 rounds, however many seconds they are given; on a busy machine few would not be enough.
    assert main(["plan", str(recipe), "--probe-seconds", "600", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    found = json.loads(file.read_text())
    parts = found["datasets"].values()
    assert found["utilisation"] is None
    assert found["mixture"]["seconds"] == pytest.approx(sum(one["share"] * one["seconds"] for one in parts))
    assert all(one["seconds"] > 0 and not one["extrapolated"] for one in parts)
    assert "this machine, measured" in text
    assert all(len(line) <= 120 for line in text.splitlines())
    nowhere = ["data.shards=nowhere", "train.global_batch=64"]  # at the published sizes
    assert main(["plan", str(recipe), *nowhere, "--probe-seconds", "1", "--json", str(file)]) == 0
    assert all(one["extrapolated"] for one in json.loads(file.read_text())["datasets"].values())
    assert "~: too large for a dry run" in capsys.readouterr().out


def test_json_holds_the_plan(plan: Plan) -> None:
    written = json.loads(json.dumps(plan.to_json()))
    assert written == plan.to_json()
    assert written["datasets"][DATASETS[0]]["flops"] == plan.datasets[DATASETS[0]].flops
    assert written["seconds"] == plan.seconds


def test_the_papers_run_is_compared_with_the_paper(plan: Plan) -> None:
    pretrain = Path(__file__).parents[3] / "recipes" / "fm_pretrain.yaml"
    workload = read_workload(load_recipe(pretrain, ["data.shards=nowhere"]))
    parameters = workload.fake_model().num_parameters()
    assert (parameters, sum(one.source.windows for one in workload.datasets.values())) == (9_383_676, 1_786_575)
    written = plan_text(replace(plan, parameters=parameters, steps=500_000))
    assert "148 ms a step; at that pace these 500,000 steps take 20.5 h" in " ".join(written.split())
    assert all(len(line) <= 120 for line in written.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h20O"], "no GPU 'h20O' in the table. Did you mean 'h200'?"),
        (["--utilisation", "30", "--gpu", "h200"], "--utilisation: expected a share in (0, 1], got 30.0"),
        (["--probe-seconds", "0"], "--probe-seconds: expected seconds above 0"),
        (["--network", "0", "--gpu", "h200"], "--network: expected GB/s above 0, got 0.0"),
        (["--processes", "0"], "--processes: expected a number above 0, got 0"),
        (["--shards", "nowhere"], "no train shards under nowhere"),
        (["train.stepz=3"], "unknown key train.stepz"),
        (["data.datasets=null"], "no train shards under"),
        (
            ["--gpu", "h200", "--json", "/proc/no/plan.json"],
            "/proc/no/plan.json: cannot be written (No such file or directory)",
        ),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(dump_recipe(small(tmp_path / "none", tmp_path / "run")))
    assert main(["plan", str(recipe), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom fm.cli import main\ntry:\n    main(['plan', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'yaml', 'accelerate', 'matplotlib', 'tensorboard', 'h5py'}\n"
        "assert not heavy & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--probe-seconds" in done.stdout
