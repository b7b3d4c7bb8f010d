"""Steps on random data: they are the trainer's, their phases add up, and they have the sizes that were asked for."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import make_spec
from whole_runs import small

from fm.config import FinetuneSettings, Recipe
from fm.datasets import new_model
from fm.distributed import make_accelerator
from fm.model.spec import DatasetSpec
from fm.model.surrogate import Surrogate
from fm.training.dry_run import DryRun, StepTimer, resized
from fm.training.objective import Unroll
from fm.training.optim import learning_rate
from fm.training.state import TrainingState
from fm.training.step import PHASES, PendingSteps, train_step

NAME = "shear_flow"
STATS = {key: {"tracer": 1.0} for key in ("mean", "std", "mean_delta", "std_delta")}
SPEC = DatasetSpec(NAME, ("tracer",), (), (("PERIODIC", "PERIODIC"),) * 2, STATS)
GRID = (16, 24)
ACCELERATOR = make_accelerator(1.0)


def model(recipe: Recipe) -> Surrogate:
    return new_model(recipe.model, [SPEC])


def begun(recipe: Recipe) -> TrainingState:
    return TrainingState(recipe, model(recipe), ACCELERATOR, None)


def random_fields(windows: int, frames: int) -> torch.Tensor:
    return torch.randn(windows, frames, 1, *GRID, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return small(tmp_path / "none", tmp_path / "run", train={"precision": "float32"})


def test_a_step_is_forward_backward_clip_adamw_and_average(recipe: Recipe) -> None:
    state, by_hand = begun(recipe), model(recipe)
    before = {name: tensor.clone() for name, tensor in by_hand.named_parameters()}
    DryRun(recipe, SPEC, GRID, ACCELERATOR).step(state)

    coins = torch.ones(4, 1, dtype=torch.bool)
    fields = random_fields(4, 2)
    Unroll(by_hand, recipe.loss)(fields, torch.zeros(4, 0, *GRID), coins, NAME)["loss"].backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), recipe.train.clip)
    last = recipe.train.steps - 1
    rate, decay = learning_rate(last, recipe.train), recipe.train.weight_decay
    torch.optim.AdamW(by_hand.parameters(), lr=rate, betas=recipe.train.betas, weight_decay=decay).step()

    followed = (1 + last) / (10 + last)
    for name, wanted in by_hand.named_parameters():
        found = state.parallel.model.get_parameter(name)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
        torch.testing.assert_close(state.ema.average[name], torch.lerp(found.detach(), before[name], followed))
        assert found.grad is None
    assert any(not torch.equal(before[name], found) for name, found in state.parallel.model.named_parameters())


def test_phases_are_told_apart_and_add_up(recipe: Recipe) -> None:
    found = DryRun(recipe, SPEC, GRID, ACCELERATOR).step(begun(recipe)).read()
    seconds = [getattr(found, phase) for phase in PHASES]
    assert min(seconds[1:]) > 0
    assert sum(seconds) == pytest.approx(found.whole)


def test_a_timer_gives_each_phase_all_its_parts() -> None:
    timer = StepTimer(torch.device("cpu"))
    for phase in ("data", "forward", "backward", "data", "forward", "backward", "optimizer"):
        sum(range(20_000))
        timer.end_phase(phase)
    found = timer.read()
    assert found.whole == pytest.approx(found.data + found.forward + found.backward + found.optimizer)
    timer.end_phase("coffee")
    with pytest.raises(KeyError, match="coffee"):
        timer.read()


@pytest.mark.parametrize("pieces", [{"micro_batch": 1}, {"draws": 2}])
def test_a_step_in_pieces_has_all_its_windows(recipe: Recipe, pieces: dict[str, int], tmp_path: Path) -> None:
    divided = small(tmp_path / "none", tmp_path / "run", train={"precision": "float32", **pieces})
    dry_run = DryRun(divided, SPEC, GRID, ACCELERATOR)
    assert sum(len(batch.windows) for batch in dry_run.batches) == 4
    assert len(dry_run.batches) > 1
    assert all(batch.fields.std() > 0.5 for batch in dry_run.batches)
    state = begun(divided)
    dry_run.step(state)
    for parameter in state.parallel.model.parameters():
        assert torch.isfinite(parameter).all()


def test_sizes_are_those_asked_for(recipe: Recipe, tmp_path: Path) -> None:
    assert (resized(recipe, 3, 2).train.global_batch, resized(recipe, 3, 2).train.batch) == (6, 3)
    longer = replace(resized(recipe, 2), finetune=FinetuneSettings("x", objective="bptt", unroll_steps=3))
    dry_run = DryRun(longer, SPEC, GRID, ACCELERATOR)
    assert dry_run.batches[0].fields.shape == (2, 4, 1, *GRID)
    dry_run.step(begun(longer))
    tuned = small(tmp_path / "none", tmp_path / "run", finetune={"pretrained": "x", "unroll_override": {NAME: 9}})
    assert resized(tuned, 1).window_length(NAME) == 10


def test_a_dry_run_without_an_update_changes_nothing(recipe: Recipe) -> None:
    state = begun(recipe)
    before = {name: tensor.clone() for name, tensor in state.parallel.shards().items()}
    DryRun(recipe, SPEC, GRID, ACCELERATOR).step(state, update=False)
    assert state.step == 0
    assert not state.parallel.moments()
    for name, parameter in state.parallel.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
        assert torch.equal(state.ema.average[name], before[name])


BEST = {  # as recipes/fm_best.yaml
    "data": {"context": 2},
    "model": {"levels": 2, "decoder": "conv", "decoder_width": 4, "pointwise": True, "predict": "delta"},
    "loss": {"mse": 0, "wavelet_l1": 0, "rmse": 1},
    "train": {"optimizer": "muon", "augment": True},
}


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step run on torch's meta device, which computes nothing and otherwise is a device such as a GPU.

    An operation on tensors of two devices raises, and so does reading a value on the host.
    """
    monkeypatch.setattr(ACCELERATOR.state, "device", torch.device("meta"))
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())  # has no meta device
    # The fused AdamW runs there, but is not on torch's list of devices.
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *arguments: None)


