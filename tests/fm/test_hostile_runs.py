"""Hostile and damaged files of a run end in success or UserError, and a value that was changed is never accepted.

FUZZ_FACTOR=100 in the environment tries a hundred times as many cases, other ones at every run.
"""

import copy
import io
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from error_files import dataset_errors
from fuzzing import CHANGES, EDITS, cases, edited, mutated
from hypothesis import example, given
from hypothesis import strategies as st
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import summary
from whole_runs import DATASETS, fm, small, written

from data_pipeline.errors import UserError
from data_pipeline.registry import load_registry
from data_pipeline.schema import sealed, unsealed
from data_pipeline.windows.schedule import Source
from fm.checkpoint import Snapshot, newest_checkpoint, read_state, write_checkpoint
from fm.config import FinetuneSettings, GuardSettings, Recipe, ValidationSettings, recipe_to_dict, resolve
from fm.evaluation.errors import ERROR_NAMES, TASKS, ErrorFile
from fm.evaluation.protocol import PROTOCOLS
from fm.evaluation.scores import score
from fm.lab.status import read_status, status_text
from fm.training.guard import AnomalyDetector, RegressionLimit
from fm.training.mixing import Mixing
from fm.training.runlog import EventLog, parse_lines, read_process, write_process

T = TypeVar("T")
OLD, NEW = 40, 60  # steps of the checkpoints
EDITED_JSON = st.one_of(EDITS.map(lambda edits: (edits, None)), CHANGES.map(lambda changes: (None, changes)))


def spoilt(content: dict[str, Any], edit: tuple[list | None, list | None]) -> bytes:
    """JSON with its bytes edited or its values changed."""
    edits, changes = edit
    if changes is not None:
        return json.dumps(mutated(content, changes), indent=1).encode()
    assert edits is not None
    return edited(json.dumps(content, indent=1).encode(), edits)


def attempt(call: Callable[[], T]) -> T | None:
    """The result, or None after a UserError, the only failure that there may be."""
    try:
        return call()
    except UserError:
        return None


