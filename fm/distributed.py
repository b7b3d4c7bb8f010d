"""Processes and their connections, precision, memory and signals of a run."""

import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, broadcast_object_list, str_to_bool

from data_pipeline.errors import UserError

T = TypeVar("T")

# How long processes wait for each other. All wait while the main one validates, from a slow server perhaps. When a
# process dies the launcher ends the others at once, whatever stands here.
TIMEOUT = timedelta(hours=2)
ZERO_BUCKET = 50_000_000  # numbers that ZeRO exchanges at once; DeepSpeed alone takes ten times as many, 2 GB
# Settings of accelerate, from its configuration files or the environment: those that fm ignores, and what decides
# instead; and those that would train another model than the recipe's.
IGNORED = {
    "mixed_precision": "train.precision",
    "dynamo_backend": "train.compile",
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_clipping": "train.clip",
}
REFUSED = ("use_megatron_lm", "use_parallelism_config", "use_sagemaker")
EXIT_DONE, EXIT_LOST, EXIT_INTERRUPTED = 0, 3, 130


class ProcessLost(Exception):
    """Another process of the run has ended, or cannot be reached."""


class Interrupted(Exception):
    """A signal asked for a stop, and what was under way has ended."""


@contextmanager
def detect_lost_processes() -> Iterator[None]:
    """Raise ProcessLost where an error of torch's transport means that another process does not answer."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            reason = str(error).strip().partition("\n")[0]
            raise ProcessLost(f"another process of this run has ended or cannot be reached ({reason})") from error
        raise


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `fm` with these arguments in connected processes of this machine, and return its exit code.

    This is torchrun without the traceback and the log lines that follow the message of a process that failed.
    """
    from torch.distributed import run as torchrun  # here, since it takes time that only launchers need
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if processes < 1:
        raise UserError(f"--processes: expected a number above 0, got {processes}")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    command = ["--nproc_per_node", str(processes), "-m", "fm", *arguments]
    try:
        torchrun.run(torchrun.get_args_parser().parse_args(command))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 1  # of a killed process it is the signal's number, negative
    except SignalException:
        return EXIT_INTERRUPTED
    return EXIT_DONE


def explain_launcher_traceback(code: int) -> int:
    """Return an exit code; if it is a failure under `accelerate launch`, first print whose traceback is beside it.

    accelerate raises CalledProcessError or ChildFailedError for any exit code but 0, unless it was given --quiet, which
    the processes that it starts cannot see.
    """
    if code and "ACCELERATE_DYNAMO_BACKEND" in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
        note = "A traceback above or below this line is accelerate's and only repeats the exit code"
        remedy = "`accelerate launch --quiet`, `fm train RECIPE` and `fm evaluate RUN` print none"
        if sys.stderr is not None:
            with suppress(OSError):
                print(f"{note}: {remedy}.", file=sys.stderr, flush=True)
    return code


