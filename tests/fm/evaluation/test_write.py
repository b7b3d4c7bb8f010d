"""The files of an evaluation: all of them, and scores.json only where all of them are."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from error_files import error_file
from PIL import Image
from samples import ramp_sample

from fm.evaluation.errors import ErrorFile
from fm.evaluation.report import write_report
from fm.evaluation.samples import load_samples
from fm.evaluation.scores import score


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
    assert json.loads((tmp_path / "b" / "scores.json").read_text()) == score(errors)


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