def adaptive() -> Recipe:
    return small(Path("shards"), Path("run"), validation={"every": 3}, sampling={"scheme": "adaptive"})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, whose state.json holds what a finetuning with a gate and adaptive sampling puts there."""
    root = tmp_path_factory.mktemp("hostile") / "checkpoints"
    best = {"worsening": 1.02, "diverged": 0, "score": 0.8}
    before = dict.fromkeys(DATASETS, 0.5)
    facts = {
        "recipe": recipe_to_dict(
            small(Path("shards"), Path("run"), validation={"every": 3}, sampling={"scheme": "adaptive"})
        ),
        "registry": load_registry().snapshot(),
        "shards": dict.fromkeys(DATASETS, "d" * 64),
        "symmetries": {DATASETS[0]: ["shift_x"]},
        "sampling": {"history": [[0, dict.fromkeys(DATASETS, 0.5)]], "scores": dict.fromkeys(DATASETS, 0.5)},
        "guard": {"refused": [7], "history": {DATASETS[0]: [-0.5, -0.6]}},
        "gate": {"before": before, "best": best, "failed": False, "limit": 1.05, "scored": ["wavelit", 64, 1]},
    }
    names = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
    tensors = {name: {"weight": torch.ones(2)} for name in names}
    for step in (OLD, NEW):
        write_checkpoint(root, Snapshot(step, {"format": 2}, tensors, facts))
    return root


def use_state(root: Path) -> dict[str, Any]:
    """Read the newest whole checkpoint, and restore what a run restores from it."""
    reports: list[str] = []
    found = newest_checkpoint(root, reports.append)
    assert found is not None
    assert bool(reports) == (found.name == f"step_{OLD:08d}"), reports  # skipped with a reason, or whole
    state = read_state(found)
    given = copy.deepcopy(state)
    recipe = adaptive()
    mixing = Mixing(recipe, [Source(name, 100, 256, (100,)) for name in DATASETS])
    limit = RegressionLimit(FinetuneSettings("model", gate=1.05), ValidationSettings())
    attempt(lambda: resolve(given["recipe"], "state.json"))
    attempt(lambda: AnomalyDetector(GuardSettings()).restore(given["guard"]))
    attempt(lambda: limit.restore(given["gate"], given["gate"], given["step"]))
    attempt(lambda: mixing.restore(given["sampling"], given["step"]))
    return state


@cases(60)
@given(edit=EDITED_JSON)
def test_an_altered_state_is_passed_over_for_the_checkpoint_before(root: Path, edit: Any) -> None:
    file = root / f"step_{NEW:08d}" / "state.json"
    whole = file.read_bytes()
    try:
        content = spoilt(json.loads(whole), edit)
        if b'"digest"' not in content and b'"format_version": 2,' in content:
            return  # as in an early version: the next test
        file.write_bytes(content)
        state = use_state(root)
    finally:
        file.write_bytes(whole)
    assert state == {**unsealed(json.loads(whole), ""), "step": state["step"]}
    assert state["step"] in (OLD, NEW)
    if state["step"] == OLD:
        assert spoilt(json.loads(whole), edit) != whole


@pytest.mark.parametrize("version", [2, 3])
@cases(40)
@given(changes=CHANGES)
def test_a_state_with_a_digest_of_its_own_or_none_ends_in_a_message_at_worst(
    root: Path, changes: list, version: int
) -> None:
    """Whoever alters a state with bad intentions makes its digest true again; early checkpoints had none."""
    file = root / f"step_{NEW:08d}" / "state.json"
    whole = file.read_bytes()
    content = mutated({**unsealed(json.loads(whole), ""), "format_version": version}, changes)
    try:
        file.write_text(json.dumps(sealed(content) if version == 3 else content))
        state = use_state(root)
    finally:
        file.write_bytes(whole)
    assert state["step"] in (OLD, NEW)


@cases(60)
@given(edit=EDITED_JSON)
def test_an_altered_run_json_is_a_problem_that_status_names(root: Path, edit: Any) -> None:
    run, file = root.parent, root.parent / "run.json"
    write_process(file, "one process")
    (run / "recipe.yaml").write_text("train: {steps: 60}")
    whole = file.read_bytes()
    try:
        file.write_bytes(spoilt(json.loads(whole), edit))
        status = read_status(run)
        assert status_text(status)
    finally:
        file.write_bytes(whole)
    if not any("run.json" in problem for problem in status.problems):
        assert status.process == read_process(file)


@cases(40)
@given(changes=CHANGES)
def test_a_run_json_of_other_values_ends_in_a_problem_at_worst(root: Path, changes: list) -> None:
    run, file = root.parent, root.parent / "run.json"
    write_process(file, "one process")
    (run / "recipe.yaml").write_text("train: {steps: 60}")
    content = mutated(unsealed(json.loads(file.read_bytes()), ""), changes)
    file.write_text(json.dumps(sealed(content)))
    assert status_text(read_status(run))
    write_process(file, "one process")


EVENTS: list[dict[str, Any]] = [
    {"kind": "start", "step": 0, "time": 1e9, "text": "started"},
    {"kind": "pace", "step": 4, "time": 1e9 + 2, "steps": 4, "seconds": 1.5, "samples": 16, "cpu_seconds": 1.4},
    {"kind": "pace", "step": 8, "time": 1e9 + 4, "steps": 4, "seconds": 1.5, "samples": 16},
    {"kind": "guard", "step": 8, "time": 1e9 + 5, "text": "refused", "refused": 8, "reason": "r", "windows": {}},
    {"kind": "save", "step": 8, "time": 1e9 + 6, "scalars": {"train/loss": 0.5}, "texts": [["events", "a"]]}
    | {"pending": []},
    {"kind": "validation", "step": 8, "time": 1e9 + 7, "mean_ratio": 0.5}
    | {"datasets": {name: {"vrmse": 0.5, "over_persistence": None} for name in DATASETS}},
    {"kind": "gate", "step": 8, "time": 1e9 + 8, "text": "within"},
    {"kind": "end", "step": 8, "time": 1e9 + 9, "state": "finished", "text": "finished after step 8"},
]
LOG = [{"step": step, "dataset": DATASETS[0], "windows": "a", "loss": 0.5, "lr": 1e-3} for step in range(1, 9)]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder for logs; its process has no run.json, and is taken for one of another machine."""
    run = tmp_path_factory.mktemp("logged")
    (run / "recipe.yaml").write_text("run: {name: logged}\ntrain: {steps: 1000000000000}")
    return run


@cases(80)
@given(line=st.integers(0, len(EVENTS) - 1), change=CHANGES, edits=st.none() | EDITS, in_log=st.booleans())
@example(line=1, change=[(2, "set", 1e308)], edits=None, in_log=False)
@example(line=4, change=[(175, "set", "")], edits=None, in_log=False)
def test_altered_lines_of_the_logs_are_left_out_or_lines_that_can_be(
    logged: Path, line: int, change: list, edits: list | None, in_log: bool
) -> None:
    """Whatever a line says, `fm status` has an answer, and a run that continues opens its record."""
    lines = {"events.jsonl": [json.dumps(one) for one in EVENTS], "log.jsonl": [json.dumps(one) for one in LOG]}
    name, kept = ("log.jsonl", LOG) if in_log else ("events.jsonl", EVENTS)
    changed = mutated(kept[line], change)
    whole = json.dumps(changed) if edits is None else edited(json.dumps(kept[line]).encode(), edits).decode("latin1")
    lines[name][line] = whole.replace("\n", " ")
    for file, texts in lines.items():
        (logged / file).write_text("\n".join(texts) + "\n")
    status = read_status(logged)
    assert status_text(status)
    with closing(EventLog(logged / "events.jsonl", 8, print)) as events:
        for tag, value in events.saved["scalars"].items():
            Summary.Value(tag=tag, simple_value=value)
        for tag, body in events.saved["texts"]:
            summary.text(tag, body)
    if edits is None and whole != json.dumps(kept[line]) and not in_log:
        assert any("damaged" in problem for problem in status.problems) or changed in parse_lines(whole)[0]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, '{"step": ' + "9" * 5000 + "}", '{"step": NaN}', "[1]"]
)
def test_lines_of_endless_depth_or_digits_are_damaged(logged: Path, text: str) -> None:
    for name, lines in (("events.jsonl", EVENTS), ("log.jsonl", LOG)):
        (logged / name).write_text("".join(f"{json.dumps(one)}\n" for one in lines) + text + "\n")
    assert [problem for problem in read_status(logged).problems if "1 damaged line" in problem]