def make_accelerator(clip: float) -> Accelerator:
    """Return the Accelerator of this process: its device, and its connection with the others.

    It does not cast: fm does (see `precision`). DeepSpeed clips gradients by itself, to the norm `clip`. UserError
    where accelerate would silently run something else than the launch configuration asks for.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # threads wait for each other: beside other programs, two are far slower than one
    settings = accelerate_settings()
    if refused := [name for name in REFUSED if name in settings]:
        raise UserError(
            f"accelerate's configuration asks for {', '.join(refused)}, which fm does not do; leave it out "
            "(`accelerate env` prints the configuration), or launch with a file of launch/ (--config_file)"
        )
    # Heads and embedding rows of the datasets that a step does not draw have no gradient, hence find_unused_parameters.
    # Gradients that are views of DDP's buckets need no copy back.
    handlers: list = [DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True)]
    has_gpu = torch.cuda.is_available() and not _is_set("ACCELERATE_USE_CPU")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    zero = is_launched_with("DEEPSPEED")
    if processes > 1 or zero:
        backend = "nccl" if has_gpu else "gloo"
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=TIMEOUT))
        _connect_restarted(backend)
    connect_on_cpu = processes > 1 and not has_gpu and not zero  # without cpu=True accelerate connects none of them
    fsdp = os.environ.pop("ACCELERATE_USE_FSDP", None)  # fm/training/sharded.py shards, not accelerate
    try:
        accelerator = Accelerator(
            cpu=connect_on_cpu,
            mixed_precision="no",
            dynamo_backend="no",
            kwargs_handlers=handlers,
            deepspeed_plugin=_deepspeed_plugin(clip) if zero else None,
        )
    except ValueError as error:  # an environment left over from another launcher
        raise UserError(f"{processes} process(es), as WORLD_SIZE says, cannot be connected: {error}") from error
    finally:
        if fsdp is not None:
            os.environ["ACCELERATE_USE_FSDP"] = fsdp
    kind = accelerator.distributed_type
    if accelerator.num_processes != processes or (processes > 1 and kind == DistributedType.NO):
        raise UserError(
            f"the launcher started {processes} processes, but accelerate runs {accelerator.num_processes} as "
            f"{kind.value}, so they would not train one model; start them with `accelerate launch --config_file "
            "launch/ddp.yaml`, or launch/cpu2.yaml on a CPU"
        )
    if zero and kind != DistributedType.DEEPSPEED:
        raise UserError(
            f"the launch configuration asks for DeepSpeed, but accelerate runs {kind.value}, as it does with use_cpu "
            "or ACCELERATE_USE_CPU; leave that out, DeepSpeed finds out by itself that there is no GPU"
        )
    for name in [name for name in IGNORED if name in settings]:
        accelerator.print(f"accelerate's {name}: {settings[name]} is ignored, {IGNORED[name]} of the recipe decides")
    return accelerator


def accelerate_settings() -> dict[str, str]:
    """Return accelerate's settings that are not its defaults, by name, whoever set them."""
    prefix, defaults = "ACCELERATE_", {"", "no", "none", "false", "default"}
    found = {
        name.removeprefix(prefix).lower(): os.environ[name] for name in sorted(os.environ) if name.startswith(prefix)
    }
    return {
        name: value
        for name, value in found.items()
        if value.lower() not in defaults and (name, value) != ("gradient_accumulation_steps", "1")
    }


def broadcast_from_main(accelerator: Accelerator, look: Callable[[], T]) -> T:
    """Return on every process what `look` returns on the main one. Collective.

    Processes on several machines may see a shared folder at different moments, so only the main one looks.
    """
    found = [look() if accelerator.is_main_process else None]
    return broadcast_object_list(found)[0]


def run_on_main(
    accelerator: Accelerator, stop: "StopSignal", work: Callable[[Callable[[int], object]], T] | None
) -> T | None:
    """Return what `work` returns on the main process; on the others, where `work` is None, wait for it. Collective.

    `work` gets a function, which it calls after each batch with the batch's size. Raises Interrupted on all processes
    after the batch in which one of them was asked to stop.
    """

    def ended(done: bool) -> bool:
        own = torch.tensor([[stop.received, done]], dtype=torch.uint8, device=accelerator.device)
        stopping, finished = accelerator.gather(own).amax(dim=0).tolist()
        if stopping and not finished:
            raise Interrupted
        return bool(finished)

    if work is not None:
        result = work(lambda size: ended(done=False))
        ended(done=True)
        return result
    while not ended(done=False):
        pass
    return None


def is_launched_with(kind: str) -> bool:
    """Return whether the launch configuration is for FSDP or DEEPSPEED."""
    return _is_set(f"ACCELERATE_USE_{kind}")


