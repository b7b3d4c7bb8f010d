"""The page of a diagnosis, made of the same parts as a report's: findings, pictures, numbers."""

import io
from collections.abc import Sequence
from html import escape

import numpy as np

from fm.diagnosis.figures import drawn, picture
from fm.diagnosis.growth import mean_factor
from fm.diagnosis.result import Diagnosis
from fm.diagnosis.sentences import Finding, factor, number
from fm.report import html
from fm.scores.formats import Table

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
        ("findings", "Findings", html.facts([(one.subject, one.text) for one in found])),
        *((name, TITLES[name], _figure(name, diagnosis)) for name in names),
        ("numbers", "Numbers", html.table(numbers, "What the findings rest on.")),
    ]
    head = f"<h1>{escape(title)}</h1>\n{html.facts(told)}"
    body = [f'<h2 id="{anchor}">{escape(name)}</h2>\n{content}' for anchor, name, content in sections]
    contents = html.contents([(anchor, name, ()) for anchor, name, _ in sections])
    return html.document(title, contents, "\n".join([head, *body]))


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


def _figure(name: str, diagnosis: Diagnosis) -> str:
    image = io.BytesIO()
    picture(name, diagnosis).savefig(image, format="png", dpi=DPI)
    alt = f"{TITLES[name]} of {diagnosis.dataset}"
    return html.figure(image.getvalue(), alt, escape(CAPTIONS[name]), ZOOM)
