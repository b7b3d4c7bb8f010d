"""Kill `data-pipeline shard` at random moments, run it again, and compare every byte with an undisturbed run.

    python tests/benchmarks/kill_shard.py 20 [--well WELL] [--jobs 2] [--seed 0]

Without --well it simulates the tiny mini-Well first. Every other kill takes the whole process group, the others only
the parent, whose workers must then end by themselves. The exit code is 1 if any output differs or anything is left
over.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def command(well: Path, out: Path, jobs: int) -> list[str]:
    """Return the command, with small shards and chunks, so that there is much to interrupt."""
    arguments = ["--well", str(well), "--out", str(out), "--jobs", str(jobs), "--frames-per-chunk", "2"]
    return [sys.executable, "-m", "data_pipeline", "shard", *arguments, "--shard-size", "100K"]


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_after(seconds: float, arguments: list[str], group: bool) -> str:
    """Start the command and kill it after a while; return what happened."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(seconds)
        return "had ended"
    except subprocess.TimeoutExpired:
        if group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        return "killed with its workers" if group else "killed, its workers not"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int, help="how often")
    parser.add_argument("--well", type=Path, help="a Well folder (default: the tiny mini-Well, simulated now)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        well, whole = options.well or Path(folder) / "well", Path(folder) / "whole"
        if options.well is None:
            simulate = [sys.executable, "-m", "data_pipeline", "simulate", "--preset", "tiny", "--out", str(well)]
            subprocess.run(simulate, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        start = time.perf_counter()
        subprocess.run(command(well, whole, options.jobs), check=True, stdout=subprocess.DEVNULL)
        seconds, expected = time.perf_counter() - start, digests(whole)
        print(f"undisturbed: {len(expected)} files in {seconds:.1f} s")
        bad = 0
        for number in range(options.kills):
            out, moment = Path(folder) / f"out{number}", rng.uniform(0.3, 1.0) * seconds
            fate = kill_after(moment, command(well, out, options.jobs), group=number % 2 == 0)
            found, left = len(list(out.rglob("shard-*.tar"))), len(list(out.rglob("*.tmp")))
            again = subprocess.run(command(well, out, options.jobs), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            same = again.returncode == 0 and digests(out) == expected
            bad += not same
            print(
                f"{number + 1:3} {fate} after {moment:.2f} s, {found} shards and {left} temporary files there; rerun: "
                f"{'same bytes' if same else 'DIFFERENT: ' + again.stderr.decode()[-300:]}"
            )
        print(f"{options.kills - bad} of {options.kills} reruns have the same digests as the undisturbed run")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
