"""The report of an evaluation: complete, self-contained, honest about what diverged; `fm score` without torch."""

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from error_files import error_file
from html_reader import Reader
from PIL import Image
from samples import ramp_sample

from data_pipeline.errors import UserError
from fm.cli import main
from fm.evaluation.errors import ErrorFile, StencilChoice
from fm.evaluation.pictures import gif
from fm.evaluation.protocol import PROTOCOLS, load_protocol
from fm.evaluation.report import report_page, rescore, write_report
from fm.evaluation.samples import Sample, load_samples, save_samples
from fm.evaluation.scores import Scores, score

ORIGIN = {"checkpoint": "runs/demo/checkpoints/step_00000150", "step": 150, "weights": "5ea1"}


def page_of(errors: ErrorFile, names: tuple[str, ...] = ()) -> str:
    """With a sample and a video of each of these datasets."""
    samples = [ramp_sample(dataset=name, domain=((0.0, 1.0), (-1.0, 1.0))) for name in names]
    videos = {sample.dataset: gif(sample, side=40) for sample in samples}
    pictures = {name: gif(ramp_sample(), side=20, labeled=False) for name in ("overview", "growth", "spectra", *names)}
    return report_page(errors, score(errors), samples, pictures, videos)


@pytest.fixture(scope="module")
def whole() -> str:
    return page_of(
        replace(error_file(shear_flow=0.25, active_matter=1.5), origin=ORIGIN), ("active_matter", "shear_flow")
    )


def test_nothing_comes_from_elsewhere(whole: str) -> None:
    read = Reader(whole)
    assert not read.of("script")
    assert not read.of("link")
    sources = [str(value) for _, attributes in read.tags for key, value in attributes.items() if key in ("src", "href")]
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert "url(" not in whole
    assert "@import" not in whole


def test_links_lead_to_sections_and_pictures_have_words(whole: str) -> None:
    read = Reader(whole)
    anchors = {attributes["id"] for _, attributes in read.tags if "id" in attributes}
    assert {str(link["href"])[1:] for link in read.of("a")} <= anchors
    images = read.of("img")
    assert len(images) == 3 + 2 * 2
    assert all(len(str(image["alt"])) > 10 for image in images)
    assert len(read.of("figcaption")) == len(images)
    assert len(read.of("caption")) == len(read.of("table"))


def test_the_title_says_whose_scores_they_are(whole: str) -> None:
    texts = Reader(whole).texts
    assert texts.count("Evaluation of demo at step 150") == 2  # of the window, of the page
    assert {"runs/demo/checkpoints/step_00000150", "5ea1", "2 datasets, 6 trajectories, test split"} <= set(texts)
    assert any("protocol thirds v1: VRMSE in physical units, eps 1e-07" in text for text in texts)


def test_the_model_is_shaded_by_the_best_baseline(whole: str) -> None:
    shaded = re.findall(r'<td class="(better|worse)">([\d.]+)</td>', whole)
    assert shaded[:8] == [
        ("worse", "1.5000"), ("better", "0.2500"),  # one step
        *[("worse", "1.5000")] * 3, *[("better", "0.2500")] * 3,
    ]  # fmt: skip
    assert shaded[8:] == [("worse", "1.5000")] * 12 + [("better", "0.2500")] * 12  # by channel
    errors = error_file(shear_flow=0.25)
    part = errors.datasets["shear_flow"]
    better = replace(part.one_step, linear_stencil=np.full_like(part.one_step.model, 0.04))
    worse = replace(part, one_step=better, stencil=StencilChoice(3, 1e-6, 1, 0.1))
    page = page_of(replace(errors, datasets={"shear_flow": worse}))
    assert re.findall(r'<td class="(better|worse)">([\d.]+)</td>', page)[:2] == [
        ("worse", "0.2500"),
        ("better", "0.2500"),
    ]
    assert "frames, ridge 3, 1e-06 / 1, 0.1 (one step / rollouts)" in page
    assert Reader(whole).texts.count("1 of 2") == 2 * 4  # below persistence, below the mean field, in each block


