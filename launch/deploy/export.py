"""`python -m launch export RUN`: turn a run's best checkpoint into one deployable file with a model card next to it.

Invariant: an export is written only if it reproduces the checkpoint's predictions on the run's test split. Before that,
the checkpoint itself must give, in the run's own arithmetic, what the run recorded. torch is imported in functions.
"""

import argparse
import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.deploy import formats
from launch.deploy.formats import SUFFIXES, Deployed
from train import __version__
from train.cli import Parser, parse, split_arguments
from train.config import Config
from train.errors import FINISHED, RunError, UserError
from train.report import records
from train.rundir import RunDir

if TYPE_CHECKING:
    from torch import Tensor

    from train.evaluate import Result
    from train.storage.data import Data, Split
    from train.world.world import World

TIE = 1e-3  # two logits closer than this may change places between two programs of the same weights
USE = {
    "safetensors": """from safetensors.torch import load_file

weights = load_file("{name}")  # of train.functional.models.MODELS["{model}"]""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("{name}")
logits = session.run(None, {{"inputs": inputs.numpy()}})[0]""",
}
CARD = """# {name}

{model}, {parameters:,} parameters, trained on {data}.
Accuracy on the {split} split: {accuracy:.2%} ({correct} of {num_examples}).

| | |
|---|---|
| file | `{name}`, {kind}, {size:,} bytes |
| weights | {weights}, SHA-256 `{weights_sha256}` |
| predictions | SHA-256 `{predictions_sha256}` on the {split} split, one byte per image, in its order |
| checkpoint | step {step} of run `{run}` |
| data | {data}, {num_train:,} training images, SHA-256 `{data_sha256}` |
| trained by | lockstep at commit {trained_by} |
| exported by | lockstep {version} at commit {exported_by}, torch {torch} |

Verified: read back, this file gives the checkpoint's prediction for each of {num_examples} images{ties}.
The run computed in {precision}, this file computes in fp32: {changed} predictions differ between the two.

## Use

    python -m launch predict {name} digit.png

Inputs are float32 [N,1,28,28], light ink on black, 0 to 255 before `inputs = (images - {mean!r}) / {std!r}`.
Logits are float32 [N,10], for the classes {classes}. The numbers and names are in the file's metadata too.

```python
{use}
```

Train and test images come from one source, so a photograph or another pen gives fewer right answers than that share.

## Config

```yaml
{config}```
"""


class Mismatch(RunError):
    """Two programs that must predict the same do not: nothing is exported."""


@dataclass(frozen=True)
class Evidence:
    """What the verification of a file found on the run's test split."""

    predictions: "Tensor"  # of the file, int64 [N]
    correct: int
    ties: int  # predictions that differ from the checkpoint's, between two logits as good as equal
    changed: int  # predictions that differ from those in the run's own arithmetic


def check_checkpoint(found: "Result", deployed: Deployed, run: RunDir, split: str, world: "World") -> str | None:
    """Compare the checkpoint's predictions, in the run's arithmetic, with the run's own records.

    Raises Mismatch if they differ. Returns a warning instead if another machine or version may be the reason.
    """
    from train.world.environment import environment, environment_differences

    step, weights, summary = deployed.facts.step, deployed.facts.weights, run.read_summary()
    rows = [row for row in run.read_rows() if row["event"] == "eval" and row["step"] == step]
    rows = [row for row in rows if row.get("ema") == (weights == "ema")]
    claims = [(f"{row.get('correct')} right", f"{found.correct} right", run.metrics.name) for row in rows[-1:]]
    if summary and (summary.step, summary.split) == (step, split) and weights in summary.results:
        evaluation = summary.results[weights]
        claims.append((evaluation.predictions_sha256, found.evaluation().predictions_sha256, run.summary.name))
    for claim, here, source in claims:
        if claim != here:
            message = f"Step {step} predicts other than its run did: {here[:12]}, {source} says {claim[:12]}"
            if summary and (changed := environment_differences(summary.environment, environment(world))):
                return f"{message}. Close calls may flip on another machine: {', '.join(changed)}."
            raise Mismatch(f"{message}. Nothing was exported.")
    return None


def check_file(written: Deployed, original: Deployed, found: "Result", test: "Split") -> Evidence:
    """Compare a file's predictions with those of the checkpoint that it was made from.

    Raises Mismatch if they differ.
    """
    images, labels = test.images.cpu(), test.labels.cpu()
    here, expected = written.scores(images), original.scores(images)
    predictions, wanted = here.argmax(1), expected.argmax(1)
    margins = (expected.gather(1, wanted[:, None]) - expected.gather(1, predictions[:, None]))[:, 0]
    if wrong := int((~(margins <= TIE) | ~here.isfinite().all(1)).sum()):
        total = len(labels)
        raise Mismatch(f"The exported file predicts {wrong} of {total} images other than its checkpoint. It is void.")
    return Evidence(
        predictions=predictions,
        correct=int((predictions == labels).sum()),
        ties=int((predictions != wanted).sum()),
        changed=int((predictions != found.predictions).sum()),
    )


