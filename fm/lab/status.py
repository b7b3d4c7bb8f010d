"""`fm status RUN`: what a run directory says of its run, while it trains or afterwards. Reads only."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.files import UserError
from fm.checkpoint import list_checkpoints, read_state
from fm.training.runlog import is_alive, parse_lines

RATE_LINES = 20  # the rate is that of the last so many pace lines of the present process
QUIET_SECONDS = 600  # longer without a line, on another machine: the run may have ended, or validate
NUM_EVENTS = 8
_TOLD = ("start", "guard", "shares", "warning", "message", "end")
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Rate:
    """Speed over the last steps, without validations and saves; the forecast includes them. None: not known."""

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
    """All that `fm status` prints. Times in seconds since 1970."""

    run: str
    name: str
    step: int
    steps: int | None
    state: str  # running | finished | interrupted | failed | killed | unknown
    why: str  # what the state was told from
    process: Mapping[str, Any] | None  # run.json
    rate: Rate | None
    checkpoint: LastCheckpoint | None
    validation: Mapping[str, Any] | None  # the last validation line of events.jsonl
    events: Sequence[Mapping[str, Any]]  # the last ones, oldest first
    disk_bytes: Mapping[str, int]  # by folder
    problems: Sequence[str]  # damaged lines, files and checkpoints

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_status(run: Path) -> RunStatus:
    """Read a run directory. UserError if it is none."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(
            f"{run}: not a run directory, it has no recipe.yaml. Expected one such as runs/quickstart (run.dir, or "
            "runs/<run.name>); a run makes it when its first step begins."
        )
    problems: list[str] = []
    recipe = _read_recipe(run / "recipe.yaml", problems)
    steps = recipe.get("train", {}).get("steps")
    log = _read_log(run / "log.jsonl", problems, _TAIL_BYTES)
    events = _read_log(run / "events.jsonl", problems)
    process = _read_process(run / "run.json", problems)
    begins = [i for i, line in enumerate(events) if line.get("kind") == "start"]
    present = events[begins[-1] :] if begins else []
    step = max([line["step"] for line in (*log[-1:], *present[:1])], default=0)
    state, why = _state(run, process, present)
    validations = [line for line in events if line.get("kind") == "validation" and "datasets" in line]
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
        validation=validations[-1] if validations else None,
        events=[line for line in events if line.get("kind") in _TOLD and "time" in line][-NUM_EVENTS:],
        disk_bytes=_disk_bytes(run),
        problems=problems,
    )


def status_json(status: RunStatus) -> str:
    """One JSON object."""
    return json.dumps(status.to_json(), indent=1)


def status_text(status: RunStatus) -> str:
    """The status for people; lines are only as many as there is something to say."""
    total = f" of {status.steps} ({100 * status.step / status.steps:.1f}%)" if status.steps else ""
    lines = [
        f"{status.name}  {status.run}",
        f"state        {status.state}: {status.why}",
        f"step         {status.step}{total}",
    ]
    if status.rate:
        rate = status.rate
        lines.append(f"rate         {rate.steps_per_s:.3g} steps/s, {rate.samples_per_s:.3g} samples/s while stepping")
        if rate.seconds_left is not None and rate.ends is not None:
            left = _duration(rate.seconds_left)
            lines.append(f"left         {left}, ends {_clock(rate.ends)} (validations and saves included)")
    if status.checkpoint:
        saved = status.checkpoint
        lines.append(
            f"checkpoint   step {saved.step}, {_duration(saved.seconds_old)} ago, sizes verified, bytes not hashed: "
            f"{saved.path}"
        )
    else:
        lines.append("checkpoint   none yet")
    lines.append(f"disk         {_disk_text(status.disk_bytes)}")
    if status.process:
        lines.append(f"process      {_process_text(status.process)}")
    return "\n".join([*lines, *_validation_text(status.validation), *_events_text(status)])


def _read_recipe(file: Path, problems: list[str]) -> dict[str, Any]:
    """The sections of recipe.yaml, whatever version of the project wrote it."""
    try:
        document = yaml.safe_load(file.read_text())
        sections = {name: part for name, part in document.items() if isinstance(part, dict)}
        if not isinstance(sections["train"]["steps"], int):
            raise TypeError("train.steps is not a whole number")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        problems.append(f"recipe.yaml: cannot be read ({type(error).__name__}); the length of the run is not known")
        return {}
    return sections


def _read_log(file: Path, problems: list[str], tail_bytes: int | None = None) -> list[dict[str, Any]]:
    """The whole lines of a log, or of its last bytes; damaged ones are counted among the problems."""
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
        facts = json.loads(file.read_text())
        numbers = (facts["pid"], facts["process_start"], facts["started"], facts["world_size"])
        if not (isinstance(facts["host"], str) and all(isinstance(number, int | float) for number in numbers)):
            raise TypeError
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"run.json: cannot be read ({type(error).__name__}); whether its process lives is not known")
        return None
    return facts


