"""Rollout finetuning on real shards: objectives, horizons, the rehearsal and the one-step gate, as whole runs."""

import json
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from safetensors.torch import load_file
from whole_runs import DATASETS, finish, last_weights, log, small, written

from data_pipeline.errors import UserError
from data_pipeline.windows.loader import open_readers
from fm.checkpoint import find_checkpoint
from fm.config import Recipe
from fm.lab.status import read_status
from fm.training.checks import longest_unroll
from fm.training.trainer import train

VALIDATED = {"every": 2, "windows": 2, "rollouts": 1, "protocol": "thirds"}


@pytest.fixture(scope="module")
def pretrained(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pretrained") / "run"
    assert train(small(tiny_shards, run)) == 0
    return run


def recipe(shards: Path, run: Path, pretrained: Path, **sections: dict[str, Any]) -> Recipe:
    finetune = {"pretrained": str(pretrained), "unroll_steps": 3, **sections.pop("finetune", {})}
    return small(shards, run, finetune=finetune, **sections)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in log(run)]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_objectives_train_and_differ(tiny_shards: Path, tmp_path: Path, pretrained: Path) -> None:
    first = {}
    for objective in ("scheduled_sampling", "bptt", "causal_bptt", "pushforward"):
        run = tmp_path / objective
        settings = recipe(tiny_shards, run, pretrained, finetune={"objective": objective}, train={"steps": 2})
        assert train(settings) == 0
        first[objective] = losses(run)
    # with the truth fed throughout the first step has the smallest errors; the last of three has the largest
    assert first["scheduled_sampling"][0] < first["bptt"][0] < first["pushforward"][0]
    assert first["causal_bptt"][0] < first["bptt"][0]
    windows = {line["windows"] for objective in first for line in log(tmp_path / objective)[:1]}
    assert len(windows) == 1


