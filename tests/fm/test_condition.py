"""model.condition: scalars in whole runs: training, resuming, scores, export, rollouts, extension; and without it."""

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import stir
from handmade_export import exported
from safetensors.torch import load_file
from whole_runs import log, small

from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from data_pipeline.schema import canonical, digest
from data_pipeline.well.hdf5 import WellFile, split_files
from data_pipeline.windows.loader import open_readers
from fm.checkpoint import find_checkpoint, load_pretrained
from fm.cli import main
from fm.config import Recipe, dump_recipe
from fm.datasets import build_model, with_scalars
from fm.evaluation.errors import ERROR_NAMES
from fm.evaluation.measure import measure_rollouts, measure_windows
from fm.evaluation.protocol import load_protocol
from fm.lab.diagnosis.subject import Subject
from fm.lab.workload import read_workload
from fm.model.surrogate import Surrogate
from fm.model.wavelit import WaveLiTFM
from fm.share.export import step_program
from fm.training.trainer import train

GRAY, SHEAR = "gray_scott_reaction_diffusion", "shear_flow"
CARDS = load_registry()
CPU = torch.device("cpu")


def recipe(shards: Path, folder: Path, condition: str = "scalars", **sections: Any) -> Recipe:
    model = {"width": 16, "depth": 1, "heads": 2, "wavelet": "haar", "condition": condition}
    return small(shards, folder, data={"datasets": [GRAY, SHEAR]}, **{"model": model, **sections})


@pytest.fixture(scope="module")
def model(tiny_shards: Path) -> WaveLiTFM:
    """A model whose every parameter is something, so that scalars matter. Read only."""
    made = build_model(recipe(tiny_shards, Path("unused")), open_readers(tiny_shards, [GRAY, SHEAR], "train"), CARDS)
    assert isinstance(made, WaveLiTFM)
    return stir(made).eval()


