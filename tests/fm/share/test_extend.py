"""Extending a trained model on real shards: the old bits stay, the new part trains, the result is an exported model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extensions import CONFIG, OLD, refused, saved, tensors
from safetensors.torch import load_file
from whole_runs import small

from data_pipeline.errors import UserError
from data_pipeline.files import sha256
from data_pipeline.registry import VARIABLE, load_folders, load_registry
from data_pipeline.well.hdf5 import WellFile, split_files
from data_pipeline.windows.loader import open_readers
from fm.checkpoint import find_checkpoint, load_pretrained
from fm.cli import main as fm
from fm.model.files import verify_exported
from fm.model.surrogate import Surrogate
from fm.share.export import export_run
from fm.share.extend import compare, extend, same_bits
from fm.training.trainer import train


def one_step(model: Surrogate, shards: Path, dataset: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The state of a first test frame and what follows it, both normalized."""
    reader = open_readers(shards, [dataset], "test")[dataset]
    state = model.normalize(torch.from_numpy(reader.trajectory_frames(0, 0, 1)), dataset)
    constants = model.normalize_constants(torch.from_numpy(reader.constants(0))[None], dataset)
    with torch.no_grad():
        return state, model(state, constants, dataset)


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("model.json", "model.safetensors")}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pointwise": True, "extension": "boundary"},
        {"tokenizer": "conv", "levels": 2},
        {"decoder": "conv", "decoder_width": 4},
        {"predict": "state", "predict_override": {"shear_flow": "delta", "rayleigh_benard": "delta"}},
    ],
)
def test_old_datasets_keep_every_bit_and_the_new_one_begins_at_the_simplest_prediction(
    tiny_shards: Path, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tiny_shards, tmp_path / "old", replace(CONFIG, **options))
    added = ["rayleigh_benard", "gray_scott_reaction_diffusion"]
    proof = extend(str(source), added, str(tiny_shards), tmp_path / "new", "drawn")
    old, new = load_pretrained(source), load_pretrained(tmp_path / "new")
    assert list(new.specs) == sorted([*OLD, *added])
    for dataset in OLD:
        assert same_bits(one_step(old, tiny_shards, dataset)[1], one_step(new, tiny_shards, dataset)[1])
    before, after = tensors(source), tensors(tmp_path / "new")
    assert all(same_bits(before[name], after[name]) for name in before)
    for dataset in added:
        state, prediction = one_step(new, tiny_shards, dataset)
        expected = torch.zeros_like(state)
        if new.delta[dataset]:
            expected = state + new.moments[dataset].delta_shift
        torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-6)

    said = capsys.readouterr().out
    assert proof.tensors == len(before) + 6 * len(OLD)  # six statistics of each dataset
    assert f"{proof.tensors} of {proof.tensors} tensors of the model are byte for byte the same." in said
    assert [one.dataset for one in proof.steps] == list(OLD)
    assert all(one.fields == "4 windows" and one.equal and one.before == one.after for one in proof.steps)
    assert len({one.before for one in proof.steps}) == len(OLD)
    assert proof.steps[2].values == 4 * one_step(old, tiny_shards, "shear_flow")[0].numel()
    assert all(f"| {one.dataset} " in said and one.before[:12] in said for one in proof.steps)


def test_where_there_are_no_old_shards_the_proof_takes_random_fields(
    tiny_shards: Path, tmp_path: Path, trained: Path
) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "rayleigh_benard").symlink_to(tiny_shards / "rayleigh_benard")
    (tmp_path / "shards" / "shear_flow").symlink_to(tiny_shards / "shear_flow")
    proof = extend(str(trained), ["rayleigh_benard"], str(tmp_path / "shards"), tmp_path / "new", "zero")
    assert [one.fields for one in proof.steps] == ["4 random fields", "4 random fields", "4 windows"]
    grid = load_pretrained(trained).specs["helmholtz_staircase"].grid
    assert grid is not None
    assert proof.steps[1].values == 4 * 2 * grid[0] * grid[1]
    assert all(one.equal for one in proof.steps)


def test_the_proof_finds_one_changed_bit(tiny_shards: Path, trained: Path) -> None:
    old, new = load_pretrained(trained), load_pretrained(trained)
    readers = open_readers(tiny_shards, OLD, "train")
    assert compare(old, new, readers).changed == ()
    with torch.no_grad():
        head = new.get_parameter("heads.shear_flow.linear.bias")
        head[0] = torch.nextafter(head[0], torch.tensor(9.0))
    proof = compare(old, new, readers)
    assert proof.changed == ("heads.shear_flow.linear.bias",)
    assert [one.dataset for one in proof.steps if not one.equal] == ["shear_flow"]
    with pytest.raises(UserError, match=r"not the old one .*: 2 of \d+ comparisons differ \(heads\.shear_flow\.linear"):
        proof.check()
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_neither_the_order_nor_the_number_of_commands_matters(tiny_shards: Path, tmp_path: Path, trained: Path) -> None:
    one, two = "gray_scott_reaction_diffusion", "rayleigh_benard"
    for rows in ("zero", "drawn"):
        made: list[dict[str, bytes]] = []
        for index, groups in enumerate(([[one, two]], [[two, one, two]], [[one], [two]], [[two], [one]])):
            source = trained
            for group in groups:
                out = tmp_path / f"{rows}_{index}_{group[0]}"
                extend(str(source), group, str(tiny_shards), out, rows, seed=1)
                source = out
            made.append(files(source))
        assert made[0] == made[1] == made[2] == made[3]
    lineage = verify_exported(source)["lineage"]
    assert (lineage["added"], lineage["earlier"]["added"]) == ([one], [two])
    assert lineage["earlier"]["earlier"] is None
    assert lineage["earlier"]["model"] == str(trained)
    assert lineage["earlier"]["weights"] == sha256((trained / "model.safetensors").read_bytes())


