"""Groups of runs -> charts for the page, by matplotlib: one SVG per panel.

Curves of several runs lie on each other, the earlier ones wider, so that equal curves are seen to be equal; runs that differ
only in the seed are one curve, their mean, with a band from the least to the greatest. Invariant: the same runs give the same
bytes. Colours are CSS variables, so that charts follow the page into the dark, and text stays text.
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
# How training, the weights' evaluations and those of the averaged weights look.
LOOKS: dict[bool | None, dict[str, Any]] = {
    None: {"linewidth": 1.1, "markersize": 0},
    False: {"linewidth": 1.6, "markersize": 4, "marker": "o"},
    True: {"linewidth": 1.6, "markersize": 4, "marker": "D", "linestyle": (0, (4, 2))},
}
# Where a run left and where it was started again; often the same step.
MARKS: dict[str, dict[str, Any]] = {
    "preempted": {"linewidth": 1.2, "linestyle": (0, (1, 2)), "marker": "v", "markersize": 7},
    "start": {"linewidth": 1.2, "linestyle": (0, (6, 3))},
}
STYLE: Any = {
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": AXIS,
    "axes.labelcolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": PALE,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "svg.fonttype": "none",  # text stays text: it can be read, searched and selected
}
SIZE = (4.6, 2.7)  # inches of a panel: on a phone one beside none, on a desk three, in both about 1 pixel per point
MARGINS = {"left": 0.135, "right": 0.98, "top": 0.95, "bottom": 0.175}  # fixed: fitting them would draw all twice
MOST_POINTS = 1500  # of all curves of a panel together: more cannot be seen, and the page stays small


def svg(groups: list[Group], name: str) -> str:
    """Draw the panel `name` for a page: an `svg` element without size, fonts and ids of its own."""
    import matplotlib
    from matplotlib.figure import Figure

    text = io.StringIO()
    with matplotlib.rc_context(
        {**STYLE, "svg.hashsalt": name}
    ):  # ids that elements refer to must not meet another panel's
        figure = Figure(figsize=SIZE)
        figure.subplots_adjust(**MARGINS)
        draw(figure.add_subplot(), groups, name)
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    found = text.getvalue()
    found = re.sub(r'(?s)^.*?<svg ([^>]*?)width="[^"]*" height="[^"]*"', r'<svg role="img" \1', found)
    found = re.sub(
        r'(?s)<style.*?</style>|font-family: [^;"]*;?| id="[\w.]*_\d+"| transform="rotate\(-0 [^"]*"|(?<=>)\s+',
        "",
        found,
    )
    for colour, variable in VARIABLES.items():
        found = found.replace(colour, variable)
    return found


def colours(groups: list[Group], index: int, kind: bool | None) -> str:
    """The colour of a group's training curve, evaluations, or averaged weights: one per group if there are several."""
    if len(groups) == 1:
        return {None: BLUE, False: VERMILION, True: GREEN}[kind]
    return PALETTE[index % len(PALETTE)]


def legend(groups: list[Group]) -> list[tuple[str, str, str]]:
    """What lines and marks mean, as (text, colour, kind: train | eval | ema | preempted | start | run)."""
    records = [record for group in groups for record in group.records]
    split, one = records[-1].last("eval").get("split", "test"), len(groups) == 1
    kinds: dict[str, tuple[str, bool | None]] = {"train": ("training", None)}
    if any(not record.averages or one for record in records):
        kinds["eval"] = (split, False)
    if any(record.averages for record in records):
        kinds["ema"] = (f"{split}, averaged weights", True)
    found = [] if one else [(group.name, colours(groups, index, None), "run") for index, group in enumerate(groups)]
    found += [(text, colours(groups, 0, kind) if one else GREY, name) for name, (text, kind) in kinds.items()]
    words = {"preempted": "preempted", "start": "started again"}
    return found + [(words[event], GREY, event) for event in MARKS if any(record.marks(event) for record in records)]


def draw(panel: "Axes", groups: list[Group], name: str) -> None:
    """Draw one of PANELS."""
    records = [record for group in groups for record in group.records]
    drawn = PANELS[name](panel, groups)
    if PANELS[name] is draw_time_line:
        return
    if drawn is None:
        panel.text(0.5, 0.5, "nothing recorded yet", transform=panel.transAxes, ha="center", color=GREY)
    panel.set_xlim(0, max(*(record.rows[-1]["step"] for record in records), 1) * 1.02)
    panel.set_xlabel(step_label(records))
    for index, group in enumerate(groups):
        style: dict[str, Any] = {
            "color": GREY if len(groups) == 1 else colours(groups, index, None),
            "zorder": 0.9,
            "clip_on": False,
        }
        for event, look in MARKS.items():
            for step in sorted({step for record in group.records for step in record.marks(event)}):
                panel.axvline(step, **look, markevery=[1], **style)


