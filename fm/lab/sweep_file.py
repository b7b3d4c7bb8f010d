"""A sweep: a YAML file that names variants of a recipe, the runs made of them, and the state of these runs.

A setting of the command line precedes the variant's, then come the overrides of all variants and the recipe. The
progress of a sweep is read from its files alone, so it may be killed at any time, and its folder moved.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from data_pipeline.errors import UserError
from data_pipeline.files import read_json, write_whole
from data_pipeline.registry import load_registry
from data_pipeline.remote import is_url
from data_pipeline.schema import (
    Count,
    Key,
    Line,
    Mismatch,
    Positive,
    Strict,
    at_least,
    checked,
    checked_list,
    nearest,
    read_yaml,
    validate,
)
from data_pipeline.shards.format import MANIFEST_NAME, Manifest
from data_pipeline.windows.loader import shard_places
from fm.checkpoint import look_at_newest, use_checkpoint, verify_checkpoint, weights_digest
from fm.config import Recipe, changed_settings, recipe_to_dict, resolve
from fm.datasets import load_own_recipe, with_available_datasets
from fm.evaluation.protocol import Protocol, load_protocol
from fm.evaluation.scores import Scores


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    base: Path  # its recipe
    overrides: Mapping[str, Any]  # its own, dotted keys
    only_evaluate: bool  # not trained: the scores of the model that finetune.pretrained names


@dataclass(frozen=True, kw_only=True)
class SweepFile(Strict):
    """The keys of a sweep file.

    title: The parts of the block
    base: ../quickstart.yaml
    overrides: {train.steps: 400}
    variants:
      full: {}
      no ridge: {model.ridge: none}
      another model: {base: ../baselines/fno.yaml, train.learning_rate: 1.0e-3}
      pretrained: {only_evaluate: true}  # not trained: the model that finetune.pretrained names
    """

    title: Line
    variants: Annotated[dict[Key, dict[Key, Any]], checked(bool, "at least one variant")]  # name -> its settings
    base: Line | None = None  # recipe of the variants that name none, relative to the file
    overrides: dict[Key, Any] = field(default_factory=dict)  # of all variants, keys as on the command line
    paper: Line | None = None  # where the paper's numbers are from
    note: Line | None = None  # a remark that is printed with the table
    seeds: Annotated[
        tuple[Annotated[int, at_least(0)], ...],
        checked_list(lambda seeds: 0 < len(seeds) == len(set(seeds)), "one or more different seeds"),
    ] = (0,)  # each variant is trained with each seed
    seconds: Positive | None = None  # of training per variant; a probe chooses train.steps. null: the recipe's steps
    protocol: Line = "thirds"  # of the scores: a name, or a YAML file
    windows: Count | None = None  # one-step windows scored per dataset, evenly spaced; null: all
    published: dict[Key, Positive] | None = None  # variant -> the paper's one-step error, if known; lower is better
    published_windows: dict[Key, dict[Key, Positive]] = field(default_factory=dict)  # the same by window of rollouts


@dataclass(frozen=True, kw_only=True)
class Sweep(SweepFile):
    """A sweep file, checked, with its place."""

    file: Path

    def variant(self, name: str) -> Variant:
        """Return the variant of that name. Raises UserError, with the nearest name, if there is none."""
        if name not in self.variants:
            raise UserError(f"{self.file}: no variant {name!r}. {nearest(name, self.variants)}")
        settings = self.variants[name]
        own = {key: value for key, value in settings.items() if key not in ("base", "only_evaluate")}
        base = settings.get("base", self.base)
        assert base is not None  # `load_sweep` checks it
        return Variant(name, self.file.parent / base, own, "only_evaluate" in settings)

    def scored_protocol(self) -> Protocol:
        """Return the protocol of the scores, with the sweep's number of one-step windows."""
        return replace(load_protocol(self.protocol), one_step_windows=self.windows)


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: a variant with a seed.

    The sweep's folder DIR holds:

    DIR/<variant>_seed<k>/      a run directory; train.out and evaluate.out hold what was printed
    DIR/<variant>/              the report of a variant that is only evaluated
    DIR/probes/<variant>.json   the pace that train.steps was chosen by, if the sweep gives seconds
    DIR/table.{md,json}         the table
    """

    variant: Variant
    seed: int
    directory: Path  # the run's
    overrides: tuple[str, ...]  # key=value, all of them
    recipe: Recipe  # resolved

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.directory.name

    @property
    def report(self) -> Path:
        """Folder of the evaluation."""
        return self.directory / "report"

    @property
    def probe(self) -> Path:
        """File of the probe of its variant."""
        return self.directory.parent / "probes" / f"{folder_name(self.variant.name)}.json"

    @property
    def model(self) -> Path | str:
        """The run or model that is scored."""
        if self.variant.only_evaluate:
            assert self.recipe.finetune is not None  # `plan` checks it
            return self.recipe.finetune.pretrained
        return self.directory

    def is_trained(self) -> bool:
        """Return whether the run has all its steps."""
        state = look_at_newest(self.directory / "checkpoints", print, verify_checkpoint)
        return state is not None and state["step"] >= self.recipe.train.steps

    def with_settings(self, settings: Mapping[str, Any]) -> "Trial":
        """Return the trial with more settings, by dotted key."""
        return _trial(self.variant, self.seed, self.directory, (*self.overrides, *_overrides(settings)))


def folder_name(variant: str) -> str:
    """Return the name of a variant as a folder's name."""
    return re.sub(r"[^a-z0-9]+", "_", variant.lower()).strip("_")


