"""torch.compile of what is trained, as train.compile says: faster steps, for seconds or minutes at each shape's first.

    blocks  each block by itself: one graph for each dataset's shape, which all blocks share, so that depth costs
            nothing to compile. What is around the blocks stays as it is
    step    normalisation, the K model calls and the loss: one graph for each dataset and K
    graphs  as step, and the GPU replays its kernels (CUDA graphs) instead of being told each by the host

`auto` is blocks on a GPU, and eager on a CPU, where compiling takes longer than most runs would save, for baselines and
under ZeRO-3. Every graph is whole and of fixed shapes: what cannot be compiled so is an error, and so is a graph too
many. Names of parameters stay as they are, and the averaged model, which validation uses, is not compiled.

WAVELIT_COMPILE=WAY or WAY:BACKEND in the environment says what `auto` means, and which of torch's backends compiles in
place of inductor. It is for tests (`pytest --compile`).
"""

import os
from typing import Any

import torch
from accelerate import Accelerator

from data_pipeline.errors import UserError
from fm.runtime import asked_for
from fm.settings import Recipe
from fm.surrogate import Surrogate
from fm.unroll import Unroll

VARIABLE = "WAVELIT_COMPILE"
INDUCTOR = "inductor"  # torch's own compiler: Triton on a GPU, C++ on a CPU
# Most graphs for a dataset and K: with and without gradients, in pieces of several sizes, in what measures a run.
GRAPHS = 16


def compile_objective(objective: Unroll, recipe: Recipe, accelerator: Accelerator) -> None:
    """Compile the objective or the blocks of its model in place; what is compiled is so when a shape first comes.

    UserError where the device, the model or the launch configuration does not allow it.
    """
    model, device = objective.model, accelerator.device
    way, backend = _chosen(recipe.train.compile, device)
    if recipe.train.compile == "auto" and (not len(model.blocks) or _gathers_layers(accelerator)):
        way = "eager"
    if way == "eager":
        return
    _check_way(way, model, accelerator)
    if backend == INDUCTOR:
        _check_compiler(device)
    calls = 1 if way == "blocks" else max(recipe.window_length(name) - 1 for name in model.specs)
    allow_graphs(GRAPHS * len(model.specs) * calls)
    options: dict[str, Any] = {"mode": "reduce-overhead"} if way == "graphs" else {}
    for part in model.blocks if way == "blocks" else [objective]:
        part.compile(backend=backend, fullgraph=True, dynamic=False, **options)


def allow_graphs(number: int) -> None:
    """Let this process make so many graphs of one function; torch's own limit is 8, and one more is then an error."""
    config: Any = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # as torch < 2.7 says
    for name in (limit, f"accumulated_{limit}"):
        setattr(config, name, max(number, getattr(config, name)))
    config.optimize_ddp = False  # it would cut graphs at DDP's buckets


def _chosen(setting: str, device: torch.device) -> tuple[str, str]:
    """What train.compile means on this device: eager, blocks, step or graphs; and torch's backend."""
    way, _, backend = os.environ.get(VARIABLE, "").partition(":")
    if setting == "auto":
        setting = way or ("blocks" if device.type == "cuda" else "eager")
    return setting, backend or INDUCTOR


def _gathers_layers(accelerator: Accelerator) -> bool:
    """Whether ZeRO-3 fetches every layer's weights when it is called: no block is one graph then."""
    if not asked_for("DEEPSPEED"):
        return False
    return accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] == 3


def _check_way(way: str, model: Surrogate, accelerator: Accelerator) -> None:
    kind = accelerator.device.type
    if not len(model.blocks):
        raise UserError(
            f"train.compile={way}: baselines are not compiled, since parts of their networks' code (FNO, TFNO) cannot "
            "be; leave train.compile out"
        )
    if _gathers_layers(accelerator):
        raise UserError(
            f"train.compile={way}: ZeRO-3 fetches weights layer by layer, which cannot be compiled; use eager, or "
            "another launch configuration (launch/ddp.yaml, launch/fsdp.yaml, launch/deepspeed_zero2.yaml)"
        )
    if way != "blocks" and (asked_for("FSDP") or asked_for("DEEPSPEED")):
        raise UserError(
            f"train.compile={way}: under FSDP and DeepSpeed only blocks can be compiled; use blocks, or launch/ddp.yaml"
        )
    if way == "graphs" and (kind != "cuda" or accelerator.num_processes > 1):
        where = f"{accelerator.num_processes} process(es) on {kind}"
        raise UserError(f"train.compile=graphs: expected one process on a GPU, got {where}; use blocks, step or eager")


def _check_compiler(device: torch.device) -> None:
    """UserError where torch.compile does not work at all on this machine, with the reason it gives."""
    try:
        torch.compile(lambda x: x + 1, backend=INDUCTOR)(torch.ones(2, device=device))
    except Exception as error:  # whatever it is, of several compilers and a driver
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"train.compile: torch.compile does not work on this machine ({reason}). It needs a C++ compiler: install "
            "g++ (apt install g++, or conda install gxx), name yours in the environment (CXX=...), or do without "
            "(train.compile=eager)"
        ) from error
