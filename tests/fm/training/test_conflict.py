"""Gradients of datasets compared, beside a training that does not notice."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from whole_runs import DATASETS, last_weights, log, small

from data_pipeline.errors import UserError
from fm.distributed import make_accelerator
from fm.evaluation.cosines import Cosines, mean_cosines
from fm.evaluation.plots import cosine_figure
from fm.training.checks import WINDOWS, check_launch, cosines_of, gradient_cosines, sampled_windows
from fm.training.objective import Unroll
from fm.training.sharded import FullySharded
from fm.training.trainer import Trainer, train

THREE = {"data": {"datasets": [*DATASETS, "shear_flow"]}, "tracking": {"gradient_cosine_every": 3, "pictures": 40}}


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def watched(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of three datasets, compared after steps 3 and 6."""
    directory = tmp_path_factory.mktemp("watched") / "run"
    assert train(small(tiny_shards, directory, **THREE)) == 0
    return directory


def test_cosines_of_vectors_by_hand() -> None:
    vectors = {"a": [1.0, 0.0], "b": [1.0, 1.0], "c": [-3.0, 0.0], "d": [0.0, 0.0], "e": [math.inf, 0.0]}
    found = cosines_of({name: torch.tensor(vector) for name, vector in vectors.items()})
    root = math.sqrt(0.5)
    expected = [[1, root, -1], [root, 1, -root], [-1, -root, 1]]
    np.testing.assert_allclose(found.matrix[:3, :3], expected, atol=1e-6)
    assert np.isnan(found.matrix[3:]).all()  # no length, or no finite one: no direction
    assert np.isnan(found.matrix[:, 3:]).all()
    assert found.norms.tolist() == pytest.approx([1, math.sqrt(2), 3, 0, math.inf])
    means = found.with_others()
    assert [means[name] for name in "abc"] == pytest.approx([(root - 1) / 2, 0, (-1 - root) / 2], abs=1e-6)
    assert math.isnan(means["d"])
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    again = Cosines.from_json(document)
    np.testing.assert_array_equal(again.matrix, found.matrix)
    with pytest.raises(ValueError, match="5 datasets, but a matrix"):
        Cosines.from_json({**document, "matrix": [[1.0]]})


def test_means_are_over_the_measurements_in_which_a_cosine_is_known() -> None:
    first = Cosines(("a", "b"), np.array([[1, 0.2], [0.2, 1]]), np.array([1.0, 3.0]))
    second = Cosines(("a", "b"), np.array([[1, 0.6], [0.6, 1]]), np.array([2.0, 5.0]))
    none = Cosines(("a", "b"), np.array([[1, np.nan], [np.nan, np.nan]]), np.array([3.0, 0.0]))
    mean = mean_cosines([first, second, none])
    assert mean.matrix[0, 1] == pytest.approx(0.4)
    assert mean.norms.tolist() == pytest.approx([2.0, 8 / 3])


