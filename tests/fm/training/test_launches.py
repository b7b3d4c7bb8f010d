"""One run under every launch configuration that a CPU can start, and the configurations that are refused.

Starting two processes with DeepSpeed takes longer than a tiny run. So each configuration is launched once, and runs all
recipes that the tests below look at (tests/helpers/several_runs.py).
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from forked import Forked, forking_ranks
from safetensors.torch import load_file
from whole_runs import DATASETS, ROOT, accelerate, finish, log, small, spoil, start, written

from data_pipeline.errors import UserError
from fm.config import Recipe, dump_recipe
from fm.distributed import _deepspeed_plugin, fsdp_reshards
from fm.evaluation.cosines import Cosines
from fm.lab.replay import replay
from fm.lab.status import read_status
from fm.training.optim import part_of
from fm.training.state import VARIABLE
from fm.training.trainer import train

CLIP = 0.1
STEPS, ALONE_STEPS, ADAPT_STEPS = 15, 3, 7
NEW = "shear_flow"
SPREAD = {
    "cpu2": "DDP",
    "deepspeed_zero2": "DeepSpeed ZeRO-2",
    "fsdp": "FSDP2",
    "deepspeed_zero3": "DeepSpeed ZeRO-3",
    "deepspeed_zero1": "DeepSpeed ZeRO-1",
}
SECTIONS: dict[str, dict[str, Any]] = {
    # three datasets, two of which share channels; some are never drawn in a step, and one is drawn twice in others
    "data": {"datasets": [*DATASETS, NEW]},
    "model": {"width": 32, "depth": 2, "padding": "boundary", "predict": "delta"},
    "train": {"steps": STEPS, "global_batch": 8, "draws": 2, "clip": CLIP},
    "checkpoint": {"every": 100},
}


@dataclass(frozen=True)
class Runs:
    """The runs of this file, each in a folder of its name; `output` is what each launch printed."""

    folder: Path
    output: Mapping[str, str]

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


def launch(config: str, recipes: Sequence[Recipe]) -> str:
    """Run recipes in two processes on this machine; return what was printed.

    The launcher begins as a user's does. Its ranks are forked from a process that has imported torch, but for ZeRO-2's.
    """
    files = [recipe.run.directory.with_suffix(".yaml") for recipe in recipes]
    for file, recipe in zip(files, recipes, strict=True):
        file.write_text(dump_recipe(recipe))
    script = ROOT / "tests" / "helpers" / "several_runs.py"
    command = [*accelerate(config), str(script), str(CLIP), *map(str, files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment[VARIABLE] = ":aot_eager"  # compiles faster than inductor
    (folder := files[0].parent / f"ranks_of_{config}").mkdir()
    with forking_ranks(script, folder) as python:
        if config != "deepspeed_zero2":
            environment["PYTHON_EXEC"] = str(python)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Recipes:
    """The recipes of the runs, by the name of the run."""

    folder: Path  # of the runs
    shards: Path
    spoiled: Path  # the same shards, some with frames a thousand times too large

    def recipe(self, name: str, **sections: dict[str, Any]) -> Recipe:
        return small(self.shards, self.folder / name, **{**SECTIONS, **sections})

    def chain(self, stop_at: int) -> Recipe:
        return self.recipe("chain", run={"stop_at": stop_at})

    def adapting(self, name: str) -> Recipe:
        sections: dict[str, dict[str, Any]] = {
            "train": {"steps": ADAPT_STEPS, "draws": 2, "clip": CLIP, "weight_decay": 0.1},  # clipped at every step
            "finetune": {"pretrained": str(self.folder / "pretrained"), "unroll_steps": 1, "adapter_rank": 2},
            "adapt": {
                "datasets": [NEW],
                "alone_steps": ALONE_STEPS,
                "share": 0.5,
                "rates": {"embedding": 0.5, "trunk": 0.1, "head": 1.0},
            },
            "checkpoint": {"every": ALONE_STEPS, "keep": 5},
        }
        return self.recipe(name, **sections)

    def finetuning(self, name: str) -> Recipe:
        """A growing unroll with noise and symmetries, checkpointed activations, and the gate's verdict on all."""
        finetune = {"objective": "causal_bptt", "unroll_steps": 3, "unroll_start": 2, "checkpoint_activations": True}
        gate = {"pretrained": str(self.folder / "alone"), "gate": 1.5, "gate_action": "keep_best"}
        tuned = {"steps": 6, "global_batch": 8, "draws": 2, "jitter": 0.02, "augment": True}
        return self.recipe(
            name,
            finetune={**gate, **finetune},
            train=tuned,
            validation={"every": 3, "windows": 2, "rollouts": 1},
            tracking={"pictures": 1},
        )

    def guarded(self, name: str) -> Recipe:
        """A run that rolls back from steps 12 and 13, whose windows have frames a thousand times too large."""
        sections: dict[str, dict[str, Any]] = {
            "run": {"seed": 3},
            "guard": {"action": "rollback", "spike": 20.0, "history": 8},
            "data": {"datasets": DATASETS[:1]},
            "model": {"adapter_rank": 2},
            "train": {"steps": 14, "clip": CLIP},
            "checkpoint": {"every": 4, "keep": 100},
        }
        return small(self.spoiled, self.folder / name, **sections)

    def adaptive(self, name: str) -> Recipe:
        """A run whose shares change so far that a process with the shares of before draws another dataset."""
        sections: dict[str, dict[str, Any]] = {
            "sampling": {"scheme": "adaptive", "power": 10.0, "floor": 0.05},
            "train": {"steps": 12, "global_batch": 8, "draws": 2, "learning_rate": 1e-2, "ema": 0.0, "clip": CLIP},
            "validation": {"every": 3, "windows": 3, "rollouts": 0},
        }
        return small(self.shards, self.folder / name, **sections)

    def compiled(self, name: str, way: str) -> Recipe:
        train = {"steps": 3, "clip": CLIP, "compile": way}
        return small(self.shards, self.folder / name, data={"datasets": DATASETS[:1]}, train=train)

    def orthogonal(self, name: str) -> Recipe:
        """A run of the quickstart's kind."""
        model = {**SECTIONS["model"], "pointwise": True, "decoder": "conv", "constraints": True, "adapter_rank": 3}
        return self.recipe(name, model=model, train={**SECTIONS["train"], "steps": 6, "optimizer": "muon"})


