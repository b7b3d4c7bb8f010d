"""What tests of several packages of fm use."""

import sys
from collections.abc import Iterator

import pytest
from forked import forking_python


@pytest.fixture(scope="module")
def forked_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The processes of a study need not import torch again. A signal would end theirs and not reach what they fork."""
    with forking_python(tmp_path_factory.mktemp("python")) as python, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "executable", str(python))
        yield
