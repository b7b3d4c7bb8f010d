"""Models of several input frames, from the recipe to a file of predictions: everything that knows n frames."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from handmade import make_inputs, make_spec, stir
from whole_runs import DATASETS, fm, last_weights, small

from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from data_pipeline.well.hdf5 import WellFile, split_files
from data_pipeline.windows.loader import open_readers
from fm.checkpoint import load_pretrained
from fm.config import Recipe
from fm.evaluation.errors import ErrorFile
from fm.evaluation.evaluate import evaluate_run
from fm.evaluation.protocol import PROTOCOLS
from fm.evaluation.tables import load_runs
from fm.model.baselines import Baseline, BaselineConfig
from fm.model.loss import vrmse
from fm.model.spec import ModelConfig
from fm.model.surrogate import Surrogate
from fm.model.wavelit import WaveLiTFM
from fm.share.export import export_run
from fm.share.extend import Rows, extend_model
from fm.training.trainer import train

MAZE = DATASETS[0]
CPU = torch.device("cpu")


def recipe(shards: Path, directory: Path, context: int = 2, **sections: Any) -> Recipe:
    validation = {"every": 4, "windows": 2, "protocol": "thirds"}
    sections = {"train": {"jitter": 0.01}, "validation": validation} | sections
    if "finetune" not in sections:
        sections["model"] = {"pointwise": True}
    return small(shards, directory, data={"datasets": [MAZE], "context": context}, **sections)


@pytest.fixture(scope="module")
def run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two input frames, with its report. Read only."""
    directory = tmp_path_factory.mktemp("context") / "two"
    assert train(recipe(tiny_shards, directory)) == 0
    evaluate_run(directory)
    return directory


@pytest.fixture(scope="module")
def model(run: Path) -> Surrogate:
    return load_pretrained(run)


@pytest.fixture(scope="module")
def maze(tiny_well: Path) -> Path:
    """The file of the test split, of one trajectory."""
    return split_files(tiny_well / MAZE, "test")[0]


def named(model: Surrogate, frames: torch.Tensor, constants: torch.Tensor) -> dict[str, np.ndarray]:
    """Frames (2, C, H, W) and constants (K, H, W) by channel."""
    spec = model.specs[MAZE]
    fields = dict(zip(spec.state_channels, frames.unbind(1), strict=True))
    return {
        name: one.numpy() for name, one in (fields | dict(zip(spec.constant_channels, constants, strict=True))).items()
    }


def test_the_earlier_frame_changes_the_prediction_and_without_its_rows_no_bit() -> None:
    spec = make_spec(MAZE)
    config = ModelConfig(16, 1, 2, pointwise=True)
    one, two = WaveLiTFM(config, [spec]), WaveLiTFM(config, [spec], context=2)
    assert set(two.lifting.rows) - set(one.lifting.rows) == {f"{name}@1" for name in spec.state_channels}
    weights = two.state_dict()
    for name, tensor in weights.items():
        if name.startswith("heads."):
            weights[name] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    two.load_state_dict(weights)
    state, constants = make_inputs(spec)
    earlier = torch.randn(state.shape, generator=torch.Generator().manual_seed(9))
    frames = torch.stack([earlier, state], dim=1)
    assert not torch.equal(two(frames, constants, MAZE), two(frames.roll(1, 1), constants, MAZE))
    with torch.no_grad():
        for name in spec.state_channels:
            two.lifting.rows[f"{name}@1"].zero_()
        two.heads[MAZE].pointwise[:, len(spec.state_channels) :] = 0
    shared = {name: two.state_dict()[name] for name in one.state_dict()}
    shared[f"heads.{MAZE}.pointwise"] = shared[f"heads.{MAZE}.pointwise"][:, : len(spec.state_channels)]
    one.load_state_dict(shared)
    torch.testing.assert_close(two(frames, constants, MAZE), one(state, constants, MAZE))


