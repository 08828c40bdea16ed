"""Groups of runs -> charts for the page, by matplotlib: one SVG per panel.

Curves that come earlier are wider, so that equal curves are seen to be equal. Runs that differ only in the seed are one
curve, their mean, with a band from the least to the greatest. Invariant: the same runs give the same bytes. Colours are
CSS variables, so that charts follow the page into the dark, and text stays text.
"""

import io
import re
from typing import TYPE_CHECKING, Any

from train.functional.trajectory import trajectory
from train.report.records import Group, duration, step_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours (2008), which all kinds of colour vision tell apart; the page has lighter ones for the dark.
BLUE, VERMILION = "#0072b2", "#d55e00"
PALETTE = (BLUE, VERMILION, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#22272e")
GREY, AXIS, PALE = "#6b7280", "#9ca3af", "#e5e7eb"
VARIABLES = {colour: f"var(--c{number})" for number, colour in enumerate(PALETTE[:-1])}
VARIABLES |= {PALETTE[-1]: "var(--ink)", GREY: "var(--muted)", AXIS: "var(--axis)", PALE: "var(--line)"}
LOOKS: dict[str, dict[str, Any]] = {
    "train": {"color": BLUE, "linewidth": 1.1},
    "eval": {"color": VERMILION, "linewidth": 1.6, "markersize": 4, "marker": "o"},
}
# Vertical lines where a run was stopped and where it was started again, often at the same step.
MARKS: dict[str, dict[str, Any]] = {
    "preempted": {"linewidth": 1.2, "linestyle": (0, (1, 2)), "marker": "v", "markersize": 7},
    "start": {"linewidth": 1.2, "linestyle": (0, (6, 3))},
}
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be read, searched and selected
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **{"axes.edgecolor": AXIS, "axes.grid": True, "axes.axisbelow": True, "grid.color": PALE},
}
SIZE = (4.6, 2.7)  # inches of a panel: one column on a phone, three on a desktop, about 1 pixel per point on both
MARGINS = {"left": 0.135, "right": 0.98, "top": 0.95, "bottom": 0.175}  # fixed: fitting them would draw all twice
PANELS = {  # the field that a panel shows, and the events whose rows have it
    "loss": ("loss", "train", "eval"),
    "accuracy": ("accuracy", "eval"),
    "learning rate": ("lr", "train"),
    "images per second, mean so far": ("images_per_second", "train"),
    "gradient norm": ("grad_norm", "train"),
    "time line: steps over the clock": ("step",),
}
ERRORS = [digit * 10.0**power for power in (-4, -3, -2, -1, 0) for digit in (1, 2, 5)]  # labels of the accuracy axis
MAX_POINTS = 1500  # of all curves of a panel together: more cannot be seen, and the page stays small
BLOCKS = "▁▂▃▄▅▆▇█"


