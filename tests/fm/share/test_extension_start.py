"""What an added dataset starts from: rows of the channel embedding, the features of its head, its task vector."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from extensions import CONFIG, OLD, tensors
from handmade import make_spec, stir

from data_pipeline.registry import Channel, load_folders, load_registry
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import Batch
from fm.checkpoint import load_pretrained
from fm.datasets import dataset_specs
from fm.model.spec import ModelConfig
from fm.model.wavelit import POINTWISE_GAIN, WaveLiTFM
from fm.share.donors import copied_features, head_errors, start_from_donors
from fm.share.extend import Rows, choose_rows, extend, extend_model


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
    assert all(torch.equal(tensor[name], fresh[name]) for tensor in (zero, drawn, named) for name in others)


def test_the_donor_is_the_dataset_whose_head_predicts_best() -> None:
    """The twin's next frames are what the head of shear_flow predicts."""
    config = ModelConfig(16, 1, 2, wavelet="haar", decoder="conv", decoder_width=4, pointwise=True)
    old = [make_spec(name) for name in ("acoustic_scattering_maze", "shear_flow")]
    model = stir(WaveLiTFM(config, old, context=2)).eval()
    names = {"tracer": "dye"}
    channels = tuple(names.get(name, name) for name in model.specs["shear_flow"].state_channels)
    stats = {
        key: {names.get(name, name): value for name, value in values.items()} for key, values in old[1].stats.items()
    }
    twin = replace(old[1], name="twin", state_channels=channels, stats=stats)
    extended = extend_model(model, [twin], {"dye": Rows("copy", "tracer")})
    frames = model.denormalize(torch.randn(3, 2, 4, 16, 20), "shear_flow")
    constants = torch.zeros(3, 0, 16, 20)
    following = next(model.iterate(frames, constants, "shear_flow", 1))
    batch = Batch("twin", torch.cat([frames, following[:, None]], dim=1), constants, torch.zeros(3), {})
    errors = head_errors(extended, "twin", batch, {"dye": "tracer"})
    assert errors["shear_flow"] < 1e-3
    assert errors["acoustic_scattering_maze"] > 0.1
    assert head_errors(extended, "twin", batch, {})["shear_flow"] > 0.1  # the dye is not known then
    untrained = extend_model(extended, [replace(twin, name="triplet")], {})
    assert head_errors(untrained, "triplet", replace(batch, dataset="triplet"), {})["twin"] == pytest.approx(1)


def test_an_added_dataset_starts_from_its_donor(tiny_shards: Path) -> None:
    """The head of shear_flow gives half the last change, all others give zeros."""
    names = ["gray_scott_reaction_diffusion", "viscoelastic_instability"]
    readers = open_readers(tiny_shards, [*OLD, *names], "train")
    specs = {spec.name: spec for spec in dataset_specs(readers, load_registry())}
    config = replace(CONFIG, pointwise=True)
    model = WaveLiTFM(config, [specs[name] for name in OLD], context=2)
    channels = len(specs["shear_flow"].state_channels)
    with torch.no_grad():
        pointwise = model.get_parameter("heads.shear_flow.pointwise")
        pointwise[:, channels:] = torch.eye(channels) / (2 * POINTWISE_GAIN)
    extended = extend_model(model, [specs[name] for name in names], {})
    drawn = {name: tensor.clone() for name, tensor in extended.state_dict().items()}
    donors = start_from_donors(extended, {name: readers[name] for name in names}, {})
    assert donors == {"viscoelastic_instability": "shear_flow"}
    changed = {name for name, tensor in extended.state_dict().items() if not torch.equal(tensor, drawn[name])}
    assert changed == {"task_vectors.viscoelastic_instability"}  # the whole head is its last layer
    vectors = [extended.get_parameter(f"task_vectors.{name}") for name in ("viscoelastic_instability", "shear_flow")]
    assert torch.equal(*vectors)


def test_the_features_of_a_head_are_copied_and_its_last_layer_is_zero() -> None:
    config = ModelConfig(16, 1, 2, wavelet="haar", decoder="conv", decoder_width=4, pointwise=True)
    new = make_spec("rayleigh_benard")
    model = stir(WaveLiTFM(config, [make_spec("shear_flow")], context=2))
    extended = extend_model(model, [new], {"buoyancy": Rows("copy", "tracer")})
    before = extended.state_dict()
    head, donor = f"heads.{new.name}.", "heads.shear_flow."
    for aliases in ({"buoyancy": "tracer"}, {}):
        after = {**before, **copied_features(extended, new.name, "shear_flow", aliases)}
        assert torch.equal(after[f"task_vectors.{new.name}"], before["task_vectors.shear_flow"])
        for part in ("linear.weight", "linear.bias", "decoder.bias"):
            assert torch.equal(after[head + part], before[donor + part])
        assert not after[f"{head}decoder.out"].any()
        assert not after[f"{head}pointwise"].any()
        mix, known = after[f"{head}decoder.mix"], before[f"{donor}decoder.mix"]
        theirs = {name: known[:, place] for place, name in enumerate(model.specs["shear_flow"].inputs(2))}
        for place, name in enumerate(new.inputs(2)):
            drawn = before[f"{head}decoder.mix"][:, place]
            channel = name.partition("@")[0]
            copied = theirs.get(name.replace(channel, aliases.get(channel, channel)), drawn)
            assert torch.equal(mix[:, place], copied)
        assert torch.equal(mix[:, -4:], known[:, -4:])  # of the features


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
