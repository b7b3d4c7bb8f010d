"""Processes, devices, precision and signals: what a run stands on."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import str_to_bool

# How long processes wait for each other: all do while the main one validates, from a slow server perhaps. One that dies
# takes the others along at once, whatever stands here.
PATIENCE = timedelta(hours=2)
EXIT_DONE, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 2, 130


def make_accelerator(precision: str) -> Accelerator:
    """The Accelerator of this process; `precision` is auto, float32 or bf16.

    Heads and lifting rows of the datasets that a step does not draw have no gradient, hence find_unused_parameters.
    """
    handlers: list = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    has_gpu = torch.cuda.is_available() and not str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        handlers.append(InitProcessGroupKwargs(backend="nccl" if has_gpu else "gloo", timeout=PATIENCE))
    bf16 = precision == "bf16" or (precision == "auto" and has_gpu and torch.cuda.is_bf16_supported())
    return Accelerator(mixed_precision="bf16" if bf16 else "no", kwargs_handlers=handlers)


class StopSignal:
    """Set by the first Ctrl-C or SIGTERM, so that the loop can finish its step and save; the second one interrupts."""

    def __init__(self) -> None:
        self.received = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    @contextmanager
    def listen(self) -> Iterator["StopSignal"]:
        """Handle SIGINT and SIGTERM within the block, and restore the handlers after it."""
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
