"""A bad config, flag or launcher's option gives one line, exit code 2 and no traceback, on every rank."""

import os
from pathlib import Path

import pytest
from conftest import refusal
from ranks.processes import Ranks, arguments, launch

from launch.__main__ import SUBCOMMANDS
from launch.__main__ import main as launch_main

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
FLOW = "[&a [x,x,x,x,x,x,x,x,x], " + ", ".join(
    f"&{name} [{','.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
) + "]"  # fmt: skip

# content of a config file -> what the one line must contain
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "expected config fields"),
    "spaces": (b"  \n\n", "expected config fields"),
    "comment": (b"# nothing\n", "expected config fields"),
    "list": (b"- seed: 1\n", "expected config fields"),
    "text": (b"seed\n", "expected config fields"),
    "number": (b"1e9\n", "expected config fields"),
    "JSON list": (b"[1, 2]", "expected config fields"),
    "bytes": (bytes(range(256)), "not YAML in UTF-8"),
    "zeros": (bytes(100), "not YAML"),
    "control characters": (b"seed: \x07\n", "not YAML"),
    "safetensors": (b"\x10\0\0\0\0\0\0\0{}              ", "not YAML"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0\0\3", "not YAML in UTF-8"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), "not YAML in UTF-8"),
    "UTF-32": ("seed: 1\n".encode("utf-32"), "not YAML in UTF-8"),
    "Latin-1": ("wandb: {notes: Prüfung}\n".encode("latin-1"), "not YAML in UTF-8"),
    "surrogate": (b"wandb: {notes: \xed\xa0\x80}\n", "not YAML in UTF-8"),
    "billion laughs": (LAUGHS.encode(), "aliases are not read"),
    "billion laughs in a field": (f"wandb:\n  tags: {FLOW}\n".encode(), "aliases are not read"),
    "alias to itself": (b"seed: &a [*a]\n", "aliases are not read"),
    "merged alias": (b"train: &a {epochs: 2}\noptim: {<<: *a}\n", "aliases are not read"),
    "alias to nothing": (b"seed: *nothing\n", "aliases are not read"),
    "deep list": (b"seed: " + b"[" * 5000, "nested too deep"),
    "deep mapping": (b"{a: " * 5000, "nested too deep"),
    "deep blocks": (b"".join(b" " * depth + b"a:\n" for depth in range(200)), "nested too deep"),
    "large": (b"seed: 1 # " + b"x" * 100_000, "at most 65,536"),
    "many keys": (b"".join(b"k%d: 1\n" % number for number in range(4000)), "no config field k0"),
    "long key": (b"k" * 1000 + b": 1\n", "no config field kkk"),
    "seed twice": (b"seed: 1\nseed: 2\n", "seed is set twice in line 2"),
    "section twice": (b"optim: {lr: 0.1}\noptim: {momentum: 0.5}\n", "optim is set twice"),
    "field twice": (b"optim: {lr: 0.1, lr: 0.2}\n", "lr is set twice"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", "another document"),
    "tab": (b"optim:\n\tlr: 1\n", "not YAML"),
    "open bracket": (b"optim: {lr: 1\n", "not YAML"),
    "open quote": (b'run: {name: "a}\n', "not YAML"),
    "bad indent": (b"optim:\n  lr: 1\n momentum: 1\n", "not YAML"),
    "python object": (b"seed: !!python/object/apply:os.system ['touch owned']\n", "python/object/apply"),
    "python name": (b"seed: !!python/name:os.system\n", "python/name"),
    "own tag": (b"seed: !seed 1\n", "tag"),
    "list as key": (b"? [a]\n: 4\n", "not YAML"),
    "number as key": (b"3: 4\n", "no config field 3"),
    "null as key": (b"~: 4\n", "no config field None"),
    "section is a number": (b"train: 3\n", "train is 3"),
    "section is a list": (b"train: [epochs]\n", "train is ['epochs']"),
    "section is null": (b"train:\n", "train is empty"),
    "section in section": (b"train: {optim: {lr: 1}}\n", "no config field train.optim"),
    "field is a mapping": (b"optim: {lr: {value: 1}}\n", "optim.lr"),
    "field is a list": (b"optim: {lr: [1]}\n", "optim.lr"),
    "int is true": (b"train: {epochs: true}\n", "train.epochs is true. Expected an int"),
    "int is a float": (b"train: {epochs: 3.5}\n", "train.epochs is 3.5. Expected an int"),
    "int is a date": (b"seed: 2024-01-01\n", "seed is 2024-01-01. Expected an int"),
    "int is infinite": (b"train: {epochs: .inf}\n", "train.epochs is .inf. Expected an int"),
    "5,000 digits": (b"seed: " + b"9" * 5000, "Expected an int"),
    "400 digits": (b"train: {epochs: 1" + b"0" * 400 + b"}", "to 10,000,000."),
    "negative": (b"train: {global_batch_size: -512}\n", "train.global_batch_size is -512"),
    "NaN": (b"optim: {lr: .nan}\n", "optim.lr is nan"),
    "infinite": (b"optim: {clip_norm: .inf}\n", "optim.clip_norm is inf"),
    "choice": (b"model: {name: cnm}\n", "Did you mean cnn?"),
    "choice is a number": (b"model: {name: 3}\n", "model.name"),
    "choice is null": (b"model: {name: null}\n", "model.name"),
    "tags in tags": (b"wandb: {tags: [[1], 2]}\n", "wandb.tags"),
    "config in config": (b"config: other.yaml\n", "no config field config"),
    "class path": (b"optim: {class_path: os.system, init_args: {}}\n", "no config field optim.class_path"),
    "name leaves the directory": (b"run: {name: ../../etc}\n", "run.name is '../../etc'"),
    "absolute name": (b"run: {name: /etc/x}\n", "run.name is '/etc/x'"),
}  # fmt: skip
# flags, {} is a directory with the files made below -> what the one line must contain
FLAGS: dict[str, tuple[list[str], str]] = {
    "config missing": (["--config", "{}/absent.yaml"], "absent.yaml does not exist"),
    "config is a directory": (["--config", "{}"], "is not a file"),
    "config is a pipe": (["--config={}/pipe"], "pipe is not a file"),
    "config is a device": (["--config", "/dev/zero"], "/dev/zero is not a file"),
    "config cannot be read": (["--config", "/proc/self/mem"], "cannot be read"),
    "config is a loop": (["--config", "{}/loop"], "loop does not exist"),
    "config is inline": (["--config", "{{seed: 1}}"], "does not exist"),
    "config is nothing": (["--config="], ". is not a file"),
    "second config": (["--config", "{}/good.yaml", "--config", "{}/absent.yaml"], "absent.yaml"),
    "laughs": (["--seed", FLOW], "Expected an int"),
    "laughs in tags": (["--wandb.tags", FLOW], "aliases are not read"),
    "laughs in a section": (["--optim=" + FLOW], "aliases are not read"),
    "deep": (["--seed", "[" * 2000 + "]" * 2000], "Expected an int"),
    "deeper": (["--wandb.tags", "[" * 50_000], "nested too deep"),
    "many digits": (["--seed", "9" * 4200 + "x" * 200], "Expected an int"),
    "not UTF-8": (["--wandb.notes", "\udcff"], "is not UTF-8"),
    "unknown in UTF-8": (["--größe", "1"], "no config field größe"),
    "epochs of e": (["--train.epochs", "1e2"], "train.epochs is 1e2. Expected an int"),
    "epochs too many": (["--train.epochs", "10000000000"], "to 10,000,000."),
    "threads too many": (["--train.num_threads", "100000"], "Use 0 (automatic) to 4,096"),
    "batch and micro-batches too large": (
        ["--train.num_micro_batches", "999999999", "--train.global_batch_size", "1000000007"], "to 10,000,000.",
    ),
    "lr overflows": (["--optim.lr", "1e400"], "optim.lr is inf"),
    "clip_norm overflows": (["--optim.clip_norm", "1e999"], "optim.clip_norm is inf"),
    "lr with a comma": (["--optim.lr", "0,1"], "Write decimals with a point"),
    "lr is empty": (["--optim.lr="], "optim.lr is empty. Expected a float"),
    "two values": (["--optim.lr", "0.1", "0.2"], "0.2"),
    "single dash": (["-optim.lr", "0.1"], "Did you mean optim.lr?"),
    "precision": (["--train.precision", "bf61"], "Did you mean bf16?"),
    "data": (["--data.name", "minst"], "Did you mean mnist?"),
    "schedule": (["--optim.schedule", "onecycle"], "Did you mean one_cycle?"),
    "section": (["--train", "3"], "train"),
    "section is null": (["--optim", "null"], "optim"),
    "long name": (["--run.name", "a" * 300], "Use 1 to 200 letters"),
    "name of dots": (["--run.name", ".."], "run.name is '..'"),
    "name with a NUL": (["--run.name", "a\0b"], "run.name is"),
    "contradiction": (["--train.exact", "true"], "train.exact needs train.num_micro_batches"),
    "more micro-batches than examples": (
        ["--train.num_micro_batches", "8", "--train.global_batch_size", "4"],
        "more than train.global_batch_size, 4 examples",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "good.yaml").write_text("seed: 1\n")
    return folder


@pytest.mark.parametrize("case", FILES)
def test_malformed_config_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, words = FILES[case]
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert words in refusal(["--config", str(tmp_path / "recipe.yaml")], capsys)
    assert not Path("owned").exists()


@pytest.mark.parametrize("case", FLAGS)
def test_malformed_flag_is_refused(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, words = FLAGS[case]
    assert words in refusal([argument.format(place) if len(argument) < 100 else argument for argument in argv], capsys)


BOTH_RANKS = ["billion laughs", "bytes", "name leaves the directory"]


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", [*BOTH_RANKS, "config is a pipe", "laughs in tags"])
def test_malformed_config_ends_two_ranks(case: str, place: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(FILES[case][0] if case in FILES else b"")
    argv, words = (["--config", str(tmp_path / "recipe.yaml")], FILES[case][1]) if case in FILES else FLAGS[case]
    ranks = Ranks(2, [*arguments(tmp_path / "run"), *(part.format(place) for part in argv)], tmp_path / "logs")
    assert ranks.wait() == [2, 2]
    assert len(ranks.output().splitlines()) == 1
    assert words in ranks.output()


# The launcher's own options

LAUNCH = {
    "rum": "Did you mean run?",
    "replya": "Did you mean replay?",
    "zzzzz": "Use one of: run",
    "run --nporc 2": "Did you mean --nproc?",
    "run --nproc two": "--nproc",
    "run --nproc 0": "--nproc is 0",
    "run -- --optim.lrr 1": "Did you mean optim.lr?",
    "run -- --model.name cnm": "Did you mean cnn?",
    "data --name minst": "Did you mean mnist?",
    "replay": "required: RUN",
    "replay /nowhere --steps 0:1": "/nowhere is not a directory",
    "compare /nowhere /nowhere": "/nowhere",
    "report --ouput x /nowhere": "Did you mean --output?",
    "report": "required: RUN",
}


@pytest.mark.parametrize("line", LAUNCH)
def test_launch_refuses_in_one_line_with_the_nearest_name(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_main(line.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert LAUNCH[line] in lines[0]


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_refuses_an_unknown_option_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_main([name, "--zzz"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


def test_launch_run_refuses_before_it_starts_a_rank(tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(LAUGHS)
    code, output = launch(tmp_path / "log", f"run --nproc 2 -- --config {tmp_path}/bomb.yaml")
    assert (code, len(output.splitlines())) == (2, 1)
    assert "aliases are not read" in output
