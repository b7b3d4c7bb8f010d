"""What every surrogate is, seen on the smallest one: a network that is one number."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from handmade import make_inputs, make_spec
from torch import Tensor, nn

from fm.model.spec import DatasetSpec
from fm.model.surrogate import Surrogate

SPEC = make_spec("shear_flow")
BOTH = (SPEC, make_spec("rayleigh_benard"))


class Scaled(Surrogate):
    """Says `factor` times the state."""

    def __init__(self, predict: str, datasets: Sequence[DatasetSpec] = BOTH, **override: str) -> None:
        super().__init__(datasets, predict, override, "haar")
        self.factor = nn.Parameter(torch.tensor(0.5))

    def output(self, inputs: Tensor, spec: DatasetSpec) -> Tensor:
        return self.factor * inputs[:, : len(spec.state_channels)]

    def adapted_to(self, datasets: Sequence[DatasetSpec]) -> "Scaled":
        return self

    def _sizes(self) -> str:
        return "one number"


def moments(statistic: str) -> Tensor:
    return SPEC.moment(statistic, SPEC.state_channels).float()


def test_the_output_is_the_next_state_or_its_change_in_units_of_its_deviation() -> None:
    state, constants = make_inputs(SPEC)
    assert torch.equal(Scaled("state")(state, constants, SPEC.name), 0.5 * state)
    model = Scaled("delta", rayleigh_benard="state")
    raw = model.denormalize(state, SPEC.name)
    change = model.denormalize(model(state, constants, SPEC.name), SPEC.name) - raw
    expected = 0.5 * state * moments("std_delta") + moments("mean_delta")
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-4)
    state, constants = make_inputs(make_spec("rayleigh_benard"))
    assert torch.equal(model(state, constants, "rayleigh_benard"), 0.5 * state)


def test_a_rollout_needs_no_more_than_a_surrogate() -> None:
    model = Scaled("state")
    initial, constants = make_inputs(SPEC)
    states = list(model.iterate(initial, constants, SPEC.name, 3))
    expected = (initial - moments("mean")) / 8 + moments("mean")
    torch.testing.assert_close(states[2], expected, atol=1e-5, rtol=1e-5)


def test_unless_it_says_otherwise_all_datasets_use_all_parameters() -> None:
    model = Scaled("delta")
    assert model.parameters_by_datasets() == {frozenset({"shear_flow", "rayleigh_benard"}): [model.factor]}
    assert model.num_parameters() == 1
    assert model.wavelet == "haar"


@pytest.mark.parametrize("datasets", [[], [SPEC, SPEC], [SPEC, dataclasses.replace(SPEC, boundary=SPEC.boundary)]])
def test_datasets_must_have_names_of_their_own(datasets: list[Any]) -> None:
    with pytest.raises(ValueError, match="datasets must be one or more with different names"):
        Scaled("delta", datasets)