def thin(values: list[Any], most: int) -> list[Any]:
    """Return at most `most` of the values, evenly spaced, the last one among them."""
    stride = max(-(-len(values) // max(most, 1)), 1)
    return values[(len(values) - 1) % stride :: stride]


def sparkline(values: list[float]) -> str:
    """Return a curve of at most 24 blocks, for a terminal."""
    shown = thin(values, 24)
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    return "".join(BLOCKS[round((value - low) / ((high - low) or 1) * (len(BLOCKS) - 1))] for value in shown)


def svg(groups: list[Group], name: str) -> str:
    """Draw the panel `name` for a page: an `svg` element without size and fonts, with ids of its own."""
    import matplotlib
    from matplotlib.figure import Figure

    text = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=SIZE)
        figure.subplots_adjust(**MARGINS)
        draw(figure.add_subplot(), groups, *PANELS[name])
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    found = re.sub(r'(?s)^.*?<svg ([^>]*?)width="[^"]*" height="[^"]*"', r'<svg role="img" \1', text.getvalue())
    unused = (r"<style.*?</style>", r'font-family: [^;"]*;?', r' id="[\w.]*_\d+"', r' transform="rotate\(-0 [^"]*"')
    found = re.sub("|".join((*unused, r"(?<=>)\s+")), "", found, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        found = found.replace(colour, variable)
    return found


def colour_of(index: int) -> str:
    """Return the colour of a group."""
    return PALETTE[index % len(PALETTE)]


def legend(groups: list[Group]) -> list[tuple[str, str, str]]:
    """Return what lines and marks mean, as (text, colour, kind: run | train | eval | preempted | start)."""
    records, is_single = [record for group in groups for record in group.records], len(groups) == 1
    split = records[-1].last("eval").get("split", "test")
    averaged = ", averaged weights" if all(record.is_averaged for record in records) else ""
    found = [] if is_single else [(group.name, colour_of(index), "run") for index, group in enumerate(groups)]
    for event, text in (("train", "training"), ("eval", split + averaged)):
        found.append((text, LOOKS[event]["color"] if is_single else GREY, event))
    for event, text in (("preempted", "preempted"), ("start", "started again")):
        if any(record.marks(event) for record in records):
            found.append((text, GREY, event))
    return found


def draw(panel: "Axes", groups: list[Group], field: str, *events: str) -> None:
    """Draw one of PANELS."""
    if field == "step":
        draw_time_line(panel, groups)
        return
    records = [record for group in groups for record in group.records]
    values = [value for event in events for value in draw_series(panel, groups, event, field)]
    if not values:
        panel.text(0.5, 0.5, "nothing recorded yet", transform=panel.transAxes, ha="center", color=GREY)
    elif field == "accuracy":
        scale_accuracy(panel, values, max(record.last("eval").get("num_examples", 1) for record in records))
    elif field in ("loss", "grad_norm") and 0 < 10 * min(values) < max(values):
        scale_logarithmically(panel, values)
    else:
        panel.set_ylim(0, max(max(values) * 1.08, 1e-9))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    panel.set_xlim(0, max(*(record.last_step for record in records), 1) * 1.02)
    panel.set_xlabel(step_label(records))
    for index, group in enumerate(groups):
        for event, look in MARKS.items():
            for step in sorted({step for record in group.records for step in record.marks(event)}):
                colour = GREY if len(groups) == 1 else colour_of(index)
                panel.axvline(step, **look, markevery=[1], color=colour, zorder=0.9, clip_on=False)


def draw_series(panel: "Axes", groups: list[Group], event: str, field: str) -> list[float]:
    """Draw a field of an event's rows; return the values that were drawn."""
    drawn: list[float] = []
    recipes = [trajectory(group.records[0].config) for group in groups]
    for index, group in enumerate(groups):
        steps, values = (thin(column, MAX_POINTS // len(groups)) for column in group.series(event, field))
        look = dict(LOOKS[event])
        if len(groups) > 1:
            look["color"] = colour_of(index)
            look["linewidth"] += 1.4 * min(recipes[index + 1 :].count(recipes[index]), 3)  # below equal runs
        low, high = [min(some) for some in values], [max(some) for some in values]
        panel.plot(steps, [sum(some) / len(some) for some in values], **look)
        if len(group.records) > 1:
            panel.fill_between(steps, low, high, color=look["color"], alpha=0.2, linewidth=0)
        drawn += low + high
    return drawn


def scale_logarithmically(panel: "Axes", values: list[float]) -> None:
    """Make the values' axis logarithmic, with labels that are plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 300 * min(values) else (1,), numticks=30))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def scale_accuracy(panel: "Axes", values: list[float], num_examples: int) -> None:
    """Scale accuracy. Above 90% the axis is logarithmic in the error: 99% to 99.5% is as far as 90% to 95%."""
    import numpy as np

    panel.set_ylim(0, 1)
    if max(values) >= 0.9:
        top = max(1 - max(values), 0.5 / num_examples) / 1.35  # no mistake is drawn as less than half a one
        bottom = min(max(1 - min(values), 6 * top) * 1.35, 1)
        functions = (lambda value: -np.log(np.maximum(1 - value, top)), lambda height: 1 - np.exp(-height))
        panel.set_yscale("function", functions=functions)
        panel.set_ylim(1 - bottom, 1 - top)
        panel.set_yticks([1 - error for error in ERRORS if top <= error <= bottom])
    panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def draw_time_line(panel: "Axes", groups: list[Group]) -> None:
    """Draw steps over the clock: how fast each attempt was, where it stopped, and how long nothing ran."""
    for index, group in enumerate(groups):
        for record in group.records:
            start = record.rows[0].get("time", 0.0)
            for number, attempt in enumerate(record.attempts):
                times, steps = [time - start for time, _ in attempt.points], [step for _, step in attempt.points]
                panel.plot(times, steps, color=colour_of(index), linewidth=1.6)
                if number > 0:
                    panel.plot(times[:1], steps[:1], color=colour_of(index), marker="^", markersize=6)
                if attempt.is_preempted:
                    panel.plot(times[-1:], steps[-1:], color=colour_of(index), marker="v", markersize=6)
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.locator_params(axis="x", nbins=5, steps=(1, 3, 6, 10))
    panel.xaxis.set_major_formatter(lambda value, _: duration(value))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    panel.set_xlabel("time since the start")
