"""Kill a streaming reader (kill -9) at random moments, and compare a rerun on its cache with an undisturbed run.

    python tests/benchmarks/kill_streaming.py SHARDS [--shuffle blocks] [--moments 20] [--draws 200] [--workers 2]

Serves SHARDS on loopback. The exit code is 1 if the digest of any rerun differs.
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

from data_pipeline.registry import load_registry
from data_pipeline.windows.division import Division
from data_pipeline.windows.loader import open_readers, scheduled_batches, sources
from data_pipeline.windows.schedule import Schedule
from data_pipeline.windows.streaming import StreamSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from faulty_server import FaultyServer


def read(url: str, options: argparse.Namespace) -> str:
    """Return the digest of all batches that a training run would get."""
    stream = StreamSettings(options.shuffle, 2, options.cache, int(options.cache_mb * 1e6), draws_ahead=8)
    readers = open_readers(url, None, "train", stream=stream, known=tuple(load_registry().cards))
    schedule = Schedule(sources(readers, 2), batch=4, seed=0, shuffle=options.shuffle, shards_per_block=2)
    batches = scheduled_batches(readers, Division(schedule), 2, 0, options.draws, options.workers)
    digest = hashlib.sha256()
    print("reading", flush=True)
    for batch in batches:
        for values in (batch.windows, batch.fields, batch.constants):
            digest.update(values.numpy())
    return digest.hexdigest()


def start(url: str, cache: Path, options: argparse.Namespace) -> "subprocess.Popen[str]":
    """Start a reader in its own process group, and return when it has opened the manifests."""
    command = [sys.executable, __file__, url, "--child", "--cache", str(cache), "--shuffle", options.shuffle]
    command += ["--draws", str(options.draws), "--workers", str(options.workers), "--cache-mb", str(options.cache_mb)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    return process


def finish(process: "subprocess.Popen[str]") -> str:
    digest = process.communicate()[0].strip()
    if process.returncode or len(digest) != 64:
        raise SystemExit(f"the reader ended with exit code {process.returncode}")
    return digest


def kill_and_rerun(url: str, options: argparse.Namespace, folder: Path) -> int:
    """Return the number of reruns with the digest of the undisturbed run."""
    began = time.perf_counter()
    undisturbed = start(url, folder / "undisturbed", options)
    reading = time.perf_counter()
    expected = finish(undisturbed)
    ended = time.perf_counter()
    print(f"undisturbed: {expected[:16]}, {reading - began:.1f} s to start, {ended - reading:.1f} s to read")
    chance, good = random.Random(options.seed), 0
    for moment in range(options.moments):
        cache = folder / f"killed-{moment}"
        delay = chance.uniform(0, ended - reading)
        process = start(url, cache, options)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        left = [path for path in cache.rglob("*") if path.is_file()]
        same = finish(start(url, cache, options)) == expected
        good += same
        parts = sum(path.suffix == ".part" for path in left)
        print(f"killed after {delay:.3f} s with {len(left)} files ({parts} parts): {'same' if same else 'DIFFERENT'}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="folder with <dataset>/train/manifest.json")
    parser.add_argument("--shuffle", choices=("global", "blocks"), default="blocks")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cache-mb", type=float, default=1000.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(read(options.shards, options))
        return 0
    with FaultyServer(Path(options.shards)) as server, tempfile.TemporaryDirectory() as folder:
        good = kill_and_rerun(server.url, options, Path(folder))
    print(f"{good} of {options.moments} reruns gave the same digests ({options.shuffle})")
    return 0 if good == options.moments else 1


if __name__ == "__main__":
    sys.exit(main())
