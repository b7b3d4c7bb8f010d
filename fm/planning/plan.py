"""A run's cost before it is launched: work, time and memory, by dataset and for the mixture that the run draws."""

import json
from dataclasses import asdict, dataclass
from typing import Any

USABLE = 0.9  # of the memory: contexts, workspaces and fragments take the rest


@dataclass(frozen=True)
class DatasetPlan:
    """One dataset, and what a step would cost that draws only it; means over a run whose unrolls grow."""

    grid: tuple[int, int]
    windows: int  # training examples
    share: float  # of the draws
    draws: int  # in the whole run
    passes: float  # over its windows, in the whole run
    own_parameters: int  # that no other dataset uses
    tokens: float  # token updates: windows x model calls x tokens of a frame
    flops: float
    read_bytes: float
    activation_bytes: float  # of the most windows and model calls that one process holds at once
    seconds: float  # the exchange of gradients included, where it is reckoned
    extrapolated: bool  # measured on fewer windows or a smaller grid
    validation_calls: int  # model calls of a validation
    forward_flops: float  # of one of them
    exchange_seconds: float  # of `seconds`, what the exchange of gradients adds to the backward pass

    @property
    def computing_seconds(self) -> float:
        return self.seconds - self.exchange_seconds


@dataclass(frozen=True)
class Exchange:
    """The gradients' way through all processes in a step, by the model of fm/planning/exchange.py."""

    bytes: float
    seconds: float  # of which the backward pass hides a part
    link: float  # GB/s assumed within a node
    network: float  # GB/s assumed between nodes


@dataclass(frozen=True)
class Plan:
    """The run. FLOPs, tokens and bytes read are those of all processes together, memory and seconds of one."""

    run: str
    published: bool  # every dataset has its published size
    machine: str  # and how its times were found
    steps: int
    global_batch: int
    processes: int
    parameters: int
    state_bytes: float  # weights, gradients, moments, averages
    input_bytes: float  # windows of the largest piece
    memory_bytes: float  # that the machine has
    utilisation: float | None  # that was assumed; None where times were measured
    exchange: Exchange | None  # None where there is none, or where times were measured
    validations: int
    checkpoint_bytes: float  # of one checkpoint
    checkpoints: int  # kept at the end
    micro_batch: int  # most windows at once on one process
    fitting_micro_batch: int  # most that would fit; 0 where even one does not
    checkpointing_helps: bool  # whether finetune.checkpoint_activations would make it less
    datasets: dict[str, DatasetPlan]
    notes: tuple[str, ...]

    def mean(self, what: str) -> float:
        """A quantity of a step, averaged over datasets at their shares."""
        return sum(one.share * getattr(one, what) for one in self.datasets.values())

    @property
    def training_seconds(self) -> float:
        return self.steps * self.mean("seconds")

    @property
    def validation_seconds(self) -> float:
        """Of one validation, on one process, at the speed of training."""
        parts = self.datasets.values()
        pace = [one.computing_seconds * self.processes / one.flops for one in parts]  # seconds a FLOP
        calls = [one.validation_calls * one.forward_flops for one in parts]
        return sum(seconds * flops for seconds, flops in zip(pace, calls, strict=True))

    @property
    def seconds(self) -> float:
        return self.training_seconds + self.validations * self.validation_seconds

    @property
    def needed_bytes(self) -> float:
        """Memory of the main process: state, windows and activations of the largest piece."""
        return self.state_bytes + self.input_bytes + max(one.activation_bytes for one in self.datasets.values())

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= USABLE * self.memory_bytes

    def to_json(self) -> dict[str, Any]:
        """Everything, with the sums that the tables show."""
        names = ("tokens", "flops", "read_bytes", "seconds")
        derived = {
            "mixture": {name: self.mean(name) for name in names},
            "training_seconds": self.training_seconds,
            "validation_seconds": self.validation_seconds,
            "seconds": self.seconds,
            "needed_bytes": self.needed_bytes,
            "fits": self.fits,
        }
        plain: dict[str, Any] = json.loads(json.dumps({**asdict(self), **derived}))
        return plain