def test_the_heat_map_names_datasets_and_writes_cosines_and_norms() -> None:
    matrix = np.array([[1, -0.75, np.nan], [-0.75, 1, 0.001], [np.nan, 0.001, np.nan]])
    figure = cosine_figure(Cosines(("one", "two", "three"), matrix, np.array([0.5, 12.0, 0.0])), "step 7")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == [
        *("0.5", "-0.75", "none"),
        *("-0.75", "12", "+0.00"),
        *("none", "+0.00", "0"),
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two", "three"]
    assert (axes.images[0].norm.vmin, axes.images[0].norm.vmax) == (-1, 1)


def test_the_gradient_is_backward_s_on_shared_parameters_and_nothing_is_left_behind(
    tiny_shards: Path, tmp_path: Path
) -> None:
    recipe = small(tiny_shards, tmp_path / "run", **THREE)
    trainer = Trainer(recipe, make_accelerator(1.0))
    parallel, device = trainer.state.parallel, torch.device("cpu")
    with torch.no_grad():  # heads begin at zero, and so does the gradient of all below them
        for parameter in parallel.model.heads.parameters():
            parameter.normal_(std=0.1)
    parameter = next(parallel.model.blocks.parameters())
    parameter.grad = torch.full_like(parameter, 7.0)
    random_state = torch.get_rng_state()
    found = gradient_cosines(recipe, parallel, trainer.readers, 5, device)
    assert (parameter.grad == 7.0).all()
    assert sum(p.grad is not None for p in parallel.model.parameters()) == 1
    assert parallel.model.training
    assert torch.equal(torch.get_rng_state(), random_state)

    def by_backward(name: str) -> np.ndarray:
        parallel.model.zero_grad()
        reader = trainer.readers[name]
        batch = reader.batch(sampled_windows(reader, recipe.run.seed, 5, 2), 2)
        forced = torch.ones(WINDOWS, 1, dtype=torch.bool)
        parallel.objective(batch.fields, batch.constants, forced, name)["loss"].backward()
        return np.concatenate([p.grad.flatten().numpy() for p in parallel.model.blocks.parameters()])

    vectors = [by_backward(name) for name in found.datasets]
    for row, one in enumerate(vectors):
        assert found.norms[row] == pytest.approx(np.linalg.norm(one), rel=1e-4)
        for column, other in enumerate(vectors):
            cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            assert found.matrix[row, column] == pytest.approx(cosine, abs=1e-4)


def test_windows_are_a_function_of_seed_step_and_dataset(tiny_shards: Path, tmp_path: Path) -> None:
    trainer = Trainer(small(tiny_shards, tmp_path / "run", **THREE), make_accelerator(1.0))
    maze, waves = (trainer.readers[name] for name in DATASETS)
    windows = sampled_windows(maze, 0, 3, 2)
    assert windows.tolist() == sampled_windows(maze, 0, 3, 2).tolist()
    assert len({tuple(sampled_windows(*key, 2).tolist()) for key in ((maze, 0, 3), (maze, 1, 3), (maze, 0, 6))}) == 3
    assert windows.tolist() != sampled_windows(waves, 0, 3, 2).tolist()
    many = np.concatenate([sampled_windows(maze, 0, step, 2) for step in range(200)])
    assert (many.min(), many.max()) == (0, len(maze.index(2)) - 1)


def test_the_training_does_not_notice(tiny_shards: Path, tmp_path: Path, watched: Path) -> None:
    assert train(small(tiny_shards, tmp_path / "run", data=THREE["data"])) == 0
    assert log(tmp_path / "run") == log(watched)
    assert last_weights(tmp_path / "run") == last_weights(watched)
    assert not events(tmp_path / "run", "cosine")


def test_the_run_keeps_matrix_heat_map_and_means(watched: Path) -> None:
    lines = events(watched, "cosine")
    assert [line["step"] for line in lines] == [3, 6]
    assert lines[0]["datasets"] == [*DATASETS, "shear_flow"]
    drawn = {line["dataset"] for line in log(watched)[:3]}
    assert drawn == {DATASETS[0], "shear_flow"}
    assert lines[0]["norms"][1] == 0  # nothing below a head that is zero still has a gradient
    assert lines[0]["matrix"][1] == [None, None, None]
    matrix = np.array(lines[1]["matrix"])
    assert (matrix == matrix.T).all()
    assert np.diag(matrix) == pytest.approx(1, abs=1e-5)
    assert np.linalg.eigvalsh(matrix).min() > -1e-5  # cosines of real vectors
    assert min(lines[1]["norms"]) > 0
    board = EventAccumulator(str(watched / "tensorboard"))
    board.Reload()
    assert [image.step for image in board.Images("gradients/cosine")] == [3, 6]
    means = [event.value for event in board.Scalars("gradients/mean_cosine/shear_flow")]
    assert means == pytest.approx([lines[0]["matrix"][2][0], matrix[2, :2].mean()])


def test_a_continued_run_has_every_comparison_once(tiny_shards: Path, tmp_path: Path, watched: Path) -> None:
    """It stops at a step that is saved and then compared: the comparison is owed, and made when the run goes on."""
    assert train(small(tiny_shards, tmp_path / "run", **THREE, run={"stop_at": 3})) == 0
    assert not events(tmp_path / "run", "cosine")
    assert train(small(tiny_shards, tmp_path / "run", **THREE, run={"stop_at": 5})) == 0
    assert [line["step"] for line in events(tmp_path / "run", "cosine")] == [3]
    assert train(small(tiny_shards, tmp_path / "run", **THREE)) == 0
    found, expected = events(tmp_path / "run", "cosine"), events(watched, "cosine")
    assert [{**line, "time": 0} for line in found] == [{**line, "time": 0} for line in expected]
    assert log(tmp_path / "run") == log(watched)
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    assert [image.step for image in board.Images("gradients/cosine")] == [3, 6]


def test_one_dataset_has_nothing_to_compare(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = small(tiny_shards, tmp_path / "run", **{**THREE, "data": {"datasets": ["shear_flow"]}})
    with pytest.raises(UserError, match="needs two datasets or more, got shear_flow alone"):
        train(recipe)


def test_slices_of_a_model_have_no_gradient_of_one_process(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = small(tiny_shards, tmp_path / "run", **THREE)
    accelerator = make_accelerator(1.0)
    model = Trainer(recipe, accelerator).state.parallel.model
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = FullySharded(accelerator, Unroll(model, recipe.loss), recipe.train, None, reshard_after_forward=True)
        with pytest.raises(UserError, match=r"with FSDP2 none holds the whole model; use launch/ddp.yaml or DeepSpeed"):
            check_launch(recipe, sharded, sorted(model.specs))
    finally:
        torch.distributed.destroy_process_group()
