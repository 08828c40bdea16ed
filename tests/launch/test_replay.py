"""`launch replay` computes a run's steps again with the same bits, and names what was changed in its files."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks.processes import launch, rows, train

from launch.check.replay import parse_steps
from train.errors import UserError

FLAGS = (
    "--model.name tiny_bn --train.exact true --train.num_micro_batches 4 --optim.ema 0.9 --model.dropout 0.2 "
    "--optim.lr 0.02 --optim.clip_norm 2 --augment.shift 2 --train.max_steps 30 --checkpoint.every_steps 5 "
    "--checkpoint.keep 2"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an undisturbed run on 2 processes with the checkpoints of steps 25 and 30, and the best."""
    run = tmp_path_factory.mktemp("made") / "run"
    train(2, run, FLAGS)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may change."""
    return shutil.copytree(made, tmp_path / "run")


def replay(run: Path, steps: str, *options: str, **env: str) -> tuple[int, str]:
    return launch(run.parent / "log", "replay", str(run), "--steps", steps, *options, **env)


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new))


def steps_of(output: str) -> list[int]:
    return [int(found) for found in re.findall(r"^step (\d+): ", output, re.MULTILINE)]


def test_steps_from_scratch_and_from_a_checkpoint_agree(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, output = replay(run, "0:30")
    assert code == 0, output
    assert "from scratch" in output
    assert steps_of(output) == list(range(1, 31))
    saves = len(rows(run, "saved"))
    assert f"30 of 30 steps agree bit for bit, {saves} saved weights among them\n" in output
    code, output = replay(run, "27:29")
    assert (code, steps_of(output)) == (0, [28, 29]), output
    assert "from " + str(run / "checkpoints" / "step-00000025") in output
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_damaged_checkpoint_is_named_and_not_used(run: Path) -> None:
    file = run / "checkpoints" / "step-00000025" / "optimizer.safetensors"
    flip(file)
    code, output = replay(run, "26:28")
    assert code == 1, output
    assert f"damaged: Checkpoint file {file} has SHA-256" in output
    assert "2 of 2 steps agree bit for bit" in output
    assert "1 damaged" in output
    assert "step-00000025\n" not in output


def test_checkpoint_that_was_signed_again_is_named(run: Path) -> None:
    """The checkpoint has other weights and a manifest that fits them."""
    from train.storage import checkpoint

    path = run / "checkpoints" / "step-00000025"
    state = checkpoint.decode(checkpoint.read(path))
    for tensor in state.model.values():  # all of them: one value alone may sit in a filter that never fires
        tensor += 0.01
    shutil.rmtree(path)
    checkpoint.write(path.parent, 25, checkpoint.encode(state), path.parent.parent)
    code, output = replay(run, "25:27")
    assert code == 1, output
    assert f"damaged: Checkpoint {path} holds other weights than the run saved at step 25." in output
    assert "step 26: loss" in output
    assert "DIFFERS" in output


def test_edited_config_is_named(run: Path) -> None:
    edit(run / "config.yaml", "lr: 0.02", "lr: 0.03")
    for steps in ("0:3", "25:27"):
        code, output = replay(run, steps)
        assert (code, output.count("\n")) == (2, 1), output
        assert f"error: {run / 'config.yaml'} is not what {run}" in output
        assert "optim.lr 0.02 -> 0.03" in output


def test_other_data_are_named(run: Path, tmp_path: Path) -> None:
    code, output = replay(run, "0:3", MUTANT="other_pixel", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert (code, output.count("\n")) == (2, 1), output
    assert "error: This is other data than " in output
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    code, output = replay(run, "0:3", MUTANT="other_pixel", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert (code, f"error: This is other data than {run} was trained with: SHA-256 " in output) == (2, True), output


def test_changed_fingerprint_is_named(run: Path) -> None:
    loss = rows(run, "fingerprint")[0]["loss"][3]
    text = (run / "metrics.jsonl").read_text()
    lines = [
        line.replace(repr(loss), repr(math.nextafter(loss, 9))) if '"fingerprint"' in line else line
        for line in text.splitlines()
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    code, output = replay(run, "0:6")
    assert code == 1, output
    assert f"damaged: The fingerprints in {run / 'metrics.jsonl'} are not those of its summary.json." in output
    assert re.search(r"^step 4: loss DIFFERS: \S+ and \S+, \S+ apart, grad_norm \S+ agrees$", output, re.MULTILINE)
    assert "5 of 6 steps agree bit for bit" in output
    assert "1 damaged" in output


def test_changed_weights_of_a_save_are_found(run: Path) -> None:
    saved = rows(run, "saved")[0]
    edit(run / "metrics.jsonl", saved["weights_sha256"], "0" * 64)
    code, output = replay(run, "0:6")
    assert (code, "step 5: " in output, "weights DIFFER" in output) == (1, True, True), output


def test_other_threads_are_reported_and_flags_fit_the_run_to_a_machine(run: Path) -> None:
    code, output = replay(run, "0:1", "-- --train.num_threads 2")
    assert "The bits may differ: num_threads 1 -> 2." in output
    assert code in (0, 1)
    code, output = replay(run, "0:1", "-- --seed 3")
    assert (code, "seed 0 -> 3" in output) == (2, True)


@pytest.mark.parametrize(
    ("change", "steps", "words"),
    [
        (None, "3:3", "--steps is 3:3. Use A:B"),
        (None, "3", "--steps is 3. Use A:B"),
        (None, "-1:3", "--steps"),
        (None, "20:31", "recorded the steps 1 to 30"),
        (lambda run: shutil.rmtree(run), "0:3", "is not a directory"),
        (lambda run: (run / "config.yaml").unlink(), "0:3", "config.yaml is missing"),
        (lambda run: edit(run / "config.yaml", "lr: 0.02", "lrr: 0.02"), "0:3", "optim.lrr"),
        (lambda run: edit(run / "config.yaml", "exact: true", "exact: false"), "0:3", "train.exact True -> False"),
        (
            lambda run: edit(run / "metrics.jsonl", '"fingerprint"', '"other"'),
            "0:3",
            "Only a run with train.exact true",
        ),
    ],
)
def test_bad_input_exits_2(run: Path, change: Callable[[Path], object] | None, steps: str, words: str) -> None:
    if change:
        change(run)
    code, output = replay(run, steps)
    assert code == 2, output
    assert words in output
    assert steps == "-1:3" or (output.startswith("error: ") and output.count("\n") == 1)


def test_run_that_began_elsewhere_needs_its_checkpoint(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(1, other, FLAGS, f"--run.resume {run / 'checkpoints' / 'step-00000025'}")
    assert replay(other, "25:30")[0] == 2  # saved at 30 only
    shutil.copytree(run / "checkpoints" / "step-00000025", other / "checkpoints" / "step-00000025")
    code, output = replay(other, "25:30")
    assert code == 0, output


def test_span_needs_every_step() -> None:
    recorded = dict.fromkeys([1, 2, 3, 5, 6], 0.5)
    assert parse_steps("0:3", recorded, Path("r")) == (0, 3)
    with pytest.raises(UserError, match="recorded the steps"):
        parse_steps("2:5", recorded, Path("r"))
    with pytest.raises(UserError, match="no fingerprints"):
        parse_steps("2:5", {}, Path("r"))


def test_summary_has_what_replay_needs(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert {"config", "environment", "data", "fingerprints", "ledger", "weights_sha256"} <= summary.keys()
