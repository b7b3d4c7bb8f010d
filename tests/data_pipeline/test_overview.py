"""`inspect` says what a folder holds, here and behind a URL."""

from pathlib import Path

import pytest
from faulty_server import FaultyServer

from data_pipeline.files import UserError
from data_pipeline.inspect import overview
from data_pipeline.registry import load_registry

KNOWN = tuple(load_registry().cards)


@pytest.mark.parametrize("all_findings", [False, True])
def test_the_table_is_the_same_behind_a_url(tiny_shards: Path, all_findings: bool) -> None:
    with FaultyServer(tiny_shards) as server:
        remote = overview(server.url, KNOWN, all_findings)
        assert overview(tiny_shards, KNOWN, all_findings).splitlines() == [
            line.replace(server.url, str(tiny_shards)) for line in remote.splitlines()
        ]
    assert remote.count("viscoelastic_instability") >= 3


def test_a_url_without_shards_says_what_was_looked_for(tmp_path: Path) -> None:
    with FaultyServer(tmp_path) as server, pytest.raises(UserError) as caught:
        overview(server.url, ("burgers", "shear_flow"))
    assert "expected <dataset>/<split>/manifest.json of burgers, shear_flow, got none" in str(caught.value)
