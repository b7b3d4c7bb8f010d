"""TensorBoard's files as its own reader sees them: pictures, tags, size, the HParams page; and other trackers."""

import dataclasses
import io
import platform
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from handmade import make_spec
from PIL import Image
from samples import ramp_sample
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata
from whole_runs import DATASETS, ROOT, fm, small

from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from data_pipeline.windows.schedule import Schedule, Source
from fm.config import Recipe, TrackingSettings, dump_recipe, recipe_to_dict
from fm.datasets import build_model, open_split
from fm.evaluation.cosines import Cosines
from fm.evaluation.pictures import GAP
from fm.evaluation.samples import Sample
from fm.model.spec import ModelConfig
from fm.model.wavelit import WaveLiTFM
from fm.training.pictures import rollout_pictures
from fm.training.record import RunRecord, StepResult, draws_pictures, is_chosen
from fm.training.tensorboard import Dashboard, check_trackers, custom_scalars, flat_settings
from fm.training.trainer import train

EIGHT = [
    "acoustic_scattering_maze",
    "active_matter",
    "gray_scott_reaction_diffusion",
    "helmholtz_staircase",
    "rayleigh_benard",
    "shear_flow",
    "turbulent_radiative_layer_2D",
    "viscoelastic_instability",
]


def board_of(directory: Path) -> EventAccumulator:
    everything = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(directory), size_guidance=everything).Reload()


def images_of(directory: Path, sample: Sample) -> dict[str, Image.Image]:
    board = Dashboard(directory, [sample.dataset], ["1:20"], 0)
    board.rollout(sample, 7)
    board.close()
    events = board_of(directory)
    images = {}
    for tag in events.Tags()["images"]:
        (event,) = events.Images(tag)
        assert event.step == 7
        image = Image.open(io.BytesIO(event.encoded_image_string))
        assert image.size == (event.width, event.height)
        images[tag] = image
    return images


