"""simulate() makes what it is asked for, the same each time, and is hard to misuse; its processes end with it."""

import json
import multiprocessing
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from small_cases import read_arrays

from data_pipeline.errors import UserError
from data_pipeline.miniwell.generate import EIGHT, EXTRAS, SYSTEMS, simulate
from data_pipeline.miniwell.system import SPLITS

DATASETS = sorted(SYSTEMS)
CHEAP = "gray_scott_reaction_diffusion"
SLOW = "viscoelastic_instability"


def test_eight_are_made_unasked_and_the_extras_are_not(tiny_well: Path) -> None:
    assert sorted(path.name for path in tiny_well.iterdir()) == sorted(EIGHT)
    assert len(EIGHT) == 8
    assert set(EIGHT) | set(EXTRAS) == set(SYSTEMS)


def test_arrays_do_not_depend_on_the_number_of_jobs(full_well: Path, tmp_path: Path) -> None:
    """The well to compare with was made by one process."""
    simulate(tmp_path, "tiny", DATASETS, jobs=2)
    for dataset in DATASETS:
        assert (tmp_path / dataset / "stats.yaml").read_bytes() == (full_well / dataset / "stats.yaml").read_bytes()
        for split in SPLITS:
            here, there = read_arrays(tmp_path, dataset, split), read_arrays(full_well, dataset, split)
            assert here.keys() == there.keys()
            for file, fields in here.items():
                for name, values in fields.items():
                    assert np.array_equal(values, there[file][name]), (dataset, split, file, name)


def test_another_seed_gives_other_trajectories(tiny_well: Path, tmp_path: Path) -> None:
    simulate(tmp_path, "tiny", [CHEAP], seed=4, jobs=1)
    here, there = read_arrays(tmp_path, CHEAP, "test"), read_arrays(tiny_well, CHEAP, "test")
    for file, fields in here.items():
        assert not np.allclose(fields["A"], there[file]["A"], atol=1e-3)