@pytest.mark.parametrize(
    ("sections", "finetune"),
    [
        ({}, None),
        (BEST, None),
        ({}, {"objective": "scheduled_sampling", "checkpoint_activations": True}),
        ({}, {"objective": "bptt"}),
        ({}, {"objective": "causal_bptt"}),
        ({}, {"objective": "pushforward"}),
    ],
)
@pytest.mark.usefixtures("on_meta")
def test_the_whole_step_runs_on_the_device(
    tmp_path: Path, sections: dict[str, Any], finetune: dict[str, Any] | None
) -> None:
    recipe = small(tmp_path / "none", tmp_path / "run", **sections)
    spec = make_spec("shear_flow" if sections else "acoustic_scattering_maze")  # symmetries, or constant fields
    if finetune is not None:
        recipe = replace(recipe, finetune=FinetuneSettings("x", unroll_steps=2, **finetune))
    state = TrainingState(recipe, new_model(recipe.model, [spec], context=recipe.data.context), ACCELERATOR, None)
    dry_run, pending = DryRun(recipe, spec, GRID, ACCELERATOR), PendingSteps()

    def take_step() -> None:
        steps = recipe, state, dry_run._division, iter(dry_run.batches), ACCELERATOR, dry_run._step
        pending.append(train_step(*steps, pending.found_inf))

    take_step()
    take_step()  # finds the moments and the halt flag of the first
    moments = [tensor for moments in state.parallel.optimizer.state.values() for tensor in moments.values()]
    assert all(tensor.is_meta for tensor in [*moments, *state.ema.average.values(), pending._found_inf])
    average = next(iter(state.ema.average))
    state.ema.average[average] = torch.zeros(state.ema.average[average].shape)
    with pytest.raises(RuntimeError, match="device"):
        take_step()
