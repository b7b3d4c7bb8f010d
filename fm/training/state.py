"""What training changes: weights, their average, the optimiser's moments and the step, spread over processes."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from fm.checkpoint import load_checkpoint
from fm.checkpoint_writer import Snapshot, take_snapshot
from fm.parallel.spread import spread
from fm.runtime import autocast_dtype
from fm.settings import Recipe
from fm.surrogate import Surrogate
from fm.training.compiling import compile_objective
from fm.training.ema import EMA
from fm.unroll import Unroll


class TrainingState:
    """The state after `step` optimiser steps.

    It begins with a new model, or as the checkpoint says, whose `facts` it then has. What a checkpoint holds does not
    depend on the processes, so neither does which of them may take it up.
    """

    def __init__(self, recipe: Recipe, model: Surrogate, accelerator: Accelerator, checkpoint: Path | None) -> None:
        average = copy.deepcopy(model).eval().requires_grad_(False)
        self.facts: dict[str, Any] | None = None
        moments: Mapping[str, Tensor] = {}
        if checkpoint is not None:
            self.facts, moments = load_checkpoint(checkpoint, model, average)
        self.step = int(self.facts["step"]) if self.facts else 0
        device = accelerator.device
        autocast = autocast_dtype(recipe.train.precision, device)
        objective = Unroll(model.to(device), recipe.loss, recipe.finetune, autocast)
        compile_objective(objective, recipe, accelerator)
        self.parallel = spread(accelerator, objective, recipe.train, recipe.adapt)
        average.to(device)
        shards = {name: self.parallel.shard(name, whole) for name, whole in average.named_parameters()}
        self.ema = EMA(shards, recipe.train.ema)
        self.parallel.load_moments(moments)
        self._average = average if accelerator.is_main_process else None  # whole, for validation

    def averaged_model(self) -> Surrogate | None:
        """The model with averaged weights on the main process, None on others. Collective."""
        whole = self.parallel.gather(self.ema.average)
        if self._average is not None:
            self._average.load_state_dict(whole)
        return self._average

    def snapshot(self, facts: Mapping[str, Any]) -> Snapshot | None:
        """A copy for a checkpoint on the main process, None on others. Collective."""
        weights = self.parallel.gather(self.parallel.shards())
        average = self.parallel.gather(self.ema.average)
        moments = self.parallel.moments()
        if self._average is None:
            return None
        return take_snapshot(self.step, self._average.description(), weights, average, moments, facts)
