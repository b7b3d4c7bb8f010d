"""The logs of a run directory: run.json, log.jsonl and events.jsonl.

run.json describes the process that trains, or trained last: host, pid, its start, world size, versions.

log.jsonl has a line {"step", "dataset", "windows", "loss", "lr"} for each optimizer step. Nothing in it depends on the
time or the machine, so undisturbed, killed and continued runs write the same lines. loss is null if it is not finite;
windows is a digest of the window ids. A run that continues first removes the lines written after its checkpoint.
"""

import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch

from data_pipeline.files import atomic_file, inside, load_json, read_json
from data_pipeline.schema import Strict, at_least, checked, sealed, unsealed, validate
from fm.distributed import accelerate_settings

KINDS_OF_A_PROCESS = ("start", "end")  # kept, whatever step a later process continues from
# written after the checkpoint of their step, and written again by a run that continues from that checkpoint
KINDS_AFTER_A_SAVE = ("validation", "gate", "cosine", "shares", "warning")


def check_run_folder(directory: Path) -> Path:
    """Return a run directory. UserError if a link in it would make training read, write or delete outside it."""
    logs = ("recipe.yaml", "run.json", "log.jsonl", "events.jsonl", "tensorboard", "trackers")
    for name in (*logs, "checkpoints", "best", "incidents"):
        inside(directory, name)
    return directory


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e11


@dataclass(frozen=True)
class Process(Strict):
    """The keys of run.json beside its digest."""

    host: str
    pid: Annotated[int, at_least(1)]
    process_start: Annotated[float, checked(_is_time, "seconds since 1970")]  # a later process may get the same pid
    started: Annotated[float, checked(_is_time, "seconds since 1970")]
    world_size: Annotated[int, at_least(1)]
    spread: str
    slurm_job: str | None
    command: tuple[str, ...]
    versions: dict[str, str]


def read_process(file: Path) -> dict[str, Any]:
    """Return what run.json holds. UserError if it is altered or of another form."""
    facts = unsealed(read_json(file), str(file))
    validate(Process, facts, str(file))
    return facts


