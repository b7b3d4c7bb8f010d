"""What training changes (weights, their average, the optimizer's moments, the step), and torch.compile of it."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.windows.reader import Batch
from fm.checkpoint import Snapshot, load_checkpoint, take_snapshot
from fm.config import AdaptSettings, Recipe, TrainSettings, recipe_to_dict
from fm.distributed import autocast_dtype, fsdp_reshards, is_launched_with
from fm.model.surrogate import Surrogate
from fm.training.augment import make_augmentation
from fm.training.imported_optimizer import make_optimizer
from fm.training.objective import Unroll
from fm.training.optim import EMA, GroupedAdamW
from fm.training.parallel import Parallel, Replicated, Zero

VARIABLE = "WAVELIT_COMPILE"
INDUCTOR = "inductor"  # torch's own compiler: Triton on a GPU, C++ on a CPU
# Most graphs per dataset and K: with and without gradients, in micro-batches of several sizes, and in dry runs.
GRAPHS = 16


class TrainingState:
    """The state after `step` optimizer steps, spread over the processes.

    It starts from a new model, or from a checkpoint, whose state.json is then in `facts`. A checkpoint does not depend
    on the number of processes, so any number of processes can continue it.
    """

    def __init__(self, recipe: Recipe, model: Surrogate, accelerator: Accelerator, checkpoint: Path | None) -> None:
        average = copy.deepcopy(model).eval().requires_grad_(False)
        self.facts: dict[str, Any] | None = None
        moments: Mapping[str, Tensor] = {}
        if checkpoint is not None:
            self.facts, moments = load_checkpoint(checkpoint, model, average)
            trained = self.facts["recipe"].get("train") or {}
            _check_optimizer(_optimizer_name(trained.get("optimizer", "adamw")), recipe, checkpoint)
        self.step = int(self.facts["step"]) if self.facts else 0
        device = accelerator.device
        self.augmentation = make_augmentation(recipe, model.specs, device)
        autocast = autocast_dtype(recipe.train.precision, device)
        objective = Unroll(model.to(device), recipe.loss, recipe.finetune, autocast)
        compile_objective(objective, recipe, accelerator)
        self.parallel = spread(accelerator, objective, recipe.train, recipe.adapt)
        average.to(device)
        shards = {name: self.parallel.shard(name, whole) for name, whole in average.named_parameters()}
        self.ema = EMA(shards, recipe.train.ema)
        self.parallel.load_moments(moments)
        self._average = average if accelerator.is_main_process else None  # the whole model, for validation

    @property
    def symmetries(self) -> dict[str, list[str]]:
        """Return the symmetries that transform the windows, by dataset; {} without train.augment."""
        return {} if self.augmentation is None else {k: list(v) for k, v in self.augmentation.symmetries.items()}

    def augmented(self, batch: Batch, places: np.ndarray) -> Batch:
        """Return the batch with each window transformed, with train.augment; `places` (B,) in the draw choose how."""
        return batch if self.augmentation is None else self.augmentation.apply(batch, places)

    def averaged_model(self) -> Surrogate | None:
        """Return the model with averaged weights on the main process, None on the others. Collective."""
        whole = self.parallel.gather(self.ema.average)
        if self._average is not None:
            self._average.load_state_dict(whole)
        return self._average

    def snapshot(self, facts: Mapping[str, Any]) -> Snapshot | None:
        """Return a copy for a checkpoint on the main process, None on the others. Collective."""
        weights = self.parallel.gather(self.parallel.shards())
        average = self.parallel.gather(self.ema.average)
        moments = self.parallel.moments()
        if self._average is None:
            return None
        return take_snapshot(self.step, self._average.description(), weights, average, moments, facts)


def _check_optimizer(before: str, recipe: Recipe, checkpoint: Path) -> None:
    """Raise UserError if the checkpoint holds the moments of another optimizer, `before`."""
    name = _optimizer_name(recipe_to_dict(recipe)["train"]["optimizer"])
    if before != name:
        raise UserError(
            f"train.optimizer: {name}, but {checkpoint} holds the moments of {before}. Resume with "
            f"train.optimizer={before}, start afresh in another folder with run.dir=..., or finetune from it "
            "(finetune.pretrained)."
        )


def _optimizer_name(setting: str | Mapping[str, Any]) -> str:
    return setting if isinstance(setting, str) else f"{{import: {setting['import']}}}"


def spread(
    accelerator: Accelerator, objective: Unroll, settings: TrainSettings, adapt: AdaptSettings | None = None
) -> Parallel:
    """Spread the objective, which is on its device, and a new optimizer over the processes. Collective."""
    if not len(objective.model.blocks) and (is_launched_with("FSDP") or is_launched_with("DEEPSPEED")):
        raise UserError(
            "baselines train in one process or under DDP (launch/ddp.yaml, launch/cpu2.yaml), as imported networks do: "
            "they cannot be sharded; the launch configuration asks for FSDP or DeepSpeed"
        )
    shards_parameters = is_launched_with("FSDP") and accelerator.num_processes > 1
    if settings.optimizer != "adamw" and (shards_parameters or is_launched_with("DEEPSPEED")):
        key = "=muon: Muon" if settings.optimizer == "muon" else ".import: an imported optimizer"
        raise UserError(
            f"train.optimizer{key} needs whole matrices, and FSDP and DeepSpeed divide the parameters among the "
            "processes; use launch/ddp.yaml, or train.optimizer=adamw"
        )
    if is_launched_with("FSDP"):
        reshard = fsdp_reshards()
        if shards_parameters:
            from fm.training.sharded import FullySharded  # here, since it takes a second to import

            return FullySharded(accelerator, objective, settings, adapt, reshard)
        accelerator.print("FSDP has nothing to spread over one process; it trains as without.")
    optimizer = make_optimizer(objective.model, settings, adapt)
    if is_launched_with("DEEPSPEED"):
        assert isinstance(optimizer, GroupedAdamW)
        return Zero(accelerator, objective, optimizer)
    return Replicated(accelerator, objective, optimizer)


def compile_objective(objective: Unroll, recipe: Recipe, accelerator: Accelerator) -> None:
    """Compile the objective, or the blocks of its model, in place. Raises UserError where that is not possible.

    train.compile makes these faster, at the price of seconds or minutes when a shape first comes:

        blocks  each block by itself: one graph for each dataset's shape. All blocks share it, so depth costs nothing
        step    normalization, the K model calls and the loss: one graph for each dataset and K
        graphs  as step, and the GPU replays its kernels as CUDA graphs, so the host need not launch each kernel

    `auto` is blocks on a GPU. It is eager on a CPU, where compiling takes longer than most runs would save, for
    baselines and under ZeRO-3. Graphs are whole (fullgraph) and have fixed shapes. Parameters keep their names, and the
    averaged model, which validation uses, is not compiled. Under `auto`, what cannot be compiled runs eagerly, and one
    message gives the reason; a way that the recipe names is an error there.

    For tests (`pytest --compile`), VARIABLE=WAY or WAY:BACKEND in the environment sets what `auto` means, and which
    backend of torch compiles in place of inductor.
    """
    model, device = objective.model, accelerator.device
    way, _, backend = os.environ.get(VARIABLE, "").partition(":")
    setting, backend = recipe.train.compile, backend or INDUCTOR
    if setting == "auto":
        way = way or ("blocks" if device.type == "cuda" else "eager")
        if not len(model.blocks) or _is_zero3(accelerator):
            way = "eager"
    else:
        way = setting
    if way == "eager":
        return
    _check_way(way, model, accelerator)
    if backend == INDUCTOR:
        try:
            _check_compiler(device)
        except UserError as error:
            if setting != "auto":
                raise
            accelerator.print(f"training is not compiled: {error}")
            return
    calls = 1 if way == "blocks" else max(recipe.unroll_steps(name) for name in model.specs)
    allow_graphs(GRAPHS * len(model.specs) * calls)
    options: dict[str, Any] = {"mode": "reduce-overhead"} if way == "graphs" else {}
    parts: list[nn.Module] = [*model.blocks] if way == "blocks" else [objective]
    for part in parts:
        part.compile(backend=backend, fullgraph=True, dynamic=False, **options)
    if setting == "auto":
        _fall_back_to_eager(parts, accelerator.print)


def _fall_back_to_eager(parts: Sequence[nn.Module], log: Callable[[str], object]) -> None:
    """Make compiled modules run eagerly from the first call on whose graph cannot be compiled."""

    def call(part: nn.Module, compiled: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        try:
            return compiled(*inputs, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            if part._compiled_call_impl is not None:
                cause = getattr(error, "inner_exception", error)
                reason = str(cause).strip().partition("\n")[0]
                log(
                    f"training goes on uncompiled, which is slower: torch.compile failed ({type(cause).__name__}: "
                    f"{reason}). train.compile=eager leaves it out, train.compile=blocks makes it an error"
                )
            for one in parts:
                one._compiled_call_impl = None
            return part(*inputs, **options)

    for part in parts:
        compiled = part._compiled_call_impl
        assert compiled is not None
        part._compiled_call_impl = partial(call, part, compiled)


def allow_graphs(number: int) -> None:
    """Let this process make `number` graphs of one function (torch's limit is 8); one graph more is an error."""
    config: Any = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name in torch < 2.7
    for name in (limit, f"accumulated_{limit}"):
        setattr(config, name, max(number, getattr(config, name)))
    config.optimize_ddp = False  # it would split graphs at DDP's buckets
    functorch: Any = torch._functorch.config
    if hasattr(
        functorch, "force_non_lazy_backward_lowering"
    ):  # torch >= 2.9: a backward graph fails in the forward pass
        functorch.force_non_lazy_backward_lowering = True


def _is_zero3(accelerator: Accelerator) -> bool:
    """Return whether DeepSpeed fetches each layer's weights when the layer is called: no block is one graph then."""
    if not is_launched_with("DEEPSPEED"):
        return False
    return accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] == 3


