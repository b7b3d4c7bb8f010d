"""Evaluation on real shards: what is measured (against plain numpy on the frames), written, refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from data_pipeline.shards.build import build_shards
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader
from fm.config import ValidationSettings
from fm.datasets import dataset_specs
from fm.evaluation.errors import ErrorFile, Errors
from fm.evaluation.evaluate import ValidationResult, evaluate_model, validate
from fm.evaluation.measure import (
    SHOWN_STEPS,
    choose_shown,
    dataset_errors,
    measure_rollouts,
    measure_windows,
    one_step_windows,
    rollout_batches,
)
from fm.evaluation.protocol import PROTOCOLS, Protocol
from fm.evaluation.samples import evenly_spaced, load_samples
from fm.evaluation.scores import Scores, score
from fm.evaluation.stencil_choice import fitted_stencils
from fm.model.spec import DatasetSpec, ModelConfig
from fm.model.wavelit import WaveLiTFM

CPU = torch.device("cpu")
THIRDS = PROTOCOLS["thirds"]


def make_model(readers: dict[str, ShardReader]) -> WaveLiTFM:
    specs = [
        DatasetSpec(name, m.state_channels, m.constant_channels, m.boundary, m.stats)
        for name, m in ((name, reader.manifest) for name, reader in readers.items())
    ]
    model = WaveLiTFM(ModelConfig(width=32, depth=1, heads=2), specs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # some weights start at zero: an untrained model would be persistence itself
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def one_step_errors(model: WaveLiTFM, reader: ShardReader, windows: np.ndarray, batch_size: int = 8) -> Errors:
    measured = measure_windows(model, reader, windows, CPU, batch_size)
    return dataset_errors(reader, [], THIRDS, [measured], []).one_step


def rollout_errors(
    model: WaveLiTFM, reader: ShardReader, trajectories: list[int], protocol: Protocol, batch_size: int = 8
) -> Errors:
    batches = rollout_batches(reader, trajectories, protocol, batch_size)
    measured = [measure_rollouts(model, reader, ids, protocol, CPU) for ids in batches]
    return dataset_errors(reader, trajectories, protocol, [], measured).rollout


@pytest.fixture(scope="module")
def readers(tiny_shards: Path) -> dict[str, ShardReader]:
    return open_readers(tiny_shards, None, "test")


@pytest.fixture(scope="module")
def model(readers: dict[str, ShardReader]) -> WaveLiTFM:
    return make_model(readers)


@pytest.fixture(scope="module")
def report(
    model: WaveLiTFM, readers: dict[str, ShardReader], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Scores]:
    out = tmp_path_factory.mktemp("report") / "nested"
    return out, evaluate_model(model, readers, out, THIRDS, CPU, progress=False, origin={"step": 7})


def vrmse(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The Well's definition in plain numpy, (..., H, W) to (...)."""
    prediction, target = prediction.astype(float), target.astype(float)
    error = ((prediction - target) ** 2).mean((-2, -1))
    return np.sqrt(error / (target.var((-2, -1), ddof=1) + 1e-7))


def frames(reader: ShardReader, trajectory: int) -> np.ndarray:
    return reader.trajectory_frames(trajectory, 0, reader.num_frames(trajectory))


def test_all_eight_datasets_are_scored_and_written(
    report: tuple[Path, Scores], readers: dict[str, ShardReader]
) -> None:
    out, scores = report
    assert len(readers) == 8
    assert list(scores.datasets) == sorted(readers)
    names = {path.name for path in out.iterdir()}
    assert {"errors.npz", "pictures", "scores.json", "scores.md"} <= names
    assert "parts" not in names

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((out / "scores.json").read_text(), parse_constant=refuse)["origin"] == {"step": 7}
    assert Scores.load(out / "scores.json") == scores
    assert score(ErrorFile.load(out / "errors.npz")) == scores
    text = (out / "scores.md").read_text()
    assert "Origin: step 7." in text
    assert "protocol thirds v1" in text
    for picture in [*readers, "overview", "growth"]:
        assert f"(pictures/{picture}.png)" in text
        image = imread(out / "pictures" / f"{picture}.png")
        assert image.shape[0] > 300
        assert image[..., :3].std() > 0.05


