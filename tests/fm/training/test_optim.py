"""Learning rate and averaged weights against literal values."""

import dataclasses

import pytest
import torch

from fm.config import TrainSettings
from fm.training.optim import EMA, GroupedAdamW, learning_rate, parameter_group

PAPER = TrainSettings(steps=1_000_000)


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, 2e-7),
        (2499, 5e-4),
        (4999, 1e-3),
        (5000, 1e-3),
        (7000, 9.9e-4),
        (6000, 1e-3 * 0.99**0.5),
        (205_000, 1e-3 * 0.99**100),
    ],
)
def test_warm_up_then_continuous_exponential_decay(step: int, value: float) -> None:
    assert learning_rate(step, PAPER) == pytest.approx(value, rel=1e-12)


def test_cosine_falls_to_zero_at_the_last_step() -> None:
    settings = TrainSettings(steps=110, warmup_steps=10, schedule="cosine", learning_rate=2.0)
    assert learning_rate(10, settings) == 2.0
    assert learning_rate(60, settings) == pytest.approx(1.0)
    assert learning_rate(110, settings) == pytest.approx(0.0, abs=1e-12)


def test_the_optimizer_takes_the_rate_it_is_given() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    optimizer = GroupedAdamW(
        [parameter_group([layer.weight], frozenset("a"))], dataclasses.replace(PAPER, weight_decay=0.0)
    )
    optimizer.set_learning_rate(0.25)
    before = layer.weight.item()
    layer(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    assert before - layer.weight.item() == pytest.approx(0.25, rel=1e-4)  # Adam's first step is the rate itself


def test_what_the_datasets_of_a_step_do_not_use_rests() -> None:
    """A zero gradient would still decay weight and moments and let the momentum run on."""
    names = (frozenset("a"), frozenset("b"), frozenset("ab"))
    groups = {datasets: [torch.nn.Parameter(torch.ones(2))] for datasets in names}
    alone = {datasets: [torch.nn.Parameter(torch.ones(2))] for datasets in names}
    settings = dataclasses.replace(PAPER, weight_decay=0.1)
    optimizer = GroupedAdamW([parameter_group(group, datasets) for datasets, group in groups.items()], settings)
    reference = torch.optim.AdamW([p for ps in alone.values() for p in ps], lr=1e-3, weight_decay=0.1)
    for number, drawn in enumerate(("a", "b", "b", "a", "ab")):
        for datasets in names:
            used = not datasets.isdisjoint(drawn)
            gradient = torch.full((2,), float(number + 1))
            groups[datasets][0].grad = gradient if used else torch.zeros(2)  # as DeepSpeed has it
            alone[datasets][0].grad = gradient if used else None
        optimizer.skip_unused(set(drawn))
        optimizer.step()
        reference.step()
    for datasets in names:
        assert torch.equal(groups[datasets][0], alone[datasets][0])
    assert [int(optimizer.state[groups[datasets][0]]["step"]) for datasets in names] == [3, 3, 5]


def test_a_loaded_state_holds_no_second_copy_of_the_parameters() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = GroupedAdamW([parameter_group([weight], frozenset("a"))], PAPER)
    optimizer.load_state_dict(optimizer.state_dict())
    (group,) = optimizer.param_groups
    assert group["params"] == [weight]
    plain = bool | int | float | tuple | frozenset | None
    assert all(isinstance(value, plain) for name, value in group.items() if name != "params")


def test_average_of_a_constant_is_the_constant_and_the_ramp_is_as_documented() -> None:
    parameters = {"a": torch.full((2, 2), 3.0), "b": torch.tensor([-1.0])}
    ema = EMA({name: value.clone() for name, value in parameters.items()}, 0.999)
    for step in range(5):
        ema.update(parameters, step)
    assert all(torch.allclose(ema.average[name], value, atol=1e-7) for name, value in parameters.items())
    for step, expected in ((0, 0.9), (10**9, 0.001)):  # decay 1 / 10 at first, 0.999 in the end
        for value in ema.average.values():
            value.zero_()
        ema.update({name: torch.ones_like(value) for name, value in parameters.items()}, step)
        assert all(torch.allclose(v, torch.full_like(v, expected), atol=1e-6) for v in ema.average.values())
