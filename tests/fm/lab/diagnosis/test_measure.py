"""`fm diagnose` on a real run, and its measurements against plain loops."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from whole_runs import small

from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from data_pipeline.windows.loader import open_readers
from fm.checkpoint import load_pretrained
from fm.cli import main as fm
from fm.lab.diagnosis.growth import derivative, transposed_derivative
from fm.lab.diagnosis.measure import diagnose, diagnose_run
from fm.lab.diagnosis.report import findings, page
from fm.lab.diagnosis.subject import Subject, choose_trajectories
from fm.training.trainer import train

DATASETS = ["helmholtz_staircase", "rayleigh_benard"]


@pytest.fixture(scope="module")
def run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps. Its report folder is the tests'; the rest is read only."""
    directory = tmp_path_factory.mktemp("runs") / "few_steps"
    recipe = small(tiny_shards, directory, data={"shards": str(tiny_shards), "datasets": DATASETS})
    assert train(recipe) == 0
    return directory


@pytest.fixture(scope="module")
def subject(run: Path, tiny_shards: Path) -> Subject:
    reader = open_readers(tiny_shards, ["rayleigh_benard"], "test")["rayleigh_benard"]
    return Subject(load_pretrained(run), reader, torch.device("cpu"))


def test_the_command_writes_numbers_pictures_and_a_page(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.progress.LINE_SECONDS", 0.0)
    assert fm(["diagnose", str(run), "--dataset", "helmholtz_staircase", "--trajectories", "2"]) == 0
    out = run / "report" / "diagnosis"
    assert sorted(path.suffix for path in out.glob("helmholtz_staircase.*")) == [".html", ".json", ".png"]
    content = json.loads((out / "helmholtz_staircase.json").read_text())
    printed, progress = capsys.readouterr()
    assert "diagnose helmholtz_staircase: 48 of 48 calls in" in progress
    for subject, text in content["findings"].items():
        assert f"{subject}: {text}" in printed
    assert content["num_steps"] == 8
    assert content["trajectories"] == [0, 1]
    assert content["floors"]["pointwise"] < 1e-5 < content["floors"]["model"]  # a rotation of each point
    np.testing.assert_allclose(np.prod(content["stability"]["true_flow"], axis=1), 1, rtol=1e-3)  # one whole turn
    assert "<!doctype html>" in (out / "helmholtz_staircase.html").read_text()


def test_measurements_are_those_of_plain_loops(subject: Subject, tiny_shards: Path) -> None:
    train_reader = open_readers(tiny_shards, ["rayleigh_benard"], "train")["rayleigh_benard"]
    found = diagnose(subject, train_reader, load_registry().card("rayleigh_benard"), (0,))
    assert found.stability.true_flow is None
    model, reader = subject.model, subject.reader
    raw = torch.from_numpy(reader.trajectory_frames(0, 0, reader.num_frames(0)))
    truth = model.normalize(raw, "rayleigh_benard")
    constants = model.normalize_constants(torch.from_numpy(reader.constants(0))[None], "rayleigh_benard")
    state = truth[:1]
    with torch.no_grad():
        for step in range(1, len(truth)):
            single = model(truth[step - 1 : step], constants, "rayleigh_benard")
            state = model(state, constants, "rayleigh_benard")
            for predicted, measured in ((state, found.growth.rollout), (single, found.growth.one_step)):
                error = (predicted[0] - truth[step]).square().mean().sqrt()
                assert measured[0, step - 1] == pytest.approx(float(error), rel=1e-4)
    unbiased = raw[-1].flatten(1).var(-1)
    scores = ((model.denormalize(state, "rayleigh_benard")[0] - raw[-1]).square().mean((-2, -1)) / unbiased).sqrt()
    assert found.growth.vrmse[0, -1] == pytest.approx(float(scores.mean()), rel=1e-3)
    assert found.drifts[0].label == "mean of velocity_y"
    assert (found.stability.largest_along_truth >= found.stability.along_truth.min()).all()


def test_trajectories_are_measured_one_by_one(run: Path, tiny_shards: Path) -> None:
    """Several are what each of them is alone, and the states of one are held at a time."""
    name = "helmholtz_staircase"
    test, train_reader = (open_readers(tiny_shards, [name], split)[name] for split in ("test", "train"))
    subject = Subject(load_pretrained(run), test, torch.device("cpu"))
    card = load_registry().card(name)
    held: list[int] = []

    class Watched(Subject):
        def frames(self, trajectories: Sequence[int], num_frames: int) -> torch.Tensor:
            held.append(len(trajectories))
            return super().frames(trajectories, num_frames)

    watched = Watched(subject.model, subject.reader, subject.device)
    both = diagnose(watched, train_reader, card, (0, 1))
    assert held == [1, 1]
    alone = [diagnose(subject, train_reader, card, (index,)) for index in (0, 1)]
    for row, one in enumerate(alone):
        np.testing.assert_array_equal(both.growth.rollout[row], one.growth.rollout[0])
        np.testing.assert_array_equal(both.bands.error[row], one.bands.error[0])
        for drift, single in zip(both.drifts, one.drifts, strict=True):
            np.testing.assert_array_equal(drift.prediction[row], single.prediction[0])
    assert both.growth.failed == alone[0].growth.failed + alone[1].growth.failed
    assert both.stability.along_truth.shape == both.growth.rollout.shape
    np.testing.assert_array_equal(both.stability.largest_along_truth, alone[0].stability.largest_along_truth)
    np.testing.assert_allclose(both.spectra.error, np.mean([one.spectra.error for one in alone], axis=0))


def test_a_model_that_is_nowhere_finite_is_diagnosed(run: Path, subject: Subject, tiny_shards: Path) -> None:
    model = load_pretrained(run)
    for parameter in model.parameters():
        parameter.detach().fill_(float("nan"))
    train_reader = open_readers(tiny_shards, ["rayleigh_benard"], "train")["rayleigh_benard"]
    broken = Subject(model, subject.reader, torch.device("cpu"))
    found = diagnose(broken, train_reader, load_registry().card("rayleigh_benard"), (0,))
    assert found.growth.recurrence is None
    assert found.growth.not_finite == (1,)
    text = findings(found)
    assert "the errors stop being finite too soon" in text["Error growth"]
    assert "not finite from step 1 on" in text["Scales"]
    assert "VRMSE not finite" in text["One step"]
    assert "<!doctype html>" in page(found, findings(found))


def test_derivatives_of_the_model_and_their_transposes_belong_together(subject: Subject) -> None:
    """<w, J v> = <J^T w, v>: the difference quotient against backpropagation."""
    state = subject.frames((0,), 1)[:, 0]
    generator = torch.Generator().manual_seed(0)
    v, w = (torch.randn(state.shape, generator=generator) for _ in range(2))
    step = subject.step((0,))
    forward = (w * derivative(step, state, v)).sum()
    backward = (transposed_derivative(step, state, w) * v).sum()
    assert float(forward) == pytest.approx(float(backward), rel=1e-3)


def test_trajectories_are_the_longest_evenly_spaced(subject: Subject) -> None:
    reader = subject.reader
    assert choose_trajectories(reader, 9) == tuple(range(reader.num_trajectories))
    assert choose_trajectories(reader, 1) == (0,)


def test_what_does_not_fit_is_explained(run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--trajectories: expected at least 1, got 0"):
        diagnose_run(run, "rayleigh_benard", trajectories=0)
    with pytest.raises(UserError, match=r"--dataset: expected one .*staircase, rayleigh_benard; got 'x'"):
        diagnose_run(run, "x")
    with pytest.raises(UserError, match=r"simulation\.json: expected what"):
        diagnose_run(run, "rayleigh_benard", out=tmp_path, well=tmp_path)
    with pytest.raises(UserError, match="no test shards under"):
        diagnose_run(run, "rayleigh_benard", shards=tmp_path)
    linked = shutil.copytree(run, tmp_path / "linked", ignore=shutil.ignore_patterns("report"))
    (linked / "report").symlink_to(tmp_path)
    with pytest.raises(UserError, match="got 'report/diagnosis', which leads out of it"):
        diagnose_run(linked, "rayleigh_benard")


def test_without_a_simulation_the_page_says_so(run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "well").mkdir()
    (tmp_path / "shards").symlink_to(tiny_shards)
    page = diagnose_run(run, "rayleigh_benard", shards=tmp_path / "shards", out=tmp_path / "out", trajectories=1)
    assert "how fast the true flow lets it grow is not known here" in page.read_text()
