"""The page of an evaluation: complete, self-contained, and honest about what diverged."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from error_files import error_file
from html_reader import Reader
from samples import ramp_sample

from fm.cli import main
from fm.evaluation.errors import ErrorFile
from fm.evaluation.pictures import gif
from fm.evaluation.protocol import PROTOCOLS, load_protocol
from fm.evaluation.report import page, write_report
from fm.evaluation.scores import score

ORIGIN = {"checkpoint": "runs/demo/checkpoints/step_00000150", "step": 150, "weights": "5ea1"}


def page_of(errors: ErrorFile, names: tuple[str, ...] = ()) -> str:
    """With a sample and a video of each of these datasets."""
    samples = [ramp_sample(dataset=name, domain=((0.0, 1.0), (-1.0, 1.0))) for name in names]
    videos = {sample.dataset: gif(sample, side=40) for sample in samples}
    pictures = {name: gif(ramp_sample(), side=20, labeled=False) for name in ("overview", "growth", "spectra", *names)}
    return page(errors, score(errors), samples, pictures, videos)


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


def test_ratios_are_shaded_by_the_side_of_1_they_are_on(whole: str) -> None:
    assert re.findall(r'<td class="(\w+)">([\d.]+)</td>', whole) == [
        ("worse", "1.5000"), ("better", "0.2500"),  # one step
        *[("worse", "1.5000")] * 3, *[("better", "0.2500")] * 3,
    ]  # fmt: skip
    assert Reader(whole).texts.count("1 of 2") == 2 * 4  # below persistence, below the mean field, in each block


def test_digests_and_commands_give_the_numbers_again(whole: str) -> None:
    assert {"digest of shear_flow", "digest of active_matter"} <= set(Reader(whole).texts)
    assert "fm score errors.npz --out DIR" in whole
    assert "fm evaluate RUN --protocol thirds --split test --out DIR" in whole
    subset = replace(PROTOCOLS["thirds"], one_step_windows=8)
    assert "--split test --windows 8 --out DIR" in page_of(error_file(subset, shear_flow=0.25))
    rescored = page_of(error_file(replace(subset, eps=1.25e-5), shear_flow=0.25))
    assert "--windows 8 --out MEASURED\nfm score MEASURED --eps 1.25e-05 --out DIR" in rescored
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
    assert json.loads((tmp_path / "DIR" / "scores.json").read_text()) == score(errors)


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
    text = page(errors, score(errors), [], {}, {})
    read = Reader(text)
    assert not read.of("script")
    assert not read.of("i")
    assert not read.of("img")
    assert 'a<i>"b' in read.texts
    assert [heading["id"] for heading in read.of("h3")] == ['dataset-a<i>"b']


def test_eps_is_shown_where_it_matters() -> None:
    assert "8 of 8 scores change by less than 1%: none is above that." in page_of(error_file(shear_flow=0.25))
    small = page_of(error_file(shear_flow=0.25, variance=1e-5))
    assert "0 of 8 scores change by less than 1%; the others:" in small
    none = page_of(error_file(shear_flow=np.inf))
    assert "0 of 0 scores change by less than 1%: none is above that." in none
    # variance 1e-5: sqrt((1e-5 + 1e-7) / (1e-5 + 1e-5)) = 0.711
    assert Reader(small).texts.count("0.7106") == 8
