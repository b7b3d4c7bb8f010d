"""What is wrong with a whole split: channels that hold nothing or the same, statistics that are another's.

Also keeps the report short: a fault that many trajectories share becomes one finding.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from data_pipeline.cards.registry import Card, Channel
from data_pipeline.shards.audit import Sample
from data_pipeline.shards.findings import KINDS, SKIPPABLE, Finding, frame_ranges
from data_pipeline.well.stats import Stats

MAX_LISTED = 5  # trajectories listed one by one for a kind and channel; more become one finding of the split
WARN_OFF = 0.1  # stats.yaml: mean off by so many std, or std by this share; few trajectories subsampled reach 0.06
ERROR_OFF = 1.0  # mean off by a whole std, or std by a factor of 2


def merge(samples: Sequence[Sample]) -> Sample:
    """The summary of all trajectories of several summaries, which have the same channels."""
    total = samples[0]
    for one in samples[1:]:
        count, mean, variance = _pooled((total.count, total.mean, total.variance), (one.count, one.mean, one.variance))
        delta_count, delta_mean, delta_variance = _pooled(
            (total.delta_count, total.delta_mean, total.delta_variance),
            (one.delta_count, one.delta_mean, one.delta_variance),
        )
        total = Sample(
            lowest=tuple(map(min, total.lowest, one.lowest)),
            highest=tuple(map(max, total.highest, one.highest)),
            equal=tuple(pair for pair in total.equal if pair in one.equal),
            count=count,
            mean=mean,
            variance=variance,
            delta_count=delta_count,
            delta_mean=delta_mean,
            delta_variance=delta_variance,
        )
    return total


_Moments = tuple[int, tuple[float, ...], tuple[float, ...]]


def _pooled(first: _Moments, second: _Moments) -> _Moments:
    """Count, mean and variance of two sets together (Chan, Golub and LeVeque 1979)."""
    total = first[0] + second[0]
    if not first[0] or not second[0]:
        return first if first[0] else second
    share = second[0] / total
    shift = np.subtract(second[1], first[1])
    mean = np.add(first[1], shift * share)
    variance = np.multiply(first[2], 1 - share) + np.multiply(second[2], share) + shift**2 * (share * (1 - share))
    return total, tuple(map(float, mean)), tuple(map(float, variance))


def split_findings(
    card: Card,
    channels: Mapping[str, Channel],
    sample: Sample,
    lengths: Sequence[int],
    grid: tuple[int, int],
    stats: Stats | None,
) -> list[Finding]:
    """Findings about a whole split.

    channels: the registry's, for what is known to be the same. lengths: frames of each trajectory. stats: those that
    claim to be of these trajectories, None where there is no such claim to check.
    """
    found = [*_constant_channels(card, sample), *_duplicated_channels(card, channels, sample)]
    if stats is not None and sample.count:
        found += _stats_disagree(card, sample, stats, _missing(card, grid, len(lengths)))
    if len(set(lengths)) > 1:
        counts = ", ".join(f"{lengths.count(length)} of {length}" for length in sorted(set(lengths)))
        found.append(_of_split("mixed_lengths", "note", None, f"frames of the trajectories: {counts}"))
    if grid != card.grid:
        detail = f"{grid[0]}x{grid[1]}, the card says {card.grid[0]}x{card.grid[1]}"
        found.append(_of_split("grid", "note", None, detail))
    return found


def _constant_channels(card: Card, sample: Sample) -> list[Finding]:
    found = []
    for number, name in enumerate(card.state_channels + card.constant_channels):
        if sample.lowest[number] == sample.highest[number]:
            severity = "warning" if name in card.state_channels else "note"
            detail = f"{sample.lowest[number]:g} at every point of every frame"
            found.append(_of_split("constant_channel", severity, name, detail))
    return found


def _duplicated_channels(card: Card, channels: Mapping[str, Channel], sample: Sample) -> list[Finding]:
    names = card.state_channels + card.constant_channels
    found = []
    for a, b in sample.equal:
        if sample.lowest[a] >= sample.highest[a]:  # two constant channels are reported as such
            continue
        first, second = names[a], names[b]
        known = first == channels[second].duplicate_of or second == channels[first].duplicate_of
        detail = f"equals {first} at every point of every frame" + (", as channels.yaml says" if known else "")
        found.append(_of_split("duplicated_channel", "note" if known else "warning", second, detail))
    return found


def _missing(card: Card, grid: tuple[int, int], num_trajectories: int) -> int:
    """How many trajectories of the published training split, which stats.yaml describes, are not there."""
    published = sum(trajectories for trajectories, _ in card.train) if grid == card.grid else 0
    return max(0, published - num_trajectories)


def _stats_disagree(card: Card, sample: Sample, stats: Stats, missing: int) -> list[Finding]:
    """One finding for each channel whose mean or std, or those of its change, are not those of the subsample.

    It is no error where trajectories are missing (`download --first-only`): the statistics are of all of them.
    """
    found = []
    moments = [("", sample.mean, sample.variance)]
    if sample.delta_count:
        moments.append(("_delta", sample.delta_mean, sample.delta_variance))
    for number, name in enumerate(card.state_channels):
        worst, details = 0.0, []
        for suffix, means, variances in moments:
            mean, std = means[number], float(np.sqrt(variances[number]))
            stated_mean, stated_std = stats["mean" + suffix][name], stats["std" + suffix][name]
            off = _distance(mean, std, stated_mean, stated_std)
            if off > WARN_OFF:
                details.append(
                    f"mean{suffix} {stated_mean:.4g} and std{suffix} {stated_std:.4g} stated, "
                    f"{mean:.4g} and {std:.4g} in the data"
                )
            worst = max(worst, off)
        if details:
            severity = "error" if worst > ERROR_OFF and not missing else "warning"
            detail = "; ".join(details)
            if missing:
                detail += f" ({missing} of the published trajectories are not here, which may be why)"
            found.append(_of_split("stats_disagree", severity, name, detail))
    return found


def _distance(mean: float, std: float, stated_mean: float, stated_std: float) -> float:
    """How far stated moments are from those of the data: the larger of shift / std and of the factor of the std - 1."""
    tiny = 1e-6 * max(abs(mean), abs(stated_mean)) + 1e-30  # what rounding makes of the std of a constant
    smaller, larger = sorted((std + tiny, stated_std + tiny))
    return max(abs(mean - stated_mean) / larger, larger / smaller - 1)


def condense(findings: Sequence[Finding], num_trajectories: int) -> list[Finding]:
    """The same report, shorter and in the order of KINDS: one finding of the split for a fault of many trajectories.

    Kinds whose windows can be left out keep a finding for each trajectory. Channels that are constant in the whole
    split are not told once more to have no variance.
    """
    constant = {finding.channel for finding in findings if finding.kind == "constant_channel"}
    kept = [one for one in findings if one.kind != "zero_variance" or one.channel not in constant]
    order = list(KINDS)
    kept.sort(key=lambda one: (order.index(one.kind), one.channel or "", one.severity))
    short: list[Finding] = []
    for (kind, channel, severity), group in groupby(kept, key=lambda one: (one.kind, one.channel, one.severity)):
        members = list(group)
        if kind in SKIPPABLE or len(members) <= MAX_LISTED:
            short += members
            continue
        frames = sorted({frame for one in members for first, stop in one.frames for frame in range(first, stop)})
        detail = f"in {len(members)} of {num_trajectories} trajectories; the first: {members[0].detail}"
        short.append(Finding(kind, severity, "", None, channel, frame_ranges(frames), detail))
    return short


def _of_split(kind: str, severity: str, channel: str | None, detail: str) -> Finding:
    return Finding(kind, severity, "", None, channel, (), detail)
