"""Moments of fields and of their one-frame changes, merged over files, as the Well's stats.yaml states them.

Population moments in float64 over the train split, per tensor component. The files' moments are merged as those of a
mixture, E[x^2] = sum_i w_i (var_i + mean_i^2), which is how the Well's own statistics are made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

STATISTICS = ("mean", "std", "rms", "mean_delta", "std_delta", "rms_delta")


@dataclass(frozen=True)
class Moments:
    """Number of values, mean and population variance; mean and variance have the shape (2,) * tensor order."""

    count: int
    mean: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, tensor_order: int) -> "Moments":
        """Moments over all axes but the last `tensor_order` ones."""
        axes = tuple(range(values.ndim - tensor_order))
        exact = values.astype(np.float64)
        count = int(np.prod([values.shape[axis] for axis in axes]))
        return cls(count, exact.mean(axis=axes), exact.var(axis=axes))


def merge(parts: Sequence[Moments]) -> Moments:
    """Moments of all the values behind `parts` together."""
    count = sum(part.count for part in parts)
    weights = [part.count / count for part in parts]
    mean = sum(weight * part.mean for weight, part in zip(weights, parts, strict=True))
    variance = sum(
        weight * (part.variance + (part.mean - mean) ** 2) for weight, part in zip(weights, parts, strict=True)
    )
    return Moments(count, np.asarray(mean), np.asarray(variance))


def field_moments(arrays: Mapping[str, np.ndarray], tensor_orders: Mapping[str, int]) -> dict[str, Moments]:
    """Moments of each array under its name and, for state fields, of its changes between frames under <name>_delta.

    arrays: state (n, T, X, Y) + (2,) * order, constant (X, Y) or (n, X, Y); a name not in `tensor_orders` is constant.
    """
    moments = {}
    for name, values in arrays.items():
        moments[name] = Moments.of(values, tensor_orders.get(name, 0))
        if name in tensor_orders:
            change = np.diff(values.astype(np.float64), axis=1)
            moments[f"{name}_delta"] = Moments.of(change, tensor_orders[name])
    return moments


def statistics(files: Sequence[Mapping[str, Moments]]) -> dict[str, dict[str, object]]:
    """The content of stats.yaml from the moments of all train files: statistic -> field -> number or nested list.

    Constant fields have mean, std and rms only.
    """
    merged = {key: merge([file[key] for file in files]) for key in files[0]}
    stats: dict[str, dict[str, object]] = {statistic: {} for statistic in STATISTICS}
    for key, moments in merged.items():
        name, suffix = (key.removesuffix("_delta"), "_delta") if key.endswith("_delta") else (key, "")
        stats[f"mean{suffix}"][name] = moments.mean.tolist()
        stats[f"std{suffix}"][name] = np.sqrt(moments.variance).tolist()
        stats[f"rms{suffix}"][name] = np.sqrt(moments.variance + moments.mean**2).tolist()
    return stats