def test_persistence_is_the_input_frame(report: tuple[Path, Scores], readers: dict[str, ShardReader]) -> None:
    for name, part in report[1].datasets.items():
        reader = readers[name]
        runs = [frames(reader, index) for index in range(reader.num_trajectories)]
        one_step = np.concatenate([vrmse(run[:-1], run[1:]).mean(-1) for run in runs])
        assert part.one_step.count == len(one_step)
        assert part.one_step.persistence == pytest.approx(np.median(one_step), rel=1e-9)
        held = np.stack([vrmse(np.broadcast_to(run[0], run[1:].shape), run[1:]).mean(-1) for run in runs])
        cell = part.windows["last_third"]
        expected = np.median(held, axis=0)[cell.first - 1 : cell.last].mean()
        assert cell.persistence == pytest.approx(expected, rel=1e-9)
        assert cell.last == part.horizon == reader.num_frames(0) - 1


def test_the_mean_field_scores_about_one(report: tuple[Path, Scores]) -> None:
    for part in report[1].datasets.values():
        for cell in part.blocks().values():
            assert cell.mean_field == pytest.approx(1, abs=0.01)


def test_linear_stencils_are_measured_on_the_same_frames(
    model: WaveLiTFM, readers: dict[str, ShardReader], tiny_shards: Path, tmp_path: Path
) -> None:
    name, others = "shear_flow", {"shear_flow": readers["shear_flow"], "active_matter": readers["active_matter"]}
    fit = (ShardReader(tiny_shards, name, "train"), ShardReader(tiny_shards, name, "valid"))
    scores = evaluate_model(
        model, others, tmp_path / "out", THIRDS, CPU, progress=False, fit_readers={name: fit}, cache=tmp_path
    )
    assert scores.datasets["active_matter"].one_step.linear_stencil is None
    errors = ErrorFile.load(tmp_path / "out" / "errors.npz").datasets[name]
    assert errors.stencil == scores.datasets[name].stencil is not None
    stencils = fitted_stencils(*fit, THIRDS, 0, CPU, tmp_path)
    run = frames(readers[name], 1)
    state = next(stencils.one_step.predict(readers[name], [1], [5]))[0].numpy()
    np.testing.assert_allclose(errors.one_step.vrmse("linear_stencil", 1e-7)[1, 5], vrmse(state, run[6]), rtol=1e-3)
    states = stencils.rollout.predict(readers[name], [1], [0])
    for step in range(1, len(run)):
        measured = errors.rollout.vrmse("linear_stencil", 1e-7)[1, step - 1]
        np.testing.assert_allclose(measured, vrmse(next(states)[0].numpy(), run[step]), rtol=1e-3)
    part = scores.datasets[name]
    assert part.one_step.linear_stencil < part.one_step.persistence


def test_model_errors_lie_where_they_belong(
    report: tuple[Path, Scores], model: WaveLiTFM, readers: dict[str, ShardReader]
) -> None:
    errors = ErrorFile.load(report[0] / "errors.npz")
    reader, trajectory, frame = readers["shear_flow"], 1, 5
    batch = torch.from_numpy(reader.trajectory_frames(trajectory, frame, 2))
    constants = torch.from_numpy(reader.constants(trajectory))[None]
    with torch.no_grad():
        fixed = model.normalize_constants(constants, "shear_flow")
        state = model.eval()(model.normalize(batch[:1], "shear_flow"), fixed, "shear_flow")
        prediction = model.denormalize(state, "shear_flow")[0].numpy()
    measured = errors.datasets["shear_flow"].one_step.vrmse("model", 1e-7)[trajectory, frame]
    np.testing.assert_allclose(measured, vrmse(prediction, batch[1].numpy()), rtol=1e-3)
    assert (np.abs(measured - errors.datasets["shear_flow"].one_step.vrmse("persistence", 1e-7)[1, 5]) > 1e-3).all()


def test_the_first_step_of_a_rollout_is_the_first_one_step_window(report: tuple[Path, Scores]) -> None:
    for part in ErrorFile.load(report[0] / "errors.npz").datasets.values():
        np.testing.assert_array_equal(part.rollout.persistence[:, 0], part.one_step.persistence[:, 0])
        np.testing.assert_allclose(part.rollout.model[:, 0], part.one_step.model[:, 0], rtol=1e-3)
        assert not np.allclose(part.rollout.model[:, 1], part.one_step.model[:, 1], rtol=1e-2)


