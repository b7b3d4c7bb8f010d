"""Data that many tests read and none may change, and the option --compile."""

import gc
import os
import tempfile
from pathlib import Path

import pytest

from data_pipeline.miniwell.generate import simulate
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.plan import Settings

# A thread a process: with more, processes that compute beside each other wait for one another most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

gc.disable()  # until the first test: importing makes many objects and no garbage

# Files that take minutes are begun first, so that the workers of launch/test end together.
SLOW = (
    *("test_launches.py", "test_deaths.py", "test_training.py", "test_chaos.py", "test_guard.py", "test_tutorials.py"),
    *("test_nine_datasets.py", "test_status.py", "test_console.py", "test_compiling.py", "test_restart.py"),
    *("test_plan.py", "test_sweep.py", "test_few_shot.py", "test_finetuning.py", "test_hub.py", "test_transfer.py"),
    *("test_evaluate.py", "test_condition.py", "test_mixing.py", "test_streamed_training.py"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compile",
        metavar="WAY[:BACKEND]",
        help="what train.compile: auto means in the runs of tests, subprocesses too: blocks, step, blocks:aot_eager",
    )


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it; the user's caches stay as they are
        folder = tempfile.TemporaryDirectory(prefix="wavelit-tests-")
        os.environ["XDG_CACHE_HOME"] = folder.name
        os.environ["XDG_STATE_HOME"] = os.path.join(folder.name, "state")
        config.add_cleanup(folder.cleanup)
    if config.getoption("--compile"):
        os.environ["WAVELIT_COMPILE"] = config.getoption("--compile")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


@pytest.fixture(scope="module", autouse=True)
def _frozen_modules() -> None:
    """Leave what has been imported so far out of garbage collections, an eighth of the time of the tests otherwise."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_well(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mini-Well of all eight systems, 9 frames each. Read only."""
    well = tmp_path_factory.mktemp("tiny") / "well"
    simulate(well, preset="tiny", jobs=1)
    return well


@pytest.fixture(scope="session")
def tiny_shards(tiny_well: Path) -> Path:
    """Shards of the tiny mini-Well, with more than one chunk per trajectory. Read only."""
    shards = tiny_well.parent / "shards"
    build_shards(tiny_well, shards, jobs=1, settings=Settings(frames_per_chunk=4))
    return shards