def load_sweep(name: str | Path) -> Sweep:
    """Read a sweep file, given with or without its .yaml. The UserError for a wrong file names the key."""
    path = Path(name)
    file = path if path.is_file() else path.with_name(f"{path.name}.yaml")
    given = validate(SweepFile, read_yaml(file), str(file), _check_file)
    try:
        windows = load_protocol(given.protocol).windows
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    for name in given.published_windows:
        if name not in windows:
            raise UserError(
                f"{file}: published_windows.{name}: expected a window of protocol {given.protocol}, "
                f"{', '.join(windows)}. {nearest(name, windows)}"
            )
    return Sweep(file=file, **vars(given))


def _check_file(given: SweepFile) -> None:
    folders: set[str] = set()
    for name, settings in given.variants.items():
        place = ("variants", name)
        base = settings.get("base", given.base)
        if base is None:
            hint = "Name a recipe in the variant, or for all in the file."
            raise Mismatch("a base, since the file has none", hint, place)
        if not isinstance(base, str):
            raise Mismatch("one line of text", at=(*place, "base"))
        if settings.get("only_evaluate", True) is not True:
            raise Mismatch("true, or no such key", at=(*place, "only_evaluate"))
        _check_settings(settings, place)
        folder = folder_name(name)
        if not folder or folder in folders:
            what = "a variant whose name differs from the others in letters or digits"
            raise Mismatch(what, "They name its folder.", place)
        folders.add(folder)
    _check_settings(given.overrides, ("overrides",))
    if given.seconds is not None and "train.steps" in given.overrides:
        hint = "Give one of them: a probe chooses the steps."
        raise Mismatch("no seconds beside train.steps", hint, ("seconds",))
    tables: dict[tuple[str, ...], Mapping[str, float]] = {("published",): given.published or {}}
    tables |= {("published_windows", window): numbers for window, numbers in given.published_windows.items()}
    for table, numbers in tables.items():
        for name in numbers:
            if name not in given.variants:
                raise Mismatch("the name of a variant", nearest(name, given.variants), (*table, name))


def _check_settings(settings: Mapping[str, Any], place: tuple[str, ...]) -> None:
    for key in settings:
        if key.partition(".")[0] == "run":
            hint = "A sweep names, places and seeds its own runs (seeds, --out)."
            raise Mismatch("no key of run", hint, (*place, key))


def plan(sweep: Sweep, out: Path, overrides: Sequence[str] = ()) -> list[Trial]:
    """Return all runs of a sweep under the folder `out`, in the file's order; `overrides` are the command line's.

    Raises UserError if a run is no valid recipe, an override changes a setting that distinguishes a variant, or two
    runs would be scored on different shards.
    """
    variants = [sweep.variant(name) for name in sweep.variants]
    for override in overrides:
        _check_override(override, sweep, variants)
    trials = []
    for variant in variants:
        name = folder_name(variant.name)
        for seed in sweep.seeds[:1] if variant.only_evaluate else sweep.seeds:
            directory = out / (name if variant.only_evaluate else f"{name}_seed{seed}")
            own = {"run.name": directory.name, "run.dir": str(directory), "run.seed": seed, "tracking.progress": False}
            nearer = _overrides({**sweep.overrides, **variant.overrides})
            trials.append(_trial(variant, seed, directory, (*nearer, *overrides, *_overrides(own))))
    shards = {", ".join(shard_places(trial.recipe.data.shards)): trial.name for trial in trials}
    if len(shards) > 1:
        which = ", ".join(f"{name} {place}" for place, name in shards.items())
        raise UserError(f"{sweep.file}: expected one folder of shards for all variants, got {which}: give data.shards")
    return trials


