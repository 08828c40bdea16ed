"""Groups of runs -> charts for the page, by matplotlib: one SVG per panel.

Curves that come earlier are wider, so that equal curves are seen to be equal. Runs that differ only in the seed are one
curve, their mean, with a band from the least to the greatest. Invariant: the same runs give the same bytes. Colours are
CSS variables, so that charts follow the page into the dark, and text stays text.
"""

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from train.functional.trajectory import trajectory
from train.report.records import Group, step_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours (2008), which all kinds of colour vision tell apart; the page has lighter ones for the dark.
BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"
PALETTE = (BLUE, VERMILION, GREEN, "#cc79a7", "#e69f00", "#56b4e9", "#22272e")
INK, GREY, AXIS, PALE = "#22272e", "#6b7280", "#9ca3af", "#e5e7eb"
VARIABLES = {colour: f"var(--c{number})" for number, colour in enumerate(PALETTE[:-1])}
VARIABLES |= {INK: "var(--ink)", GREY: "var(--muted)", AXIS: "var(--axis)", PALE: "var(--line)"}
SINGLE_RUN_COLOURS = {None: BLUE, False: VERMILION, True: GREEN}
# Looks of the training curve (None), the evaluations of the weights (False) and of the averaged weights (True).
LOOKS: dict[bool | None, dict[str, Any]] = {
    None: {"linewidth": 1.1, "markersize": 0},
    False: {"linewidth": 1.6, "markersize": 4, "marker": "o"},
    True: {"linewidth": 1.6, "markersize": 4, "marker": "D", "linestyle": (0, (4, 2))},
}
# Vertical lines where a run was stopped and where it was started again, often at the same step.
MARKS: dict[str, dict[str, Any]] = {
    "preempted": {"linewidth": 1.2, "linestyle": (0, (1, 2)), "marker": "v", "markersize": 7},
    "start": {"linewidth": 1.2, "linestyle": (0, (6, 3))},
}
TRANSPARENT = dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none")
LABELS = dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), GREY)
FRAME = {"axes.edgecolor": AXIS, "axes.grid": True, "axes.axisbelow": True, "grid.color": PALE}
FRAME |= {"axes.spines.top": False, "axes.spines.right": False}
TEXT = {"svg.fonttype": "none"}  # text stays text: it can be read, searched and selected
STYLE: Any = TRANSPARENT | LABELS | FRAME | TEXT
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
        draw(figure.add_subplot(), groups, name)
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    found = re.sub(r'(?s)^.*?<svg ([^>]*?)width="[^"]*" height="[^"]*"', r'<svg role="img" \1', text.getvalue())
    unused = (r"<style.*?</style>", r'font-family: [^;"]*;?', r' id="[\w.]*_\d+"', r' transform="rotate\(-0 [^"]*"')
    found = re.sub("|".join((*unused, r"(?<=>)\s+")), "", found, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        found = found.replace(colour, variable)
    return found


def colour_of(groups: list[Group], index: int, kind: bool | None) -> str:
    """Return the colour of a curve. `kind` is a key of LOOKS; if there are several groups, each has one colour."""
    return SINGLE_RUN_COLOURS[kind] if len(groups) == 1 else PALETTE[index % len(PALETTE)]


def legend(groups: list[Group]) -> list[tuple[str, str, str]]:
    """Return what lines and marks mean, as (text, colour, kind: train | eval | ema | preempted | start | run)."""
    records = [record for group in groups for record in group.records]
    split, is_single = records[-1].last("eval").get("split", "test"), len(groups) == 1
    found = []
    if not is_single:
        found += [(group.name, colour_of(groups, index, None), "run") for index, group in enumerate(groups)]
    kinds: list[tuple[str, bool | None, str]] = [("training", None, "train")]
    if is_single or not all(record.is_averaged for record in records):
        kinds.append((split, False, "eval"))
    if any(record.is_averaged for record in records):
        kinds.append((f"{split}, averaged weights", True, "ema"))
    found += [(text, SINGLE_RUN_COLOURS[kind] if is_single else GREY, name) for text, kind, name in kinds]
    for event, text in (("preempted", "preempted"), ("start", "started again")):
        if any(record.marks(event) for record in records):
            found.append((text, GREY, event))
    return found


def draw(panel: "Axes", groups: list[Group], name: str) -> None:
    """Draw one of PANELS."""
    field, *events = PANELS[name]
    if not events:
        draw_time_line(panel, groups)
        return
    if field == "accuracy":
        has_values = draw_accuracy(panel, groups)
    else:
        values = [value for event in events for value in draw_series(panel, groups, event, field)]
        has_values = scale(panel, values, is_log=field in ("loss", "grad_norm"))
    if not has_values:
        panel.text(0.5, 0.5, "nothing recorded yet", transform=panel.transAxes, ha="center", color=GREY)
    records = [record for group in groups for record in group.records]
    panel.set_xlim(0, max(*(record.last_step for record in records), 1) * 1.02)
    panel.set_xlabel(step_label(records))
    for index, group in enumerate(groups):
        colour = GREY if len(groups) == 1 else colour_of(groups, index, None)
        for event, look in MARKS.items():
            for step in sorted({step for record in group.records for step in record.marks(event)}):
                panel.axvline(step, **look, markevery=[1], color=colour, zorder=0.9, clip_on=False)


def draw_series(
    panel: "Axes", groups: list[Group], event: str, field: str, shown: Callable[[float], float] = float
) -> list[float]:
    """Draw a field of an event's rows, each value as `shown(value)`; return what was drawn."""
    drawn: list[float] = []
    recipes = [trajectory(group.records[0].config) for group in groups]
    for index, group in enumerate(groups):
        kinds: tuple[bool | None, ...] = (None,)
        if event == "eval":  # of several runs only the evaluations that count, for legibility
            kinds = (False, True) if len(groups) == 1 else (group.records[0].is_averaged,)
        extra_width = 1.4 * min(recipes[index + 1 :].count(recipes[index]), 3)  # below the later curves of equal runs
        for kind in kinds:
            steps, values = (thin(column, MAX_POINTS // len(groups)) for column in group.series(event, field, kind))
            means = [shown(sum(some) / len(some)) for some in values]
            low, high = [shown(min(some)) for some in values], [shown(max(some)) for some in values]
            colour = colour_of(groups, index, kind)
            look = LOOKS[kind] | {"linewidth": LOOKS[kind]["linewidth"] + extra_width}
            panel.plot(steps, means, **look, color=colour)
            if len(group.records) > 1:
                panel.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            drawn += means + low + high
    return drawn


def log_axis(panel: "Axes", values: list[float], form: Callable[[float], str], labels: tuple[int, ...]) -> None:
    """Make the values' axis logarithmic, with room at both ends and `labels` times powers of ten written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_yscale("log")
    panel.set_ylim(min(values) / 1.35, max(values) * 1.35)
    labels = labels if max(values) < 300 * min(values) else (1,)
    panel.yaxis.set_major_locator(LogLocator(subs=labels, numticks=30))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    panel.yaxis.set_minor_formatter(NullFormatter())


def scale(panel: "Axes", values: list[float], *, is_log: bool) -> bool:
    """Fit the values' axis: from 0, or logarithmic if `is_log` and the values span more than a power of ten.

    Returns whether there are values.
    """
    if is_log and values and min(values) > 0 and max(values) > 10 * min(values):
        log_axis(panel, values, lambda value: f"{value:g}", (1, 2, 5))
    elif values:
        panel.set_ylim(0, max(max(values) * 1.08, 1e-9))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    return bool(values)


def draw_accuracy(panel: "Axes", groups: list[Group]) -> bool:
    """Draw accuracy. Above 90% the axis is logarithmic in the error: 99% to 99.5% is as far as 90% to 95%."""
    records = [record for group in groups for record in group.records]
    least = 0.5 / max(record.last("eval").get("num_examples", 1) for record in records)  # half a mistake, for none
    best = max((value for record in records for value in record.series("eval", "accuracy").values()), default=0.0)
    if best < 0.9:
        heights = draw_series(panel, groups, "eval", "accuracy", lambda value: 100 * value)
        panel.set_ylim(0, 100)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    else:
        heights = draw_series(panel, groups, "eval", "accuracy", lambda value: 100 * max(1 - value, least))
        log_axis(panel, heights, lambda error: f"{100 - error:g}%", (1, 2, 3, 5))
        panel.set_ylim(min(max(*heights, 6 * min(heights)) * 1.35, 100), min(heights) / 1.35)
    return bool(heights)


def draw_time_line(panel: "Axes", groups: list[Group]) -> None:
    """Draw steps over the clock: how fast each attempt was, where it stopped, and how long nothing ran."""
    curves = []  # (colour, points, attempt, whether it is a restart)
    for index, group in enumerate(groups):
        for attempts in [record.attempts for record in group.records]:
            for attempt in attempts:
                points = [(time - attempts[0].points[0][0], step) for time, step in attempt.points]
                curves.append((colour_of(groups, index, None), points, attempt, attempt is not attempts[0]))
    longest = max((seconds for _, points, *_ in curves for seconds, _ in points), default=0.0)
    unit, unit_seconds = (
        ("hours", 3600) if longest >= 3 * 3600 else ("minutes", 60) if longest >= 180 else ("seconds", 1)
    )
    for colour, points, attempt, is_restart in curves:
        times, steps = [seconds / unit_seconds for seconds, _ in points], [step for _, step in points]
        panel.plot(times, steps, color=colour, linewidth=1.6)
        if is_restart:
            panel.plot(times[:1], steps[:1], color=colour, marker="^", markersize=6)
        if attempt.end == "preempted":
            panel.plot(times[-1:], steps[-1:], color=colour, marker="v", markersize=6)
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    panel.set_xlabel(f"{unit} since the start")