def test_a_dataset_of_ones_own_is_added_by_its_card(
    burgers: Path, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    shards, card = str(burgers / "shards"), str(burgers / "cards" / "datasets" / "burgers.yaml")
    command = ["extend", str(trained), "--shards", shards, "--out", str(tmp_path / "ten"), "--rows", "nearest"]
    assert fm([*command, "--dataset", card, "--dataset", "rayleigh_benard"]) == 0
    said = capsys.readouterr().out
    start = "a head that gives zeros; its features and the task vector are drawn"  # no head of random weights fits
    assert f"rayleigh_benard: {start}; of its channels the model knows pressure" in said
    assert f"burgers: {start}; of its channels the model knows none" in said
    assert "| burgers_velocity_x | copy of velocity_x (same unit, similarity of names 0.71) |" in said
    made, old = tensors(tmp_path / "ten"), tensors(trained)
    assert torch.equal(made["lifting.rows.burgers_velocity_x"], old["lifting.rows.velocity_x"])
    assert "| drawn (its unit is unknown) |" in " ".join(said.split())
    assert made["lifting.rows.burgers_velocity_y"].any()

    cards = load_folders([tmp_path / "ten" / "cards"])
    assert list(cards.cards) == sorted([*OLD, "burgers", "rayleigh_benard"])
    assert cards.cards["burgers"] == load_registry(burgers / "cards").cards["burgers"]
    lineage = verify_exported(tmp_path / "ten")["lineage"]
    assert lineage["rows"]["burgers_velocity_x"]["copied"] == "velocity_x"
    assert lineage["proof"]["changed"] == []

    # Its card goes along where the folder that it came from is not at hand.
    extend(str(tmp_path / "ten"), ["gray_scott_reaction_diffusion"], shards, tmp_path / "eleven", "zero")
    assert (
        load_folders([tmp_path / "eleven" / "cards"]).cards.keys() == load_pretrained(tmp_path / "eleven").specs.keys()
    )
    (tmp_path / "ten" / "cards" / "datasets" / "burgers.yaml").unlink()
    said = refused(tmp_path / "ten", Path(shards), tmp_path / "other", "gray_scott_reaction_diffusion")
    assert "burgers.yaml: expected" in said
    assert "no such file; fetch or export it again" in said


def test_an_extended_model_is_scored_and_predicts_with_nothing_else_at_hand(
    burgers: Path, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    shards, new = burgers / "shards", tmp_path / "new"
    extend(str(trained), ["burgers"], str(shards), new, "nearest", registry=str(burgers / "cards"))
    assert fm(["evaluate", str(trained), "--out", str(tmp_path / "before")]) == 0
    assert fm(["evaluate", str(new), "--out", str(tmp_path / "after")]) == 0
    before, after = (json.loads((tmp_path / out / "scores.json").read_text()) for out in ("before", "after"))
    assert list(before["datasets"]) == list(OLD)
    assert {name: after["datasets"][name] for name in OLD} == before["datasets"]
    assert after["datasets"]["burgers"]["one_step"]["ratio_to_persistence"] == pytest.approx(1, abs=0.05)

    file, out = split_files(burgers / "well" / "burgers", "test")[0], tmp_path / "predicted.hdf5"
    assert fm(["rollout", str(new), "--input", str(file), "--steps", "3", "--out", str(out)]) == 0
    card = load_folders([new / "cards"]).cards["burgers"]
    with WellFile(file, card) as given, WellFile(out, card) as predicted:
        np.testing.assert_array_equal(predicted.read(0, 0, 1), given.read(0, 0, 1))
        change = predicted.read(0, 3, 4) - given.read(0, 0, 1)
        assert np.ptp(change, axis=(2, 3)).max() < 1e-5  # the mean change of the data, the same everywhere


def test_the_extended_model_trains(
    burgers: Path, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, registry = burgers / "shards", str(burgers / "cards")
    extend(str(trained), ["burgers"], str(shards), tmp_path / "new", "nearest", registry=registry)
    recipe = small(
        shards,
        tmp_path / "run",
        data={"datasets": [*OLD, "burgers"]},
        sampling={"scheme": "weights", "weights": {name: float(name == "burgers") for name in [*OLD, "burgers"]}},
        finetune={"pretrained": str(tmp_path / "new"), "unroll_steps": 1},
        train={"steps": 3},
    )
    monkeypatch.setenv(VARIABLE, registry)
    assert train(recipe) == 0
    after = load_file(find_checkpoint(tmp_path / "run") / "model.safetensors")
    before = tensors(tmp_path / "new")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "heads.burgers.linear.weight" in moved
    assert "lifting.rows.burgers_velocity_x" in moved
    assert not [name for name in moved if name.startswith("heads.") and ".burgers." not in name]

    monkeypatch.delenv(VARIABLE)  # the card comes from the model that the run began with
    exported_run = export_run(tmp_path / "run", tmp_path / "exported")
    assert verify_exported(exported_run)["lineage"] == {"pretrained": str(tmp_path / "new")}
    assert load_folders([exported_run / "cards"]) == load_folders([tmp_path / "new" / "cards"])
    assert "Not trained yet" not in (exported_run / "README.md").read_text()
