"""Who is best over many datasets, and whether two orders agree. Lower scores are better; None is worse than any number.

A score that is missing because a model diverged is None, so a model cannot rise in rank by failing.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata, spearmanr

Scores = Sequence[float | None]


def mean_ranks(rows: Sequence[Scores]) -> list[float]:
    """Of each competitor (column), the mean over datasets (rows) of its rank, 1 the best; equal scores share theirs."""
    return [float(rank) for rank in np.mean([_ranks(row) for row in rows], axis=0)] if rows else []


def wins(rows: Sequence[Scores]) -> list[int]:
    """Of each competitor (column), on how many datasets (rows) its score is lower than all others."""
    columns = range(len(rows[0])) if rows else ()
    return [sum(row[column] is not None and _ranks(row)[column] == 1 for row in rows) for column in columns]


def spearman(ours: Scores, theirs: Scores) -> float | None:
    """Spearman's rank correlation of two lists of scores of the same things; None where either list has one rank only.

    From -1, the opposite order, to 1, the same. Equal scores share their mean rank.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"spearman: expected two lists of one length, got {len(ours)} and {len(theirs)}")
    first, second = _ranks(ours), _ranks(theirs)
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def _ranks(scores: Scores) -> list[float]:
    """1 for the lowest; equal scores share the mean of their places."""
    return [float(rank) for rank in rankdata([math.inf if score is None else score for score in scores])]
