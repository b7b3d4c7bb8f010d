"""What the tests of hostile input share."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import Guard

MEMORY_BYTES = 256 * 2**20  # more than any of these inputs could honestly need


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    """A guarded, empty folder, and a limit to the memory of this process."""
    sandbox = tmp_path_factory.mktemp("sandbox")
    (sandbox / "secret").write_bytes(b"secret")
    (sandbox / "root").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")
    if status.exists():  # elsewhere, as on macOS, the limit is not enforced
        used = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, limits[1]))
    yield Guard(sandbox / "root")
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert (sandbox / "secret").read_bytes() == b"secret"
    assert sorted(os.listdir(sandbox)) == ["root", "secret"]