def test_a_baseline_has_slots_for_each_frame() -> None:
    pytest.importorskip("ptwt")
    specs = [make_spec(name) for name in (MAZE, "rayleigh_benard")]
    model = Baseline(BaselineConfig("wno", {"width": 8, "depth": 1}), specs, context=3)
    spec = model.specs[MAZE]
    state, constants = make_inputs(spec, 16, 16)
    frames = torch.stack([state, 2 * state, 4 * state], dim=1)
    x = model._joint_input(model.inputs(frames, constants, MAZE), spec)
    slots = dict(zip([*model.slots, *model.specs], x.unbind(1), strict=True))
    assert torch.equal(slots["pressure"], 4 * state[:, 0])
    for lag, change in ((1, 2 * state[:, 0]), (2, state[:, 0])):  # as normalized fields, then in units of their change
        std, mean_delta, std_delta = (spec.stats[key]["pressure"] for key in ("std", "mean_delta", "std_delta"))
        torch.testing.assert_close(slots[f"pressure@{lag}"], (change * std - mean_delta) / std_delta)
    assert torch.equal(slots["speed_of_sound"], constants[:, 1])
    assert "speed_of_sound@1" not in slots
    assert (slots["buoyancy@1"] == 0).all()


def test_scores_are_those_of_a_plain_loop_from_the_first_two_frames(
    run: Path, model: Surrogate, tiny_shards: Path
) -> None:
    errors = ErrorFile.load(run / "report" / "errors.npz")
    assert errors.protocol.context == 2
    reader = open_readers(tiny_shards, [MAZE], "test")[MAZE]
    frames = torch.from_numpy(reader.trajectory_frames(0, 0, reader.num_frames(0)))
    constants = torch.from_numpy(reader.constants(0))[None]
    found, steps = errors.datasets[MAZE], len(frames) - 2
    one_step, rollout = (part.vrmse("model", 1e-7)[0] for part in (found.one_step, found.rollout))
    assert np.isnan(one_step[0]).all()  # the window that predicts frame 1 has one input frame
    assert rollout.shape[0] == steps
    held = found.rollout.vrmse("persistence", 1e-7)[0]
    given = model.normalize(frames[None, :2], MAZE)
    fixed = model.normalize_constants(constants, MAZE)
    with torch.no_grad():
        for step in range(steps):
            true = model.normalize(frames[None, step : step + 2], MAZE)
            truth = frames[step + 2]
            single = model.denormalize(model(true, fixed, MAZE), MAZE)[0]
            np.testing.assert_allclose(one_step[step + 1], vrmse(single, truth), rtol=1e-4)
            predicted = model(given, fixed, MAZE)
            given = torch.stack([given[:, 1], predicted], dim=1)
            np.testing.assert_allclose(rollout[step], vrmse(model.denormalize(predicted, MAZE)[0], truth), rtol=1e-4)
            np.testing.assert_allclose(held[step], vrmse(frames[1], truth), rtol=1e-6)


def test_a_rollout_starts_where_the_protocol_says_or_after_the_context() -> None:
    thirds, well = PROTOCOLS["thirds"], PROTOCOLS["well"]
    assert [thirds.for_context(n).last_given for n in (1, 2, 4)] == [0, 1, 3]
    assert [well.for_context(n).last_given for n in (1, 2, 4, 5)] == [3, 3, 3, 4]  # The Well's models see frames 0 to 3
    assert "context 4; " in well.for_context(4).describe()


