"""Measure the time and memory to open a manifest of a million windows in a new process.

    python tests/benchmarks/bench_manifest.py [--trajectories 1000] [--frames 1001] [--repeats 5]

Writes a manifest as `shard` would, but without data. New processes then load it and make the index of its 1 -> 1
windows. Memory is the peak of the process, less its memory after the imports.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from data_pipeline.shards.format import Manifest, Shard, SourceFile, Trajectory
from data_pipeline.well.stats import DELTA_STATISTICS, VALUE_STATISTICS

OPEN = """
import json, resource, sys, time
from pathlib import Path
from data_pipeline.windows.reader import WindowIndex
from data_pipeline.shards.format import Manifest

def peak_mb():
    status = Path("/proc/self/status")  # Linux's ru_maxrss starts with what the parent had at the fork
    if status.exists():
        return next(int(line.split()[1]) / 1e3 for line in status.open() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)

before, start = peak_mb(), time.perf_counter()
manifest = Manifest.load(Path(sys.argv[1]))
trajectories = manifest.trajectories
index = WindowIndex([one.segments for one in trajectories], 2, [one.shard for one in trajectories])
seconds = time.perf_counter() - start
print(json.dumps([len(index), seconds, peak_mb() - before]))
"""


def million_windows(num_trajectories: int, num_frames: int) -> Manifest:
    """Return a manifest of 256x256 frames of three channels, 16 per chunk, in shards of 0.5 GiB or one trajectory."""
    channels, grid, per_chunk = ("pressure", "velocity_x", "velocity_y"), (256, 256), 16
    frame_bytes = 4 * len(channels) * grid[0] * grid[1]
    per_shard = max(1, 2**29 // (num_frames * frame_bytes))
    shard_bytes = per_shard * num_frames * (frame_bytes + 2048)
    trajectories = []
    for number in range(num_trajectories):
        first = number % per_shard * num_frames * (frame_bytes + 2048)
        trajectories.append(
            Trajectory(
                source=0,
                source_index=number,
                frames=num_frames,
                dt=0.1,
                scalars={"Reynolds": 1e4, "Schmidt": 0.5},
                shard=number // per_shard,
                offsets=tuple(first + frame * (frame_bytes + 128) for frame in range(0, num_frames, per_chunk)),
                crc32="".join(
                    f"{(number * num_frames + frame) * 2654435761 % 2**32:08x}" for frame in range(num_frames)
                ),
                constants_offset=None,
                constants_crc32="",
                segments=((0, num_frames),),
            )
        )
    num_shards = -(-num_trajectories // per_shard)
    return Manifest(
        dataset="shear_flow",
        split="train",
        state_channels=channels,
        constant_channels=(),
        grid=grid,
        boundary=(("PERIODIC", "PERIODIC"), ("PERIODIC", "PERIODIC")),
        dt=0.1,
        frames_per_chunk=per_chunk,
        dtype="float32",
        encoding={},
        stats={name: dict.fromkeys(channels, 1.0) for name in VALUE_STATISTICS + DELTA_STATISTICS},
        stats_source="stats.yaml",
        sources=(SourceFile("shear_flow.hdf5", 10**12, "0" * 64),),
        trajectories=tuple(trajectories),
        shards=tuple(Shard(f"shard-{number:06d}.tar", shard_bytes, "0" * 64) for number in range(num_shards)),
        findings=(),
        skip=(),
        converter="bench_manifest",
        plan="0" * 64,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=1000)
    parser.add_argument("--frames", type=int, default=1001)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.json"
        million_windows(options.trajectories, options.frames).save(path)
        command = [sys.executable, "-c", OPEN, str(path)]
        runs = [json.loads(subprocess.check_output(command)) for _ in range(options.repeats)]
        megabytes = path.stat().st_size / 1e6
    windows, seconds, memory = (list(column) for column in zip(*runs, strict=True))
    print(f"{windows[0]} windows in {options.trajectories} trajectories, a manifest of {megabytes:.1f} MB")
    print(f"opened in {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f}; aim: below 1)")
    print(f"peak memory {max(memory):.0f} MB above the imports (aim: below 100)")


if __name__ == "__main__":
    main()
