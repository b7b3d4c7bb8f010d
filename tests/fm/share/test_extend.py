"""Extending a trained model on real shards: the old bits stay, the new part trains, the result is an exported model."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked
from handmade import make_spec, stir
from handmade_export import exported
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from whole_runs import DATASETS, small

from data_pipeline.errors import UserError
from data_pipeline.files import sha256
from data_pipeline.miniwell.generate import simulate
from data_pipeline.registry import VARIABLE, Channel, load_folders, load_registry
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.format import MANIFEST_NAME, Manifest
from data_pipeline.well.hdf5 import WellFile, split_files
from data_pipeline.windows.loader import open_readers
from fm.checkpoint import find_checkpoint, load_pretrained
from fm.cli import main as fm
from fm.datasets import dataset_specs
from fm.evaluation.evaluate import evaluate_run
from fm.evaluation.trained import TrainedModel
from fm.model.baselines import Baseline, BaselineConfig
from fm.model.files import verify_exported
from fm.model.spec import ModelConfig
from fm.model.surrogate import Surrogate
from fm.model.wavelit import WaveLiTFM
from fm.share.export import export_run
from fm.share.extend import Rows, choose_rows, compare, extend, extend_model, nearest_dataset, same_bits
from fm.training.trainer import train

OLD = ("acoustic_scattering_maze", "helmholtz_staircase", "shear_flow")
CONFIG = ModelConfig(16, 1, 2, wavelet="haar")
CHANNELS = """
burgers_tracer: {description: passive tracer, unit: that of velocity_x at the start}
burgers_velocity_x: {description: velocity along x, unit: dimensionless}
burgers_velocity_y: {description: velocity along y, unit: unknown}
"""
CARD = """
name: burgers
description: Burgers turbulence, in channels of its own
state:
  t0: {tracer: [burgers_tracer]}
  t1: {velocity: [burgers_velocity_x, burgers_velocity_y]}
scalars: [nu]
boundary: {x: [PERIODIC, PERIODIC], y: [PERIODIC, PERIODIC]}
grid: [32, 32]
dt: 0.04
"""


def saved(shards: Path, folder: Path, config: ModelConfig = CONFIG) -> Path:
    """An exported model of OLD whose every parameter is something."""
    specs = dataset_specs(open_readers(shards, OLD, "train"), load_registry())
    return exported(stir(WaveLiTFM(config, specs)), folder, shards)


@pytest.fixture(scope="module")
def trained(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_shards, tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture(scope="module")
def burgers(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cards` of burgers, in channels of its own, and `shards`: burgers', beside the eight's."""
    root = tmp_path_factory.mktemp("burgers")
    (root / "cards" / "datasets").mkdir(parents=True)
    (root / "cards" / "channels.yaml").write_text(CHANNELS)
    (root / "cards" / "datasets" / "burgers.yaml").write_text(CARD)
    simulate(root / "well", preset="tiny", datasets=["burgers"], jobs=1)
    build_shards(root / "well", root / "shards", jobs=1, registry=load_registry(root / "cards"))
    for folder in tiny_shards.iterdir():
        (root / "shards" / folder.name).symlink_to(folder)
    return root


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


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


