"""How long a step's unroll is, which inputs are the truth, and the noise on them."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fm.config import FinetuneSettings
from fm.model.spec import explain
from fm.training.objective import forcing_coins, forcing_prob, input_noise, unroll_length


def settings(**values: Any) -> FinetuneSettings:
    return FinetuneSettings(pretrained="x", **values)


def test_teacher_forcing_falls_linearly_and_its_coins_depend_on_nothing_else() -> None:
    assert [forcing_prob(step, 5, settings()) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    coins = forcing_coins(0, 7, 1000, 4, 0.3)
    assert coins[:, 0].all()
    assert coins[:, 1:].mean() == pytest.approx(0.3, abs=0.03)
    assert (coins == forcing_coins(0, 7, 1000, 4, 0.3)).all()
    assert (coins != forcing_coins(0, 8, 1000, 4, 0.3)).any()
    assert forcing_coins(0, 7, 8, 3, 1.0).all()
    assert not forcing_coins(0, 7, 8, 3, 0.0)[:, 1:].any()


@pytest.mark.parametrize(
    ("forcing", "quarter"),
    [("linear", 0.75), ("cosine", (1 + np.sqrt(0.5)) / 2), ("inverse_sigmoid", 0.929897)],  # the last by a calculator
)
def test_each_decay_begins_and_ends_where_it_should_and_never_rises(forcing: str, quarter: float) -> None:
    probs = [forcing_prob(step, 101, settings(forcing=forcing)) for step in range(101)]
    assert probs[0] == pytest.approx(1)
    assert probs[100] == pytest.approx(0)
    assert probs[50] == pytest.approx(0.5)
    assert probs[25] == pytest.approx(quarter, abs=1e-5)
    assert (np.diff(probs) < 0).all()
    partial = settings(forcing=forcing, forcing_start=0.8, forcing_end=0.2)
    assert [forcing_prob(step, 101, partial) for step in (0, 50, 100, 200)] == pytest.approx([0.8, 0.5, 0.2, 0.2])


def test_only_scheduled_sampling_forces() -> None:
    for objective in ("bptt", "causal_bptt", "pushforward"):
        assert forcing_prob(0, 10, settings(objective=objective)) == 0
    assert forcing_prob(0, 1, settings()) == 1


def test_the_horizon_grows_by_one_in_equal_parts_and_each_dataset_to_its_own_length() -> None:
    growing = settings(unroll_steps=5, unroll_start=2, unroll_growth=0.5, unroll_override={"short": 3, "one": 1})
    lengths = [unroll_length(step, 80, growing, "long") for step in range(80)]
    assert lengths == [2] * 10 + [3] * 10 + [4] * 10 + [5] * 50
    assert [unroll_length(step, 80, growing, "short") for step in (0, 19, 20, 79)] == [2, 2, 3, 3]
    assert unroll_length(0, 80, growing, "one") == 1
    assert unroll_length(0, 80, settings(unroll_steps=5), "long") == 5


def test_a_random_horizon_takes_every_length_alike_and_the_last_step_the_longest() -> None:
    drawn = settings(unroll_steps=5, unroll_random=True, unroll_override={"long": 10, "one": 1})
    lengths = np.array([unroll_length(step, 5001, drawn, "any") for step in range(5001)])
    assert np.bincount(lengths[:-1])[1:] == pytest.approx(np.full(5, 1000), rel=0.1)
    assert abs(np.corrcoef(lengths[:-2], lengths[1:-1])[0, 1]) < 0.05
    assert lengths[-1] == 5
    longer = np.array([unroll_length(step, 5001, drawn, "long") for step in range(5000)])
    assert ((longer + 1) // 2 == lengths[:-1]).all()  # the same share of the range
    assert {unroll_length(step, 5001, drawn, "one") for step in range(100)} == {1}
    growing = settings(unroll_steps=5, unroll_start=2, unroll_growth=0.5, unroll_random=True)
    grown = [unroll_length(step, 80, growing, "any") for step in range(80)]
    assert max(grown[:10]) == 2
    assert max(grown) == 5
    assert min(grown) == 1


def test_noise_has_its_scale_and_is_a_function_of_window_and_draw() -> None:
    device, shape = torch.device("cpu"), (2, 3, 32, 32)
    noise = input_noise(1, 9, np.arange(4), shape, 0.05, device)
    assert noise.shape == (4, *shape)
    assert float(noise.std()) == pytest.approx(0.05, rel=0.02)
    assert abs(float(noise.mean())) < 0.002
    assert torch.equal(input_noise(1, 9, np.array([1, 3]), shape, 0.05, device), noise[[1, 3]])  # however it is shared
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, input_noise(1, 10, np.arange(4), shape, 0.05, device))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"unroll_steps": 0}, "unroll_steps: Input should be greater than 0 (got 0)"),
        ({"unroll_override": {"a": 0}}, "unroll_override.a: Input should be greater than 0 (got 0)"),
        ({"unroll_start": 0}, "unroll_start: Input should be greater than 0 (got 0)"),
        ({"unroll_growth": 0.0}, "unroll_growth: Input should be greater than 0 (got 0.0)"),
        ({"causal_eps": -1.0}, "causal_eps: Input should be greater than or equal to 0 (got -1.0)"),
        ({"gate": 0.9}, "gate: Input should be greater than or equal to 1 (got 0.9)"),
        ({"forcing_end": 1.5}, "forcing_end: Input should be less than or equal to 1 (got 1.5)"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        settings(**values)
    assert explain(caught.value, FinetuneSettings) == message
