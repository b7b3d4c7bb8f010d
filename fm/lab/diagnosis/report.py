"""The report of a diagnosis: the findings in words, the key numbers, and the page with the figures.

A sentence follows from the numbers by a threshold that it names or that stands here.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_pipeline.files import write_whole
from data_pipeline.tables import Table, listed
from fm.evaluation.page import Facts, PageTable, Picture, Section, render_page
from fm.evaluation.plots import encode, rasterize
from fm.lab.diagnosis.figures import DPI, draw, draw_sheet, figure_names
from fm.lab.diagnosis.growth import UNRELATED, Stability, mean_factor, why_unfitted
from fm.lab.diagnosis.quantities import Bands, Diagnosis, Drift, Floors

ALIKE = 0.05  # growth factors this close are equal, and one this close to 1 neither grows nor decays
SCALE = 2.0  # energy of a band over the truth's, or under it, from which the difference is reported
KEPT = 0.01  # a drift below this is none, and so is one below DRIFT_FLOOR times the truth's own
DRIFT_FLOOR = 3.0
ZOOM = 0.6  # page pixels to a pixel of a figure
TITLES = {
    "growth": "Error growth",
    "stability": "What becomes of a small error",
    "spectra": "Power spectra",
    "scales": "Error by scale",
    "conservation": "Conserved quantities",
    "floors": "One step, beside what is simpler",
}
CAPTIONS = {
    "growth": "Left: root mean square error of the normalized state, one line a trajectory. Dots: error of one step "
    "from the truth. Dashed: the recurrence e(k+1) = L e(k) + ε(k) with these ε, fitted up to the step that enters the "
    "shaded band, half way to two unrelated states (√2). Right: the score; the dot is the first step above 1.",
    "stability": "Left: size of one small difference, carried by the model's Jacobians along the true trajectory and "
    "along the model's own rollout, and by the true flow between two simulations whose starts differ by it. Right: "
    "largest singular value of the Jacobian of one step, the most that a step can amplify, for the first trajectory.",
    "spectra": "Radially averaged power, mean over trajectories and normalized channels.",
    "scales": "Wavelet subbands (bior4.4), median over trajectories. Left: error relative to the truth in the band. "
    "Right: energy of the prediction relative to the truth's. Level 1 is the finest.",
    "conservation": "Quantities that the equations conserve, one line a trajectory. The truth's own line is the floor "
    "of stored frames and centered differences.",
    "floors": "Median over the same windows of the test split. The pointwise map predicts a grid point from the same "
    "point's channels, by one matrix for all points that is fitted to the train split.",
}


def write_diagnosis(diagnosis: Diagnosis, out: Path) -> Path:
    """Write <out>/<dataset>.{json,png,html}, print findings and key numbers, and return the HTML file's path."""
    found = findings(diagnosis)
    numbers = json.dumps({**diagnosis.to_json(), "findings": found}, indent=1, allow_nan=False, ensure_ascii=False)
    html = out / f"{diagnosis.dataset}.html"
    write_whole(html.with_suffix(".json"), f"{numbers}\n".encode())
    write_whole(html.with_suffix(".png"), encode(rasterize(draw_sheet(diagnosis), DPI)))
    write_whole(html, page(diagnosis, found).encode())
    print("\n".join(f"{subject}: {text}" for subject, text in found.items()), end="\n\n")
    rows = key_numbers(diagnosis)
    width = max(map(len, rows))
    print("\n".join(f"{quantity:<{width}}  {value}" for quantity, value in rows.items()), end="\n\n")
    print(f"diagnosis: {html}")
    return html


