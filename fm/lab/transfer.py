"""Does training on datasets together help or hurt, and whom? A joint run beside runs of one dataset each.

They are compared at equal numbers of training windows of that dataset: the largest that both have reached. By then the
joint run has trained on windows of the other datasets as well; whether that helped is the ratio.
"""

import math
from dataclasses import dataclass

from data_pipeline.errors import UserError
from fm.lab.learning_curves import LearningCurve, TrainedRun

HELPS, HURTS = 0.97, 1.03  # joint VRMSE / bespoke VRMSE, below and above which the difference has a name
VERDICTS = ("helps", "equal", "hurts", "neither finite", "not comparable")


@dataclass(frozen=True, eq=False)
class Comparison:
    """One dataset in the joint run and in one of its own, after `windows` of its windows each."""

    dataset: str
    bespoke: TrainedRun
    windows: int | None  # None: the two have no number of windows in common
    joint_vrmse: float  # inf where a prediction was not finite, NaN where there is no common number
    bespoke_vrmse: float

    @property
    def ratio(self) -> float:
        """Joint over bespoke; NaN where neither is finite."""
        return self.joint_vrmse / self.bespoke_vrmse

    @property
    def verdict(self) -> str:
        """What training together does: one of VERDICTS."""
        if self.windows is None:
            return "not comparable"
        if math.isnan(self.ratio):
            return "neither finite"
        return "helps" if self.ratio < HELPS else "hurts" if self.ratio > HURTS else "equal"


def compare(joint: TrainedRun, bespoke: TrainedRun) -> Comparison:
    """The dataset of `bespoke` in both runs. UserError where the two do not compare."""
    dataset = _only_dataset(joint, bespoke)
    for key in ("windows", "protocol"):
        ours, theirs = getattr(joint.recipe.validation, key), getattr(bespoke.recipe.validation, key)
        if ours != theirs:
            raise UserError(
                f"transfer: expected the same validations, got validation.{key}={ours} in {joint.path} and {theirs} in "
                f"{bespoke.path}; train one of them again with the other's"
            )
    if joint.shards[dataset] != bespoke.shards[dataset]:
        raise UserError(
            f"transfer: expected the same {dataset} data, got shards with digests {joint.shards[dataset][:12]} in "
            f"{joint.path} and {bespoke.shards[dataset][:12]} in {bespoke.path}; train both on the same data.shards"
        )
    windows = _common(joint.curves.get(dataset), bespoke.curves.get(dataset))
    if windows is None:
        return Comparison(dataset, bespoke, None, math.nan, math.nan)
    return Comparison(dataset, bespoke, int(windows), *(run.curves[dataset].at(windows) for run in (joint, bespoke)))


def _only_dataset(joint: TrainedRun, bespoke: TrainedRun) -> str:
    if len(bespoke.shards) != 1:
        raise UserError(
            f"transfer: expected runs of one dataset after the first, got {bespoke.path} of "
            f"{', '.join(sorted(bespoke.shards))}; make them with 'data.datasets=[NAME]' run.name=bespoke_NAME"
        )
    (dataset,) = bespoke.shards
    if dataset not in joint.shards:
        raise UserError(
            f"transfer: expected a run of one of the datasets of {joint.path} ({', '.join(sorted(joint.shards))}), got "
            f"{bespoke.path} of {dataset}; leave it out"
        )
    return dataset


def _common(joint: LearningCurve | None, bespoke: LearningCurve | None) -> float | None:
    """The largest number of windows that both curves reach, None where one ends before the other begins."""
    if joint is None or bespoke is None:
        return None
    reached = min(joint.windows[-1], bespoke.windows[-1])
    return float(reached) if reached >= max(joint.windows[0], bespoke.windows[0]) else None
