"""The model card: README.md with the front matter that the Hugging Face Hub reads.

It says how to use the model, how good it is beside persistence, what it knows, what it is not for, and what lies where.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from data_pipeline.cards.registry import Card
from fm.baselines.baseline import Baseline
from fm.export.facts import Facts
from fm.export.scores import read_scores
from fm.model_config import DatasetSpec
from fm.scores.formats import Table, markdown, number, text_rows
from fm.scores.protocol import Protocol
from fm.scores.tables import marked
from fm.surrogate import Surrogate

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


def _scores(facts: Facts, scores: Mapping[str, Any] | None, files: Mapping[str, bytes]) -> str:
    if scores is None and facts.untrained:
        return (
            "None are known: this model was extended and not evaluated since. On the datasets that "
            f"`{facts.lineage['model']}` knew, its predictions and so its scores are those of that model."
        )
    if scores is None:
        return "None are known: this model was exported without an evaluation. `fm evaluate` makes one."
    protocol = Protocol.from_json(scores["protocol"])
    lead = protocol.trajectories
    rows = []
    for name, part in scores["datasets"].items():
        cells = [part["one_step"], *part["windows"].values()]
        rows.append(
            [name, *(value for cell in cells for value in (marked(cell, lead), (cell or {}).get("persistence")))]
        )
    head = ["dataset", *(name for block in ("one step", *protocol.windows) for name in (block, "persistence"))]
    table = Table("", head, rows)
    text = (
        "VRMSE: root mean square error over the spread of the truth. 0 is perfect, 1 as good as the mean "
        "of the field; *persistence* repeats the first frame.\n\n"
        f"{markdown(table.head, text_rows(table))}\n\n"
        f"Geometric mean over datasets of the ratio to persistence: {_ratios(scores)}.\n\n"
        f"<sub>{protocol.describe()}.</sub>"
    )
    if "pictures/growth.png" in files:
        text += "\n\n![VRMSE against the step of a rollout](pictures/growth.png)"
    return text


def _ratios(scores: Mapping[str, Any]) -> str:
    ratios = {"one step": scores["geometric_mean_ratio_to_persistence"]}
    ratios |= scores["geometric_mean_ratio_to_persistence_windows"]
    return ", ".join(f"{name} {number(value)}" for name, value in ratios.items())


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


def _limits(facts: Facts, scores: Mapping[str, Any] | None) -> list[str]:
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


def _no_better(scores: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Datasets by the part of a rollout where the model does not beat repeating the first frame."""
    found: dict[str, list[str]] = {}
    for name, part in scores["datasets"].items() if scores else ():
        for window, cell in {"one step": part["one_step"], **part["windows"]}.items():
            ratio = cell and cell["ratio_to_persistence"]
            if cell and (ratio is None or ratio >= 1):
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
