"""Verdicts of the one-step regression gate, on scores written by hand."""

from typing import Any

import pytest
from error_files import block_scores, dataset_scores, made_scores, window_scores

from data_pipeline.files import UserError
from fm.config import FinetuneSettings, ValidationSettings
from fm.evaluation.evaluate import ValidationResult
from fm.training.guard import RegressionLimit


def gate(limit: float = 1.2, **validation: Any) -> RegressionLimit:
    return RegressionLimit(FinetuneSettings(pretrained="x", gate=limit), ValidationSettings(**validation))


def validated(one_step: dict[str, float | None], rollout: list[float | None]) -> ValidationResult:
    """One-step VRMSE by dataset; the first of them has the rollout scores, one a window."""
    windows = {str(number): window_scores(ratio, ratio) for number, ratio in enumerate(rollout)}
    datasets = {}
    for name, value in one_step.items():
        datasets[name] = dataset_scores(block_scores(value, value), {"w": None} if datasets else windows)
    return ValidationResult(made_scores(datasets), {})


def test_worsening_is_the_geometric_mean_and_its_worst_dataset_is_named() -> None:
    watching = gate()
    assert watching.judge(validated({"a": 0.1, "b": 0.2}, [1.0])).within_limit
    verdict = watching.judge(validated({"a": 0.1, "b": 0.32}, [1.0]))
    assert verdict.worsening == pytest.approx(1.6**0.5)
    assert verdict.worst == "b"
    assert not verdict.within_limit
    assert watching.ends_run
    assert not watching.judge(validated({"a": None, "b": 0.2}, [1.0])).within_limit
    assert watching.judge(validated({"a": 0.11, "b": 0.2}, [1.0])).within_limit
    assert not watching.ends_run


def test_the_best_has_the_fewest_diverged_rollouts_and_then_the_lowest_score() -> None:
    watching = gate()
    scores: list[tuple[list[float | None], bool]] = [
        ([None, 0.5], True),  # the pretrained model
        ([None, 0.6], False),
        ([None, 0.4], True),
        ([0.9, 0.9], True),
        ([None, 0.1], False),
        ([0.9, 0.8], True),
    ]
    for rollout, best in scores:
        verdict = watching.judge(validated({"a": 0.1}, rollout))
        assert verdict.best == best, rollout
        assert verdict.diverged == rollout.count(None)
    assert "1 rollout scores diverged" in gate().judge(validated({"a": 0.1}, [None, 0.5])).text


def test_a_lower_limit_drops_a_best_that_exceeds_it_and_a_newer_best_counts() -> None:
    wide = gate(2.0)
    wide.judge(validated({"a": 0.1}, [1.0]))
    wide.judge(validated({"a": 0.18}, [0.5]))
    narrow = gate(1.1)
    narrow.restore(wide.state(), None, 2)
    assert narrow.judge(validated({"a": 0.105}, [0.9])).best
    behind = gate(2.0)
    behind.restore(gate_at_start().state(), wide.state(), 0)  # <run>/best was written after the checkpoint
    assert not behind.judge(validated({"a": 0.1}, [0.8])).best


def gate_at_start() -> RegressionLimit:
    fresh = gate(2.0)
    fresh.judge(validated({"a": 0.1}, [1.0]))
    return fresh


def test_states_that_do_not_compare_are_refused() -> None:
    with pytest.raises(UserError, match="began without it"):
        gate().restore(RegressionLimit(None, ValidationSettings()).state(), None, 5)
    with pytest.raises(UserError, match=r"validated with protocol, windows and rollouts \['wavelit', 64, 1\], now"):
        gate(windows=8).restore(gate_at_start().state(), None, 5)
    with pytest.raises(UserError, match="no trajectory of the valid split covers a window of the protocol thirds"):
        gate().judge(validated({"a": 0.1}, []))
    RegressionLimit(None, ValidationSettings()).restore(gate().state(), None, 5)  # no gate, nothing to restore
