"""The least time that a step could take: a roofline over what it must compute and move.

Each matrix product and convolution of forward and backward pass takes the longer of its arithmetic, at the ceiling of
the dtype in which it is taken, and of reading its operands and writing its results once. Everything else in the passes
is free, as if fused with its neighbours. Clip, AdamW and averaged weights take what they read and write.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fm.benchmark.ceilings import Ceilings
from fm.cost import Product
from fm.planning.gpus import STATE_TOUCHES
from fm.planning.workload import FLOAT_BYTES

KINDS = ("linear", "attention", "depthwise")  # fm/cost.py's


@dataclass(frozen=True)
class Floor:
    """Seconds of each part, and of the whole how many are memory traffic rather than arithmetic."""

    linear: float
    attention: float
    depthwise: float
    optimiser: float
    traffic: float

    @property
    def seconds(self) -> float:
        return self.linear + self.attention + self.depthwise + self.optimiser


def floor(products: Sequence[Product], parameters: int, ceilings: Ceilings) -> Floor:
    """The floor of a step with these products that moves so many parameters."""
    parts, traffic = dict.fromkeys(KINDS, 0.0), 0.0
    for one in products:
        seconds = ceilings.seconds(one.flops, one.bytes, one.dtype)
        parts[one.kind] += seconds
        traffic += seconds if seconds > one.flops / ceilings.rate(one.dtype) else 0.0
    optimiser = STATE_TOUCHES * FLOAT_BYTES * parameters / ceilings.bandwidth
    return Floor(**parts, optimiser=optimiser, traffic=traffic + optimiser)
