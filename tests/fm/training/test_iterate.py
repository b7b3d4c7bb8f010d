"""Rollouts: the model's own output is its next input, in raw units outside."""

import torch
from handmade import make_inputs, make_spec, stir

from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM


def test_rollout_feeds_predictions_back() -> None:
    spec = make_spec("acoustic_scattering_maze")
    model = stir(WaveLiTFM(ModelConfig(16, 1, 2), [spec]))
    raw, constants = make_inputs(spec)
    frames = list(model.iterate(raw, constants, spec.name, 3))
    assert len(frames) == 3
    assert not any(frame.requires_grad for frame in frames)
    state, fixed = model.normalize(raw, spec.name), model.normalize_constants(constants, spec.name)
    for frame in frames:
        state = model(state, fixed, spec.name)
        assert torch.equal(frame, model.denormalize(state, spec.name))


def test_rollout_of_an_untrained_model_drifts_by_the_mean_change() -> None:
    spec = make_spec("rayleigh_benard")
    model = WaveLiTFM(ModelConfig(16, 1, 2), [spec])
    raw, constants = make_inputs(spec)
    *_, last = model.iterate(raw, constants, spec.name, 4)
    drift = 4 * spec.moment("mean_delta", spec.state_channels).float()
    torch.testing.assert_close(last, raw + drift, atol=1e-5, rtol=1e-5)


def test_no_gradient_mode_does_not_leak_between_steps() -> None:
    spec = make_spec("gray_scott_reaction_diffusion")
    model = WaveLiTFM(ModelConfig(16, 1, 2), [spec])
    for _ in model.iterate(*make_inputs(spec), spec.name, 1):
        assert torch.is_grad_enabled()
