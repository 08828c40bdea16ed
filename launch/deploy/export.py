"""`python -m launch export RUN`: turn a run's best checkpoint into one deployable file with a model card beside it.

Invariant: a file that has its name was read back and gave the checkpoint's predictions on the run's test split. Before that
the checkpoint itself must give, in the run's own arithmetic, what summary.json says of it.
"""

import argparse
import copy
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from launch.deploy import formats
from launch.deploy.formats import SUFFIXES, Deployed
from train import __version__
from train.cli import Parser, parse, split_arguments
from train.config import Config
from train.errors import UserError
from train.evaluate import Result, evaluate, predictions_sha256
from train.functional.trajectory import contract_differences
from train.report import records
from train.run import contract
from train.storage import data
from train.world.environment import git_commit
from train.world.world import World

TIE = 1e-3  # two logits closer than this may change places between two programs of the same weights
USE = {
    "safetensors": """from safetensors.torch import load_file

weights = load_file("{name}")  # of train.functional.models.MODELS["{model}"]""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("{name}")
logits = session.run(None, {{"inputs": inputs.numpy()}})[0]""",
    "torch-export": """import torch

logits = torch.export.load("{name}").module()(inputs)  # torch runs what the file says: know where it comes from""",
}
CARD = """# {name}

{model}, {parameters:,} parameters, trained on {data}: {accuracy:.2%} of the {split} split ({correct} of {num_examples}).

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

Inputs are float32 [N,1,28,28], light ink on black, 0 to 255 before `inputs = (images - {mean!r}) / {std!r}`. Logits are float32
[N,10], for the classes {classes}. The numbers and names are in the file's metadata too.

```python
{use}
```

Train and test images come from one source, so a photograph or another pen gives fewer right answers than the share above.

## Config

```yaml
{config}```
"""


class Mismatch(RuntimeError):
    """Two programs that must predict the same do not: nothing is exported."""


@dataclass(frozen=True)
class Evidence:
    """What the verification of a file found on the run's test split."""

    predictions: Tensor  # of the file, int64 [N]
    correct: int
    ties: int  # predictions that differ from the checkpoint's, between two logits as good as equal
    changed: int  # predictions that differ from those in the run's own arithmetic


def check_checkpoint(found: Result, deployed: Deployed, record: records.Record, split: str, world: World) -> str | None:
    """Compare the checkpoint's predictions, in the run's arithmetic, with what the run says of them.

    Raises Mismatch if they are others; returns a warning instead where another machine or version may be the reason.
    """
    facts, summary = deployed.facts, record.summary
    averaged = facts.weights == "ema"
    rows = [
        row
        for row in record.rows
        if row["event"] == "eval" and row["step"] == facts.step and row.get("ema") == averaged
    ]
    claims = [(f"{row.get('correct')} right", f"{found.correct} right", "metrics.jsonl") for row in rows[-1:]]
    name = f"{'ema_' if averaged else ''}{split}_predictions_sha256"
    if summary.get("step") == facts.step and name in summary:
        claims.append((summary[name], predictions_sha256(found.predictions), "summary.json"))
    for claim, here, source in claims:
        if claim != here:
            message = f"Step {facts.step} predicts other than its run did: {here[:12]}, {source} says {claim[:12]}"
            if changed := contract_differences(summary.get("contract", {}), contract(world)):
                return f"{message}. Close calls may flip on another machine: {', '.join(changed)}."
            raise Mismatch(f"{message}. Nothing was exported.")
    return None


def check_file(written: Deployed, original: Deployed, found: Result, test: data.Split) -> Evidence:
    """Compare a file's predictions with those of the checkpoint that it was made from; raise Mismatch if they differ."""
    images, labels = test.images.cpu(), test.labels.cpu()
    here, expected = written.scores(images), original.scores(images)
    predictions, wanted = here.argmax(1), expected.argmax(1)
    margins = (expected.gather(1, wanted[:, None]) - expected.gather(1, predictions[:, None]))[:, 0]
    if wrong := int((~(margins <= TIE) | ~here.isfinite().all(1)).sum()):
        raise Mismatch(
            f"The exported file predicts {wrong} of {len(labels)} images other than its checkpoint. It is void."
        )
    return Evidence(
        predictions=predictions,
        correct=int((predictions == labels).sum()),
        ties=int((predictions != wanted).sum()),
        changed=int((predictions != found.predictions).sum()),
    )