def card(name: str, kind: str, size: int, deployed: Deployed, run: RunDir, source: "Data", evidence: Evidence) -> str:
    """Return the model card, Markdown, of a verified file of `size` bytes that will be called `name`."""
    import torch
    import yaml

    from train.evaluate import predictions_sha256
    from train.world.environment import git_commit

    facts, module, summary = deployed.facts, deployed.logits, run.read_summary()
    assert isinstance(module, torch.nn.Module)
    num_examples = len(source.test)
    return CARD.format(
        **{field: getattr(facts, field) for field in ("model", "data", "weights_sha256", "step", "mean", "std")},
        name=name,
        kind=kind,
        size=size,
        run=run.name,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        accuracy=evidence.correct / num_examples,
        correct=evidence.correct,
        num_examples=num_examples,
        split=source.eval_split,
        weights="averaged (EMA)" if facts.weights == "ema" else "as trained (raw)",
        predictions_sha256=predictions_sha256(evidence.predictions),
        num_train=len(source.train),
        data_sha256=source.sha256,
        trained_by=(summary and summary.git_commit) or "unknown",
        exported_by=git_commit() or "unknown",
        version=__version__,
        torch=torch.__version__,
        ties=f", {evidence.ties} of them between two logits less than {TIE} apart" if evidence.ties else "",
        precision=facts.config.get("train.precision"),
        changed=evidence.changed,
        classes=", ".join(facts.class_names),
        use=USE[kind].format(name=name, model=facts.model),
        config=yaml.safe_dump(facts.config, sort_keys=False),
    )


def evaluate_checkpoint(original: Deployed, run: RunDir, config: Config) -> "tuple[Data, Result]":
    """Evaluate a run's model on this machine's data, as the run did, and compare with what the run recorded."""
    import torch

    from train.evaluate import evaluate
    from train.storage import data
    from train.world.world import World

    world = World.open(config.train)
    try:
        source = data.load(config.data, world)
        trained = records.read(run.path, run.name).data.get("sha256", source.sha256)
        if trained != source.sha256:
            change = f"SHA-256 {trained[:12]} -> {source.sha256[:12]} ({source.name})"
            raise UserError(f"The data are not the run's: {change}. Pass its --data.root after `--`.")
        memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        module: Any = copy.deepcopy(original.logits)
        module = module.to(device=world.device, memory_format=memory_format)
        found = evaluate(module, source, config.eval.batch_size, world, memory_format)
        if warning := check_checkpoint(found, original, run, source.eval_split, world):
            print(warning)
    finally:
        world.close()
    return source, found


def export(run: RunDir, config: Config, options: argparse.Namespace, kind: str, path: Path) -> str:
    """Export, verify, then name the file. Return what to print."""
    original = formats.from_run(run.path, print, options.weights, options.checkpoint)
    source, found = evaluate_checkpoint(original, run, config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            formats.write(original, kind, temporary)
            evidence = check_file(formats.read(temporary), original, found, source.test)
            text = card(path.name, kind, temporary.stat().st_size, original, run, source, evidence)
            os.replace(temporary, path)
        path.with_name(f"{path.name}.md").write_text(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}. Choose another --output.") from None
    accuracy = f"{evidence.correct / len(source.test):.2%} of {len(source.test)} {source.eval_split} images"
    weights = f"step {original.facts.step}, {original.facts.weights} weights"
    return f"{path}: {weights}, {accuracy}, as the checkpoint\n{path}.md"


def resolve_output(output: Path | None, kind: str | None, run: RunDir) -> tuple[str, Path]:
    """Return the format and the path of the file: by --output's suffix, or --format, or safetensors."""
    kinds = {suffix: name for name, suffix in SUFFIXES.items()}
    is_folder = output is None or output.is_dir() or not output.suffix
    if output is None or is_folder:
        kind = kind or "safetensors"
        return kind, (output or run.exports) / f"model{SUFFIXES[kind]}"
    if output.suffix not in kinds:
        raise UserError(f"--output {output} ends in {output.suffix}. Use {', '.join(kinds)}, or a directory.")
    if kind not in (None, kinds[output.suffix]):
        raise UserError(f"--output {output} is no {kind} file. Let it end in {SUFFIXES[kind]}.")
    return kinds[output.suffix], output


def main(argv: list[str]) -> int:
    """Export as the command line says; return the exit code.

    Raises UserError, and Mismatch if a file does not verify.
    """
    parser = Parser(
        prog="python -m launch export",
        usage="%(prog)s RUN [OPTIONS] [-- TRAIN ARGUMENTS]",
        description=__doc__.split("\n")[0],
        epilog="Train arguments fit the run to this machine: -- --data.root DIR --train.device cpu",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run, such as runs/mnist")
    parser.add_argument("--format", choices=SUFFIXES, help="default: what --output ends in, else safetensors")
    parser.add_argument("--output", type=Path, metavar="PATH", help="file or directory (default: RUN/export/model.*)")
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: averaged (ema) if the run averages")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="one checkpoint of the run (default: the best)")
    own, arguments = split_arguments(argv)
    options = parser.parse_args(own)
    run = RunDir(options.run)
    kind, path = resolve_output(options.output, options.format, run)
    if kind == "onnx":
        formats.require_onnx()
    config = parse(["--config", str(run.require_config()), *arguments])
    print(export(run, config, options, kind, path))
    return FINISHED