def test_the_batch_size_does_not_matter(model: WaveLiTFM, readers: dict[str, ShardReader]) -> None:
    reader = readers["gray_scott_reaction_diffusion"]
    windows, everything = np.arange(len(reader.index(2))), list(range(reader.num_trajectories))
    one, many = (one_step_errors(model, reader, windows, size) for size in (1, 5))
    np.testing.assert_allclose(one.model, many.model, rtol=1e-3)
    one, many = (rollout_errors(model, reader, everything, THIRDS, size) for size in (1, 5))
    np.testing.assert_allclose(one.model[:, :3], many.model[:, :3], rtol=1e-2)


def test_what_pictures_show_is_a_rollout_and_its_truth(
    report: tuple[Path, Scores], readers: dict[str, ShardReader]
) -> None:
    samples = load_samples(report[0] / "samples.npz")
    assert [sample.dataset for sample in samples] == sorted(readers)
    for sample in samples:
        reader = readers[sample.dataset]
        channel = reader.manifest.state_channels.index(sample.channel)
        run = frames(reader, sample.trajectory)
        assert sample.steps == tuple(range(1, len(run)))
        np.testing.assert_array_equal(sample.truth, run[1:, channel])
        np.testing.assert_allclose(sample.vrmse, vrmse(sample.prediction, sample.truth), rtol=1e-4)
    assert samples[1].channel != readers["active_matter"].manifest.state_channels[0]  # it is all but constant


def test_of_a_long_rollout_some_steps_are_shown(readers: dict[str, ShardReader]) -> None:
    reader, steps = readers["shear_flow"], evenly_spaced(100, SHOWN_STEPS)
    assert (len(steps), steps[0], steps[-1]) == (24, 0, 99)
    assert np.ptp(np.diff(steps)) <= 1
    assert choose_shown(reader, dataclasses.replace(THIRDS, max_steps=3)).steps == (1, 2, 3)


def test_a_subset_of_windows_leaves_the_others_out(model: WaveLiTFM, readers: dict[str, ShardReader]) -> None:
    reader = readers["shear_flow"]
    errors = one_step_errors(model, reader, np.array([0, 9]))
    trajectories, firsts = reader.index(2).locate(np.array([0, 9]))
    assert list(zip(*np.nonzero(errors.present), strict=True)) == list(zip(trajectories, firsts, strict=True))


def test_the_windows_of_a_protocol_are_all_or_evenly_spaced(readers: dict[str, ShardReader]) -> None:
    reader = readers["shear_flow"]
    total = len(reader.index(2))
    assert one_step_windows(reader, THIRDS).tolist() == list(range(total))
    for count, expected in ((1, [0]), (2, [0, total - 1]), (total + 5, list(range(total)))):
        some = dataclasses.replace(THIRDS, one_step_windows=count)
        assert one_step_windows(reader, some).tolist() == expected
    five = one_step_windows(reader, dataclasses.replace(THIRDS, one_step_windows=5))
    assert np.ptp(np.diff(five)) <= 1


def test_a_later_start_frame_moves_the_rollout(
    model: WaveLiTFM, readers: dict[str, ShardReader], tmp_path: Path
) -> None:
    reader = readers["shear_flow"]
    scores = evaluate_model(model, {"shear_flow": reader}, tmp_path, PROTOCOLS["well"], CPU, progress=False)
    part, run = scores.datasets["shear_flow"], frames(reader, 0)
    assert part.horizon == len(run) - 4
    assert part.windows == {"6:12": None, "13:30": None}
    errors = ErrorFile.load(tmp_path / "errors.npz").datasets["shear_flow"].rollout
    held = np.broadcast_to(run[3], run[4:].shape)
    np.testing.assert_allclose(errors.vrmse("persistence", 1e-7)[0], vrmse(held, run[4:]), rtol=1e-9)


