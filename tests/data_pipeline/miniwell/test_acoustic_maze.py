"""acoustic_scattering_maze against d'Alembert, impedances and the energy of sound; the mazes themselves."""

from collections.abc import Sequence
from itertools import islice, pairwise

import numpy as np
import pytest
from scipy.ndimage import label
from small_cases import rngs, tiny

from data_pipeline.miniwell import acoustic_maze

SPACING, STEP = 2 / 64, 0.5 * 2 / 64 / np.sqrt(4 / 3)
CLOSED, OPEN = (False, False), (True, True)


def maze_start() -> tuple[np.ndarray, np.ndarray]:
    """Pressure and density (2, 64, 64) of two mazes."""
    pressures, densities = [], []
    for rng in rngs(0, 1):
        corridor = acoustic_maze.enlarge(acoustic_maze.maze(4, rng), 64)
        pressures.append(acoustic_maze.rings(-1 + SPACING * (np.arange(64) + 0.5), corridor, 2.0, rng))
        densities.append(np.where(corridor, acoustic_maze.CORRIDOR_DENSITY, acoustic_maze.WALL_DENSITY))
    return np.stack(pressures), np.stack(densities)


def energies(leaps: Sequence[acoustic_maze.Leap], density: np.ndarray) -> np.ndarray:
    """Discrete energy half a step after each of `leaps` but the last, (steps, b)."""
    rows = []
    for now, then in pairwise(leaps):
        total = now.pressure * then.pressure / (2 * acoustic_maze.BULK_MODULUS)
        for axis, velocity in zip((1, 2), now.after, strict=True):
            total = total + 0.5 * acoustic_maze.face_mass(density, axis) * velocity**2
        rows.append(total.sum(axis=(1, 2)))
    return np.stack(rows)


def test_closed_maze_conserves_energy_and_total_pressure() -> None:
    pressure, density = maze_start()
    leaps = list(islice(acoustic_maze.leapfrog(pressure, density, SPACING, STEP, CLOSED), 400))
    energy = energies(leaps, density)
    np.testing.assert_allclose(energy, np.broadcast_to(energy[0], energy.shape), rtol=1e-12)
    np.testing.assert_allclose(leaps[-1].pressure.sum(axis=(1, 2)), pressure.sum(axis=(1, 2)), rtol=1e-11)
    assert np.abs(leaps[-1].pressure - pressure).max() > 1


def test_open_maze_only_loses_energy() -> None:
    pressure, density = maze_start()
    leaps = list(islice(acoustic_maze.leapfrog(pressure, density, SPACING, STEP, OPEN), 1500))
    energy = energies(leaps, density)
    assert (np.diff(energy, axis=0) <= 1e-13 * energy[0]).all()
    assert (energy[-1] < 0.97 * energy[0]).any()


def pulse(x: np.ndarray, centre: float) -> np.ndarray:
    return np.exp(-(((x - centre) / 0.12) ** 2))


def plane_wave(cells: int, density: np.ndarray, centre: float, duration: float) -> np.ndarray:
    """Pressure (cells,) of a plane pulse along x after `duration`; density (cells,); the upper end of x is open."""
    spacing = 2 / cells
    x = -1 + spacing * (np.arange(cells) + 0.5)
    pressure = np.repeat(pulse(x, centre)[None, :, None], 3, axis=2)
    steps = int(np.ceil(duration * np.sqrt(4 / 3) / (0.5 * spacing)))
    medium = np.broadcast_to(density[None, :, None], pressure.shape)
    leaps = acoustic_maze.leapfrog(pressure, medium, spacing, duration / steps, (True, False))
    return next(islice(leaps, steps, None)).pressure[0, :, 1]


def test_plane_pulse_follows_d_alembert_at_second_order() -> None:
    errors = []
    for cells in (128, 256):
        x = -1 + 2 / cells * (np.arange(cells) + 0.5)
        travelled = 0.5 * np.sqrt(4 / 3)
        exact = 0.5 * (pulse(x, travelled) + pulse(x, -travelled))
        errors.append(np.abs(plane_wave(cells, np.full(cells, 3.0), 0.0, 0.5) - exact).max())
    assert errors[0] < 0.02
    assert errors[1] < errors[0] / 3.5


def test_pulse_splits_at_a_density_jump_as_impedances_say() -> None:
    x = -1 + 2 / 512 * (np.arange(512) + 0.5)
    density = np.where(x < 0.3, 3.0, 27.0)  # impedances 1 : 3
    after = plane_wave(512, density, -0.2, 0.85)
    reflected, transmitted = after[(x > -0.5) & (x < 0.3)].max(), after[x > 0.3].max()
    assert reflected == pytest.approx(0.5 * (3 - 1) / (3 + 1), rel=0.02)
    assert transmitted == pytest.approx(0.5 * 2 * 3 / (3 + 1), rel=0.02)


def test_plane_pulse_leaves_through_the_open_end() -> None:
    # The left half bounces off the closed end first: by time 4 both have crossed the open one.
    assert np.abs(plane_wave(128, np.full(128, 3.0), 0.0, 4.0)).max() < 2e-3


def test_mazes_are_perfect_and_differ() -> None:
    mazes = [acoustic_maze.maze(5, rng) for rng in rngs(*range(5))]
    for corridor in mazes:
        assert label(corridor)[1] == 1
        assert corridor[1::2, 1::2].all()
        assert corridor.sum() == 5 * 5 + (5 * 5 - 1) + 2  # rooms, a tree of passages, two gaps
        assert corridor[:, 0].sum() == corridor[:, -1].sum() == 1
        assert not corridor[0].any()
        assert not corridor[-1].any()
    assert len({corridor.tobytes() for corridor in mazes}) == 5


def test_maze_walls_keep_sound_out_and_the_constants_say_where_they_are() -> None:
    simulation = tiny(acoustic_maze.SYSTEM, rngs(0, 1))
    density, speed = simulation.constant_fields["density"], simulation.constant_fields["speed_of_sound"]
    assert set(np.unique(density)) == {acoustic_maze.CORRIDOR_DENSITY, acoustic_maze.WALL_DENSITY}
    np.testing.assert_allclose(speed**2 * density, 4.0)
    wall = np.broadcast_to((density > 10)[:, None], simulation.fields["pressure"].shape)
    loudness = np.sqrt((simulation.fields["pressure"] ** 2)[wall].mean()), simulation.fields["pressure"][~wall].std()
    assert loudness[0] < 0.03 * loudness[1]
    assert not simulation.fields["velocity"][:, 0].any()  # the fluid starts at rest
