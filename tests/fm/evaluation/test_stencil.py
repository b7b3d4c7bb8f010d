"""The linear stencil: against plain least squares and known equations, its boundaries, its past, its cache."""

import dataclasses
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from data_pipeline.errors import UserError
from data_pipeline.shards.build import build_shards
from data_pipeline.windows.loader import open_readers
from data_pipeline.windows.reader import ShardReader
from fm.evaluation import stencil as module
from fm.evaluation.errors import StencilChoice
from fm.evaluation.protocol import PROTOCOLS
from fm.evaluation.stencil import RADIUS, RIDGES, SIDE, fit, neighborhoods, sampled_points, train_windows
from fm.evaluation.stencil_choice import (
    cache_key,
    choose,
    fitted_stencils,
    linear_stencils,
    one_step_score,
    one_step_trials,
    rollout_score,
    rollout_trials,
)
from fm.model.block import pad_fields

CPU, THIRDS = torch.device("cpu"), PROTOCOLS["thirds"]
DATASET = "gray_scott_reaction_diffusion"  # two scalar channels, periodic


def laplacian(field: np.ndarray) -> np.ndarray:
    return sum(np.roll(field, shift, axis) for axis in (0, 1) for shift in (-1, 1)) - 4 * field


def smooth(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    field = generator.standard_normal(shape)
    for _ in range(10):
        field = field + 0.2 * laplacian(field)
    return field / field.std()


def equations(generator: np.random.Generator, frames: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A: the heat equation by explicit differences; B: the wave equation by leapfrog; (T, H, W) each."""
    heat, wave = [smooth(generator, shape)], [smooth(generator, shape)]
    wave.append(wave[0] + 0.3 * smooth(generator, shape))
    for _ in range(frames - 1):
        heat.append(heat[-1] + 0.1 * laplacian(heat[-1]))
        wave.append(2 * wave[-1] - wave[-2] + 0.25 * laplacian(wave[-1]))
    return {"A": np.stack(heat), "B": np.stack(wave[:frames])}


@pytest.fixture(scope="module")
def linear(tiny_well: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two linear equations, in the place of the tiny Gray-Scott data."""
    folder, generator = tmp_path_factory.mktemp("linear"), np.random.default_rng(0)
    shutil.copytree(tiny_well / DATASET, folder / "well" / DATASET)
    (folder / "well" / DATASET / "stats.yaml").unlink()
    for file in sorted((folder / "well").rglob("*.hdf5")):
        with h5py.File(file, "r+") as well:
            count, frames, *shape = well["t0_fields/A"].shape
            for index in range(count):
                for name, values in equations(generator, frames, tuple(shape)).items():
                    well[f"t0_fields/{name}"][index] = values
    build_shards(folder / "well", folder / "shards", jobs=1)
    return folder / "shards"


def splits(shards: Path, dataset: str = DATASET) -> tuple[ShardReader, ShardReader]:
    return ShardReader(shards, dataset, "train"), ShardReader(shards, dataset, "valid")


def test_the_heat_equation_takes_one_frame_and_the_wave_equation_two(linear: Path) -> None:
    train, valid = splits(linear)
    trials = [trial for trial in one_step_trials(valid, CPU) if trial.frames.shape[1] > 1]
    errors = [np.concatenate([one.vrmse(some[0], 0.0) for one in trials])[:, 0] for some in fit(train)]  # (N, C)
    assert errors[0][:, 0].max() < 1e-4  # heat
    assert errors[0][:, 1].min() > 0.02  # the velocity of a wave is not in one frame
    assert errors[1].max() < 1e-4
    rollouts = rollout_trials(valid, 1, None, CPU)  # with two true frames
    assert max(one.vrmse(fit(train)[1][0], 0.0).max() for one in rollouts) < 1e-2


@pytest.mark.parametrize("ridge", [0, RIDGES.index(1e-2)])
def test_weights_are_those_of_a_plain_solve(tiny_shards: Path, ridge: int) -> None:
    """(X, r I) W = (next frame, 0) by lstsq in float64, on features that plain loops build."""
    train = ShardReader(tiny_shards, "acoustic_scattering_maze", "train")
    manifest, rows, targets = train.manifest, [], []
    channels = (manifest.state_channels, manifest.constant_channels)
    mean, std = (np.array([manifest.stats[key][name] for some in channels for name in some]) for key in ("mean", "std"))
    windows = train_windows(train)
    count = min(-(-module.TRAIN_POINTS // len(windows)), manifest.grid[0] * manifest.grid[1])
    for window, trajectory, first in zip(windows, *train.index(2).locate(windows), strict=True):
        before, after = train.trajectory_frames(trajectory, first, 2).astype(float)
        fields = np.concatenate([before, train.constants(trajectory)])
        fields = (fields - mean[:, None, None]) / std[:, None, None]
        padded = np.pad(fields, ((0, 0), (2, 2), (2, 2)), mode="edge")  # walls and open ends
        fields = np.concatenate([padded[len(before) :], padded[: len(before)]])  # constants first
        for point in sampled_points(train, int(window), count).tolist():
            x, y = divmod(point, manifest.grid[1])
            rows.append(fields[:, x : x + SIDE, y : y + SIDE].ravel())
            targets.append((after - before)[:, x, y] / std[: len(before)])
    inputs, change = np.array(rows), np.array(targets)
    center = np.zeros((inputs.shape[1], change.shape[1]))
    for channel in range(change.shape[1]):
        center[(len(channels[1]) + channel) * SIDE**2 + SIDE**2 // 2, channel] = 1.0
    centered = inputs - inputs.mean(0)
    following = change - change.mean(0) + centered @ center  # the next frame, normalized
    strength = RIDGES[ridge] * np.square(centered).mean() * len(inputs)
    stacked = np.concatenate([centered, np.sqrt(strength) * np.eye(inputs.shape[1])])
    solved, *_ = np.linalg.lstsq(stacked, np.concatenate([following, np.zeros_like(center)]), rcond=None)
    found = fit(train)[0][ridge]
    weights = found.weights[0].double().numpy().reshape(len(change.T), -1).T
    scale = np.abs(centered @ (solved - center)).max()
    np.testing.assert_allclose(centered @ weights, centered @ (solved - center), atol=2e-4 * scale)
    expected = change.mean(0) - inputs.mean(0) @ weights
    np.testing.assert_allclose(found.biases[0].double().numpy(), expected, atol=1e-4)


def test_neighbors_wrap_on_periodic_axes_and_repeat_elsewhere(tiny_shards: Path) -> None:
    fields = torch.randn(2, 3, 32, 8, generator=torch.Generator().manual_seed(0))
    padded = pad_fields(fields, RADIUS, (True, False)).numpy()
    expected = np.pad(fields.numpy(), ((0, 0), (0, 0), (2, 2), (0, 0)), mode="wrap")
    expected = np.pad(expected, ((0, 0), (0, 0), (0, 0), (2, 2)), mode="edge")
    np.testing.assert_array_equal(padded, expected)
    manifest = ShardReader(tiny_shards, "rayleigh_benard", "train").manifest  # periodic along x, walls along y
    height, width = manifest.grid
    field = torch.randn(2, height, width, generator=torch.Generator().manual_seed(1))
    around = neighborhoods(field, torch.arange(height * width), manifest).reshape(height, width, 2, SIDE, SIDE)
    padded = pad_fields(field[None], RADIUS, (True, False))[0]
    for x, y in ((0, 0), (height - 1, width - 1), (5, 7)):
        np.testing.assert_array_equal(around[x, y], padded[:, x : x + SIDE, y : y + SIDE])


class Altered(ShardReader):
    """A reader whose frames from one on are others."""

    first_altered = 4

    def trajectory_frames(self, trajectory: int, first: int, length: int) -> np.ndarray:
        frames = super().trajectory_frames(trajectory, first, length)
        frames[max(0, self.first_altered - first) :] = 1e6
        return frames


def test_nothing_after_the_last_given_frame_is_used(tiny_shards: Path) -> None:
    train, valid = splits(tiny_shards)
    best = fit(train)[2][RIDGES.index(1e-2)]
    altered = Altered(tiny_shards, DATASET, "valid")
    for given in (0, 1, 3):
        states, others = (one.predict(reader, [0], [given]) for one, reader in ((best, valid), (best, altered)))
        for _ in range(3):
            np.testing.assert_array_equal(next(states), next(others))
    assert not torch.equal(next(best.predict(valid, [0], [4])), next(best.predict(altered, [0], [4])))


def test_fewer_frames_are_used_where_a_trajectory_has_no_more(tiny_shards: Path) -> None:
    train, valid = splits(tiny_shards)
    three, two, one = fit(train)[2][3], fit(train)[1][3], fit(train)[0][3]
    both = next(three.predict(valid, [0, 0, 0], [5, 0, 1]))
    for row, (stencil, given) in enumerate(((three, 5), (one, 0), (two, 1))):
        np.testing.assert_allclose(both[row], next(stencil.predict(valid, [0], [given]))[0], rtol=1e-5, atol=1e-6)


def test_a_strong_ridge_wins_rollouts_where_least_squares_grows(tiny_shards: Path) -> None:
    train, valid = splits(tiny_shards, "viscoelastic_instability")
    candidates = fit(train)
    (frames, ridge), (rollout_frames, rollout_ridge) = choose(candidates, valid, THIRDS, 0, CPU)
    trials, windows = rollout_trials(valid, 0, None, CPU), one_step_trials(valid, CPU)
    scores = [rollout_score(some, trials, THIRDS) for some in (candidates[frames][ridge], candidates[2][0])]
    best = rollout_score(candidates[rollout_frames][rollout_ridge], trials, THIRDS)
    assert rollout_ridge > ridge
    assert best < min(scores)
    assert scores[1] > 2 * best
    lowest = one_step_score(candidates[frames][ridge], windows, THIRDS)
    assert lowest == min(one_step_score(one, windows, THIRDS) for some in candidates for one in some)


def test_the_cache_is_read_and_a_damaged_file_is_written_again(
    linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, valid = splits(linear)
    first = fitted_stencils(train, valid, THIRDS, 0, CPU, tmp_path)
    (file,) = (tmp_path / "stencils").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert fitted_stencils(train, valid, THIRDS, 0, CPU, tmp_path).choice == first.choice
    np.savez(tmp_path / "stencils" / "other.npz", head=np.array("{}"))
    shutil.move(tmp_path / "stencils" / "other.npz", file)
    assert fitted_stencils(train, valid, THIRDS, 0, CPU, tmp_path).choice == first.choice
    monkeypatch.setattr("fm.evaluation.stencil_choice.fit", None)  # nothing is fitted any more
    again = fitted_stencils(train, valid, THIRDS, 0, CPU, tmp_path)
    assert again.choice == first.choice
    for task in ("one_step", "rollout"):
        pairs = zip(getattr(first, task).weights, getattr(again, task).weights, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    with pytest.raises(TypeError):  # another eps is another choice
        fitted_stencils(train, valid, dataclasses.replace(THIRDS, eps=1.0), 0, CPU, tmp_path)
    assert cache_key(train, valid, THIRDS, 0) != cache_key(valid, train, THIRDS, 0)


def test_a_cache_that_cannot_be_written_ends_nothing(
    linear: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    found = linear_stencils({DATASET: splits(linear)}, THIRDS, 0, CPU, tmp_path / "file")
    assert isinstance(found[DATASET].choice, StencilChoice)
    assert "cannot be kept" in capsys.readouterr().out


def test_data_that_do_not_fit_are_left_out_with_a_note(
    linear: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, _ = splits(linear)
    _, other = splits(tiny_shards, "shear_flow")
    assert linear_stencils({DATASET: (train, other)}, THIRDS, 0, CPU, tmp_path) == {}
    assert f"{DATASET}: no linear stencil: " in capsys.readouterr().out


def test_the_sample_is_bounded(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = splits(tiny_shards)
    total = len(train.index(2))
    assert len(train_windows(train)) == total
    monkeypatch.setattr(module, "TRAIN_WINDOWS", 5)
    windows = train_windows(train)
    assert (len(windows), windows[0], windows[-1]) == (5, 0, total - 1)
    monkeypatch.setattr(module, "TRAIN_BYTES", 3 * 4 * train.manifest.frame_bytes)
    assert len(train_windows(train)) == 3
    points = sampled_points(train, 7, 1000)
    assert torch.equal(points, sampled_points(train, 7, 1000))
    assert len(points.unique()) > 300
    readers = open_readers(tiny_shards, [DATASET], "valid")
    assert sum(len(trial.frames) for trial in one_step_trials(readers[DATASET], CPU)) <= 32


def test_values_that_are_not_finite_are_refused(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Altered(linear, DATASET, "train")
    original = broken.trajectory_frames
    monkeypatch.setattr(broken, "trajectory_frames", lambda *place: original(*place) * np.inf)
    with pytest.raises(UserError, match="expected finite data to fit on"):
        fit(broken)
