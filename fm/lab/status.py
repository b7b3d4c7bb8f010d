"""`fm status RUN`: the state of a run, from its directory, while it trains or afterwards. Reads only."""

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from textwrap import shorten
from typing import Any

from data_pipeline.errors import UserError, brief
from data_pipeline.files import inside
from data_pipeline.schema import MAX_COUNT
from fm.checkpoint import look_at_newest, read_state
from fm.config import read_recipe
from fm.training.runlog import is_alive, parse_lines, read_process

NUM_RATE_LINES = 20  # pace lines of the present process that the rate is measured over
QUIET_SECONDS = 600  # without a new line, a run on another machine may have ended, or be in a validation
LONGEST_SECONDS = 1e10  # three centuries: calendars have an end
NUM_EVENTS = 8
SHOWN_KINDS = ("start", "guard", "shares", "warning", "message", "end")
LOG_TAIL_BYTES = 1 << 16  # of log.jsonl, of which only the last line is needed


@dataclass(frozen=True)
class Rate:
    """Speed of the last steps, without validations and saves; the forecast includes them. None: unknown."""

    steps_per_s: float
    samples_per_s: float
    seconds_left: float | None
    ends: float | None  # seconds since 1970


@dataclass(frozen=True)
class LastCheckpoint:
    """The newest checkpoint whose files have the sizes in its state.json; their bytes are not hashed."""

    step: int
    path: str
    seconds_old: float


@dataclass(frozen=True)
class RunStatus:
    """Everything that `fm status` prints. Times are seconds since 1970."""

    run: str
    name: str
    step: int
    steps: int | None
    state: str  # running | finished | interrupted | failed | killed | unknown
    why: str  # the reason for the state
    process: Mapping[str, Any] | None  # run.json
    rate: Rate | None
    checkpoint: LastCheckpoint | None
    validation: Mapping[str, Any] | None  # the last validation line of events.jsonl
    gate: Mapping[str, Any] | None  # the last verdict on finetune.gate, a line of events.jsonl
    events: Sequence[Mapping[str, Any]]  # the last ones, oldest first
    disk_bytes: Mapping[str, int]  # by folder
    problems: Sequence[str]  # damaged lines, files and checkpoints


