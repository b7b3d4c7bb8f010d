"""Whole runs on real shards: learning, exact resume, interruption, bad input, two processes, finetuning, the record."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from whole_runs import (
    DATASETS,
    SignalInEvaluation,
    finish,
    fork,
    last_weights,
    log,
    rewrite_state,
    small,
    wait_for,
    written,
)

from data_pipeline.errors import UserError
from fm.checkpoint import verify_checkpoint
from fm.training.trainer import train


def test_a_run_lowers_the_loss_and_leaves_what_scripts_rely_on(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = small(tiny_shards, tmp_path / "run", train={"steps": 60}, checkpoint={"every": 20})
    assert train(recipe) == 0
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert set(lines[0]) == {"step", "dataset", "windows", "loss", "lr"}
    losses = [line["loss"] for line in lines if line["dataset"] == "helmholtz_staircase"]
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])  # one step is the same rotation everywhere: soon learnt
    assert (tmp_path / "run" / "checkpoints" / "step_00000060" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        f"step_{step:08d}" for step in (20, 40, 60)
    ]


def test_killed_runs_continue_bit_for_bit(tiny_shards: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of steps and in the middle of saves; the end equals the undisturbed run's."""
    options = {
        "train": {"steps": 24, "global_batch": 8, "draws": 2},
        "checkpoint": {"every": 2},
        "model": {"width": 64, "depth": 2},
    }
    recipe = small(tiny_shards, tmp_path / "killed", **options)
    torn_saves = 0
    for moment in (
        lambda: list((tmp_path / "killed").glob("checkpoints/*.tmp")),
        lambda: len((tmp_path / "killed/log.jsonl").read_text().splitlines()) > 12,
    ):
        process = fork(recipe)
        wait_for(moment, process)
        process.kill()
        process.communicate()
        torn_saves += len(list((tmp_path / "killed").glob("checkpoints/*.tmp")))
    code, output = finish(fork(recipe))
    assert code == 0, output
    assert "continuing" in output
    assert torn_saves > 0
    undisturbed = small(tiny_shards, tmp_path / "undisturbed", **options)
    assert finish(fork(undisturbed))[0] == 0
    assert log(tmp_path / "killed") == log(tmp_path / "undisturbed")
    assert last_weights(tmp_path / "killed") == last_weights(tmp_path / "undisturbed")
    assert not list((tmp_path / "killed").glob("checkpoints/*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_exits_130_and_the_same_command_continues(
    tiny_shards: Path, tmp_path: Path, number: signal.Signals
) -> None:
    recipe = small(tiny_shards, tmp_path / "run", train={"steps": 40}, checkpoint={"every": 1000})
    process = fork(recipe)
    wait_for(lambda: (tmp_path / "run/log.jsonl").is_file() and len(log(tmp_path / "run")) >= 3, process)
    for _ in range(2 if number == signal.SIGUSR1 else 1):  # a cluster may warn more than once
        process.send_signal(number)
    code, output = finish(process)
    assert code == 130, output
    assert "Traceback" not in output
    done = len(log(tmp_path / "run"))
    assert f"interrupted: saved step {done}" in output
    assert (tmp_path / f"run/checkpoints/step_{done:08d}").is_dir()
    assert train(recipe) == 0
    assert [line["step"] for line in log(tmp_path / "run")] == list(range(1, 41))


def test_a_signal_within_a_validation_is_obeyed_after_one_batch_and_the_validation_made_again(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"train": {"steps": 4}, "validation": {"every": 2}, "checkpoint": {"every": 3}, "tracking": {"every": 9}}
    recipe, undisturbed = (small(tiny_shards, tmp_path / name, **options) for name in ("run", "undisturbed"))
    with SignalInEvaluation(signal.SIGTERM, -1) as both_validations:
        assert train(undisturbed) == 0
    for done, call in ((2, 1), (4, both_validations.count - 1)):  # the first batch, and nearly the last
        with SignalInEvaluation(signal.SIGTERM, call) as sent:
            assert train(recipe) == 130
        assert sent.count == call
        assert f"interrupted: saved step {done}; the same command continues" in capsys.readouterr().err
        assert json.loads((tmp_path / "run/events.jsonl").read_text().splitlines()[-1])["state"] == "interrupted"
        assert verify_checkpoint(tmp_path / f"run/checkpoints/step_{done:08d}")
    assert train(recipe) == 0
    assert log(tmp_path / "run") == log(tmp_path / "undisturbed")
    assert last_weights(tmp_path / "run") == last_weights(tmp_path / "undisturbed")
    ours, theirs = (
        [
            (event["step"], event["datasets"])
            for event in map(json.loads, (tmp_path / name / "events.jsonl").read_text().splitlines())
            if event["kind"] == "validation"
        ]
        for name in ("run", "undisturbed")
    )
    assert [step for step, _ in ours] == [2, 4]
    assert ours == theirs


def test_what_accelerate_is_configured_to_do_is_ignored_reported_or_refused(tiny_shards: Path, tmp_path: Path) -> None:
    """`accelerate launch` puts the settings of its files, the user's default_config.yaml too, into the environment."""
    recipe, undisturbed = (small(tiny_shards, tmp_path / name, train={"steps": 2}) for name in ("run", "undisturbed"))
    settings = {"DYNAMO_BACKEND": "EAGER", "MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "4"}
    variables = {f"ACCELERATE_{name}": value for name, value in settings.items()} | {
        "ACCELERATE_DYNAMO_MODE": "default"
    }
    code, output = finish(Forked(written(recipe), environment={**os.environ, **variables}))
    assert code == 0, output
    assert "accelerate's dynamo_backend: EAGER is ignored, train.compile of the recipe decides" in output
    assert output.count("is ignored") == 3
    assert finish(fork(undisturbed))[0] == 0
    assert last_weights(tmp_path / "run") == last_weights(tmp_path / "undisturbed")
    board = b"".join(file.read_bytes() for file in (tmp_path / "run/tensorboard").iterdir())
    assert b"dynamo_backend EAGER, gradient_accumulation_steps 4, mixed_precision bf16 |" in board
    code, output = finish(Forked(written(recipe), environment={**os.environ, "ACCELERATE_USE_MEGATRON_LM": "true"}))
    assert code == 2
    assert output.startswith("error: accelerate's configuration asks for use_megatron_lm, which fm does not do")


def test_a_second_training_does_not_join_the_first(tiny_shards: Path, tmp_path: Path) -> None:
    """As when only the launcher was killed and its processes train on, unseen."""
    recipe = small(tiny_shards, tmp_path / "run", train={"steps": 90_000}, checkpoint={"every": 90_000})
    process = fork(recipe)
    try:
        wait_for(lambda: (tmp_path / "run/log.jsonl").is_file() and log(tmp_path / "run"), process)
        with pytest.raises(UserError, match="run: another training is writing here; wait until it has ended"):
            train(recipe)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_stop_at_ends_with_a_checkpoint_and_changes_nothing(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"train": {"steps": 12}, "validation": {"every": 4}}
    whole = small(tiny_shards, tmp_path / "whole", **options)
    assert train(whole) == 0
    for stop_at in (4, 4, 7):  # a validation step, the same again, and another
        assert train(small(tiny_shards, tmp_path / "parts", **options, run={"stop_at": stop_at})) == 0
        assert log(tmp_path / "parts")[-1]["step"] == stop_at
        assert (tmp_path / f"parts/checkpoints/step_{stop_at:08d}").is_dir()
    said = capsys.readouterr()
    assert "run.stop_at: saved step 4; the same command continues from here." in said.err
    assert "is at step 4, where run.stop_at ends it." in said.out
    assert train(small(tiny_shards, tmp_path / "parts", **options)) == 0
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    assert last_weights(tmp_path / "parts") == last_weights(tmp_path / "whole")


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    tiny_shards: Path, tmp_path: Path, capsys: Any
) -> None:
    recipe = small(tiny_shards, tmp_path / "run")
    assert train(recipe) == 0
    root = tmp_path / "run" / "checkpoints"
    weights = root / "step_00000008" / "ema.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert train(recipe) == 0
    out = capsys.readouterr().out
    assert "step_00000008/ema.safetensors: its bytes differ from the SHA-256" in out
    assert "from step 6" in out
    for file in root.glob("*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="none of the 3 checkpoints in"):
        train(recipe)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"width": 32}}, "config.width: 16 -> 32"),
        ({"data": {"datasets": ["shear_flow"]}}, "does not fit this run: datasets"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    tiny_shards: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    assert train(small(tiny_shards, tmp_path / "run", train={"steps": 1})) == 0
    with pytest.raises(UserError, match=message):
        train(small(tiny_shards, tmp_path / "run", **sections))


def test_a_checkpoint_of_a_newer_format_is_not_overwritten_and_the_way_out_is_named(
    tiny_shards: Path, tmp_path: Path, capsys: Any
) -> None:
    recipe = small(tiny_shards, tmp_path / "run", train={"steps": 2})
    assert train(recipe) == 0
    file = tmp_path / "run/checkpoints/step_00000002/state.json"
    rewrite_state(file, format_version=4)
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        train(recipe)
    assert "checkpoint format 4, this version of the project reads format 3" in capsys.readouterr().out
    assert '"format_version": 4' in file.read_text()


@pytest.mark.skipif(os.name != "posix" or not shutil.which("mount"), reason="needs mount")
def test_a_disk_that_is_full(tiny_shards: Path, tmp_path: Path) -> None:
    """A real one, of a few hundred kB, where this system lets us have it."""
    disk = tmp_path / "run/checkpoints"
    disk.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("not allowed to mount")
    try:
        recipe = small(tiny_shards, tmp_path / "run", train={"steps": 20}, checkpoint={"every": 2, "keep": 100})
        code, output = finish(fork(recipe))
        assert code == 2, output
        assert "No space left on device" in output
        assert "Traceback" not in output
        whole = sorted(disk.glob("step_*"))
        assert whole
        assert all(verify_checkpoint(path) for path in whole)
        assert f"from step {int(whole[-1].name[5:])}" in finish(fork(recipe))[1]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_during_a_save_keeps_the_checkpoints_before_it(tiny_shards: Path, tmp_path: Path) -> None:
    assert train(small(tiny_shards, tmp_path / "run", train={"steps": 3})) == 0
    limit = (tmp_path / "run/checkpoints/step_00000003/optimizer.safetensors").stat().st_size - 1
    full = tmp_path / "full.py"
    full.write_text(
        f"import resource, runpy\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"runpy.run_path({str(written(small(tiny_shards, tmp_path / 'run')))!r}, run_name='__main__')\n"
    )
    code, output = finish(Forked(full))
    assert code == 2, output
    assert "Traceback" not in output
    assert "could not save the checkpoint" in output
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000003"]
    assert train(small(tiny_shards, tmp_path / "run")) == 0


def test_a_non_finite_step_stops_the_run_or_is_skipped(tiny_shards: Path, tmp_path: Path) -> None:
    hot = {"learning_rate": 1e30, "clip": 1e30, "warmup_steps": 0}
    with pytest.raises(UserError, match=r"step \d+: the loss of (acoustic\w+|helmholtz\w+) is not finite"):
        train(small(tiny_shards, tmp_path / "stop", train=hot))
    assert not (tmp_path / "stop" / "checkpoints").exists()
    with pytest.raises(UserError, match="the guard has refused 3 steps, more than guard"):
        train(small(tiny_shards, tmp_path / "skip", train=hot, guard={"action": "skip", "max_events": 2}))
    assert len(log(tmp_path / "skip")) == len(log(tmp_path / "stop")) + 2
    assert log(tmp_path / "skip")[-1]["loss"] is None


def test_finetuning_starts_from_the_averaged_weights_and_moves_them(tiny_shards: Path, tmp_path: Path) -> None:
    assert train(small(tiny_shards, tmp_path / "pre")) == 0
    finetune = {"pretrained": str(tmp_path / "pre"), "unroll_steps": 3}
    still = small(tiny_shards, tmp_path / "still", finetune=finetune, train={"steps": 1, "learning_rate": 1e-30})
    assert train(still) == 0
    before = load_file(tmp_path / "pre/checkpoints/step_00000008/ema.safetensors")
    after = load_file(tmp_path / "still/checkpoints/step_00000001/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert train(small(tiny_shards, tmp_path / "ft", finetune=finetune, train={"steps": 4})) == 0
    moved = load_file(tmp_path / "ft/checkpoints/step_00000004/model.safetensors")
    assert any(not torch.equal(before[name], moved[name]) for name in before)
    with pytest.raises(UserError, match="no checkpoint found"):
        train(small(tiny_shards, tmp_path / "no", finetune={"pretrained": str(tmp_path / "absent")}))


def test_an_altered_byte_is_found_at_the_read_when_asked_for(tiny_shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    subprocess.run(["cp", "-r", str(tiny_shards), str(copy)], check=True)
    for shard in copy.glob(f"{DATASETS[0]}/train/*.tar"):
        content = bytearray(shard.read_bytes())
        for place in range(4096, len(content), 4096):
            content[place] ^= 1
        shard.write_bytes(content)
    recipe = small(copy, tmp_path / "run", data={"datasets": DATASETS[:1], "verify": True, "workers": 1})
    code, output = finish(fork(recipe))
    assert code == 2, output
    assert "damaged" in output
    assert "Traceback" not in output


def test_tensorboard_has_the_documented_tags_and_resuming_continues_the_curves(
    tiny_shards: Path, tmp_path: Path
) -> None:
    sections = {"validation": {"every": 4, "windows": 3, "rollouts": 1}, "tracking": {"pictures": 40}}
    assert train(small(tiny_shards, tmp_path / "run", train={"steps": 4}, **sections)) == 0
    assert train(small(tiny_shards, tmp_path / "run", train={"steps": 8}, **sections)) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8]
    tags = set(events.Tags()["scalars"])
    expected = {f"train/{name}" for name in ("loss", "mse", "wavelet_l1", "grad_norm", "lr")}
    expected |= {
        f"throughput/{name}"
        for name in ("samples_per_s", "tokens_per_s", "tflops", "data_wait_fraction", "peak_memory_gb")
    }
    for name in DATASETS:
        expected |= {f"sampling/{kind}/{name}" for kind in ("drawn_share", "target_share", "passes")}
        expected |= {f"train_loss/{name}", f"valid_vrmse/{name}", f"rollout_vrmse/{name}/last_third"}
    expected |= {f"valid_vrmse_field/{DATASETS[1]}/pressure_{part}" for part in ("re", "im")}
    assert expected <= tags
    images = set(events.Tags()["images"])
    assert {f"{name}/{kind}" for name in DATASETS for kind in ("fields", "spectrum", "rollout")} <= images
    assert events.Scalars("throughput/tflops")[-1].value > 0
    assert {"recipe/text_summary", "events/text_summary"} <= set(events.Tags()["tensors"])


def test_the_seed_draws_the_initial_weights(tiny_shards: Path, tmp_path: Path) -> None:
    drawn = {}
    for seed in (0, 1):
        run = {"name": "small", "dir": str(tmp_path / f"{seed}"), "seed": seed}
        # one step with a rate of all but zero: heads are zero at first, so the weights show after it
        recipe = small(tiny_shards, tmp_path / f"{seed}", run=run, train={"steps": 1, "learning_rate": 1e-30})
        assert train(recipe) == 0
        weights = load_file(tmp_path / f"{seed}/checkpoints/step_00000001/model.safetensors")
        drawn[seed] = next(v for name, v in sorted(weights.items()) if name.startswith("blocks.") and v.ndim > 1)
    assert not torch.equal(drawn[0], drawn[1])
