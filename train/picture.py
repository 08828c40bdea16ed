"""Records of runs -> one picture, PNG or SVG, by matplotlib alone.

Curves of several runs lie on each other, the earlier ones wider, so that equal curves are seen to be equal. Colours are told
apart by all kinds of colour vision. Invariant: the same runs give the same file.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import UserError
from train.report import Record, banner, confusion, facts, read_all, step_label, subtitle, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours (2008), which all kinds of colour vision tell apart.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
PALETTE = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, GREY, PALE = "#22272e", "#6b7280", "#e5e7eb"
RIGHT, BAR = "#dbeafe", "#4d6c8f"
# How the training curve, the weights' evaluations and those of the averaged weights look.
LOOKS: tuple[dict[str, Any], ...] = (
    {"linewidth": 1.1, "markersize": 0},
    {"linewidth": 1.6, "markersize": 4.5, "marker": "o"},
    {"linewidth": 1.6, "markersize": 4.5, "marker": "D", "linestyle": (0, (4, 2))},
)
# Where a run left and where it was started again; often the same step.
MARKS: dict[str, dict[str, Any]] = {
    "preempted": {"linewidth": 1.2, "linestyle": (0, (1, 2)), "marker": "v", "markersize": 7},
    "start": {"linewidth": 1.2, "linestyle": (0, (6, 3))},
}
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": GREY,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": PALE,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": True,
    "legend.edgecolor": "none",
    "legend.fancybox": False,
    "svg.fonttype": "none",  # text stays text: it can be read, searched and selected
    "svg.hashsalt": "lockstep",  # the same run gives the same file
}
WIDTH, BODY, HEADER, LINE, BANNER = 14.0, 7.28, 1.72, 0.27, 0.55  # inches
DPI = 100
COLUMNS = (  # heading and left edge, in inches, of the table of runs
    ("run", 0.45), ("accuracy", 3.1), ("correct", 4.2), ("steps", 5.75), ("ranks", 7.7), ("seconds", 10.0),
    ("images/s", 11.0), ("weights", 12.1),
)  # fmt: skip


def picture(run_dirs: list[Path], output: Path) -> None:
    """Read run directories and write their picture, PNG or SVG by the name of `output`. Raises UserError."""
    if output.suffix not in (".png", ".svg"):
        raise UserError(f"The output is {output}. Expected a name that ends in .png or .svg.")
    records = read_all(run_dirs)
    try:
        import matplotlib
    except ImportError as error:
        raise UserError('matplotlib is not installed, and the report needs it: pip install "lockstep[report]".') from error
    temporary = output.with_name(output.name + ".writing")
    with matplotlib.rc_context(STYLE):
        figure = draw(records)
        options: dict[str, Any] = (
            {"metadata": {"Date": None}} if output.suffix == ".svg" else {"dpi": DPI, "pil_kwargs": {"optimize": True}}
        )
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(temporary, format=output.suffix[1:], **options)
            os.replace(temporary, output)
        except OSError as error:
            raise UserError(f"{output} cannot be written: {error.strerror}. Use --output with a place that can.") from error


def draw(records: list[Record]) -> "Figure":
    """Draw the picture of one or several runs; the confusion matrix is the last one's."""
    from matplotlib.figure import Figure

    warning = banner(records)
    header = HEADER + LINE * (len(records) - 1) + (BANNER if warning else 0)
    height = header + BODY
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    draw_header(figure, records, warning, height)
    top, bottom = 1 - header / height - 0.3 / height, 0.6 / height
    left = figure.add_gridspec(2, 2, left=0.052, right=0.655, top=top, bottom=bottom, wspace=0.2, hspace=0.32)
    right = figure.add_gridspec(2, 1, left=0.725, right=0.985, top=top, bottom=bottom, hspace=0.45, height_ratios=(3.64, 1.65))
    panels = [figure.add_subplot(left[row, column]) for row in (0, 1) for column in (0, 1)]
    draw_loss(panels[0], records)
    draw_accuracy(panels[1], records)
    draw_plain(panels[2], records, "lr", "learning rate")
    draw_plain(panels[3], records, "grad_norm", "gradient norm")
    end = max(record.rows[-1]["step"] for record in records)
    for panel in panels:
        draw_marks(panel, records)
        panel.set_xlim(0, max(end, 1) * 1.02)
    for panel in panels[2:]:
        panel.set_xlabel(step_label(records))
    draw_confusion(figure.add_subplot(right[0]), figure.add_subplot(right[1]), records)
    return figure


