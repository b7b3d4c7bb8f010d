"""Compare the speed of `data-pipeline shard` with a plain copy of the same bytes, and measure its memory.

    python tests/benchmarks/bench_shard.py [--repeats 7] [--frames 120] [--folder DIR]

Makes one trajectory of the largest published frames (512 x 512, 8 channels, float32: 1 GB in 120 frames). Then it takes
turns to copy it with h5py into a raw file, in reads of 4 MiB into one buffer, and to convert it with one job. Both end
with fsync, and both read from the page cache. Prints seconds, GB/s, the ratio of neighbors and the load of the machine,
then the peak memory of a separate process that converts.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import yaml

from data_pipeline.registry import load_registry
from data_pipeline.shards.build import build_shards

CARD = load_registry().card("viscoelastic_instability")
SIZE = 512
READ_BYTES = 4 * 2**20
MOMENTS = {"mean": 0.5, "std": 0.289, "rms": 0.577, "mean_delta": 0.0, "std_delta": 0.408, "rms_delta": 0.408}


def write_well(well: Path, frames: int) -> Path:
    """Write a Well folder with one trajectory of noise; return its HDF5 file."""
    path = well / CARD.name / "data" / "train" / "one.hdf5"
    path.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs["n_trajectories"] = 1
        file.create_group("dimensions").attrs["spatial_dims"] = ["x", "y"]
        for name, size in (("time", frames), ("x", SIZE), ("y", SIZE)):
            file["dimensions"][name] = np.arange(size, dtype=np.float32)
        file.create_group("scalars").attrs["field_names"] = []
        file.create_group("boundary_conditions")
        for order in range(3):
            fields = [field for field in CARD.state if field.order == order]
            group = file.create_group(f"t{order}_fields")
            group.attrs["field_names"] = np.array([field.name for field in fields], dtype=h5py.string_dtype())
            for field in fields:
                shape = (1, frames, SIZE, SIZE) + (2,) * order
                data = group.create_dataset(field.name, shape, np.float32)
                for time_index in range(frames):
                    data[0, time_index] = rng.random(shape[2:], dtype=np.float32)
                data.attrs.update({"sample_varying": True, "time_varying": True, "dim_varying": [True, True]})
    stats = {
        name: {field.name: [value] * len(field.channels) for field in CARD.state} for name, value in MOMENTS.items()
    }
    (well / CARD.name / "stats.yaml").write_text(yaml.safe_dump(stats))
    return path


def copy(source: Path, target: Path) -> int:
    """Copy all fields into a raw file; return their bytes."""
    total = 0
    buffer = np.empty(READ_BYTES // 4, np.float32)
    with h5py.File(source) as file, target.open("wb") as output:
        for field in CARD.state:
            data = file[f"t{field.order}_fields/{field.name}"]
            step = max(1, READ_BYTES // (data[0, 0].nbytes))
            for first in range(0, data.shape[1], step):
                stop = min(first + step, data.shape[1])
                block = buffer[: (stop - first) * data[0, 0].size].reshape((stop - first, *data.shape[2:]))
                data.read_direct(block, np.s_[0, first:stop])
                output.write(block.data)
                total += block.nbytes
        output.flush()
        os.fsync(output.fileno())
    return total


def timed(action, *arguments: object) -> float:
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def convert(well: Path, out: Path) -> None:
    build_shards(well, out, jobs=1)


def peak_mib(well: Path, out: Path) -> float:
    """Return the peak resident memory of a process that converts, from Linux's /proc."""
    program = (
        "import sys\n"
        "from data_pipeline.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    arguments = ["shard", "--well", str(well), "--out", str(out), "--jobs", "1"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if left out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        source = write_well(folder / "well", options.frames)
        num_bytes = copy(source, folder / "raw")
        convert(folder / "well", folder / "shards")  # both once, before anything is timed
        copies, conversions = [], []
        for _ in range(options.repeats):
            (folder / "raw").unlink()
            copies.append(timed(copy, source, folder / "raw"))
            shutil.rmtree(folder / "shards")
            conversions.append(timed(convert, folder / "well", folder / "shards"))
        for title, seconds in (("h5py copy", copies), ("shard, one job", conversions)):
            print(
                f"{title:>15}: {statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f}), "
                f"{num_bytes / 1e9 / statistics.median(seconds):.2f} GB/s"
            )
        ratios = [a / b for a, b in zip(copies, conversions, strict=True)]  # neighbors meet the same other load
        print(f"{'ratio':>15}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
        print(f"{'load':>15}: {load} on {os.cpu_count()} cores")
        shutil.rmtree(folder / "shards")
        peak = peak_mib(folder / "well", folder / "shards")
        print(f"{'peak memory':>15}: {peak:.0f} MiB for a trajectory of {num_bytes / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
