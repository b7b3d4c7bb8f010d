"""Sampling shares that follow the validation scores (future work of the paper, section 3.5).

    share_i  in proportion to  base_i * score_i ** power,  and at least `floor`

The base are the sqrt shares. The score of a dataset is its one-step validation VRMSE over that of persistence, a number
without units that can be compared between datasets: the further from solved, the more often drawn. Only ratios of
scores matter. They are not smoothed over validations: they come from averaged weights and the same windows each time,
so they move slowly by themselves.
"""

import math
from collections.abc import Mapping

from data_pipeline.errors import UserError


def adaptive_shares(
    base: Mapping[str, float], scores: Mapping[str, float], power: float, floor: float
) -> dict[str, float]:
    """The share of each dataset of `base`; they sum to 1 and none is below `floor`.

    A dataset without a score counts as the geometric mean of those with one. Power 0 gives the base, floored.
    Raises UserError if the floor leaves nothing to share.
    """
    if not 0 <= floor * len(base) < 1:
        raise UserError(
            f"sampling.floor: expected less than 1 / {len(base)} = {1 / len(base):.4g}, since each of {len(base)} "
            f"datasets gets at least that share; got {floor}."
        )
    known = {name: math.log(scores[name]) for name in base if name in scores}
    mean = math.fsum(known.values()) / len(known) if known else 0.0
    logs = {name: math.log(share) + power * (known.get(name, mean) - mean) for name, share in base.items()}
    highest = max(logs.values())
    return _floored({name: math.exp(value - highest) for name, value in logs.items()}, floor)


def _floored(mass: Mapping[str, float], floor: float) -> dict[str, float]:
    """Shares in proportion to `mass`, those below `floor` raised to it at the cost of all others alike."""
    raised: set[str] = set()
    while True:
        left = 1 - floor * len(raised)
        total = math.fsum(value for name, value in mass.items() if name not in raised)
        shares = {name: floor if name in raised else left * value / total for name, value in mass.items()}
        low = {name for name, share in shares.items() if share < floor}
        if not low:
            return shares
        raised |= low  # the others shrink, which may take one more of them below the floor


def carry_scores(
    previous: Mapping[str, float], latest: Mapping[str, float | None]
) -> tuple[dict[str, float], list[str]]:
    """The scores to go by, and the names in `latest` whose score is missing or not a finite number above 0.

    The previous score of such a dataset stands, if it has one.
    """
    usable = {name: score for name, score in latest.items() if score is not None and 0 < score < math.inf}
    return {**previous, **usable}, sorted(latest.keys() - usable.keys())
