"""Transformed windows: group laws, vectors and tensors against analytic fields, and runs that use train.augment."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade_cards import write
from torch import Tensor
from whole_runs import DATASETS, last_weights, log, rewrite_state, small

from data_pipeline.registry import Card, Field, load_registry
from data_pipeline.symmetries import SYMMETRIES
from data_pipeline.windows.reader import Batch
from fm.datasets import build_model, open_split
from fm.distributed import make_accelerator
from fm.lab.replay import replay
from fm.training.augment import (
    Augmentation,
    ChannelSymmetry,
    Transformation,
    make_augmentation,
    random_transformations,
)
from fm.training.dry_run import DryRun
from fm.training.state import TrainingState
from fm.training.trainer import train

CPU = torch.device("cpu")
CARDS = load_registry().cards
FIELDS = (  # a scalar, a vector, a tensor without any symmetry of its own
    Field("s", 0, "state", ("s",)),
    Field("v", 1, "state", ("v_x", "v_y")),
    Field("T", 2, "state", ("T_xx", "T_xy", "T_yx", "T_yy")),
)
CHANNELS = ChannelSymmetry(FIELDS, CPU)
ELEMENTS = [
    Transformation(transpose=transpose, reflect=(x, y), shift=shift)
    for transpose in (False, True)
    for x in (False, True)
    for y in (False, True)
    for shift in ((0, 0), (5, 0), (3, 7))
]


def analytic(x: Tensor, y: Tensor) -> Tensor:
    """A periodic scalar s, the vector grad s plus a vortex, and the gradient of that vector, (7, H, W), float64."""
    x, y = x.requires_grad_(), y.requires_grad_()
    s = torch.sin(x + 0.3) * torch.cos(2 * y) + 0.5 * torch.sin(x - y)
    stream = torch.cos(x) * torch.sin(y + 0.7)
    (s_x, s_y), (q_x, q_y) = (torch.autograd.grad(one.sum(), (x, y), create_graph=True) for one in (s, stream))
    vector = (s_x + q_y, s_y - q_x)
    tensor = [one for v in vector for one in torch.autograd.grad(v.sum(), (x, y), retain_graph=True)]  # d_j v_i
    return torch.stack([s, *vector, *tensor]).detach()


def coordinates(size: int) -> tuple[Tensor, Tensor]:
    points = 2 * torch.pi * torch.arange(size, dtype=torch.float64) / size
    x, y = torch.meshgrid(points, points, indexing="ij")
    return x.clone(), y.clone()


@pytest.mark.parametrize("by", ELEMENTS)
def test_fields_are_those_of_the_moved_coordinates(by: Transformation) -> None:
    """q' = M q(M^-1 x): the analytic field at the point each grid point comes from, with rotated components."""
    size = 16
    spacing = 2 * torch.pi / size
    x, y = coordinates(size)
    matrix = torch.eye(2, dtype=torch.float64)
    if by.transpose:
        matrix = matrix[[1, 0]]
    for axis in (0, 1):
        if by.reflect[axis]:
            matrix[axis] *= -1
    # x' = M x - (spacing, where reflected, since index i goes to size - 1 - i) + shift
    offset = torch.tensor([spacing * (by.shift[axis] - by.reflect[axis]) for axis in (0, 1)], dtype=torch.float64)
    source = torch.einsum("ji,jxy->ixy", matrix, torch.stack([x, y]) - offset[:, None, None])
    at_source = analytic(source[0].clone(), source[1].clone())
    vector = torch.einsum("ij,jxy->ixy", matrix, at_source[1:3])
    tensor = torch.einsum("ij,kl,jlxy->ikxy", matrix, matrix, at_source[3:].reshape(2, 2, size, size))
    expected = torch.cat([at_source[:1], vector, tensor.reshape(4, size, size)])
    assert torch.allclose(CHANNELS.transform(analytic(x, y), by), expected, atol=1e-12)


@pytest.mark.parametrize("by", ELEMENTS)
def test_the_divergence_of_the_transformed_velocity_is_the_transformed_divergence(by: Transformation) -> None:
    velocity = ChannelSymmetry(FIELDS[1:2], CPU)
    fields = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def divergence(v: Tensor) -> Tensor:  # by central differences, which the symmetries commute with
        return sum(v[axis].roll(-1, axis) - v[axis].roll(1, axis) for axis in (0, 1))[None]

    expected = ChannelSymmetry(FIELDS[:1], CPU).transform(divergence(fields), by)
    assert torch.allclose(divergence(velocity.transform(fields, by)), expected, atol=1e-12)


