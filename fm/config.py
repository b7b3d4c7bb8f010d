"""Recipes: all settings of a run, one dataclass per section, nested in `Recipe`; reading and writing them.

Each field's comment is its documentation. Types and bounds are checked by pydantic, and what spans several fields in
`__post_init__`. The loader turns every fault into a message with the key's path, the value and the nearest valid name.
"""

from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter
from pydantic.dataclasses import dataclass

from data_pipeline.errors import UserError, brief
from data_pipeline.files import file_name
from data_pipeline.schema import parse_yaml, read_text
from data_pipeline.windows.streaming import StreamSettings
from fm.model.baselines import BaselineConfig
from fm.model.imports import EitherForm, ImportedOptimizer, ImportSettings
from fm.model.network import ImportedConfig
from fm.model.spec import STRICT, ModelConfig, OneOrMore, from_plain, written

# A recipe is YAML that is also a Python program (fm/recipe.py), by these lines around it.
FIRST_LINE = 'launch: 0; from fm.recipe import run; run(__file__); r"""'
LAST_LINE = '# """'
AVAILABLE = "available"  # in data.datasets
Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class RunSettings:
    """Name, place and seed of a run."""

    name: Annotated[str, AfterValidator(file_name)]  # also the default folder: runs/<name>
    dir: str | None = None  # run directory; null means runs/<name>
    seed: int = 0  # initialization, sampling and teacher-forcing coins are functions of it
    stop_at: PositiveInt | None = None  # end the process after this step, with a checkpoint; train.steps stays

    @property
    def directory(self) -> Path:
        """Folder of the run."""
        return Path(self.dir) if self.dir else Path("runs") / self.name


@dataclass(frozen=True, config=STRICT)
class DataSettings:
    """Which shards are read, and how."""

    shards: OneOrMore  # folder or URL (https://, s3://, gs://, hf://) with <dataset>/<split>/manifest.json, or a list
    # official names; null: every dataset in the folder; [available, ...]: those of the others with shards at the start
    datasets: list[str] | None = None
    context: Annotated[int, Field(ge=1, le=64)] = 1  # input frames n of a model step; the paper's models see one
    registry: str | None = None  # folder of your own cards; null means WAVELIT_REGISTRY
    workers: NonNegativeInt = 1  # threads per rank that read batches ahead, at most one from a URL; same batches
    verify: bool = False  # compare each frame read with its checksum
    cache: str | None = None  # folder for what a URL gave; null means $XDG_CACHE_HOME/wavelit, or ~/.cache/wavelit
    cache_gb: Annotated[float, Field(ge=0, lt=1e9)] = 40.0  # limit of that folder; 0 keeps nothing (shuffle: global)
    prefetch: NonNegativeInt = 64  # draws ahead of their use whose data are fetched from a URL, as far as there is room
    trajectories: dict[str, PositiveInt] = field(default_factory=dict)  # used of a train split, as by shard --restrict


@dataclass(frozen=True, config=STRICT)
class SamplingSettings:
    """How a step's dataset and windows are drawn (paper Appendix F, Tables 8 and 10; adaptive: section 4.2)."""

    # adaptive: sqrt at first, then after each validation in proportion to sqrt share x score ** power, where the score
    # is one-step validation VRMSE over persistence's
    scheme: Literal["sqrt", "uniform", "proportional", "temperature", "weights", "adaptive"] = "sqrt"
    # global: processes share every draw; per_rank: windows go to processes by cost, which may be of different datasets
    draw: Literal["global", "per_rank"] = "global"
    temperature: PositiveFloat = 0.2  # tau of softmax(share / tau), for scheme: temperature
    weights: dict[str, float] | None = None  # dataset -> weight, for scheme: weights
    power: Annotated[float, Field(ge=0, le=10)] = 1.0  # how strongly shares follow the scores (adaptive); 0: not at all
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.02  # least share of a dataset, for scheme: adaptive
    # passes over a dataset above which the run warns, null: never; the paper's 1M steps make at most 35
    max_passes: PositiveFloat | None = 40.0
    shuffle: Literal["global", "blocks"] = "global"  # blocks: shards permuted, windows within blocks of shards
    shards_per_block: PositiveInt = 4  # for shuffle: blocks

    def __post_init__(self) -> None:
        if (self.scheme == "weights") != (self.weights is not None):
            raise ValueError("weights: give dataset weights with scheme: weights, and only then")


