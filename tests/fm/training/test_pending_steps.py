"""Losses read back for several steps at once: the run is the one that reads every step, bit for bit."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from whole_runs import DATASETS, last_weights, log, small, spoil

from data_pipeline.errors import UserError
from data_pipeline.windows.reader import Batch
from fm.config import Recipe
from fm.distributed import StopSignal, make_accelerator
from fm.training.runlog import parse_lines
from fm.training.step import PendingStep, PendingSteps, StepMetrics
from fm.training.trainer import Trainer, train


@pytest.fixture(scope="module")
def spoilt(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with two frames, of one trajectory, that are too large for float32 once squared."""
    return spoil(tiny_shards, tmp_path_factory.mktemp("spoilt") / "shards", lambda frames: frames.fill(1e30))


def guarded(shards: Path, directory: Path, read_every: int, action: str, **sections: dict[str, Any]) -> Recipe:
    train_section = {"steps": 12, "read_every": read_every}
    sections = {"checkpoint": {"every": 8, "keep": 100}, **sections}
    guard, data = {"action": action, "max_events": 20}, {"datasets": DATASETS[:1]}
    return small(shards, directory, train=train_section, guard=guard, data=data, **sections)


def refused(directory: Path) -> list[tuple[int, str]]:
    lines, _ = parse_lines((directory / "events.jsonl").read_text())
    return [(line["refused"], line["text"]) for line in lines if line["kind"] == "guard"]


def incidents(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    files = [*directory.glob("incidents/*/model.safetensors"), *directory.glob("incidents/*/ema.safetensors")]
    return {str(file.relative_to(directory)): load_file(file) for file in files}


def test_a_run_does_not_depend_on_how_often_it_is_read(tiny_shards: Path, tmp_path: Path) -> None:
    sections = {"checkpoint": {"every": 9}, "validation": {"every": 10, "windows": 2, "rollouts": 0}}
    for every in (1, 7, 1000):
        settings = {"steps": 24, "read_every": every, "jitter": 0.05}
        assert train(small(tiny_shards, tmp_path / str(every), train=settings, **sections)) == 0
    for every in ("7", "1000"):
        assert log(tmp_path / every) == log(tmp_path / "1")
        assert last_weights(tmp_path / every) == last_weights(tmp_path / "1")


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_refused_steps_are_the_same_ones(spoilt: Path, tmp_path: Path, action: str) -> None:
    """Steps after a refused one, taken before anyone knew, are taken again."""
    for every in (1, 5):
        assert train(guarded(spoilt, tmp_path / str(every), every, action)) == 0
    often, seldom = tmp_path / "1", tmp_path / "5"
    assert refused(seldom) == refused(often) != []
    assert any(number % 5 and number % 8 for number, _ in refused(often))  # one that was not read at once
    assert log(seldom) == log(often)
    assert last_weights(seldom) == last_weights(often)
    before, after = incidents(often), incidents(seldom)
    assert before.keys() == after.keys() != set()
    for name, weights in before.items():
        assert all(torch.equal(weights[key], after[name][key]) for key in weights)


def test_a_broken_step_stops_the_run_before_the_weights_move(spoilt: Path, tmp_path: Path) -> None:
    said = []
    for every in (1, 20):
        with pytest.raises(UserError, match=r"step \d+: the loss of .* is not finite.*The optimizer did not move") as e:
            train(guarded(spoilt, tmp_path / str(every), every, "stop"))
        said.append(str(e.value).replace(str(tmp_path / str(every)), ""))
    assert said[0] == said[1]
    assert log(tmp_path / "20") == log(tmp_path / "1")
    assert incidents(tmp_path / "20").keys() == incidents(tmp_path / "1").keys()


def test_a_spike_is_judged_at_every_step(tiny_shards: Path, tmp_path: Path) -> None:
    """What is usual depends on the steps before."""
    settings = {"steps": 10, "read_every": 4, "compile": "eager"}
    recipe = small(tiny_shards, tmp_path / "run", train=settings, guard={"spike": 50.0})
    trainer = Trainer(recipe, make_accelerator(recipe.train.clip))
    assert _reads_before_steps(trainer, 4) == [False, True, True, True]


def test_nothing_is_read_in_between(tiny_shards: Path, tmp_path: Path) -> None:
    settings = {"steps": 10, "read_every": 4, "compile": "eager"}
    recipe = small(tiny_shards, tmp_path / "run", train=settings, checkpoint={"every": 6})
    trainer = Trainer(recipe, make_accelerator(recipe.train.clip))
    assert _reads_before_steps(trainer, 9) == [number in (5, 7, 9) for number in range(1, 10)]


def test_a_stop_is_seen_at_the_next_read(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = small(tiny_shards, tmp_path / "run", train={"read_every": 3})
    trainer, stop = Trainer(recipe, make_accelerator(recipe.train.clip)), StopSignal()
    stop.received = True
    with trainer.open_record() as trainer.record, trainer.writer:
        assert trainer.train_steps(stop)
    assert trainer.step == 3


def test_what_is_broken_halts_until_the_next_read() -> None:
    steps = {"fine": [1.0, 0.5, 0.5, 2.0, 0.0], "loss": [float("inf"), 0.5, 0.5, 2.0, 0.0]}
    steps["norm"] = [1.0, 0.5, 0.5, float("nan"), 0.0]
    pending = PendingSteps()
    for names, flags in ((("fine", "loss", "fine"), [0.0, 1.0, 1.0]), (("fine", "norm"), [0.0, 1.0])):
        for name, expected in zip(names, flags, strict=True):
            metrics = StepMetrics(torch.tensor(steps[name]))
            assert float(pending.found_inf(metrics)) == expected
            pending.append(PendingStep(1, (), 0.1, 0.0, 0.0, 0.0, metrics))
        assert len(pending.read()) == len(names)


def test_processes_add_their_losses_and_share_norm_and_stop() -> None:
    metrics = StepMetrics.reduce(torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0], [10.0, 20.0, 30.0, 5.0, 1.0]]))
    assert (metrics.losses, metrics.mse, metrics.wavelet_l1) == ([11.0], 22.0, 33.0)
    assert (metrics.grad_norm, metrics.stop_requested) == (5.0, True)


class _Reads(TorchDispatchMode):
    """Counts numbers that leave the device; torch.compile works under no such mode."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.seen[str(function)] += 1
        return function(*args, **(kwargs or {}))


def _reads_before_steps(trainer: Trainer, steps: int) -> list[bool]:
    """Return, for each of the next steps, whether the host read a number from the device since the step before."""
    found: list[bool] = []
    with trainer.open_record() as trainer.record, trainer.writer, _Reads() as reads:
        trainer._batches = _noting(reads, found, trainer)
        while trainer.step < steps:
            trainer.train_steps(StopSignal())
    return found[:steps]


def _noting(reads: _Reads, found: list[bool], trainer: Trainer) -> Iterator[Batch]:
    """Yield the trainer's batches, one a step; add to `found` whether numbers were read since the last one."""
    seen = 0
    for batch in trainer._scheduled_batches():
        found.append(reads.seen.total() > seen)
        seen = reads.seen.total()
        yield batch
