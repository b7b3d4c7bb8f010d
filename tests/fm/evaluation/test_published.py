"""Published scores: all of them with their source, and beside ours only where they mean the same."""

import dataclasses
import re

import numpy as np
import pytest
from error_files import level_errors

from data_pipeline.registry import Registry, load_registry
from fm.evaluation.errors import DatasetErrors, ErrorFile
from fm.evaluation.protocol import PROTOCOLS, Protocol
from fm.evaluation.published import beside_published, published_document
from fm.evaluation.scores import score

WAVELIT = PROTOCOLS["wavelit"]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


def full_size(registry: Registry, *names: str, protocol: Protocol = WAVELIT, num_steps: int = 60) -> ErrorFile:
    """As measured on the published test split: the cards' grids and trajectories; VRMSE 0.5."""
    datasets = {}
    for card in registry.select(names):
        count = card.test_trajectories or 25
        errors = level_errors(count, num_steps, 1, 0.5)
        datasets[card.name] = DatasetErrors(("a",), np.arange(count), errors, errors, card.name, card.grid)
    return ErrorFile(protocol, datasets)


def test_all_published_tables_are_listed_with_their_source(registry: Registry) -> None:
    tables = {table.title: table for table in published_document(registry).tables}
    (one_step,) = (
        table for title, table in tables.items() if re.match(r".*Appendix J.*: one step \(protocol wav", title)
    )
    row = dict(zip(one_step.head, next(row for row in one_step.rows if row[0] == "rayleigh_benard"), strict=True))
    assert (row["Walrus"], row["9.5M-PT"], row["FM-FT"]) == (0.0059, 0.0065, 0.0198)
    assert len(one_step.rows) == 8
    missing = dict(zip(one_step.head, one_step.rows[0], strict=True))
    assert (missing["dataset"], missing["FM-PT"]) == ("acoustic_scattering_maze", None)
    assert sum("Table 10" in title for title in tables) == 1
    assert any("The Well, dataset page" in title and "protocol well v1" in title for title in tables)


def test_they_stand_beside_ours_where_all_agrees(registry: Registry) -> None:
    runs = {"ours": score(full_size(registry, "active_matter", "shear_flow"))}
    tables, notes = beside_published(runs, registry)
    assert [table.title for table in tables] == [
        f"Beside published scores: {what}" for what in ("one step", "1:20", "21:60")
    ]
    one_step = tables[0]
    assert one_step.head == ["model", "source", "AM", "SF"]
    assert one_step.rows[0][:2] == ["ours", ""]
    assert one_step.rows[0][2:] == pytest.approx([0.5, 0.5], rel=1e-6)
    rows = {(row[0], row[1]): list(row[2:]) for row in one_step.rows[1:]}
    assert rows["Walrus", "[1]"] == [0.0057, 0.0012]
    assert rows["joint 1.2M sqrt", "[2]"] == [0.079, 0.00839]
    assert ("CNextU-net", "[3]") not in rows  # of another protocol
    assert [note[:12] for note in notes] == ["Source [1]: ", "Source [2]: "]
    assert "WaveLiT paper, Table 10" in notes[1]


def test_otherwise_all_reasons_are_said_once(registry: Registry) -> None:
    file = full_size(registry, "active_matter")
    small = dataclasses.replace(file.datasets["active_matter"], grid=(64, 64), trajectories=np.arange(26)[:2])
    few = dataclasses.replace(small, rollout=level_errors(2, 60, 1, 0.5))
    tables, notes = beside_published(
        {"ours": score(dataclasses.replace(file, datasets={"active_matter": few}))}, registry
    )
    assert tables == []
    assert notes == [
        "active_matter: not comparable with published scores: grid 64 x 64, published 256 x 256; "
        "2 trajectories, published 26."
    ]


@pytest.mark.parametrize(
    ("protocol", "reason"),
    [
        (PROTOCOLS["thirds"], "protocol thirds v1, published under wavelit v1 and well v1"),
        (dataclasses.replace(WAVELIT, split="valid"), "split valid, published test"),
        (dataclasses.replace(WAVELIT, one_step_windows=8), "one_step_windows 8, published all"),
        (
            dataclasses.replace(WAVELIT, eps=1e-5, trajectories="mean"),
            "eps 1e-05, published 1e-07; trajectories mean, ",
        ),
        (dataclasses.replace(WAVELIT, version=2), "protocol wavelit v2, published under wavelit v1 and well v1"),
    ],
)
def test_another_protocol_is_not_comparable(registry: Registry, protocol: Protocol, reason: str) -> None:
    tables, notes = beside_published({"ours": score(full_size(registry, "shear_flow", protocol=protocol))}, registry)
    assert tables == []
    assert len(notes) == 1
    assert notes[0].startswith(f"shear_flow: not comparable with published scores: {reason}")


def test_scores_of_models_that_saw_more_frames_are_not_comparable(registry: Registry) -> None:
    well = full_size(registry, "shear_flow", protocol=PROTOCOLS["well"])
    tables, notes = beside_published({"ours": score(well)}, registry)
    assert tables == []
    assert notes == ["shear_flow: not comparable with published scores: context 1, published 4."]
    four = dataclasses.replace(PROTOCOLS["well"], context=4, start=3)
    (table,), _ = beside_published({"ours": score(full_size(registry, "shear_flow", protocol=four))}, registry)
    assert [row[0] for row in table.rows] == ["ours", "FNO", "TFNO", "U-net", "CNextU-net"]


def test_an_unknown_number_of_published_trajectories_does_not_agree(registry: Registry) -> None:
    tables, notes = beside_published({"ours": score(full_size(registry, "viscoelastic_instability"))}, registry)
    assert tables == []
    assert notes == [
        "viscoelastic_instability: not comparable with published scores: the number of published trajectories is not "
        "known."
    ]


def test_a_window_that_published_trajectories_do_not_reach_is_not_comparable(registry: Registry) -> None:
    """Those of viscoelastic_instability are of 20 and 60 frames, so what is published as 1:20 is of other steps."""
    names = ("viscoelastic_instability", "shear_flow")
    counted = dataclasses.replace(registry.card(names[0]), test_trajectories=25)
    known = dataclasses.replace(registry, cards={**registry.cards, names[0]: counted})
    tables, notes = beside_published({"ours": score(full_size(known, *names))}, known)
    assert [table.head[2:] for table in tables] == [["SF", "VI"], ["SF"], ["SF"]]
    assert notes[0] == (
        "viscoelastic_instability, 1:20: not comparable with published scores: not all published trajectories "
        "(20 or 60 frames) reach its last step."
    )


def test_a_dataset_without_a_card_or_published_scores_is_passed_over(registry: Registry) -> None:
    file = full_size(registry, "shear_flow")
    mine = dataclasses.replace(file, datasets={"mine": file.datasets["shear_flow"]})
    assert beside_published({"ours": score(mine)}, registry) == ([], [])
