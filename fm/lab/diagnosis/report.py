"""The pictures of a diagnosis, drawn through matplotlib's objects alone.

A diagnosis in words: what the numbers say, each sentence by a threshold that it names or that stands here.

The page of a diagnosis, made of the same parts as a report's: findings, pictures, numbers.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from data_pipeline.tables import Table
from fm.evaluation import report
from fm.lab.diagnosis.quantities import GROWING, UNRELATED, Drift, mean_factor, why_unfitted
from fm.lab.diagnosis.subject import Diagnosis

TEXT_SIZE = 8.0
WIDTH = 7.2  # inches
LEAST_SHARE = 1e-9  # of the strongest ring: weaker power is rounding
LINE = 1.3


# Distinct to colour-blind readers (Okabe and Ito 2008).
INK, FAINT, TRUTH, MODEL, ERROR, OTHER = "#222222", "#dcdcdc", "#444444", "#0072b2", "#d55e00", "#009e73"
LEVELS = ("#6a1f8a", "#c23b75", "#f08a4b")  # of wavelet details, coarse to fine

Draw = Callable[[Diagnosis, Figure | SubFigure], None]


def drawn(diagnosis: Diagnosis) -> list[str]:
    """Names of the pictures that this diagnosis has, in the order of the page."""
    return [name for name in PICTURES if name != "conservation" or diagnosis.drifts]


def picture(name: str, diagnosis: Diagnosis) -> Figure:
    """One picture by its name."""
    height, draw = PICTURES[name]
    figure = _figure(height)
    draw(diagnosis, figure)
    return figure


def sheet(diagnosis: Diagnosis) -> Figure:
    """All pictures on one sheet."""
    names = drawn(diagnosis)
    heights = [PICTURES[name][0] for name in names]
    figure = _figure(sum(heights) + 0.3)
    figure.suptitle(f"{diagnosis.dataset}: rollouts diagnosed", fontsize=TEXT_SIZE + 2, color=INK)
    parts: Any = figure.subfigures(len(names), 1, height_ratios=heights)
    for part, name in zip(parts, names, strict=True):
        PICTURES[name][1](diagnosis, part)
    return figure


def _draw_growth(diagnosis: Diagnosis, figure: Figure | SubFigure) -> None:
    growth, steps = diagnosis.growth, np.arange(1, diagnosis.num_steps + 1)
    left, right = figure.subplots(1, 2)
    _plot(left, steps, growth.rollout, "rollout", MODEL)
    left.plot(steps, growth.one_step.T, ".", color=ERROR, markersize=3)
    left.plot([], [], ".", color=ERROR, markersize=3, label="one step")
    if growth.recurrence is not None:
        fit, dashes = growth.recurrence, (0, (3, 2))
        for curve, last in zip(fit.curve(growth.one_step), fit.last_steps, strict=True):
            left.plot(steps[:last], curve[:last], color=INK, linewidth=1, linestyle=dashes)
        left.plot([], [], color=INK, linewidth=1, linestyle=dashes, label=f"fit, L = {fit.factor:.2f}")
    left.axhline(UNRELATED, color=INK, linewidth=0.6)
    left.axhspan(GROWING, UNRELATED, color=FAINT, alpha=0.4, linewidth=0)
    _note(left, steps[-1], UNRELATED / 1.05, "two unrelated states", ha="right", va="top")
    _finish(left, "rms error, std", log=True, steps=diagnosis.num_steps)
    _legend(left)
    _plot(right, steps, growth.vrmse, "rollout", MODEL)
    failures = [(step, growth.vrmse[row, step - 1]) for row, step in enumerate(growth.failed) if step is not None]
    if failures:
        right.plot(*zip(*failures, strict=True), "o", color=ERROR, markersize=4, label="first failure")
    right.axhline(1, color=INK, linewidth=0.6)
    _note(right, 1, 1.04, "mean field", ha="left", va="bottom")
    _finish(right, "VRMSE, mean over channels", log=True, steps=diagnosis.num_steps)
    _legend(right)


def _draw_stability(diagnosis: Diagnosis, figure: Figure | SubFigure) -> None:
    stability, steps = diagnosis.stability, np.arange(diagnosis.num_steps + 1)
    left, right = figure.subplots(1, 2)
    for label, factors, colour in (
        ("model on its rollout", stability.along_rollout, ERROR),
        ("model on the truth", stability.along_truth, MODEL),
        ("true flow", stability.true_flow, TRUTH),
    ):
        if factors is not None:
            start = np.ones((len(factors), 1))
            _plot(left, steps, np.cumprod(np.concatenate([start, factors], axis=1), axis=1), label, colour)
    _finish(left, "size of a small difference", log=True, steps=diagnosis.num_steps)
    _legend(left, handlelength=1.1, columnspacing=0.9)
    for label, values, colour in (
        ("along its rollout", stability.largest_along_rollout, ERROR),
        ("along the truth", stability.largest_along_truth, MODEL),
    ):
        right.plot(stability.frames, values, "o-", color=colour, markersize=3.5, linewidth=LINE, label=label)
    right.axhline(1, color=INK, linewidth=0.6)
    _finish(right, "largest amplification by a step", log=False, steps=diagnosis.num_steps)
    right.set_ylim(bottom=0)
    _legend(right)


def _draw_spectra(diagnosis: Diagnosis, figure: Figure | SubFigure) -> None:
    spectra = diagnosis.spectra
    panels = figure.subplots(1, len(spectra.steps), sharey=True, squeeze=False)[0]
    for index, (axes, step) in enumerate(zip(panels, spectra.steps, strict=True)):
        for label, values, colour in (
            ("truth", spectra.truth, TRUTH),
            ("prediction", spectra.prediction, MODEL),
            ("error", spectra.error, ERROR),
        ):
            axes.plot(spectra.wavenumber, values[index], color=colour, linewidth=LINE, label=label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        place = {"ha": "right", "va": "top", "transform": axes.transAxes}
        axes.text(0.97, 0.97, f"step {step}", fontsize=TEXT_SIZE, color=INK, **place)
        _finish(axes, "power" if index == 0 else "", log=True, across="wavenumber")
    highest = max(float(part[np.isfinite(part)].max(initial=0.0)) for part in (spectra.truth, spectra.prediction))
    lowest = min(float(part[part > 0].min(initial=1.0)) for part in (spectra.truth, spectra.error))
    panels[0].set_ylim(max(lowest / 2, highest * LEAST_SHARE), highest * 2)
    _legend(panels[0], handlelength=1.1, columnspacing=0.9)


def _draw_scales(diagnosis: Diagnosis, figure: Figure | SubFigure) -> None:
    bands, steps = diagnosis.bands, np.arange(1, diagnosis.num_steps + 1)
    left, right = figure.subplots(1, 2)
    for level in bands.levels:
        truth, prediction, error = (np.where(part > 0, part, np.nan) for part in bands.level(level))
        colour = TRUTH if level == 0 else LEVELS[-level]
        label = "coarse part" if level == 0 else f"level {level}"
        left.plot(steps, np.median(np.sqrt(error / truth), axis=0), color=colour, linewidth=LINE, label=label)
        right.plot(steps, np.median(prediction / truth, axis=0), color=colour, linewidth=LINE, label=label)
    for axes, name in ((left, "rms error over rms truth"), (right, "energy over the truth's")):
        axes.axhline(1, color=INK, linewidth=0.6)
        _finish(axes, name, log=True, steps=diagnosis.num_steps)
        _legend(axes, handlelength=1.1, columnspacing=0.9)


def _draw_conservation(diagnosis: Diagnosis, figure: Figure | SubFigure) -> None:
    panels = figure.subplots(1, len(diagnosis.drifts), squeeze=False)[0]
    for axes, drift in zip(panels, diagnosis.drifts, strict=True):
        _draw_drift(axes, drift)
        axes.set_title("\n".join(wrap(drift.label, 80 // len(panels))), fontsize=TEXT_SIZE, color=INK)
        _finish(axes, drift.unit, log=False, steps=diagnosis.num_steps)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", **_legend_style())


def _draw_drift(axes: Axes, drift: Drift) -> None:
    frames = np.arange(drift.truth.shape[1])
    _plot(axes, frames, drift.prediction, "prediction", MODEL)
    _plot(axes, frames, drift.truth, "truth", TRUTH)


def _draw_floors(diagnosis: Diagnosis, figure: Figure | SubFigure) -> None:
    floors = diagnosis.floors
    rows = {
        "mean field": (1.0, TRUTH),
        "persistence": (floors.persistence, TRUTH),
        "best pointwise linear map": (floors.pointwise, OTHER),
        "model": (floors.model, MODEL),
    }
    axes = figure.subplots()
    for place, (value, colour) in enumerate(rows.values()):
        axes.plot(value, place, "o", color=colour, markersize=5.5)
        style: dict[str, Any] = {"va": "center", "fontsize": TEXT_SIZE, "color": INK}
        axes.annotate(f"{value:.2g}", (value, place), xytext=(7, 0), textcoords="offset points", **style)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xscale("log")
    axes.set_xlim(min(value for value, _ in rows.values()) / 2, 3)
    _finish(axes, "", log=False, across="one-step VRMSE")


PICTURES: Mapping[str, tuple[float, Draw]] = {  # name -> height in inches, how it is drawn
    "growth": (2.6, _draw_growth),
    "stability": (2.6, _draw_stability),
    "spectra": (2.5, _draw_spectra),
    "scales": (2.6, _draw_scales),
    "conservation": (2.6, _draw_conservation),
    "floors": (1.6, _draw_floors),
}


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plot(axes: Axes, steps: np.ndarray, rows: np.ndarray, label: str, colour: str) -> None:
    """One line a trajectory, rows (R, n), under one label. What is not finite ends a line."""
    for row, values in enumerate(rows):
        finite = np.where(np.isfinite(values), values, np.nan)
        axes.plot(steps, finite, color=colour, linewidth=LINE, label=label if row == 0 else None)


def _finish(axes: Axes, label: str, *, log: bool, steps: int = 0, across: str = "step") -> None:
    axes.set_xlabel(across, fontsize=TEXT_SIZE, color=INK)
    axes.set_ylabel(label, fontsize=TEXT_SIZE, color=INK)
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        decades = LogLocator(subs=(1, 3) if high / low < 300 else (1,))
        axes.yaxis.set_major_locator(decades if high / low > 10 else MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    if steps:
        axes.set_xlim(0, max(steps, 2) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(True, which="major", linewidth=0.4, color=FAINT)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=TEXT_SIZE - 1, width=0.5, length=2.5, colors=INK)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_linewidth(0.5)


def _note(axes: Axes, x: float, y: float, text: str, ha: str, va: str) -> None:
    halo = withStroke(linewidth=2.5, foreground="white")  # a line may run behind
    axes.text(x, y, text, ha=ha, va=va, fontsize=TEXT_SIZE - 1, color=INK, path_effects=[halo])


def _legend(axes: Axes, **style: float) -> None:
    """In a row above the panel, where no line runs."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 0.99), **{**_legend_style(), **style})