def test_rows_are_zero_drawn_or_those_named(tiny_shards: Path, tmp_path: Path, trained: Path) -> None:
    added = ["gray_scott_reaction_diffusion", "rayleigh_benard"]
    for name, rows in (("zero", "zero"), ("drawn", "drawn"), ("named", "buoyancy=tracer,B=density")):
        extend(str(trained), added, str(tiny_shards), tmp_path / name, rows, seed=3)
    old = tensors(trained)
    zero, drawn, named = (tensors(tmp_path / name) for name in ("zero", "drawn", "named"))
    specs = dataset_specs(open_readers(tiny_shards, [*OLD, *added], "train"), load_registry())
    fresh = WaveLiTFM(CONFIG, specs, seed=3).state_dict()
    for channel, copied in (("A", None), ("B", "density"), ("buoyancy", "tracer")):
        rows = f"lifting.rows.{channel}"
        assert not zero[rows].any()
        assert torch.equal(drawn[rows], fresh[rows])
        assert torch.equal(named[rows], old[f"lifting.rows.{copied}"] if copied else drawn[rows])
    others = [name for name in zero if name not in old and not name.startswith("lifting.rows")]
    assert {name.split(".")[1] for name in others} == set(added)
    for tensor in (zero, drawn, named):
        assert all(torch.equal(tensor[name], fresh[name]) for name in others if name.startswith("heads."))
        assert torch.equal(tensor["task_vectors.rayleigh_benard"], old["task_vectors.shear_flow"])
    known = {"zero": fresh["task_vectors.gray_scott_reaction_diffusion"]}  # A and B are channels of no other
    known |= {"drawn": known["zero"], "named": old["task_vectors.acoustic_scattering_maze"]}  # density is
    for name, vector in known.items():
        assert torch.equal(tensors(tmp_path / name)["task_vectors.gray_scott_reaction_diffusion"], vector)


def test_the_features_of_a_new_head_are_copies_from_the_dataset_with_the_nearest_channels() -> None:
    config = ModelConfig(16, 1, 2, wavelet="haar", decoder="conv", decoder_width=4, pointwise=True)
    old, new = [make_spec(name) for name in ("acoustic_scattering_maze", "shear_flow")], make_spec("rayleigh_benard")
    model = stir(WaveLiTFM(config, old, context=2))
    extended = extend_model(model, [new], {"buoyancy": Rows("copy", "tracer")})
    before, after = model.state_dict(), extended.state_dict()
    assert torch.equal(after["task_vectors.rayleigh_benard"], before["task_vectors.shear_flow"])
    head, donor = "heads.rayleigh_benard.", "heads.shear_flow."
    for part in ("linear.weight", "linear.bias", "decoder.bias"):
        assert torch.equal(after[head + part], before[donor + part])
    assert not after[f"{head}decoder.out"].any()
    assert not after[f"{head}pointwise"].any()
    mix, known = after[f"{head}decoder.mix"], before[f"{donor}decoder.mix"]
    theirs = {name: known[:, place] for place, name in enumerate(model.specs["shear_flow"].inputs(2))}
    for place, name in enumerate(new.inputs(2)):
        assert torch.equal(mix[:, place], theirs[name.replace("buoyancy", "tracer")])
    assert torch.equal(mix[:, -4:], known[:, -4:])  # of the features
    alone = extend_model(model, [new], {"buoyancy": Rows("drawn")}).state_dict()
    drawn = WaveLiTFM(config, [*old, new], context=2).state_dict()
    places = [place for place, name in enumerate(new.inputs(2)) if name.startswith("buoyancy")]
    assert torch.equal(alone[f"{head}decoder.mix"][:, places], drawn[f"{head}decoder.mix"][:, places])
    assert nearest_dataset(make_spec("gray_scott_reaction_diffusion"), model, {}) is None
    assert nearest_dataset(make_spec("shear_flow"), extended, {}) == model.specs["shear_flow"]
    twin = replace(new, name="convection")
    assert nearest_dataset(twin, extended, {}) == model.specs["shear_flow"]  # rayleigh_benard has learned nothing yet
    assert nearest_dataset(twin, stir(extended), {}) == extended.specs["rayleigh_benard"]


