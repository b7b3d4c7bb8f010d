"""Ranks against counts by hand, the correlation against SciPy's."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from fm.evaluation.scores import mean_ranks, spearman, wins


def test_ties_share_a_rank_and_a_missing_score_comes_last() -> None:
    rows = [[0.1, 0.2, 0.3], [0.5, 0.5, 0.1], [None, 0.2, None]]
    assert mean_ranks(rows) == pytest.approx([(1 + 2.5 + 2.5) / 3, (2 + 2.5 + 1) / 3, (3 + 1 + 2.5) / 3])
    assert wins(rows) == [1, 1, 1]


def test_a_shared_best_score_is_nobodys_win() -> None:
    assert wins([[0.5, 0.5], [None, None], [0.1, 0.2]]) == [1, 0]
    assert wins([[None]]) == [0]
    assert mean_ranks([]) == wins([]) == []


def test_spearman_is_scipys() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 6, 12).astype(float).tolist(), rng.random(12).tolist()
    assert spearman(ours, theirs) == pytest.approx(spearmanr(ours, theirs).statistic)
    assert spearman([1.0, 2.0, None], [1.0, 5.0, 9.0]) == pytest.approx(1.0)
    assert spearman([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]) == pytest.approx(-1.0)


def test_no_correlation_without_an_order() -> None:
    assert spearman([1.0, 1.0], [1.0, 2.0]) is None
    assert spearman([1.0], [1.0]) is None
    assert spearman([], []) is None
    with pytest.raises(ValueError, match="two lists of one length, got 1 and 2"):
        spearman([1.0], [1.0, 2.0])