@pytest.fixture(scope="module")
def folder(model: WaveLiTFM, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model, exported. Read only."""
    return exported(model, tmp_path_factory.mktemp("conditioned") / "model", tiny_shards)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(run) / "model.safetensors")


def test_training_learns_from_scalars_that_differ_and_continues_bit_for_bit(tiny_shards: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "train": {"steps": 6, "draws": 2, "optimizer": "muon", "warmup_steps": 0},
        "tracking": {"every": 2, "progress": False, "gradient_cosine_every": 6},
    }
    whole = recipe(tiny_shards, tmp_path / "whole", **sections)
    assert train(whole) == 0
    trained = weights(tmp_path / "whole")
    moved = {name for name, one in trained.items() if name.startswith("scalars.rows.") and one.any()}
    assert moved == {f"scalars.rows.{name}" for name in ("F", "Rayleigh", "Schmidt", "k")}
    assert "scalars.rows.dt" in trained  # the same in all trajectories
    cut = dataclasses.replace(whole, run=dataclasses.replace(whole.run, dir=str(tmp_path / "cut"), stop_at=3))
    assert train(cut) == 0
    assert train(dataclasses.replace(cut, run=dataclasses.replace(cut.run, stop_at=None))) == 0
    again = weights(tmp_path / "cut")
    assert all(torch.equal(again[name], one) for name, one in trained.items())
    assert [line["loss"] for line in log(tmp_path / "cut")] == [line["loss"] for line in log(tmp_path / "whole")]


def test_specifications_take_the_cards_scalars_from_the_train_split(
    tiny_shards: Path, model: WaveLiTFM, tmp_path: Path
) -> None:
    reader = open_readers(tiny_shards, [GRAY], "train")[GRAY]
    values = [one.scalars["F"] for one in reader.manifest.trajectories]
    stats = model.specs[GRAY].scalars
    assert list(stats) == ["F", "dt", "k"]
    assert (stats["F"].mean, stats["F"].std) == (np.mean(values), np.std(values))
    assert (stats["dt"].mean, stats["dt"].std) == (40.0, 0.0)
    card = CARDS.card(GRAY)
    plain = dataclasses.replace(model.specs[GRAY], scalars={})
    planned = read_workload(recipe(tiny_shards, tmp_path / "planned")).model()
    assert planned.num_parameters() == model.num_parameters()
    assert list(with_scalars(plain, dataclasses.replace(card, scalars=("k",)), reader).scalars) == ["dt", "k"]

    copy = tmp_path / GRAY / "train"
    shutil.copytree(reader.folder, copy)
    content = json.loads((copy / "manifest.json").read_text())
    content.pop("digest")
    content["trajectories"][0]["scalars"]["keys"] = 1.0
    (copy / "manifest.json").write_bytes(canonical(content | {"digest": digest(content)}))
    other = open_readers(tmp_path, [GRAY], "train")[GRAY]
    with pytest.raises(UserError, match=r"the scalar 'keys' has the name of a method of torch.*Leave it out"):
        with_scalars(plain, dataclasses.replace(card, scalars=("keys",)), other)


def test_off_no_file_of_a_run_names_the_option(tiny_shards: Path, tmp_path: Path) -> None:
    assert train(recipe(tiny_shards, tmp_path / "run", "none", train={"steps": 1, "warmup_steps": 0})) == 0
    checkpoint = find_checkpoint(tmp_path / "run")
    assert not any("scalars." in name for name in weights(tmp_path / "run"))
    for text in ((checkpoint / "model.json").read_text(), (tmp_path / "run" / "recipe.yaml").read_text()):
        assert "condition" not in text
        assert "scalars" not in text
    assert "condition" not in json.loads((checkpoint / "state.json").read_text())["recipe"]["model"]
    assert "condition: scalars" in dump_recipe(recipe(tiny_shards, tmp_path))


def test_scores_use_the_scalars_of_each_trajectory(tiny_shards: Path, model: WaveLiTFM) -> None:
    reader, row = open_readers(tiny_shards, [GRAY], "test")[GRAY], ERROR_NAMES.index("model")
    feeds = [one.scalars["F"] for one in reader.manifest.trajectories]
    assert len(set(feeds)) == len(feeds) == 2
    index = reader.index(2)
    ids = np.array([0, len(index) - 1])
    measured = measure_windows(model, reader, ids, CPU, batch_size=2)
    rolled = measure_rollouts(model, reader, [0, 1], load_protocol("thirds"), CPU)
    for place, trajectory in enumerate(index.locate(ids)[0].tolist()):
        scalars = reader.manifest.trajectories[trajectory].scalars
        window = reader.batch(ids[place : place + 1], 2)
        (own,) = model.iterate(window.fields[:, 0], window.constants, GRAY, 1, scalars)
        expected = (own - window.fields[:, 1]).double().square().mean(dim=(2, 3))[0]
        np.testing.assert_allclose(measured.values[place, row], expected, rtol=1e-4)

        start = torch.from_numpy(reader.trajectory_frames(trajectory, 0, 1))
        *_, last = model.iterate(start, window.constants, GRAY, 3, scalars)
        truth = torch.from_numpy(reader.trajectory_frames(trajectory, 3, 1))
        expected = (last - truth).double().square().mean(dim=(2, 3))[0]
        one = (rolled.trajectories == trajectory) & (rolled.steps == 2)
        np.testing.assert_allclose(rolled.values[one, row][0], expected, rtol=1e-4)
    without = measure_windows(without_rows(model), reader, ids, CPU, batch_size=2)
    assert (abs(without.values[:, row] / measured.values[:, row] - 1) > 1e-3).all()


def without_rows(model: WaveLiTFM) -> WaveLiTFM:
    copy = WaveLiTFM(model.config, list(model.specs.values())).eval()
    copy.load_state_dict({name: one * (not name.startswith("scalars")) for name, one in model.state_dict().items()})
    return copy


def test_a_diagnosis_steps_with_the_scalars(tiny_shards: Path, model: WaveLiTFM) -> None:
    reader = open_readers(tiny_shards, [GRAY], "test")[GRAY]
    subject = Subject(model, reader, CPU)
    frames = subject.frames([1], 1)
    raw = torch.from_numpy(reader.trajectory_frames(1, 0, 1))
    (expected,) = model.iterate(
        raw, torch.zeros(1, 0, *raw.shape[2:]), GRAY, 1, reader.manifest.trajectories[1].scalars
    )
    found = subject.step([1])(subject.state(frames, 0))
    torch.testing.assert_close(model.denormalize(found, GRAY), expected)
    absent = model(frames[:, 0], torch.zeros(1, 0, *raw.shape[2:]), GRAY)
    assert not torch.allclose(found, absent, rtol=1e-4, atol=1e-4)


def roll(folder: Path, source: Path, out: Path, *scalars: str) -> tuple[np.ndarray, dict[str, float]]:
    """The last frame of trajectory 0, (C, H, W), and its scalars."""
    command = ["rollout", str(folder), "--input", str(source), "--steps", "2", "--out", str(out)]
    assert main([*command, *(word for one in scalars for word in ("--scalar", one))]) == 0
    with WellFile(out, CARDS.card(GRAY)) as file:
        return file.read(0, 2, 3)[0], file.scalars(0)


def test_rollouts_take_the_files_scalars_and_those_of_the_command_line(
    folder: Path, model: WaveLiTFM, tiny_well: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = split_files(tiny_well / GRAY, "test")[0]
    with WellFile(source, CARDS.card(GRAY)) as file:
        first, stored = torch.from_numpy(file.read(0, 0, 1)), file.scalars(0)

    def expected(**scalars: float) -> np.ndarray:
        *_, last = model.iterate(first, torch.zeros(1, 0, *first.shape[2:]), GRAY, 2, {**stored, **scalars})
        return last[0].numpy()

    frame, scalars = roll(folder, source, tmp_path / "own.hdf5")
    np.testing.assert_allclose(frame, expected(), rtol=1e-5, atol=1e-6)
    assert scalars == stored
    assert "warning" not in capsys.readouterr().err
    frame, scalars = roll(folder, source, tmp_path / "other.hdf5", "F=0.05", "dt=41")
    np.testing.assert_allclose(frame, expected(F=0.05), rtol=1e-5, atol=1e-6)
    assert not np.allclose(frame, expected(), rtol=1e-3)
    assert scalars == {**stored, "F": pytest.approx(0.05)}
    said = capsys.readouterr().err
    assert "F is 0.05, in the training data it ran from 0.029 to 0.03" in said
    assert "dt is 41, in the training data it was always 40" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Re=1", "unknown scalars Re: its model takes F, dt, k"),
        ("F", "--scalar F: expected NAME=VALUE with a finite number"),
        ("F=nan", "--scalar F=nan: expected NAME=VALUE with a finite number"),
    ],
)
def test_wrong_scalars_are_one_message(
    folder: Path, tiny_well: Path, tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = split_files(tiny_well / GRAY, "test")[0]
    command = ["rollout", str(folder), "--input", str(source), "--steps", "1", "--out", str(tmp_path / "p.hdf5")]
    assert main([*command, "--scalar", text]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_program_takes_scalars_and_the_model_card_names_them(folder: Path, model: WaveLiTFM) -> None:
    program = torch.export.load(io.BytesIO(step_program(model, GRAY))).module()
    state = model.denormalize(torch.randn(3, 2, 32, 32, generator=torch.Generator().manual_seed(0)), GRAY)
    constants, nan = torch.zeros(3, 0, 32, 32), float("nan")
    given = torch.tensor([[0.029, 40.0, 0.06], [nan, nan, nan], [0.03, 40.0, nan]])  # F, dt, k
    columns = {name: given[:, place] for place, name in enumerate(("F", "dt", "k"))}
    (expected,) = model.iterate(state, constants, GRAY, 1, columns)
    torch.testing.assert_close(program(state, constants, given), expected, rtol=1e-4, atol=1e-5)
    card = (folder / "README.md").read_text()
    assert "| `gray_scott_reaction_diffusion` | `F`        | 0.029 to 0.03        |" in card
    assert 'PDE parameters condition it: `predict(..., scalars={"F": ...})`' in card
    assert "It reads no PDE parameters" not in card


def test_an_added_dataset_brings_rows_for_its_scalars(
    tiny_shards: Path, model: WaveLiTFM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = WaveLiTFM(model.config, [model.specs[GRAY]]).eval()
    alone.load_state_dict({name: one for name, one in model.state_dict().items() if name in alone.state_dict()})
    source = exported(alone, tmp_path / "old", tiny_shards)
    command = ["extend", str(source), "--dataset", SHEAR, "--shards", str(tiny_shards), "--out", str(tmp_path / "new")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "shear_flow: scalars that the model has not seen, with rows of zeros: Rayleigh, Schmidt" in said
    assert "4 windows" in said
    new: Surrogate = load_pretrained(tmp_path / "new")
    rows = {name: one for name, one in new.state_dict().items() if name.startswith("scalars.")}
    assert sorted(rows) == [f"scalars.rows.{name}" for name in ("F", "Rayleigh", "Schmidt", "dt", "k")]
    assert torch.equal(rows["scalars.rows.F"], model.scalars.rows["F"])
    assert not rows["scalars.rows.Rayleigh"].any()
    assert new.specs[SHEAR].scalars == model.specs[SHEAR].scalars
