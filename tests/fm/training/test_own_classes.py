"""Runs with a network, a loss and an optimizer of the user's: resumed, in two processes, guarded, and refused."""

import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked
from handmade import make_inputs, make_spec
from safetensors.numpy import load_file
from whole_runs import DATASETS, last_weights, log, small, spoil, written

from data_pipeline.errors import UserError
from fm.config import LossSettings, Recipe, recipe_to_dict, resolve
from fm.datasets import allow_recipe
from fm.model.imports import VARIABLE, ImportSettings, allow_imports
from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.training.imported_optimizer import ImportedOptimizers
from fm.training.objective import Unroll
from fm.training.trainer import train

MODEL = {"import": "own_classes:Net", "args": {"width": 3}, "wavelet": "haar"}
LOSS = {"import": "own_classes:Loss"}
MOMENTUM = {"import": "own_classes:Momentum", "args": {"lr": 0.05}}


@pytest.fixture(autouse=True)
def _nothing_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def own(
    shards: Path, directory: Path, model: Any = MODEL, loss: Any = LOSS, optimizer: Any = MOMENTUM, **sections: Any
) -> Recipe:
    """A run of seconds of the user's own classes, which may be imported."""
    document = recipe_to_dict(small(shards, directory, **sections))
    document |= {"model": model or document["model"], "loss": loss or document["loss"]}
    document["train"]["optimizer"] = optimizer
    recipe = resolve(document, "the test")
    allow_recipe(recipe)
    return recipe


def test_a_run_in_parts_is_the_whole_run(tiny_shards: Path, tmp_path: Path) -> None:
    """Dropout, moments, and counts that are numbers of Python, from a checkpoint."""
    assert train(own(tiny_shards, tmp_path / "whole")) == 0
    for stop_at in (4, None):
        assert train(own(tiny_shards, tmp_path / "parts", run={"stop_at": stop_at})) == 0
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    assert last_weights(tmp_path / "parts") == last_weights(tmp_path / "whole")
    with pytest.raises(
        UserError, match=r"train\.optimizer: adamw, but .* holds the moments of \{import: own_classes:Momentum"
    ):
        train(own(tiny_shards, tmp_path / "parts", optimizer="adamw", train={"steps": 12}))


def test_the_loss_is_the_imported_one_and_its_terms_are_still_logged(tiny_shards: Path, tmp_path: Path) -> None:
    losses = {}
    for kind in ("windows", "number"):
        loss = {"import": "own_classes:Loss", "args": {"kind": kind}}
        assert train(own(tiny_shards, tmp_path / kind, loss=loss, train={"steps": 3, "micro_batch": 2})) == 0
        losses[kind] = [line["loss"] for line in log(tmp_path / kind)]
    assert losses["windows"] == pytest.approx(losses["number"])
    for args, message in (
        ({"kind": "other"}, r"loss\.import: expected Loss to return a number, or one for each of the 4 windows"),
        ({"weight": 1}, r"loss\.args: expected arguments of own_classes:Loss\(kind: str = 'windows'\)"),
    ):
        with pytest.raises(UserError, match=message):
            train(own(tiny_shards, tmp_path / "wrong", loss={"import": "own_classes:Loss", "args": args}))


def test_a_loss_reads_normalized_fields_in_units_of_the_change() -> None:
    spec = make_spec("shear_flow")
    model = WaveLiTFM(ModelConfig(width=8, depth=1, heads=2, wavelet="haar"), [spec])  # persistence
    state, constants = make_inputs(spec, 16, 16)
    fields, forced = model.denormalize(torch.stack([state, state.roll(1)], dim=1), spec.name), torch.ones(2, 1).bool()
    allow_imports([LOSS["import"]])
    plain, imported = (
        Unroll(model, loss)(fields, constants, forced, spec.name) for loss in (LossSettings(), ImportSettings(**LOSS))
    )
    # In handmade.py, std_delta is 0.2 of std.
    expected = ((state.roll(1) - state - model.moments[spec.name].delta_shift) / 0.2).abs().mean()
    assert imported["loss"].item() == pytest.approx(float(expected), rel=1e-4)
    for term in ("mse", "wavelet_l1"):
        assert torch.equal(imported[term], plain[term])
    imported["loss"].backward()
    assert model.heads[spec.name].linear.bias.grad is not None


