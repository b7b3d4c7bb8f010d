"""A diagnosis in words: what the numbers say, each sentence by a threshold that it names or that stands here."""

from dataclasses import dataclass

import numpy as np

from fm.diagnosis.conservation import Drift
from fm.diagnosis.growth import UNRELATED, mean_factor, why_unfitted
from fm.diagnosis.result import Diagnosis

ALIKE = 0.05  # growth factors this close are called the same, and one this close to 1 neither grows nor decays
SCALE = 2.0  # energy of a band over the truth's, or under it, from which the difference is worth a word
KEPT = 0.01  # a drift below this is kept, and so is one below DRIFT_FLOOR times the truth's own
DRIFT_FLOOR = 3.0


@dataclass(frozen=True)
class Finding:
    """One sentence or two, and what they are about."""

    subject: str
    text: str


def findings(diagnosis: Diagnosis) -> list[Finding]:
    """What the page begins with, in the order of its pictures."""
    found = [
        Finding("Failure", _failure(diagnosis)),
        Finding("Error growth", _recurrence(diagnosis)),
        Finding("Stability", _stability(diagnosis)),
        Finding("Scales", _scales(diagnosis)),
        Finding("Conservation", _conservation(diagnosis.drifts)) if diagnosis.drifts else None,
        Finding("One step", _floors(diagnosis)),
    ]
    return [finding for finding in found if finding is not None]


def number(value: float | None) -> str:
    """A number to three digits, as prose has it."""
    if value is None or not np.isfinite(value):
        return "none" if value is None else "not finite"
    if value and not 1e-3 <= abs(value) < 1e7:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def factor(value: float | None) -> str:
    """A growth factor, whose third digit after the point still matters over a hundred steps."""
    return "not finite" if value is None or not np.isfinite(value) else f"{value:.3f}"


def _failure(diagnosis: Diagnosis) -> str:
    growth, count = diagnosis.growth, len(diagnosis.trajectories)
    failed = [step for step in growth.failed if step is not None]
    broken = [step for step in growth.not_finite if step is not None]
    if not failed:
        last = float(np.median(growth.vrmse[:, -1]))
        return (
            f"All {count} rollouts stay better than the mean field (VRMSE 1) over {diagnosis.num_steps} steps; at the "
            f"last their median VRMSE is {number(last)}."
        )
    text = f"{len(failed)} of {count} rollouts become worse than the mean field (VRMSE above 1), {_at(failed)}."
    if broken:
        return f"{text} {len(broken)} stop being finite, {_at(broken)}."
    error = np.median(growth.rollout, axis=0)
    if error[-1] > 1.1 * UNRELATED:
        passed = int((error > UNRELATED).argmax()) + 1
        return (
            f"{text} The median error passes that of an unrelated state (√2) at step {passed} and ends at "
            f"{number(error[-1])}: the rollouts do not only lose the trajectory, they leave the range of the data."
        )
    return f"{text} The median error ends at {number(error[-1])}; two unrelated states are √2 apart."


def _recurrence(diagnosis: Diagnosis) -> str:
    fit = diagnosis.growth.recurrence
    if fit is None:
        reason = why_unfitted(diagnosis.growth.rollout, diagnosis.growth.one_step)
        return f"No law of growth can be fitted: {reason}."
    steps = sorted(set(fit.last_steps))
    first = f"the first {steps[0]}" if len(steps) == 1 else f"the first {steps[0]} to {steps[-1]}"
    law = (
        f"Over {first} steps the error follows e(k+1) = L e(k) + ε with one-step errors ε of {number(fit.epsilon)} and "
        f"L = {factor(fit.factor)} where errors add up, {factor(fit.independent_factor)} where they are independent"
    )
    if fit.factor > 1 + ALIKE:
        doubling = number(fit.doubling_steps)
        return f"{law}: a step amplifies what it is given, and the error doubles every {doubling} steps."
    if fit.independent_factor < 1 - ALIKE:
        return f"{law}: a step damps what it is given, and the error is mostly that of the last steps."
    if fit.independent_factor > 1 + ALIKE:
        return f"{law}: new errors pile up, and a step amplifies them as far as they are independent."
    return f"{law}: one-step errors pile up, with little help from amplification."


def _stability(diagnosis: Diagnosis) -> str:
    stability, middle = diagnosis.stability, diagnosis.num_steps // 2
    text = (
        f"Along the true trajectory a small error grows by {_growth(stability.along_truth, ' a step')} in the model, "
        f"along the model's own rollout by {_growth(stability.along_rollout)}"
    )
    if stability.true_flow is None or mean_factor(stability.true_flow) is None:
        text += "; how fast the true flow lets it grow is not known here."
    else:
        first, later = (
            (mean_factor(stability.along_truth, steps), mean_factor(stability.true_flow, steps) or 0.0)
            for steps in (0, middle)
        )
        text += f"; the true flow lets it grow by {factor(first[1])} (twins): {_compared(*first)}."
        if _compared(*later) != _compared(*first):
            text += f" In the second half it is {factor(later[0])} against {factor(later[1])}: {_compared(*later)}."
    largest = float(np.concatenate([stability.largest_along_truth, stability.largest_along_rollout]).max())
    most = f"up to {number(largest)}" if np.isfinite(largest) else "a factor that is not finite"
    return f"{text} In its worst direction a single step amplifies by {most}."


