"""Measure how long 10M parameters take to load on the CPU: from an exported folder with digests, and without.

    python tests/benchmarks/bench_load.py [--rounds 10]

The model has random weights and the eight datasets of the packaged cards. The median of the rounds is printed.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from data_pipeline.files import sha256
from data_pipeline.registry import Card, load_registry
from fm.model.files import EXPORT_FILE, EXPORT_FORMAT, MODEL_FILE, WEIGHTS_FILE
from fm.model.spec import PRESETS, DatasetSpec
from fm.model.wavelit import WaveLiTFM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as root:
        model = WaveLiTFM(PRESETS["9.5M"], [spec_of(card) for card in load_registry().select(None)])
        plain, exported = Path(root) / "plain", Path(root) / "exported"
        for folder in (plain, exported):
            model.save_pretrained(folder)
        data = {name: (exported / name).read_bytes() for name in (MODEL_FILE, WEIGHTS_FILE)}
        files = {name: {"bytes": len(content), "sha256": sha256(content)} for name, content in data.items()}
        (exported / EXPORT_FILE).write_text(json.dumps({"format": EXPORT_FORMAT, "files": files}))
        for name, folder in (("plain", plain), ("exported, hashed", exported)):
            seconds = [load_seconds(folder) for _ in range(rounds)]
            size = len(data[WEIGHTS_FILE]) / 1e6
            print(f"{name}: {statistics.median(seconds):.2f} s, {model.num_parameters():,} parameters, {size:.0f} MB")


def load_seconds(folder: Path) -> float:
    begin = time.perf_counter()
    WaveLiTFM.from_pretrained(folder)
    return time.perf_counter() - begin


def spec_of(card: Card) -> DatasetSpec:
    """Return a dataset with the statistics of the unit normal."""
    channels = (*card.state_channels, *card.constant_channels)
    values = {"mean": 0.0, "std": 1.0, "mean_delta": 0.0, "std_delta": 1.0}
    stats = {key: dict.fromkeys(channels, value) for key, value in values.items()}
    return DatasetSpec(card.name, card.state_channels, card.constant_channels, card.boundary, stats, card.grid, card.dt)


if __name__ == "__main__":
    main()
