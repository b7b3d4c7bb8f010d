"""Everything a recipe can say: one dataclass a section, nested in `Recipe`.

Each field's comment is its documentation; checks that span fields live in `__post_init__` and raise ValueError, which
the recipe loader turns into a message with the key's path.

Reads a recipe (YAML, dotted overrides, every check there is, with messages that name the key), and writes one.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from data_pipeline.files import UserError
from data_pipeline.windows.streaming import StreamSettings
from fm.model.baselines import BaselineConfig
from fm.model.spec import ModelConfig


@dataclass(frozen=True)
class RunSettings:
    """Name, place and seed of a run."""

    name: str  # also the default folder: runs/<name>
    dir: str | None = None  # run directory; null means runs/<name>
    seed: int = 0  # initialisation, sampling and teacher-forcing coins are functions of it
    stop_at: int | None = None  # end the process after this step, with a checkpoint; train.steps stays the run's length

    def __post_init__(self) -> None:
        if self.stop_at is not None:
            _at_least("stop_at", self.stop_at, 1)

    @property
    def directory(self) -> Path:
        return Path(self.dir) if self.dir else Path("runs") / self.name


@dataclass(frozen=True)
class DataSettings:
    """Which shards are read, and how."""

    shards: str  # folder or URL (https://, s3://, gs://, hf://) with <dataset>/<split>/manifest.json
    datasets: list[str] | None = None  # official names; null means every dataset in the folder
    registry: str | None = None  # folder of your own cards; null means WAVELIT_REGISTRY
    workers: int = 1  # threads per rank that read batches ahead, at most one from a URL; batches do not depend on it
    verify: bool = False  # compare each frame read with its checksum
    cache: str | None = None  # folder for what a URL gave; null means $XDG_CACHE_HOME/wavelit, or ~/.cache/wavelit
    cache_gb: float = 40.0  # limit of that folder; 0 keeps nothing there, for shuffle: global
    prefetch: int = 64  # draws ahead of their use whose data are fetched from a URL, as far as there is room
    # dataset -> how many trajectories of its train split are trained on. Which depends on what they are alone: those of
    # N are in those of N + 1, and are those of `data-pipeline shard --restrict N`
    trajectories: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least("workers", self.workers, 0)
        for name, count in self.trajectories.items():
            _at_least(f"trajectories.{name}", count, 1)
        _at_least("prefetch", self.prefetch, 0)
        if not 0 <= self.cache_gb < 1e9:
            raise ValueError(f"cache_gb: expected gigabytes, at least 0, got {self.cache_gb}")

    def stream(self, shuffle: str, shards_per_block: int) -> StreamSettings:
        """How shards behind a URL are read under this shuffle."""
        cache = None if self.cache is None else Path(self.cache)
        return StreamSettings(shuffle, shards_per_block, cache, int(self.cache_gb * 1e9), self.prefetch)


@dataclass(frozen=True)
class SamplingSettings:
    """How a step's dataset and windows are drawn (paper section 3.5, Tables 8 and 10)."""

    # adaptive: sqrt at first, then after each validation in proportion to sqrt share x score ** power, where the score
    # is one-step validation VRMSE over persistence's
    scheme: Literal["sqrt", "uniform", "proportional", "temperature", "weights", "adaptive"] = "sqrt"
    # global: processes share every draw; per_rank: windows go to processes by cost, who then work on different datasets
    draw: Literal["global", "per_rank"] = "global"
    temperature: float = 0.2  # tau of softmax(share / tau), for scheme: temperature
    weights: dict[str, float] | None = None  # dataset -> weight, for scheme: weights
    power: float = 1.0  # how strongly shares follow the scores, for scheme: adaptive; 0 is not at all
    floor: float = 0.02  # least share of a dataset, for scheme: adaptive
    # Passes over a dataset above which the run warns, null for never; the paper's 1M steps make 35, its most, over
    # viscoelastic_instability.
    max_passes: float | None = 40.0
    shuffle: Literal["global", "blocks"] = "global"  # blocks: shards permuted, windows within blocks of shards
    shards_per_block: int = 4  # for shuffle: blocks

    def __post_init__(self) -> None:
        _at_least("shards_per_block", self.shards_per_block, 1)
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature}")
        if not 0 <= self.power <= 10:
            raise ValueError(f"power: expected a number from 0 to 10, got {self.power}")
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor: expected a share in [0, 1), got {self.floor}")
        if self.max_passes is not None and not self.max_passes > 0:
            raise ValueError(f"max_passes: expected a number above 0, or null, got {self.max_passes}")
        if (self.scheme == "weights") != (self.weights is not None):
            raise ValueError("weights: give dataset weights with scheme: weights, and only then")