def read_status(run: Path) -> RunStatus:
    """Return the state of a run directory. Raises UserError if it is none."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(
            f"{run}: not a run directory, it has no recipe.yaml. Expected one such as runs/quickstart (run.dir, or "
            "runs/<run.name>); a run makes it when its first step begins."
        )
    for name in ("recipe.yaml", "log.jsonl", "events.jsonl", "run.json", "checkpoints"):
        inside(run, name)
    problems: list[str] = []
    recipe = _read_recipe(run / "recipe.yaml", problems)
    steps = recipe.get("train", {}).get("steps")
    log = _read_log(run / "log.jsonl", problems, LOG_TAIL_BYTES)
    events = _read_log(run / "events.jsonl", problems)
    process = _read_process(run / "run.json", problems)
    starts = [number for number, line in enumerate(events) if line.get("kind") == "start"]
    present = events[starts[-1] :] if starts else []
    step = max([line["step"] for line in (*log[-1:], *present[:1])], default=0)
    state, why = _state(run, process, present)
    last = {line.get("kind"): line for line in events if line.get("kind") != "validation" or "datasets" in line}
    return RunStatus(
        run=str(run),
        name=recipe.get("run", {}).get("name", run.name),
        step=step,
        steps=steps,
        state=state,
        why=why,
        process=process,
        rate=_rate(present, step, steps, running=state == "running"),
        checkpoint=_last_checkpoint(run / "checkpoints", problems),
        validation=last.get("validation"),
        gate=last.get("gate"),
        events=[line for line in events if line.get("kind") in SHOWN_KINDS and "time" in line][-NUM_EVENTS:],
        disk_bytes=_disk_bytes(run),
        problems=problems,
    )


def status_text(status: RunStatus) -> str:
    """Return the status for people."""
    total = f" of {status.steps} ({100 * status.step / status.steps:.1f}%)" if status.steps else ""
    lines = [
        f"{status.name}  {status.run}",
        f"state        {status.state}: {status.why}",
        f"step         {status.step}{total}",
    ]
    if rate := status.rate:
        lines.append(f"rate         {rate.steps_per_s:.3g} steps/s, {rate.samples_per_s:.3g} samples/s while stepping")
        if rate.seconds_left is not None and rate.ends is not None:
            left = _duration(rate.seconds_left)
            lines.append(f"left         {left}, ends {_clock(rate.ends)} (validations and saves included)")
    saved = "none yet"
    if newest := status.checkpoint:
        age = _duration(newest.seconds_old)
        saved = f"step {newest.step}, {age} ago, sizes verified, bytes not hashed: {newest.path}"
    lines.append(f"checkpoint   {saved}")
    sizes = sorted(((size, name) for name, size in status.disk_bytes.items() if name != "."), reverse=True)
    folders = f": {', '.join(f'{name} {size / 1e6:.1f}' for size, name in sizes)}" if sizes else ""
    lines.append(f"disk         {sum(status.disk_bytes.values()) / 1e6:.1f} MB{folders}")
    if facts := status.process:
        job = f", Slurm job {facts['slurm_job']}" if facts["slurm_job"] else ""
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        lines.append(
            f"process      {facts['pid']} on {facts['host']}{job}, since {_clock(facts['started'])}; "
            f"world size {facts['world_size']} ({facts['spread']}); {versions}"
        )
    lines += _validation_lines(status.validation)
    if status.gate:
        lines.append(f"gate         after step {status.gate['step']}: {status.gate.get('text', '')}")
    lines += ["events"] if status.events else []
    for line in status.events:
        prefix = "warning: " if line["kind"] == "warning" else ""
        text = shorten(prefix + str(line.get("text", "")), 160, placeholder="...")
        lines.append(f"  {_clock(line['time'])}  step {line['step']:>7}  {text}")
    lines += ["problems", *(f"  {problem}" for problem in status.problems)] if status.problems else []
    return "\n".join(lines)


def _validation_lines(line: Mapping[str, Any] | None) -> list[str]:
    if line is None:
        return ["validation   none yet"]

    def number(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.4f}"

    ratio = line["mean_ratio"]
    head = f"validation   after step {line['step']}, one step, averaged weights"
    head += f"; VRMSE / persistence, geometric mean {ratio:.3f}" if ratio is not None else ""
    width = max((len(name) for name in line["datasets"]), default=0)
    rows = [
        f"  {name:<{width}}  VRMSE {number(cell['vrmse'])}  / persistence {number(cell['over_persistence'])}"
        for name, cell in line["datasets"].items()
    ]
    return [head, *rows]


def _read_recipe(file: Path, problems: list[str]) -> dict[str, Any]:
    """Return the sections of recipe.yaml, unchecked, so that the recipe of another version can be read too."""
    try:
        document = read_recipe(file)
        sections = {name: part for name, part in document.items() if isinstance(part, dict)}
        steps = sections["train"]["steps"]
        if type(steps) is not int or not 0 < steps <= MAX_COUNT:
            raise UserError(f"{file}: train.steps: expected a whole number above 0, got {brief(steps)}")
    except (UserError, KeyError) as error:
        problems.append(f"recipe.yaml: cannot be read ({error}); the length of the run is not known")
        return {}
    return sections


def _read_log(file: Path, problems: list[str], tail_bytes: int | None = None) -> list[dict[str, Any]]:
    """Return the whole lines of a log, or of its last bytes; damaged lines are reported as a problem."""
    try:
        with file.open("rb") as stream:
            start = max(0, file.stat().st_size - tail_bytes) if tail_bytes else 0
            stream.seek(start)
            text = stream.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{file.name}: cannot be read ({error.strerror})")
        return []
    lines, damaged = parse_lines(text.partition("\n")[2] if start else text)
    if damaged:
        problems.append(f"{file.name}: {damaged} damaged line{'s' if damaged > 1 else ''}, left out here")
    return lines


def _read_process(file: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        return read_process(file) if file.exists() else None
    except UserError as error:
        problems.append(f"run.json: cannot be read ({error}); whether its process lives is not known")
        return None


def _state(run: Path, process: Mapping[str, Any] | None, present: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the state and its reason: the run's own end line, else its process, else the age of its last line."""
    names = ("log.jsonl", "events.jsonl", "run.json", "recipe.yaml")
    times = [(run / name).stat().st_mtime for name in names if (run / name).is_file()]
    quiet = max(0.0, time.time() - max(times, default=0.0))
    last_line = f"last line {_duration(quiet)} ago"
    # A process writes run.json shortly before it opens its logs, so the last end line may belong to an earlier process.
    opened = process is None or (present and present[0].get("time", 0) >= process["started"] - 1)
    if present and opened and present[-1].get("kind") == "end":
        return str(present[-1].get("state", "unknown")), str(present[-1].get("text", ""))
    alive = is_alive(process) if process else None
    if process and alive is not None:
        where = f"process {process['pid']} on {process['host']}"
        if alive:
            return "running", f"{where} is running, {last_line}"
        return "killed", f"{where} is gone and wrote no end event, {last_line}"
    where = f"on {process['host']}, another machine" if process else "no run.json names its process"
    if quiet < QUIET_SECONDS:
        return "running", f"{where}; {last_line}"
    return "unknown", f"{where}; {last_line}: it may have ended, or be in a long validation"


