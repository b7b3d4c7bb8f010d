"""Processes, devices, precision and signals: what a run stands on."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, str_to_bool

from data_pipeline.errors import UserError

# How long processes wait for each other: all do while the main one validates, from a slow server perhaps. One that dies
# takes the others along at once, whatever stands here.
PATIENCE = timedelta(hours=2)
EXIT_DONE, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 2, 130


def make_accelerator(precision: str) -> Accelerator:
    """The Accelerator of this process; `precision` is auto, float32 or bf16.

    Heads and lifting rows of the datasets that a step does not draw have no gradient, hence find_unused_parameters.
    Raises UserError where something else would run than what the launcher asked for; accelerate does so in silence.
    """
    for variable, asked in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if _asked_for(variable):
            raise UserError(
                f"the launch configuration asks for {asked}, which fm does not train with: a model of this size fits "
                "on one GPU. Use launch/ddp.yaml, or launch/cpu2.yaml on a CPU"
            )
    handlers: list = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    has_gpu = torch.cuda.is_available() and not _asked_for("ACCELERATE_USE_CPU")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        handlers.append(InitProcessGroupKwargs(backend="nccl" if has_gpu else "gloo", timeout=PATIENCE))
    bf16 = precision == "bf16" or (precision == "auto" and has_gpu and torch.cuda.is_bf16_supported())
    connect_on_cpu = processes > 1 and not has_gpu  # unless told so, accelerate connects none of them
    try:
        mixed_precision = "bf16" if bf16 else "no"
        accelerator = Accelerator(cpu=connect_on_cpu, mixed_precision=mixed_precision, kwargs_handlers=handlers)
    except ValueError as error:  # an environment left over from another launcher
        raise UserError(f"WORLD_SIZE says {processes} processes, but they cannot be connected: {error}") from error
    kind = accelerator.distributed_type
    if accelerator.num_processes != processes or (processes > 1 and kind == DistributedType.NO):
        raise UserError(
            f"the launcher started {processes} processes, but accelerate runs {accelerator.num_processes} as "
            f"{kind.value}, so they would not train one model; start them with `accelerate launch --config_file "
            "launch/ddp.yaml`, or launch/cpu2.yaml on a CPU"
        )
    return accelerator


def _asked_for(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable, "false")))


class StopSignal:
    """Set by the first Ctrl-C, SIGTERM or SIGUSR1 (Slurm's warning), so that the loop can finish its step and save.

    A second Ctrl-C or SIGTERM interrupts at once; clusters may send their warning more than once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received and signum != signal.SIGUSR1:
            raise KeyboardInterrupt
        self.received = True

    @contextmanager
    def listen(self) -> Iterator["StopSignal"]:
        """Handle the signals within the block, and restore the handlers after it."""
        previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
