"""Training and evaluation on shards behind a URL are those on the local shards, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
from faulty_server import FaultyServer
from whole_runs import finish, fork, log, small

from data_pipeline.errors import UserError
from fm.config import Recipe
from fm.evaluation.evaluate import evaluate_run
from fm.training.trainer import train


def from_place(shards: object, directory: Path, shuffle: str, **data: Any) -> Recipe:
    return small(
        Path("unused"),
        directory,
        data={"shards": str(shards), **data},
        sampling={"shuffle": shuffle, "shards_per_block": 1},
        train={"steps": 6},
        validation={"every": 3, "windows": 4},
    )


@pytest.mark.parametrize(("shuffle", "workers"), [("global", 1), ("blocks", 0)])
def test_a_run_from_a_url_is_the_local_run(tiny_shards: Path, tmp_path: Path, shuffle: str, workers: int) -> None:
    assert train(from_place(tiny_shards, tmp_path / "local", shuffle)) == 0
    with FaultyServer(tiny_shards) as server:
        for number in range(1, 20):
            server.fail("*", "500", first=7 * number)
        recipe = from_place(server.url, tmp_path / "far", shuffle, cache=str(tmp_path / "cache"), workers=workers)
        assert train(recipe) == 0
        assert server.total_requests > 0
        report = evaluate_run(tmp_path / "far", out=tmp_path / "far_report")
    assert log(tmp_path / "far") == log(tmp_path / "local")
    local = evaluate_run(tmp_path / "local", out=tmp_path / "local_report")
    scores = [json.loads((folder / "scores.json").read_text())["datasets"] for folder in (report, local)]
    assert scores[0] == scores[1]


def test_a_server_without_ranges_ends_the_run_with_the_setting_to_change(tiny_shards: Path, tmp_path: Path) -> None:
    with FaultyServer(tiny_shards) as server:
        server.fail("*", "no_range", times=float("inf"))
        code, output = finish(fork(from_place(server.url, tmp_path / "run", "global", cache=str(tmp_path / "cache"))))
    assert code == 2, output
    assert "For shards set `sampling.shuffle: blocks`" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"cache_gb": -1}, r"data\.cache_gb: Input should be greater than or equal to 0 \(got -1\)"),
        ({"prefetch": -1}, r"data\.prefetch: Input should be greater than or equal to 0 \(got -1\)"),
        ({"cache": 3}, "data.cache"),
    ],
)
def test_settings_of_the_cache_are_checked(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_place("https://example.org/shards", tmp_path, "global", **data)