@pytest.fixture(scope="module")
def runs(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every run in one process, and under the configurations in turn; `chain` goes from one to the next."""
    folder = tmp_path_factory.mktemp("launches")
    spoiled = spoil(tiny_shards, folder / "spoiled", lambda frames: np.multiply(frames, 1e3, out=frames))
    made = Recipes(folder, tiny_shards, spoiled)

    shared = {**SECTIONS["train"], "steps": 12, "global_batch": 12, "draws": 4}
    compared = {"tracking": {"gradient_cosine_every": 6}}
    per_rank = made.recipe(
        "per_rank",
        train={**shared, "micro_batch": 2, "read_every": 5},
        sampling={"draw": "per_rank"},
        **compared,
    )
    alone = made.recipe("alone")
    old = {"data": {"datasets": DATASETS}, "model": {"width": 32, "depth": 2}, "train": {"steps": 12}}
    for one in (
        *(alone, made.finetuning("finetuned_alone"), made.recipe("whole_draws", train=shared, **compared)),
        *(made.guarded("guarded_alone"), made.adaptive("adaptive_alone"), made.compiled("compiled_alone", "eager")),
        made.orthogonal("muon_alone"),
    ):
        assert train(one) == 0
    assert train(small(tiny_shards, folder / "pretrained", **old)) == 0
    assert train(made.adapting("adapted_alone")) == 0
    assert train(made.chain(stop_at=2)) == 0

    undivided = made.recipe("undivided", train={**SECTIONS["train"], "global_batch": 15, "draws": 1})
    apart = made.recipe("apart", sampling={"draw": "per_rank"})
    extras = {
        "cpu2": [
            *(made.finetuning("finetuned"), per_rank, undivided, made.adaptive("adaptive")),
            *(made.compiled("compiled", "blocks"), made.orthogonal("muon")),
        ],
        "deepspeed_zero2": [made.adapting("adapted_deepspeed_zero2")],
        "fsdp": [made.adapting("adapted_fsdp"), apart, made.guarded("guarded_fsdp"), made.orthogonal("muon_fsdp")],
        "deepspeed_zero3": [made.guarded("guarded_deepspeed_zero3"), made.compiled("uncompiled", "blocks")],
        "deepspeed_zero1": [],
    }
    output = {}
    for stop_at, config in zip((4, 6, 10, 12, 14), SPREAD, strict=True):
        if config == "fsdp":  # takes up what one process saved
            assert train(made.chain(stop_at=8)) == 0
        whole = replace(alone, run=replace(alone.run, dir=str(folder / config)))
        output[config] = launch(config, [whole, *extras[config], made.chain(stop_at)])
    return Runs(folder, output)


def assert_same_run(directory: Path, alone: Path, steps: int = STEPS) -> None:
    """The same windows in the same order, and losses that differ by the order of summation only."""
    lines, expected = log(directory), log(alone)[:steps]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for key in ("dataset", "windows", "lr"):
        assert [line[key] for line in lines] == [line[key] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-4)


@pytest.mark.parametrize("config", SPREAD)
def test_a_run_is_the_same_under_every_configuration(runs: Runs, config: str) -> None:
    assert_same_run(runs[config], runs["alone"])
    process = read_status(runs[config]).process
    assert process is not None
    assert (process["spread"], process["world_size"]) == (SPREAD[config], 2)
    for name in ("model", "ema", "optimizer"):
        files = [runs[run] / f"checkpoints/step_{STEPS:08d}/{name}.safetensors" for run in ("alone", config)]
        expected, found = (load_file(file) for file in files)
        assert found.keys() == expected.keys()  # moments of what was never drawn are in neither
        for key, value in expected.items():
            scale = float(value.abs().max()) or 1.0
            assert float((found[key] - value).abs().max()) < 1e-3 * scale, key


def test_deepspeed_compiles_nothing_before_it_trains_on_a_cpu(runs: Runs) -> None:
    for config in ("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"):
        assert "built successfully" not in runs.output[config]  # as DeepSpeed begins to use what it compiled


def test_finetuning_is_the_same_on_two_processes(runs: Runs) -> None:
    assert_same_run(runs["finetuned"], runs["finetuned_alone"], steps=6)
    best = [path.name for run in ("finetuned_alone", "finetuned") for path in (runs[run] / "best").iterdir()]
    assert best[0] == best[1]


def test_a_run_goes_on_under_any_other_configuration(runs: Runs) -> None:
    """One process, DDP, ZeRO-2, one process, FSDP, ZeRO-3, ZeRO-1: each takes up what the one before has saved."""
    for step, config in zip((2, 4, 8, 10, 12), SPREAD, strict=True):
        assert f"continuing {runs['chain']} from step {step}" in runs.output[config]
    assert_same_run(runs["chain"], runs["alone"], 14)


@pytest.mark.parametrize("config", ["fsdp", "deepspeed_zero2"])
def test_two_processes_adapt_as_one_does(runs: Runs, config: str) -> None:
    """A dataset learned alone, then together with others at other rates."""
    run, alone = runs[f"adapted_{config}"], runs["adapted_alone"]
    lines, expected = log(run), log(alone)
    assert [line["windows"] for line in lines] == [line["windows"] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-4)
    known = load_file(next((runs["pretrained"] / "checkpoints").glob("*12")) / "ema.safetensors")
    for step in (ALONE_STEPS, ADAPT_STEPS):
        for kind in ("model", "ema", "optimizer"):
            file = f"checkpoints/step_{step:08d}/{kind}.safetensors"
            mine, theirs = load_file(run / file), load_file(alone / file)
            assert mine.keys() == theirs.keys()  # moments of skipped parameters are in neither
            for name, value in theirs.items():
                # an element whose gradients cancel moves by what the order of summation leaves of them
                scale = float(value.abs().max()) or 1.0
                assert float((mine[name] - value).abs().max()) < 1e-2 * scale, (kind, name)
                if step == ALONE_STEPS and name in known:
                    assert mine[name].equal(known[name]), (kind, name)
    assert {part_of(name) for name in known} == {"embedding", "trunk", "head"}


@pytest.mark.parametrize("config", ["fsdp", "deepspeed_zero3"])
def test_processes_refuse_and_roll_back_together(runs: Runs, config: str) -> None:
    """Whatever they hold of the model: the incident is whole, and so is what they go back to."""
    together, alone = runs[f"guarded_{config}"], runs["guarded_alone"]
    refused = [[event["refused"] for event in events(run, "guard")] for run in (together, alone)]
    assert refused == [[12, 13], [12, 13]]
    found, expected = ([line["loss"] for line in log(run) if line["loss"] is not None] for run in (together, alone))
    assert found == pytest.approx(expected, rel=1e-4)
    again = [replay(run, refused[0][0]).draws[0].loss for run in (together, alone)]
    assert again[0] == pytest.approx(again[1], rel=1e-4)


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_processes_draw_by_the_shares_of_one(runs: Runs) -> None:
    """Validations on the main process change the shares of all."""
    alone, together = log(runs["adaptive_alone"]), log(runs["adaptive"])
    assert [line["windows"] for line in together] == [line["windows"] for line in alone]
    assert [line["loss"] for line in together] == pytest.approx([line["loss"] for line in alone], rel=1e-3)
    facts = json.loads((runs["adaptive"] / "checkpoints/step_00000012/state.json").read_text())
    first, *_, last = (shares[DATASETS[0]] for _, shares in facts["sampling"]["history"])
    assert abs(last - first) > 0.2


def test_processes_compare_gradients_as_one_does(runs: Runs) -> None:
    found, expected = (
        [Cosines.from_json(line) for line in events(runs[run], "cosine")] for run in ("per_rank", "whole_draws")
    )
    assert len(found) == 2
    for together, alone in zip(found, expected, strict=True):
        np.testing.assert_allclose(together.matrix, alone.matrix, atol=1e-3)
        np.testing.assert_allclose(together.norms, alone.norms, rtol=1e-2)


def test_processes_train_compiled_blocks(runs: Runs) -> None:
    assert_same_run(runs["compiled"], runs["compiled_alone"], 3)


def test_processes_on_different_datasets_train_as_one_does(runs: Runs) -> None:
    """Of four draws of three windows each, two processes take six by cost, in different numbers of micro-batches."""
    assert_same_run(runs["per_rank"], runs["whole_draws"], 12)


def test_processes_that_need_each_other_cannot_work_on_different_datasets(runs: Runs) -> None:
    refused = "with FSDP2 each needs all processes; use launch/ddp.yaml, or sampling.draw=global"
    assert refused in runs.output["fsdp"].partition("apart: error: ")[2].partition("\n")[0]


def test_two_processes_orthogonalize_as_one_does_and_slices_of_matrices_are_refused(runs: Runs) -> None:
    assert_same_run(runs["muon"], runs["muon_alone"], 6)
    refused = runs.output["fsdp"].partition("muon_fsdp: error: ")[2].partition("\n")[0]
    assert "train.optimizer=muon: Muon needs whole matrices" in refused


def test_layers_that_zero_3_gathers_are_not_compiled(runs: Runs) -> None:
    refused = runs.output["deepspeed_zero3"].partition("uncompiled: error: ")[2].partition("\n")[0]
    assert "train.compile=blocks: ZeRO-3 fetches weights layer by layer" in refused
    assert "launch/ddp.yaml" in refused


def test_a_global_batch_that_cannot_be_shared_names_the_divisors(runs: Runs) -> None:
    refused = "a global batch of 15 windows cannot be shared evenly by 2 processes: use 1, 3, 5 or 15"
    assert f"undivided: error: {refused}" in runs.output["cpu2"]


@pytest.mark.parametrize("file", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_is_one_that_accelerate_knows(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert config.num_processes > 1
    assert config.mixed_precision == "no"  # train.precision decides
    assert f"launch/{file.name}" in file.read_text()  # the command that uses it


def test_the_slurm_script_is_a_script() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "launch" / "slurm.sbatch")], check=True)


def test_deepspeed_that_accelerate_would_leave_out_is_refused(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    code, output = finish(start(small(tiny_shards, tmp_path / "run"), *accelerate("deepspeed_zero2")))
    assert code != 0
    assert "error: the launch configuration asks for DeepSpeed, but accelerate runs MULTI_CPU" in output
    assert not (tmp_path / "run").exists()


def test_processes_that_are_not_connected_are_refused(tiny_shards: Path, tmp_path: Path) -> None:
    left_over = {**os.environ, "WORLD_SIZE": "2"}  # of another launcher: no rank, no address
    code, output = finish(Forked(written(small(tiny_shards, tmp_path / "run")), environment=left_over))
    assert code == 2, output
    assert "2 process(es), as WORLD_SIZE says, cannot be connected" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FSDP_VERSION": "1"}, "expected fsdp_version: 2, as in launch/fsdp.yaml, got 1"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "asks for fsdp_offload_params"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "asks for fsdp_activation_checkpointing"),
    ],
)
def test_what_fsdp_would_leave_out_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message):
        fsdp_reshards()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, "expected ZeRO stage 1, 2 or 3, got 0; stage 0 is launch/ddp.yaml"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "asks for offload_optimizer"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, "asks for optimizer: optimizer, learning"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "asks for bf16"),
    ],
)
def test_deepspeed_settings_that_are_the_recipes_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    (tmp_path / "zero.json").write_text(json.dumps({**config, "train_micro_batch_size_per_gpu": 1}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    with pytest.raises(UserError, match=message):
        _deepspeed_plugin(clip=1.0)