def page(diagnosis: Diagnosis, found: Mapping[str, str]) -> str:
    """Return the HTML page, one file that needs no other."""
    told = [(key, str(value)) for key, value in diagnosis.origin.items()]
    told.append(("test trajectories", f"{', '.join(map(str, diagnosis.trajectories))}, from their first frame"))
    dt = "uneven length" if diagnosis.dt is None else f"{diagnosis.dt:g}"
    told.append(("length", f"{diagnosis.num_steps} steps of {dt}"))
    sections = [Section("findings", "Findings", [Facts(list(found.items()))])]
    for name in figure_names(diagnosis):
        image = encode(rasterize(draw(name, diagnosis), DPI))
        picture = Picture(image, f"{TITLES[name]} of {diagnosis.dataset}", CAPTIONS[name], zoom=ZOOM)
        sections.append(Section(name, TITLES[name], [picture]))
    numbers = Table("", ["quantity", "value"], list(key_numbers(diagnosis).items()))
    sections.append(Section("numbers", "Numbers", [PageTable(numbers, "The numbers behind the findings.")]))
    return render_page(f"{diagnosis.dataset}: rollouts diagnosed", [Facts(told)], sections)


def key_numbers(diagnosis: Diagnosis) -> dict[str, str]:
    """Return the numbers behind the findings by their names."""
    growth, stability, floors = diagnosis.growth, diagnosis.stability, diagnosis.floors
    rows = {}
    if (fit := growth.recurrence) is not None:
        rows["one-step error ε, rms of normalized states"] = number(fit.epsilon)
        rows["growth factor L, where errors add up"] = factor(fit.factor)
        rows["growth factor L, where errors are independent"] = factor(fit.independent_factor)
        rows["smallest L that bounds every step of the fit"] = factor(fit.bound)
        rows["doubling time, steps"] = number(fit.doubling_steps)
    rows["first step with VRMSE above 1"] = ", ".join(str(step or "none") for step in growth.failed)
    rows["first step that is not finite"] = ", ".join(str(step or "none") for step in growth.not_finite)
    for name, part in (
        ("model along the truth", stability.along_truth),
        ("model along its rollout", stability.along_rollout),
        ("true flow, twins", stability.true_flow),
    ):
        if part is not None:
            both = [factor(mean_factor(part, first)) for first in (0, diagnosis.num_steps // 2)]
            rows[f"growth of a small error a step, {name}, all steps / second half"] = " / ".join(both)
    largest = "largest singular value of a step"
    rows[f"{largest}, along the truth, median"] = number(float(np.median(stability.largest_along_truth)))
    rows[f"{largest}, along the rollout, median"] = number(float(np.median(stability.largest_along_rollout)))
    rows["one-step VRMSE, model"] = number(floors.model)
    rows["one-step VRMSE, best pointwise linear map"] = number(floors.pointwise)
    rows["one-step VRMSE, persistence"] = number(floors.persistence)
    return rows


def findings(diagnosis: Diagnosis) -> dict[str, str]:
    """Return the sentences that the page begins with, by subject, in the order of its figures."""
    found = {
        "Failure": _failure(diagnosis),
        "Error growth": _recurrence(diagnosis),
        "Stability": _stability(diagnosis.stability, diagnosis.num_steps // 2),
        "Scales": f"{_lost_first(diagnosis.bands)} {_fine_scales(diagnosis.bands)}",
        "Conservation": _conservation(diagnosis.drifts),
        "One step": _one_step(diagnosis.floors),
    }
    return {subject: text for subject, text in found.items() if text}


def number(value: float | None) -> str:
    """Format a number for prose, to three digits."""
    if value is None or not np.isfinite(value):
        return "none" if value is None else "not finite"
    if value and not 1e-3 <= abs(value) < 1e7:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def factor(value: float | None) -> str:
    """Format a growth factor to three decimals, since the third still matters over a hundred steps."""
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


def _stability(stability: Stability, middle: int) -> str:
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
    """Return the mean growth factor, or the step from which there is none: a mean over earlier steps would flatter."""
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


def _lost_first(bands: Bands) -> str:
    """Report the step at which the error of the finest and of the coarsest band exceeds the truth's energy there."""
    names = {1: "fine details (level 1)", 0: "the coarse part"}
    steps, errors = {}, []
    for level in names:
        truth, _, error = bands.level(level)
        steps[level] = _first(~(_median_ratio(error, truth) <= 1))
        errors.append(error)
    told = [f"{names[level]} from step {step}" if step else f"{names[level]} never" for level, step in steps.items()]
    broken = _first(~np.isfinite(np.stack(errors)))
    if steps[1] == steps[0] == broken is None:
        return "At every scale the error stays below the truth's own energy."
    ending = f"; it is not finite from step {broken} on" if broken else ""
    return f"The error outweighs the truth's own energy in {told[0]}, in {told[1]}{ending}."


def _fine_scales(bands: Bands) -> str:
    """Report whether the finest wavelet details gain or lose energy."""
    truth, prediction, _ = bands.level(1)
    ratio = _median_ratio(prediction, truth)
    last = float(ratio[-1])
    if not np.isfinite(last) and not np.isfinite(prediction[:, -1]).all():
        return f"The finest wavelet details are not finite from step {_first(~np.isfinite(prediction))} on."
    if not np.isfinite(last) or not truth[:, -1].any():
        return "The truth ends without any energy in the finest wavelet details."
    if last > SCALE:
        share = float(np.median(prediction[:, -1] / bands.prediction[:, -1].sum(-1)))
        return (
            "High-frequency energy grows: the finest wavelet details hold more than twice the truth's energy from step "
            f"{_last_crossing(~(ratio <= SCALE))} on, {number(last)} times at the last step, {number(100 * share)}% of "
            "all its energy."
        )
    if last < 1 / SCALE:
        return (
            "High-frequency energy is lost: the finest wavelet details hold less than half of the truth's energy from "
            f"step {_last_crossing(ratio < 1 / SCALE)} on, {number(last)} times at the last step."
        )
    return f"The finest wavelet details end with {number(last)} times the truth's energy."


def _median_ratio(energy: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the median (K,) over trajectories of energy over the truth's, (R, K) each, with 0 / 0 = 0."""
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
            step = _first(~np.isfinite(drift.prediction[:, 1:]))
            broken.append(f"the {drift.label} is not finite from step {step} on")
        else:
            verb = "is" if drift.kind == "divergence" else "drifts by"
            broken.append(f"the {drift.label} {verb} up to {number(worst)} {drift.unit} (truth: {number(floor)})")
    if not broken:
        return f"The rollout keeps {listed(kept)}, as the equations do." if kept else ""
    text = f"The rollout does not keep what the equations do: {listed(broken)}."
    return f"{text} It keeps {listed(kept)}." if kept else text


def _one_step(floors: Floors) -> str:
    text = f"The one-step error, VRMSE {number(floors.model)}, is"
    ratio = floors.model / floors.pointwise if floors.pointwise else np.inf
    text += f" {number(ratio)} times that" if np.isfinite(ratio) else " to be compared with that"
    text += f" of the best linear map of each point's own channels, {number(floors.pointwise)}"
    if not floors.model <= floors.pointwise:
        text += ": one step of this flow is simpler than the model makes it"
    return f"{text}. Persistence has {number(floors.persistence)}."


def _first(condition: np.ndarray) -> int | None:
    """Return the first step, counted from 1, at which a condition (..., K) holds anywhere, or None."""
    places = np.flatnonzero(condition.reshape(-1, condition.shape[-1]).any(axis=0))
    return int(places[0]) + 1 if places.size else None


def _last_crossing(condition: np.ndarray) -> int:
    """Return the step, counted from 1, from which a condition (K,) holds to the end."""
    false = np.flatnonzero(~condition)
    return int(false[-1]) + 2 if false.size else 1


def _at(steps: list[int]) -> str:
    return f"at step {listed([str(step) for step in sorted(set(steps))])}"