def test_the_nearest_channel_has_the_same_unit_and_a_similar_name() -> None:
    units = {"velocity_x": "m/s", "velocity_y": "m/s", "velocity_xx": "m", "energy": "J", "draft": "unknown"}
    new = {"flow_velocity_y": "m/s", "speed": "m/s", "velocity": "m/s", "energies": "K", "drafts": "unknown"}
    cards = {name: Channel(name, "", unit, None) for name, unit in (units | new).items()}
    chosen = choose_rows("nearest", list(new), list(units), cards)
    assert {name: str(rows) for name, rows in chosen.items()} == {
        "drafts": "drawn (its unit is unknown)",
        "energies": "drawn (no channel in the unit 'K')",
        "flow_velocity_y": "copy of velocity_y (same unit, similarity of names 0.80)",
        "speed": "drawn (in its unit, velocity_x has the most similar name, 0.13 < 0.6)",
        "velocity": "copy of velocity_x (same unit, similarity of names 0.89)",
    }
    only_new = {name: cards[name] for name in new}  # the model's own channels are in no registry at hand
    assert choose_rows("nearest", ["speed"], list(units), only_new)["speed"].origin == "drawn"


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
    start = "a head that gives zeros; its features and the task vector are from shear_flow, whose channels are nearest"
    assert f"rayleigh_benard: {start}; of its channels the model knows pressure" in said
    assert "burgers: a head that gives zeros; its features and the task vector are" in said
    assert "of its channels the model knows none" in said
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


def test_twins_of_channels_are_written_above_them(tiny_shards: Path, tmp_path: Path, trained: Path) -> None:
    extend(str(trained), ["active_matter", "viscoelastic_instability"], str(tiny_shards), tmp_path / "new", "zero")
    written, known = load_folders([tmp_path / "new" / "cards"]).channel_cards, load_registry().channel_cards
    specs = load_pretrained(tmp_path / "new").specs.values()
    assert set(written) == {name for spec in specs for name in (*spec.state_channels, *spec.constant_channels)}
    assert all(channel == known[name] for name, channel in written.items())
    assert written["C_yx"].duplicate_of == "C_xy"


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


def refused(trained: Path, shards: Path, out: Path, *datasets: str, rows: str = "zero", **options: Any) -> str:
    """What is said of a wrong command; nothing may be left of it."""
    with pytest.raises(UserError) as caught:
        extend(str(trained), datasets, str(shards), out, rows, **options)
    assert not [path for path in out.parent.glob("*") if out.name in path.name]
    return str(caught.value)


def test_wrong_datasets_are_refused(burgers: Path, tiny_shards: Path, tmp_path: Path, trained: Path) -> None:
    out = tmp_path / "new"
    assert f"--dataset shear_flow: expected a dataset that {trained} does not know" in (
        said := refused(trained, tiny_shards, out, "rayleigh_benard", "shear_flow")
    )
    assert "acoustic_scattering_maze, helmholtz_staircase, shear_flow" in said
    assert "Did you mean 'rayleigh_benard'?" in refused(trained, tiny_shards, out, "rayleigh_bernard")
    assert "expected the name of a dataset, or its card" in refused(trained, tiny_shards, out, "cards/burgers.yaml")
    loose = tmp_path / "burgers.yaml"
    loose.write_text(CARD)
    assert "got a card that is not in a folder datasets" in refused(trained, tiny_shards, out, str(loose))
    registry = str(burgers / "cards")
    said = refused(trained, tiny_shards, out, "burgers", registry=registry)
    assert "no train shards under" in said
    other = tmp_path / "cards" / "datasets"
    other.mkdir(parents=True)
    (other / "burgers.yaml").write_text(CARD.replace("burgers_", ""))
    said = refused(trained, burgers / "shards", out, "burgers", registry=str(tmp_path / "cards"))
    assert "the shards hold the state channels burgers_tracer" in said


def test_wrong_rows_are_refused(tiny_shards: Path, tmp_path: Path, trained: Path) -> None:
    for rows, said in {
        "zeros": "expected zero, nearest, drawn, or NEW=OLD,... with each unseen channel once, got 'zeros'",
        "buoyancy=": "got 'buoyancy='",
        "buoyancy=tracer,buoyancy=density": "each unseen channel once",
        "bouyancy=tracer": "expected a channel that the model has not seen, got 'bouyancy'. Did you mean 'buoyancy'?",
        "pressure=tracer": "expected a channel that the model has not seen, got 'pressure'",
        "buoyancy=trace": "expected a channel of the model, got 'trace'. Did you mean 'tracer'?",
    }.items():
        assert said in refused(trained, tiny_shards, tmp_path / "new", "rayleigh_benard", rows=rows)


