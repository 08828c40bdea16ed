"""`python -m launch export RUN`: turn a run's best checkpoint into one deployable file with a model card next to it.

Invariant: an export is written only if it reproduces the checkpoint's predictions on the run's test split, image by
image. How many of them are right is compared with what the run recorded. torch is imported in functions.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from launch.deploy import formats
from launch.deploy.formats import SUFFIXES, Deployed, Facts, warn
from train import __version__
from train.cli import Parser, parse, split_arguments
from train.config import Config, DataConfig
from train.errors import FINISHED, RunError, UserError
from train.report import records
from train.rundir import RunDir, replacing

if TYPE_CHECKING:
    from torch import Tensor

    from train.storage.data import Data

TIE = 1e-3  # two logits closer than this may change places between two programs of the same weights
SUSPICIOUS = 1e-3  # share of a split by which fp32 here and the run's arithmetic may differ without a warning
USE = {
    ".safetensors": """from safetensors.torch import load_file

weights = load_file("{name}")  # the state_dict of {model}""",
    ".onnx": """import onnxruntime

session = onnxruntime.InferenceSession("{name}")
logits = session.run(None, {{"inputs": inputs.numpy()}})[0]""",
}


def verify(path: Path, original: Deployed, images: "Tensor", model: str) -> "Tensor":
    """Read a file back and return its predictions, int64 [N]. Raises RunError if they are not the checkpoint's."""
    found, expected = formats.read(path, model).scores(images), original.scores(images)
    predictions, wanted = found.argmax(1), expected.argmax(1)
    margins = (expected.gather(1, wanted[:, None]) - expected.gather(1, predictions[:, None])).squeeze(1)
    if wrong := int((~(margins <= TIE) | ~found.isfinite().all(1)).sum()):
        total = len(images)
        raise RunError(f"The exported file predicts {wrong} of {total} images other than its checkpoint. It is void.")
    return predictions


def recorded_correct(run: RunDir, facts: Facts, split: str) -> int | None:
    """Return how many images of a split were right when the run evaluated these weights; None if it did not."""
    rows = [
        row for row in run.read_rows() if (row["event"], row["step"], row.get("split")) == ("eval", facts.step, split)
    ]
    return next((row.get("correct") for row in rows if row.get("ema") == (facts.weights == "ema")), None)


def load_data(run: RunDir, config: DataConfig) -> "Data":
    """Return the data that a run was trained on, as its config splits them. Raises UserError if they are others."""
    import torch

    from train.storage import data

    record = records.read(run.path, run.name)
    if record.data.get("is_fallback"):  # the config names the data that were missing
        config = dataclasses.replace(config, name=record.data_name)
    source = data.split(config, data.prepare(config), torch.device("cpu"))
    if (trained := record.sha256.get("data", source.sha256)) != source.sha256:
        change = f"SHA-256 {trained[:12]} -> {source.sha256[:12]} ({source.name})"
        raise UserError(f"The data are not the run's: {change}. Pass its --data.name or --data.root after `--`.")
    return source


def card(
    path: Path,
    written: Path,
    deployed: Deployed,
    run: RunDir,
    source: "Data",
    predictions: "Tensor",
    recorded: int | None,
) -> str:
    """Return the model card, Markdown, of a verified file, `written`, that will be at `path`."""
    import torch
    import yaml

    from train.evaluate import predictions_sha256
    from train.world.environment import git_commit

    facts, module, summary = deployed.facts, deployed.logits, run.read_summary()
    assert isinstance(module, torch.nn.Module)
    correct = int((predictions == source.test.labels).sum())
    return Path(__file__).with_name("card.md").read_text(encoding="utf-8").format(
        name=path.name,
        size=written.stat().st_size,
        kind=formats.describe(written),
        facts=facts,
        run=run,
        source=source,
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        num_train=len(source.train),
        num_examples=len(source.test),
        correct=correct,
        accuracy=correct / len(source.test),
        recorded="no evaluation of this step" if recorded is None else f"{recorded} right ones",
        predictions_sha256=predictions_sha256(predictions, source.num_classes),
        trained_by=(summary and summary.git_commit) or "unknown",
        exported_by=git_commit() or "unknown",
        version=__version__,
        torch=torch.__version__,
        network=f"of a source with SHA-256 `{facts.network_sha256}`" if facts.network_sha256 else "built in",
        source_option=f" --model-file {facts.model}" if facts.network_sha256 and path.suffix != ".onnx" else "",
        shape=",".join(map(str, facts.shape)),
        mean=facts.mean[0] if len(facts.mean) == 1 else facts.mean,
        std=facts.std[0] if len(facts.std) == 1 else facts.std,
        classes=", ".join(facts.class_names),
        use=USE[path.suffix].format(name=path.name, model=facts.model),
        config=yaml.safe_dump(facts.config, sort_keys=False),
    )  # fmt: skip


def export(run: RunDir, config: Config, options: argparse.Namespace, path: Path) -> str:
    """Write and verify a file, then name it. Return what to print."""
    original = formats.from_run(run.path, config.model.name, options.weights, options.checkpoint)
    facts, source = original.facts, load_data(run, config.data)
    recorded = recorded_correct(run, facts, source.eval_split)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            formats.write(original, temporary)
            predictions = verify(temporary, original, source.test.images, config.model.name)
            text = card(path, temporary, original, run, source, predictions, recorded)
        path.with_name(f"{path.name}.md").write_text(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}. Choose another --output.") from None
    correct, total = int((predictions == source.test.labels).sum()), len(predictions)
    if recorded is not None and abs(correct - recorded) > SUSPICIOUS * total:
        warn(f"warning: {correct} of {total} predictions are right, but the run recorded {recorded} at this step.")
    accuracy = f"{correct / total:.2%} of {total} {source.eval_split} images"
    return f"{path}: step {facts.step}, {facts.weights} weights, {accuracy}, as the checkpoint\n{path}.md"


def resolve_output(output: Path | None, kind: str | None, run: RunDir) -> Path:
    """Return the path of the file. Its suffix is that of --format, else of --output, else safetensors."""
    if output is None or output.is_dir() or not output.suffix:
        return (output or run.exports) / f"model{SUFFIXES[kind or 'safetensors']}"
    expected = [SUFFIXES[kind]] if kind else list(SUFFIXES.values())
    if output.suffix not in expected:
        raise UserError(f"--output is {output}. Expected a directory, or a name that ends in {' or '.join(expected)}.")
    return output


def main(argv: list[str]) -> int:
    """Export as the command line says; return the exit code. Raises UserError, and RunError if a file is void."""
    parser = Parser(
        prog="python -m launch export",
        usage="%(prog)s RUN [OPTIONS] [-- TRAIN ARGUMENTS]",
        description=__doc__,
        epilog="Train arguments say where this machine has the run's data, and its network if it is not built in: "
        "-- --data.root DIR --model.name FILE.py:FUNCTION. With --data.eval_split test, the test split is evaluated.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run, such as runs/mnist")
    parser.add_argument("--format", choices=SUFFIXES, help="default: what --output ends in, else safetensors")
    parser.add_argument("--output", type=Path, metavar="PATH", help="file or directory (default: RUN/export/model.*)")
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: averaged (ema) if the run averages")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="one checkpoint of the run (default: the best)")
    own, arguments = split_arguments(argv)
    options = parser.parse_args(own)
    run = RunDir(options.run)
    path = resolve_output(options.output, options.format, run)
    if path.suffix == ".onnx":
        formats.require_onnx()
    config = parse(["--config", str(run.require_config()), *arguments])
    print(export(run, config, options, path))
    return FINISHED