def _trial(variant: Variant, seed: int, directory: Path, overrides: tuple[str, ...]) -> Trial:
    try:
        recipe = load_own_recipe(variant.base, overrides)
        resolved = with_available_datasets(recipe, load_registry(recipe.data.registry))
        if resolved != recipe:  # all runs of the sweep have the same datasets, even where shards are added meanwhile
            overrides = (*overrides, f"data.datasets=[{','.join(resolved.data.datasets or ())}]")
            recipe = resolved
    except UserError as error:
        raise UserError(f"variant {variant.name!r}: {error}") from error
    if variant.only_evaluate and recipe.finetune is None:
        raise UserError(
            f"variant {variant.name!r}: only_evaluate is for sweeps of finetuning, expected finetune.pretrained in "
            f"{variant.base}"
        )
    return Trial(variant, seed, directory, overrides, recipe)


def _check_override(override: str, sweep: Sweep, variants: Sequence[Variant]) -> None:
    key = override.partition("=")[0]
    if key.partition(".")[0] == "run":
        raise UserError(f"override {override!r}: a sweep names, places and seeds its own runs (--out, seeds)")
    if key == "train.steps" and sweep.seconds is not None:
        raise UserError(f"override {override!r}: a probe chooses train.steps for {sweep.seconds:g} seconds")
    for variant in variants:
        touched = [own for own in variant.overrides if f"{own}.".startswith(f"{key}.") or key.startswith(f"{own}.")]
        if touched:
            raise UserError(
                f"override {override!r}: {touched[0]} is what variant {variant.name!r} of {sweep.file} sets; expected "
                "a setting that all variants share"
            )


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    # JSON is YAML
    return [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in settings.items()]


@dataclass(frozen=True)
class Probe(Strict):
    """The pace of a variant on this machine, and the number of steps chosen by it; one file for all its seeds."""

    seconds: float  # of training, as the sweep gives them
    seconds_per_step: float
    steps: int
    settings: dict[str, Any]  # of the run that was timed, but for its place, seed and length

    @classmethod
    def load(cls, file: Path) -> "Probe | None":
        """Read the stored probe, if any. Raises UserError if the file is damaged."""
        where = f"{file}: not the probe of a sweep; remove it, and the pace is measured anew"
        probe: Probe | None = validate(cls, read_json(file), where) if file.exists() else None
        return probe

    def save(self, file: Path) -> None:
        """Write the probe, whole or not at all."""
        write_whole(file, f"{json.dumps(asdict(self), indent=1)}\n".encode())


def find_changes(trial: Trial, sweep: Sweep) -> list[str]:
    """Return the settings, a line each, in which a run with a checkpoint differs from the sweep's present ones."""
    state = look_at_newest(trial.directory / "checkpoints", print, verify_checkpoint)
    if state is None:
        return []
    before = recipe_to_dict(resolve(state["recipe"], f"state.json of the newest checkpoint in {trial.directory}"))
    after = recipe_to_dict(trial.recipe)
    changes = []
    if sweep.seconds is not None:
        del before["train"]["steps"], after["train"]["steps"]
        probe = Probe.load(trial.probe)
        if probe is None or probe.seconds != sweep.seconds:
            changes.append(f"seconds: {probe.seconds if probe else None} -> {sweep.seconds}")
    before["run"]["dir"] = after["run"]["dir"]  # the sweep's folder may have been moved
    return changes + changed_settings(before, after)


def read_scores(trial: Trial, sweep: Sweep) -> Scores | None:
    """Return the scores of a trial's present weights and data under the sweep's protocol, None if there are none.

    Data that are missing, or behind a URL, are not compared. Raises UserError if the file is damaged.
    """
    file = trial.report / "scores.json"
    if not file.is_file():
        return None
    scores, places = Scores.load(file), shard_places(trial.recipe.data.shards)
    wanted = sweep.scored_protocol().for_context(trial.recipe.data.context)
    weights = use_checkpoint(trial.model, weights_digest)
    if scores.protocol != wanted or scores.origin.get("weights") != weights:
        return None
    for place in places:
        for name, part in scores.datasets.items() if not is_url(place) else ():
            manifest = Path(place) / name / wanted.split / MANIFEST_NAME
            if manifest.is_file() and Manifest.load(manifest).digest != part.data_digest:
                return None
    return scores


def check_same_data(scores: Mapping[str, Scores], sweep: Sweep) -> None:
    """Raise UserError if two runs, by name, were scored on different data of one dataset."""
    first: dict[str, tuple[str, str]] = {}
    for run, part in scores.items():
        for name, dataset in part.datasets.items():
            other, digest = first.setdefault(name, (run, dataset.data_digest))
            if dataset.data_digest != digest:
                raise UserError(
                    f"{sweep.file}: expected all runs scored on the same {name} data, got shards with digests "
                    f"{digest[:12]} in {other} and {dataset.data_digest[:12]} in {run}: remove the report folder of "
                    "the one that is out of date, and sweep again"
                )