def _check_way(way: str, model: Surrogate, accelerator: Accelerator) -> None:
    kind = accelerator.device.type
    if not len(model.blocks):
        raise UserError(
            f"train.compile={way}: baselines are not compiled, nor are imported networks, since parts of their code "
            "(FNO, TFNO) cannot be; leave train.compile out"
        )
    if _is_zero3(accelerator):
        raise UserError(
            f"train.compile={way}: ZeRO-3 fetches weights layer by layer, which cannot be compiled; use eager, or "
            "another launch configuration (launch/ddp.yaml, launch/fsdp.yaml, launch/deepspeed_zero2.yaml)"
        )
    if way != "blocks" and (is_launched_with("FSDP") or is_launched_with("DEEPSPEED")):
        raise UserError(
            f"train.compile={way}: under FSDP and DeepSpeed only blocks can be compiled; use blocks, or launch/ddp.yaml"
        )
    if way == "graphs" and (kind != "cuda" or accelerator.num_processes > 1):
        where = f"{accelerator.num_processes} process(es) on {kind}"
        raise UserError(f"train.compile=graphs: expected one process on a GPU, got {where}; use blocks, step or eager")


def _check_compiler(device: torch.device) -> None:
    """Raise UserError, with torch's reason, if torch.compile does not work on this machine."""
    try:
        torch.compile(lambda x: x + 1, backend=INDUCTOR)(torch.ones(2, device=device))
    except Exception as error:  # each compiler and driver has exceptions of its own
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"train.compile: torch.compile does not work on this machine ({reason}). It needs a C++ compiler: install "
            "g++ (apt install g++, or conda install gxx), name yours in the environment (CXX=...), or do without "
            "(train.compile=eager)"
        ) from error
