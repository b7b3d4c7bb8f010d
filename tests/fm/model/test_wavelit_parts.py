"""The parts of the model beside its blocks: tokens, channel embedding, heads, decoder."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from handmade import make_inputs, make_spec
from small_models import MIXED, SMALL, small_model
from torch.nn import functional as F

from fm.model.loss import wavelit_loss
from fm.model.spec import ModelConfig
from fm.model.wavelets import analysis
from fm.model.wavelit import POINTWISE_GAIN, ChannelEmbedding, ConvDecoder, Head, WaveLiTFM, interpolation


def test_tokens_are_the_wavelet_coefficients() -> None:
    """With everything but lifting and head switched off, state + synthesis(analysis) comes out: the road is exact."""
    spec = make_spec("gray_scott_reaction_diffusion")
    model = WaveLiTFM(ModelConfig(16, 1, 2, pyramid_levels=0, predict="state"), [spec])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.blocks[0].level_weights.fill_(1.0)
        for i, channel in enumerate(spec.state_channels):
            model.lifting.rows[channel][:, 4 * i : 4 * i + 4] = torch.eye(4)
        model.heads[spec.name].linear.weight[:, :8] = torch.eye(8)
    state, constants = make_inputs(spec, 18, 22)
    torch.testing.assert_close(model(state, constants, spec.name), state, atol=1e-5, rtol=0)
    tokens = model.lifting(analysis(state, "bior2.2"), spec.state_channels)
    torch.testing.assert_close(tokens[:, 2, 3, 4:8], analysis(state, "bior2.2")[:, 1, :, 2, 3], atol=1e-6, rtol=0)


def test_a_pointwise_head_is_a_rotation_exactly() -> None:
    """helmholtz_staircase: each step rotates (re, im) by 2 pi / 49 at every point, here in raw units."""
    spec = make_spec("helmholtz_staircase")
    angle = torch.tensor(2 * math.pi / 49, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    mean, std, std_delta = (spec.moment(key, spec.state_channels)[:, 0, 0] for key in ("mean", "std", "std_delta"))
    shift = (turn - torch.eye(2)) @ mean  # a rotation about zero moves the mean
    stats = {**spec.stats, "mean_delta": dict(zip(spec.state_channels, shift.tolist(), strict=True))}
    config = dataclasses.replace(SMALL, pointwise=True)
    model = WaveLiTFM(config, [dataclasses.replace(spec, stats=stats)])
    assert [n for n, _ in model.named_parameters() if "pointwise" in n] == [f"heads.{spec.name}.pointwise"]
    with torch.no_grad():
        model.heads[spec.name].pointwise.copy_((turn - torch.eye(2)) * std / std_delta[:, None] / POINTWISE_GAIN)
    raw = torch.randn(2, 2, 18, 22)
    state, constants = model.normalize(raw, spec.name), torch.randn(2, 1, 18, 22)
    expected = torch.einsum("ij,bjhw->bihw", turn.float(), raw)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            prediction = model.denormalize(model(state, constants, spec.name), spec.name)
        torch.testing.assert_close(prediction, expected, atol=2e-6, rtol=1e-5)


def test_a_pointwise_head_is_off_by_default_and_starts_at_nothing(tmp_path: Path) -> None:
    plain, pointwise = small_model(), small_model(config=dataclasses.replace(SMALL, pointwise=True))
    extra = set(pointwise.state_dict()) - set(plain.state_dict())
    assert extra == {f"heads.{name}.pointwise" for name in MIXED}
    state, constants = make_inputs(plain.specs["rayleigh_benard"])
    assert torch.equal(plain(state, constants, "rayleigh_benard"), pointwise(state, constants, "rayleigh_benard"))
    for model in (plain, pointwise):
        model.save_pretrained(tmp_path / "model")
        assert WaveLiTFM.from_pretrained(tmp_path / "model").config == model.config


def random_lifting() -> ChannelEmbedding:
    torch.manual_seed(0)
    lifting = ChannelEmbedding(["density", "A", "velocity_x", "mask", "pressure"], subbands=4, width=12)
    for parameter in lifting.parameters():
        torch.nn.init.normal_(parameter)
    return lifting


def test_gathering_equals_padding_absent_channels_with_zeros() -> None:
    lifting = random_lifting().double()
    every = list(lifting.rows)
    present = ["velocity_x", "density"]
    coefficients = torch.randn(2, 2, 4, 8, 10, dtype=torch.float64)
    padded = torch.zeros(2, len(every), 4, 8, 10, dtype=torch.float64)
    for i, name in enumerate(present):
        padded[:, every.index(name)] = coefficients[:, i]
    torch.testing.assert_close(lifting(coefficients, present), lifting(padded, every), atol=1e-13, rtol=0)


def test_lifting_is_the_double_sum() -> None:
    lifting = random_lifting()
    coefficients = torch.randn(1, 2, 4, 3, 5)
    expected = torch.zeros(1, 3, 5, 12)
    for c, name in enumerate(["mask", "A"]):
        for s in range(4):
            expected += coefficients[:, c, s, :, :, None] * lifting.rows[name][s]
    torch.testing.assert_close(lifting(coefficients, ["mask", "A"]), expected, atol=1e-5, rtol=1e-5)


def test_an_absent_channel_changes_no_bit_and_gets_no_gradient() -> None:
    lifting = random_lifting()
    coefficients = torch.randn(2, 2, 4, 8, 10)
    before = lifting(coefficients, ["density", "A"])
    before.square().sum().backward()
    assert lifting.rows["mask"].grad is None
    assert lifting.rows["A"].grad is not None
    with torch.no_grad():
        lifting.rows["mask"].fill_(float("nan"))
    assert torch.equal(lifting(coefficients, ["density", "A"]), before)


def test_head_gives_each_channel_its_subbands() -> None:
    spec = make_spec("acoustic_scattering_maze")  # three state channels
    head = Head(ModelConfig(8, 1, 2), spec, context=1)
    torch.nn.init.normal_(head.linear.weight)
    x = torch.randn(2, 5, 7, 8)
    coefficients = head(x)
    assert coefficients.shape == (2, 3, 4, 5, 7)
    row = head.linear.weight[2 * 4 + 1]
    torch.testing.assert_close(coefficients[:, 2, 1], x @ row + head.linear.bias[9], atol=1e-5, rtol=1e-5)


def test_an_untrained_conv_decoder_predicts_persistence_and_can_learn() -> None:
    model = small_model(config=dataclasses.replace(SMALL, decoder="conv"))
    name = "rayleigh_benard"
    state, constants = make_inputs(model.specs[name])
    prediction = model(state, constants, name)
    unmoved = state + model.moments[name].delta_shift
    assert torch.equal(prediction, unmoved)
    target = torch.zeros_like(state)
    wavelit_loss(prediction, target, model.residual_scale(name)).total.mean().backward()
    decoder = model.heads[name].decoder
    assert decoder.out.grad.abs().max() > 0
    with torch.no_grad():
        decoder.out -= 1e-2 * decoder.out.grad
    moved = model(state, constants, name)
    assert not torch.equal(moved, unmoved)


def test_a_conv_decoder_wraps_on_periodic_axes_and_keeps_a_constant_at_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    decoder = ConvDecoder(inputs=2, width=5, channels=2, patch=2)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    inputs, features = torch.randn(1, 2, 16, 20, generator=generator), torch.randn(1, 5, 8, 10, generator=generator)
    found = decoder(inputs, features, (True, False))
    rolled = decoder(inputs.roll(6, -2), features.roll(3, -2), (True, False))
    torch.testing.assert_close(rolled, found.roll(6, -2))
    assert not torch.allclose(decoder(inputs.roll(6, -1), features.roll(3, -1), (True, False)), found.roll(6, -1))
    flat = decoder(torch.ones(1, 2, 16, 20), torch.ones(1, 5, 8, 10), (False, False))
    torch.testing.assert_close(flat, flat[..., :1, :1].expand_as(flat))


@pytest.mark.parametrize("wraps", [True, False])
def test_feature_maps_are_interpolated_between_the_centers_of_patches(wraps: bool) -> None:
    """torch's bilinear interpolation has the same points; here its input is padded by one token at each end."""
    features = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(0))
    padded = F.pad(features, (1, 1), "circular" if wraps else "replicate")
    expected = F.interpolate(padded, scale_factor=4, mode="linear")[..., 4:-4]
    found = features @ interpolation(24, 6, 4, wraps, torch.device("cpu")).t()
    torch.testing.assert_close(found, expected)
    cut = features @ interpolation(22, 6, 4, wraps, torch.device("cpu")).t()  # a grid that ends inside a patch
    torch.testing.assert_close(cut, expected[..., :22])
