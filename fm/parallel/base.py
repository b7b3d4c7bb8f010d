"""What the trainer asks of the processes that train one model together, however they share it."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fm.optim import GroupedAdamW
from fm.unroll import Unroll

MOMENTS = ("exp_avg", "exp_avg_sq")


class Parallel(ABC):
    """An objective, its optimiser, and what each process holds of them.

    Parameters go by their names in the model, and their whole tensors do not depend on the number of processes: that
    is what checkpoints hold. Methods marked collective are called by all processes together.
    """

    name: str  # for people
    holds_whole_model = True  # False where a forward pass needs the other processes
    can_halt = False  # whether `move` takes a verdict that nobody has read

    def __init__(self, objective: Unroll, optimizer: GroupedAdamW) -> None:
        self.model, self.optimizer = objective.model, optimizer
        self.objective: torch.nn.Module = objective  # its forward is what is trained

    @abstractmethod
    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a piece: processes exchange gradients at a step's last piece."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to that of the pieces before."""
        loss.backward()

    def _drop_resting_gradients(self) -> None:
        """So that they count neither in the norm nor in the step."""
        for group in self.optimizer.param_groups:
            if group["rests"]:
                for parameter in group["params"]:
                    parameter.grad = None

    @abstractmethod
    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients of what does not rest to a norm of at most `max_norm`; returns the norm before, a scalar.

        Collective.
        """

    def let_rest(self, datasets: Collection[str], alone: bool = False) -> None:
        """Before a step's gradient: what stays as it is in it, see `GroupedAdamW.let_rest`."""
        self.optimizer.let_rest(datasets, alone)

    def move(self, halted: Tensor | None = None) -> None:
        """An optimiser step, unless `halted`, one number on the device, is 1. Collective."""
        self.optimizer.step_unless(halted)

    def forget(self) -> None:
        """Drop the gradients. Collective."""
        self.optimizer.zero_grad(set_to_none=True)

    @abstractmethod
    def shards(self) -> dict[str, Tensor]:
        """What this process holds of each parameter; averaged weights follow these."""

    @abstractmethod
    def shard(self, name: str, whole: Tensor) -> Tensor:
        """A copy of what this process would hold of the named parameter if its value were `whole`."""

    @abstractmethod
    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of parameters, or of what follows them, on the main process; {} on others. Collective."""

    @abstractmethod
    def moments(self) -> dict[str, Tensor]:
        """Optimiser state as "<parameter>/<moment>", whole, on the main process; {} on others. Collective.

        A parameter that no step has moved has none.
        """

    @abstractmethod
    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Take up what `moments` gave, on all processes. Collective."""