@dataclass(frozen=True, config=STRICT)
class TrainSettings:
    """Length, batch and optimizer of a run (paper Appendix E: AdamW, warm-up, exponential decay, clip, EMA)."""

    steps: PositiveInt  # optimizer steps of the whole run; schedules see this number
    global_batch: PositiveInt = 4  # windows per step over all processes, whatever their number
    draws: PositiveInt = 1  # mini-batches, each of one dataset, that make up the global batch
    micro_batch: PositiveInt | None = None  # most windows that a process takes through the model at once; null: all
    optimizer: EitherForm[Literal["adamw", "muon"], ImportedOptimizer] = "adamw"  # muon: AdamW but for blocks' matrices
    learning_rate: PositiveFloat = 1e-3  # peak
    muon_learning_rate: PositiveFloat = 0.02  # Muon's peak; same warm-up and schedule as learning_rate
    warmup_steps: NonNegativeInt = 5000  # linear from 0 to the peak
    schedule: Literal["exponential", "cosine"] = "exponential"  # after the warm-up
    decay: Annotated[float, Field(gt=0, le=1)] = 0.99  # exponential: factor every decay_every steps, continuous
    decay_every: PositiveInt = 2000  # optimizer steps
    weight_decay: float = 1e-5  # decoupled
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's
    clip: PositiveFloat = 1.0  # global gradient norm
    jitter: NonNegativeFloat = 0.0  # Gaussian noise on true input frames, in units of each channel's std
    augment: bool = False  # transform each window by a random symmetry that its dataset's card names
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999  # decay of the averaged weights; rises as (1 + step) / (10 + step)
    precision: Literal["auto", "float32", "bf16"] = "auto"  # auto: bf16 autocast on a GPU that has it, else float32
    # losses are read back from a GPU every so many steps, so that it need not wait; null: 10 on a GPU, 1 on a CPU. The
    # run is the same, bit for bit. FSDP, DeepSpeed and guard.spike read after every step
    read_every: PositiveInt | None = None
    # by torch.compile: each block, the whole step, or that with CUDA graphs; auto: blocks on a GPU, eager on a CPU
    compile: Literal["auto", "eager", "blocks", "step", "graphs"] = "auto"

    def __post_init__(self) -> None:
        if self.global_batch % self.draws:
            raise ValueError(
                f"global_batch: expected a multiple of the {self.draws} draws it is made of, got {self.global_batch}"
            )

    @property
    def batch(self) -> int:
        """Windows per draw over all processes."""
        return self.global_batch // self.draws


@dataclass(frozen=True, config=STRICT)
class GuardSettings:
    """What happens to a step whose loss or gradient is not finite, or whose loss is a spike (fm/training/guard.py)."""

    # stop: end the run; skip: leave the step out; rollback: return to the last checkpoint, and leave the step out this
    # time. In each case the weights before the step are kept in <run>/incidents for `fm replay`.
    action: Literal["stop", "skip", "rollback"] = "stop"
    # a loss is a spike if its logarithm is so many median absolute deviations, 10 say, above the median; null: none is
    spike: PositiveFloat | None = None
    history: Annotated[int, Field(ge=4)] = 128  # recent steps of each dataset that give median and deviation
    max_events: NonNegativeInt = 10  # refused steps in a run; one more ends it


@dataclass(frozen=True, config=STRICT)
class LossSettings:
    """Weights of the terms: mse and wavelet_l1 are the paper's (section 3.4), rmse is ours."""

    mse: NonNegativeFloat = 1.0  # mean squared error of the fields
    wavelet_l1: NonNegativeFloat = 1.0  # sum over subbands of the mean absolute coefficient error
    rmse: NonNegativeFloat = 0.0  # mean over channels of the root mean squared error of a field, as the score has it

    def __post_init__(self) -> None:
        if self.mse + self.wavelet_l1 + self.rmse == 0:
            raise ValueError("mse, wavelet_l1 and rmse: expected weights that are not all 0")


