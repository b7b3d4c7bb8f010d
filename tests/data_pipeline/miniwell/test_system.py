"""What every system promises: its arrays, that it moves, and that a trajectory is its own generator's alone."""

import numpy as np
import pytest
from small_cases import rngs, tiny

from data_pipeline.miniwell.generate import SYSTEMS, load_system
from data_pipeline.miniwell.system import SPLITS, System

ALL = [load_system(name) for name in SYSTEMS]


@pytest.mark.parametrize("system", ALL, ids=lambda system: system.name)
def test_tiny_simulation_has_the_promised_arrays_and_moves(system: System) -> None:
    preset = system.presets["tiny"]
    simulation = tiny(system, rngs(0, 1))
    assert list(simulation.fields) == list(system.tensor_orders)
    assert (len(simulation.x), len(simulation.y)) == preset.grid
    for name, order in system.tensor_orders.items():
        values = simulation.fields[name]
        assert values.shape == (2, preset.num_frames, *preset.grid) + (2,) * order
        assert np.isfinite(values).all()
        change = np.abs(np.diff(values, axis=1)).max(axis=(2, 3))
        assert (change > 1e-3 * values.std()).all(), f"{name} stands still"
    assert len(simulation.time) == preset.num_frames
    for boundary in simulation.boundaries:
        assert boundary.mask.shape == tuple(len(getattr(simulation, dim)) for dim in boundary.dims)
        assert boundary.mask.any()


@pytest.mark.parametrize("system", ALL, ids=lambda system: system.name)
def test_a_trajectory_depends_on_its_own_generator_only(system: System) -> None:
    together, alone = tiny(system, rngs(0, 1, 2)), tiny(system, rngs(1))
    for name, values in together.fields.items():
        np.testing.assert_array_equal(values[1], alone.fields[name][0])
        assert np.abs(values[1] - values[0]).max() > 1e-3 * values.std()
    for name, constant in together.constant_fields.items():
        sample_varying = constant.ndim == 3
        np.testing.assert_array_equal(
            constant[1] if sample_varying else constant,
            alone.constant_fields[name][0] if sample_varying else alone.constant_fields[name],
        )


@pytest.mark.parametrize("system", ALL, ids=lambda system: system.name)
@pytest.mark.parametrize("name", ["mini", "tiny"])
def test_every_parameter_set_is_trained_and_tested_on(system: System, name: str) -> None:
    sets = system.presets[name].parameter_sets
    assert all(one.num_trajectories["train"] and one.num_trajectories["test"] for one in sets)
    assert all(any(one.num_trajectories[split] for one in sets) for split in SPLITS)
    assert len({one.label for one in sets}) == len(sets)


@pytest.mark.parametrize("system", ALL, ids=lambda system: system.name)
def test_the_mini_preset_has_enough_trajectories_to_score_and_to_validate_on(system: System) -> None:
    counts = [one.num_trajectories for one in system.presets["mini"].parameter_sets]
    assert sum(count["test"] for count in counts) >= 8
    assert sum(count["valid"] for count in counts) >= 2
