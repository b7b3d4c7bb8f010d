"""pdearena_navier_stokes: the box grid against a dense solve and mac.py's own walls, and the laws of rising smoke."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from small_cases import rngs, tiny

from data_pipeline.miniwell import pdearena_smoke
from data_pipeline.miniwell.mac import Arrays
from data_pipeline.miniwell.pdearena_smoke import LENGTH, BoxGrid, advance, smoke_tendency, start, velocity_tendency
from data_pipeline.registry import load_registry
from data_pipeline.well.hdf5 import WellFile

BOX = BoxGrid(16, 16, LENGTH, LENGTH)
Y = BOX.y[None, None, :]


def enclosed() -> tuple[np.ndarray, np.ndarray]:
    """Rough random velocities without divergence, zero on the walls that they are normal to."""
    psi = np.zeros((2, 17, 17))
    psi[:, 1:-1, 1:-1] = np.random.default_rng(0).standard_normal((2, 15, 15))
    return np.diff(psi, axis=2)[:, :-1] / BOX.dy, -np.diff(psi, axis=1) / BOX.dx


def at_rest(smoke: np.ndarray) -> Arrays:
    return smoke, np.zeros_like(smoke), np.zeros((len(smoke), 16, 17))


def transposed(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same flow with x and y exchanged; the last column of faces along x is not stored, and zero."""
    return v[:, :, :-1].swapaxes(1, 2), np.pad(u, ((0, 0), (0, 1), (0, 0))).swapaxes(1, 2)


def test_poisson_agrees_with_a_dense_solve() -> None:
    grid = BoxGrid(6, 5, lx=1.5, ly=2.0)
    in_x, in_y = (
        np.diag(np.ones(count - 1), 1) + np.diag(np.ones(count - 1), -1) - np.diag([1.0, *[2.0] * (count - 2), 1.0])
        for count in (6, 5)
    )
    laplacian = np.kron(in_x, np.eye(5)) / grid.dx**2 + np.kron(np.eye(6), in_y) / grid.dy**2
    source = np.random.default_rng(1).standard_normal((3, 6, 5))
    dense = np.linalg.lstsq(laplacian, (source - source.mean(axis=(1, 2), keepdims=True)).reshape(3, 30).T, rcond=None)
    np.testing.assert_allclose(grid.poisson(source), dense[0].T.reshape(3, 6, 5), atol=1e-13)


def test_projection_leaves_no_divergence_and_nothing_passes_the_walls() -> None:
    rng = np.random.default_rng(2)
    u, v = rng.standard_normal((2, 16, 16)), np.zeros((2, 16, 17))
    u[:, 0], v[:, :, 1:-1] = 0, rng.standard_normal((2, 16, 15))
    projected_u, projected_v = BOX.project(u, v)
    assert np.abs(BOX.divergence(projected_u, projected_v)).max() < 1e-13
    assert not projected_u[:, 0].any()
    assert not projected_v[:, :, [0, -1]].any()
    removed = np.sum((u - projected_u) * projected_u) + np.sum((v - projected_v) * projected_v)
    assert abs(removed) < 1e-11  # orthogonal to divergence-free fields


def test_walls_in_x_are_the_walls_in_y() -> None:
    """Exchanging x and y exchanges the tendencies: mac.py's walls in y are the truth for those in x."""
    u, v = enclosed()
    smoke = np.random.default_rng(3).random((2, 16, 16))
    move = partial(velocity_tendency, BOX, np.zeros_like(smoke), nu=0.3, buoyancy=0.0)
    du, dv = move(u=u, v=v)
    swapped = move(**dict(zip("uv", transposed(u, v), strict=True)))
    for found, expected in zip(swapped, transposed(du, dv), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12)
    carried = smoke_tendency(BOX, smoke.swapaxes(1, 2), *transposed(u, v))
    np.testing.assert_allclose(carried, smoke_tendency(BOX, smoke, u, v).swapaxes(1, 2), atol=1e-13)


def test_inviscid_flow_in_the_box_keeps_its_kinetic_energy() -> None:
    u, v = enclosed()
    du, dv = velocity_tendency(BOX, np.zeros_like(u), u, v, nu=0.0, buoyancy=0.5)
    size = np.sum(np.abs(u * du), axis=(1, 2))
    assert np.all(np.abs(np.sum(u * du, axis=(1, 2)) + np.sum(v * dv, axis=(1, 2))) < 1e-13 * size)