@dataclass(frozen=True)
class TrainSettings:
    """Length, batch and optimiser of a run (paper section 4: AdamW, warm-up, exponential decay, clip, EMA)."""

    steps: int  # optimiser steps of the whole run; schedules see this number
    global_batch: int = 4  # windows per step over all processes, whatever their number
    draws: int = 1  # mini-batches, each of one dataset, that make up the global batch
    micro_batch: int | None = None  # most windows that a process takes through the model at once; null: all it has
    learning_rate: float = 1e-3  # peak
    warmup_steps: int = 5000  # linear from 0 to the peak
    schedule: Literal["exponential", "cosine"] = "exponential"  # after the warm-up
    decay: float = 0.99  # exponential: factor every decay_every steps, applied continuously
    decay_every: int = 2000  # optimiser steps
    weight_decay: float = 1e-5  # decoupled
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's
    clip: float = 1.0  # global gradient norm
    jitter: float = 0.0  # Gaussian noise on true input frames, in units of each channel's std
    ema: float = 0.999  # decay of the averaged weights; ramps up as (1 + step) / (10 + step)
    precision: Literal["auto", "float32", "bf16"] = "auto"  # auto: bf16 autocast on a GPU that has it, else float32
    # steps whose losses are read back from a GPU at once, so that it need not wait; null: 10 on a GPU, 1 on a CPU. The
    # run is the same, bit for bit. FSDP, DeepSpeed and guard.spike read every step
    read_every: int | None = None
    # by torch.compile: each block, the whole step, or that with CUDA graphs; auto: blocks on a GPU, eager on a CPU
    compile: Literal["auto", "eager", "blocks", "step", "graphs"] = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "draws", "decay_every"):
            _at_least(name, getattr(self, name), 1)
        _at_least("warmup_steps", self.warmup_steps, 0)
        for name in ("micro_batch", "read_every"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if self.global_batch % self.draws:
            raise ValueError(
                f"global_batch: expected a multiple of the {self.draws} draws it is made of, got {self.global_batch}"
            )
        for name in ("learning_rate", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        if self.jitter < 0:
            raise ValueError(f"jitter: expected a number of at least 0, got {self.jitter}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay: expected a factor in (0, 1], got {self.decay}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a decay in [0, 1), got {self.ema}")

    @property
    def batch(self) -> int:
        """Windows per draw over all processes."""
        return self.global_batch // self.draws


@dataclass(frozen=True)
class GuardSettings:
    """What happens to a step whose loss or gradient is not finite, or far above the usual (fm/training/guard.py)."""

    # stop: end the run; skip: go on without it; rollback: return to the last checkpoint, and pass it over this time.
    # Whichever, the weights before it go to <run>/incidents, where `fm replay` finds them.
    action: Literal["stop", "skip", "rollback"] = "stop"
    spike: float | None = None  # spreads above the median that are too far, 10 say; null: finite is good enough
    history: int = 128  # last steps of each dataset that median and spread are taken of
    max_events: int = 10  # refused steps in a run; one more ends it

    def __post_init__(self) -> None:
        _at_least("history", self.history, 4)
        _at_least("max_events", self.max_events, 0)
        if self.spike is not None and not self.spike > 0:
            raise ValueError(f"spike: expected a number above 0, or null, got {self.spike}")


@dataclass(frozen=True)
class LossSettings:
    """Weights of the two terms (paper section 3.6)."""

    mse: float = 1.0  # mean squared error of the fields
    wavelet_l1: float = 1.0  # sum over subbands of the mean absolute coefficient error

    def __post_init__(self) -> None:
        if self.mse < 0 or self.wavelet_l1 < 0 or self.mse + self.wavelet_l1 == 0:
            raise ValueError(f"expected weights of at least 0, not both 0, got {self.mse} and {self.wavelet_l1}")


@dataclass(frozen=True)
class FinetuneSettings:
    """Rollout finetuning from a pretrained checkpoint (paper Appendix G)."""

    pretrained: str  # run, checkpoint, exported model or hf://organisation/name; its EMA weights and architecture
    # What a window's K model steps teach (fm/training/objective.py). scheduled_sampling: inputs are the truth by
    # chance, less and less often; bptt: never but the first; causal_bptt: as bptt, later steps weigh little until
    # earlier ones are right; pushforward: as bptt, only the last step has a gradient
    objective: Literal["scheduled_sampling", "bptt", "causal_bptt", "pushforward"] = "scheduled_sampling"
    unroll_steps: int = 4  # K: model steps per window
    unroll_override: dict[str, int] = field(default_factory=dict)  # dataset -> K
    unroll_start: int | None = None  # K of the first training step, which then grows to its full length; null: at once
    unroll_growth: float = 0.5  # share of the run in which K grows
    forcing: Literal["linear", "cosine", "inverse_sigmoid"] = "linear"  # scheduled_sampling: from start to end
    forcing_start: float = 1.0  # scheduled_sampling: probability of feeding the truth at the first training step
    forcing_end: float = 0.0  # and at the last
    causal_eps: float = 1.0  # causal_bptt: weight of model step k is exp(-causal_eps x loss of the steps before it)
    checkpoint_activations: bool = False  # keep only the states between model steps: less memory, a third more work
    rehearse: bool = True  # before step 0, take the longest unroll on the largest grid once, to see that it fits
    # Most that one-step VRMSE (geometric mean over datasets, valid split) may be of the pretrained model's, 1.1 say;
    # null: whatever. The best rollouts within it are kept in <run>/best (fm/training/guard.py)
    gate: float | None = None
    gate_action: Literal["stop", "keep_best"] = "stop"  # where it is more: end the run, or only keep the best

    def __post_init__(self) -> None:
        _at_least("unroll_steps", self.unroll_steps, 1)
        for name, steps in self.unroll_override.items():
            _at_least(f"unroll_override.{name}", steps, 1)
        if self.unroll_start is not None:
            _at_least("unroll_start", self.unroll_start, 1)
        if not 0 < self.unroll_growth <= 1:
            raise ValueError(f"unroll_growth: expected a share of the run in (0, 1], got {self.unroll_growth}")
        for name in ("forcing_start", "forcing_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a probability, got {getattr(self, name)}")
        if self.causal_eps < 0:
            raise ValueError(f"causal_eps: expected a number of at least 0, got {self.causal_eps}")
        if self.gate is not None and self.gate < 1:
            raise ValueError(f"gate: expected a factor of at least 1, or null, got {self.gate}")

    def ignored(self) -> list[str]:
        """Settings that were given and that nothing reads, each with the reason."""
        of_objective = {"forcing": "scheduled_sampling", "forcing_start": "scheduled_sampling"}
        of_objective |= {"forcing_end": "scheduled_sampling", "causal_eps": "causal_bptt"}
        reasons = {
            name: f"finetune.objective is {self.objective}, only {owner} reads it"
            for name, owner in of_objective.items()
            if owner != self.objective
        }
        if self.unroll_start is None:
            reasons["unroll_growth"] = "finetune.unroll_start is not given"
        if self.gate is None:
            reasons["gate_action"] = "finetune.gate is not given"
        given = {one.name for one in fields(self) if one.name in reasons and getattr(self, one.name) != one.default}
        return [f"{name} is ignored: {reason}" for name, reason in reasons.items() if name in given]

    def unroll_of(self, dataset: str) -> int:
        """K of a dataset at its full length."""
        return self.unroll_override.get(dataset, self.unroll_steps)


@dataclass(frozen=True)
class RateSettings:
    """Factors on train.learning_rate for the parts of a model; a part whose factor is 0 stays as it is."""

    embedding: float = 1.0  # lifting rows and task vectors
    trunk: float = 1.0  # everything between
    head: float = 1.0

    def __post_init__(self) -> None:
        for one in fields(self):
            if not 0 <= getattr(self, one.name) < math.inf:
                raise ValueError(f"{one.name}: expected a factor of at least 0, got {getattr(self, one.name)}")
        if not any(getattr(self, one.name) for one in fields(self)):
            raise ValueError("expected one factor above 0 at least, else nothing is trained")


@dataclass(frozen=True)
class AdaptSettings:
    """How a pretrained model learns datasets that it did not know, and keeps what it knew (fm/training/optim.py)."""

    datasets: list[str] = field(default_factory=list)  # those that are new to it; none where only rates are given
    # optimiser steps at the beginning in which only the new datasets are drawn, and only their own parts move: heads,
    # task vectors, lifting rows of channels that no other dataset of the run has
    alone_steps: int = 0
    # of all draws after that, the share that goes to the new datasets; sampling.scheme divides it among them, and the
    # rest among the others. null: sampling.scheme divides all
    share: float | None = None
    rates: RateSettings = field(default_factory=RateSettings)

    def __post_init__(self) -> None:
        _at_least("alone_steps", self.alone_steps, 0)
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share: expected a share in (0, 1), or null, got {self.share}")
        if not self.datasets and (self.alone_steps or self.share is not None):
            raise ValueError("alone_steps and share are the new datasets', expected their names in datasets")


@dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are written and which are kept."""

    every: int = 5000  # optimiser steps; the last step is always saved
    keep: int = 3  # newest checkpoints kept
    keep_every: int | None = None  # also keep those at multiples of this step
    resume: Literal["auto", "never"] = "auto"  # auto: continue from the newest whole checkpoint
    # what a failed save does; continue: train on and try again at the next save. The last save of a run always stops it
    on_error: Literal["stop", "continue"] = "stop"

    def __post_init__(self) -> None:
        _at_least("every", self.every, 1)
        _at_least("keep", self.keep, 1)
        if self.keep_every is not None:
            _at_least("keep_every", self.keep_every, 1)


@dataclass(frozen=True)
class ValidationSettings:
    """Scores on the valid split during training, from the EMA weights."""

    every: int = 5000  # optimiser steps, and the last step of a run that is longer; 0 means never
    windows: int = 64  # one-step windows per dataset, evenly spaced over the split
    rollouts: int = 1  # trajectories per dataset; 0 means none
    protocol: str = "wavelit"  # name or YAML file: its windows are the rollout_vrmse tags, and evaluation's default

    def __post_init__(self) -> None:
        for name in ("every", "rollouts"):
            _at_least(name, getattr(self, name), 0)
        _at_least("windows", self.windows, 1)


@dataclass(frozen=True)
class TrackingSettings:
    """TensorBoard and the console."""

    every: int = 10  # optimiser steps between TensorBoard scalars (log.jsonl has every step)
    # on the main process: a panel where stderr is a terminal, else a line every ten seconds or so
    progress: bool = True
    pictures: int = 40  # most validations of the run that draw pictures, evenly spread, the last included
    # other trackers that get every scalar and the settings, by accelerate's names, such as [wandb]
    log_with: list[str] | None = None
    # optimiser steps between measurements of how the datasets' gradients agree (fm/training/checks.py); 0 means never
    gradient_cosine_every: int = 0

    def __post_init__(self) -> None:
        _at_least("every", self.every, 1)
        _at_least("pictures", self.pictures, 0)
        _at_least("gradient_cosine_every", self.gradient_cosine_every, 0)


@dataclass(frozen=True)
class Recipe:
    """One run, resolved."""

    run: RunSettings
    data: DataSettings
    train: TrainSettings
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    model: ModelConfig | None = None  # null: the defaults, or when finetuning the pretrained architecture
    baseline: BaselineConfig | None = None  # in place of model: another network, for comparison
    loss: LossSettings = field(default_factory=LossSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    finetune: FinetuneSettings | None = None
    adapt: AdaptSettings | None = None  # only with finetune
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)

    def __post_init__(self) -> None:
        if self.model is not None and self.baseline is not None:
            raise ValueError("model and baseline: expected one of the two sections, got both")
        if self.sampling.scheme == "adaptive" and self.validation.every == 0:
            raise ValueError("sampling.scheme: adaptive follows the validation scores, expected validation.every > 0")
        if self.adapt is not None:
            self._check_adapt(self.adapt)
        if self.guard.action == "rollback" and self.checkpoint.resume == "never":
            raise ValueError("guard.action: rollback returns to a checkpoint, expected checkpoint.resume: auto")

        watches = self.validation.every > 0 and self.validation.rollouts > 0
        if self.finetune is not None and self.finetune.gate is not None and not watches:
            raise ValueError("finetune.gate needs validation.every > 0 and validation.rollouts > 0")

    def _check_adapt(self, adapt: AdaptSettings) -> None:
        if self.finetune is None:
            raise ValueError("adapt: it is for pretrained models, expected the section finetune beside it")
        if self.sampling.scheme == "adaptive" and (adapt.alone_steps or adapt.share is not None):
            raise ValueError(
                "sampling.scheme: adaptive sets the shares itself, expected another scheme beside adapt.alone_steps "
                "or adapt.share"
            )
        if adapt.alone_steps >= self.train.steps:
            raise ValueError(
                f"adapt.alone_steps: expected fewer than the {self.train.steps} of train.steps, got {adapt.alone_steps}"
            )

    def window_length(self, dataset: str) -> int:
        """Frames that a training window of a dataset holds: the input and one target per model step."""
        return 1 + (self.finetune.unroll_of(dataset) if self.finetune else 1)


def _at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"{name}: expected a whole number of at least {minimum}, got {value}")


FIRST_LINE = 'launch: 0; from fm.recipe import run; run(__file__); r"""'
LAST_LINE = '# """'


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply dotted overrides and check everything.

    Raises UserError with the key's path, the value and the nearest valid name.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a mapping with the sections {', '.join(_keys(Recipe))}, got {document!r}")
    document.pop("launch", None)
    for override in overrides:
        _apply_override(document, override)
    return resolve(document, str(path))


def resolve(document: dict[str, Any], where: str) -> Recipe:
    """A checked Recipe from nested dicts; `where` names their source in error messages."""
    _reject_unknown(document, Recipe, "", where)
    try:
        return TypeAdapter(Recipe).validate_python(document)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors(include_url=False)]
        raise UserError(f"{where}: " + "\n".join(lines)) from error


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dicts of plain JSON types."""
    return TypeAdapter(Recipe).dump_python(recipe, mode="json")


def changed_settings(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines "key: old -> new" for the settings in which two resolved recipes differ."""
    lines = []
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += changed_settings(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} -> {new}")
    return lines


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as text that is again a runnable recipe (see fm/recipe.py)."""
    body = yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, default_flow_style=None, width=100)
    return f"{FIRST_LINE}\n{body}{LAST_LINE}\n"


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key or key.startswith("-"):
        raise UserError(f"override {override!r}: expected section.key=value, such as train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {error}") from error
    *sections, last = key.split(".")
    node = document
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {section} is not a section")
    node[last] = value


def _keys(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _section_types(cls: Any) -> dict[str, Any]:
    """Key -> dataclass for the keys of a dataclass that are sections (or optional sections)."""
    hints = typing.get_type_hints(cls).items()
    options = {name: typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,) for name, hint in hints}
    return {name: option for name in options for option in options[name] if dataclasses.is_dataclass(option)}


def _reject_unknown(mapping: Any, cls: Any, prefix: str, where: str) -> None:
    if not isinstance(mapping, dict):
        return  # the type check explains it
    sections = _section_types(cls)
    for key, value in mapping.items():
        if key not in _keys(cls):
            near = difflib.get_close_matches(str(key), _keys(cls), n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"valid here: {', '.join(_keys(cls))}"
            raise UserError(f"{where}: unknown key {prefix}{key} (value {value!r}); {hint}")
        if key in sections:
            _reject_unknown(value, sections[key], f"{prefix}{key}.", where)


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{key} is missing"
    value = error["input"]
    shown = f" (got {value!r})" if not isinstance(value, dict) else ""
    near = ""
    if error["type"] == "literal_error" and isinstance(value, str):
        options = [part.strip(" '") for part in error["ctx"]["expected"].replace(" or ", ",").split(",")]
        matches = difflib.get_close_matches(value, options, n=1)
        near = f"; did you mean {matches[0]}?" if matches else ""
    return f"{key}: {message}{shown}{near}".removeprefix(": ")  # checks of the whole recipe have no key