def _rate(present: list[dict[str, Any]], step: int, steps: int | None, *, running: bool) -> Rate | None:
    """Return the rate over the last pace lines of the present process, without its first line if there are others.

    The first steps are slow.
    """
    paces = [line for line in present if line.get("kind") == "pace" and "samples" in line][-NUM_RATE_LINES:]
    used = paces[1:] or paces
    seconds = sum(line["seconds"] for line in used)
    if seconds <= 0:
        return None
    stepped = sum(line["steps"] for line in used)
    left = ends = None
    if running and steps is not None:
        # wall-clock time, which includes validations and saves
        elapsed = used[-1]["time"] - paces[0]["time"] if len(paces) > 1 else seconds
        left = (steps - step) * elapsed / stepped
        left = min(max(0.0, left), LONGEST_SECONDS)  # clocks are set back, and differ between machines
        ends = time.time() + left
    return Rate(stepped / seconds, sum(line["samples"] for line in used) / seconds, left, ends)


def _last_checkpoint(root: Path, problems: list[str]) -> LastCheckpoint | None:
    def look(path: Path) -> LastCheckpoint:
        state = read_state(path)
        wrong = [name for name, one in state["files"].items() if (path / name).stat().st_size != one["bytes"]]
        if wrong:
            raise UserError(f"{path / wrong[0]}: its size differs from that in state.json")
        return LastCheckpoint(state["step"], str(path), max(0.0, time.time() - path.stat().st_mtime))

    with suppress(UserError):  # if all are damaged, each of them is a problem already
        return look_at_newest(root, problems.append, look)
    return None


def _disk_bytes(run: Path) -> dict[str, int]:
    """Return bytes by top folder, with the files of the run directory itself under "."."""
    sizes: Counter[str] = Counter()
    for folder, _, names in os.walk(run):  # passes over what is removed meanwhile or cannot be read
        top = Path(folder, "_").relative_to(run).parts[0]
        for file in (Path(folder, name) for name in names):
            with suppress(OSError):
                if file.is_file() and not file.is_symlink():
                    sizes["." if top == "_" else top] += file.stat().st_size
    return dict(sizes)


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
