"""`inspect`: what a folder of shards holds, here and behind a URL; Tables 7 to 9 as the paper prints them."""

import re
from pathlib import Path

import pytest
from faulty_server import FaultyServer

from data_pipeline.errors import UserError
from data_pipeline.inspect import overview, paper_tables
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


TABLE_7 = {
    "AM": ("14,000", "16,384", "229,376,000"),
    "GS": ("960,000", "4,096", "3,932,160,000"),
    "RB": ("278,600", "16,384", "4,564,582,400"),
    "SF": ("178,304", "32,768", "5,842,665,472"),
    "TRL2D": ("7,200", "12,288", "88,473,600"),
    "VI": ("6,487", "65,536", "425,132,032"),
    "ASM": ("321,600", "16,384", "5,269,094,400"),
    "HS": ("20,384", "65,536", "1,335,885,824"),
}
TABLE_8 = {  # proportional, uniform, temperature 0.2, sqrt
    "AM": ("0.0106", "0.1250", "0.0617", "0.0420"),
    "GS": ("0.1813", "0.1250", "0.1448", "0.1737"),
    "RB": ("0.2105", "0.1250", "0.1676", "0.1871"),
    "SF": ("0.2694", "0.1250", "0.2250", "0.2117"),
    "TRL2D": ("0.0041", "0.1250", "0.0597", "0.0261"),
    "VI": ("0.0196", "0.1250", "0.0645", "0.0571"),
    "ASM": ("0.2430", "0.1250", "0.1971", "0.2011"),
    "HS": ("0.0616", "0.1250", "0.0796", "0.1012"),
}
TABLE_9 = {  # the same schemes
    "AM": ("1.00", "11.82", "5.83", "3.97"),
    "GS": ("1.00", "0.69", "0.80", "0.96"),
    "RB": ("1.00", "0.59", "0.80", "0.89"),
    "SF": ("1.00", "0.46", "0.84", "0.79"),
    "TRL2D": ("1.00", "30.64", "14.64", "6.39"),
    "VI": ("1.00", "6.38", "3.29", "2.91"),
    "ASM": ("1.00", "0.51", "0.81", "0.83"),
    "HS": ("1.00", "2.03", "1.29", "1.64"),
}


def rows(table: str) -> list[tuple[str, ...]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]


def test_tables_agree_with_the_paper_to_its_printed_digits() -> None:
    seven, eight, nine = re.split(r"Table [89]\.", paper_tables(load_registry()))
    assert {row[1]: row[2:] for row in rows(seven)[:-1]} == TABLE_7
    assert rows(seven)[-1][0] == "total"
    assert rows(seven)[-1][-1] == "21,687,369,728"
    assert {row[1]: row[2:] for row in rows(eight)[:-1]} == TABLE_8
    assert rows(eight)[-1][2:] == ("0.0000", "0.7659", "0.2138", "0.0990")
    assert {row[1]: row[2:] for row in rows(nine)} == TABLE_9
    assert nine.count("(inferred)") == 4
    assert "arXiv:2605.25949), Appendix F" in nine


def test_tables_are_aligned_markdown_in_the_papers_order() -> None:
    for table in re.split(r"Table [89]\.", paper_tables(load_registry())):
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({len(line) for line in lines}) == 1
        assert len({line.count("|") for line in lines}) == 1
        assert [row[1] for row in rows(table) if row[1]] == list(TABLE_7)