def test_trajectories_of_different_length(tiny_well: Path, tmp_path: Path) -> None:
    well = tmp_path / "well"
    shutil.copytree(tiny_well / "shear_flow", well / "shear_flow")
    shorten(sorted((well / "shear_flow" / "data" / "test").glob("*.hdf5"))[0], 6)
    build_shards(well, tmp_path / "shards", splits=["test"], jobs=1)
    reader = ShardReader(tmp_path / "shards", "shear_flow", "test")
    lengths = [reader.num_frames(index) for index in range(reader.num_trajectories)]
    assert set(lengths) == {6, 9}
    scores = evaluate_model(
        make_model({"shear_flow": reader}), {"shear_flow": reader}, tmp_path, THIRDS, CPU, progress=False
    )
    part = scores.datasets["shear_flow"]
    assert part.one_step.count == sum(length - 1 for length in lengths)
    assert [(cell.first, cell.last) for cell in part.windows.values()] == [(1, 2), (3, 5), (6, 8)]
    assert [cell.count for cell in part.windows.values()] == [len(lengths)] * 2 + [lengths.count(9)]
    rollout = ErrorFile.load(tmp_path / "errors.npz").datasets["shear_flow"].rollout
    assert rollout.steps.tolist() == [length - 1 for length in lengths]
    for index, length in enumerate(lengths):
        run = frames(reader, index)
        measured = rollout.vrmse("persistence", 1e-7)[index, : length - 1]
        np.testing.assert_allclose(measured, vrmse(np.broadcast_to(run[0], run[1:].shape), run[1:]), rtol=1e-9)


@pytest.mark.parametrize("frame", [0, 4])
def test_a_rollout_ends_before_frames_that_were_left_out(
    readers: dict[str, ShardReader], tiny_well: Path, tmp_path: Path, frame: int
) -> None:
    shutil.copytree(tiny_well / "shear_flow", tmp_path / "well" / "shear_flow")
    file = sorted((tmp_path / "well" / "shear_flow" / "data" / "test").glob("*.hdf5"))[0]
    with h5py.File(file, "r+") as well:
        well["t0_fields/tracer"][0, frame, 3, 3] = np.nan
    build_shards(tmp_path / "well", tmp_path / "shards", splits=["test"], jobs=1, skip=["nonfinite"])
    reader = ShardReader(tmp_path / "shards", "shear_flow", "test")
    chosen = list(range(reader.num_trajectories))
    (damaged,) = [i for i in chosen if not np.isfinite(frames(reader, i)).all()]
    whole = [reader.num_frames(i) - 1 for i in chosen]
    expected = [max(frame - 1, 0) if i == damaged else steps for i, steps in enumerate(whole)]
    errors = rollout_errors(make_model({"shear_flow": readers["shear_flow"]}), reader, chosen, THIRDS)
    assert errors.steps.tolist() == expected


def test_data_that_are_not_finite_are_not_scored(
    readers: dict[str, ShardReader], tiny_shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_shards / "shear_flow", tmp_path / "shear_flow")
    reader = ShardReader(tmp_path, "shear_flow", "test")
    stored = frames(reader, 1)[4].tobytes()
    (shard,) = [path for path in (tmp_path / "shear_flow" / "test").glob("*.tar") if stored in path.read_bytes()]
    damaged = np.frombuffer(stored, np.float32).copy()
    damaged[7] = np.nan
    shard.write_bytes(shard.read_bytes().replace(stored, damaged.tobytes()))
    reader = ShardReader(tmp_path, "shear_flow", "test")
    message = "shear_flow: expected finite data .* in trajectory 1, frame 4: `data-pipeline audit"
    with pytest.raises(UserError, match=message):
        rollout_errors(make_model({"shear_flow": readers["shear_flow"]}), reader, [0, 1], THIRDS)


def test_nothing_is_measured_in_tf32(model: WaveLiTFM, readers: dict[str, ShardReader]) -> None:
    reader, seen = readers["shear_flow"], set()

    def look(*_: object) -> None:
        seen.add((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))

    hook = model.register_forward_pre_hook(look)
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
        one_step_errors(model, reader, np.array([0]))
        rollout_errors(model, reader, [0], dataclasses.replace(THIRDS, max_steps=2))
        after = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    finally:
        hook.remove()
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
    assert seen == {(False, "highest")}
    assert after == (True, "high")