def card(
    name: str, kind: str, size: int, deployed: Deployed, record: records.Record, source: data.Data, evidence: Evidence
) -> str:
    """Write the model card, Markdown, of a verified file of `size` bytes that will be called `name`."""
    facts, module = deployed.facts, deployed.logits
    assert isinstance(module, torch.nn.Module)
    num_examples = len(source.test)
    return CARD.format(
        **{field: getattr(facts, field) for field in ("model", "data", "weights_sha256", "step", "mean", "std")},
        name=name,
        kind=kind,
        size=size,
        run=record.name,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        accuracy=evidence.correct / num_examples,
        correct=evidence.correct,
        num_examples=num_examples,
        split=source.eval_split,
        weights="averaged (EMA)" if facts.weights == "ema" else "as trained (raw)",
        predictions_sha256=predictions_sha256(evidence.predictions),
        num_train=len(source.train),
        data_sha256=source.sha256,
        trained_by=record.summary.get("git_commit") or "unknown",
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


def export(run_dir: Path, config: Config, options: argparse.Namespace, kind: str, path: Path) -> str:
    """Export, verify, name; return what there is to say, a line."""
    record = records.read(run_dir, run_dir.resolve().name)
    original = formats.from_run(run_dir, print, options.weights, options.checkpoint)
    assert isinstance(original.logits, torch.nn.Module)
    world = World.open(config.train)
    try:
        source = data.load(config.data, world)
        if (trained := record.data.get("sha256", source.sha256)) != source.sha256:
            raise UserError(
                f"The data are not the run's: SHA-256 {trained[:12]} -> {source.sha256[:12]} ({source.name})."
            )
        memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        module: Any = copy.deepcopy(original.logits).to(device=world.device, memory_format=memory_format)  # type: ignore[call-overload]
        found = evaluate(module, source, config.eval.batch_size, world, memory_format)
        if warning := check_checkpoint(found, original, record, source.eval_split, world):
            print(warning)
    finally:
        world.close()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            formats.write(original, kind, temporary)
            evidence = check_file(formats.read(temporary, own=True), original, found, source.test)
            text = card(path.name, kind, temporary.stat().st_size, original, record, source, evidence)
            os.replace(temporary, path)
        path.with_name(f"{path.name}.md").write_text(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}. Choose another --output.") from None
    accuracy = f"{evidence.correct / len(source.test):.2%} of {len(source.test)} {source.eval_split} images"
    return f"{path}: step {original.facts.step}, {original.facts.weights} weights, {accuracy}, as the checkpoint\n{path}.md"


def place(output: Path | None, kind: str | None, run_dir: Path) -> tuple[str, Path]:
    """Return (format, path of the file): what --output's suffix says, or --format, or safetensors."""
    kinds = {suffix: name for name, suffix in SUFFIXES.items()}
    if output is None or output.is_dir() or output.suffix not in kinds:
        if output is not None and output.suffix and not output.is_dir():
            raise UserError(f"--output {output} ends in {output.suffix}. Use {', '.join(kinds)}, or a directory.")
        kind = kind or "safetensors"
        return kind, (output or run_dir / "export") / f"model{SUFFIXES[kind]}"
    if kind not in (None, kinds[output.suffix]):
        raise UserError(f"--output {output} is no {kind} file. Let it end in {SUFFIXES[kind]}.")
    return kinds[output.suffix], output


def main(argv: list[str]) -> int:
    """Export as the command line says; return the exit code."""
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
    try:
        options = parser.parse_args(own)
        kind, path = place(options.output, options.format, options.run)
        if kind == "onnx":
            formats.needs_onnx()
        config_file = options.run / "config.yaml"
        if not config_file.is_file():
            raise UserError(f"{config_file} is missing. Expected the directory of a run, such as runs/mnist.")
        config = parse(["--config", str(config_file), *arguments])
        print(export(options.run, config, options, kind, path))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Mismatch as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