@pytest.mark.parametrize("name", ["events.jsonl", "tensorboard", "checkpoints", "best", "incidents", "report"])
def test_a_link_in_a_run_leads_training_and_reports_nowhere(tmp_path: Path, name: str) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    run.mkdir()
    (run / name).symlink_to(outside)
    command = ["score", str(run)] if name == "report" else ["train", str(written(small(Path("shards"), run)))]
    done = fm(*command)
    assert (done.returncode, list(outside.iterdir())) == (2, [])
    assert f"{run}: expected paths inside it, got '{name}" in done.stderr


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """An errors.npz and its bytes."""
    rng = np.random.default_rng(0)
    rollout = rng.random((3, 5, 2))
    rollout[1, 3:] = np.nan
    path = tmp_path_factory.mktemp("hostile") / "errors.npz"
    datasets = {"shear_flow": dataset_errors(rollout, rng.random((3, 5, 2)))}
    ErrorFile(PROTOCOLS["thirds"], datasets, {"step": 40}).save(path)
    return path, path.read_bytes()


def values(file: ErrorFile) -> tuple:
    """All that an error file holds, to be compared; NaN equals NaN."""
    parts = [
        (name, one.channels, one.trajectories.tolist(), one.data_digest, one.grid, one.stencil, *arrays)
        for name, one in file.datasets.items()
        for arrays in [[getattr(getattr(one, task), part).tobytes() for task in TASKS for part in ERROR_NAMES]]
    ]
    return file.protocol, file.origin, parts


@cases(60)
@given(edits=EDITS)
def test_damaged_errors_are_refused_or_the_same(errors: tuple[Path, bytes], edits: list) -> None:
    path, whole = errors
    path.write_bytes(whole)
    expected = values(ErrorFile.load(path))
    path.write_bytes(edited(whole, edits))
    found = attempt(lambda: ErrorFile.load(path))
    assert found is None or values(found) == expected


ARRAYS = st.one_of(
    st.sampled_from([np.array(-1.0), np.array("text"), np.array(1j), np.array([]), np.zeros((3, 5, 2), np.float32)]),
    st.tuples(st.integers(0, 29), st.sampled_from([-1.0, np.inf, np.nan, 1e300])),
    st.tuples(st.sampled_from(["swap", "cut", "twice"]), st.just(0)),
)


@cases(60)
@given(place=st.integers(0, 2**16), change=ARRAYS, head=st.none() | CHANGES)
def test_errors_that_cannot_be_are_refused(
    errors: tuple[Path, bytes], place: int, change: Any, head: list | None
) -> None:
    """The archive is whole, but an array or the head is another: what is accepted can be a measurement."""
    path, whole = errors
    with np.load(io.BytesIO(whole)) as file:
        arrays = dict(file)
    if head is not None:
        arrays["head"] = np.array(json.dumps(mutated(json.loads(str(arrays["head"])), head)))
    else:
        name = sorted(arrays)[place % len(arrays)]
        array = arrays[name] = arrays[name].copy()
        if isinstance(change, np.ndarray):
            arrays[name] = change
        elif change[0] in ("swap", "cut", "twice") and array.ndim:
            arrays[name] = {"swap": array.T, "cut": array[1:], "twice": np.concatenate([array, array])}[change[0]]
        elif array.dtype == np.float64 and array.size:
            array.flat[change[0] % array.size] = change[1]
    np.savez(path, **arrays)
    found = attempt(lambda: ErrorFile.load(path))
    if found is None:
        return
    for part in found.datasets.values():
        assert len(part.channels) > 0 < min(part.grid)
        for task in (part.one_step, part.rollout):
            there = task.present
            assert np.isfinite(task.variance[there]).all()
            assert (task.variance[there] >= 0).all()
            for name in ERROR_NAMES:
                assert not (getattr(task, name) < 0).any()
                assert np.isnan(getattr(task, name)[~there]).all()
    attempt(lambda: score(found))


def test_whole_files_are_accepted(root: Path, errors: tuple[Path, bytes]) -> None:
    assert use_state(root)["step"] == NEW
    errors[0].write_bytes(errors[1])
    assert ErrorFile.load(errors[0]).origin == {"step": 40}
