"""What an added dataset starts from: rows of the channel embedding, the features of its head, its task vector."""

from dataclasses import replace
from pathlib import Path

import torch
from extensions import CONFIG, OLD, tensors
from handmade import make_spec, stir

from data_pipeline.registry import Channel, load_folders, load_registry
from data_pipeline.windows.loader import open_readers
from fm.checkpoint import load_pretrained
from fm.datasets import dataset_specs
from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.share.extend import Rows, choose_rows, extend, extend_model, nearest_dataset


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


def test_twins_of_channels_are_written_above_them(tiny_shards: Path, tmp_path: Path, trained: Path) -> None:
    extend(str(trained), ["active_matter", "viscoelastic_instability"], str(tiny_shards), tmp_path / "new", "zero")
    written, known = load_folders([tmp_path / "new" / "cards"]).channel_cards, load_registry().channel_cards
    specs = load_pretrained(tmp_path / "new").specs.values()
    assert set(written) == {name for spec in specs for name in (*spec.state_channels, *spec.constant_channels)}
    assert all(channel == known[name] for name, channel in written.items())
    assert written["C_yx"].duplicate_of == "C_xy"
