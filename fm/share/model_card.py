"""The text of the licence that weights have unless another is named, that of this code.

The cards of a model's datasets as a registry folder of their own, so that another machine needs none of its own.

The scores and pictures of a report, if it is one of the exported weights.

One step of a model as a program that runs wherever torch does, without this package (torch.export).

What an exported model is, beside its weights: artefact.json says it, and the model card in words.

The model card: README.md with the front matter that the Hugging Face Hub reads.

It says how to use the model, how good it is beside persistence, what it knows, what it is not for, and what lies where.
"""

import copy
import io
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import fm
from data_pipeline.files import UserError
from data_pipeline.registry import Card, Channel, Registry, load_folders
from data_pipeline.tables import Cell, format_number, markdown
from fm.checkpoint import read_state
from fm.config import Recipe
from fm.evaluation.evaluate import TrainedModel
from fm.evaluation.scores import ONE_STEP, Scores
from fm.evaluation.tables import vrmse_cell
from fm.model.baselines import Baseline
from fm.model.files import EXPORT_FORMAT, SCORES_FILE, is_exported
from fm.model.spec import DatasetSpec
from fm.model.surrogate import Surrogate

MIT = """MIT License

Copyright (c) the authors of {name}

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


@dataclass(frozen=True)
class Cards:
    """The cards of some datasets."""

    registry: Registry  # of these datasets and the channels they name, and of no others
    origins: Mapping[str, Traversable]  # dataset -> the file that its card is in

    def files(self) -> dict[str, bytes]:
        """channels.yaml and datasets/<name>.yaml by path: the cards byte for byte, comments and all."""
        cards = {f"datasets/{name}.yaml": file.read_bytes() for name, file in self.origins.items()}
        return {"channels.yaml": _channels_text(self.registry.channel_cards.values()), **cards}

    def check_unchanged(self, datasets: Iterable[str], checkpoint: Path) -> None:
        """UserError where a card names other channels or boundaries than when `checkpoint` was trained.

        The cards of an exported model came along with it and are always those.
        """
        if is_exported(checkpoint):
            return
        then, now = read_state(checkpoint)["registry"]["cards"], self.registry.snapshot()["cards"]
        for name in datasets:
            if now[name] != then.get(name):
                raise UserError(
                    f"{self.origins[name]}: fields or boundary are not those that the model was trained with; put the "
                    f"card of then back (fields then: {then.get(name)})"
                )


def find_cards(sources: Sequence[tuple[Iterable[str], Sequence[Traversable]]]) -> Cards:
    """The cards of all the datasets that are named.

    `sources` are names, and the folders of the registry that may have their cards: a card is the first source's that is
    asked for it and has it, and so is what a channel means. UserError where no source has a card.
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
        for channel in _named_channels([cards[name] for name in found], registry.channel_cards):
            channels.setdefault(channel.name, channel)
    for name in {name for names, _ in sources for name in names} - cards.keys():
        registry.card(name)  # there is none, and says so
    return Cards(Registry(channels, dict(sorted(cards.items()))), dict(sorted(origins.items())))


def _named_channels(cards: Iterable[Card], described: Mapping[str, Channel]) -> list[Channel]:
    """The cards' channels, and those that they are duplicates of, in the registry's order: these stand further up."""
    named: set[str] = set()
    found = {channel for card in cards for field in card.fields for channel in field.channels}
    while found:
        named |= found
        found = {twin for name in found if (twin := described[name].duplicate_of) is not None} - named
    return [channel for name, channel in described.items() if name in named]


def _channels_text(channels: Iterable[Channel]) -> bytes:
    content = {}
    for channel in channels:
        twin = {"duplicate_of": channel.duplicate_of} if channel.duplicate_of else {}
        content[channel.name] = {"description": channel.description, "unit": channel.unit, **twin}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120).encode()


