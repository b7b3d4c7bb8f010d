"""A diagnosis in words: what the numbers say, each sentence by a threshold that it names or that stands here."""

from dataclasses import dataclass

import numpy as np

from fm.diagnosis.conservation import Drift
from fm.diagnosis.growth import UNRELATED, mean_factor
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
        return "The error is too large from the start for a law of growth to be fitted."
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
        f"Along the true trajectory a small error grows by {factor(mean_factor(stability.along_truth))} a step in the "
        f"model, along the model's own rollout by {factor(mean_factor(stability.along_rollout))}"
    )
    if stability.true_flow is None:
        text += "; how fast the true flow lets it grow is not known here."
    else:
        first, later = (
            [mean_factor(part, steps) for part in (stability.along_truth, stability.true_flow)] for steps in (0, middle)
        )
        text += f"; the true flow lets it grow by {factor(first[1])} (twins): {_compared(*first)}."
        if _compared(*later) != _compared(*first):
            text += f" In the second half it is {factor(later[0])} against {factor(later[1])}: {_compared(*later)}."
    largest = np.concatenate([stability.largest_along_truth, stability.largest_along_rollout])
    return f"{text} In its worst direction a single step amplifies by up to {number(float(largest.max()))}."


def _compared(model: float | None, flow: float | None) -> str:
    if model is None or flow is None or model > flow * (1 + ALIKE):
        return "the model is less stable than the physics"
    if model < flow / (1 + ALIKE):
        return "the model damps what the physics would let grow"
    return "the model is as stable as the physics"


def _scales(diagnosis: Diagnosis) -> str:
    bands = diagnosis.bands
    truth, prediction, _ = bands.level(1)
    ratio = np.median(prediction / np.where(truth > 0, truth, np.nan), axis=0)
    text = _lost_first(diagnosis)
    last = float(ratio[-1])
    if last > SCALE or not np.isfinite(last):
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
    steps = {}
    for level in names:
        truth, _, error = diagnosis.bands.level(level)
        lost = np.median(error / np.where(truth > 0, truth, np.nan), axis=0) > 1
        steps[level] = int(lost.argmax()) + 1 if lost.any() else None
    told = [f"{names[level]} from step {step}" if step else f"{names[level]} never" for level, step in steps.items()]
    if steps[1] == steps[0] is None:
        return "At every scale the error stays below the truth's own energy."
    return f"The error outweighs the truth's own energy in {told[0]}, in {told[1]}."


def _conservation(drifts: tuple[Drift, ...]) -> str:
    broken, kept = [], []
    for drift in drifts:
        floor, worst = (float(np.median(np.abs(part).max(axis=1))) for part in (drift.truth, drift.prediction))
        if worst <= max(KEPT, DRIFT_FLOOR * floor):
            kept.append(f"the {drift.label}")
        else:
            verb = "is" if drift.kind == "divergence" else "drifts by"
            broken.append(f"the {drift.label} {verb} up to {number(worst)} {drift.unit} (truth: {number(floor)})")
    if not broken:
        return f"The rollout keeps {_listed(kept)}, as the equations do."
    text = f"The rollout does not keep what the equations do: {_listed(broken)}."
    return f"{text} It keeps {_listed(kept)}." if kept else text


def _floors(diagnosis: Diagnosis) -> str:
    floors = diagnosis.floors
    text = f"The one-step error, VRMSE {number(floors.model)}, is {number(floors.model / floors.pointwise)} times"
    text += f" that of the best linear map of each point's own channels, {number(floors.pointwise)}"
    if floors.model > floors.pointwise:
        text += ": one step of this flow is simpler than the model makes it"
    return f"{text}. Persistence has {number(floors.persistence)}."


def _last_crossing(condition: np.ndarray) -> int:
    """The step, from 1, from which a condition holds to the end."""
    false = np.flatnonzero(~condition)
    return int(false[-1]) + 2 if false.size else 1


def _at(steps: list[int]) -> str:
    return f"at step {_listed([str(step) for step in sorted(set(steps))])}"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