@dataclass(frozen=True, config=STRICT)
class FinetuneSettings:
    """Rollout finetuning from a pretrained checkpoint (paper Appendix G)."""

    pretrained: str  # run, checkpoint, exported model or hf://organization/name; its EMA weights and architecture
    adapter_rank: PositiveInt | None = None  # gives a pretrained model without adapters those of model.adapter_rank
    # How a window's K model steps are trained (fm/training/objective.py). scheduled_sampling: an input is the truth
    # with a probability that falls during the run; bptt: only the first input is the truth; causal_bptt: as bptt, but
    # later steps weigh little until earlier ones are right; pushforward: as bptt, but only the last step has a gradient
    objective: Literal["scheduled_sampling", "bptt", "causal_bptt", "pushforward"] = "scheduled_sampling"
    unroll_steps: PositiveInt = 4  # K: model steps per window
    unroll_override: dict[str, PositiveInt] = field(default_factory=dict)  # dataset -> K
    unroll_start: PositiveInt | None = None  # K of the first training step, which then grows; null: K at once
    unroll_growth: Annotated[float, Field(gt=0, le=1)] = 0.5  # share of the run in which K grows
    unroll_random: bool = False  # K of each training step is a random number from 1 to the K above
    forcing: Literal["linear", "cosine", "inverse_sigmoid"] = "linear"  # scheduled_sampling: from start to end
    forcing_start: Probability = 1.0  # scheduled_sampling: probability of feeding the truth at the first training step
    forcing_end: Probability = 0.0  # and at the last
    causal_eps: NonNegativeFloat = 1.0  # causal_bptt: weight of step k is exp(-causal_eps x loss of the steps before)
    checkpoint_activations: bool = False  # keep only the states between model steps: less memory, a third more work
    rehearse: bool = True  # before step 0, take the longest unroll on the largest grid once, to see that it fits
    # One-step regression limit: one-step VRMSE (geometric mean over datasets, valid split) may be at most this factor
    # of the pretrained model's, 1.1 say; null: no limit. The checkpoint with the best rollouts within it is kept in
    # <run>/best (fm/training/guard.py)
    gate: Annotated[float, Field(ge=1)] | None = None
    gate_action: Literal["stop", "keep_best"] = "stop"  # beyond the limit: end the run, or only keep the best

    def ignored(self) -> list[str]:
        """Return the given settings that nothing reads, each with the reason."""
        of_objective = dict.fromkeys(("forcing", "forcing_start", "forcing_end"), "scheduled_sampling")
        of_objective["causal_eps"] = "causal_bptt"
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
        """Return K of a dataset at its full length."""
        return self.unroll_override.get(dataset, self.unroll_steps)


@dataclass(frozen=True, config=STRICT)
class RateSettings:
    """Factors on train.learning_rate for the parts of a model; a part whose factor is 0 stays as it is."""

    embedding: NonNegativeFloat = 1.0  # channel embedding and task vectors
    trunk: NonNegativeFloat = 1.0  # everything between
    head: NonNegativeFloat = 1.0  # heads and adapters

    def __post_init__(self) -> None:
        if not any(getattr(self, one.name) for one in fields(self)):
            raise ValueError("expected one factor above 0 at least, else nothing is trained")


@dataclass(frozen=True, config=STRICT)
class AdaptSettings:
    """How datasets are added to a pretrained model without forgetting the old ones (fm/training/optim.py)."""

    datasets: list[str] = field(default_factory=list)  # the added ones; empty where only rates are given
    # optimizer steps at the beginning in which only the added datasets are drawn, and only their own parts move: heads,
    # adapters, task vectors, embedding rows of channels that no other dataset of the run has
    alone_steps: NonNegativeInt = 0
    # share of all later draws that goes to the added datasets; sampling.scheme divides it among them, and the rest
    # among the others. null: sampling.scheme divides all
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    rates: RateSettings = field(default_factory=RateSettings)

    def __post_init__(self) -> None:
        if not self.datasets and (self.alone_steps or self.share is not None):
            raise ValueError("alone_steps and share are the new datasets', expected their names in datasets")


@dataclass(frozen=True, config=STRICT)
class CheckpointSettings:
    """When checkpoints are written and which are kept."""

    every: PositiveInt = 5000  # optimizer steps; the last step is always saved
    keep: PositiveInt = 3  # newest checkpoints kept
    keep_every: PositiveInt | None = None  # also keep those at multiples of this step
    resume: Literal["auto", "never"] = "auto"  # auto: continue from the newest whole checkpoint
    # after a failed save: end the run, or train on and try again at the next save; a failed last save always ends it
    on_error: Literal["stop", "continue"] = "stop"


@dataclass(frozen=True, config=STRICT)
class ValidationSettings:
    """Scores on the valid split during training, from the EMA weights."""

    every: NonNegativeInt = 5000  # optimizer steps, and the last step of a run that is longer; 0 means never
    windows: PositiveInt = 64  # one-step windows per dataset, evenly spaced over the split
    rollouts: NonNegativeInt = 1  # trajectories per dataset; 0 means none
    rollout_every: PositiveInt = 1  # validations; the last one and every n-th before it have rollouts and pictures
    protocol: str = "wavelit"  # name or YAML file: its windows are the rollout_vrmse tags, and evaluation's default


