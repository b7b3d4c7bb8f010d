"""The figure of one rollout for a paper or a talk: fields with axes and scales, and how long they agree.

Truth, prediction and error at a few steps, with ticks in physical units, color bars with channel and unit, the
parameters of the trajectory, and the VRMSE of each step. Below, correlation and VRMSE against time: the correlation
time is the time until the correlation of prediction and truth falls below CORRELATED.
"""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MultipleLocator

from fm.evaluation.pictures import PANEL_GAP, ROWS, Sheet, draw_fields, format_vrmse, is_wide
from fm.evaluation.plots import BLUE, DOTTED, GRAY, INK, ORANGE, TEXT_SIZE, style_panel
from fm.evaluation.samples import CORRELATED, Sample

WIDTH = 7.0  # inches, as are all lengths here; the most that a figure is wide
LEAST_WIDTH = 3.6
LARGEST_PANEL = 1.7
HIGHEST_PANEL = 1.9
SMALL = TEXT_SIZE - 0.5
LINE = 0.15  # of a line of text
CURVES = 0.85  # height of the curves
TICKS = 0.4  # tick labels and the label of an axis
BAR = 0.09  # width of a color bar
MINUS = "\N{MINUS SIGN}"
LETTERS = 17  # of small text in an inch
SUPERSCRIPTS = str.maketrans(
    "-0123456789",
    "\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT ZERO}\N{SUPERSCRIPT ONE}\N{SUPERSCRIPT TWO}\N{SUPERSCRIPT THREE}"
    "\N{SUPERSCRIPT FOUR}\N{SUPERSCRIPT FIVE}\N{SUPERSCRIPT SIX}\N{SUPERSCRIPT SEVEN}\N{SUPERSCRIPT EIGHT}"
    "\N{SUPERSCRIPT NINE}",
)


def rollout_figure(sample: Sample, shown: Sequence[int]) -> Figure:
    """Return the figure of a sample; fields are drawn at the steps of the indices `shown`, curves at all its steps."""
    return _of_wide_panels(sample, shown) if is_wide(sample) else _of_panels(sample, shown)


def _of_panels(sample: Sample, shown: Sequence[int]) -> Figure:
    """Rows truth, prediction, error; one column a step; color bars on the right."""
    count, aspect = len(shown), sample.lengths[1] / sample.lengths[0]
    left, right = 0.68, 0.8
    width = min((WIDTH - left - right) / count - PANEL_GAP, LARGEST_PANEL, HIGHEST_PANEL / aspect)
    height = width * aspect
    x_step, y_step = width + PANEL_GAP, height + PANEL_GAP
    total = max(LEAST_WIDTH, left + count * x_step + right)
    bottom = TICKS + CURVES + TICKS + 0.1
    narrow = width < 1.0
    top = bottom + 3 * y_step + (4 if narrow else 2) * LINE
    heading = _heading(sample, total - left)
    sheet = Sheet(total, top + len(heading) * LINE + 0.14)
    axes = [
        [sheet.axes(left + n * x_step, bottom + (2 - row) * y_step, width, height) for n in range(count)]
        for row in range(3)
    ]
    field, error = draw_fields(axes, sample, shown)
    for n, index in enumerate(shown):
        texts = [f"step {sample.steps[index]}", sample.time_text(sample.steps[index])]
        head = ("\n" if narrow else ", ").join(filter(None, texts))
        title = f"{head}\nVRMSE{chr(10) if narrow else ' '}{format_vrmse(sample.vrmse[index])}"
        axes[0][n].set_title(title, fontsize=TEXT_SIZE if not narrow else SMALL, pad=3)
        for row in range(3):
            _ticks(axes[row][n], sample, x=row == 2, y=n == 0)
    for row, name in enumerate(ROWS):
        y = bottom + (2 - row) * y_step + height / 2
        sheet.text(0.1, y, name, rotation=90, ha="center", va="center", fontsize=TEXT_SIZE + 1)
    x = left + count * x_step + 0.03
    _bar(sheet, field, (x, bottom + y_step, BAR, 2 * height + PANEL_GAP), sample.label)
    _bar(sheet, error, (x, bottom, BAR, height), "error")
    _write_heading(sheet, left, heading)
    _draw_curves(sheet.axes(left, TICKS, total - left - right, CURVES), sample, shown)
    return sheet.figure


def _of_wide_panels(sample: Sample, shown: Sequence[int]) -> Figure:
    """Columns truth, prediction, error; one row a step; color bars below."""
    count, left, right = len(shown), 1.0, 0.55
    width = (WIDTH - left - right) / 3 - PANEL_GAP
    height = width * sample.lengths[1] / sample.lengths[0]
    x_step, y_step = width + PANEL_GAP, max(height, 2.2 * LINE) + PANEL_GAP
    bars = TICKS + CURVES + TICKS + 0.1
    bottom = bars + TICKS + BAR
    top = bottom + count * y_step + 1.4 * LINE
    heading = _heading(sample, WIDTH - left)
    sheet = Sheet(WIDTH, top + len(heading) * LINE + 0.14)
    axes = [
        [sheet.axes(left + column * x_step, bottom + (count - 1 - n) * y_step, width, height) for n in range(count)]
        for column in range(3)
    ]
    field, error = draw_fields(axes, sample, shown)
    for n, index in enumerate(shown):
        y = bottom + (count - 1 - n) * y_step + height / 2
        label = "\n".join(filter(None, [f"step {sample.steps[index]}", sample.time_text(sample.steps[index])]))
        sheet.text(0.06, y, label, va="center")
        note = f"VRMSE\n{format_vrmse(sample.vrmse[index])}"
        sheet.text(left + 3 * x_step + 0.02, y, note, va="center")
        for column in range(3):
            _ticks(axes[column][n], sample, x=n == count - 1, y=column == 0)
    for column, name in enumerate(ROWS):
        axes[column][0].set_title(name, fontsize=TEXT_SIZE + 1, pad=3)
    _bar(sheet, field, (left + 0.25 * width, bars, 1.5 * width + PANEL_GAP, BAR), sample.label)
    _bar(sheet, error, (left + 2 * x_step + 0.1 * width, bars, 0.8 * width, BAR), "error")
    _write_heading(sheet, left, heading)
    _draw_curves(sheet.axes(left, TICKS, WIDTH - left - right - PANEL_GAP, CURVES), sample, shown)
    return sheet.figure