def report_files(report: Path, trained: TrainedModel) -> dict[str, bytes]:
    """scores.json and pictures/<name>.png by path. UserError where there are none, or they are of other weights."""
    again = f"make one: fm evaluate {trained.checkpoint} --out {report}"
    try:
        data = (report / SCORES_FILE).read_bytes()
    except OSError as error:
        raise UserError(f"{report}: no report there ({error.strerror}); {again}") from error
    origin = Scores.from_json(data, str(report / SCORES_FILE)).origin
    if (origin.get("step"), origin.get("weights")) != (trained.step, trained.weights):
        raise UserError(
            f"{report}: a report of other weights, of step {origin.get('step')}, not {trained.step}; {again}"
        )
    pictures = sorted((report / "pictures").glob("*.png"))
    return {SCORES_FILE: data, **{f"pictures/{file.name}": file.read_bytes() for file in pictures}}


def read_scores(files: Mapping[str, bytes]) -> Scores | None:
    """Return the scores in scores.json among `files`, None if there is none."""
    return Scores.from_json(files[SCORES_FILE], SCORES_FILE) if SCORES_FILE in files else None


class Step(nn.Module):
    """One dataset's step in physical units: state (B, C, H, W) and constants (B, K, H, W) to the next state."""

    def __init__(self, model: Surrogate, dataset: str) -> None:
        super().__init__()
        self.model, self.dataset = model, dataset

    def forward(self, state: Tensor, constants: Tensor) -> Tensor:
        model, dataset = self.model, self.dataset
        normalised = model.normalize(state, dataset), model.normalize_constants(constants, dataset)
        return model.denormalize(model(*normalised, dataset), dataset)


def step_program(model: Surrogate, dataset: str) -> bytes:
    """The program of a dataset as a .pt2 file, for any batch size B and the grid of the training data.

    UserError for a dataset that the model does not know, or whose grid is not known.
    """
    if dataset not in model.specs:
        raise UserError(f"--program: expected a dataset of the model, {', '.join(model.specs)}; got {dataset!r}")
    spec = model.specs[dataset]
    if spec.grid is None:
        raise UserError(f"--program {dataset}: the model does not know the grid of its training data; train it again")
    state = spec.moment("mean", spec.state_channels).float().expand(2, -1, *spec.grid).contiguous()
    constants = torch.zeros(2, len(spec.constant_channels), *spec.grid)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        step = Step(copy.deepcopy(model), dataset).eval().requires_grad_(False)
        program = torch.export.export(step, (state, constants), dynamic_shapes=({0: batch}, {0: batch}))
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