def test_a_folder_that_is_there_or_cannot_be_is_refused(tiny_shards: Path, tmp_path: Path, trained: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="taken: expected a folder that is not there yet"):
        extend(str(trained), ["rayleigh_benard"], str(tiny_shards), tmp_path / "taken", "zero")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(.*\); nothing was kept"):
        extend(str(trained), ["rayleigh_benard"], str(tiny_shards), tmp_path / "file" / "new", "zero")


def test_a_model_without_room_for_more_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("ptwt")
    config = BaselineConfig("wno", {"width": 8, "depth": 2, "levels": 3})
    exported(Baseline(config, [make_spec("shear_flow")]), tmp_path / "wno", tiny_shards)
    said = refused(tmp_path / "wno", tiny_shards, tmp_path / "new", "rayleigh_benard")
    assert "expected a WaveLiT, got a baseline" in said
    assert "(shear_flow)" in said
    assert "no checkpoint found" in refused(tmp_path / "nothing", tiny_shards, tmp_path / "new", "rayleigh_benard")


def test_shards_that_the_model_cannot_take_are_refused(tiny_shards: Path, tmp_path: Path, trained: Path) -> None:
    shutil.copytree(tiny_shards / "rayleigh_benard" / "train", tmp_path / "shards" / "rayleigh_benard" / "train")
    file = tmp_path / "shards" / "rayleigh_benard" / "train" / MANIFEST_NAME
    replace(Manifest.load(file), boundary=(("PERIODIC", "WALL"), ("WALL", "WALL"))).save(file)
    said = refused(trained, tmp_path / "shards", tmp_path / "new", "rayleigh_benard")
    assert "dataset rayleigh_benard: x is periodic at one end only" in said
    assert "Make the shards again" in said

    model = load_pretrained(trained)
    assert isinstance(model, WaveLiTFM)
    bare = replace(make_spec("rayleigh_benard"), stats={})
    with pytest.raises(ValueError, match="dataset rayleigh_benard: no statistic 'mean' for channels buoyancy"):
        extend_model(model, [bare], {"buoyancy": Rows("zero")})


