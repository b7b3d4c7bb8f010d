"""Export a model as a folder that others can use: weights, dataset cards, scores, pictures, programs and a model card.

`FILES` of model_card.py lists the files. `export_run` exports a run; fm/share/extend.py writes extended models by the
same `write_export`.
"""

import copy
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as resources
from importlib.resources.abc import Traversable
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.files import atomic_path, inside, read_plain_file, restore, sha256
from data_pipeline.progress import progress_bar
from data_pipeline.registry import Card, Channel, Registry, load_folders
from fm.checkpoint import use_checkpoint
from fm.config import dump_recipe
from fm.evaluation.scores import Scores
from fm.evaluation.trained import TrainedModel
from fm.model.files import (
    CARD_FILE,
    CARDS,
    EMA_FILE,
    EXPORT_FILE,
    MODEL_FILE,
    RECIPE_FILE,
    SCORES_FILE,
    WEIGHTS_FILE,
    is_exported,
)
from fm.model.scalars import normalized
from fm.model.surrogate import Surrogate
from fm.share.model_card import ExportedModel, model_card

LICENSE = "MIT"  # the default, and the license whose text is included
SPDX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


def export_run(
    run: Path | str,
    folder: Path,
    report: Path | None = None,
    programs: Sequence[str] = (),
    license: str = LICENSE,
    address: str | None = None,
) -> Path:
    """Export a run's newest checkpoint to `folder`, and return `folder`.

    `report` is the folder of an evaluation, by default the run's. `programs` are datasets whose step is exported as a
    program. `address` is where the model will be found, for its model card. Raises UserError if there is no checkpoint,
    a card is missing or has changed, `report` is of other weights, or `folder` holds something else.
    """
    if SPDX.fullmatch(license) is None:
        raise UserError(f"--licence: expected an SPDX identifier, such as MIT or CC-BY-4.0, got {license!r}")
    _check_replaceable(folder)
    trained, weights = use_checkpoint(run, lambda found: (TrainedModel.open(found), _averaged_weights(found)))
    if weights is None:
        raise UserError(f"{run}: is an exported model already; copy it, or push it: model.push_to_hub(...)")
    names = list(trained.model.specs)
    sources = [(names, trained.card_folders())]
    pretrained = trained.lineage.get("pretrained")
    if pretrained is not None and is_exported(Path(pretrained)):  # cards that the run's registry may lack
        sources.append((names, [Path(pretrained) / CARDS]))
    cards = find_cards(sources)
    cards.check_unchanged(names, trained)
    files = cards.files()
    try:
        files |= report_files(report or trained.report, trained)
    except UserError as error:
        if report is not None:
            raise
        print(f"exported without scores and pictures: {error}")
    for name in progress_bar(list(dict.fromkeys(programs)), desc="export", unit="program", leave=False):
        files[f"programs/{name}.pt2"] = step_program(trained.model, name)
    exported = ExportedModel(
        trained.model, trained.recipe, cards.registry, trained.step, trained.shards, license, trained.lineage
    )
    write_export(folder, exported, weights, files, address)
    return folder


def _averaged_weights(checkpoint: Path) -> bytes | None:
    return None if is_exported(checkpoint) else (checkpoint / EMA_FILE).read_bytes()


def write_export(
    folder: Path, exported: ExportedModel, weights: bytes, more: Mapping[str, bytes], address: str | None = None
) -> None:
    """Write an exported model to `folder`, whole or not at all, in place of an earlier one.

    `weights` is the safetensors file; its bytes, and so its digest, are kept. `more` are cards, scores, pictures and
    programs by path. `address` is where the model will be found, for its model card. Raises UserError, and leaves
    `folder` as it was, if that holds something else or cannot be written.
    """
    files = {
        MODEL_FILE: (json.dumps(exported.model.description(), indent=1) + "\n").encode(),
        WEIGHTS_FILE: weights,
        RECIPE_FILE: dump_recipe(exported.recipe).encode(),
        **more,
    }
    if exported.license == LICENSE:
        text = resources("fm.share").joinpath("mit_license.txt").read_text("utf-8")
        files["LICENSE"] = text.format(name=exported.name).encode()
    files[CARD_FILE] = model_card(exported, files, address or folder.name).encode()
    listing = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in sorted(files.items())}
    content = json.dumps({**exported.to_json(), "files": listing}, indent=1, ensure_ascii=False, allow_nan=False)
    files[EXPORT_FILE] = f"{content}\n".encode()
    _check_replaceable(folder)
    try:
        with atomic_path(folder) as temporary:
            for name, data in files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(data)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); nothing was kept") from error


def _check_replaceable(folder: Path) -> None:
    """Raise UserError if `folder` holds something that is no exported model, and must not be replaced."""
    restore(folder)
    if folder.exists() and not is_exported(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"{folder}: expected a folder that is not there yet, or an earlier export, found something else"
        )


