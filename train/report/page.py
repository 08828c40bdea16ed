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

from train.config import Config, class_names
from train.errors import UserError
from train.report import records as recorded
from train.report.charts import PANELS, VARIABLES, colour_of, legend, svg
from train.report.records import Record, duration, facts
from train.rundir import RunDir, write_atomically

MISSING = 'A report needs matplotlib and jinja2: pip install "lockstep[report]".'
NO_SOFTWARE: Any = {"Software": None}  # matplotlib would write its version into each image
MAX_MISTAKES = 100  # of all runs together, but 10 of each
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
    colours = [VARIABLES.get(colour_of(groups, index, None)) for index in range(len(groups))]
    several = [group for group in groups if len(group.records) > 1]
    most = max(MAX_MISTAKES // len(records), 10)
    best = max(records, key=lambda record: record.last("eval").get("accuracy", 0))
    phases = recorded.phases(records)
    return (
        jinja2.Environment(autoescape=True, **options)
        .from_string(template)
        .render(
            title=recorded.title(records),
            banner=recorded.banner(records),
            subtitle=recorded.subtitle(records),
            runs=[(group.name, colour, facts(group.records)) for group, colour in zip(groups, colours, strict=True)],
            members=[(record.name, facts([record])) for group in several for record in group.records],
            legend=[(text, VARIABLES[colour], kind) for text, colour, kind in legend(groups)],
            charts={name: markupsafe.Markup(svg(groups, name)) for name in PANELS},
            samples=[(record, record is best, samples(record, most), matrix(record)) for record in records],
            attempts=[(record, attempts(record)) for record in records],
            phases=(list(phases), table(list(phases.values()))),
            names=[record.name for record in records],
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


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Return `{"section.field": value}` of what config.yaml holds, without the section `run`."""
    found = {"seed": config.get("seed")} if config else {}
    for section, fields in config.items():
        if isinstance(fields, dict) and section != "run":
            found |= {f"{section}.{name}": value for name, value in fields.items()}
    return found


def attempts(record: Record) -> list[list[str]]:
    """Return the rows of the table of a run's starts."""
    rows = []
    for attempt in record.attempts:
        (start_time, start_step), (end_time, end_step) = attempt.points[0], attempt.points[-1]
        started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(start_time))
        end = f"{attempt.end} ({attempt.signal})" if attempt.end == "preempted" else attempt.end
        steps = f"{start_step:,} to {end_step:,}"
        rows.append([started, duration(end_time - start_time), str(attempt.world_size), steps, end])
    return rows


def matrix(record: Record) -> dict[str, Any] | None:
    """Return the confusion matrix for the template; None if there is none.

    It has cells (count, heat 0..1), bars (accuracy, mistakes, length 0..1) per class and the most frequent mistakes.
    """
    summary = record.summary
    if not summary or not summary.final:
        return None
    counts, names = summary.final.confusion, class_names(record.data_name)
    cells = [(count, label, guess) for label, row in enumerate(counts) for guess, count in enumerate(row)]
    wrong = sorted((cell for cell in cells if cell[0] and cell[1] != cell[2]), key=lambda cell: -cell[0])
    most = math.log1p(wrong[0][0] if wrong else 1)
    shares = [row[label] / max(sum(row), 1) for label, row in enumerate(counts)]
    floor = max(min(math.floor(min(shares) * 100 - 1) / 100, 0.99), 0.0)  # where the bars begin
    num_wrong = summary.num_examples - summary.final.correct
    return {
        "heading": f"{num_wrong:,} of {summary.num_examples:,} {summary.split} images wrong",
        "names": names,
        "rows": [[(count, math.log1p(count) / most) for count in row] for row in counts],
        "classes": [
            (share, sum(counts[label]) - counts[label][label], (share - floor) / (1 - floor))
            for label, share in enumerate(shares)
        ],
        "floor": floor,
        "pairs": [(f"{names[label]} → {names[guess]}", count) for count, label, guess in wrong[:8]],
    }


def samples(record: Record, most: int) -> dict[str, Any]:
    """Return mistakes and filters of a finished run as images for the template; no images if the run left none."""
    path = RunDir(record.path).samples
    if not record.summary or record.summary.outcome != "finished" or not path.exists():
        return {"mistakes": [], "filters": []}
    import safetensors.numpy

    try:
        tensors = safetensors.numpy.load_file(path)
        fields = ("labels", "predictions", "confidences", "positions")
        labels, guesses, confidences, positions = (tensors[f"mistakes_{name}"][:most].tolist() for name in fields)
        images = [image_uri(image, "gray", 0, 255) for image in tensors["mistakes_images"][:most]]
        names = class_names(record.data_name)
        labels, guesses = [names[label] for label in labels], [names[guess] for guess in guesses]
        limit = float(abs(tensors["filters"]).max())
        return {
            "mistakes": list(zip(labels, guesses, confidences, positions, images, strict=True)),
            "filters": [image_uri(values, "RdBu_r", -limit, limit) for values in tensors["filters"]],
        }
    except (OSError, KeyError, IndexError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it to draw the run without it.") from error


def image_uri(pixels: Any, colours: str, low: float, high: float) -> str:
    """Return a two-dimensional array as a PNG in a data URI."""
    from matplotlib.image import imsave

    content, options = io.BytesIO(), {"optimize": True}
    imsave(content, pixels, low, high, colours, format="png", metadata=NO_SOFTWARE, pil_kwargs=options)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
