"""Muon against a singular value decomposition and torch's own Muon; skips, refused steps, runs and checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from whole_runs import DATASETS, last_weights, log, small

from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from fm.config import AdaptSettings, Recipe, TrainSettings
from fm.datasets import build_model, open_split
from fm.distributed import make_accelerator
from fm.lab.hardware import GPUS, AssumedSpeed
from fm.lab.plan import estimated_plan
from fm.model.surrogate import Surrogate
from fm.training.imported_optimizer import make_optimizer
from fm.training.objective import Unroll
from fm.training.optim import (
    GroupedAdamW,
    MuonWithAdamW,
    newton_schulz_flops,
    orthogonalize,
    part_of,
    trunk_matrices,
)
from fm.training.state import spread
from fm.training.trainer import train

SETTINGS = TrainSettings(steps=100, optimizer="muon", learning_rate=1e-3, muon_learning_rate=0.02, weight_decay=0.1)
SHAPES = ((8, 8), (24, 8), (8, 32), (8, 8))
MUON = {"optimizer": "muon", "learning_rate": 3e-3}


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters() -> list[torch.nn.Parameter]:
    """Matrices, and a bias at the end."""
    return [torch.nn.Parameter(random(shape, number)) for number, shape in enumerate([*SHAPES, (5,)])]


def made(weights: list[torch.nn.Parameter], settings: TrainSettings = SETTINGS) -> MuonWithAdamW:
    group: dict[str, Any] = {"datasets": frozenset("ab"), "rate": 1.0, "learns_alone": True, "skipped": False}
    matrices = {**group, "params": weights[:-1], "orthogonal": True}
    return MuonWithAdamW([{**group, "params": weights[-1:], "orthogonal": False}, matrices], settings)


def give_gradients(weights: list[torch.nn.Parameter], step: int) -> None:
    for number, weight in enumerate(weights):
        weight.grad = random(tuple(weight.shape), 100 * step + number)


def test_steps_are_those_of_an_orthogonal_momentum() -> None:
    """In float64: O has the momentum's singular vectors, and singular values that Newton-Schulz brings close to 1."""
    weights = parameters()
    optimizer, buffers = made(weights), [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for step, factor in ((1, 1.0), (2, 1.0), (3, 0.25)):
        give_gradients(weights, step)
        optimizer.set_learning_rate(1e-3 * factor)
        before = [weight.detach().double() for weight in weights]
        optimizer.step()
        for number, (rows, columns) in enumerate(SHAPES):
            gradient = weights[number].grad.double()  # type: ignore[union-attr]
            buffers[number] = 0.95 * buffers[number] + 0.05 * gradient
            left, _, right = torch.linalg.svd(0.95 * buffers[number] + 0.05 * gradient, full_matrices=False)
            rate = 0.02 * factor
            moved = before[number] * (1 - rate * 0.1) - weights[number].detach().double()
            found = left.T @ (moved / (rate * max(1.0, rows / columns) ** 0.5)) @ right.T
            assert (found - torch.diag(found.diagonal())).abs().max() < 1e-3
            assert 0.6 < found.diagonal().min() <= found.diagonal().max() < 1.25
            stored = optimizer.state[weights[number]]["momentum_buffer"]
            assert torch.allclose(stored.double(), buffers[number], atol=1e-6)


def test_a_matrix_does_not_depend_on_the_others_of_its_shape() -> None:
    matrices = random((5, 16, 8), 0)
    together = orthogonalize(matrices)
    assert torch.allclose(together, torch.cat([orthogonalize(one[None]) for one in matrices]), atol=1e-5)
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is new in torch 2.9")
def test_steps_are_those_of_torch() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = made(ours)
    muon = torch.optim.Muon(theirs[:-1], lr=0.02, weight_decay=0.1, momentum=0.95)
    adamw = torch.optim.AdamW(theirs[-1:], lr=1e-3, weight_decay=0.1, fused=True)
    for step in range(1, 5):
        for weights in (ours, theirs):
            give_gradients(weights, step)
        optimizer.set_learning_rate(1e-3)
        for each in (optimizer, muon, adamw):
            each.step()
    for weight, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(weight, reference, atol=4 * 0.02 * 0.02)  # theirs is in bfloat16
    assert torch.equal(ours[-1], theirs[-1])
    for number in range(len(SHAPES)):
        assert torch.equal(
            optimizer.state[ours[number]]["momentum_buffer"], muon.state[theirs[number]]["momentum_buffer"]
        )


def test_nothing_moves_where_the_flag_is_set_and_what_is_skipped_rests() -> None:
    refusing, plain = parameters(), parameters()
    pair = made(refusing), made(plain)
    flags = [0.0, 1.0, 1.0, 0.0, 0.0]
    for step, flag in enumerate(flags, start=1):
        give_gradients(refusing, step)
        if flag:
            refusing[0].grad = torch.full(SHAPES[0], torch.nan)
        kept = [weight.detach().clone() for weight in refusing]
        pair[0].step(found_inf=torch.tensor(flag))
        moved = [not torch.equal(weight, before) for weight, before in zip(refusing, kept, strict=True)]
        assert moved == [not flag] * len(refusing)
        if not flag:
            give_gradients(plain, step)
            pair[1].step()
    assert all(torch.equal(weight, twin) for weight, twin in zip(refusing, plain, strict=True))

    optimizer, weights = pair[0], refusing
    before = [weight.detach().clone() for weight in weights]
    buffer = optimizer.state[weights[0]]["momentum_buffer"].clone()
    optimizer.skip_unused("c")
    optimizer.step()
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    assert torch.equal(optimizer.state[weights[0]]["momentum_buffer"], buffer)
    optimizer.skip_unused("a")
    optimizer.step()
    assert not any(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


def test_the_first_step_may_be_refused() -> None:
    weights = parameters()
    optimizer = made(weights)
    give_gradients(weights, 1)
    optimizer.step(found_inf=torch.tensor(1.0))
    assert all(torch.equal(weight, first) for weight, first in zip(weights, parameters(), strict=True))
    assert not optimizer.state[weights[0]]["momentum_buffer"].any()


def model_of(recipe: Recipe) -> Surrogate:
    registry = load_registry()
    return build_model(recipe, open_split(recipe, registry, "train"), registry)


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = small(tiny_shards, tmp_path / "run", train=MUON, data={"datasets": [*DATASETS, "shear_flow"]})
    model = model_of(recipe)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {"embedding": 1.0, "trunk": 0.25, "head": 0.5}
    for adapt in (None, AdaptSettings(rates=rates)):  # type: ignore[arg-type]
        optimizer = make_optimizer(model, recipe.train, adapt)
        optimizer.set_learning_rate(1.5e-3)  # half of the peak
        groups = optimizer.param_groups
        found = sorted(names[id(one)] for group in groups for one in group["params"])
        assert found == sorted(names.values())
        muon = {names[id(one)] for group in groups if group["orthogonal"] for one in group["params"]}
        kinds = ("input", "attention.query_key", "output", "expand", "contract", "activation", "gate")
        assert muon == {f"blocks.0.block.{kind}.weight" for kind in kinds}
        for group in groups:
            part = part_of(names[id(group["params"][0])])
            factor = rates[part] if adapt else 1.0
            assert group["lr"] == pytest.approx(factor * (0.01 if group["orthogonal"] else 1.5e-3))
    plain = make_optimizer(model, replace(recipe.train, optimizer="adamw"), None)
    assert type(plain) is GroupedAdamW


def test_a_baseline_has_no_matrices_for_muon(tiny_shards: Path, tmp_path: Path) -> None:
    model = model_of(small(tiny_shards, tmp_path / "run"))
    model.blocks = torch.nn.ModuleList()  # as a baseline's
    assert trunk_matrices(model) == []
    with pytest.raises(UserError, match="a baseline has none"):
        make_optimizer(model, SETTINGS, None)


def test_a_run_in_parts_is_the_whole_run_and_stores_one_moment_of_a_matrix(tiny_shards: Path, tmp_path: Path) -> None:
    settings = {**MUON, "steps": 9, "draws": 2, "precision": "float32"}
    whole = small(tiny_shards, tmp_path / "whole", train={**settings, "read_every": 4})
    assert train(whole) == 0
    for stop_at in (4, None):
        assert train(small(tiny_shards, tmp_path / "parts", train=settings, run={"stop_at": stop_at})) == 0
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    assert last_weights(tmp_path / "parts") == last_weights(tmp_path / "whole")
    moments = load_file(tmp_path / "whole/checkpoints/step_00000009/optimizer.safetensors")
    weights = load_file(tmp_path / "whole/checkpoints/step_00000009/model.safetensors")
    by_moment: dict[str, set[str]] = {}
    for key in moments:
        name, _, moment = key.rpartition("/")
        by_moment.setdefault(moment, set()).add(name)
    assert by_moment["momentum_buffer"] == {
        name for name in weights if name.startswith("blocks.") and weights[name].ndim == 2
    }
    assert by_moment["exp_avg"] == by_moment["exp_avg_sq"] == by_moment["step"]
    assert not by_moment["exp_avg"] & by_moment["momentum_buffer"]

    with pytest.raises(UserError, match=r"train\.optimizer: adamw, but .* holds the moments of muon.*=muon, start"):
        train(small(tiny_shards, tmp_path / "parts", train={**settings, "optimizer": "adamw", "steps": 12}))


def test_muon_lowers_the_loss(tiny_shards: Path, tmp_path: Path) -> None:
    settings = {**MUON, "steps": 60}
    recipe = small(tiny_shards, tmp_path / "run", train=settings, data={"datasets": DATASETS[1:]})
    assert train(recipe) == 0
    losses = [line["loss"] for line in log(tmp_path / "run")]
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])


def test_divided_parameters_are_refused(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, accelerator = small(tiny_shards, tmp_path / "run", train=MUON), make_accelerator(1.0)
    objective = Unroll(model_of(recipe), recipe.loss)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"train\.optimizer=muon: Muon needs whole matrices.*launch/ddp\.yaml"):
        spread(accelerator, objective, recipe.train)


def test_a_plan_counts_one_moment_of_a_matrix_and_the_products(tmp_path: Path) -> None:
    speed = AssumedSpeed(GPUS["h200"], 0.5, bf16=True)
    muon, adamw = (
        estimated_plan(small(tmp_path / "none", tmp_path / "run", train={"optimizer": name}), speed)
        for name in ("muon", "adamw")
    )
    numbers = 4 * 16 * 16 + 32 * 16 + 2 * 64 * 16  # of the matrices of a block of width 16
    assert adamw.state_bytes - muon.state_bytes == adamw.checkpoint_bytes - muon.checkpoint_bytes == 4 * numbers
    assert muon.mean("seconds") >= adamw.mean("seconds")
    assert newton_schulz_flops(64, 16) == newton_schulz_flops(16, 64) == 5 * (2 * 2 * 16 * 16 * 64 + 2 * 16**3)