def _state(run: Path, process: Mapping[str, Any] | None, present: list[dict[str, Any]]) -> tuple[str, str]:
    """The state, and what it was told from: the run's own last word, then its process, then its silence."""
    quiet = _seconds_quiet(run)
    silence = f"last line {_duration(quiet)} ago"
    # A process writes run.json a moment before it opens its logs, whose last end is then another's.
    opened = process is None or (present and present[0].get("time", 0) >= process["started"] - 1)
    if present and opened and present[-1].get("kind") == "end":
        return str(present[-1].get("state", "unknown")), str(present[-1].get("text", ""))
    lives = is_alive(process) if process else None
    if process and lives:
        return "running", f"process {process['pid']} on {process['host']} lives, {silence}"
    if process and lives is False:
        return "killed", f"process {process['pid']} on {process['host']} is gone without a last word, {silence}"
    where = f"on {process['host']}, another machine" if process else "no run.json names its process"
    if quiet < QUIET_SECONDS:
        return "running", f"{where}; {silence}"
    return "unknown", f"{where}; {silence}: it may have ended, or be in a long validation"


def _seconds_quiet(run: Path) -> float:
    names = ("log.jsonl", "events.jsonl", "run.json", "recipe.yaml")
    times = [(run / name).stat().st_mtime for name in names if (run / name).is_file()]
    return max(0.0, time.time() - max(times, default=0.0))


def _rate(present: list[dict[str, Any]], step: int, steps: int | None, *, running: bool) -> Rate | None:
    """From the last pace lines of the present process; its first steps are slow, so not from the first of several."""
    paces = [line for line in present if line.get("kind") == "pace" and "samples" in line][-RATE_LINES:]
    used = paces[1:] or paces
    seconds = sum(line["seconds"] for line in used)
    if seconds <= 0:
        return None
    stepped = sum(line["steps"] for line in used)
    left = ends = None
    if running and steps is not None:
        # by the clock, so that validations and saves count
        elapsed = used[-1]["time"] - paces[0]["time"] if len(paces) > 1 else seconds
        ends = time.time() + (steps - step) * elapsed / stepped
        left = ends - time.time()
    return Rate(stepped / seconds, sum(line["samples"] for line in used) / seconds, left, ends)


def _last_checkpoint(root: Path, problems: list[str]) -> LastCheckpoint | None:
    for step, path in list_checkpoints(root).items():
        try:
            files = read_state(path)["files"]
            wrong = [n for n, entry in files.items() if (path / Path(n).name).stat().st_size != entry["bytes"]]
            if wrong:
                raise UserError(f"{path / wrong[0]}: its size differs from that in state.json")
            return LastCheckpoint(step, str(path), time.time() - path.stat().st_mtime)
        except (UserError, OSError) as error:
            if path.exists():  # else it was pruned meanwhile
                problems.append(f"damaged checkpoint: {error}")
    return None


def _disk_bytes(run: Path) -> dict[str, int]:
    """Bytes by top folder, files of the run directory itself under "."; files that vanish meanwhile count nothing."""
    sizes: dict[str, int] = {}
    for file in run.rglob("*"):
        try:
            if file.is_file() and not file.is_symlink():
                parts = file.relative_to(run).parts
                folder = parts[0] if len(parts) > 1 else "."
                sizes[folder] = sizes.get(folder, 0) + file.stat().st_size
        except OSError:
            continue
    return sizes


def _validation_text(line: Mapping[str, Any] | None) -> list[str]:
    if line is None:
        return ["validation   none yet"]
    ratio = line["mean_ratio"]
    head = f"validation   after step {line['step']}, one step, averaged weights"
    head += f"; VRMSE / persistence, geometric mean {ratio:.3f}" if ratio is not None else ""
    width = max((len(name) for name in line["datasets"]), default=0)
    rows = [
        f"  {name:<{width}}  VRMSE {_number(cell['vrmse'])}  / persistence {_number(cell['over_persistence'])}"
        for name, cell in line["datasets"].items()
    ]
    return [head, *rows]


def _events_text(status: RunStatus) -> list[str]:
    rows = []
    for line in status.events:
        prefix = "warning: " if line["kind"] == "warning" else ""
        text = prefix + " ".join(str(line.get("text", "")).split())
        rows.append(
            f"  {_clock(line['time'])}  step {line['step']:>7}  {text if len(text) <= 160 else text[:157] + '...'}"
        )
    problems = [f"  {problem}" for problem in status.problems]
    return [*(["events", *rows] if rows else []), *(["problems", *problems] if problems else [])]


def _process_text(facts: Mapping[str, Any]) -> str:
    job = f", Slurm job {facts['slurm_job']}" if facts.get("slurm_job") else ""
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    return (
        f"{facts['pid']} on {facts['host']}{job}, since {_clock(facts['started'])}; "
        f"world size {facts['world_size']} ({facts.get('spread', 'not known')}); {versions}"
    )


def _disk_text(sizes: Mapping[str, int]) -> str:
    parts = sorted(((size, name) for name, size in sizes.items() if name != "."), reverse=True)
    total = f"{sum(sizes.values()) / 1e6:.1f} MB"
    return total + (f": {', '.join(f'{name} {size / 1e6:.1f}' for size, name in parts)}" if parts else "")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return str(timedelta(seconds=round(seconds)))
