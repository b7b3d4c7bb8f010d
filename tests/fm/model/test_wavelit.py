"""The model: embedding and head, switches, names instead of positions, saving and loading."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from handmade import make_inputs, make_spec, stir
from small_models import MIXED, SMALL, small_model

from fm.model.files import EARLIER_CONFIG
from fm.model.loss import wavelit_loss
from fm.model.spec import ModelConfig
from fm.model.wavelets import analysis, synthesis
from fm.model.wavelit import WaveLiTFM


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"wavelet": "haar", "extension": "boundary"},
        {"wavelet": "bior4.4", "levels": 2},
        {"tokenizer": "conv"},
        {"tokenizer": "conv", "levels": 2, "extension": "boundary"},
        {"pyramid_levels": 0},
        {"pyramid_levels": 4},
        {"ridge": "none"},
        {"ridge": "scaled"},
        {"ridge": "none", "attention": "softmax"},
        {"ridge": "least_squares", "padding": "zeros"},
        {"kernel_gate": False, "lepe": False, "cpe": False, "mila": False},
        {"predict": "state"},
        {"pointwise": True},
        {"decoder": "conv", "levels": 2, "decoder_width": 6},
        {"adapter_rank": 3},
        {"adapter_rank": 1, "ridge": "none", "attention": "softmax", "kernel_gate": False, "mila": False},
    ],
)
@pytest.mark.parametrize("grid", [(16, 16), (18, 22)])
def test_every_switch_trains_on_any_even_grid(changes: dict, grid: tuple[int, int]) -> None:
    model = stir(small_model(config=dataclasses.replace(SMALL, **changes)))
    for name in ("rayleigh_benard", "acoustic_scattering_maze"):
        state, constants = make_inputs(model.specs[name], *grid)
        prediction = model(state, constants, name)
        assert prediction.shape == state.shape
        wavelit_loss(prediction, torch.zeros_like(state), model.residual_scale(name)).total.mean().backward()
    for name, parameter in model.named_parameters():
        of_absent = tuple(f"{part}.active_matter" for part in ("heads", "task_vectors", "adapters"))
        absent = name.startswith(of_absent) or name.split(".")[-1] in (
            set(model.specs["active_matter"].state_channels) - {"velocity_x", "velocity_y"}
        )
        assert (parameter.grad is None) == absent, name
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("grid", [(16, 46), (30, 18), (50, 34)])
def test_grids_that_no_power_of_two_divides(grid: tuple[int, int]) -> None:
    for config in (ModelConfig(16, 1, 2, levels=2, pyramid_levels=3), ModelConfig(16, 1, 2, pyramid_levels=4)):
        model = stir(small_model("rayleigh_benard", config=config))
        state, constants = make_inputs(model.specs["rayleigh_benard"], *grid)
        assert torch.isfinite(model(state, constants, "rayleigh_benard")).all()


def test_other_datasets_and_absent_channels_change_no_bit() -> None:
    model = stir(small_model())
    state, constants = make_inputs(model.specs["rayleigh_benard"])
    before = model(state, constants, "rayleigh_benard")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owners = ("active_matter", "acoustic", "D_", "E_", "concentration", "density", "speed_of_sound")
            if any(owner in name for owner in owners):
                parameter.fill_(float("nan"))
    assert torch.equal(model(state, constants, "rayleigh_benard"), before)


def test_present_constants_do_change_the_output() -> None:
    model = stir(small_model())
    state, constants = make_inputs(model.specs["acoustic_scattering_maze"])
    name = "acoustic_scattering_maze"
    assert not torch.allclose(model(state, constants, name), model(state, constants + 1, name))


def test_listing_order_and_other_datasets_change_no_initial_weight() -> None:
    forwards, backwards = small_model(*MIXED), small_model(*reversed(MIXED))
    state = forwards.state_dict()
    assert list(state) == list(backwards.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in backwards.state_dict().items())
    alone = small_model("rayleigh_benard").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in alone.items())
    fields, constants = make_inputs(forwards.specs["rayleigh_benard"])
    outputs = [stir(model)(fields, constants, "rayleigh_benard") for model in (forwards, backwards)]
    assert torch.equal(*outputs)
    other = small_model(*MIXED, seed=1).state_dict()
    assert not torch.equal(other["blocks.0.block.input.weight"], state["blocks.0.block.input.weight"])


def test_untrained_models_predict_the_mean_change_or_the_mean() -> None:
    config = dataclasses.replace(SMALL, predict_override={"rayleigh_benard": "state"})
    model = small_model(config=config)
    state, constants = make_inputs(model.specs["rayleigh_benard"])
    assert torch.equal(model(state, constants, "rayleigh_benard"), torch.zeros_like(state))
    state, constants = make_inputs(model.specs["active_matter"])
    raw = model.denormalize(state, "active_matter")
    change = model.denormalize(model(state, constants, "active_matter"), "active_matter") - raw
    expected = torch.tensor([0.01 * i for i in range(11)]).view(-1, 1, 1).expand_as(change)
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=0)


def test_a_delta_models_output_is_the_change_in_units_of_its_own_deviation() -> None:
    """The residual in those units is what the loss sees: error of the next state times residual_scale."""
    delta = stir(small_model("shear_flow"))
    plain = stir(small_model("shear_flow", config=dataclasses.replace(SMALL, predict="state")))
    state, constants = make_inputs(delta.specs["shear_flow"])
    output = plain(state, constants, "shear_flow")  # the same weights: the bare output of the head
    std, mean_delta = (delta.specs["shear_flow"].moment(key, delta.specs["shear_flow"].state_channels).float()
                       for key in ("std", "mean_delta"))  # fmt: skip
    expected = state + output * 0.2 + mean_delta / std
    torch.testing.assert_close(delta(state, constants, "shear_flow"), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(delta.residual_scale("shear_flow"), torch.full((4, 1, 1), 5.0))
    torch.testing.assert_close(plain.residual_scale("shear_flow"), torch.ones(4, 1, 1))


def test_normalisation_is_the_z_score_and_survives_long_axes() -> None:
    model = small_model()
    raw = 3 * torch.randn(2, 5, 11, 16, 16) + 1
    normal = model.normalize(raw, "active_matter")
    torch.testing.assert_close(normal[:, :, 4], (raw[:, :, 4] - 1.0) / 4.3)
    torch.testing.assert_close(model.denormalize(normal, "active_matter"), raw, atol=1e-5, rtol=1e-5)
    constants = torch.randn(2, 2, 16, 16)
    normal = model.normalize_constants(constants, "acoustic_scattering_maze")
    torch.testing.assert_close(normal[:, 1], (constants[:, 1] - 1.0) / 4.3)  # the fifth channel of the dataset


def test_tiny_deviations_are_floored() -> None:
    spec = make_spec("gray_scott_reaction_diffusion")
    stats = {**spec.stats, "std": {"A": 0.0, "B": 1.0}, "std_delta": {"A": 0.0, "B": 1e-5}}
    model = WaveLiTFM(SMALL, [dataclasses.replace(spec, stats=stats)])
    assert model.normalize(torch.zeros(1, 2, 1, 1), spec.name).flatten().tolist() == pytest.approx([1e4, 0.5])
    assert model.residual_scale(spec.name).flatten().tolist() == pytest.approx([1.0, 100.0])


def test_padding_follows_the_boundary_types() -> None:
    periodic, walls = make_spec("gray_scott_reaction_diffusion"), (("WALL", "WALL"), ("OPEN", "OPEN"))
    closed = dataclasses.replace(periodic, boundary=walls)
    state, constants = make_inputs(periodic)
    zeros = dataclasses.replace(SMALL, padding="zeros")
    outputs = [
        stir(WaveLiTFM(config, [spec]))(state, constants, spec.name)
        for config, spec in ((SMALL, periodic), (SMALL, closed), (zeros, periodic))
    ]
    assert torch.equal(outputs[1], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])


def test_compiles_to_one_graph_per_dataset() -> None:
    model = stir(small_model(config=dataclasses.replace(SMALL, depth=1)))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for name in ("rayleigh_benard", "acoustic_scattering_maze"):
        state, constants = make_inputs(model.specs[name])
        prediction = compiled(state, constants, name)
        torch.testing.assert_close(prediction, model(state, constants, name), atol=1e-4, rtol=1e-4)
        prediction.square().sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


def test_bfloat16_autocast_is_close_and_returns_float32() -> None:
    model = stir(small_model(config=dataclasses.replace(SMALL, predict="state")))
    state, constants = make_inputs(model.specs["active_matter"])
    expected = model(state, constants, "active_matter")
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(state, constants, "active_matter")
    assert prediction.dtype == torch.float32
    error = (prediction - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < 0.05
    prediction.sum().backward()


@pytest.mark.parametrize("changes", [{}, {"decoder": "conv"}, {"tokenizer": "conv"}, {"levels": 2, "wavelet": "haar"}])
def test_wavelets_embedding_and_heads_are_float32_under_bfloat16_autocast(changes: dict) -> None:
    """To the bit: rounding a head's output to bf16 costs more than the paper's errors on three of its datasets."""
    model = stir(small_model(config=dataclasses.replace(SMALL, **changes)))
    state, constants = make_inputs(model.specs["active_matter"])
    seen: dict[str, tuple[tuple, torch.Tensor]] = {}
    for name in ("lifting", "heads.active_matter", "blocks.0.block.expand"):
        keep = lambda module, inputs, output, name=name: seen.update({name: (inputs, output)})  # noqa: E731
        model.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(state, constants, "active_matter")
        coefficients = analysis(state.bfloat16(), model.wavelet, model.levels)
        fields = synthesis(coefficients, model.wavelet, model.levels, state.shape[-2:])
    assert seen.pop("blocks.0.block.expand")[1].dtype == torch.bfloat16
    torch.testing.assert_close(fields, state.bfloat16().float(), atol=1e-5, rtol=0)  # bf16 would be off by 1e-2
    for name, (inputs, output) in dict(seen).items():
        with torch.no_grad():
            exact = model.get_submodule(name)(*(one.float() if torch.is_tensor(one) else one for one in inputs))
        assert output.dtype == torch.float32
        assert torch.equal(output, exact), name


def test_models_of_earlier_versions_load_and_predict_the_same_bits(tmp_path: Path) -> None:
    """Their model.json lacks the keys of later switches."""
    model = stir(small_model())
    model.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    for key in EARLIER_CONFIG:
        del description["config"][key]
    (tmp_path / "model.json").write_text(json.dumps(description))
    loaded = WaveLiTFM.from_pretrained(tmp_path)
    state, constants = make_inputs(model.specs["active_matter"])
    assert torch.equal(loaded(state, constants, "active_matter"), model(state, constants, "active_matter"))


def test_saved_and_loaded_models_agree(tmp_path: Path) -> None:
    model = stir(small_model(config=dataclasses.replace(SMALL, predict_override={"active_matter": "state"})))
    model.save_pretrained(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["model.json", "model.safetensors"]
    loaded = WaveLiTFM.from_pretrained(tmp_path / "a")
    assert loaded.config == model.config
    assert loaded.specs == model.specs
    for name in MIXED:
        state, constants = make_inputs(model.specs[name])
        assert torch.equal(loaded(state, constants, name), model(state, constants, name))
    average = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "a", "ema.safetensors", average)
    key = "lifting.rows.velocity_x"
    assert torch.equal(WaveLiTFM.from_pretrained(tmp_path / "a").state_dict()[key], average[key])
    raw = WaveLiTFM.from_pretrained(tmp_path / "a", "model.safetensors")
    assert torch.equal(raw.state_dict()[key], model.state_dict()[key])


def test_weights_of_another_model_are_refused_by_name_and_shape(tmp_path: Path) -> None:
    small_model("rayleigh_benard").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing heads.shear_flow.linear.bias \(16,\)"):
        small_model("shear_flow").load_weights(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected task_vectors.rayleigh_benard \(16,\)"):
        small_model("shear_flow").load_weights(tmp_path / "model.safetensors")
    wide = small_model("rayleigh_benard", config=dataclasses.replace(SMALL, width=24))
    with pytest.raises(ValueError, match=r"task_vectors.rayleigh_benard is \(16,\), the model's is \(24,\)"):
        wide.load_weights(tmp_path / "model.safetensors")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        WaveLiTFM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights at .*model\.safetensors"):
        WaveLiTFM.from_pretrained(tmp_path)


def test_damaged_descriptions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model\.json in .*save_pretrained"):
        WaveLiTFM.from_pretrained(tmp_path)
    model = small_model("rayleigh_benard")
    model.save_pretrained(tmp_path)
    for change, message in (
        ({"format": 99}, "has format 99, this version reads 2"),
        (
            {"config": {**model.description()["config"], "wdith": 3}},
            r"config of .*: unknown key wdith \(value 3\)",
        ),
        ({"datasets": [{"name": "a"}]}, r"datasets of .*: state_channels is missing"),
    ):
        (tmp_path / "model.json").write_text(json.dumps({**model.description(), **change}))
        with pytest.raises(ValueError, match=message):
            WaveLiTFM.from_pretrained(tmp_path)


def test_adapting_keeps_known_weights_and_draws_the_rest() -> None:
    model = stir(small_model("rayleigh_benard", "active_matter"))
    adapted = model.adapted_to([make_spec("shear_flow"), make_spec("rayleigh_benard")])
    assert list(adapted.specs) == ["rayleigh_benard", "shear_flow"]
    state, constants = make_inputs(model.specs["rayleigh_benard"])
    assert torch.equal(adapted(state, constants, "rayleigh_benard"), model(state, constants, "rayleigh_benard"))
    fresh = small_model("shear_flow").state_dict()
    for name in ("lifting.rows.tracer", "heads.shear_flow.linear.weight", "task_vectors.shear_flow"):
        assert torch.equal(adapted.state_dict()[name], fresh[name])
    other = dataclasses.replace(make_spec("shear_flow"), name="rayleigh_benard")
    with pytest.raises(ValueError, match="dataset rayleigh_benard: the model has the channels"):
        model.adapted_to([other])


def test_statistics_are_not_in_the_weights() -> None:
    assert not any(name.startswith("moments") for name in small_model().state_dict())


def test_wrong_inputs_are_named() -> None:
    model = small_model()
    name = "acoustic_scattering_maze"
    state, constants = make_inputs(model.specs[name])
    for arguments, message in (
        ((state, constants, "euler"), "no dataset 'euler': it knows acoustic_scattering_maze, active_matter"),
        ((state[:, :2], constants, name), r"expected state fields \(B, 3, H, W\) .* got \(2, 2, 18, 22\)"),
        ((state, constants[:, :1], name), r"expected constant fields \(B, 2, H, W\)"),
        ((state, constants[..., :-2], name), "constants on"),
        ((state[..., 1:], constants[..., 1:], name), "even sides of at least 16, got 18 x 21"),
        ((state[..., :14], constants[..., :14], name), "even sides of at least 16, got 18 x 14"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
