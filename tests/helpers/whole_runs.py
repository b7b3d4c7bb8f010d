"""Small runs on real shards: their recipe, their process and launcher, what they leave."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from forked import Forked
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from data_pipeline.schema import sealed, unsealed
from data_pipeline.shards.format import Manifest
from fm.checkpoint import list_checkpoints, verify_checkpoint
from fm.cli import main
from fm.config import Recipe, dump_recipe, resolve
from fm.model.surrogate import Surrogate

ROOT = Path(__file__).parents[2]
DATASETS = ["acoustic_scattering_maze", "helmholtz_staircase"]


def small(shards: Path, directory: Path, **sections: dict[str, Any]) -> Recipe:
    """A run of seconds that draws no pictures; keyword sections are merged into it."""
    document: dict[str, Any] = {
        "run": {"name": "small", "dir": str(directory)},
        "data": {"shards": str(shards), "datasets": DATASETS},
        "model": {"width": 16, "depth": 1, "heads": 2, "wavelet": "haar"},
        "train": {
            "steps": 8,
            "global_batch": 4,
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "decay": 0.5,
            "decay_every": 100,
        },
        "checkpoint": {"every": 3},
        "validation": {"every": 0, "protocol": "thirds"},
        "tracking": {"every": 2, "progress": False, "pictures": 0},  # a picture takes as long as the steps
    }
    for name, section in sections.items():
        document[name] = {**(document.get(name) or {}), **section}
    if "finetune" in sections:
        document["model"] = None
    return resolve(document, "the test")


def spoil(shards: Path, target: Path, change: Callable[[np.ndarray], object]) -> Path:
    """A copy of the shards in which `change` edits two frames (2, C, H, W), of one training trajectory, in place."""
    shutil.copytree(shards, target)
    folder = target / DATASETS[0] / "train"
    manifest = Manifest.load(folder / "manifest.json")
    one = manifest.trajectories[0]
    shape = (2, len(manifest.state_channels), *manifest.grid)
    change(np.memmap(folder / manifest.shards[one.shard].name, np.float32, "r+", offset=one.offsets[0], shape=shape))
    return target


def log(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """As on a full disk, a file cannot grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def rewrite_state(file: Path, **changes: Any) -> None:
    """Change values of a checkpoint's state.json, and make its digest that of the changed ones."""
    state = unsealed(json.loads(file.read_text()), str(file))
    file.write_text(json.dumps(sealed({**state, **changes})))


def accelerate(config: str, *options: str) -> list[str]:
    """The launcher for `start`: two processes on this machine under a configuration of launch/."""
    # what `accelerate launch` calls, without the imports of accelerate's other commands: transformers among them
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    return [*launcher, "--config_file", str(ROOT / "launch" / f"{config}.yaml"), "--main_process_port", "0", *options]


def written(recipe: Recipe) -> Path:
    """The recipe's file, beside its run."""
    file = recipe.run.directory.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_recipe(recipe))
    return file


def fork(recipe: Recipe) -> Forked:
    """Run the recipe in its own process, which has torch already."""
    return Forked(written(recipe))


def start(recipe: Recipe, *launcher: str, **options: Any) -> subprocess.Popen[str]:
    """Run the recipe as a user does."""
    file = written(recipe)
    command = [*(launcher or (sys.executable,)), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def finish(process: subprocess.Popen[str] | Forked) -> tuple[int, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out + err


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)  # long enough to leave the core to the process, short enough to meet it in a save


class SignalInEvaluation:
    """Sends this process a signal, once, while a model in evaluation mode makes its `call`-th prediction."""

    def __init__(self, number: signal.Signals, call: int) -> None:
        self.number, self.call, self.count = number, call, 0  # `count`: predictions that were begun
        self._hook = register_module_forward_pre_hook(self._count)

    def __enter__(self) -> "SignalInEvaluation":
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _count(self, module: nn.Module, inputs: Any) -> None:
        if isinstance(module, Surrogate) and not module.training:
            self.count += 1
            if self.count == self.call:
                os.kill(os.getpid(), self.number)


def saved_steps(root: Path) -> list[int]:
    """Steps of the checkpoints, oldest first; each is whole."""
    for path in list_checkpoints(root).values():
        verify_checkpoint(path)
    return sorted(list_checkpoints(root))


def last_weights(directory: Path) -> dict[str, bytes]:
    newest = max((directory / "checkpoints").glob("step_*"))
    return {
        name: (newest / name).read_bytes() for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
    }


def fm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The fm command, in this process, since a process of its own takes seconds to import torch."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:  # of argparse
            code = int(end.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
