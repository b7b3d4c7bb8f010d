"""Random numbers that are functions of their place: hashes of a key and a number, instead of a generator's state.

The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). It is written out here so that no version of a library
and no platform changes a number.
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def stream_key(*parts: int | str) -> np.uint64:
    """Return a 64-bit key for `parts`. Different parts give different streams of random numbers."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def splitmix64(key: np.uint64, numbers: np.ndarray) -> np.ndarray:
    """Return elements `numbers` (n,) of the SplitMix64 stream that starts at `key`, (n,) uint64.

    Distinct numbers give distinct hashes. Sorting by hash is therefore a permutation without ties, and every sorting
    algorithm gives the same one.
    """
    z = key + (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(key: np.uint64, numbers: np.ndarray) -> np.ndarray:
    """Return the hashes of `numbers` (n,) as numbers in [0, 1), (n,) float64."""
    return (splitmix64(key, numbers) >> np.uint64(11)) * 2.0**-53


def nested_choice(keys: Sequence[tuple[int | str, ...]], count: int | None) -> list[int]:
    """Return the places of the `count` keys with the smallest hashes, ascending; of all keys if None.

    The choices are nested: the keys chosen for N are also chosen for N + 1.
    """
    ranked = sorted(range(len(keys)), key=lambda place: stream_key(*keys[place]))
    return sorted(ranked[:count])