def test_reflections_and_transposition_undo_themselves_and_shifts_add() -> None:
    fields = torch.randn(3, 7, 8, 8, generator=torch.Generator().manual_seed(0))  # three frames
    for by in (Transformation(reflect=(True, False)), Transformation(reflect=(False, True)), Transformation(True)):
        once = CHANNELS.transform(fields, by)
        assert not torch.equal(once, fields)
        assert torch.equal(CHANNELS.transform(once, by), fields)
    halves = CHANNELS.transform(CHANNELS.transform(fields, Transformation(shift=(3, 1))), Transformation(shift=(7, 2)))
    assert torch.equal(halves, CHANNELS.transform(fields, Transformation(shift=(2, 3))))
    # T R_x T = R_y
    mirrored = CHANNELS.transform(fields, Transformation(transpose=True))
    for by in (Transformation(reflect=(True, False)), Transformation(transpose=True)):
        mirrored = CHANNELS.transform(mirrored, by)
    assert torch.equal(mirrored, CHANNELS.transform(fields, Transformation(reflect=(False, True))))


def test_the_elements_are_drawn_uniformly_and_only_by_the_symmetries_that_are_named() -> None:
    grid, places = (8, 8), np.arange(4000)
    drawn = random_transformations(SYMMETRIES, 0, 5, places, grid)
    for chosen in ("transpose", "reflect_x", "reflect_y", "transpose and reflect_x"):
        values = {"transpose": [one.transpose for one in drawn]}
        values |= {f"reflect_{axis}": [one.reflect[number] for one in drawn] for number, axis in enumerate("xy")}
        names = chosen.split(" and ")
        share = np.mean(np.all([values[name] for name in names], axis=0))
        assert share == pytest.approx(0.5 ** len(names), abs=0.03)
    for axis in (0, 1):
        counts = np.bincount([one.shift[axis] for one in drawn], minlength=8)
        assert counts.shape == (8,)
        assert (abs(counts - 500) < 100).all()
    named = random_transformations(("shift_x", "reflect_y"), 0, 5, places, grid)
    assert [one.shift[0] for one in named] == [one.shift[0] for one in drawn]  # whatever else is named
    assert {(one.transpose, one.reflect[0], one.shift[1]) for one in named} == {(False, False, 0)}
    assert not any(one.transpose for one in random_transformations(SYMMETRIES, 0, 5, places, (8, 16)))
    others = [random_transformations(SYMMETRIES, seed, draw, places, grid) for seed, draw in ((1, 5), (0, 6))]
    assert all(other != drawn for other in others)


def batch_of(card: Card, windows: int, draw: int = 3) -> Batch:
    numbers = torch.Generator().manual_seed(draw)
    fields = torch.randn(windows, 3, len(card.state_channels), 16, 16, generator=numbers)
    constants = torch.randn(windows, len(card.constant_channels), 16, 16, generator=numbers)
    return Batch(card.name, fields, constants, torch.arange(windows), draw)


@pytest.mark.parametrize("name", ["active_matter", "acoustic_scattering_maze"])
def test_a_window_is_transformed_alike_in_any_part_of_the_batch(name: str) -> None:
    """Processes and micro-batches take some of the places; frames and constants move together."""
    augmentation, whole = Augmentation(CARDS.values(), 7, CPU), batch_of(CARDS[name], 8)
    result = augmentation.apply(whole, np.arange(8))
    for places in (np.array([5]), np.array([1, 2, 6])):
        part = replace(whole, fields=whole.fields[places], constants=whole.constants[places])
        found = augmentation.apply(part, places)
        assert torch.equal(found.fields, result.fields[places])
        assert torch.equal(found.constants, result.constants[places])
    drawn = random_transformations(CARDS[name].symmetries, 7, 3, np.arange(8), (16, 16))
    assert len({str(one) for one in drawn}) > 1
    state, constant = ChannelSymmetry(CARDS[name].state, CPU), ChannelSymmetry(CARDS[name].constant, CPU)
    for number, by in enumerate(drawn):
        for frame in range(3):
            assert torch.equal(result.fields[number, frame], state.transform(whole.fields[number, frame], by))
        assert torch.equal(result.constants[number], constant.transform(whole.constants[number], by))