@dataclass(frozen=True)
class Facts:
    """All that is known of a model that is exported."""

    model: Surrogate
    recipe: Recipe  # has its name
    cards: Cards  # of its datasets
    step: int  # of the training
    shards: Mapping[str, str]  # dataset -> digest of the shards that it is known from
    licence: str  # SPDX identifier
    # What it comes from. `pretrained`: what its run was finetuned from. Of an extension, among others: the `model` that
    # was extended, what was `added`, and `earlier`, the lineage of that model, or None (fm/share/extend.py).
    lineage: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.recipe.run.name

    @property
    def untrained(self) -> list[str]:
        """The datasets that were added to the model and that it has not been trained on, sorted."""
        names: list[str] = []
        lineage: Mapping[str, Any] | None = self.lineage
        while lineage and "added" in lineage:
            names += lineage["added"]
            lineage = lineage["earlier"]
        return sorted(names)

    def to_json(self) -> dict[str, Any]:
        """artefact.json, but for the list of files."""
        specs = self.model.specs.values()
        used = {name for spec in specs for name in (*spec.state_channels, *spec.constant_channels)}
        return {
            "format": EXPORT_FORMAT,
            "name": self.name,
            "step": self.step,
            "licence": self.licence,
            "datasets": {
                spec.name: {
                    "shards": self.shards.get(spec.name),
                    "grid": spec.grid,
                    "dt": spec.dt,
                    "boundary": spec.boundary,
                    "state_channels": spec.state_channels,
                    "constant_channels": spec.constant_channels,
                }
                for spec in specs
            },
            "channels": {
                name: {"description": channel.description, "unit": channel.unit}
                for name, channel in self.cards.registry.channel_cards.items()
                if name in used
            },
            "versions": {"wavelit-fm": fm.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "lineage": dict(self.lineage),
        }


WELL = "https://polymathic-ai.org/the_well/"


def model_card(facts: Facts, files: Mapping[str, bytes], address: str) -> str:
    """The text. `files` are all other files of the folder but artefact.json, by path, `address` is where
    `from_pretrained` will find it.
    """
    scores = read_scores(files)
    sections = [
        _head(facts, files),
        "## Use\n\n" + _usage(facts, address),
        "## Scores\n\n" + _scores(facts, scores, files),
        "## What it knows\n\n" + _datasets(facts),
        "## Limits\n\n" + _bullets(_limits(facts, scores)),
        "## How it was trained\n\n" + _bullets(_training(facts)),
        *_programs(facts.model, files),
        "## Files\n\n" + _files(files),
        "## Licence and citation\n\n" + _citation(facts),
    ]
    return f"---\n{_front_matter(facts)}---\n\n" + "\n\n".join(sections) + "\n"


def is_published_grid(spec: DatasetSpec, card: Card) -> bool:
    """Whether the data were on the grid that the dataset is published on."""
    return spec.grid == card.grid


def _front_matter(facts: Facts) -> str:
    published = [
        f"polymathic-ai/{name}"
        for name, card in facts.cards.registry.cards.items()
        if card.source.startswith(WELL)
        and is_published_grid(facts.model.specs[name], card)
        and name not in facts.untrained
    ]
    content = {
        "license": facts.licence.lower(),
        "library_name": "wavelit-fm",
        "tags": ["physics", "pde", "surrogate-model", "neural-operator", "the-well"],
        **({"datasets": published} if published else {}),
    }
    return yaml.safe_dump(content, sort_keys=False)


def _head(facts: Facts, files: Mapping[str, bytes]) -> str:
    model, names = facts.model, list(facts.model.specs)
    systems = f"{len(names)} systems" if len(names) > 1 else names[0]
    network = model.config.name if isinstance(model, Baseline) else "WaveLiT-FM"
    text = (
        f"# {facts.name}\n\nA surrogate ({network}, {_count(model.num_parameters())} parameters) "
        f"for two-dimensional partial differential equations ({systems}): from the state of a simulation it predicts "
        f"the next one, as often as you like. Averaged weights after {facts.step:,} training steps."
    )
    if facts.untrained:
        text += (
            f"\n\nIt is `{facts.lineage['model']}`, extended by {_and(facts.lineage['added'])}. "
            f"**Not trained yet: {_and(facts.untrained)}.** {_start(facts)}"
        )
    if "pictures/overview.png" in files:
        text += "\n\n![Truth, prediction and error on the test split](pictures/overview.png)"
    return text


def _start(facts: Facts) -> str:
    """What the model predicts for the datasets that it has not been trained on."""
    starts = {True: "the given state moved by the data's mean change", False: "the data's mean"}
    said = []
    for delta, start in starts.items():
        names = [name for name in facts.untrained if facts.model.delta[name] == delta]
        said += [f"for {_and(names)} {start}"] if names else []
    return f"Until it is trained (`finetune.pretrained`) it predicts {', '.join(said)}."


def _usage(facts: Facts, address: str) -> str:
    known = [spec for name, spec in facts.model.specs.items() if name not in facts.untrained]
    spec = min(known, key=lambda s: (len(s.state_channels) + len(s.constant_channels), s.name))
    kind = type(facts.model)
    module = "fm" if kind.__name__ == "WaveLiTFM" else kind.__module__
    given = ", ".join(f'"{name}": {name}' for name in (*spec.state_channels, *spec.constant_channels))
    grid = "" if spec.grid is None else f" of {spec.grid[0]} x {spec.grid[1]} points"
    return (
        "With the Python package `wavelit-fm` installed:\n\n```python\n"
        f"from {module} import {kind.__name__}\n\n"
        f'model = {kind.__name__}.from_pretrained("{address}")\n'
        f'series = model.predict({{{given}}}, "{spec.name}", steps=10)\n```\n\n'
        f"Fields are numpy arrays, tensors or an xarray Dataset{grid}, axis 0 is x, in the units below; `series` has "
        f"{_and(f'`{name}`' for name in spec.state_channels)} at the next 10 steps, in the same form. "
        f"On the command line, `fm evaluate {address} --shards FOLDER` scores it, and `finetune.pretrained: {address}` "
        "in a recipe starts from it."
    )


def _scores(facts: Facts, scores: Scores | None, files: Mapping[str, bytes]) -> str:
    if scores is None and facts.untrained:
        return (
            "None are known: this model was extended and not evaluated since. On the datasets that "
            f"`{facts.lineage['model']}` knew, its predictions and so its scores are those of that model."
        )
    if scores is None:
        return "None are known: this model was exported without an evaluation. `fm evaluate` makes one."
    rows: list[list[Cell]] = []
    for name, part in scores.datasets.items():
        row: list[Cell] = [name]
        for block in part.blocks().values():
            row += [vrmse_cell(block, scores.statistic), block.persistence if block else None]
        rows.append(row)
    head = ["dataset", *(name for block in (ONE_STEP, *scores.protocol.windows) for name in (block, "persistence"))]
    ratios = ", ".join(f"{name} {format_number(value)}" for name, value in scores.mean_ratios().items())
    text = (
        "VRMSE: root mean square error over the spread of the truth. 0 is perfect, 1 as good as the mean "
        "of the field; *persistence* repeats the first frame.\n\n"
        f"{markdown(head, rows)}\n\n"
        f"Geometric mean over datasets of the ratio to persistence: {ratios}.\n\n"
        f"<sub>{scores.protocol.describe()}.</sub>"
    )
    if "pictures/growth.png" in files:
        text += "\n\n![VRMSE against the step of a rollout](pictures/growth.png)"
    return text


def _datasets(facts: Facts) -> str:
    rows = [
        [
            f"`{name}`",
            card.description,
            ", ".join(spec.state_channels),
            ", ".join(spec.constant_channels) or "none",
            "not known" if spec.grid is None else f"{spec.grid[0]} x {spec.grid[1]}",
            "differs by trajectory" if spec.dt is None else f"{spec.dt:g}",
            " / ".join("-".join(dict.fromkeys(kind.lower() for kind in pair)) for pair in spec.boundary),
        ]
        for name, card in facts.cards.registry.cards.items()
        for spec in (facts.model.specs[name],)
    ]
    head = ["dataset", "system", "state", "constants", "grid", "dt", "ends of x / y"]
    channels = [[f"`{name}`", one["description"], one["unit"]] for name, one in facts.to_json()["channels"].items()]
    return (
        f"{_table(head, rows)}\n\n"
        "A step of the model is `dt` of simulated time. The channels, and what their numbers are:\n\n"
        f"{_table(['channel', 'what', 'unit'], channels)}"
    )


def _limits(facts: Facts, scores: Scores | None) -> list[str]:
    specs, cards = facts.model.specs, facts.cards.registry.cards
    lines = [
        "It knows the systems, boundaries, parameters and time steps of its training data and no others; `predict` "
        "warns where grid, `dt` or units look different.",
        "Nothing is conserved by construction, and there is no estimate of the error: compare a rollout with a "
        "simulation before you rely on it.",
    ]
    other = [name for name, spec in specs.items() if not is_published_grid(spec, cards[name])]
    if other:
        which = "all its data were" if len(other) == len(specs) else f"{_and(other)} were"
        lines.append(
            f"Not The Well's own files: {which} simulated on other grids than the published ones (the mini-Well, for "
            "instance, is coarser and milder). Scores may not be compared with published ones."
        )
    worse = [f"{window}: {_and(names)}" for window, names in _no_better(scores).items()]
    if worse:
        lines.append(f"On its own test split it is no better than persistence here: {'; '.join(worse)}.")
    return lines


def _no_better(scores: Scores | None) -> dict[str, list[str]]:
    """Datasets by the part of a rollout where the model does not beat repeating the first frame."""
    found: dict[str, list[str]] = {}
    for name, part in scores.datasets.items() if scores else ():
        for window, block in part.blocks().items():
            if block is not None and (block.ratio_to_persistence is None or block.ratio_to_persistence >= 1):
                found.setdefault(window, []).append(name)
    return found


def _training(facts: Facts) -> list[str]:
    recipe, train = facts.recipe, facts.recipe.train
    config = facts.model.config
    sizes = config.name if isinstance(facts.model, Baseline) else f"width {config.width}, depth {config.depth}"
    before = f"Before it was extended by {_and(facts.untrained)}: " if facts.untrained else ""
    lines = [
        f"{before}{sizes}; {facts.step:,} of {train.steps:,} steps of {train.global_batch} windows, AdamW at "
        f"{train.learning_rate:g}, {train.schedule} decay, averaged weights (EMA {train.ema:g}); datasets drawn by "
        f"`{recipe.sampling.scheme}`."
    ]
    if recipe.finetune is not None:
        lines.append(
            f"Finetuned from `{recipe.finetune.pretrained}` on rollouts of {recipe.finetune.unroll_steps} steps "
            f"(`{recipe.finetune.objective}`)."
        )
    versions = ", ".join(f"{name} {version}" for name, version in facts.to_json()["versions"].items())
    lines.append(f"`recipe.yaml` has every setting, `artefact.json` the digests of the training data. {versions}.")
    return lines


def _programs(model: Surrogate, files: Mapping[str, bytes]) -> Iterable[str]:
    names = [name for name in files if name.startswith("programs/")]
    if not names:
        return
    spec = model.specs[names[0].removeprefix("programs/").removesuffix(".pt2")]
    grid = spec.grid or ("H", "W")
    yield (
        "## Programs\n\nOne step without `wavelit-fm`, with torch alone, for any batch size on the trained grid: "
        f"{_and(f'`{name}`' for name in names)}.\n\n```python\nimport torch\n\n"
        f'step = torch.export.load("{names[0]}").module()\n'
        f"state = step(state, constants)  # (B, {len(spec.state_channels)}, {grid[0]}, {grid[1]}) and "
        f"(B, {len(spec.constant_channels)}, {grid[0]}, {grid[1]}), float32\n```\n\n"
        "Channels stand in the order of the table above, in physical units."
    )


def _files(files: Mapping[str, bytes]) -> str:
    about = {
        "model.safetensors": "the averaged weights",
        "model.json": "sizes, channels and statistics of the datasets",
        "artefact.json": "what this is, and the SHA-256 of every file",
        "recipe.yaml": "the recipe, resolved and runnable",
        "cards/": "the datasets' cards and canonical channels",
        "programs/": "single steps for torch alone",
        "scores.json": "every score, by dataset, window and channel",
        "pictures/": "rollouts, error growth and spectra",
    }
    there = {name if "/" not in name else name.partition("/")[0] + "/" for name in (*files, "artefact.json")}
    return _table(["file", "what"], [[f"`{name}`", text] for name, text in about.items() if name in there])


def _citation(facts: Facts) -> str:
    cards = facts.cards.registry.cards
    licences: dict[str, list[str]] = {}
    for name, card in cards.items():
        licences.setdefault(card.license or "a licence that its card does not name", []).append(name)
    data = "; ".join(
        f"all under {licence}" if len(licences) == 1 else f"{_and(names)} under {licence}"
        for licence, names in licences.items()
    )
    sources = dict.fromkeys(one for card in cards.values() for one in card.citation.split("; ") if one)
    return (
        f"The weights are under the licence {facts.licence}. The data are others' work, {data}; please cite:\n\n"
        + _bullets(
            [
                *sources,
                "WaveLiT: *Small Models, Strong Priors: Architectural Inductive Bias for Parameter-Efficient "
                "Neural PDE Solvers*; this is an independent implementation",
            ]
        )
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all columns to the left."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + ":--|" * len(head), *map(line, rows)])


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _and(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number:,}"