def number_text(value: float) -> str:
    """Return a number with at most four digits, and powers of ten as they are printed."""
    digits, exponential, exponent = f"{value:.4g}".partition("e")
    if not exponential:
        return digits
    power = "10" + str(int(exponent)).translate(SUPERSCRIPTS)
    return power if digits == "1" else f"{digits}\N{MULTIPLICATION SIGN}{power}"


def _heading(sample: Sample, width: float) -> list[str]:
    """The lines above the panels: what is shown, then the parameters of the trajectory."""
    facts = [f"{name} = {number_text(value)}" for name, value in sample.scalars.items()]
    text = ", ".join([*facts, f"trajectory {sample.trajectory}"])
    return [f"{sample.dataset}, {sample.channel}", *textwrap.wrap(text, int(width * LETTERS), max_lines=3)]


def _write_heading(sheet: Sheet, x: float, lines: Sequence[str]) -> None:
    y = sheet.size[1] - 0.06
    sheet.text(x, y, lines[0], va="top", fontsize=TEXT_SIZE + 1.5)
    sheet.text(x, y - 1.25 * LINE, "\n".join(lines[1:]), va="top", color=GRAY, fontsize=SMALL)


def _ticks(axes: Axes, sample: Sample, x: bool, y: bool) -> None:
    """Label the ends of the outer axes, and their middle where there is room.

    The labels of the ends lie inside of them, so that they do not touch those of the next panel.
    """
    unit = "" if sample.domain else ", cells"
    sizes = (size / axes.figure.dpi for size in axes.get_window_extent().size)
    sides = (("left", "right"), ("bottom", "top"))
    for wanted, axis, name, size, ends, side in zip(
        (x, y), (axes.xaxis, axes.yaxis), "xy", sizes, sample.extent, sides, strict=True
    ):
        if wanted:
            places = np.linspace(ends[0], ends[1], 3 if size > 0.8 else 2)
            axis.set_ticks(places, [f"{place:.3g}".replace("-", MINUS) for place in places])
            axis.set_tick_params(labelsize=SMALL, width=0.4, length=2, pad=1.5)
            for label, value in zip((axis.get_ticklabels()[0], axis.get_ticklabels()[-1]), side, strict=True):
                label.set(**{"ha" if name == "x" else "va": value})
            axis.set_label_text(f"{name}{unit}", fontsize=TEXT_SIZE)
            axis.labelpad = 1


def _bar(sheet: Sheet, image: AxesImage, box: tuple[float, float, float, float], label: str) -> None:
    axes = sheet.color_bar(image, box)
    lines = textwrap.wrap(label, max(12, int(max(box[2:]) * LETTERS)), max_lines=2)
    axis = axes.xaxis if box[2] > box[3] else axes.yaxis
    axis.set_label_text("\n".join(lines), fontsize=TEXT_SIZE)
    axis.labelpad = 2


def _draw_curves(axes: Axes, sample: Sample, shown: Sequence[int]) -> None:
    """Correlation and VRMSE against time, from the given frame on; the drawn steps are marked below."""
    unit = sample.dt or 1.0
    times = unit * np.array([0, *sample.steps], np.float64)
    vrmse = np.where(np.isfinite(sample.vrmse), sample.vrmse, np.nan)
    axes.plot(times, [1.0, *sample.correlations], color=BLUE, linewidth=1.3)
    axes.plot(times, [0.0, *vrmse], color=ORANGE, linewidth=1.3, linestyle=(0, (4, 1.5)))
    axes.axhline(CORRELATED, color=GRAY, linewidth=0.7, linestyle=DOTTED)
    marks = times[[index + 1 for index in shown]]
    axes.plot(
        marks,
        np.full(len(marks), 0.05),
        "^",
        color=INK,
        markersize=3,
        clip_on=False,
        transform=axes.get_xaxis_transform(),
    )
    axes.set_xlim(0, times[-1])
    axes.set_ylim(0, float(np.clip(np.nanmax([1.08, *vrmse]), 1.08, 2)))
    axes.yaxis.set_major_locator(MultipleLocator(0.5))
    style_panel(axes)
    axes.set_xlabel("step" if sample.dt is None else "time after t\N{SUBSCRIPT ZERO}", fontsize=TEXT_SIZE, labelpad=1)
    axes.set_ylabel("correlation", color=BLUE, fontsize=TEXT_SIZE, labelpad=2)
    axes.text(
        1.015, 0.5, "VRMSE", color=ORANGE, fontsize=TEXT_SIZE, rotation=270, va="center", transform=axes.transAxes
    )
    lost = sample.correlated_steps()
    note = f"correlation above {CORRELATED:g} to the end"
    if lost is not None:
        axes.axvline(unit * lost, color=INK, linewidth=0.8)
        what = f"correlation below {CORRELATED:g} after step" if sample.dt is None else "correlation time"
        note = f"{what} {unit * lost:.3g}"
    axes.set_title(note, fontsize=TEXT_SIZE, loc="right", pad=3)
