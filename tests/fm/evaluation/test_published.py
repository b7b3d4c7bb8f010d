"""Published scores: all of them with their source, and beside ours only where they mean the same."""

import dataclasses
import re

import numpy as np
import pytest
from error_files import level_errors

from data_pipeline.registry import Registry, load_registry
from data_pipeline.tables import Marked
from fm.evaluation.errors import DatasetErrors, ErrorFile
from fm.evaluation.protocol import PROTOCOLS, Protocol, load_protocol
from fm.evaluation.published import beside_published, published_document
from fm.evaluation.scores import mean_ranks, score, wins

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
    maze = dict(zip(one_step.head, one_step.rows[0], strict=True))
    assert (maze["dataset"], maze["FM-PT"]) == ("acoustic_scattering_maze", Marked(0.008, "inferred"))  # lost
    assert maze["Walrus"] == 0.0099
    assert sum("Table 10" in title for title in tables) == 1
    assert any("The Well, dataset page" in title and "protocol well v2" in title for title in tables)
    kernels = next(table for title, table in tables.items() if "Table 1, Appendix B" in title)
    assert kernels.text_rows()[0] == ["DPA", "WaveLiT-9.5M", "1", "9.5 (inferred)", "212.8", "0.00458"]
    printed = {int(number) for title in tables for number in re.findall(r"WaveLiT paper, Table (\d+)", title)}
    assert printed == {1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13, 14, 18, 22}
    assert all(len(row) == len(table.head) for table in tables.values() for row in table.rows)


WAVELIT_MODELS = ("1.2M", "9.5M")  # a size competes with the better of its two models
BASELINES = ("MPP-AViT-L", "Poseidon-L", "DPOT-H", "Walrus")


def test_the_papers_ranks_follow_from_its_scores(registry: Registry) -> None:
    """Tables 15 to 17 give all 18 cells of Table 18, and with Tables 19 to 21 the 6 counts of Table 22."""
    tables = {re.sub(r".*Table (\d+),.*", r"\1", t.title): t for t in published_document(registry).tables}
    printed = {str(row[0]): row[2:] for row in tables["18"].rows}
    counts = {str(row[0]).split(" (")[0]: row[1] for row in tables["22"].rows}
    scores = {card.name: next(t for t in card.published if "Appendix J" in t.table) for card in registry.select(None)}
    won = dict.fromkeys(counts, 0)
    for column, window in enumerate(("one_step", "1:20", "21:60")):
        rows, cells = [], []
        for name, table in scores.items():
            vrmse = table.vrmse.get(window, {})
            sizes = (
                [min((vrmse[f"{size}-{kind}"] for kind in ("PT", "FT")), default=None) for size in WAVELIT_MODELS]
                if vrmse
                else [None, None]
            )
            rows.append([*sizes, *(vrmse.get(model) for model in BASELINES)])
            if name != "gray_scott_reaction_diffusion":  # by the paper, 20 cells
                cells.append([{**vrmse, **table.inferred.get(window, {})}.get(model) for model in counts])
        for model, rank in zip(("WaveLiT-1.2M", "WaveLiT-9.5M", *BASELINES), mean_ranks(rows), strict=True):
            assert rank is not None
            assert printed[model][column] == round(rank, 2), (model, window)
        for model, number in zip(counts, wins(cells), strict=True):
            won[model] += number
    assert won == counts


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
    assert rows["joint 1.2M sqrt", "[3]"] == [0.079, 0.00839]
    assert not any(model == "CNextU-net" for model, _ in rows)  # of another protocol
    assert rows["WNO", "[2]"] == [0.5736, None]
    assert [note[:12] for note in notes] == ["Source [1]: ", "Source [2]: ", "Source [3]: "]
    assert "WaveLiT paper, Table 10" in notes[2]


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
        (PROTOCOLS["thirds"], "protocol thirds v1, published under wavelit v2 and well v2"),
        (dataclasses.replace(WAVELIT, split="valid"), "split valid, published test"),
        (dataclasses.replace(WAVELIT, one_step_windows=8), "one_step_windows 8, published all"),
        (
            dataclasses.replace(WAVELIT, eps=1e-5, trajectories="mean"),
            "eps 1e-05, published 1e-07; trajectories mean, ",
        ),
        (
            load_protocol("wavelit@1"),
            "protocol wavelit v1, published under wavelit v2 and well v2; start 0, published 3",
        ),
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


def test_a_window_of_other_steps_than_published_is_not_comparable(registry: Registry) -> None:
    """Published trajectories of viscoelastic_instability have 20 and 60 frames, so its 1:20 are the steps 1 to 16."""
    names = ("viscoelastic_instability", "shear_flow")
    counted = dataclasses.replace(registry.card(names[0]), test_trajectories=25)
    known = dataclasses.replace(registry, cards={**registry.cards, names[0]: counted})
    file = full_size(known, *names)
    tables, notes = beside_published({"ours": score(file)}, known)
    assert [table.head[2:] for table in tables] == [["SF", "VI"], ["SF"], ["SF"]]
    assert notes[0] == (
        "viscoelastic_instability, 1:20: not comparable with published scores, which are of other steps: published "
        "trajectories have 20 or 60 frames."
    )
    part = file.datasets[names[0]]
    short = dataclasses.replace(part, rollout=level_errors(25, 16, 1, 0.5))
    cut = dataclasses.replace(file, datasets={**file.datasets, names[0]: short})
    tables, _ = beside_published({"ours": score(cut)}, known)
    assert [table.head[2:] for table in tables] == [["SF", "VI"], ["SF", "VI"], ["SF"]]
    mixed = level_errors(25, 56, 1, 0.5)
    for name in ("variance", "model", "persistence", "mean_field"):
        getattr(mixed, name)[0, 16:] = np.nan
    both = dataclasses.replace(file, datasets={names[0]: dataclasses.replace(part, rollout=mixed)})
    assert [table.title[-4:] for table in beside_published({"ours": score(both)}, known)[0]] == ["step", "1:20"]


def test_a_dataset_without_a_card_or_published_scores_is_passed_over(registry: Registry) -> None:
    file = full_size(registry, "shear_flow")
    mine = dataclasses.replace(file, datasets={"mine": file.datasets["shear_flow"]})
    assert beside_published({"ours": score(mine)}, registry) == ([], [])