def _growth(factors: np.ndarray, unit: str = "") -> str:
    """The mean growth factor, or from where on there is none: a mean over the steps before would flatter."""
    mean = mean_factor(factors)
    if mean is not None:
        return f"{factor(mean)}{unit}"
    return f"factors that are not finite from step {_first(~np.isfinite(factors))} on"


def _compared(model: float | None, flow: float) -> str:
    if model is None or model > flow * (1 + ALIKE):
        return "the model is less stable than the physics"
    if model < flow / (1 + ALIKE):
        return "the model damps what the physics would let grow"
    return "the model is as stable as the physics"


def _scales(diagnosis: Diagnosis) -> str:
    bands = diagnosis.bands
    truth, prediction, _ = bands.level(1)
    ratio = _median_ratio(prediction, truth)
    text = _lost_first(diagnosis)
    last = float(ratio[-1])
    if not np.isfinite(last) and not np.isfinite(prediction[:, -1]).all():
        step = _first(~np.isfinite(prediction))
        return f"{text} The finest wavelet details are not finite from step {step} on."
    if not np.isfinite(last) or not truth[:, -1].any():
        return f"{text} The truth ends without any energy in the finest wavelet details."
    if last > SCALE:
        step = _last_crossing(~(ratio <= SCALE))
        share = float(np.median(prediction[:, -1] / bands.prediction[:, -1].sum(-1)))
        return (
            f"{text} High-frequency energy grows: the finest wavelet details hold more than twice the truth's energy "
            f"from step {step} on, {number(last)} times at the last step, {number(100 * share)}% of all its energy."
        )
    if last < 1 / SCALE:
        step = _last_crossing(ratio < 1 / SCALE)
        return (
            f"{text} High-frequency energy is lost: the finest wavelet details hold less than half of the truth's "
            f"energy from step {step} on, {number(last)} times at the last step."
        )
    return f"{text} The finest wavelet details end with {number(last)} times the truth's energy."


def _lost_first(diagnosis: Diagnosis) -> str:
    """At which step the error of the finest and of the coarsest band passes what the truth has there."""
    names = {1: "fine details (level 1)", 0: "the coarse part"}
    steps, errors = {}, []
    for level in names:
        truth, _, error = diagnosis.bands.level(level)
        steps[level] = _first(~(_median_ratio(error, truth) <= 1))
        errors.append(error)
    told = [f"{names[level]} from step {step}" if step else f"{names[level]} never" for level, step in steps.items()]
    broken = _first(~np.isfinite(np.stack(errors)))
    if steps[1] == steps[0] == broken is None:
        return "At every scale the error stays below the truth's own energy."
    ending = f"; it is not finite from step {broken} on" if broken else ""
    return f"The error outweighs the truth's own energy in {told[0]}, in {told[1]}{ending}."


def _median_ratio(energy: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Medians (K,) over trajectories of energy over the truth's, (R, K) each; nothing over nothing is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.median(np.where(energy == 0, 0.0, energy / truth), axis=0)


def _conservation(drifts: tuple[Drift, ...]) -> str:
    broken: list[str] = []
    kept: list[str] = []
    for drift in drifts:
        floor, worst = (float(np.median(np.abs(part).max(axis=1))) for part in (drift.truth, drift.prediction))
        if worst <= max(KEPT, DRIFT_FLOOR * floor):
            kept.append(f"the {drift.label}")
        elif not np.isfinite(worst):
            broken.append(
                f"the {drift.label} is not finite from step {_first(~np.isfinite(drift.prediction[:, 1:]))} on"
            )
        else:
            verb = "is" if drift.kind == "divergence" else "drifts by"
            broken.append(f"the {drift.label} {verb} up to {number(worst)} {drift.unit} (truth: {number(floor)})")
    if not broken:
        return f"The rollout keeps {_listed(kept)}, as the equations do."
    text = f"The rollout does not keep what the equations do: {_listed(broken)}."
    return f"{text} It keeps {_listed(kept)}." if kept else text


def _floors(diagnosis: Diagnosis) -> str:
    floors = diagnosis.floors
    text = f"The one-step error, VRMSE {number(floors.model)}, is"
    ratio = floors.model / floors.pointwise if floors.pointwise else np.inf
    text += f" {number(ratio)} times that" if np.isfinite(ratio) else " to be compared with that"
    text += f" of the best linear map of each point's own channels, {number(floors.pointwise)}"
    if not floors.model <= floors.pointwise:
        text += ": one step of this flow is simpler than the model makes it"
    return f"{text}. Persistence has {number(floors.persistence)}."


def _first(condition: np.ndarray) -> int | None:
    """The first step, from 1, at which a condition (..., K) holds anywhere; None where it never does."""
    places = np.flatnonzero(condition.reshape(-1, condition.shape[-1]).any(axis=0))
    return int(places[0]) + 1 if places.size else None


def _last_crossing(condition: np.ndarray) -> int:
    """The step, from 1, from which a condition holds to the end."""
    false = np.flatnonzero(~condition)
    return int(false[-1]) + 2 if false.size else 1


def _at(steps: list[int]) -> str:
    return f"at step {_listed([str(step) for step in sorted(set(steps))])}"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