def shorten(file: Path, length: int) -> None:
    """Keep the first frames of a Well file: every array with a time axis, and the time axis itself."""
    with h5py.File(file, "r+") as well:
        frames = len(well["dimensions/time"])
        varying: list[tuple[str, int]] = [("dimensions/time", 0)]

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and name.startswith("t") and item.ndim > 1 and item.shape[1] == frames:
                varying.append((name, 1))

        well.visititems(visit)
        for name, axis in varying:
            values, attributes = well[name][()], dict(well[name].attrs)
            del well[name]
            well[name] = values[:length] if axis == 0 else values[:, :length]
            well[name].attrs.update(attributes)


def test_a_diverging_model_is_marked_and_drawn(readers: dict[str, ShardReader], tmp_path: Path) -> None:
    chosen = {"gray_scott_reaction_diffusion": readers["gray_scott_reaction_diffusion"]}
    model = make_model(chosen)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter *= 1e12
    scores = evaluate_model(model, chosen, tmp_path, THIRDS, CPU, progress=False)
    part = scores.datasets["gray_scott_reaction_diffusion"]
    everything = chosen["gray_scott_reaction_diffusion"].num_trajectories
    assert part.one_step.diverged == 0
    assert len(part.diverged) == everything == scores.diverged
    assert all(1 < step <= part.horizon for step in part.diverged.values())
    last = part.windows["last_third"]
    assert (last.median, last.mean, last.diverged) == (None, None, everything)
    assert last.persistence is not None
    assert f"{everything} of {everything} diverged" in (tmp_path / "scores.md").read_text()
    assert (tmp_path / "pictures" / "gray_scott_reaction_diffusion.png").stat().st_size > 10_000


def test_the_model_is_left_as_it_was(readers: dict[str, ShardReader], tmp_path: Path) -> None:
    chosen = {"helmholtz_staircase": readers["helmholtz_staircase"]}
    model = make_model(chosen).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate_model(model, chosen, tmp_path, THIRDS, CPU, progress=False)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_does_not_fit_is_refused_before_anything_is_written(
    model: WaveLiTFM, readers: dict[str, ShardReader], tiny_shards: Path, tmp_path: Path
) -> None:
    reader = readers["shear_flow"]

    def refused(message: str, model: WaveLiTFM, readers: dict[str, ShardReader], **change: Any) -> None:
        with pytest.raises(UserError, match=message):
            evaluate_model(model, readers, tmp_path / "out", dataclasses.replace(THIRDS, **change), CPU, progress=False)
        assert not (tmp_path / "out").exists()

    refused("expected another name for a dataset than overview, growth", model, {"growth": reader})
    refused(r"letters, digits, .* got '\.\./up'", model, {"../up": reader})
    refused("expected context 1", model, {"shear_flow": reader}, context=4)
    refused("trained on the state channels concentration", model, {"active_matter": reader})


VALIDATED = ["rayleigh_benard", "shear_flow"]


@pytest.fixture(scope="module")
def valid_readers(tiny_shards: Path) -> dict[str, ShardReader]:
    return open_readers(tiny_shards, VALIDATED, "valid")


def result_of(readers: dict[str, ShardReader], rollouts: int) -> ValidationResult:
    torch.manual_seed(0)
    model = WaveLiTFM(ModelConfig(width=32, depth=1, heads=2), dataset_specs(readers, load_registry())).eval()
    return validate(model, readers, ValidationSettings(windows=2, rollouts=rollouts, protocol="thirds"), CPU)


def test_one_rollout_of_each_dataset_is_kept_to_look_at(valid_readers: dict[str, ShardReader]) -> None:
    result = result_of(valid_readers, rollouts=1)
    assert list(result.samples) == VALIDATED
    for name, sample in result.samples.items():
        reader = valid_readers[name]
        assert (sample.dataset, sample.trajectory) == (name, 0)
        assert sample.steps == tuple(range(1, reader.num_frames(0)))  # 8 steps: all of them
        channel = reader.manifest.state_channels.index(sample.channel)
        truth = frames(reader, 0)[1:, channel]
        np.testing.assert_array_equal(sample.truth, truth)
        np.testing.assert_allclose(sample.vrmse, vrmse(sample.prediction, truth), rtol=1e-4)


def test_without_rollouts_there_is_nothing_to_look_at(valid_readers: dict[str, ShardReader]) -> None:
    assert not result_of(valid_readers, rollouts=0).samples
