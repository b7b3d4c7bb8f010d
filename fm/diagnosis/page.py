"""The page of a diagnosis: sentences, a table of numbers, pictures; one file that needs no other and no network."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np

from fm.diagnosis.figures import DARK, LIGHT, Theme, drawn, picture
from fm.diagnosis.growth import mean_factor
from fm.diagnosis.result import Diagnosis
from fm.diagnosis.sentences import Finding, factor, number

DPI = 200
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
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --soft: #666; --line: #ddd; --lead: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #ddd; --soft: #999; --line: #33363c; --lead: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 56rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 Georgia, "Times New Roman", serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; font-weight: 600; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; font-weight: 600; }
.origin, figcaption { color: var(--soft); font-size: .88rem; }
.origin { margin: 0 0 1.8rem; overflow-wrap: anywhere; }
dl { margin: 0; display: grid; grid-template-columns: 8.2rem 1fr; column-gap: 1rem; row-gap: .55rem; }
dt { color: var(--lead); font-weight: 600; }
dd { margin: 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .28rem .6rem .28rem 0; border-bottom: 1px solid var(--line); font-weight: 400; }
th:last-child, td:last-child { text-align: right; padding-right: 0; }
thead th { color: var(--soft); }
figure { margin: 0; break-inside: avoid; }
img { display: block; width: 100%; height: auto; }
figcaption { margin-top: .5rem; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
@media print { body { max-width: none; padding: 0; } }
"""


def page(diagnosis: Diagnosis, found: Sequence[Finding]) -> str:
    """The whole HTML file."""
    origin = diagnosis.origin
    told = [f"{escape(key)} {escape(str(value))}" for key, value in origin.items()]
    told.append(f"test trajectories {', '.join(map(str, diagnosis.trajectories))}, from their first frame")
    told.append(f"{diagnosis.num_steps} steps of {diagnosis.dt:g}")
    sentences = "\n".join(f"<dt>{escape(one.subject)}</dt><dd>{escape(one.text)}</dd>" for one in found)
    rows = "\n".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in key_numbers(diagnosis)
    )
    figures = "\n".join(_figure(name, diagnosis) for name in drawn(diagnosis))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Diagnosis of {escape(diagnosis.dataset)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(diagnosis.dataset)}: rollouts diagnosed</h1>
<p class="origin">{"; ".join(told)}</p>
<dl>
{sentences}
</dl>
{figures}
<h2>Numbers</h2>
<table>
<thead><tr><th>quantity</th><th>value</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</body>
</html>
"""


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
    light, dark = (_data_uri(name, diagnosis, theme) for theme in (LIGHT, DARK))
    return f"""<h2>{TITLES[name]}</h2>
<figure>
<picture>
<source media="(prefers-color-scheme: dark)" srcset="{dark}">
<img src="{light}" alt="{TITLES[name]} of {escape(diagnosis.dataset)}">
</picture>
<figcaption>{escape(CAPTIONS[name])}</figcaption>
</figure>"""


def _data_uri(name: str, diagnosis: Diagnosis, theme: Theme) -> str:
    image = io.BytesIO()
    picture(name, diagnosis, theme).savefig(image, format="png", dpi=DPI)
    return "data:image/png;base64," + base64.b64encode(image.getvalue()).decode()