def draw_series(
    panel: "Axes", groups: list[Group], event: str, field: str, shown: Any = lambda value: value
) -> list[float]:
    """Draw a field of an event's rows, each value as `shown(value)`; return what was drawn."""
    drawn: list[float] = []
    recipes = [repr(trajectory(group.records[0].config)) for group in groups]
    for index, group in enumerate(groups):
        widen = 1.4 * min(recipes[index + 1 :].count(recipes[index]), 3)  # a curve that lies under the same run's
        averages = group.records[0].averages  # several runs: only the evaluations that count, else nobody can read it
        for kind in ((False, True) if len(groups) == 1 else (averages,)) if event == "eval" else (None,):
            steps, values = group.series(event, field, kind)
            stride = -(-len(steps) * len(groups) // MOST_POINTS) or 1
            steps, values = steps[::-1][::stride][::-1], values[::-1][::stride][::-1]  # the last one stays
            means, low, high = ([shown(of(some)) for some in values] for of in (lambda v: sum(v) / len(v), min, max))
            look = LOOKS[kind] | {"linewidth": LOOKS[kind]["linewidth"] + widen}
            colour = colours(groups, index, kind)
            panel.plot(steps, means, **look, color=colour)
            if len(group.records) > 1:
                panel.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            drawn += means + low + high
    return drawn


def log_axis(panel: "Axes", values: list[float], form: Any, labels: tuple[int, ...] = (1, 2, 5)) -> None:
    """Make the values' axis logarithmic, with `labels` times powers of ten written out and a little room at both ends."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_yscale("log")
    labels = labels if max(values) < 300 * min(values) else (1,)
    panel.set_ylim(min(values) / 1.35, max(values) * 1.35)
    panel.yaxis.set_major_locator(LogLocator(subs=labels, numticks=30))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    panel.yaxis.set_minor_formatter(NullFormatter())


def draw_loss(panel: "Axes", groups: list[Group]) -> list[float] | None:
    """Training and test loss."""
    values = draw_series(panel, groups, "train", "loss") + draw_series(panel, groups, "eval", "loss")
    return scale(panel, values, log=True)


def draw_accuracy(panel: "Axes", groups: list[Group]) -> list[float] | None:
    """Accuracy; once it is high on an axis that is logarithmic in the error: 99% to 99.5% is as far as 90% to 95%."""
    records = [record for group in groups for record in group.records]
    least = 0.5 / max(
        record.last("eval").get("num_examples", 1) for record in records
    )  # half a mistake stands for none
    best = max((value for record in records for value in record.series("eval", "accuracy")[1]), default=0.0)
    if best < 0.9:
        heights = draw_series(panel, groups, "eval", "accuracy", lambda value: 100 * value)
        panel.set_ylim(0, 100)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    else:
        heights = draw_series(panel, groups, "eval", "accuracy", lambda value: 100 * max(1 - value, least))
        log_axis(panel, heights, lambda error: f"{100 - error:g}%", (1, 2, 3, 5))
        panel.set_ylim(min(max(*heights, 6 * min(heights)) * 1.35, 100), min(heights) / 1.35)
    return heights or None


def scale(panel: "Axes", values: list[float], *, log: bool = False) -> list[float] | None:
    """Fit the values' axis: from 0, or logarithmic if `log` and the values span more than a power of ten. None: no values."""
    if log and values and min(values) > 0 and max(values) > 10 * min(values):
        log_axis(panel, values, lambda value: f"{value:g}")
    elif values:
        panel.set_ylim(0, max(max(values) * 1.08, 1e-9))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    return values or None


def draw_time_line(panel: "Axes", groups: list[Group]) -> None:
    """Steps over the clock: how fast each life of a run was, where it left, and how long nothing ran."""
    records = [(index, record) for index, group in enumerate(groups) for record in group.records]
    longest = max(
        [life.end_time - record.lives[0].start_time for _, record in records for life in record.lives], default=0.0
    )
    seconds, unit = next(
        pair for pair in ((3600, "hours"), (60, "minutes"), (1, "seconds")) if longest >= 3 * pair[0] or pair[0] == 1
    )
    for index, record in records:
        colour = colours(groups, index, None)
        for number, life in enumerate(record.lives):
            times = [(time - record.lives[0].start_time) / seconds for time, _ in life.points]
            steps = [step for _, step in life.points]
            panel.plot(times, steps, color=colour, linewidth=1.6)
            if times and number:
                panel.plot(times[:1], steps[:1], color=colour, marker="^", markersize=6)
            if times and life.end.startswith("preempted"):
                panel.plot(times[-1:], steps[-1:], color=colour, marker="v", markersize=6)
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    panel.set_xlabel(f"{unit} since the start")


PANELS: dict[str, Callable[["Axes", list[Group]], Any]] = {
    "loss": draw_loss,
    "accuracy": draw_accuracy,
    "learning rate": lambda panel, groups: scale(panel, draw_series(panel, groups, "train", "lr")),
    "images per second, mean so far": lambda panel, groups: scale(
        panel, draw_series(panel, groups, "train", "images_per_second")
    ),
    "gradient norm": lambda panel, groups: scale(panel, draw_series(panel, groups, "train", "grad_norm"), log=True),
    "time line: steps over the clock": draw_time_line,
}
