"""One run under every launch configuration that a CPU can start, and the configurations that are refused."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from whole_runs import ROOT, accelerate, finish, log, small, start

from data_pipeline.files import UserError
from fm.config import Recipe
from fm.distributed import _deepspeed_plugin, fsdp_reshards
from fm.lab.status import read_status
from fm.training.trainer import train

STEPS = 21
SECTIONS: dict[str, dict[str, Any]] = {
    # three datasets, two of which share channels; some are never drawn in a step, and one is drawn twice in others
    "data": {"datasets": ["acoustic_scattering_maze", "helmholtz_staircase", "shear_flow"]},
    "model": {"width": 32, "depth": 2, "padding": "boundary", "predict": "delta"},
    "train": {"steps": STEPS, "global_batch": 8, "draws": 2, "clip": 0.1},
    "checkpoint": {"every": 100},
}


def launched(recipe: Recipe, config: str) -> tuple[int, str]:
    """Two processes on this machine, or one where `config` is empty."""
    return finish(start(recipe, *(accelerate(config) if config else ())))


@pytest.fixture(scope="module")
def alone(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process, undisturbed."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    code, output = launched(small(tiny_shards, directory, **SECTIONS), "")
    assert code == 0, output
    return directory


def assert_same_run(directory: Path, alone: Path, steps: int = STEPS) -> None:
    """The same windows in the same order, and losses that differ by the order of summation only."""
    lines, expected = log(directory), log(alone)[:steps]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for key in ("dataset", "windows", "lr"):
        assert [line[key] for line in lines] == [line[key] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-4)


@pytest.mark.parametrize(
    ("config", "spread"),
    [
        ("cpu2", "DDP"),
        ("fsdp", "FSDP2"),
        ("deepspeed_zero2", "DeepSpeed ZeRO-2"),
        ("deepspeed_zero3", "DeepSpeed ZeRO-3"),
    ],
)
def test_a_run_is_the_same_under_every_configuration(
    tiny_shards: Path, tmp_path: Path, alone: Path, config: str, spread: str
) -> None:
    recipe = small(tiny_shards, tmp_path / "run", **SECTIONS)
    code, output = launched(recipe, config)
    assert code == 0, output
    assert_same_run(tmp_path / "run", alone)
    process = read_status(tmp_path / "run").process
    assert process is not None
    assert (process["spread"], process["world_size"]) == (spread, 2)
    for name in ("model", "ema", "optimizer"):
        files = [path / f"checkpoints/step_{STEPS:08d}/{name}.safetensors" for path in (alone, tmp_path / "run")]
        expected, found = (load_file(file) for file in files)
        assert found.keys() == expected.keys()  # moments of what was never drawn are in neither
        for key, value in expected.items():
            scale = float(value.abs().max()) or 1.0
            assert float((found[key] - value).abs().max()) < 1e-3 * scale, key


def test_finetuning_is_the_same_on_two_processes(tiny_shards: Path, tmp_path: Path, alone: Path) -> None:
    """A growing unroll with noise, weights by window, checkpointed activations, and the gate's verdict on all."""
    finetune = {"objective": "causal_bptt", "unroll_steps": 3, "unroll_start": 2, "checkpoint_activations": True}
    sections: dict[str, dict[str, Any]] = {
        **SECTIONS,
        "finetune": {"pretrained": str(alone), "gate": 1.5, "gate_action": "keep_best", **finetune},
        "train": {"steps": 6, "global_batch": 8, "draws": 2, "jitter": 0.02},
        "validation": {"every": 3, "windows": 2, "rollouts": 1},
    }
    assert train(small(tiny_shards, tmp_path / "one", **sections)) == 0
    code, output = launched(small(tiny_shards, tmp_path / "two", **sections), "cpu2")
    assert code == 0, output
    assert_same_run(tmp_path / "two", tmp_path / "one", steps=6)
    best = [path.name for run in ("one", "two") for path in (tmp_path / run / "best").iterdir()]
    assert best[0] == best[1]


def test_a_run_goes_on_under_any_other_configuration(tiny_shards: Path, tmp_path: Path, alone: Path) -> None:
    """One process, DDP, one; DDP to ZeRO-2 to one; FSDP to DDP: each takes up what the one before has saved."""
    configs = ["", "cpu2", "deepspeed_zero2", "", "fsdp", "cpu2", "deepspeed_zero3", "deepspeed_zero1"]
    for number, config in enumerate(configs, start=1):
        stop_at = 2 * number
        sections = {**SECTIONS, "run": {"stop_at": stop_at}}
        code, output = launched(small(tiny_shards, tmp_path / "run", **sections), config)
        assert code == 0, output
        assert (f"from step {stop_at - 2}" in output) == (number > 1)
    assert_same_run(tmp_path / "run", alone, 2 * len(configs))


@pytest.mark.parametrize("file", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_is_one_that_accelerate_knows(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert config.num_processes > 1
    assert config.mixed_precision == "no"  # train.precision decides
    assert f"launch/{file.name}" in file.read_text()  # the command that uses it


def test_the_slurm_script_is_a_script() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "launch" / "slurm.sbatch")], check=True)


def test_processes_on_different_datasets_train_as_one_does(tiny_shards: Path, tmp_path: Path) -> None:
    """Of four draws of three windows each, two processes take six windows by cost, in different numbers of pieces."""
    batches = {"steps": 12, "global_batch": 12, "draws": 4, "micro_batch": 2}
    sections = {**SECTIONS, "train": {**SECTIONS["train"], **batches}, "sampling": {"draw": "per_rank"}}
    sections["train"]["read_every"] = 5
    together = small(tiny_shards, tmp_path / "together", **sections)
    code, output = launched(together, "cpu2")
    assert code == 0, output
    alone = {**sections["train"], "micro_batch": None, "read_every": 1}
    whole = {**sections, "train": alone, "sampling": {"draw": "global"}}
    assert train(small(tiny_shards, tmp_path / "whole", **whole)) == 0
    assert_same_run(tmp_path / "together", tmp_path / "whole", 12)


def test_processes_that_need_each_other_cannot_work_on_different_datasets(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = small(tiny_shards, tmp_path / "run", sampling={"draw": "per_rank"})
    code, output = launched(recipe, "fsdp")
    assert code != 0
    assert "with FSDP2 each needs all processes; use launch/ddp.yaml, or sampling.draw=global" in output


def test_a_global_batch_that_cannot_be_shared_names_the_divisors(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = small(tiny_shards, tmp_path / "run", train={"global_batch": 15})
    code, output = launched(recipe, "cpu2")
    assert code != 0
    assert "error: a global batch of 15 windows cannot be shared evenly by 2 processes: use 1, 3, 5 or 15" in output


def test_deepspeed_that_accelerate_would_leave_out_is_refused(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    code, output = launched(small(tiny_shards, tmp_path / "run"), "deepspeed_zero2")
    assert code != 0
    assert "asks for DeepSpeed, but accelerate runs MULTI_CPU" in output
    assert not (tmp_path / "run").exists()


def test_processes_that_are_not_connected_are_refused(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as left over from another launcher: no rank, no address
    code, output = finish(start(small(tiny_shards, tmp_path / "run")))
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
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, "asks for optimizer: optimiser, learning"),
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