def test_smoke_rises_and_even_smoke_is_held_by_the_pressure() -> None:
    blob = np.exp(-((BOX.x[None, :, None] - 16) ** 2 + (Y - 12) ** 2) / 20)
    smoke, _, v = advance(BOX, at_rest(blob), 0.5, 6.0)
    assert v[0, 7:9, 4:9].min() > 0.1
    assert v[0, 0, 4:9].max() < 0, "the fluid comes down along the side walls"
    assert (smoke * Y).sum() > (blob * Y).sum() * 1.02
    sinking = advance(BOX, at_rest(blob[:, :, ::-1]), -0.5, 6.0)  # turned over, with gravity turned over
    np.testing.assert_allclose(sinking[0], smoke[:, :, ::-1], atol=1e-10)
    even = advance(BOX, at_rest(np.full((1, 16, 16), 0.8)), 0.5, 3.0)
    assert max(np.abs(field).max() for field in even[1:]) < 1e-12


def test_the_motion_lives_on_the_height_that_the_smoke_gains() -> None:
    """Kinetic energy comes from buoyancy alone, and viscosity takes some of it."""
    grid = BoxGrid(32, 32, LENGTH, LENGTH)
    smoke = start(grid, rngs(1)[0])[None]
    still: Arrays = (smoke, np.zeros_like(smoke), np.zeros((1, 32, 33)))
    late, u, v = advance(grid, still, 0.5, 15.0)
    kinetic = (np.square(u).sum() + np.square(v).sum()) / 2
    released = 0.5 * ((late - smoke) * grid.y).sum()
    assert 0.3 * released < kinetic < 1.01 * released
    assert np.abs(grid.divergence(u, v)).max() < 1e-12
    assert not u[:, 0].any()
    assert not v[:, :, [0, -1]].any()
    np.testing.assert_allclose(late.sum(), smoke.sum(), rtol=1e-12)
    assert smoke.min() - 1e-9 < late.min() < late.max() < smoke.max() + 1e-9
    mirrored = advance(grid, (smoke[:, ::-1], *still[1:]), 0.5, 15.0)  # the card's reflect_x
    np.testing.assert_allclose(mirrored[0], late[:, ::-1], atol=1e-8)


def test_start_is_the_absolute_value_of_smooth_noise_of_unit_variance() -> None:
    grid = BoxGrid(32, 32, LENGTH, LENGTH)
    for rng in rngs(0, 1, 2):
        smoke = start(grid, rng)
        assert smoke.min() >= 0
        assert np.square(smoke).mean() == pytest.approx(1)
        power = np.abs(np.fft.fft2(np.square(smoke)))  # the square has no kinks: twice the waves of the noise
        assert power[4:-3].max() + power[:, 4:-3].max() < 1e-2 * power.max()
    assert not np.allclose(start(grid, rngs(0)[0]), start(grid, rngs(1)[0]), atol=0.1)


def test_stored_data_are_as_the_card_says(full_well: Path) -> None:
    card = load_registry().card(pdearena_smoke.SYSTEM.name)
    for path in sorted((full_well / card.name).glob("data/*/*.hdf5")):
        with WellFile(path, card) as file:
            assert file.scalars(0) == {"buo_y": 0.5}
            assert file.dt(0) == pytest.approx(card.dt)
            smoke, u, v = file.read(0, 0, file.num_frames).astype(np.float64).swapaxes(0, 1)
        assert smoke.min() >= 0
        np.testing.assert_allclose(smoke.mean(axis=(1, 2)), smoke[0].mean(), rtol=1e-6)
        assert np.abs([u.mean(axis=(1, 2)), v.mean(axis=(1, 2))]).max() < 1e-6
        assert v.std() > 0.3
        change = np.square(smoke[1:] - smoke[:-1]).mean(axis=(1, 2)) / smoke[1:].var(axis=(1, 2))
        assert change.max() > 0.05, "a frame must differ from the one before"


def test_a_trajectory_does_not_depend_on_the_others() -> None:
    one, three = (tiny(pdearena_smoke.SYSTEM, rngs(*numbers)).fields for numbers in ((2,), (0, 1, 2)))
    assert all(np.array_equal(one[name][0], three[name][2]) for name in one)