def test_a_complete_dataset_is_kept_and_an_incomplete_one_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(tmp_path, "tiny", [CHEAP], jobs=1)
    files = sorted((tmp_path / CHEAP).rglob("*.*"))
    before = {path: path.stat().st_mtime_ns for path in files}
    assert "MB in" in capsys.readouterr().out
    simulate(tmp_path, "tiny", [CHEAP], jobs=1)
    assert "already simulated" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in files} == before
    (tmp_path / CHEAP / "stats.yaml").unlink()
    damaged = next((tmp_path / CHEAP / "data/train").glob("*.hdf5"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    simulate(tmp_path, "tiny", [CHEAP], jobs=1)
    assert damaged.read_bytes() == whole
    assert sorted((tmp_path / CHEAP).rglob("*.*")) == files


@pytest.mark.parametrize(
    ("preset", "seed", "message"),
    [
        ("tiny", 1, r"expected version 1, preset tiny, seed 1, got version 1, preset tiny, seed 0"),
        ("mini", 0, r"preset mini, .* got .*tiny"),
    ],
)
def test_data_of_another_seed_or_preset_is_not_reused(tmp_path: Path, preset: str, seed: int, message: str) -> None:
    simulate(tmp_path, "tiny", [CHEAP], seed=0, jobs=1)
    with pytest.raises(UserError, match=message) as caught:
        simulate(tmp_path, preset, [CHEAP], seed=seed, jobs=1)
    assert f"Choose another --out, or remove {tmp_path / CHEAP}" in str(caught.value)


def test_data_of_other_settings_or_origin_is_not_reused(tmp_path: Path) -> None:
    marker = tmp_path / CHEAP / "simulation.json"
    simulate(tmp_path, "tiny", [CHEAP], jobs=1)
    found = json.loads(marker.read_text())
    found["settings"]["dt"] = 41.0
    marker.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"holds another simulation: .* with other settings"):
        simulate(tmp_path, "tiny", [CHEAP], jobs=1)
    marker.write_text("{")
    with pytest.raises(UserError, match="expected JSON in"):
        simulate(tmp_path, "tiny", [CHEAP], jobs=1)
    marker.unlink()
    with pytest.raises(UserError, match=r"got data without a simulation\.json"):
        simulate(tmp_path, "tiny", [CHEAP], jobs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "tiny", "datasets": ["shear_flo"]}, "got 'shear_flo'. Did you mean shear_flow?"),
        (
            {"preset": "tiny", "datasets": ["navier_stokes"]},
            "viscoelastic_instability, or the extras burgers, euler_multi_quadrants_periodicBC, "
            "pdearena_navier_stokes; got 'navier_stokes'. Did you mean pdearena_navier_stokes?",
        ),
        ({"preset": "minni"}, "expected a preset among mini, tiny; got 'minni'. Did you mean mini?"),
        ({"preset": "tiny", "seed": -1}, "expected a seed of 0 or more, got -1"),
        ({"preset": "tiny", "jobs": 0}, "expected 1 or more jobs, got 0"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        simulate(tmp_path, **arguments)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_reported_and_leaves_no_half_file(tmp_path: Path) -> None:
    """The operating system's limit on file size stands in for the disk: write() fails in the middle of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"train/.*hdf5: cannot be written, .* full \(File too large\).* free some space"
        ):
            simulate(tmp_path, "tiny", [CHEAP], jobs=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["simulation.json"]
    simulate(tmp_path, "tiny", [CHEAP], jobs=1)
    assert (tmp_path / CHEAP / "stats.yaml").exists()


def test_a_killed_worker_is_reported(tmp_path: Path) -> None:
    def kill_the_first_worker() -> None:
        while len(multiprocessing.active_children()) < 2:
            time.sleep(0.01)
        time.sleep(0.1)  # past the executor's own start, importing what the task needs
        multiprocessing.active_children()[0].kill()

    killer = threading.Thread(target=kill_the_first_worker)
    killer.start()
    with pytest.raises(UserError, match=r"a worker process was killed, .* run the same command with fewer --jobs"):
        simulate(tmp_path, "tiny", [CHEAP], jobs=2)
    killer.join()
    assert not (tmp_path / CHEAP / "stats.yaml").exists()


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_interrupted_or_killed_run_leaves_no_worker_behind(tmp_path: Path, kind: int, code: int) -> None:
    """Of two simulations of several seconds each, which say nothing until they are done."""
    command = [sys.executable, "-m", "data_pipeline", "simulate", "--preset", "mini", "--datasets", SLOW]
    command += ["--out", str(tmp_path), "--jobs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        workers = _wait_for_workers(process.pid, 2)
        process.send_signal(kind)
        # The workers hold the other end of this pipe as well: it ends when the last of them has.
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert "Traceback" not in errors
    assert not [worker for worker in workers if _is_running(worker)]
    assert not list(tmp_path.rglob("*.hdf5")), "the simulations were awaited, not cut short"


def _wait_for_workers(parent: int, count: int) -> list[int]:
    """Process ids of spawned workers that have imported what they simulate with."""
    deadline = time.monotonic() + 20
    while True:
        found = subprocess.run(
            ["ps", "-ww", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
        )
        rows = [line.split(maxsplit=2) for line in found.stdout.splitlines()]
        workers = [int(pid) for pid, ppid, args in rows if int(ppid) == parent and "spawn_main" in args]
        if len(workers) == count:
            time.sleep(1.0)  # past the start, in the simulation
            return workers
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_running(process: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_a_file_in_the_place_of_the_folder_is_reported(tmp_path: Path) -> None:
    blocked = tmp_path / "out"
    blocked.write_text("not a folder")
    with pytest.raises(UserError, match=r"simulation\.json: cannot be written \(.*\); choose a folder"):
        simulate(blocked, "tiny", [CHEAP], jobs=1)