def test_datasets_without_symmetries_keep_their_windows() -> None:
    plain = replace(CARDS["shear_flow"], symmetries=())
    augmentation, batch = Augmentation([plain, CARDS["active_matter"]], 0, CPU), batch_of(plain, 2)
    assert augmentation.apply(batch, np.arange(2)) is batch
    assert "active_matter (shift_x, shift_y, reflect_x, reflect_y, transpose)" in str(augmentation)
    assert "shear_flow" not in str(augmentation)


SETTINGS = {"augment": True, "steps": 6, "global_batch": 8, "draws": 2, "precision": "float32"}
THREE = {"datasets": [*DATASETS, "shear_flow"]}


@pytest.fixture(scope="module")
def run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("augment") / "run"
    sections = {"train": SETTINGS, "data": THREE, "checkpoint": {"every": 2, "keep": 10}}
    assert train(small(tiny_shards, directory, **sections)) == 0
    return directory


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in log(directory)]


def test_windows_are_those_of_the_plain_run_and_other_losses(tiny_shards: Path, run: Path, tmp_path: Path) -> None:
    plain = small(tiny_shards, tmp_path / "plain", train={**SETTINGS, "augment": False}, data=THREE)
    assert train(plain) == 0
    assert [line["windows"] for line in log(run)] == [line["windows"] for line in log(tmp_path / "plain")]
    assert losses(run)[0] != losses(tmp_path / "plain")[0]


def test_a_run_in_parts_is_the_whole_run_and_micro_batches_change_nothing(
    tiny_shards: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stop_at in (3, None):
        if stop_at is None:  # as if the card had changed since
            file = tmp_path / "parts/checkpoints/step_00000003/state.json"
            symmetries = json.loads(file.read_text())["symmetries"]
            symmetries["shear_flow"].remove("shift_x")
            rewrite_state(file, symmetries=symmetries)
        parts = {"train": SETTINGS, "data": THREE, "checkpoint": {"every": 2}, "run": {"stop_at": stop_at}}
        assert train(small(tiny_shards, tmp_path / "parts", **parts)) == 0
    changed = "changed since: symmetries.shear_flow: ['shift_y', 'reflect_y'] -> ['shift_x', 'shift_y', 'reflect_y']"
    assert changed in capsys.readouterr().out
    assert losses(tmp_path / "parts") == losses(run)
    assert last_weights(tmp_path / "parts") == last_weights(run)
    pieces = small(tiny_shards, tmp_path / "pieces", train={**SETTINGS, "micro_batch": 1}, data=THREE)
    assert train(pieces) == 0
    assert losses(tmp_path / "pieces") == pytest.approx(losses(run), rel=1e-4)


def test_a_replay_transforms_as_the_run_did(run: Path) -> None:
    result = replay(run, 5)
    assert sum(draw.loss for draw in result.draws) / len(result.draws) == pytest.approx(result.logged, rel=1e-6)


def test_dry_runs_transform_random_windows(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = small(tiny_shards, tmp_path / "none", train=SETTINGS, data=THREE)
    registry, accelerator = load_registry(), make_accelerator(1.0)
    model = build_model(recipe, open_split(recipe, registry, "train"), registry)
    state = TrainingState(recipe, model, accelerator, None)
    assert state.augmentation is not None
    for spec in model.specs.values():
        assert DryRun(recipe, spec, (16, 16), accelerator).step(state).read().data > 0


def test_a_run_without_any_symmetry_goes_on_and_says_so(tiny_shards: Path, tmp_path: Path) -> None:
    card = """
name: burgers
description: another name for nothing
state: {t0: {temperature: [temperature]}}
boundary: {x: [WALL, OPEN], y: [WALL, WALL]}
grid: [32, 16]
dt: 0.5
"""
    write(tmp_path / "cards", card, "temperature: {description: temperature, unit: none}\n")
    data = {"registry": str(tmp_path / "cards")}
    made = make_augmentation(small(tiny_shards, tmp_path / "run", train=SETTINGS, data=data), ["burgers"], CPU)
    assert made is not None
    assert str(made).startswith("train.augment changes no window: no card of this run names symmetries")
    batch = replace(batch_of(CARDS["active_matter"], 2), dataset="burgers")
    assert made.apply(batch, np.arange(2)) is batch
