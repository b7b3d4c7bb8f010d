"""Learning rate and averaged weights against literal values."""

import dataclasses

import pytest
import torch

from fm.ema import EMA
from fm.optim import learning_rate, make_optimizer, set_learning_rate
from fm.settings import TrainSettings

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


def test_the_optimiser_takes_the_rate_it_is_given() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    optimizer = make_optimizer(layer, dataclasses.replace(PAPER, weight_decay=0.0))
    set_learning_rate(optimizer, 0.25)
    before = layer.weight.item()
    layer(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    assert before - layer.weight.item() == pytest.approx(0.25, rel=1e-4)  # Adam's first step is the rate itself


def test_a_parameter_without_gradient_does_not_move() -> None:
    pair = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    optimizer = make_optimizer(pair, dataclasses.replace(PAPER, weight_decay=0.1))
    pair[0](torch.ones(1, 1)).sum().backward()
    before = [p.clone() for p in pair[1].parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, pair[1].parameters(), strict=True))


def test_average_of_a_constant_is_the_constant_and_the_ramp_is_as_documented() -> None:
    layer = torch.nn.Linear(2, 2)
    ema = EMA(layer, 0.999)
    for step in range(5):
        ema.update(layer, step)
    assert torch.allclose(ema.model.weight, layer.weight, atol=1e-7)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        ema.model.weight.fill_(0.0)
    ema.update(layer, 0)  # decay 1 / 10
    assert torch.allclose(ema.model.weight, torch.full((2, 2), 0.9))
    with torch.no_grad():
        ema.model.weight.fill_(0.0)
    ema.update(layer, 10**9)  # decay 0.999
    assert torch.allclose(ema.model.weight, torch.full((2, 2), 0.001), atol=1e-6)
    assert not any(p.requires_grad for p in ema.model.parameters())
