"""Hard constraints: flows with known parts, models that meet them through a rollout, data that do not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade import make_spec, stir
from torch import Tensor

from data_pipeline.registry import load_registry
from data_pipeline.windows.loader import open_readers
from fm.config import FIRST_LINE, LAST_LINE, load_recipe
from fm.datasets import build_model, dataset_specs, open_split, with_constraints
from fm.model.constraints import solenoidal
from fm.model.spec import DatasetSpec, ModelConfig
from fm.model.wavelit import WaveLiTFM

SMALL = ModelConfig(width=16, depth=1, heads=2, constraints=True)
CONSTRAINED = ("active_matter", "helmholtz_staircase", "rayleigh_benard", "shear_flow", "turbulent_radiative_layer_2D")


def grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cell centers of a domain of length 2 along x and 1 along y, (H, 1) and (1, W)."""
    return 2 * (np.arange(height)[:, None] + 0.5) / height, (np.arange(width)[None] + 0.5) / width


def spectral_divergence(velocity: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """The divergence of a doubly periodic velocity (..., 2, H, W) by numpy's transforms, one axis at a time."""
    parts = []
    for axis in (0, 1):
        field = velocity[..., axis, :, :]
        n = field.shape[axis - 2]
        k = 2 * np.pi * np.fft.fftfreq(n, spacing[axis])
        k[n // 2] *= n % 2  # the shortest wave has no derivative
        shape = (n, 1) if axis == 0 else (1, n)
        parts.append(np.fft.ifft(1j * k.reshape(shape) * np.fft.fft(field, axis=axis - 2), axis=axis - 2).real)
    return parts[0] + parts[1]


@pytest.mark.parametrize(("height", "width"), [(32, 24), (18, 22), (33, 24)])
def test_a_random_velocity_loses_its_divergence_and_keeps_its_mean(height: int, width: int) -> None:
    velocity = torch.randn(3, 2, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spacing = (0.1, 0.25)
    found = solenoidal(velocity, spacing, (False, False))
    before, after = (np.abs(spectral_divergence(part.numpy(), spacing)).max() for part in (velocity, found))
    assert after < 1e-6 * before
    torch.testing.assert_close(found.mean((-2, -1)), velocity.mean((-2, -1)))
    torch.testing.assert_close(solenoidal(found, spacing, (False, False)), found)
    assert found.square().sum() < velocity.square().sum()  # a projection


@pytest.mark.parametrize("walls", [(False, False), (False, True), (True, False), (True, True)])
def test_of_a_flow_and_a_gradient_the_flow_remains(walls: tuple[bool, bool]) -> None:
    """The flow has a stream function that is 0 at walls; the potential's derivative is 0 there."""
    x, y = grid(32, 24)
    p, q = 2 * np.pi / 2, 2 * np.pi  # wavenumbers of the domain; half of them between walls
    p, q = (k / 2 if wall else k for k, wall in zip((p, q), walls, strict=True))
    flow = np.stack([q * np.sin(p * x) * np.cos(q * y), -p * np.cos(p * x) * np.sin(q * y)])
    gradient = np.stack([-p * np.sin(p * x) * np.cos(q * y), -q * np.cos(p * x) * np.sin(q * y)])
    spacing = (2 / 32, 1 / 24)
    found = solenoidal(torch.from_numpy(flow + gradient), spacing, walls)
    np.testing.assert_allclose(found.numpy(), flow, atol=1e-10)


def constrained_specs(shards: Path, names: tuple[str, ...] = CONSTRAINED) -> tuple[list[DatasetSpec], dict]:
    registry, readers = load_registry(), open_readers(shards, list(names), "train")
    specs = dataset_specs(readers, registry)
    return [with_constraints(spec, registry.card(spec.name), readers[spec.name]) for spec in specs], readers


def states_of(model: WaveLiTFM, readers: dict, name: str, steps: int) -> tuple[Tensor, Tensor]:
    """The first frame (C, H, W) and a rollout (steps, C, H, W) in physical units."""
    frames = torch.from_numpy(readers[name].trajectory_frames(0, 2, 1))
    constants = torch.from_numpy(readers[name].constants(0))[None]
    rollout = torch.cat(list(model.iterate(frames, constants, name, steps)))
    return frames[0], rollout


def test_rollouts_keep_what_the_cards_state(tiny_shards: Path) -> None:
    specs, readers = constrained_specs(tiny_shards)
    free, held = (stir(WaveLiTFM(replace(SMALL, constraints=on), specs)).eval() for on in (False, True))

    def broken(name: str, measure) -> tuple[float, float]:
        """How far the last of four steps is from the first frame, without and with constraints."""
        found = []
        for model in (free, held):
            first, rollout = states_of(model, readers, name, 4)
            found.append(float((measure(rollout[-1]) - measure(first)).abs().max()))
        return found[0], found[1]

    without, with_ = broken("shear_flow", lambda state: state[[0, 2, 3]].mean((-2, -1)))
    assert with_ < 1e-5 < 1e-3 < without
    without, with_ = broken("helmholtz_staircase", lambda state: state.square().sum(0).mean())
    assert with_ < 1e-4 * without
    channels = {spec.name: spec.state_channels for spec in specs}
    for name in ("shear_flow", "active_matter"):
        spec = next(spec for spec in specs if spec.name == name)
        assert spec.spacing is not None
        places = [channels[name].index(f"velocity_{axis}") for axis in "xy"]
        left = [
            np.abs(spectral_divergence(states_of(model, readers, name, 4)[1][:, places].numpy(), spec.spacing)).max()
            for model in (free, held)
        ]
        assert left[1] < 1e-3 * left[0]
    density = channels["turbulent_radiative_layer_2D"].index("density")
    lowest = [
        states_of(model, readers, "turbulent_radiative_layer_2D", 40)[1][:, density].min() for model in (free, held)
    ]
    assert lowest[0] < 0 <= lowest[1]


def test_true_states_hardly_move(tiny_shards: Path) -> None:
    """Constraints that the data meet cost nothing: each changes a true next state by a small part of one step."""
    specs, readers = constrained_specs(tiny_shards)
    model = WaveLiTFM(SMALL, specs)
    for spec in specs:
        assert spec.conserved or spec.ranges
        pair = torch.from_numpy(readers[spec.name].trajectory_frames(0, 3, 2))
        last, state = model.normalize(pair, spec.name)[:, None]
        moved = model.constraints[spec.name](state, last) - state
        assert moved.square().mean().sqrt() < 0.1 * (state - last).square().mean().sqrt()


def test_training_goes_through_the_constraints(tiny_shards: Path) -> None:
    specs, readers = constrained_specs(tiny_shards, ("shear_flow",))
    model = stir(WaveLiTFM(SMALL, specs))
    frames = model.normalize(torch.from_numpy(readers["shear_flow"].trajectory_frames(0, 2, 1)), "shear_flow")
    constants = torch.zeros(1, 0, *frames.shape[-2:])
    model(frames, constants, "shear_flow").square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert model.heads["shear_flow"].linear.weight.grad.abs().max() > 0


def test_constraints_that_the_data_do_not_meet_are_left_out(
    tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry, readers = load_registry(), open_readers(tiny_shards, ["shear_flow"], "train")
    spec, card = dataset_specs(readers, registry)[0], registry.card("shear_flow")
    whole = with_constraints(spec, card, readers["shear_flow"])
    assert {kind for kind, _ in whole.conserved} == {"mean", "divergence"}
    assert set(whole.ranges) == {"tracer"}
    assert "model.constraints of shear_flow: mean of tracer" in capsys.readouterr().out

    stretched = with_constraints(replace(spec, spacing=(1.0, 5.0)), card, readers["shear_flow"])
    assert {kind for kind, _ in stretched.conserved} == {"mean"}
    assert (
        "leaves out the divergence of velocity_x, velocity_y of shear_flow: it would change" in capsys.readouterr().out
    )

    unknown = with_constraints(replace(spec, spacing=None), card, readers["shear_flow"])
    assert {kind for kind, _ in unknown.conserved} == {"mean"}
    assert "needs two channels, the spacing of the grid" in capsys.readouterr().out

    narrow = replace(card, ranges={"tracer": (-1e-3, 1e-3)}, conserved=())
    assert not with_constraints(spec, narrow, readers["shear_flow"]).ranges


def test_a_model_without_constraints_has_none_whatever_the_card(tiny_shards: Path) -> None:
    specs, readers = constrained_specs(tiny_shards, ("shear_flow",))
    plain = stir(WaveLiTFM(replace(SMALL, constraints=False), specs)).eval()
    bare = stir(WaveLiTFM(replace(SMALL, constraints=False), dataset_specs(readers, load_registry()))).eval()
    _, found = states_of(plain, readers, "shear_flow", 2)
    _, expected = states_of(bare, readers, "shear_flow", 2)
    assert torch.equal(found, expected)


def test_the_constraints_are_saved_with_the_model(tiny_shards: Path, tmp_path: Path) -> None:
    specs, readers = constrained_specs(tiny_shards)
    model = stir(WaveLiTFM(SMALL, specs)).eval()
    model.save_pretrained(tmp_path)
    loaded = WaveLiTFM.from_pretrained(tmp_path)
    assert loaded.specs == model.specs
    for name in ("shear_flow", "turbulent_radiative_layer_2D"):
        assert torch.equal(states_of(loaded, readers, name, 2)[1], states_of(model, readers, name, 2)[1])


def test_finetuning_keeps_the_constraints_of_known_datasets_and_adds_those_of_new_ones(
    tiny_shards: Path, tmp_path: Path
) -> None:
    specs, _ = constrained_specs(tiny_shards, ("shear_flow",))
    WaveLiTFM(SMALL, [replace(specs[0], ranges={"tracer": (-1.5, None)})]).save_pretrained(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"{FIRST_LINE}\nrun: {{name: again}}\ndata: {{shards: {tiny_shards}}}\nfinetune: {{pretrained: {tmp_path}}}\n"
        f"train: {{steps: 1, global_batch: 1}}\n{LAST_LINE}\n"
    )
    names = "data.datasets=[shear_flow, rayleigh_benard]"
    loaded, registry, lines = load_recipe(recipe, [names]), load_registry(), []
    model = build_model(loaded, open_split(loaded, registry, "train"), registry, lines.append)
    assert model.specs["shear_flow"].ranges == {"tracer": (-1.5, None)}
    assert len(lines) == 1
    assert lines[0].startswith("model.constraints of rayleigh_benard: ")
    assert set(model.constraints) == {"shear_flow", "rayleigh_benard"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conserved": (("mean", ("nothing",)),)}, "'nothing', which is no state channel"),
        ({"ranges": {"nothing": (0, None)}}, "'nothing', which is no state channel"),
        ({"conserved": (("divergence", ("velocity_x", "velocity_y")),)}, "the spacing of the grid"),
        ({"conserved": (("curl", ("velocity_x",)),)}, "mean_square"),
    ],
)
def test_impossible_constraints_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make_spec("shear_flow"), **changes)