NEW = "shear_flow"
THREE = sorted([*DATASETS, NEW])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def extended(run: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, extended by a dataset. Read only."""
    folder = tmp_path_factory.mktemp("extended") / "models" / "three"
    extend(str(run), [NEW], str(tiny_shards), folder, "nearest")
    return folder


def test_a_run_and_its_export_become_the_same_model(
    run: Path, exported_model: Path, extended: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    extend(str(exported_model), [NEW], str(tiny_shards), tmp_path / "three", "nearest")
    of_run, of_export = tree(extended), tree(tmp_path / "three")
    assert of_run.keys() == of_export.keys()
    assert {name for name in of_run if of_run[name] != of_export[name]} == {"README.md", "artefact.json"}
    ours, theirs = (verify_exported(folder) for folder in (extended, tmp_path / "three"))
    assert (ours["lineage"].pop("model"), theirs["lineage"].pop("model")) == (str(run), str(exported_model))
    assert {**ours, "files": None} == {**theirs, "files": None}


def test_it_is_opened_as_an_exported_model(run: Path, extended: Path, tiny_shards: Path) -> None:
    content = verify_exported(extended)
    assert set(content["files"]) == set(tree(extended)) - {"artefact.json"}
    source, trained = TrainedModel.open(run), TrainedModel.open(extended)
    assert (content["name"], content["step"], content["licence"]) == ("three", 8, "MIT")
    assert content["lineage"]["weights"] == source.weights
    assert (content["lineage"]["added"], content["lineage"]["earlier"]) == ([NEW], None)
    assert trained.report == Path("three_report")
    assert (trained.recipe.data.shards, trained.recipe.data.datasets) == (str(tiny_shards), THREE)
    assert trained.shards.items() > source.shards.items()
    assert trained.shards[NEW] == trained.readers([NEW], "train")[NEW].manifest.digest
    assert sorted(trained.registry().cards) == THREE
    assert all(trained.registry().cards[name] == load_registry().cards[name] for name in THREE)


def test_the_old_datasets_score_as_in_the_runs_report(run: Path, extended: Path, tmp_path: Path) -> None:
    evaluate_run(extended, out=tmp_path / "report")
    before, after = (json.loads((out / "scores.json").read_text()) for out in (run / "report", tmp_path / "report"))
    assert {name: after["datasets"][name] for name in DATASETS} == before["datasets"]


def test_its_card_says_what_was_added_and_not_trained(run: Path, extended: Path) -> None:
    card = ModelCard.load(extended / "README.md")
    assert card.data.license == "mit"
    assert "# three" in card.text
    assert f"It is `{run}`, extended by {NEW}. **Not trained yet: {NEW}.**" in card.text
    assert f"it predicts for {NEW} the given state moved by the data's mean change." in card.text
    assert "None are known" in card.text
    assert f"Before it was extended by {NEW}: width 16" in card.text
    assert '"helmholtz_staircase", steps=10' in card.text


def test_another_extension_keeps_licence_and_lineage(run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "one", license="CC-BY-4.0")
    extend(str(tmp_path / "one"), [NEW], str(tiny_shards), tmp_path / "two", "zero")
    extend(str(tmp_path / "two"), ["active_matter"], str(tiny_shards), tmp_path / "three", "zero")
    content = verify_exported(tmp_path / "three")
    assert content["licence"] == "CC-BY-4.0"
    assert not (tmp_path / "three" / "LICENSE").exists()
    assert content["lineage"]["earlier"] == verify_exported(tmp_path / "two")["lineage"]
    text = (tmp_path / "three" / "README.md").read_text()
    assert (
        f"It is `{tmp_path / 'two'}`, extended by active_matter. **Not trained yet: active_matter and {NEW}.**" in text
    )
    with pytest.raises(UserError, match="is an exported model already"):
        export_run(tmp_path / "three", tmp_path / "four")


def test_what_lies_beside_the_weights_stays_with_them(exported_model: Path, extended: Path, tmp_path: Path) -> None:
    model = WaveLiTFM.from_pretrained(extended)
    shutil.copytree(exported_model, tmp_path / "copy")
    model.save_pretrained(tmp_path / "copy")  # over an export with scores and pictures
    assert tree(tmp_path / "copy") == tree(extended)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path / "copy")
    assert set(tree(tmp_path / "copy")) == {"model.json", "model.safetensors"}


def test_a_pushed_extension_takes_the_place_of_what_it_extended(
    exported_model: Path, extended: Path, tmp_path: Path
) -> None:
    script = tmp_path / "push.py"
    script.write_text('import sys, fm; fm.WaveLiTFM.from_pretrained(sys.argv[1]).push_to_hub("me/model")')
    with HubServer() as hub:
        hub.repositories["me/model"] = [tree(exported_model)]
        environment = {**os.environ, **hub.environment(tmp_path / "cache")}
        process = Forked(script, str(extended), environment=environment)
        _, said = process.communicate()
        assert process.returncode == 0, said
        assert hub.repositories["me/model"][-1] == tree(extended)


def test_a_card_that_says_something_else_now_is_not_extended(
    of_other_cards: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"helmholtz_staircase\.yaml: fields or boundary are not those"):
        extend(str(of_other_cards), [NEW], str(tiny_shards), tmp_path / "three", "zero")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_model_without_a_recipe_is_not_extended(extended: Path, tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    for name in ("model.json", "model.safetensors"):
        shutil.copy(extended / name, tmp_path / "plain")
    with pytest.raises(UserError, match="plain: expected a run, one of its checkpoints, or an exported model"):
        extend(str(tmp_path / "plain"), ["active_matter"], str(tiny_shards), tmp_path / "new", "zero")
