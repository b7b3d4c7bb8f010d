"""Each import has a current folder of its own, and no registry of the user's."""

from pathlib import Path

import pytest

from data_pipeline.registry import VARIABLE


@pytest.fixture(autouse=True)
def _no_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