def test_digests_and_commands_give_the_numbers_again(whole: str) -> None:
    assert {"digest of shear_flow", "digest of active_matter"} <= set(Reader(whole).texts)
    assert "fm score errors.npz --out DIR" in whole
    assert "fm evaluate RUN --protocol thirds --split test --out DIR" in whole
    subset = replace(PROTOCOLS["thirds"], one_step_windows=8)
    assert "--split test --windows 8 --out DIR" in page_of(error_file(subset, shear_flow=0.25))
    rescored = page_of(error_file(replace(subset, eps=1.25e-5), shear_flow=0.25))
    assert "--windows 8 --out MEASURED\nfm score MEASURED --eps 1.25e-05 --out DIR" in rescored
    earlier = page_of(error_file(load_protocol("wavelit@1"), shear_flow=0.25))
    assert "fm evaluate RUN --protocol wavelit@1 --split test --out DIR" in earlier
    assert "--protocol wavelit --split test" in page_of(error_file(PROTOCOLS["wavelit"], shear_flow=0.25))
    mine = page_of(error_file(replace(subset, name="mine"), shear_flow=0.25))
    assert "with the protocol below in a file PROTOCOL.yaml\nfm evaluate RUN --protocol PROTOCOL.yaml --out DIR" in mine


@pytest.mark.parametrize("change", [{}, {"one_step_windows": 8}, {"name": "mine", "split": "valid"}, {"eps": 1.25e-5}])
def test_the_printed_command_scores_the_stored_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    errors = error_file(replace(PROTOCOLS["thirds"], **change), shear_flow=0.25)
    write_report(tmp_path, errors, score(errors), [])
    (command,) = re.findall(r"^fm (score errors.*)$", (tmp_path / "index.html").read_text(), re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 0
    scores = Scores.load(tmp_path / "DIR" / "scores.json")
    assert scores == score(errors)
    one_step = scores.datasets["shear_flow"].one_step
    assert one_step is not None
    assert one_step.median == pytest.approx(0.25 / (1 + change.get("eps", 1e-7)) ** 0.5, rel=1e-9)  # of unit variance


@pytest.mark.parametrize("name", ["thirds", "well"])
def test_the_printed_protocol_is_one_to_measure_with(tmp_path: Path, name: str) -> None:
    mine = replace(PROTOCOLS[name], name="mine", eps=1.25e-5)
    (written,) = [text for text in Reader(page_of(error_file(mine, shear_flow=0.25))).texts if text.startswith("{name")]
    (tmp_path / "PROTOCOL.yaml").write_text(written)
    assert load_protocol(tmp_path / "PROTOCOL.yaml") == mine


def test_a_diverged_rollout_is_counted_and_named() -> None:
    errors = error_file(shear_flow=0.25)
    part = errors.datasets["shear_flow"]
    model = part.rollout.model.copy()
    model[2, 7:] = np.inf
    broken = replace(part, rollout=replace(part.rollout, model=model))
    texts = Reader(page_of(replace(errors, datasets={"shear_flow": broken}))).texts
    assert "1 of 3 rollouts diverged." in texts
    assert "shear_flow: trajectory 2 at step 8" in texts
    assert texts.count("0.2500 (1 of 3 diverged)") == 2  # in the table of rollouts and in that of channels
    assert "None of 3 rollouts diverged: all their predictions are finite." in Reader(page_of(errors)).texts


def test_one_step_predictions_that_are_not_finite_are_counted() -> None:
    errors = error_file(shear_flow=0.25)
    part = errors.datasets["shear_flow"]
    model = part.one_step.model.copy()
    model[1, 3:5] = np.nan
    broken = replace(part, one_step=replace(part.one_step, model=model))
    texts = Reader(page_of(replace(errors, datasets={"shear_flow": broken}))).texts
    assert "2 of 27 one-step predictions are not finite." in texts
    assert "None of 3 rollouts diverged: all their predictions are finite." in texts
    assert not any("one-step predictions" in text for text in Reader(page_of(errors)).texts)


def test_names_are_escaped_and_missing_pictures_left_out() -> None:
    errors = replace(error_file(**{'a<i>"b': 0.5}), origin={"checkpoint": "<script>alert(1)</script>"})
    text = report_page(errors, score(errors), [], {}, {})
    read = Reader(text)
    assert not read.of("script")
    assert not read.of("i")
    assert not read.of("img")
    assert 'a<i>"b' in read.texts
    assert [heading["id"] for heading in read.of("h3")] == ['dataset-a<i>"b']


def test_a_report_can_be_made_again_from_its_own_files(tmp_path: Path) -> None:
    errors = error_file(shear_flow=0.25)
    write_report(tmp_path / "a", errors, score(errors), [ramp_sample(num_steps=8)])
    files = {str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*") if path.is_file()}
    pictures = {"growth.png", "overview.png", "spectra.png", "shear_flow.png", "shear_flow.gif"}
    assert files == {"errors.npz", "samples.npz", "scores.json", "scores.md", "index.html"} | {
        f"pictures/{name}" for name in pictures
    }
    for name in pictures:
        with Image.open(tmp_path / "a" / "pictures" / name) as opened:
            assert opened.format == name.rpartition(".")[2].upper()
            assert np.asarray(opened.convert("L")).std() > 5
    stored = ErrorFile.load(tmp_path / "a" / "errors.npz")
    write_report(tmp_path / "b", stored, score(stored), load_samples(tmp_path / "a" / "samples.npz"))
    for name in files - {"errors.npz", "samples.npz"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert Scores.load(tmp_path / "b" / "scores.json") == score(errors)


def test_without_rollouts_there_are_scores_and_growth(tmp_path: Path) -> None:
    errors = error_file(shear_flow=0.25)
    write_report(tmp_path, errors, score(errors), [])
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["growth.png"]
    assert load_samples(tmp_path / "samples.npz") == []
    assert (tmp_path / "index.html").read_text().count("<img") == 1


def test_a_report_that_is_not_finished_has_no_scores(tmp_path: Path) -> None:
    errors = error_file(shear_flow=0.25)
    write_report(tmp_path, errors, score(errors), [])
    broken = dataclasses.replace(ramp_sample(), truth=np.zeros((3, 4)))
    with pytest.raises(ValueError, match="broadcast"):
        write_report(tmp_path, errors, score(errors), [broken])
    assert (tmp_path / "errors.npz").exists()
    assert not (tmp_path / "scores.json").exists()


WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is not there")

sys.meta_path.insert(0, NoTorch())
from fm.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def fm(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process where `import torch` raises."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An evaluated run: errors at a variance of 1e-6 and, of one rollout, two frames."""
    file = error_file(shear_flow=0.5, active_matter=0.25, variance=1e-6)
    file.save(tmp_path / "run" / "report" / "errors.npz")
    fields = np.random.default_rng(0).random((2, 16, 16))
    sample = Sample("shear_flow", "b", 1, 0.5, (1, 9), fields, fields + 0.1, np.array([0.5, 0.5]))
    save_samples(tmp_path / "run" / "report" / "samples.npz", [sample])
    return tmp_path / "run"


def test_score_writes_a_report_without_torch(run: Path, tmp_path: Path) -> None:
    protocol = tmp_path / "early.yaml"
    protocol.write_text('name: early\nversion: 1\nwindows: {"1:2": [1, 2]}\nmax_steps: 2\n')
    out = tmp_path / "early"
    done = fm("score", run, "--protocol", protocol, "--eps", "1e-5", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "protocol early v1: VRMSE in physical units, eps 1e-05" in done.stdout
    scores = json.loads((out / "scores.json").read_text())
    expected = 0.5 * (1e-6 / 1.1e-5) ** 0.5
    assert scores["datasets"]["shear_flow"]["windows"]["1:2"]["median"] == pytest.approx(expected)
    stored = ErrorFile.load(out / "errors.npz")
    assert score(stored) == Scores.load(out / "scores.json")
    (sample,) = load_samples(out / "samples.npz")
    assert sample.vrmse == pytest.approx([expected, expected])
    assert done.stdout.strip() in (out / "scores.md").read_text()
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert float(rows[1]["median"]) == scores["datasets"]["shear_flow"]["one_step"]["median"]
    assert r"shear\_flow & 27 &" in (out / "scores.tex").read_text()
    assert (out / "pictures" / "shear_flow.png").is_file()


def test_score_prints_the_stored_files_own_scores_and_writes_nothing(run: Path) -> None:
    before = sorted(path.name for path in (run / "report").iterdir())
    done = fm("score", run / "report")
    assert done.returncode == 0, done.stderr
    assert "protocol thirds v1" in done.stdout
    assert sorted(path.name for path in (run / "report").iterdir()) == before


def test_compare_needs_no_torch_either(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    done = fm("compare", run, run, "--labels", "a,b", "--protocol", "wavelit@1", "--format", "json", "--out", out)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    whole = json.loads(out.read_text())
    assert whole["tables"][0]["head"] == ["dataset", "a", "b", "change", "persistence", "mean field", "linear stencil"]
    reasons = next(note for note in whole["notes"] if "shear_flow: not comparable" in note)
    assert "wavelit v1, published under wavelit v2 and well v2; start 0, published 3; short skip" in reasons
    assert "grid 16 x 16, published 256 x 512; 3 tr" in reasons
    listed = fm("compare", "--published")
    assert listed.returncode == 0, listed.stderr
    assert "Walrus" in listed.stdout
    for arguments in ((), (run, "--published")):
        failed = fm("compare", *arguments)
        assert (failed.returncode, failed.stderr) == (2, "error: compare: expected runs, or --published alone\n")


@pytest.mark.parametrize("change", [{"dataset": "rayleigh_benard"}, {"trajectory": 7}, {"steps": (1, 99)}])
def test_samples_of_another_evaluation_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    stored = run / "report" / "samples.npz"
    (sample,) = load_samples(stored)
    save_samples(stored, [dataclasses.replace(sample, **change)])
    assert main(["score", str(run), "--out", str(tmp_path / "out")]) == 2
    assert f"{stored}: expected fields of rollouts in the errors.npz beside it, got" in capsys.readouterr().err


def test_a_folder_and_a_file_are_not_taken_for_each_other(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert main(["score", str(run), "--out", str(file)]) == 2
    assert f"--out {file}: expected a folder to write a report into, got a file" in capsys.readouterr().err
    assert main(["compare", str(run), "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path}: expected a file to write, got a folder" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_an_evaluation_is_not_replaced_by_another_protocols(run: Path) -> None:
    done = fm("score", run, "--eps", "0", "--out", run / "report")
    assert done.returncode == 2
    assert "expected another folder than that of" in done.stderr
    assert "measured under protocol thirds: that evaluation would be replaced" in done.stderr
    assert fm("score", run, "--out", run / "report").returncode == 0
    assert ErrorFile.load(run / "report" / "errors.npz").protocol == PROTOCOLS["thirds"]


def test_what_was_not_measured_is_refused() -> None:
    file = error_file(dataclasses.replace(PROTOCOLS["thirds"], max_steps=9), shear_flow=0.5)
    with pytest.raises(UserError, match=r"protocol wavelit v1 needs rollouts of 60 steps; these .* at most 9"):
        rescore(file, "wavelit@1", None)
    with pytest.raises(UserError, match="protocol well v2 needs start 3"):
        rescore(file, "well", None)
    for eps in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--eps: expected a number of at least 0, got"):
            rescore(file, None, eps)
