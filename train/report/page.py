"""Run directories -> report.html: one file that needs no network, no script and no other file.

The template escapes every text of a run, and the page's own policy forbids scripts and requests.
Invariant: the same runs give the same bytes.
"""

import base64
import io
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.config import INK_NAMES, Config
from train.errors import UserError
from train.report import records as recorded
from train.report.charts import PANELS, VARIABLES, colour_of, legend, svg
from train.report.records import Record, duration, facts, flat
from train.rundir import RunDir, write_atomically

MISSING = 'A report needs matplotlib and jinja2: pip install "lockstep[report]".'
MAX_MISTAKES = 100  # of all runs together, but 10 of each
MAX_CLASSES = 40  # more are not drawn as a matrix
Table = list[tuple[str, list[str]]]  # rows (name, texts), with one text where all columns have the same


def write(run_dirs: list[Path], output: Path) -> None:
    """Read run directories and write their page. Raises UserError."""
    if output.suffix != ".html":
        raise UserError(f"The output is {output}. Expected a name that ends in .html.")
    records = recorded.read_all(run_dirs)
    try:
        content = page(records)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(MISSING) from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        names = ", ".join(record.name for record in records)
        problem = f"{type(error).__name__} {error}"
        raise UserError(f"{names}: rows that no run writes ({problem}). Expected a run's files.") from error
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, content.encode())
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}. Choose another place with --output.") from error


def page(records: list[Record]) -> str:
    """Return the HTML of one or several runs."""
    import jinja2
    import markupsafe

    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    options: Any = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    groups = recorded.groups(records)
    return (
        jinja2.Environment(autoescape=True, **options)
        .from_string(template)
        .render(
            names=[record.name for record in records],
            title=recorded.title(records),
            banner=recorded.banner(records),
            subtitle=recorded.subtitle(records),
            groups=[(group, VARIABLES[colour_of(index)], facts(group.records)) for index, group in enumerate(groups)],
            members=[(each.name, facts([each])) for group in groups for each in group.records if group.records[1:]],
            legend=[(text, VARIABLES[colour], kind) for text, colour, kind in legend(groups)],
            charts={name: markupsafe.Markup(svg(groups, name)) for name in PANELS},
            samples=[(each, *samples(each, max(MAX_MISTAKES // len(records), 10)), matrix(each)) for each in records],
            has_ink=all(record.data_name in INK_NAMES for record in records),
            attempts=[(record, attempts(record)) for record in records],
            phases=table([recorded.phases(record) for record in records]),
            config=changes(records),
            environment=table([recorded.environment(record) for record in records]),
        )
    )


def table(columns: list[dict[str, Any]]) -> Table:
    """Return the rows of a table that has a column per run."""
    found = []
    for name in dict.fromkeys(name for column in columns for name in column):
        texts = ["-" if column.get(name) is None else str(column[name]) for column in columns]
        found.append((name, texts if len(set(texts)) > 1 else texts[:1]))
    return found


def changes(records: list[Record]) -> Table:
    """Compare configs: a single run's with the defaults, those of several with each other."""
    configs = [flat(record.config) for record in records]
    if len(configs) == 1:
        configs.append({name: value for name, value in flat(asdict(Config())).items() if name in configs[0]})
    return [(name, texts) for name, texts in table(configs) if len(texts) > 1]


def attempts(record: Record) -> list[list[str]]:
    """Return the rows of the table of a run's starts."""
    rows = []
    for attempt in record.attempts:
        (start_time, start_step), (end_time, end_step) = attempt.points[0], attempt.points[-1]
        started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(start_time))
        steps = f"{start_step:,} to {end_step:,}"
        rows.append([started, duration(end_time - start_time), str(attempt.world_size), steps, attempt.end])
    return rows


def matrix(record: Record) -> dict[str, Any] | None:
    """Return the confusion matrix for the template; None if there is none.

    It has rows of cells (count, heat 0..1), and per class a bar (name, accuracy, mistakes, length 0..1). With more than
    MAX_CLASSES classes it has no rows, but the most frequent confusions (label, prediction, count) and the worst bars.
    """
    summary = record.summary
    if not summary or not summary.final:
        return None
    counts, names = summary.final.confusion, summary.data["class_names"]
    wrong = [sum(row) - row[label] for label, row in enumerate(counts)]
    shares = [row[label] / max(sum(row), 1) for label, row in enumerate(counts)]
    floor = max(min(math.floor(min(shares) * 100 - 1) / 100, 0.99), 0.0)  # where the bars begin
    lengths = [(share - floor) / (1 - floor) for share in shares]
    confusions = [
        (names[label], names[guess], count)
        for label, row in enumerate(counts)
        for guess, count in enumerate(row)
        if label != guess
    ]
    confusions.sort(key=lambda confusion: -confusion[2])
    most = max(confusions[0][2], 1)
    rows = [[(count, math.log1p(count) / math.log1p(most)) for count in row] for row in counts]
    classes = list(zip(names, shares, wrong, lengths, strict=True))
    if len(names) > MAX_CLASSES:
        rows, classes = [], sorted(classes, key=lambda bar: bar[1])[:MAX_CLASSES]
    num_wrong = summary.num_examples - summary.final.correct
    return {
        "heading": f"{num_wrong:,} of {summary.num_examples:,} {summary.split} images wrong",
        "names": names,
        "rows": list(zip(names, rows, strict=False)),
        "confusions": confusions[:MAX_CLASSES],
        "classes": classes,
        "floor": floor,
    }


def samples(record: Record, most: int) -> tuple[list[tuple[Any, ...]], list[str]]:
    """Return at most `most` mistakes and the filters of a finished run; their images are data URIs for the template."""
    path = RunDir(record.path).samples
    if not record.summary or not record.summary.final or not path.exists():
        return [], []
    import safetensors.numpy

    try:
        tensors, names = safetensors.numpy.load_file(path), record.summary.data["class_names"]
        fields = ("labels", "predictions", "confidences", "positions", "images")
        mistakes = zip(*(tensors[f"mistakes_{name}"][:most] for name in fields), strict=True)
        filters = tensors.get("filters", ())
        limit = max((float(abs(values).max()) for values in filters), default=0.0)
        return [
            (names[label], names[guess], confidence, position, image_uri(pixels(image), "gray", 0, 255))
            for label, guess, confidence, position, image in mistakes
        ], [image_uri(values, "RdBu_r", -limit, limit) for values in filters]
    except (OSError, KeyError, IndexError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it to draw the run without it.") from error


def pixels(image: Any) -> Any:
    """Return an image [C,H,W] as [H,W], or [H,W,3] if it has colours."""
    return image.squeeze(0) if len(image) == 1 else image.transpose(1, 2, 0)


def image_uri(pixels: Any, colours: str, low: float, high: float) -> str:
    """Return an array [H,W], or [H,W,3] of 0..255, as a PNG in a data URI."""
    from matplotlib.image import imsave

    content = io.BytesIO()
    metadata: Any = {"Software": None}  # matplotlib would write its version
    imsave(content, pixels, low, high, colours, format="png", metadata=metadata, pil_kwargs={"optimize": True})
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