def fsdp_reshards() -> bool:
    """Return fsdp_reshard_after_forward of the launch configuration. UserError for settings that fm ignores."""
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"fsdp_config: expected fsdp_version: 2, as in launch/fsdp.yaml, got {version}")
    for key in ("offload_params", "activation_checkpointing"):
        if _is_set(f"FSDP_{key.upper()}"):
            raise UserError(f"fsdp_config asks for fsdp_{key}, which fm does not do; leave it out")
    return _is_set("FSDP_RESHARD_AFTER_FORWARD", "true")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype that matrix products are cast to, or None for float32; `precision` is train.precision."""
    auto = precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if precision == "bf16" or auto else None


@contextmanager
def precision(autocast: torch.dtype | None = None, exact: bool = False) -> Iterator[None]:
    """Set how a GPU computes what stays float32 within the block, and put the settings back after it.

    A step whose products are cast to bf16 (`autocast`) may round the factors of float32 products, which are attention's
    with keys and queries, the embedding's and the heads', to TF32's 10 bits: bf16 has 7. With `exact` neither products
    nor convolutions are rounded, for evaluation. Otherwise torch's settings stay. Autocast itself is entered by the
    objective (fm/training/objective.py), since DeepSpeed ends an autocast around its engine, and since torch.compile
    traces it there.
    """
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    if exact:
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    elif autocast == torch.bfloat16:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def peak_memory_bytes() -> float:
    """Return the peak of the GPU's allocator, or of this process on a CPU."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _connect_restarted(backend: str) -> None:
    """Connect processes that the launcher has started again (--max_restarts); otherwise leave that to accelerate.

    The launcher gives every attempt the same store (torch since 2.5), which still holds the dead addresses of the
    attempt before, so each attempt uses its own prefix. Launchers on several machines may count attempts differently:
    UserError where they share a store and may restart.
    """
    if not _is_set("TORCHELASTIC_USE_AGENT_STORE") or torch.distributed.is_initialized():
        return
    if os.environ["GROUP_WORLD_SIZE"] != "1" and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        raise UserError(
            "several machines with --max_restarts would hang when they restart; launch on each of them with "
            "--rdzv_backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment, as launch/multinode.yaml "
            "says"
        )
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if attempt != "0":
        store, rank, processes = next(torch.distributed.rendezvous("env://", timeout=TIMEOUT))
        own = torch.distributed.PrefixStore(f"attempt_{attempt}", store)
        torch.distributed.init_process_group(backend, store=own, rank=rank, world_size=processes, timeout=TIMEOUT)


def _deepspeed_plugin(clip: float) -> DeepSpeedPlugin:
    """Return the launch configuration's ZeRO settings. UserError where it sets what the recipe does."""
    try:
        plugin = DeepSpeedPlugin()
    except ImportError as error:
        raise UserError(f"DeepSpeed is not installed ({error}): run ./launch/setup deepspeed") from error
    config = plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2, 3):
        raise UserError(
            f"DeepSpeed: expected ZeRO stage 1, 2 or 3, got {zero.get('stage')}; stage 0 is launch/ddp.yaml"
        )
    offloaded = [key for key in zero if key.startswith("offload") and zero[key].get("device", "none") != "none"]
    own = [key for key in ("optimizer", "scheduler") if key in config]
    cast = [key for key in ("fp16", "bf16") if config.get(key, {}).get("enabled") is True]
    if offloaded or own or cast:
        raise UserError(
            f"the DeepSpeed configuration asks for {', '.join(offloaded + own + cast)}: optimizer, learning rate and "
            "precision are the recipe's (train.*), and offload is not done; leave these out"
        )
    config |= {
        "train_micro_batch_size_per_gpu": 1,  # the loss is a mean over all windows already
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
    }
    zero.setdefault("reduce_bucket_size", ZERO_BUCKET)
    _skip_shared_memory_operations()
    return plugin


def _skip_shared_memory_operations() -> None:
    """Keep DeepSpeed from building its shared-memory collectives, which it does at the first launch on a CPU.

    The build takes a C++ compiler and more than a minute. Only `inference_all_reduce` uses them, which no training step
    calls; gloo does the rest.
    """
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _is_set(variable: str, default: str = "false") -> bool:
    return bool(str_to_bool(os.environ.get(variable, default)))


class StopSignal:
    """Set by the first Ctrl-C, SIGTERM or SIGUSR1 (Slurm's warning), so that the loop can finish its step and save.

    A second Ctrl-C or SIGTERM interrupts at once. A launcher repeats a signal that the terminal has sent to all
    processes already, so a signal within a second is the same one. Clusters may send their warning more than once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    SAME_SECONDS = 1.0

    def __init__(self) -> None:
        self.received = False
        self._first = 0.0

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._first = True, time.monotonic()
        elif signum != signal.SIGUSR1 and time.monotonic() - self._first > self.SAME_SECONDS:
            raise KeyboardInterrupt

    @contextmanager
    def listen(self, at_once: bool = False) -> Iterator["StopSignal"]:
        """Handle the signals within the block, and restore the handlers after it.

        With `at_once`, each raises KeyboardInterrupt, for work that can be interrupted anywhere.
        """
        handler: Callable[[int, FrameType | None], Any] = signal.default_int_handler if at_once else self._handle
        previous = {number: signal.signal(number, handler) for number in self.SIGNALS}
        try:
            yield self
        finally:
            for number, before in previous.items():
                signal.signal(number, before)
