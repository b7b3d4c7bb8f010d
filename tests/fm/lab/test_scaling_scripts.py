"""The arithmetic of tests/benchmarks/scaling_*.py and bench_exchange.py, against values made by hand."""

from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import scaling_in_work
from bench_exchange import union
from scaling_in_work import fit
from scaling_on_gpus import MICRO_BATCH, Costs, simulate
from simulate_ranks import Setting, shares

from data_pipeline.windows.schedule import Schedule, Source
from fm.lab.hardware import GPUS, AssumedSpeed, Interconnect
from fm.lab.workload import Footprint

SOURCES = [Source(name, 10_000, tokens, (10_000,)) for name, tokens in (("small", 100), ("large", 300))]
LINKS = Interconnect(450, 50)
NOTHING = Footprint(kept_bytes=0, moved_bytes=0, operations=0, products=())


def costs(**seconds: float) -> Costs:
    """A GPU on which a window of each dataset takes so many seconds."""
    speed = AssumedSpeed(GPUS["h100"], 1.0, bf16=True)
    flops = {name: value * 989e12 for name, value in seconds.items()}
    return Costs(flops, dict.fromkeys(seconds, NOTHING), speed, LINKS, state=0.0, gradients=1000.0)


def test_a_power_law_is_found_with_its_error() -> None:
    found = fit([1, 2, 4], [3.0, 3 * 2**1.5, 3 * 4**1.5])
    assert (found.slope, found.error, found.last, found.level) == pytest.approx((1.5, 0, 1.5, 3.0))
    # logarithms to base 2: (0, 0), (1, 1), (2, 1); residuals -1/6, 1/3, -1/6 about a slope of 1/2
    found = fit([1, 2, 4], [1.0, 2.0, 2.0])
    assert (found.slope, found.error, found.last) == pytest.approx((0.5, sqrt(1 / 6 / 1 / 2), 0.0))
    assert found.level == pytest.approx(2 ** (1 / 6))


def test_what_does_not_grow_is_found() -> None:
    sizes = np.array([1.0, 10.0, 100.0])
    found = fit(sizes.tolist(), (5 + 2 * sizes).tolist())
    assert found.fixed == pytest.approx(5)
    assert 0 < found.slope < 1
    assert found.last == pytest.approx(np.log(205 / 25) / np.log(10))
    assert fit([1, 2, 3], [1.0, 2.0, 3.0]).fixed == pytest.approx(0, abs=1e-12)


def test_overlapping_exchanges_count_once() -> None:
    assert union([]) == 0
    assert union([(0, 2), (1, 3), (5, 6)]) == 4
    assert union([(0, 5), (1, 2)]) == 5


def test_pieces_are_at_most_the_papers_batch() -> None:
    some = costs(small=1.0)
    assert some.piece("small", 3) == pytest.approx(3)
    launched = replace(some, traffic={"small": replace(NOTHING, operations=1_000_000)})  # 5 s to start the kernels
    assert launched.piece("small", 3) == pytest.approx(5)
    assert launched.pieces("small", 2 * MICRO_BATCH + 1) == pytest.approx(15)


def test_equal_work_waits_for_nobody() -> None:
    found = simulate(Setting(16, 4, "global", 1), SOURCES[:1], costs(small=1.0), steps=3)
    assert found.waiting == 0
    assert found.exposed == pytest.approx(LINKS.all_reduce(1000.0, 16))
    assert found.step == pytest.approx(4 + found.exposed)
    assert found.rate == pytest.approx(4 / found.step)


def test_the_slowest_process_ends_the_step() -> None:
    """Two processes with a draw of one window each, of one dataset or of two."""
    setting, steps = Setting(2, 1, "per_rank", 2), 12
    schedule = Schedule(SOURCES, 1, seed=0)
    drawn = [[schedule.source(2 * step + draw).name for draw in (0, 1)] for step in range(steps)]
    assert {len(set(names)) for names in drawn} == {1, 2}
    seconds = {"small": 1.0, "large": 3.0}
    longest = sum(max(seconds[name] for name in names) for names in drawn)
    mean = sum(seconds[name] / 2 for names in drawn for name in names)
    found = simulate(setting, SOURCES, costs(**seconds), steps)
    assert found.waiting == pytest.approx(1 - mean / longest)
    assert found.step == pytest.approx((longest + steps * found.exposed) / steps)


@pytest.mark.parametrize(
    "setting", [Setting(8, 4, "global", 2), Setting(8, 4, "per_rank", 8), Setting(8, 4, "whole", 8)]
)
def test_shares_are_all_windows(setting: Setting) -> None:
    schedule = Schedule(SOURCES, setting.batch, seed=0)
    taken = shares(setting, schedule, 3)
    assert len(taken) == setting.ranks
    for draw in range(setting.draws):
        assert sum(mine.get(draw, 0) for mine in taken) == setting.batch


def test_a_tiny_study_is_taken_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "work.png"
    model = ["model.width=16", "model.heads=2", "model.depth=1"]
    scaling_in_work.main([*model, "--grid", "16", "--sides", "16", "24", "32", "--rounds", "1", "--plot", str(picture)])
    out = capsys.readouterr().out
    assert "| tokens | 24 x 24 |" in out
    assert "| width | 64 |" in out
    assert "| model steps K | 8 |" in out
    assert out.count(" ± ") == 5
    assert picture.read_bytes().startswith(b"\x89PNG")
