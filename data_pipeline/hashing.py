"""Random numbers that are functions of where they are used: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

Written out here so that neither a library's version nor the platform moves a single number.
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def stream_key(*parts: int | str) -> np.uint64:
    """64 bits that stand for the parts; different parts, different streams."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def splitmix64(key: np.uint64, numbers: np.ndarray) -> np.ndarray:
    """Element `numbers` (n,) of the SplitMix64 stream that starts at `key`, (n,) uint64.

    Distinct numbers give distinct hashes, so sorting by hash is a permutation without ties, whatever the algorithm.
    """
    z = key + (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def nested_choice(keys: Sequence[tuple[int | str, ...]], count: int | None) -> list[int]:
    """The places of the `count` keys with the smallest hashes, ascending; None: all. Those of N are among N + 1's."""
    ranked = sorted(range(len(keys)), key=lambda place: stream_key(*keys[place]))
    return sorted(ranked[:count])


def uniform(key: np.uint64, numbers: np.ndarray) -> np.ndarray:
    """Hashes as numbers in [0, 1), (n,) float64."""
    return (splitmix64(key, numbers) >> np.uint64(11)) * 2.0**-53
