"""The symmetries that a card may name, and what they do to the components of vectors and tensors."""

import re
from pathlib import Path

import pytest
from handmade_cards import CARD, complaint, write

from data_pipeline.registry import load_folders, load_registry
from data_pipeline.symmetries import SYMMETRIES, component_signs, exchanged_components, possible_symmetries

PERIODIC, CHANNEL = ("PERIODIC", "PERIODIC"), ("WALL", "WALL")
SQUARE = CARD.replace("y: [WALL, OPEN]", "y: [PERIODIC, PERIODIC]").replace("y: [-1, 1]", "y: [-2, 2]")


def with_symmetries(card: str, names: str) -> str:
    return f"{card}symmetries: {names}\n"


def test_a_card_names_them_and_needs_none(tmp_path: Path) -> None:
    named = "[shift_x, shift_y, reflect_x, reflect_y, transpose]"
    read = load_folders([write(tmp_path, with_symmetries(SQUARE, named))]).card("burgers")
    assert read.symmetries == SYMMETRIES
    assert load_folders([write(tmp_path, CARD)]).card("burgers").symmetries == ()


@pytest.mark.parametrize(
    ("card", "names", "reason"),
    [
        (CARD, "[shift_y]", r"symmetries\[0\]: expected a PERIODIC boundary along y for shift_y, got 'shift_y'"),
        (CARD, "[shift_x, reflect_y]", r"symmetries\[1\]: expected the same boundary at both ends of y for reflect_y"),
        (CARD, "[transpose]", r"symmetries\[0\]: expected the same boundary along x and y for transpose"),
        (SQUARE.replace("[-2, 2]", "[-1, 1]"), "[transpose]", "a domain of the same length along x and y"),
        (SQUARE, "[transpose, shift_x]", r"symmetries\[0\]: expected both or neither of shift_x and shift_y"),
        (SQUARE, "[reflect_x, transpose]", r"symmetries\[1\]: expected both or neither of reflect_x and reflect_y"),
        (SQUARE, "[shift_z]", r"symmetries\[0\]: expected a symmetry, got 'shift_z'. Did you mean 'shift_"),
        (SQUARE, "[shift_x, shift_x]", "expected names of symmetries, each once"),
        (SQUARE, "shift_x", "expected a list"),
    ],
)
def test_what_the_boundary_or_the_domain_rules_out_is_refused(
    tmp_path: Path, card: str, names: str, reason: str
) -> None:
    assert re.search(reason, complaint(write(tmp_path, with_symmetries(card, names))))


def test_components_follow_the_indices() -> None:
    orders = [0, 1, 2]  # s, v_x, v_y, T_xx, T_xy, T_yx, T_yy
    assert component_signs(orders, 0) == [1, -1, 1, 1, -1, -1, 1]
    assert component_signs(orders, 1) == [1, 1, -1, 1, -1, -1, 1]
    assert exchanged_components(orders) == [0, 2, 1, 6, 5, 4, 3]
    assert exchanged_components([1, 0, 1]) == [1, 0, 2, 4, 3]


def test_a_draft_lists_what_the_boundary_allows() -> None:
    assert possible_symmetries((PERIODIC, CHANNEL)) == ["shift_x", "reflect_x", "reflect_y"]
    assert possible_symmetries((("WALL", "OPEN"), ("WALL", "OPEN"))) == ["transpose"]
    assert possible_symmetries((PERIODIC, PERIODIC)) == list(SYMMETRIES)


def test_the_packaged_cards_name_these() -> None:
    letters = {"shift_x": "x", "shift_y": "y", "reflect_x": "X", "reflect_y": "Y", "transpose": "T"}
    cards = load_registry().select(None)
    assert {card.abbreviation: "".join(letters[name] for name in card.symmetries) for card in cards} == {
        "AM": "xyXYT",
        "GS": "xyXYT",
        "RB": "xX",
        "SF": "xyY",
        "TRL2D": "x",
        "VI": "xY",
        "ASM": "T",
        "HS": "X",
    }