@dataclass(frozen=True)
class Cards:
    """The cards of some datasets, as a registry of their own."""

    registry: Registry  # of these datasets and the channels they name, and of no others
    origins: Mapping[str, Traversable]  # dataset -> the file of its card

    def files(self) -> dict[str, bytes]:
        """Return cards/channels.yaml and cards/datasets/<name>.yaml by path; a card keeps every byte."""
        channels = {}
        for channel in self.registry.channel_cards.values():
            twin = {"duplicate_of": channel.duplicate_of} if channel.duplicate_of else {}
            channels[channel.name] = {"description": channel.description, "unit": channel.unit, **twin}
        text = yaml.safe_dump(channels, sort_keys=False, allow_unicode=True, width=120)
        cards = {f"{CARDS}/datasets/{name}.yaml": file.read_bytes() for name, file in self.origins.items()}
        return {f"{CARDS}/channels.yaml": text.encode(), **cards}

    def check_unchanged(self, datasets: Iterable[str], trained: TrainedModel) -> None:
        """Raise UserError if a card has other channels or boundaries than when the model was trained.

        An exported model has the cards of its training beside it, so there is nothing to check.
        """
        then, now = trained.trained_cards, self.registry.snapshot()["cards"]
        if then is None:
            return
        for name in datasets:
            if now[name] != then.get(name):
                raise UserError(
                    f"{self.origins[name]}: fields or boundary are not those that the model was trained with; put the "
                    f"card of then back (fields then: {then.get(name)})"
                )


def find_cards(sources: Sequence[tuple[Iterable[str], Sequence[Traversable]]]) -> Cards:
    """Find the cards of datasets in several registries.

    Each source is the names of datasets, and the folders of the registry that may have their cards. The first source
    that names a dataset and has its card decides the card and the meaning of its channels. Raises UserError if no
    source has a card.
    """
    cards: dict[str, Card] = {}
    channels: dict[str, Channel] = {}
    origins: dict[str, Traversable] = {}
    for names, folders in sources:
        registry = load_folders(folders)
        found = sorted(set(names) & registry.cards.keys() - cards.keys())
        for name in found:
            cards[name] = registry.cards[name]
            origins[name] = next(file for folder in folders if (file := folder / "datasets" / f"{name}.yaml").is_file())
        named = {channel for name in found for field in cards[name].fields for channel in field.channels}
        for channel in list(registry.channel_cards.values())[::-1]:  # a duplicate is listed below its original
            if channel.name in named and channel.duplicate_of is not None:
                named.add(channel.duplicate_of)
        for name, channel in registry.channel_cards.items():
            if name in named:
                channels.setdefault(name, channel)
    for name in {name for names, _ in sources for name in names} - cards.keys():
        registry.card(name)  # raises the error for a missing card
    return Cards(Registry(channels, dict(sorted(cards.items()))), dict(sorted(origins.items())))


def report_files(report: Path, trained: TrainedModel) -> dict[str, bytes]:
    """Return scores.json and pictures/<name>.png of a report by path.

    Raises UserError if there are none, or they are of other weights.
    """
    again = f"make one: fm evaluate {trained.checkpoint} --out {report}"
    try:
        data = read_plain_file(inside(report, SCORES_FILE))
    except OSError as error:
        raise UserError(f"{report}: no report there ({error.strerror}); {again}") from error
    origin = Scores.from_json(data, str(report / SCORES_FILE)).origin
    if (origin.get("step"), origin.get("weights")) != (trained.step, trained.weights):
        raise UserError(
            f"{report}: a report of other weights, of step {origin.get('step')}, not {trained.step}; {again}"
        )
    names = sorted(f"pictures/{file.name}" for file in (report / "pictures").glob("*.png"))
    return {SCORES_FILE: data, **{name: inside(report, name).read_bytes() for name in names}}


class DatasetStep(nn.Module):
    """The step of one dataset in physical units: frames and constants (B, K, H, W) to the next state (B, C, H, W).

    frames is (B, n, C, H, W), or (B, C, H, W) for a model of one frame. A model that scalars condition also takes them
    as (B, P), in the order of the dataset's specification, NaN where one is not known.
    """

    def __init__(self, model: Surrogate, dataset: str) -> None:
        super().__init__()
        self.model, self.dataset = model, dataset

    def forward(self, frames: Tensor, constants: Tensor, scalars: Tensor | None = None) -> Tensor:
        """Return the next state (B, C, H, W)."""
        model, dataset = self.model, self.dataset
        numbers = None if scalars is None else normalized(scalars, model.specs[dataset].scalars.values())
        inputs = model.normalize(frames, dataset), model.normalize_constants(constants, dataset)
        return model.denormalize(model(*inputs, dataset, numbers), dataset)


def step_program(model: Surrogate, dataset: str) -> bytes:
    """Return the step of a dataset as a .pt2 file (torch.export), for any batch size and the trained grid.

    It runs with torch alone, without this package. Raises UserError for a dataset that the model was not trained on, or
    whose grid is not known.
    """
    if dataset not in model.specs:
        raise UserError(f"--program: expected a dataset of the model, {', '.join(model.specs)}; got {dataset!r}")
    spec = model.specs[dataset]
    if spec.grid is None:
        raise UserError(f"--program {dataset}: the model does not know the grid of its training data; train it again")
    time = () if model.context == 1 else (model.context,)
    frames = spec.moment("mean", spec.state_channels).float().expand(2, *time, -1, *spec.grid).contiguous()
    inputs = [frames, torch.zeros(2, len(spec.constant_channels), *spec.grid)]
    if spec.scalars:
        inputs.append(torch.tensor([[(one.lowest + one.highest) / 2 for one in spec.scalars.values()]] * 2))
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        step = DatasetStep(copy.deepcopy(model), dataset).eval().requires_grad_(False)
        program = torch.export.export(step, tuple(inputs), dynamic_shapes=tuple({0: batch} for _ in inputs))
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()