def _legend_style() -> dict[str, Any]:
    return {"ncols": 4, "fontsize": TEXT_SIZE - 1, "frameon": False, "labelcolor": INK, "handlelength": 1.5}


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


DPI = 200
ZOOM = 0.6  # page pixels to a pixel of a picture
TITLES = {
    "growth": "Error growth",
    "stability": "What becomes of a small error",
    "spectra": "Power spectra",
    "scales": "Error by scale",
    "conservation": "Conserved quantities",
    "floors": "One step, beside what is simpler",
}
CAPTIONS = {
    "growth": "Left: root mean square error of the normalised state, one line a trajectory. Dots: error of one step "
    "from the truth. Dashed: the recurrence e(k+1) = L e(k) + ε(k) with these ε, fitted up to the step that enters the "
    "shaded band, half way to two unrelated states (√2). Right: the score; the dot is the first step above 1.",
    "stability": "Left: size of one small difference, carried by the model's Jacobians along the true trajectory and "
    "along the model's own rollout, and by the true flow between two simulations whose starts differ by it. Right: "
    "largest singular value of the Jacobian of one step, the most that a step can amplify, for the first trajectory.",
    "spectra": "Radially averaged power, mean over trajectories and normalised channels.",
    "scales": "Wavelet subbands (bior4.4), median over trajectories. Left: error relative to what the truth has in the "
    "band. Right: energy of the prediction relative to the truth's. Level 1 is the finest.",
    "conservation": "What the equations keep, one line a trajectory. The truth's own line is the floor that stored "
    "frames and centred differences have.",
    "floors": "Median over the same windows of the test split. The pointwise map predicts a grid point from the same "
    "point's channels, by one matrix for all points that is fitted to the train split.",
}


