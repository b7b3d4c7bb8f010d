"""Training together beside training alone: the arithmetic by hand, the reading and the report on real runs."""

import csv
import io
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from whole_runs import DATASETS, log, small

from data_pipeline.errors import UserError
from data_pipeline.tables import Marked, render
from fm.checkpoint import load_pretrained
from fm.cli import main as fm
from fm.evaluation.cosines import Cosines
from fm.lab.learning_curves import LearningCurve, TrainedRun, compare, compare_all, match, read_run
from fm.lab.transfer import describe, transfer, transfer_figure
from fm.training.flops import forward_flops
from fm.training.trainer import train

MAZE, WAVES = DATASETS
OFTEN = {"every": 2, "windows": 3, "rollouts": 0}


def curve(*points: tuple[float, float], flops_of_a_window: float = 1e12) -> LearningCurve:
    windows, vrmse = np.array(points, np.float64).T
    return LearningCurve(windows, flops_of_a_window * windows, vrmse)


def run_of(name: str, curves: Mapping[str, LearningCurve], **sections: Any) -> TrainedRun:
    """A run as its directory would tell it."""
    recipe = small(Path("shards"), Path(name), **sections)
    return TrainedRun(Path(name), recipe, {dataset: f"digest of {dataset}" for dataset in curves}, 1000, curves, [])


