"""A dataset learnt alone, then together at other rates: the same however processes share it."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from whole_runs import DATASETS, accelerate, finish, log, small, start

from fm.config import Recipe
from fm.training.optim import part_of
from fm.training.trainer import train

ALONE, STEPS = 3, 7
NEW = "shear_flow"


@pytest.fixture(scope="module")
def pretrained(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pretrained") / "run"
    assert train(small(tiny_shards, run, model={"width": 32, "depth": 2}, train={"steps": 12})) == 0
    return run


def recipe(shards: Path, run: Path, pretrained: Path) -> Recipe:
    sections: dict[str, dict[str, Any]] = {
        "data": {"datasets": [*DATASETS, NEW]},
        "train": {"steps": STEPS, "draws": 2, "clip": 0.1, "weight_decay": 0.1},  # clipped at every step
        "finetune": {"pretrained": str(pretrained), "unroll_steps": 1},
        "adapt": {
            "datasets": [NEW],
            "alone_steps": ALONE,
            "share": 0.5,
            "rates": {"embedding": 0.5, "trunk": 0.1, "head": 1.0},
        },
        "checkpoint": {"every": ALONE, "keep": 5},
    }
    return small(shards, run, **sections)


@pytest.fixture(scope="module")
def alone(tiny_shards: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train(recipe(tiny_shards, run, pretrained)) == 0
    return run


@pytest.mark.parametrize("config", ["fsdp", "deepspeed_zero2"])
def test_two_processes_adapt_as_one_does(
    tiny_shards: Path, tmp_path: Path, pretrained: Path, alone: Path, config: str
) -> None:
    code, output = finish(start(recipe(tiny_shards, tmp_path / "run", pretrained), *accelerate(config)))
    assert code == 0, output
    lines, expected = log(tmp_path / "run"), log(alone)
    assert [line["windows"] for line in lines] == [line["windows"] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-4)
    known = load_file(next((pretrained / "checkpoints").glob("*12")) / "ema.safetensors")
    for step in (ALONE, STEPS):
        for kind in ("model", "ema", "optimizer"):
            file = f"checkpoints/step_{step:08d}/{kind}.safetensors"
            mine, theirs = load_file(tmp_path / "run" / file), load_file(alone / file)
            assert mine.keys() == theirs.keys()  # moments of what rests are in neither
            for name, value in theirs.items():
                # an element whose gradients cancel moves by what the order of summation leaves of them
                scale = float(value.abs().max()) or 1.0
                assert float((mine[name] - value).abs().max()) < 1e-2 * scale, (kind, name)
                if step == ALONE and name in known:
                    assert mine[name].equal(known[name]), (kind, name)
    assert {part_of(name) for name in known} == {"embedding", "trunk", "head"}