def test_a_continued_run_is_the_unbroken_one(run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    for stop in (5, None):
        assert train(recipe(tiny_shards, tmp_path / "broken", run={"stop_at": stop})) == 0
    assert last_weights(tmp_path / "broken") == last_weights(run)


def test_finetuning_keeps_the_context(run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    finetune = {"pretrained": str(run), "unroll_steps": 3}
    directory = tmp_path / "finetuned"
    assert train(recipe(tiny_shards, directory, train={"steps": 2}, finetune=finetune)) == 0
    assert load_pretrained(directory).context == 2
    with pytest.raises(UserError, match=r"data\.context: the recipe has 1 input frames, but .* trained with 2; write"):
        train(recipe(tiny_shards, tmp_path / "other", context=1, finetune=finetune))


def test_what_does_not_fit_is_one_message(run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.context: 9 input frames and one .* than the longest .* which has 9"):
        train(recipe(tiny_shards, tmp_path / "long", context=9))
    finetune = {"pretrained": str(run), "unroll_steps": 8}
    with pytest.raises(UserError, match=r"unroll_steps: 8 model steps take 10 frames, .*unroll_override\.\w+=7"):
        train(recipe(tiny_shards, tmp_path / "long", finetune=finetune))
    shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(UserError, match=r"context: 2 -> 1"):
        train(recipe(tiny_shards, tmp_path / "copy", context=1, train={"steps": 12}))


def test_runs_of_different_contexts_are_marked(run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    assert train(recipe(tiny_shards, tmp_path / "one", context=1, train={"steps": 1, "warmup_steps": 0})) == 0
    evaluate_run(tmp_path / "one")
    assert list(load_runs([run, tmp_path / "one"])) == ["two (2 frames)", "one (1 frame)"]
    done = fm("compare", str(run), str(tmp_path / "one"))
    assert done.returncode == 0
    assert "two (2 frames)" in done.stdout
    assert "context" not in done.stdout
    assert list(load_runs([run, run])) == ["two (1)", "two (2)"]


def test_fields_by_name_have_the_frames_before_the_axes_of_space(model: Surrogate, tiny_shards: Path) -> None:
    reader = open_readers(tiny_shards, [MAZE], "test")[MAZE]
    frames, constants = torch.from_numpy(reader.trajectory_frames(0, 3, 2)), torch.from_numpy(reader.constants(0))
    truth = torch.stack(list(model.iterate(frames[None], constants[None], MAZE, 3)), dim=1)[0]  # (3, C, H, W)
    fields = named(model, frames, constants)
    spec = model.specs[MAZE]
    single = model.predict(fields, MAZE, steps=3)
    batch = model.predict({name: one[None] if one.ndim == 3 else one for name, one in fields.items()}, MAZE, steps=3)
    variables = {name: (("time", "x", "y") if one.ndim == 3 else ("x", "y"), one) for name, one in fields.items()}
    given = xarray.Dataset(variables, {"time": [3.0, 4.0]})
    series = model.predict(given, MAZE, steps=3)
    for index, name in enumerate(spec.state_channels):
        np.testing.assert_array_equal(single[name], truth[:, index])
        np.testing.assert_array_equal(batch[name][0], truth[:, index])
        np.testing.assert_array_equal(series[name], truth[:, index])
    assert spec.dt is not None
    np.testing.assert_allclose(series["time"], 4.0 + spec.dt * np.arange(1, 4))
    for wrong in (frames[:1], frames[[0, 1, 1]], frames[0]):
        states = dict(zip(spec.state_channels, wrong.unbind(-3), strict=True))
        with pytest.raises(ValueError, match=r"the last 2 frames \(2, H, W\) or \(B, 2, H, W\) of all state"):
            model.predict({**fields, **states}, MAZE)
    with pytest.raises(ValueError, match=r"expected the dimensions time, x and y .*slice\(0, 2\)"):
        model.predict(given.isel(time=0), MAZE)
    with pytest.raises(ValueError, match=r"expected state fields \(B, 2, 3, H, W\)"):
        model(frames[:1], constants[None], MAZE)


def test_a_rollout_of_a_file_is_given_the_frames_before_it(
    run: Path, model: Surrogate, maze: Path, tmp_path: Path
) -> None:
    out = tmp_path / "predicted.hdf5"
    done = fm("rollout", str(run), "--input", str(maze), "--out", str(out), "--steps", "7")
    assert done.returncode == 0, done.stderr
    card = load_registry().card(MAZE)
    with WellFile(maze, card) as source, WellFile(out, card) as predicted:
        frames = torch.from_numpy(source.read(0, 0, 2))
        np.testing.assert_array_equal(predicted.read(0, 0, 1)[0], frames[1])
        assert predicted.times(0)[0] == source.times(0)[1]
    scored = fm("evaluate", str(out), "--truth", str(maze), "--out", str(tmp_path / "report"))
    assert scored.returncode == 0, scored.stderr
    ours, theirs = (ErrorFile.load(place / "errors.npz") for place in (tmp_path / "report", run / "report"))
    np.testing.assert_allclose(ours.datasets[MAZE].rollout.model, theirs.datasets[MAZE].rollout.model, rtol=1e-4)
    refused = fm(
        "rollout", str(run), "--input", str(maze), "--out", str(tmp_path / "q.hdf5"), "--steps", "1", "--start", "0"
    )
    assert refused.returncode == 2
    assert "--start: expected a frame from 1 to 8" in refused.stderr
    short = fm("rollout", str(run), "--input", str(maze), "--out", str(tmp_path / "short.nc"), "--steps", "1")
    assert short.returncode == 0
    with xarray.open_dataset(tmp_path / "short.nc", engine="h5netcdf") as file:
        file.isel(time=slice(0, 1)).to_netcdf(tmp_path / "one.nc", engine="h5netcdf")
    few = fm("rollout", str(run), "--input", str(tmp_path / "one.nc"), "--out", str(tmp_path / "r.nc"), "--steps", "1")
    assert few.returncode == 2
    assert "the model reads 2 frames, the file has 1" in few.stderr


def test_an_exported_model_has_its_context(
    run: Path, model: Surrogate, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.progress.LINE_SECONDS", 0.0)
    folder = export_run(run, tmp_path / "model", programs=[MAZE])
    assert capsys.readouterr().err.startswith("export: 1 of 1 program in ")
    again = load_pretrained(folder)
    assert again.context == 2
    card = (folder / "README.md").read_text()
    assert "from the last 2 frames of a simulation" in card
    assert "state = step(frames, constants)  # (B, 2, 3, 32, 32)" in card
    step = torch.export.load(folder / "programs" / f"{MAZE}.pt2").module()
    spec = model.specs[MAZE]
    frames = spec.moment("mean", spec.state_channels).float() + torch.randn(1, 2, 3, 32, 32)
    constants = torch.randn(1, 2, 32, 32)
    torch.testing.assert_close(step(frames, constants), next(model.iterate(frames, constants, MAZE, 1)))
    content = json.loads((folder / "model.json").read_text())
    assert content["context"] == 2
    for wrong in (0, "2", 1.5):
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / "model.json").write_text(json.dumps({**content, "context": wrong}))
        with pytest.raises(ValueError, match="context: expected a number of input frames"):
            WaveLiTFM.from_pretrained(tmp_path / "damaged")


def test_a_model_file_of_an_earlier_version_is_of_one_frame_and_predicts_the_same_bits(tmp_path: Path) -> None:
    spec = make_spec(MAZE)
    model = stir(WaveLiTFM(ModelConfig(16, 1, 2), [spec], seed=4)).eval()
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "model.json").read_text())
    assert content.pop("context") == 1
    for key in ("pointwise", "decoder", "decoder_width", "constraints"):
        del content["config"][key]
    for key in ("conserved", "ranges", "spacing"):
        del content["datasets"][0][key]
    (tmp_path / "model.json").write_text(json.dumps(content))
    again = WaveLiTFM.from_pretrained(tmp_path)
    state, constants = make_inputs(spec)
    assert torch.equal(again(state, constants, MAZE), model(state, constants, MAZE))


def test_an_added_dataset_gets_rows_for_each_frame() -> None:
    old = WaveLiTFM(ModelConfig(16, 1, 2), [make_spec("shear_flow")], seed=1, context=2)
    rows = {"buoyancy": Rows("copy", "tracer")}
    extended = extend_model(old, [make_spec("rayleigh_benard")], rows, seed=2)
    assert extended.context == 2
    for lag in ("", "@1"):
        assert torch.equal(extended.lifting.rows[f"buoyancy{lag}"], old.lifting.rows[f"tracer{lag}"])


def test_a_diagnosis_reads_the_frames(run: Path, tmp_path: Path) -> None:
    done = fm("diagnose", str(run), "--dataset", MAZE, "--trajectories", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / f"{MAZE}.json").read_text())
    assert content["num_steps"] == 7  # of nine frames