def test_two_processes_train_as_one_does(tiny_shards: Path, tmp_path: Path) -> None:
    model = {**MODEL, "args": {"width": 3, "dropout": 0.0}}  # each process draws its own windows' dropout
    settings: dict[str, Any] = {"model": model, "train": {"steps": 4, "global_batch": 4}}
    assert train(own(tiny_shards, tmp_path / "one", **settings)) == 0
    file = written(own(tiny_shards, tmp_path / "two", **settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = []
    for rank in range(2):
        script = tmp_path / f"rank{rank}.yaml"
        script.write_bytes(file.read_bytes())
        processes.append(
            Forked(script, environment={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        )
    for process in processes:
        printed = "".join(process.communicate(timeout=240))
        assert process.returncode == 0, printed
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    weights = [load_file(tmp_path / name / "checkpoints/step_00000004/model.safetensors") for name in ("one", "two")]
    for name, weight in weights[0].items():
        np.testing.assert_allclose(weight, weights[1][name], rtol=1e-4, atol=1e-6)


def test_a_run_is_finetuned_on_rollouts(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(own(tiny_shards, tmp_path / "run", train={"steps": 2})) == 0
    finetune = {"pretrained": str(tmp_path / "run"), "objective": "bptt", "unroll_steps": 2, "gate": 10.0}
    validation = {"every": 2, "windows": 2, "protocol": "thirds"}
    sections: dict[str, Any] = {"finetune": finetune, "train": {"steps": 2}, "validation": validation}
    tuned = small(tiny_shards, tmp_path / "tuned", **sections)  # without the section model
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(UserError, match="own_classes:Net is no code of this project"):
        train(tuned)
    assert train(own(tiny_shards, tmp_path / "named", **sections)) == 0
    assert train(tuned) == 0  # the recipe before named the class
    assert len(log(tmp_path / "named")) == len(log(tmp_path / "tuned")) == 2
    other = {**MODEL, "args": {"width": 4}}
    with pytest.raises(UserError, match="model: the recipe's architecture is not that of"):
        train(own(tiny_shards, tmp_path / "other", model=other, **sections))


def test_a_bad_step_leaves_the_imported_optimizer_as_it_was(tiny_shards: Path, tmp_path: Path) -> None:
    spoiled = spoil(tiny_shards, tmp_path / "spoiled", lambda frames: frames.fill(np.nan))
    recipe = own(
        spoiled,
        tmp_path / "run",
        guard={"action": "skip", "max_events": 100},
        data={"datasets": DATASETS[:1]},
        train={"steps": 12},
    )
    assert train(recipe) == 0
    refused = [line["step"] for line in log(tmp_path / "run") if not np.isfinite(line["loss"] or np.nan)]
    assert 0 < len(refused) < 12
    newest = tmp_path / "run/checkpoints/step_00000012/optimizer.safetensors"
    moments = load_file(newest)
    assert {float(value) for key, value in moments.items() if key.endswith("/count#int")} == {12.0 - len(refused)}
    assert all(np.isfinite(value).all() for value in moments.values())


def test_torchs_muon_updates_the_matrices_and_adamw_the_rest(tiny_shards: Path, tmp_path: Path) -> None:
    muon = {"import": "torch.optim:Muon", "args": {"lr": 0.02, "weight_decay": 1e-5}}
    with pytest.raises(UserError, match=r"torch\.optim:Muon\(.* only supports 2D.*parameters=matrices gives it only"):
        train(own(tiny_shards, tmp_path / "refused", model=None, loss=None, optimizer=muon))
    settings: dict[str, Any] = {"model": None, "loss": None, "train": {"steps": 5}}
    for name, optimizer in {"torch": {**muon, "parameters": "matrices"}, "ours": "muon"}.items():
        assert train(own(tiny_shards, tmp_path / name, optimizer=optimizer, **settings)) == 0
    pair = [
        load_file(tmp_path / name / "checkpoints/step_00000005/optimizer.safetensors") for name in ("torch", "ours")
    ]
    assert pair[0].keys() == pair[1].keys()
    weights = [load_file(tmp_path / name / "checkpoints/step_00000005/model.safetensors") for name in ("torch", "ours")]
    for key, value in weights[0].items():  # torch's orthogonalizes in bfloat16
        np.testing.assert_allclose(value, weights[1][key], atol=5e-3, err_msg=key)
    with pytest.raises(UserError, match=r"parameters=matrices: it updates the matrices of WaveLiT's blocks, and a bas"):
        train(own(tiny_shards, tmp_path / "refused", optimizer={**muon, "parameters": "matrices"}))


def test_muon_alone_trains_a_network_of_matrices(tiny_shards: Path, tmp_path: Path) -> None:
    muon = {"import": "torch.optim:Muon", "args": {"lr": 0.05}}
    recipe = own(tiny_shards, tmp_path / "run", model={"import": "own_classes:TokenNet"}, optimizer=muon)
    assert train(recipe) == 0
    moments = load_file(tmp_path / "run/checkpoints/step_00000008/optimizer.safetensors")
    assert set(moments) == {"network.mix.weight/momentum_buffer"}


def test_optimizers_that_checkpoints_cannot_hold_are_refused(tiny_shards: Path, tmp_path: Path) -> None:
    for args, message in (
        ({"keep": "list"}, "own_classes:Momentum changes history, which a checkpoint cannot hold"),
        ({"keep": "total"}, "own_classes:Momentum changes total of its parameter groups, which a checkpoint"),
        ({"rate": 1}, r"train\.optimizer\.args: expected arguments of own_classes:Momentum\(params.*'rate'"),
        ({"lr": 0.0}, r"train\.optimizer\.import: expected an optimizer with a learning rate lr above 0"),
    ):
        with pytest.raises(UserError, match=message):
            train(own(tiny_shards, tmp_path / "run", optimizer={"import": "own_classes:Momentum", "args": args}))
    with pytest.raises(UserError, match=r"expected an optimizer whose step takes no closure, got torch\.optim:LBFGS"):
        train(own(tiny_shards, tmp_path / "run", optimizer={"import": "torch.optim:LBFGS"}))
    with pytest.raises(UserError, match=r"expected a subclass of torch\.optim.*Optimizer, got own_classes:Net"):
        train(own(tiny_shards, tmp_path / "run", optimizer={"import": "own_classes:Net"}))


def test_a_resumed_count_stays_where_torch_keeps_it() -> None:
    """Unfused Adam wants its counts on the CPU, wherever the parameter is."""
    weight = torch.nn.Parameter(torch.ones(2, 2, device="meta"))
    optimizer = ImportedOptimizers(
        [torch.optim.Adam([{"params": [weight], "rate": 1.0, "skipped": False}])], "a:B", 1e-3
    )
    optimizer.load_moment(weight, "step", torch.tensor(3.0))
    optimizer.load_moment(weight, "exp_avg", torch.ones(2, 2))
    assert [optimizer.state[weight][key].device.type for key in ("step", "exp_avg")] == ["cpu", "meta"]
