"""The picture of a mini-Well: its size for what is there, and what it cannot do."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.miniwell.contact_sheet import contact_sheet
from data_pipeline.miniwell.generate import EIGHT, EXTRAS, SYSTEMS

CHEAP = "gray_scott_reaction_diffusion"


def test_contact_sheet_draws_what_is_there(tiny_well: Path, full_well: Path, tmp_path: Path) -> None:
    def size(well: Path, datasets: Sequence[str]) -> tuple[int, int]:
        picture = tmp_path / f"{len(datasets)}_{datasets[0]}.png"
        chosen = picture.with_suffix("")
        chosen.mkdir()
        for name in datasets:
            (chosen / name).symlink_to(well / name)
        contact_sheet(chosen, picture)
        data = picture.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")

    eight, one = size(tiny_well, EIGHT), size(tiny_well, [CHEAP])
    extras, everything = size(full_well, EXTRAS), size(full_well, sorted(SYSTEMS))
    assert eight[0] == one[0] == extras[0] == everything[0] > 1000
    assert eight[1] > len(EIGHT) / 2 * one[1]
    assert eight[1] < everything[1] < eight[1] + extras[1]


def test_contact_sheet_needs_data_and_a_known_format(tiny_well: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"expected at least one of .* found none\. Make them with: data-pipeline simulate"
    ):
        contact_sheet(tmp_path, tmp_path / "sheet.png")
    with pytest.raises(UserError, match=r"expected a picture file with one of the suffixes .*png.*; got .*sheet\.txt"):
        contact_sheet(tiny_well, tmp_path / "sheet.txt")
