"""The effect of eps against the formula."""

import math

import numpy as np
import pytest

from fm.evaluation.errors import DatasetErrors, ErrorFile, Errors
from fm.evaluation.protocol import PROTOCOLS
from fm.evaluation.tables import eps_effect


def test_a_nearly_constant_channel_changes_most() -> None:
    """active_matter's concentration has a variance of about 9e-6, its velocity of 0.3."""
    variance = np.broadcast_to([9e-6, 0.3], (2, 9, 2)).copy()
    errors = Errors(variance, 0.04 * variance, variance, variance)
    names = ("concentration", "velocity_x")
    part = DatasetErrors(names, np.arange(2), errors, errors, "x", (16, 16))
    table = eps_effect(ErrorFile(PROTOCOLS["thirds"], {"active_matter": part}))
    assert table.head == ["dataset", "scores", "channel", "eps 1e-07", "eps 1e-05", "ratio"]
    blocks = ["one step", "first_third", "middle_third", "last_third"]
    assert [row[1:3] for row in table.rows] == [[block, which] for block in blocks for which in ("all", names[0])]
    small, large = (0.2 * math.sqrt(9e-6 / (9e-6 + eps)) for eps in (1e-7, 1e-5))
    assert table.rows[1][3:] == pytest.approx([small, large, large / small])
    assert table.rows[0][3:5] == pytest.approx([(small + 0.2) / 2, (large + 0.2) / 2], rel=1e-4)
    assert 0.68 < large / small < 0.70


def test_what_diverged_or_is_not_covered_has_no_ratio() -> None:
    shape = (1, 9, 1)
    ones, model = np.ones(shape), np.full(shape, np.inf)
    errors = Errors(ones, model, ones, ones)
    part = DatasetErrors(("a",), np.arange(1), errors, errors, "x", (16, 16))
    table = eps_effect(ErrorFile(PROTOCOLS["wavelit"], {"shear_flow": part}), eps=(0.0, 1.0))
    assert table.rows == [["shear_flow", "one step", "all", None, None, None]]
