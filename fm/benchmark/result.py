"""What a benchmark found: a row for each dataset and variant, and the ceilings that it is compared with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median, quantiles
from typing import Any

from fm.benchmark.ceilings import Ceilings
from fm.benchmark.feeding import Fed
from fm.benchmark.floor import Floor
from fm.planning.tables import PAPER_STEPS
from fm.training.exercise import PHASES, StepSeconds

MIXTURE = "mixture"
NOISY = 0.2  # spread above which a figure says little


@dataclass(frozen=True)
class Work:
    """What a step is by count; for the mixture the mean at the recipe's sampling shares."""

    windows: float
    tokens: float  # token updates: windows x model steps x tokens of a frame
    flops: float  # of matrix products and convolutions, forward and backward
    moved_bytes: float  # by all other operations, none fused with another
    floor: Floor


@dataclass(frozen=True)
class Row:
    """A dataset, or the mixture, under a variant. Without `seconds` nothing was measured, and `reason` says why."""

    dataset: str
    variant: str
    dtype: str  # of the products: float32 or bfloat16
    grid: tuple[int, int] | None  # (H, W); None for the mixture
    work: Work
    seconds: StepSeconds | None  # medians
    spread: float = 0.0  # half the distance of the quartiles of the whole step, over its median
    steps: int = 0  # that count
    memory: float | None = None  # peak bytes on the GPU
    reason: str = ""

    def tokens_per_s(self) -> float | None:
        return self.work.tokens / self.seconds.whole if self.seconds else None

    def flops_per_s(self) -> float | None:
        return self.work.flops / self.seconds.whole if self.seconds else None

    def bytes_per_s(self) -> float | None:
        return self.work.moved_bytes / self.seconds.whole if self.seconds else None

    def hours(self) -> float | None:
        """Of a million steps."""
        return PAPER_STEPS * self.seconds.whole / 3600 if self.seconds else None

    def to_json(self, ceilings: Ceilings) -> dict[str, Any]:
        """The row with the keys that launch/README.md lists; null where nothing was measured."""
        flops, moved = self.flops_per_s(), self.bytes_per_s()
        milliseconds = {
            f"{'step' if phase == 'whole' else phase}_ms": 1e3 * getattr(self.seconds, phase) if self.seconds else None
            for phase in (*PHASES, "whole")
        }
        return {
            "dataset": self.dataset,
            "variant": self.variant,
            "dtype": self.dtype,
            "grid": self.grid,
            "windows": self.work.windows,
            "tokens": self.work.tokens,
            "flops": self.work.flops,
            "moved_bytes": self.work.moved_bytes,
            **milliseconds,
            "noise_percent": 100 * self.spread if self.seconds else None,
            "steps": self.steps,
            "tokens_per_s": self.tokens_per_s(),
            "tflops_per_s": flops / 1e12 if flops else None,
            "share_of_flops_ceiling": flops / ceilings.flops[self.dtype] if flops else None,
            "gb_per_s": moved / 1e9 if moved else None,
            "share_of_bandwidth_ceiling": moved / ceilings.bandwidth if moved else None,
            "peak_memory_gb": self.memory / 1e9 if self.memory else None,
            "floor_ms": 1e3 * self.work.floor.seconds,
            "floor_parts_ms": {name: 1e3 * seconds for name, seconds in asdict(self.work.floor).items()},
            "hours_per_million_steps": self.hours(),
            "reason": self.reason or None,
        }


@dataclass(frozen=True)
class Benchmark:
    """All of it."""

    recipe: str  # its file
    size: str  # full or mini
    machine: Mapping[str, Any]
    ceilings: Ceilings
    parameters: int
    shares: Mapping[str, float]  # of the draws, by dataset
    rows: tuple[Row, ...]
    feeding: tuple[Fed, ...] = ()
    pace: str = ""  # of the consumer that was fed
    profiles: tuple[str, ...] = ()  # files

    def warnings(self) -> list[str]:
        """What to keep in mind about the figures."""
        found = []
        load, cores = self.machine.get("load", 0.0), self.machine.get("cores", 1)
        if load > cores:
            found.append(f"a load of {load:.1f} on {cores} cores: others are at work on this machine")
        noisy = [row for row in self.rows if row.spread > NOISY]
        if noisy:
            worst = max(noisy, key=lambda row: row.spread)
            found.append(
                f"{len(noisy)} of {len(self.rows)} rows vary by more than {NOISY:.0%}, {worst.dataset} under "
                f"{worst.variant} by {worst.spread:.0%}: measure again when the machine is idle, or longer (--seconds)"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON."""
        rows = [row.to_json(self.ceilings) for row in self.rows]
        whole = asdict(self) | {"rows": rows, "warnings": self.warnings()}
        plain: dict[str, Any] = json.loads(json.dumps(whole))
        return plain


def medians(times: Sequence[StepSeconds]) -> StepSeconds:
    """Of each phase for itself."""
    return StepSeconds(**{name: median(getattr(one, name) for one in times) for name in (*PHASES, "whole")})


def spread(values: Sequence[float]) -> float:
    """Half the distance of the quartiles over the median; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle


def mean_of(parts: Sequence[Any], kind: Any, shares: Sequence[float]) -> Any:
    """A dataclass of numbers, or of such dataclasses, whose values are means at the shares."""

    def of(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], Floor):
            return mean_of(values, Floor, shares)
        return sum(share * value for share, value in zip(shares, values, strict=True))

    return kind(**{name: of(name) for name in [one.name for one in fields(kind)]})
