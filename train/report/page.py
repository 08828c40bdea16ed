"""Run directories -> report.html: one file that needs no network, no script and nothing beside it.

Every text of a run goes through the template's autoescape; the page's own policy forbids scripts and requests besides.
Invariant: the same runs give the same bytes.
"""

import base64
import io
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.config import Config
from train.errors import UserError
from train.labels import class_names
from train.report.charts import PANELS, VARIABLES, colours, legend, svg
from train.report.records import Record, banner, environment, facts, flat, groups, phases, read_all, subtitle, title

MISSING = 'A report needs matplotlib and jinja2: pip install "lockstep[report]".'
NO_SOFTWARE: Any = {"Software": None}  # matplotlib would write its version into each image
MOST_MISTAKES = 100  # of all runs together, but 10 of each


def write(run_dirs: list[Path], output: Path) -> None:
    """Read run directories and write their page. Raises UserError."""
    if output.suffix != ".html":
        raise UserError(f"The output is {output}. Expected a name that ends in .html.")
    records = read_all(run_dirs)
    try:
        content = page(records)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(MISSING) from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        names = ", ".join(record.name for record in records)
        raise UserError(
            f"{names}: rows that no run writes ({type(error).__name__} {error}). Expected a run's files."
        ) from error
    temporary = output.with_name(output.name + ".writing")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}. Use --output with a place that can.") from error


def page(records: list[Record]) -> str:
    """The HTML of one or several runs."""
    import jinja2
    import markupsafe

    together = groups(records)
    environment_ = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment_.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    most = max(MOST_MISTAKES // len(records), 10)
    spent = phases(records)
    best = max(records, key=lambda record: record.last("eval").get("accuracy", 0))
    return template.render(
        title=title(records),
        banner=banner(records),
        subtitle=subtitle(records),
        runs=[
            (group.name, VARIABLES.get(colours(together, i, None)), facts(group.records))
            for i, group in enumerate(together)
        ],
        members=[
            (record.name, facts([record])) for group in together if len(group.records) > 1 for record in group.records
        ],
        legend=[(text, VARIABLES[colour], kind) for text, colour, kind in legend(together)],
        charts={name: markupsafe.Markup(svg(together, name)) for name in PANELS},
        samples=[(record, record is best, samples(record, most), matrix(record)) for record in records],
        lives=[(record, lives(record)) for record in records],
        phases=(list(spent), table(list(spent.values()))),
        names=[record.name for record in records],
        config=changes(records),
        environment=table([environment(record) for record in records]),
    )


def table(columns: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of a table that has a column per run: the name and the texts, one text where all runs say the same."""
    found = []
    for name in dict.fromkeys(name for column in columns for name in column):
        texts = ["-" if (value := column.get(name)) is None else str(value) for column in columns]
        found.append((name, texts if len(set(texts)) > 1 else texts[:1]))
    return found


def changes(records: list[Record]) -> list[tuple[str, list[str]]]:
    """The config: of one run what differs from the defaults, and these; of several what differs between them."""
    configs = [flat(record.config) for record in records]
    configs = [{name: value for name, value in config.items() if not name.startswith("run.")} for config in configs]
    if len(configs) == 1:
        configs.append({name: value for name, value in flat(asdict(Config())).items() if name in configs[0]})
    return [(name, texts) for name, texts in table(configs) if len(texts) > 1]


def lives(record: Record) -> list[dict[str, str]]:
    """A run's lives, as a table's rows."""
    found = []
    for life in record.lives:
        seconds = round(life.end_time - life.start_time)
        started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(life.start_time)) if life.start_time else "-"
        steps = f"{life.start_step:,} to {life.end_step:,}"
        took = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        found.append(
            {"started": started, "took": took, "processes": str(life.world_size), "steps": steps, "ended": life.end}
        )
    return found


def matrix(record: Record) -> dict[str, Any] | None:
    """The confusion matrix: cells (count, heat 0..1), accuracy per class, the most frequent mistakes; None if there is none."""
    result = record.last("eval")
    counts = record.summary.get(f"{'ema_' if record.averages else ''}{result.get('split')}_confusion")
    if not counts:
        return None
    names = class_names(record.data_name)
    cells = [(label, guess, count) for label, row in enumerate(counts) for guess, count in enumerate(row)]
    wrong = sorted((cell for cell in cells if cell[0] != cell[1] and cell[2]), key=lambda cell: -cell[2])
    most = math.log1p(wrong[0][2] if wrong else 1)
    right = [row[label] / max(sum(row), 1) for label, row in enumerate(counts)]
    floor = max(min(math.floor(min(right) * 100 - 1) / 100, 0.99), 0.0)  # where the bars begin
    return {
        "heading": f"{result['num_examples'] - result['correct']:,} of {result['num_examples']:,} {result['split']} images wrong",
        "names": names,
        "rows": [[(count, math.log1p(count) / most) for count in row] for row in counts],
        "classes": [
            (share, sum(row) - row[i], (share - floor) / (1 - floor))
            for i, (share, row) in enumerate(zip(right, counts, strict=True))
        ],
        "floor": floor,
        "pairs": [(f"{names[label]} → {names[guess]}", count) for label, guess, count in wrong[:8]],
    }


def samples(record: Record, most: int) -> dict[str, Any]:
    """Mistakes and filters of a finished run as images for the template; empty if the run left none."""
    path = record.path / "samples.safetensors"
    if record.summary.get("outcome") != "finished" or not path.exists():
        return {"mistakes": [], "filters": []}
    import safetensors.numpy

    try:
        tensors = safetensors.numpy.load_file(path)
        names = class_names(record.data_name)
        columns = [
            tensors[f"mistakes_{name}"][:most].tolist()
            for name in ("labels", "predictions", "confidences", "positions")
        ]
        images = [image_uri(image, "gray", 0, 255) for image in tensors["mistakes_images"][:most]]
        mistakes = [
            (names[label], names[guess], confidence, position, image)
            for label, guess, confidence, position, image in zip(*columns, images, strict=True)
        ]
        limit = float(abs(tensors["filters"]).max())
        filters = [image_uri(values, "RdBu_r", -limit, limit) for values in tensors["filters"]]
    except (OSError, KeyError, IndexError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it to draw the run without it.") from error
    return {"mistakes": mistakes, "filters": filters}


def image_uri(pixels: Any, colours: str, low: float, high: float) -> str:
    """A two-dimensional array as a PNG in a data URI."""
    from matplotlib.image import imsave

    content = io.BytesIO()
    imsave(
        content,
        pixels,
        cmap=colours,
        vmin=low,
        vmax=high,
        format="png",
        metadata=NO_SOFTWARE,
        pil_kwargs={"optimize": True},
    )
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