def test_a_rollout_is_shown_still_and_moving(tmp_path: Path) -> None:
    images = images_of(tmp_path, ramp_sample((16, 32), num_steps=9))
    assert sorted(images) == [f"shear_flow/{kind}" for kind in ("fields", "rollout", "spectrum")]
    assert images["shear_flow/rollout"].format == "GIF"
    assert images["shear_flow/rollout"].n_frames == 9
    assert {images[f"shear_flow/{kind}"].width for kind in ("fields", "spectrum")} == {350}  # TensorBoard's own width
    fields = np.asarray(images["shear_flow/fields"].convert("RGB")).astype(int)
    truth = fields[:, GAP : (350 - GAP) // 3]  # the left panel
    assert truth[150, -1, 1] > truth[150, 0, 1] + 150  # x to the right: from viridis's violet to its yellow


def test_a_prediction_that_is_not_finite_is_shown_too(tmp_path: Path) -> None:
    sample = ramp_sample()
    broken = dataclasses.replace(sample, prediction=np.full_like(sample.truth, np.nan))
    images = images_of(tmp_path, broken)
    assert "shear_flow/rollout" in images
    fields = np.asarray(images["shear_flow/fields"].convert("RGB"))
    assert np.unique(fields[120, 140:210]).tolist() == [0xB0]  # in the middle panel


@pytest.mark.parametrize(("count", "most"), [(1, 1), (7, 3), (40, 40), (200, 40), (100, 1), (5, 40), (201, 40), (9, 0)])
def test_occasions_are_few_and_even_and_hold_the_last(count: int, most: int) -> None:
    shown = [number for number in range(1, count + 1) if is_chosen(number, count, most)]
    assert len(shown) == min(count, most)
    if most:
        assert shown[-1] == count
        gaps = np.diff([0, *shown])
        assert gaps.max() - gaps.min() <= 1


def test_pictures_of_a_run_are_counted_with_those_of_the_pretrained_model(tmp_path: Path) -> None:
    recipe = small(
        tmp_path, tmp_path, train={"steps": 95}, validation={"every": 10, "rollouts": 1}, tracking={"pictures": 4}
    )
    steps = [*range(10, 91, 10), 95]
    assert [step for step in steps if draws_pictures(step, recipe)] == [30, 50, 80, 95]
    gated = small(
        tmp_path,
        tmp_path,
        train={"steps": 95},
        validation={"every": 10, "rollouts": 1},
        tracking={"pictures": 4},
        finetune={"pretrained": "runs/x", "gate": 1.1},
    )
    assert [step for step in [0, *steps] if draws_pictures(step, gated)] == [20, 50, 80, 95]


@pytest.fixture(scope="module")
def watched(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that writes every tag there is, in two processes' worth of steps. Read only."""
    directory = tmp_path_factory.mktemp("watched") / "run"
    sections = {
        "train": {"steps": 12},
        "validation": {"every": 2, "windows": 2, "rollouts": 1},
        "checkpoint": {"every": 2},
        "tracking": {"every": 4, "pictures": 3, "gradient_cosine_every": 3},
    }
    assert train(small(tiny_shards, directory, run={"stop_at": 6}, **sections)) == 0
    assert train(small(tiny_shards, directory, **sections)) == 0
    return directory


def documented() -> dict[str, list[str]]:
    """The tags of the dashboard tutorial's table -> the tags that each stands for in `watched`, <channel> excepted."""
    tutorial = (ROOT / "recipes" / "tutorials" / "read_the_dashboard.md").read_text()
    table = tutorial.partition("| tag | what |")[2].partition("\n\n")[0]
    written = [
        tag for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for tag in row.strip("`").split("`, `")
    ]
    windows = ["first_third", "middle_third", "last_third"]
    found = {}
    for tag in written:
        parts = re.split(r"\{(.*?)\}", tag)
        spread = ["".join(choice) for choice in product(*(part.split(",") for part in parts))]
        found[tag] = [
            name.replace("<dataset>", dataset).replace("<window>", window)
            for name in spread
            for dataset in (DATASETS if "<dataset>" in name else [""])
            for window in (windows if "<window>" in name else [""])
        ]
    return found


def test_the_tags_are_those_of_the_tutorial(watched: Path) -> None:
    tags = board_of(watched / "tensorboard").Tags()
    texts = {tag.removesuffix("/text_summary") for tag in tags["tensors"] if tag.endswith("/text_summary")}
    there = {*tags["scalars"], *tags["images"], *texts}
    only_sometimes = ("valid_vrmse_field/<dataset>/<channel>", "learning_rate/<part>")
    promised = {name for tag, names in documented().items() for name in names if tag not in only_sometimes}
    fields = {name for name in there if name.startswith("valid_vrmse_field/")}
    assert there - fields == promised
    assert documented().keys() >= {*only_sometimes}
    assert f"valid_vrmse_field/{DATASETS[1]}/pressure_re" in fields


def test_a_run_draws_no_more_pictures_than_it_was_told(watched: Path) -> None:
    board = board_of(watched / "tensorboard")
    for name in DATASETS:
        assert [event.step for event in board.Images(f"{name}/rollout")] == [4, 8, 12]
        assert [event.step for event in board.Scalars(f"valid_over_persistence/{name}")] == [2, 4, 6, 8, 10, 12]
    assert [event.step for event in board.Images("gradients/cosine")] == [6, 9, 12]


def test_losses_of_a_dataset_are_means_since_the_scalars_before(watched: Path) -> None:
    board, lines = board_of(watched / "tensorboard"), {}
    for line in (watched / "log.jsonl").read_text().splitlines():
        step, dataset, loss = re.search(r'"step": (\d+), "dataset": "(\w+)".*"loss": ([\d.e-]+)', line).groups()
        lines.setdefault((-(-int(step) // 4) * 4, dataset), []).append(float(loss))
    assert len(lines) > 3
    for (step, dataset), losses in lines.items():
        values = {event.step: event.value for event in board.Scalars(f"train_loss/{dataset}")}
        assert values[step] == pytest.approx(np.mean(losses))
    assert sum(len(board.Scalars(f"train_loss/{name}")) for name in DATASETS) == len(lines)


def test_texts_tell_of_the_environment_and_of_every_save(watched: Path) -> None:
    board = board_of(watched / "tensorboard")

    def texts(tag: str) -> dict[int, str]:
        return {event.step: event.tensor_proto.string_val[0].decode() for event in board.Tensors(f"{tag}/text_summary")}

    assert list(texts("environment")) == [0, 6]
    assert f"| python | {platform.python_version()} |" in texts("environment")[6]
    assert "| processes | 1 (one process) |" in texts("environment")[6]
    assert texts("saves") == {step: f"checkpoint of step {step}" for step in (2, 4, 6, 8, 10, 12)}
    assert texts("events") == {6: "continued from step 6"}


def recorded_bytes(recipe: Recipe, steps: int) -> int:
    """Size of the TensorBoard files after `steps` steps of eight datasets, without validations."""
    model = WaveLiTFM(ModelConfig(width=16, depth=1, heads=2, wavelet="haar"), [make_spec(name) for name in EIGHT])
    schedule = Schedule([Source(name, 100, 16, (100,)) for name in EIGHT], 4, seed=0)
    with RunRecord(recipe, schedule, model, 0, "one process") as record:
        for step in range(1, steps + 1):
            name = EIGHT[step % 8]
            record.log_step(
                StepResult(step, (name,), ((16, 16),), "", (1.0,), 1.0, 1.0, 1.0, 1e-3, 4, (1,), 0.0, 1.0, 1.0, False)
            )
    return sum(file.stat().st_size for file in (recipe.run.directory / "tensorboard").iterdir())


def test_a_million_steps_stay_below_200_mb(tmp_path: Path) -> None:
    """Eight datasets, scalars every 50 steps, and the worst case of all pictures: noise in every panel."""
    tracking = {"every": 50, "pictures": TrackingSettings().pictures}
    recipes = [small(tmp_path, tmp_path / name, train={"steps": 10**6}, tracking=tracking) for name in ("a", "b")]
    few, many = (recorded_bytes(recipe, steps) for recipe, steps in zip(recipes, (100, 2100), strict=True))
    scalars = (many - few) / 2000 * 1e6
    truth, prediction = np.random.default_rng(0).standard_normal((2, 16, 256, 256))
    noise = dataclasses.replace(ramp_sample(num_steps=16), truth=truth, prediction=prediction)
    pictures = (
        sum(len(encoded) for encoded in rollout_pictures(noise).values()) * len(EIGHT) * recipes[0].tracking.pictures
    )
    assert recipes[0].tracking.pictures == 40
    assert scalars + pictures < 195e6  # and 200 validations of 70 scalars


SHORT: dict[str, dict[str, Any]] = {"train": {"steps": 6}, "validation": {"every": 3, "windows": 1, "rollouts": 0}}


def hparams_of(directory: Path) -> tuple[Any, Any, int | None]:
    """The columns, the session's settings, and its state, as the page gets them."""
    board = EventAccumulator(str(directory / "tensorboard")).Reload()
    content = board.PluginTagToContent(metadata.PLUGIN_NAME)
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    end = content.get(metadata.SESSION_END_INFO_TAG)
    return experiment, start, None if end is None else metadata.parse_session_end_info_plugin_data(end).status


def test_a_continued_run_is_one_session_that_ends_well(tiny_shards: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert train(small(tiny_shards, directory, run={"stop_at": 3}, **SHORT)) == 0
    assert hparams_of(directory)[2] is None  # to be continued
    assert train(small(tiny_shards, directory, **{**SHORT, "train": {"steps": 6, "clip": 0.5}})) == 0
    experiment, start, state = hparams_of(directory)
    assert state == api_pb2.STATUS_SUCCESS
    assert start.hparams["train.clip"].number_value == 0.5  # what the run went on with
    assert start.hparams["train.steps"].number_value == 6
    assert start.hparams["sampling.scheme"].string_value == "sqrt"
    assert start.hparams["model.width"].number_value == 16
    assert start.hparams["model.cpe"].WhichOneof("kind") == "bool_value"
    assert start.hparams["data.datasets"].string_value == "2 datasets"
    assert "finetune.objective" in {column.name for column in experiment.hparam_infos}
    assert "finetune.objective" not in start.hparams
    scores = [column.name.tag for column in experiment.metric_infos]
    assert scores[0] == "valid_over_persistence/geometric_mean"
    board = EventAccumulator(str(directory / "tensorboard")).Reload()
    assert set(scores) <= set(board.Tags()["scalars"])
    assert len(list((directory / "tensorboard").glob("*.hparams"))) == 1


def test_a_failed_run_is_marked_until_it_is_continued(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = small(tiny_shards, tmp_path / "run", **SHORT)
    registry = load_registry(None)
    model = build_model(recipe, open_split(recipe, registry, "train"), registry)
    schedule = Schedule([Source(name, 100, 16, (100,)) for name in DATASETS], 4, seed=0)
    with pytest.raises(RuntimeError, match="a cable"), RunRecord(recipe, schedule, model, 0, "one process"):
        raise RuntimeError("a cable")
    assert hparams_of(tmp_path / "run")[2] == api_pb2.STATUS_FAILURE
    assert train(recipe) == 0
    assert hparams_of(tmp_path / "run")[2] == api_pb2.STATUS_SUCCESS


def test_settings_are_flat_and_plain(tmp_path: Path) -> None:
    recipe = small(tmp_path, tmp_path, finetune={"pretrained": "runs/x", "objective": "bptt"})
    settings = flat_settings(recipe_to_dict(recipe), DATASETS[:1])
    assert settings["finetune.objective"] == "bptt"
    assert settings["data.datasets"] == DATASETS[0]
    assert "train.betas" not in settings  # two numbers
    assert "train.micro_batch" not in settings  # null
    assert all(isinstance(value, str | int | float | bool) for value in settings.values())


TRACKED = {"tracking": {"log_with": ["tensorboard"], "pictures": 40}}


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_every_scalar_and_still_picture_goes_to_the_other_tracker_once(tiny_shards: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    sections = {**SHORT, **TRACKED, "validation": {"every": 3, "windows": 1, "rollouts": 1}}
    assert train(small(tiny_shards, directory, run={"stop_at": 4}, **sections)) == 0
    assert train(small(tiny_shards, directory, **sections)) == 0
    own, other = curves(directory / "tensorboard"), curves(directory / "trackers" / "wavelit-fm")
    assert len(own) > 20
    assert own == other
    board = board_of(directory / "trackers" / "wavelit-fm")
    for name in DATASETS:
        assert [(event.step, event.width) for event in board.Images(f"{name}/fields")] == [(3, 700), (6, 700)]
    (settings, _) = sorted((directory / "trackers").rglob("hparams.yml"))
    assert "train.learning_rate: 0.003" in settings.read_text()


class Gallery(GeneralTracker):
    """A tracker that keeps the images it is sent."""

    name, requires_logging_directory, tracker = "gallery", False, None

    def __init__(self) -> None:
        super().__init__()
        self.images: dict[str, tuple[int, list[np.ndarray]]] = {}

    def log_images(self, values: dict[str, list[np.ndarray]], step: int) -> None:
        """Keep them, as a tracker of accelerate takes them: a list of images by tag."""
        self.images |= {tag: (step, images) for tag, images in values.items()}


class Plain(GeneralTracker):
    """A tracker that takes no images, as mlflow's."""

    name, requires_logging_directory, tracker = "plain", False, None


def test_still_pictures_go_to_trackers_that_take_images(tmp_path: Path) -> None:
    gallery, plain = Gallery(), Plain()
    board = Dashboard(tmp_path / "own", ["shear_flow"], ["1:20"], 0, trackers=[plain, gallery])
    board.rollout(ramp_sample(num_steps=3), 7)
    board.cosines(Cosines(tuple(DATASETS), np.eye(2), np.ones(2)), 7, picture=True)
    board.close()
    assert set(gallery.images) == {"shear_flow/fields", "shear_flow/spectrum", "gradients/cosine"}
    for step, (image,) in gallery.images.values():
        assert (step, image.dtype, image.shape[2]) == (7, np.uint8, 3)
    (image,) = gallery.images["shear_flow/fields"][1]
    assert image.shape[1] == 700


def test_each_chart_of_a_dataset_has_the_curves_of_one_dataset(tmp_path: Path) -> None:
    page = custom_scalars(EIGHT, ["1:20", "21:60"])
    for part in ("one-step VRMSE / persistence (valid), 1: no better", "training loss", "rollout VRMSE (valid), 21:60"):
        assert list(page[part]) == EIGHT
        for name, (_, tags) in page[part].items():
            (tag,) = tags
            assert [other for other in EIGHT if re.search(tag, tag.replace(name, other).rstrip("$"))] == [name]


def test_only_some_validations_have_rollouts_and_the_last_is_one(tiny_shards: Path, tmp_path: Path) -> None:
    validation = {"every": 2, "windows": 1, "rollouts": 1, "rollout_every": 3}
    recipe = small(tiny_shards, tmp_path / "run", train={"steps": 9}, validation=validation, tracking={"pictures": 40})
    assert train(recipe) == 0
    board = board_of(tmp_path / "run" / "tensorboard")
    name = DATASETS[0]
    assert [event.step for event in board.Scalars(f"valid_vrmse/{name}")] == [2, 4, 6, 8, 9]
    assert [event.step for event in board.Scalars(f"rollout_vrmse/{name}/last_third")] == [4, 9]
    assert [event.step for event in board.Images(f"{name}/fields")] == [4, 9]
    few = dataclasses.replace(recipe, tracking=dataclasses.replace(recipe.tracking, pictures=1))
    assert [step for step in (2, 4, 6, 8, 9) if draws_pictures(step, few)] == [9]
    with pytest.raises(UserError, match=r"finetune.gate needs .* and rollout_every = 1"):
        small(tiny_shards, tmp_path, validation=validation, finetune={"pretrained": "runs/x", "gate": 1.1})


def test_a_tracker_that_is_not_there_is_refused_before_the_first_step(tiny_shards: Path, tmp_path: Path) -> None:
    recipe = small(tiny_shards, tmp_path / "run", tracking={"log_with": ["wandbee"]})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    done = fm("train", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 2
    assert "tracking.log_with: expected trackers among aim, " in done.stderr
    assert "got 'wandbee'; available here: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_known_tracker_whose_package_is_missing_is_named() -> None:
    missing = sorted(set(LOGGER_TYPE_TO_CLASS) - {str(name) for name in get_available_trackers()})
    assert missing
    with pytest.raises(UserError, match=f"the package of {missing[0]} is not installed, got '{missing[0]}'; available"):
        check_trackers(["tensorboard", missing[0]])