def draw_header(figure: "Figure", records: list[Record], warning: str, height: float) -> None:
    """Write the banner, the title and the table of runs, whose colours are the legend of the curves."""

    def say(left: float, down: float, text: str, **style: Any) -> None:
        figure.text(left / WIDTH, 1 - down / height, text, va="center", **style)

    down = 0.42
    if warning:
        figure.patches.append(rectangle(figure, 0, 1 - BANNER / height, 1, BANNER / height, VERMILION))
        say(WIDTH / 2, BANNER / 2, warning, ha="center", color="white", fontsize=17, fontweight="bold")
        down += BANNER
    say(0.45, down, title(records), fontsize=19, fontweight="bold")
    say(0.45, down + 0.38, subtitle(records), color=GREY)
    for heading, left in COLUMNS:
        say(left, down + 0.75, heading, color=GREY, fontsize=9)
    for index, record in enumerate(records):
        level = down + 1.02 + LINE * index
        if len(records) > 1:
            side = (0.13 / WIDTH, 0.13 / height)
            square = rectangle(figure, 0.2 / WIDTH, 1 - (level + 0.065) / height, *side, colours(records, index)[0])
            figure.patches.append(square)
        for (heading, left), text in zip(COLUMNS, facts(record).values(), strict=True):
            family = "DejaVu Sans Mono" if heading == "weights" else "DejaVu Sans"
            say(left, level, text, fontweight="bold" if heading in ("run", "accuracy") else "normal", family=family)


def rectangle(figure: "Figure", left: float, bottom: float, width: float, height: float, colour: str) -> Any:
    """A filled rectangle in shares of the figure."""
    from matplotlib.patches import Rectangle

    return Rectangle((left, bottom), width, height, transform=figure.transFigure, facecolor=colour)


def colours(records: list[Record], index: int) -> tuple[str, str, str]:
    """Colours of a run's training curve, of its weights and of its averaged weights: one per run if there are several."""
    if len(records) == 1:
        return BLUE, VERMILION, GREEN
    return (PALETTE[index % len(PALETTE)],) * 3


def draw_series(panel: "Axes", records: list[Record], event: str, field: str, shown: Any = None) -> list[float]:
    """Draw a field of an event's rows for all runs, each value as `shown(value)`; return what was drawn."""
    drawn: list[float] = []
    for index, record in enumerate(records):
        widen = 2.0 * (len(records) - 1 - index) / max(len(records) - 1, 1)
        both = len(records) == 1  # several runs: only the evaluations that count, else nobody can read it
        for ema in ((False, True) if both else (record.averages,)) if event == "eval" else (None,):
            steps, values = record.series(event, field, ema)
            values = list(map(shown, values)) if shown else values
            kind = {None: 0, False: 1, True: 2}[ema]
            look = LOOKS[kind]
            wide = {"linewidth": look["linewidth"] + widen, "markersize": look["markersize"] + 2 * widen}
            panel.plot(steps, values, **{**look, **wide}, color=colours(records, index)[kind])
            drawn += values
    if not drawn:
        panel.text(0.5, 0.5, "nothing recorded yet", transform=panel.transAxes, ha="center", color=GREY)
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


def is_wide(values: list[float]) -> bool:
    """Whether values call for a logarithmic axis: positive, and over more than a power of ten."""
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def draw_loss(panel: "Axes", records: list[Record]) -> None:
    """Training and test loss, and the legend of all four panels: what a line's look means."""
    panel.set_title("loss")
    values = draw_series(panel, records, "train", "loss") + draw_series(panel, records, "eval", "loss")
    if is_wide(values):
        log_axis(panel, values, lambda value: f"{value:g}")
    shades = colours(records, 0) if len(records) == 1 else (GREY,) * 3
    split = records[-1].last("eval").get("split", "test")
    kinds = {kind for record in records for kind in (1 + record.averages, *((1,) if len(records) == 1 else ()))}
    for kind, text in enumerate(("training", split, f"{split}, averaged weights")):
        if kind and kind not in kinds:
            continue
        look, shade = LOOKS[kind], shades[kind]
        panel.plot([], [], **look, color=shade, label=text)
    for event, look in MARKS.items():
        if any(record.marks(event) for record in records):
            panel.plot([], [], **look, color=GREY, label="started again" if event == "start" else event)
    panel.legend(loc="best", fontsize=9)