@pytest.fixture(scope="module")
def runs(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`together`, of two datasets and 10 steps of 2 draws; `maze` and `waves`, of one each and one draw of 4."""
    root = tmp_path_factory.mktemp("runs")
    pair = {"train": {"steps": 10, "global_batch": 8, "draws": 2}, "tracking": {"gradient_cosine_every": 4}}
    assert train(small(tiny_shards, root / "together", **pair, validation=OFTEN)) == 0
    for name, dataset in (("maze", MAZE), ("waves", WAVES)):
        assert train(small(tiny_shards, root / name, data={"datasets": [dataset]}, validation=OFTEN)) == 0
    return root


def copy_of(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / run.name)


def rewrite(file: Path, change: Any) -> None:
    """Put every line of a log through `change`; None leaves it out."""
    lines = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines if line is not None))


def test_between_validations_vrmse_is_linear_in_the_logarithm_of_windows() -> None:
    found = curve((10, 1.0), (1000, 0.5), (1000, 0.4), (4000, math.inf))

    def at(windows: float) -> float:
        return match((found.windows, found.vrmse), (np.array([windows]), np.array([1.0]))).joint

    assert at(100) == pytest.approx(0.75)
    assert at(10) == 1.0
    assert at(1000) == 0.4  # of two validations after the same windows, the later one
    assert at(2000) == at(4000) == math.inf


@pytest.mark.parametrize(
    ("alone", "verdict"), [(0.51, "equal"), (0.49, "equal"), (0.52, "helps"), (0.48, "hurts"), (math.inf, "helps")]
)
def test_runs_are_compared_at_the_largest_number_of_windows_both_have_seen(alone: float, verdict: str) -> None:
    together = run_of("fm", {MAZE: curve((10, 1.0), (100, 0.5), (1000, 0.1)), WAVES: curve((5, 1.0))})
    comparison = compare([together], run_of("bespoke", {MAZE: curve((20, 0.9), (100, alone))}))
    found = comparison.windows
    assert (comparison.dataset, found.amount) == (MAZE, 100)
    assert (found.joint, found.bespoke) == (0.5, alone)
    assert found.ratio == pytest.approx(0.5 / alone)
    assert found.verdict == verdict


def test_after_equal_flops_the_bespoke_run_has_seen_more_of_its_dataset() -> None:
    """The joint run spends four fifths of its FLOPs on the other dataset."""
    together = run_of("fm", {MAZE: curve((10, 0.9), (100, 0.5), flops_of_a_window=5e12), WAVES: curve((5, 1.0))})
    alone = run_of("bespoke", {MAZE: curve((20, 0.8), (100, 0.4), (500, 0.1))})
    found = compare([together], alone)
    assert (found.windows.amount, found.windows.joint, found.windows.bespoke) == (100, 0.5, 0.4)
    assert (found.flops.amount, found.flops.joint, found.flops.bespoke) == (5e14, 0.5, 0.1)
    (table,) = describe([together], [found]).tables
    row = dict(zip(table.head, table.rows[0], strict=True))
    assert row["TFLOP"] == 500
    assert row["joint / bespoke, equal FLOPs"] == pytest.approx(5.0)
    short = compare([together], run_of("short", {MAZE: curve((20, 0.8), (40, 0.4))}))
    assert short.flops.amount is None  # 40 TFLOP, and the joint run's first validation is after 50
    unknown = curve((20, 0.8), (100, 0.4), flops_of_a_window=math.nan)
    for pair in ((together, run_of("x", {MAZE: unknown})), (run_of("fm", {MAZE: unknown}), alone)):
        found = compare([pair[0]], pair[1])
        assert (found.windows.amount, found.flops.amount) == (100, None)


def test_several_joint_runs_are_paired_by_seed_and_medians_are_given() -> None:
    joints = [
        run_of(f"fm{seed}", {MAZE: curve((5, level), (10, level)), WAVES: curve((10, 1.0))}, run={"seed": seed})
        for seed, level in enumerate((0.2, 0.9, 0.4))
    ]
    alone = [run_of(f"a{seed}", {MAZE: curve((10, 0.1))}, run={"seed": seed}) for seed in (2, 0)]
    # Two of seed 1: the short run ends at the joint run's 10 windows, the longer one at its 10 TFLOP.
    alone += [run_of("short", {MAZE: curve((10, 0.1), flops_of_a_window=6e11)}, run={"seed": 1})]
    longer = run_of("longer", {MAZE: curve((10, 0.025), (80, 0.0125), flops_of_a_window=1.25e11)}, run={"seed": 1})
    found, comparisons = compare_all(joints[0], [*alone, *joints[1:], longer])
    assert found == joints
    assert [one.joint.path.name for one in comparisons] == ["fm2", "fm0", "fm1", "fm1"]
    document = describe(joints, comparisons)
    text = render(document, "md")
    expected = [Marked(4.0, "3 seeds, 2.000 to 9.000"), Marked(4.0, "3 seeds, 2.000 to 72.000")]
    assert document.tables[1].rows[0][1:3] == expected
    assert "4.0000 (3 seeds, 2.000 to 9.000)" in text
    assert "seeds 0, 1, 2, were trained" in text
    transfer_figure(joints, comparisons).draw_without_rendering()
    assert len(describe(joints, comparisons[2:3]).tables) == 1  # nothing to take a median of
    with pytest.raises(UserError, match=r"got none of run\.seed=5 for b; leave it out"):
        compare(joints, run_of("b", {MAZE: curve((10, 0.1))}, run={"seed": 5}))
    with pytest.raises(UserError, match=r"different seeds, got run\.seed=0 in fm0 and in fm9; leave one of them out"):
        compare_all(joints[0], [*alone, run_of("fm9", {MAZE: curve((1, 1.0)), WAVES: curve((1, 1.0))})])
    with pytest.raises(UserError, match="got joint runs only; make a run of one dataset with"):
        compare_all(joints[0], joints[1:])


def test_the_papers_ratios_stand_beside_ours_with_the_rank_correlation() -> None:
    """FM-PT over 9.5M-PT, Appendix J: HS 0.0057 / 0.0005, GS 0.0032 / 0.0006, and the maze's 0.008 / 0.0016."""
    third = "gray_scott_reaction_diffusion"
    together = run_of("fm", {name: curve((10, 0.2)) for name in (MAZE, WAVES, third)})
    ours = {MAZE: 0.2, WAVES: 0.1, third: 0.05}
    comparisons = [compare([together], run_of(name, {name: curve((10, vrmse))})) for name, vrmse in ours.items()]
    document = describe([together], comparisons)
    column = document.tables[0].head.index("paper")
    papers = {row[0]: row[column] for row in document.tables[0].rows}
    assert papers[WAVES] == pytest.approx(11.4)
    assert papers[third] == pytest.approx(0.0032 / 0.0006)
    assert papers[MAZE] == Marked(pytest.approx(5.0), "inferred")
    # Ours are 1, 2 and 4, the paper's ranks 1, 3 and 2: Spearman's rho is 1 - 6 * 2 / (3 * 8).
    said = "rank correlation of ours with it: 0.50 at equal windows over 3 datasets"
    assert any(said in note for note in document.notes)


def test_what_has_diverged_alone_and_together() -> None:
    together = run_of("fm", {MAZE: curve((10, math.inf))})
    assert compare([together], run_of("bespoke", {MAZE: curve((10, 0.5))})).windows.verdict == "hurts"
    neither = compare([together], run_of("bespoke", {MAZE: curve((10, math.inf))}))
    assert neither.windows.verdict == "neither finite"
    text = render(describe([together], [neither]), "md")
    assert "| not finite | not finite |" in text
    assert "neither finite: 1." in text
    better = compare([run_of("fm", {MAZE: curve((10, 0.5))})], run_of("bespoke", {MAZE: curve((10, math.inf))}))
    other = compare([run_of("fm", {WAVES: curve((10, 0.5))})], run_of("bespoke", {WAVES: curve((10, 0.5))}))
    for one, verdict in ((better, "helps: 1, equal: 1"), (neither, "equal: 1, neither finite: 1")):
        text = render(describe([together], [one, other]), "md")
        assert f"- {verdict}. No mean of joint / bespoke, a score is not finite or 0: {MAZE}.\n" in text
        assert "Geometric mean" not in text


def test_nothing_is_extrapolated() -> None:
    together = run_of("fm", {MAZE: curve((10, 1.0), (40, 0.5))})
    late = compare([together], run_of("late", {MAZE: curve((50, 0.4), (90, 0.3))}))
    assert (late.windows.amount, late.windows.verdict) == (None, "not comparable")
    never = compare([together], replace(run_of("never", {MAZE: curve((1, 1.0))}), curves={}))
    text = render(describe([together], [late, never]), "md")
    assert f"{MAZE}: validated after 10 to 40 windows of it in fm, after 50 to 90 windows in late. Train on" in text
    assert "before any window in never" in text
    transfer_figure([together], [late, never]).draw_without_rendering()


def test_the_table_by_hand() -> None:
    cosines = [Cosines((MAZE, WAVES), np.array([[1, c], [c, 1]]), np.array([1.0, 2.0])) for c in (0.5, -0.25)]
    together = run_of("fm", {MAZE: curve((10, 0.2)), WAVES: curve((10, 0.9))}, train={"learning_rate": 0.01})
    together = replace(together, cosines=[(4, cosines[0]), (8, cosines[1])])
    alone = [run_of("a", {MAZE: curve((10, 0.4))}), run_of("b", {WAVES: curve((10, 0.3))})]
    document = describe([together], [compare([together], run) for run in alone])
    first, second = document.tables[0].rows
    paper = Marked(pytest.approx(5.0), "inferred")
    assert first == [MAZE, "a", 10, 0.2, 0.4, 0.5, "helps", 10.0, 0.5, paper, 1000, -0.25, 0.125]
    assert second[5:7] == [pytest.approx(3.0), "hurts"]
    notes = "\n".join(document.notes)
    assert f"helps: 1, hurts: 1. Geometric mean of joint / bespoke: {math.sqrt(1.5):.4f}." in notes
    assert "below 0.97" in notes
    assert "above 1.03" in notes
    assert "over all of 2 measurements" in notes
    assert "Settings of a, b -> fm: train.learning_rate: 0.003 -> 0.01." in notes
    assert "protocol thirds" in document.about


def test_two_runs_alone_are_two_rows_and_a_missing_one_is_told() -> None:
    together = run_of("fm", {MAZE: curve((10, 0.2), (20, 0.1)), WAVES: curve((10, 0.9))})
    alone = [run_of(name, {MAZE: curve((10, 0.4), (20, level))}) for name, level in (("a", 0.1), ("b", 0.3))]
    comparisons = [compare([together], run) for run in alone]
    document = describe([together], comparisons)
    assert [row[1] for row in document.tables[0].rows] == ["a", "b"]
    command = f"accelerate launch RECIPE 'data.datasets=[{WAVES}]' run.name=bespoke_{WAVES}"
    assert f"No run of {WAVES} alone; `{command}` makes one." in document.notes
    (axes,) = transfer_figure([together], comparisons).axes
    assert [line.get_label() for line in axes.lines].count("alone") == 2
    assert axes.lines[0].get_xdata().tolist() == [10, 20]


@pytest.mark.parametrize(
    ("bespoke", "message"),
    [
        (run_of("x", {"shear_flow": curve((1, 1.0))}), f"datasets of fm \\({MAZE}, {WAVES}\\), got x of shear_flow"),
        (run_of("x", {MAZE: curve((1, 1.0))}, validation={"windows": 5}), "got validation.windows=64 in fm and 5 in x"),
        (run_of("x", {MAZE: curve((1, 1.0))}, validation={"protocol": "wavelit"}), "validation.protocol=thirds in fm"),
        (replace(run_of("x", {MAZE: curve((1, 1.0))}), shards={MAZE: "other"}), f"expected the same {MAZE} data"),
    ],
)
def test_runs_that_do_not_compare(bespoke: TrainedRun, message: str) -> None:
    together = run_of("fm", {MAZE: curve((1, 1.0)), WAVES: curve((1, 1.0))})
    with pytest.raises(UserError, match=message):
        compare([together], bespoke)


def test_joint_runs_are_of_the_same_datasets() -> None:
    together = run_of("fm", {MAZE: curve((1, 1.0)), WAVES: curve((1, 1.0))})
    other = run_of("x", {MAZE: curve((1, 1.0)), "shear_flow": curve((1, 1.0))}, run={"seed": 1})
    message = f"expected runs of one dataset, or joint runs .* fm \\({MAZE}, {WAVES}\\), got x of {MAZE}, shear_flow"
    with pytest.raises(UserError, match=message):
        compare_all(together, [other])


def test_curves_are_the_validations_against_the_windows_drawn(runs: Path) -> None:
    together, maze = read_run(runs / "together"), read_run(runs / "maze")
    events = [json.loads(line) for line in (runs / "together/events.jsonl").read_text().splitlines()]
    validations = [line for line in events if line["kind"] == "validation"]
    assert [line["step"] for line in validations] == [2, 4, 6, 8, 10]
    names = [line["dataset"] for line in log(runs / "together")]
    assert any(name.count("+") for name in names)
    for dataset in DATASETS:  # two draws of four windows a step
        seen = [4 * "+".join(names[: line["step"]]).split("+").count(dataset) for line in validations]
        scores = [line["datasets"][dataset]["vrmse"] for line in validations]
        points = [(windows, score) for windows, score in zip(seen, scores, strict=True) if windows]
        found = together.curves[dataset]
        assert list(zip(found.windows.tolist(), found.vrmse.tolist(), strict=True)) == points
    assert maze.curves[MAZE].windows.tolist() == [8, 16, 24, 32]
    model = load_pretrained(runs / "together")
    cost = {name: 3 * forward_flops(model, name, model.specs[name].grid or (0, 0)) for name in DATASETS}
    assert len(set(cost.values())) == 2  # grids differ
    drawn = "+".join(names).split("+")
    assert together.curves[MAZE].flops[-1] == sum(4 * cost[name] for name in drawn)  # of both datasets
    assert together.curves[MAZE].flops[-1] == together.curves[WAVES].flops[-1]
    assert [step for step, _ in together.cosines] == [4, 8]
    assert together.parameters > maze.parameters > 0


def test_the_command_prints_the_table_and_writes_the_report(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.progress.LINE_SECONDS", 0.0)
    arguments = ["transfer", *(str(runs / name) for name in ("together", "waves", "maze"))]
    assert fm(arguments) == 0
    printed, progress = capsys.readouterr()
    assert progress.startswith("transfer: 1 of 3 runs in ")
    folder = runs / "together/report/transfer"
    assert printed in (folder / "transfer.md").read_text()
    assert {path.name for path in folder.iterdir()} == {"transfer.md", "transfer.json", "transfer.png", "cosines.png"}
    found = json.loads((folder / "transfer.json").read_text())
    assert [one["dataset"] for one in found["comparisons"]] == DATASETS
    for one in found["comparisons"]:
        ours, theirs = (run["curves"][one["dataset"]] for run in (found["joints"][0], one["bespoke"]))
        for amount in ("windows", "flops"):
            assert one[amount]["amount"] == min(ours[amount][-1], theirs[amount][-1])
            assert one[amount]["ratio"] == pytest.approx(one[amount]["joint"] / one[amount]["bespoke"])
        assert one["verdict"] in printed
    assert [line["step"] for line in found["cosines"]] == [4, 8]
    assert fm([*arguments, "--format", "csv", "--out", str(runs / "csv")]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [int(row["windows seen"]) for row in rows] == [one["windows"]["amount"] for one in found["comparisons"]]
    assert (runs / "csv/transfer.json").is_file()


def test_what_a_directory_must_hold(runs: Path, tmp_path: Path, tiny_shards: Path) -> None:
    with pytest.raises(UserError, match=r"absent: not a run directory, it has no log\.jsonl"):
        read_run(tmp_path / "absent")
    assert train(small(tiny_shards, tmp_path / "unscored", train={"steps": 2})) == 0
    with pytest.raises(UserError, match=r"expected validations in events\.jsonl, found none; train it with validation"):
        transfer(runs / "together", [tmp_path / "unscored"])
    damaged = copy_of(runs / "maze", tmp_path)
    rewrite(damaged / "log.jsonl", lambda line: line if line["step"] != 3 else None)
    with pytest.raises(UserError, match="expected a line for each of the steps 1 to 8, the last validation's"):
        read_run(damaged)
    torn = copy_of(runs / "waves", tmp_path)
    rewrite(torn / "events.jsonl", lambda line: {k: v for k, v in line.items() if k != "datasets"})
    with pytest.raises(UserError, match=r"events\.jsonl: a damaged line \(KeyError: 'datasets'\); remove it"):
        read_run(torn)


def test_a_format_that_is_none_is_refused_before_anything_is_written(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected one of md, csv, json, latex, got 'pdf'"):
        transfer(runs / "together", [runs / "maze"], tmp_path / "out", "pdf")
    assert not (tmp_path / "out").exists()
