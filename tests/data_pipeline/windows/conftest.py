"""Shards that the tests of streaming read and none may change, and a server of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_server import FaultyServer
from streamed import MAZE, write_dataset


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train shards of three datasets, one with constant fields, one stored as float16. Read only."""
    folder = tmp_path_factory.mktemp("streamed") / "shards"
    write_dataset(folder, MAZE, "float32", ("pressure", "velocity_x"), ("density", "speed_of_sound"))
    write_dataset(folder, "helmholtz_staircase", "float16", ("pressure_re",))
    write_dataset(folder, "shear_flow", "float32", ("tracer", "pressure", "velocity_x"))
    return folder


@pytest.fixture
def server(shards: Path) -> Iterator[FaultyServer]:
    with FaultyServer(shards) as server:
        yield server