@dataclass(frozen=True, config=STRICT)
class TrackingSettings:
    """TensorBoard and the console."""

    every: PositiveInt = 10  # optimizer steps between TensorBoard scalars (log.jsonl has every step)
    # on the main process: a panel where stderr is a terminal, else a line every ten seconds or so
    progress: bool = True
    pictures: NonNegativeInt = 40  # most validations of the run that draw pictures, evenly spread, the last included
    # other trackers that get every scalar and the settings, by accelerate's names, such as [wandb]
    log_with: list[str] | None = None
    # optimizer steps between measurements of how the datasets' gradients agree (fm/training/checks.py); 0 means never
    gradient_cosine_every: NonNegativeInt = 0


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """One run, resolved. What is EitherForm of two types may also be {import: mypkg.net:MyNet, args: {...}}."""

    run: RunSettings
    data: DataSettings
    train: TrainSettings
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    model: EitherForm[ModelConfig, ImportedConfig] | None = None  # null: the defaults, or the pretrained architecture
    baseline: BaselineConfig | None = None  # in place of model: another network, for comparison
    loss: EitherForm[LossSettings, ImportSettings] = field(default_factory=LossSettings)
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
        watches = self.validation.every and self.validation.rollouts and self.validation.rollout_every == 1
        if self.finetune and self.finetune.gate is not None and not watches:
            raise ValueError("finetune.gate needs validation.every > 0, validation.rollouts > 0 and rollout_every = 1")

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

    def stream(self) -> StreamSettings:
        """Return how shards behind a URL are read."""
        data, sampling = self.data, self.sampling
        cache = None if data.cache is None else Path(data.cache)
        size = int(data.cache_gb * 1e9)
        return StreamSettings(sampling.shuffle, sampling.shards_per_block, cache, size, data.prefetch)

    def unroll_steps(self, dataset: str) -> int:
        """Return the number of model steps in a training window of a dataset."""
        return self.finetune.unroll_of(dataset) if self.finetune else 1

    def window_length(self, dataset: str) -> int:
        """Return the number of frames in a training window of a dataset: the input frames, a target per model step."""
        return self.data.context + self.unroll_steps(dataset)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply dotted overrides and check everything."""
    document = read_recipe(path)
    for override in overrides:
        apply_override(document, override)
    return resolve(document, str(path))


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the sections of a recipe's file, unchecked. UserError if launching it would run anything but `run`."""
    raw = read_text(path)
    lines = raw.replace(b"\r\n", b"\n").rstrip(b"\n").split(b"\n")
    for which, found, expected in (("first", lines[0], FIRST_LINE), ("last", lines[-1], LAST_LINE)):
        if found != expected.encode():
            raise UserError(f"{path}: expected as its {which} line {expected}, got {brief(found)}. {_CODE}")
    if b'"""' in b"".join(lines[1:-1]):
        raise UserError(f'{path}: expected """ in the first and the last line only. {_CODE}')
    sections: dict[str, Any] = parse_yaml(raw, str(path))  # a mapping, since the first line is a key
    return {key: part for key, part in sections.items() if key != "launch"}


_CODE = "Launched, other lines run as Python: copy both from recipes/quickstart.yaml; launch no stranger's file"


def resolve(document: dict[str, Any], where: str) -> Recipe:
    """Return a checked Recipe of nested dicts. UserError as of `load_recipe`; `where` names the source in messages."""
    try:
        return from_plain(Recipe, document)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as nested dicts of plain JSON types."""
    plain = TypeAdapter(Recipe).dump_python(recipe, mode="json", by_alias=True)
    return {**plain, "model": plain["model"] and written(plain["model"])}


def changed_settings(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Return a line "key: old -> new" for each setting in which two resolved recipes differ."""
    lines = []
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += changed_settings(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} -> {new}")
    return lines


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as text that is again a runnable recipe (see fm/recipe.py)."""
    body = yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, default_flow_style=None, width=100)
    return f"{FIRST_LINE}\n{body}{LAST_LINE}\n"


def apply_override(document: dict[str, Any], override: str) -> None:
    """Set one setting, given as section.key=value, in the nested dicts of a recipe."""
    key, separator, text = override.partition("=")
    where = f"override {brief(override)}"
    if not separator or not key or key.startswith("-"):
        raise UserError(f"{where}: expected section.key=value, such as train.steps=100")
    value = parse_yaml(text.encode(errors="surrogateescape"), where)
    *sections, last = key.split(".")
    node = document
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise UserError(f"{where}: {section} is not a section")
    node[last] = [AVAILABLE, *(node.get(last) or ())] if (key, value) == ("data.datasets", AVAILABLE) else value