def draw_accuracy(panel: "Axes", records: list[Record]) -> None:
    """Accuracy; once it is high on an axis that is logarithmic in the error: 99% to 99.5% is as far as 90% to 95%."""
    panel.set_title("accuracy")
    least = 0.5 / max(record.last("eval").get("num_examples", 1) for record in records)  # half a mistake stands for none
    best = max((value for record in records for value in record.series("eval", "accuracy")[1]), default=0.0)
    if best < 0.9:
        heights = draw_series(panel, records, "eval", "accuracy", lambda value: 100 * value)
        panel.set_ylim(0, 100)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    else:
        heights = draw_series(panel, records, "eval", "accuracy", lambda value: 100 * max(1 - value, least))
        log_axis(panel, heights, lambda error: f"{100 - error:g}%", (1, 2, 3, 5))
        panel.set_ylim(min(max(*heights, 6 * min(heights)) * 1.35, 100), min(heights) / 1.35)
    if len(records) == 1 and heights:
        last = records[0].last("eval")
        style: dict[str, Any] = {"ha": "right", "fontweight": "bold", "color": colours(records, 0)[1 + records[0].averages]}
        panel.annotate(f"{last['accuracy']:.2%}", (last["step"], heights[-1]), (0, 7), textcoords="offset points", **style)


def draw_plain(panel: "Axes", records: list[Record], field: str, heading: str) -> None:
    """A field of the training rows over steps."""
    panel.set_title(heading)
    values = draw_series(panel, records, "train", field)
    if field == "grad_norm" and is_wide(values):
        log_axis(panel, values, lambda value: f"{value:g}")
    elif values:
        panel.set_ylim(0, max(max(values) * 1.08, 1e-9))


def draw_marks(panel: "Axes", records: list[Record]) -> None:
    """A vertical line where a run was preempted, with a triangle on top, and where it was started again."""
    for index, record in enumerate(records):
        style: dict[str, Any] = {
            "color": GREY if len(records) == 1 else colours(records, index)[0],
            "zorder": 0.9,
            "clip_on": False,
        }
        for event, look in MARKS.items():
            for step in record.marks(event):
                panel.axvline(step, **look, markevery=[1], **style)


def draw_confusion(square: "Axes", bars: "Axes", records: list[Record]) -> None:
    """The confusion matrix with its counts, mistakes coloured on a logarithmic scale; below, the most frequent mistakes."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    found = confusion(records[-1])
    if found is None:
        square.axis("off")
        bars.axis("off")
        square.text(0.5, 0.5, "no confusion matrix:\nthe run has not finished", ha="center", va="center", color=GREY)
        return
    size, most = len(found.names), max([count for _, count in found.pairs(1)], default=1)
    scale, colour_map = LogNorm(1, max(most, 10)), colormaps["Oranges"]
    square.set_title(found.heading)
    for label, row in enumerate(found.counts):
        for guess, count in enumerate(row):
            shade = RIGHT if label == guess else colour_map(0.12 + 0.8 * scale(count)) if count else "white"
            square.add_patch(cell(guess, label, shade))
            is_dark = label != guess and count and scale(count) > 0.5
            weight = "bold" if label == guess else "normal"
            style: dict[str, Any] = {
                "color": "white" if is_dark else INK,
                "fontweight": weight,
                "fontsize": 8 if count < 1000 else 7,
            }
            if count:
                square.text(guess, label, f"{count}", ha="center", va="center", **style)
    long_names = max(map(len, found.names)) > 3
    square.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal", anchor="NW", ylabel="label")
    square.set_xlabel("prediction" if len(records) == 1 else f"prediction of {records[-1].short_name}")
    square.set_xticks(range(size), found.names, rotation=45 if long_names else 0, ha="right" if long_names else "center")
    square.set_yticks(range(size), found.names)
    square.tick_params(length=0, labelsize=8.5 if long_names else 10, pad=2)
    square.grid(False)
    draw_pairs(bars, found.pairs(6))


def cell(column: int, row: int, shade: Any) -> Any:
    """A cell of the confusion matrix."""
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=shade, edgecolor=PALE, linewidth=0.8)


def draw_pairs(bars: "Axes", pairs: list[tuple[str, int]]) -> None:
    """Bars of the most frequent mistakes, the most frequent on top."""
    bars.set_title("most frequent mistakes")
    bars.grid(False)
    bars.spines[:].set_visible(False)
    bars.set_xticks([])
    bars.tick_params(length=0)
    if not pairs:
        bars.set_yticks([])
        bars.text(0.5, 0.5, "none", transform=bars.transAxes, ha="center", color=GREY)
        return
    texts, counts = zip(*pairs, strict=True)
    box, longest = bars.get_position(), max(map(len, texts))
    shift = 0.0055 * max(longest - 5, 0)  # names of clothes need room on the left
    bars.set_position((box.x0 + shift, box.y0, box.width - shift, box.height))
    drawn = bars.barh(range(len(counts)), counts, color=BAR, height=0.62)
    bars.bar_label(drawn, padding=4, fontsize=9, color=INK)
    bars.set_yticks(range(len(texts)), texts)
    bars.set_ylim(5.6, -0.6)
    bars.set_xlim(0, max(counts) * 1.12)