def test_a_growing_horizon_with_noise_resumes_bit_for_bit_in_pieces(
    tiny_shards: Path, tmp_path: Path, pretrained: Path
) -> None:
    settings = {
        "finetune": {"unroll_start": 1, "unroll_override": {DATASETS[0]: 2}, "checkpoint_activations": True},
        "train": {"steps": 6, "jitter": 0.05},
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(recipe(tiny_shards, whole, pretrained, **settings)) == 0
    stopped = recipe(tiny_shards, broken, pretrained, **settings)
    assert train(replace(stopped, run=replace(stopped.run, stop_at=4))) == 0
    assert train(stopped) == 0
    assert log(whole) == log(broken)
    assert last_weights(whole) == last_weights(broken)
    plain = tmp_path / "plain"
    settings["finetune"] = {**settings["finetune"], "checkpoint_activations": False}
    settings["train"] = {**settings["train"], "micro_batch": 1}
    assert train(recipe(tiny_shards, plain, pretrained, **settings)) == 0
    assert losses(plain) == pytest.approx(losses(whole), rel=1e-4)


def test_jitter_changes_pretraining_too(tiny_shards: Path, tmp_path: Path) -> None:
    assert train(small(tiny_shards, tmp_path / "still", train={"steps": 1})) == 0
    assert train(small(tiny_shards, tmp_path / "noisy", train={"steps": 1, "jitter": 0.3})) == 0
    assert losses(tmp_path / "noisy")[0] > losses(tmp_path / "still")[0]


def test_an_unroll_for_a_dataset_that_is_not_there_is_refused(
    tiny_shards: Path, tmp_path: Path, pretrained: Path
) -> None:
    with pytest.raises(UserError, match=r"unroll_override: expected datasets of this run \(.*\), got 'shear_flow'"):
        train(recipe(tiny_shards, tmp_path / "run", pretrained, finetune={"unroll_override": {"shear_flow": 2}}))


def test_the_rehearsal_takes_the_unroll_with_the_most_tokens(
    tiny_shards: Path, tmp_path: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readers = open_readers(tiny_shards, None, "train")
    settings = recipe(tiny_shards, tmp_path, pretrained, finetune={"unroll_override": {"helmholtz_staircase": 8}})
    grids = {name: reader.manifest.grid for name, reader in readers.items()}
    assert longest_unroll(settings, readers) == ("helmholtz_staircase", 8), grids
    one = {"objective": "pushforward", "unroll_override": {"helmholtz_staircase": 8}}  # holds one model step
    large = max(grids, key=lambda name: grids[name][0] * grids[name][1])
    assert longest_unroll(recipe(tiny_shards, tmp_path, pretrained, finetune=one), readers)[0] == large
    assert longest_unroll(small(tiny_shards, tmp_path), {DATASETS[0]: readers[DATASETS[0]]}) == (DATASETS[0], 1)
    rehearsed = recipe(tiny_shards, tmp_path / "a", pretrained, train={"steps": 2})
    assert train(rehearsed) == 0
    said = capsys.readouterr().err
    assert "the largest unroll fits: 3 model steps of 4 windows of" in said
    silent = recipe(tiny_shards, tmp_path / "b", pretrained, train={"steps": 2}, finetune={"rehearse": False})
    assert train(silent) == 0
    assert "the largest unroll fits" not in capsys.readouterr().err
    assert losses(tmp_path / "a") == losses(tmp_path / "b")  # a rehearsal leaves no trace


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_what_does_not_fit_in_memory_fails_before_the_first_step(
    tiny_shards: Path, tmp_path: Path, pretrained: Path
) -> None:
    script = tmp_path / "limited.py"
    program = """
        import resource, sys, torch
        from pathlib import Path
        from fm.recipe import main
        torch.set_num_threads(1)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 1_500_000_000,) * 2)
        sys.exit(main(sys.argv[1], []))
    """
    script.write_text(textwrap.dedent(program))
    finetune = {"unroll_steps": 6}
    large = recipe(tiny_shards, tmp_path / "run", pretrained, finetune=finetune, train={"global_batch": 2048})
    code, said = finish(Forked(script, str(written(large))))
    assert code == 2, said
    assert "not enough memory for 6 model steps of 2048 windows of" in said
    assert "finetune.checkpoint_activations=true" in said
    assert not log(tmp_path / "run")


def test_the_gate_ends_a_run_that_forgets_and_keeps_the_pretrained_model(
    tiny_shards: Path, tmp_path: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    hot = {"train": {"learning_rate": 0.3, "warmup_steps": 0, "clip": 100.0}, "validation": VALIDATED}
    gated = recipe(tiny_shards, run, pretrained, finetune={"gate": 1.05}, **hot)
    assert train(gated) == 0
    assert len(log(run)) == 2  # the first validation after the pretrained model's
    assert [event["step"] for event in events(run, "validation")] == [0, 2]
    assert "more than finetune.gate=1.05" in events(run, "gate")[-1]["text"]
    assert read_status(run).gate == events(run, "gate")[-1]
    assert events(run, "end")[-1]["text"] == "ended by finetune.gate after step 2"
    best = find_checkpoint(run)
    assert best == run / "best" / "step_00000000"
    before = load_file(find_checkpoint(pretrained) / "ema.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(best / "ema.safetensors").items())
    capsys.readouterr()
    assert train(gated) == 0
    assert "was ended by finetune.gate at step 2; raise it to go on" in capsys.readouterr().out
    wider = recipe(tiny_shards, run, pretrained, finetune={"gate": 1e9}, **hot)
    assert train(wider) == 0
    assert len(log(run)) == 8
    on = tmp_path / "on"
    assert train(recipe(tiny_shards, on, pretrained, finetune={"gate": 1.05, "gate_action": "keep_best"}, **hot)) == 0
    assert len(log(on)) == 8
    assert find_checkpoint(on).name == "step_00000000"


def test_the_gate_keeps_better_rollouts_and_resumes(tiny_shards: Path, tmp_path: Path, pretrained: Path) -> None:
    gated = recipe(tiny_shards, tmp_path / "run", pretrained, finetune={"gate": 2.0}, validation=VALIDATED)
    assert train(replace(gated, run=replace(gated.run, stop_at=5))) == 0
    assert train(gated) == 0
    unbroken = recipe(tiny_shards, tmp_path / "unbroken", pretrained, finetune={"gate": 2.0}, validation=VALIDATED)
    assert train(unbroken) == 0
    best = find_checkpoint(tmp_path / "run")
    assert best.parent == tmp_path / "run" / "best"
    assert find_checkpoint(tmp_path / "unbroken").name == best.name
    said = events(tmp_path / "run", "gate")
    assert [event["step"] for event in said] == [0, 2, 4, 6, 8]
    marked = [event["step"] for event in said if event["text"].endswith("; the best rollouts so far")]
    assert int(best.name.removeprefix("step_")) == max(marked)
    plain = recipe(tiny_shards, tmp_path / "run", pretrained, validation=VALIDATED, train={"steps": 9})
    assert train(plain) == 0  # without the gate, the newest checkpoint is the run's
    assert find_checkpoint(tmp_path / "run").name == "step_00000009"


def test_the_gate_judges_the_end_of_a_run_shorter_than_validation_every(
    tiny_shards: Path, tmp_path: Path, pretrained: Path
) -> None:
    run, validation = tmp_path / "run", {**VALIDATED, "every": 100}
    assert train(recipe(tiny_shards, run, pretrained, finetune={"gate": 2.0}, validation=validation)) == 0
    assert [event["step"] for event in events(run, "gate")] == [0, 8]


def test_a_gate_that_was_not_there_from_the_start_is_refused(
    tiny_shards: Path, tmp_path: Path, pretrained: Path
) -> None:
    free = recipe(tiny_shards, tmp_path / "run", pretrained, validation=VALIDATED)
    assert train(replace(free, run=replace(free.run, stop_at=3))) == 0
    with pytest.raises(UserError, match="the run is at step 3 and began without it, so the pretrained model was not"):
        train(recipe(tiny_shards, tmp_path / "run", pretrained, validation=VALIDATED, finetune={"gate": 1.1}))


def test_a_gate_needs_windows_that_the_rollouts_cover(tiny_shards: Path, tmp_path: Path, pretrained: Path) -> None:
    validation = {**VALIDATED, "protocol": "wavelit@1"}  # 20 steps; the trajectories have 8
    with pytest.raises(UserError, match="no trajectory of the valid split covers a window of the protocol wavelit"):
        train(recipe(tiny_shards, tmp_path / "run", pretrained, finetune={"gate": 2.0}, validation=validation))


def test_a_kill_before_the_end_of_the_last_validation_repeats_it(
    tiny_shards: Path, tmp_path: Path, pretrained: Path
) -> None:
    run = tmp_path / "run"
    gated = recipe(tiny_shards, run, pretrained, finetune={"gate": 2.0}, validation={**VALIDATED, "every": 100})
    assert train(gated) == 0
    lines = (run / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines][-3:] == ["gate", "validation", "end"]  # best is written between
    (run / "events.jsonl").write_text("".join(f"{line}\n" for line in lines[:-3]))  # as a kill in the gate leaves it
    assert train(gated) == 0
    assert [event["step"] for event in events(run, "gate")] == [0, 8]
    assert [event["step"] for event in events(run, "validation")] == [0, 8]


def test_settings_that_nothing_reads_are_told(
    tiny_shards: Path, tmp_path: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ignored = {"objective": "bptt", "causal_eps": 2.0, "forcing": "cosine", "gate_action": "keep_best"}
    assert train(recipe(tiny_shards, tmp_path / "run", pretrained, finetune=ignored, train={"steps": 1})) == 0
    said = capsys.readouterr().err
    assert "finetune.causal_eps is ignored: finetune.objective is bptt, only causal_bptt reads it" in said
    assert "finetune.forcing is ignored: finetune.objective is bptt, only scheduled_sampling reads it" in said
    assert "finetune.gate_action is ignored: finetune.gate is not given" in said
    assert "unroll_growth" not in said


def test_an_unroll_longer_than_all_trajectories_is_refused(tiny_shards: Path, tmp_path: Path, pretrained: Path) -> None:
    long = recipe(tiny_shards, tmp_path / "run", pretrained, finetune={"unroll_steps": 12})
    message = r"12 model steps take 13 frames, but the longest trajectory of \w+ has 9; .*unroll_override\.\w+=8"
    with pytest.raises(UserError, match=message):
        train(long)


def test_a_gate_without_validation_is_refused(tiny_shards: Path, tmp_path: Path, pretrained: Path) -> None:
    with pytest.raises(UserError, match=r"finetune\.gate needs validation\.every > 0, .* and rollout_every = 1"):
        recipe(tiny_shards, tmp_path, pretrained, finetune={"gate": 1.1})