def page(diagnosis: Diagnosis, found: Sequence[Finding]) -> str:
    """The whole HTML file."""
    title = f"{diagnosis.dataset}: rollouts diagnosed"
    told = [(key, str(value)) for key, value in diagnosis.origin.items()]
    told.append(("test trajectories", f"{', '.join(map(str, diagnosis.trajectories))}, from their first frame"))
    told.append(("length", f"{diagnosis.num_steps} steps of {diagnosis.dt:g}"))
    names = drawn(diagnosis)
    numbers = Table("", ["quantity", "value"], [list(row) for row in key_numbers(diagnosis)])
    sections = [
        ("findings", "Findings", report.facts([(one.subject, one.text) for one in found])),
        *((name, TITLES[name], _page_figure(name, diagnosis)) for name in names),
        ("numbers", "Numbers", report.table(numbers, "What the findings rest on.")),
    ]
    head = f"<h1>{escape(title)}</h1>\n{report.facts(told)}"
    body = [f'<h2 id="{anchor}">{escape(name)}</h2>\n{content}' for anchor, name, content in sections]
    contents = report.contents([(anchor, name, ()) for anchor, name, _ in sections])
    return report.document(title, contents, "\n".join([head, *body]))


def key_numbers(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """The numbers that the sentences rest on, each with its name."""
    growth, stability, floors = diagnosis.growth, diagnosis.stability, diagnosis.floors
    rows = []
    if growth.recurrence is not None:
        fit = growth.recurrence
        rows += [
            ("one-step error ε, rms of normalised states", number(fit.epsilon)),
            ("growth factor L, where errors add up", factor(fit.factor)),
            ("growth factor L, where errors are independent", factor(fit.independent_factor)),
            ("smallest L that bounds every step of the fit", factor(fit.bound)),
            ("doubling time, steps", number(fit.doubling_steps)),
        ]
    rows.append(("first step with VRMSE above 1", ", ".join(str(step or "none") for step in growth.failed)))
    rows.append(("first step that is not finite", ", ".join(str(step or "none") for step in growth.not_finite)))
    middle = diagnosis.num_steps // 2
    for name, part in (
        ("model along the truth", stability.along_truth),
        ("model along its rollout", stability.along_rollout),
        ("true flow, twins", stability.true_flow),
    ):
        if part is not None:
            both = " / ".join(factor(mean_factor(part, first)) for first in (0, middle))
            rows.append((f"growth of a small error a step, {name}, all steps / second half", both))
    rows += [
        (f"largest singular value of a step, {name}, median", number(float(np.median(part))))
        for name, part in (
            ("along the truth", stability.largest_along_truth),
            ("along the rollout", stability.largest_along_rollout),
        )
    ]
    rows += [
        (f"one-step VRMSE, {name}", number(value))
        for name, value in (
            ("model", floors.model),
            ("best pointwise linear map", floors.pointwise),
            ("persistence", floors.persistence),
        )
    ]
    return rows


def _page_figure(name: str, diagnosis: Diagnosis) -> str:
    image = io.BytesIO()
    picture(name, diagnosis).savefig(image, format="png", dpi=DPI)
    alt = f"{TITLES[name]} of {diagnosis.dataset}"
    return report.figure(image.getvalue(), alt, escape(CAPTIONS[name]), ZOOM)