def write_process(file: Path, spread: str) -> None:
    """Write run.json. `spread` describes how the model is distributed over processes."""
    own = psutil.Process()
    facts = {
        "host": socket.gethostname(),
        "pid": own.pid,
        "process_start": own.create_time(),
        "started": time.time(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "spread": spread,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "command": sys.argv,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
    with atomic_file(file, durable=False) as stream:
        stream.write(json.dumps(sealed(facts), indent=1).encode())


def is_alive(process: Mapping[str, Any]) -> bool | None:
    """Return whether the process that wrote run.json is running, or None if it belongs to another machine."""
    if process["host"] != socket.gethostname():
        return None
    try:
        found = psutil.Process(process["pid"])
        same = abs(found.create_time() - process["process_start"]) < 2.0
        return same and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def environment(device: torch.device, spread: str) -> dict[str, str]:
    """Return the software and hardware of the run, by name, for people."""
    settings = ", ".join(f"{name} {value}" for name, value in accelerate_settings().items())
    facts = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "accelerate": f"{version('accelerate')}; {settings}" if settings else version("accelerate"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": f"{processor_name()}, {os.cpu_count()} threads",
        "processes": f"{os.environ.get('WORLD_SIZE', '1')} ({spread})",
        "system": platform.platform(),
    }
    commit = _commit_of(Path(__file__).parents[2])
    return facts | {"commit": commit} if commit else facts


def processor_name() -> str:
    """Return the name that the Linux kernel gives the CPU; on other systems, the kind of CPU."""
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)", cpus.read_text() if cpus.exists() else "", re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _commit_of(checkout: Path) -> str | None:
    """Return the commit of a checkout, marked as dirty if files differ from it; None without a checkout or git."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


class AppendedFile:
    """A file that grows. What a full disk does not take is kept in memory, and written once there is space.

    So the file is never torn, and nothing is lost while the process lives. `report` gets a message when writing fails
    for the first time, and for the first time after it worked again.
    """

    def __init__(self, path: Path, report: Callable[[str], object]) -> None:
        self._path, self._report, self._unwritten, self._fails = path, report, bytearray(), False
        self._file = path.open("ab", buffering=0)

    def write(self, content: bytes) -> None:
        """Append bytes."""
        self._unwritten += content
        try:
            while self._unwritten:
                del self._unwritten[: self._file.write(self._unwritten)]
            self._fails = False
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Close the file; what was not written until then is lost."""
        self.write(b"")
        try:
            self._file.close()
        except OSError as error:  # network file systems may notice only here that the disk is full
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self._fails:
            self._fails = True
            self._report(f"{self._path}: cannot be written ({error.strerror})")


class JsonLog:
    """A file of JSON objects, one a line, open for appending; `lines` are those it held."""

    def __init__(self, file: Path, keep: Callable[[dict[str, Any]], bool], report: Callable[[str], object]) -> None:
        """Open a log after removing the lines that `keep` refuses and those that a kill has torn.

        `report` gets a message when the file cannot be written.
        """
        self.lines: list[dict[str, Any]] = []
        if file.exists():
            self.lines = [line for line in parse_lines(file.read_text(errors="replace"))[0] if keep(line)]
            with atomic_file(file, durable=False) as stream:
                stream.write("".join(f"{json.dumps(line)}\n" for line in self.lines).encode())
        self._file = AppendedFile(file, report)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line; NaN and infinity are written as Python's json writes them."""
        self._file.write(f"{json.dumps(entry)}\n".encode())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class EventLog(JsonLog):
    """The log events.jsonl.

    A line has "kind", "step", "time" (seconds since 1970) and, by kind:

        start       text                      the process began, or continued, at this step
        pace        steps, seconds, samples   since the previous pace line: of stepping, without validations and saves
                    cpu_seconds               where the model is on a CPU: of the main process
        save        scalars, texts, pending   before a checkpoint is written: what TensorBoard has of this step, and the
                                              steps whose means it does not have yet
        validation  mean_ratio, datasets      {name: {"vrmse", "over_persistence"}}, one step, averaged weights
        cosine      datasets, matrix, norms   of the datasets' gradients (fm/training/checks.py); null if one is zero
        guard       text, refused, reason, action, windows   a refused step; windows: {dataset: [window ids]}
        shares, warning, gate, message     text
        end         state, text               finished | interrupted | failed; a killed process writes none

    `saved` is the save line of `resume_step`, `scores` holds the datasets of the last validation line, and `refusals`
    the texts of guard lines that were written after the checkpoint of `resume_step`, when earlier runs rolled back.
    """

    def __init__(self, file: Path, resume_step: int, report: Callable[[str], object]) -> None:
        """Open for appending; lines that a run which continues from `resume_step` writes again are removed."""
        super().__init__(file, lambda line: _is_past(line, resume_step), report)
        saves = [line for line in self.lines if line.get("kind") == "save" and line["step"] == resume_step]
        self.saved: Mapping[str, Any] = saves[-1] if saves else {"scalars": {}, "texts": [], "pending": []}
        validations = [line for line in self.lines if line.get("kind") == "validation" and "datasets" in line]
        self.scores: Mapping[str, Any] = validations[-1]["datasets"] if validations else {}
        texts = [line["text"] for line in self.lines if line.get("kind") == "guard" and line["step"] == resume_step]
        self.refusals = [text for text in texts if ["events", text] not in self.saved["texts"]]


def _is_past(line: Mapping[str, Any], resume_step: int) -> bool:
    kind, step = line.get("kind"), line["step"]
    before_save = step == resume_step and kind not in KINDS_AFTER_A_SAVE
    return kind in KINDS_OF_A_PROCESS or step < resume_step or before_save


def lacks_validation(run: Path, step: int) -> bool:
    """Return whether a run has an events.jsonl without a validation after `step` steps: it was killed in it."""
    file = run / "events.jsonl"
    if not file.is_file():
        return False
    lines, _ = parse_lines(file.read_text(errors="replace"))
    return not any(line.get("kind") == "validation" and line["step"] == step for line in lines)


def seconds_spent(pace: Mapping[str, Any]) -> float:
    """Return the seconds of a pace line: on a CPU the run's own, since other jobs may share the cores."""
    return float(pace.get("cpu_seconds", pace["seconds"]))


def parse_lines(text: str) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of a log that are what this file writes, and the number of other lines.

    Keys that this file does not know are not looked at. A line may lack keys that earlier versions did not write.
    """
    lines, num_damaged = [], 0
    for line in text.splitlines():
        try:
            entry = load_json(line)
            if not _is_entry(entry):
                raise ValueError
            lines.append(entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            num_damaged += 1
    return lines, num_damaged


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_tagged_text(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_text, value))


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e15


def _is_score(value: Any) -> bool:
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**53)


_TESTS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("kind", "text", "state", "dataset"), _is_text),
    **dict.fromkeys(("seconds", "samples", "cpu_seconds"), _is_amount),
    **dict.fromkeys(("loss", "mean_ratio"), _is_score),
    "step": _is_count,
    "steps": lambda value: _is_count(value) and value > 0,
    "time": _is_time,
}
_KEYS = {None: {"dataset", "loss"}, "pace": {"steps", "seconds", "time"}, "guard": {"text"}}  # kind -> needed ones


def _is_entry(entry: Any) -> bool:
    """Return whether a line of log.jsonl (without a kind) or events.jsonl can be one; errors mean that it cannot."""
    kind = entry.get("kind")
    if not {"step", *_KEYS.get(kind, ())} <= entry.keys():
        return False
    if kind == "validation" and "datasets" in entry:
        cells = [cell[key] for cell in entry["datasets"].values() for key in ("vrmse", "over_persistence")]
        if "mean_ratio" not in entry or not all(map(_is_score, cells)):
            return False
    if kind == "save":
        texts, pending = entry["texts"], entry["pending"]
        if not all(map(_is_score, entry["scalars"].values())) or None in entry["scalars"].values():
            return False
        if not (isinstance(texts, list) and isinstance(pending, list) and all(map(_is_tagged_text, texts))):
            return False
    return all(test(entry[key]) for key, test in _TESTS.items() if key in entry)
