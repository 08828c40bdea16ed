"""A file and a flag give a field the same value, numbers are those of YAML 1.2, and paths are filled in."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import refusal

from launch.data import main as launch_data
from train.cli import parse
from train.config import Config
from train.errors import UserError
from train.functional.trajectory import trajectory
from train.storage.built_in import cache_dir, find_folder

FIELDS = ["seed", "optim.lr", "train.epochs", "train.exact", "train.cuda_graphs", "train.precision"]
FIELDS += ["train.profile_steps", "run.name", "run.time_limit", "run.dir", "data.root", "wandb.notes", "wandb.tags"]
FIELDS += ["model.weights_skip", "wandb.project"]
TEXTS = ["010", "-010", "0o10", "0x10", "0b10", "1_000", "1e3", "1e-3", "+5", ".5", "5.", "1.5e+3", ".inf", "-.inf"]
TEXTS += [".nan", "inf", "nan", "1:30", "1:30.5", "12:00:00", "20:30", "20:70", "1-12", "2024-01-01", "true", "True"]
TEXTS += ["TRUE", "yes", "no", "on", "OFF", "y", "1", "0", "null", "Null", "~", "auto", "fp32", "a", "0,001", "²", ""]
JARGON = re.compile(r"Union|ubtypes|NoneType|typing|Literal|Parser key|[Gg]iven value|<class|None\b")


def from_file(content: str, folder: Path) -> Config:
    (folder / "recipe.yaml").write_text(content, encoding="utf-8", newline="")
    return parse(["--config", str(folder / "recipe.yaml")])


def value_or_line(flags: list[str]) -> Any:
    """Return a Config or the line that refuses it, without the name of a file."""
    try:
        return parse(flags)
    except UserError as error:
        return str(error).partition("recipe.yaml: ")[2] or str(error)


def at(config: Config, name: str) -> Any:
    section, _, field = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, field)


@pytest.mark.parametrize("name", FIELDS)
def test_a_file_and_a_flag_agree_on_every_value(name: str, tmp_path: Path) -> None:
    section, _, field = name.rpartition(".")
    for text in [*TEXTS, "[a, 1, on]"] if name == "wandb.tags" else TEXTS:
        content = f"{section}:\n  {field}: {text}\n" if section else f"{field}: {text}\n"
        (tmp_path / "recipe.yaml").write_text(content)
        by_file = value_or_line(["--config", str(tmp_path / "recipe.yaml")])
        assert by_file == value_or_line([f"--{name}={text}"]) == value_or_line([f"--{name}", text]), text
        if isinstance(by_file, str):
            assert not JARGON.search(by_file), by_file
            assert name in by_file


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", "010", 10),
        ("seed", "0o10", 8),
        ("seed", "0x10", 16),
        ("seed", "+5", 5),
        ("seed", "1_000", None),
        ("seed", "1e3", None),
        ("train.epochs", "1:00", None),
        ("optim.lr", "1:30.5", None),
        ("optim.lr", ".5", 0.5),
        ("optim.lr", "5.", 5.0),
        ("optim.lr", "1e-3", 0.001),
        ("train.exact", "1", None),
        ("train.compile", "on", True),
        ("train.cuda_graphs", "on", "on"),
        ("train.profile_steps", "20:30", "20:30"),
        ("run.name", "010", "010"),
        ("run.name", "on", "on"),
        ("run.name", "1e5", "1e5"),
        ("run.name", "2024-01-01", "2024-01-01"),
        ("run.name", "null", None),
        ("wandb.tags", "[1, on]", ["1", "on"]),
        ("run.time_limit", "90", 90.0),
        ("run.time_limit", "20:30", 20.5),
        ("run.time_limit", "12:00:00", 720.0),
        ("run.time_limit", "04:00:00", 240.0),
        ("run.time_limit", "1-12", 2160.0),
        ("run.time_limit", "1-00:30", 1470.0),
        ("run.time_limit", "1-00:00:30", 1440.5),
        ("run.time_limit", "20:75", None),
    ],
)
def test_a_text_means_what_a_person_expects(name: str, text: str, value: Any, tmp_path: Path) -> None:
    for read in (lambda: parse([f"--{name}", text]), lambda: from_file(f"{name}: {text}\n", tmp_path)):
        if value is None and text != "null":
            with pytest.raises(UserError, match=f"{name} is {text}"):
                read()
        else:
            assert at(read(), name) == value


@pytest.mark.parametrize(
    "content", ["optim.lr: 0.2\noptim: {momentum: 0.5}\n", "optim: {momentum: 0.5}\noptim.lr: 0.2\n"]
)
def test_a_dotted_key_and_its_section_both_hold(content: str, tmp_path: Path) -> None:
    optim = from_file(content, tmp_path).optim
    assert (optim.lr, optim.momentum) == (0.2, 0.5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("optim.lr: 0.2\noptim: {lr: 0.2}\n", "recipe.yaml: optim.lr is set twice"),
        ("optim: {lr: 0.3}\noptim.lr: 0.2\n", "recipe.yaml: optim.lr is set twice"),
        ("optim.lr: 0.2\noptim.lr: 0.2\n", "optim.lr is set twice in line 2"),
        ("optim.lr: null\n", "recipe.yaml: optim.lr is null. Expected a float."),
        ("train:\n  epochs: null\n", "recipe.yaml: train.epochs is null. Expected an int."),
        ("run: {dir: null}\n", "recipe.yaml: run.dir is null"),
        ("optim: {lr: {a: 1}}\n", "recipe.yaml: optim.lr is"),
        ("optim:\n", "recipe.yaml: optim is empty. Expected its fields"),
        ("optim: null\n", "recipe.yaml: optim is empty. Expected its fields"),
        ("optim: {lr: 0,001}\n", "Write decimals with a point, not a comma."),
        ("optim:\n  lr: 0,001\n", "optim.lr is 0,001. Expected a float. Write decimals with a point, not a comma."),
        ("seed: 1\noptim:\n  lr\uff1a 0.1\n", "Line 3 has U+FF1A FULLWIDTH COLON."),
        ("optim:\n  lr:\u00a00.1\n", "Line 2 has U+00A0 NO-BREAK SPACE."),
        ("optim:\n\u00a0 lr: 0.1\n", "Line 2 has U+00A0 NO-BREAK SPACE."),
        ("optim:\n  lr: \u22120.1\n", "Line 2 has U+2212 MINUS SIGN."),
        ("optim:\n\tlr: 0.1\n", "'\\t' that cannot start any token in line 2"),
        ("seed: 1\noptim:\n  lr: 0.1\x07\n", "Line 3 has U+0007"),
        ("seed: !!int 3\n", "the tag tag:yaml.org,2002:int is not read in line 1"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_a_line_that_names_the_place(
    content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(content, encoding="utf-8")
    assert words in refusal(["--config", str(tmp_path / "recipe.yaml")], capsys)


PATHS = {
    "run.dir": "runs",
    "run.resume": "run/checkpoints/step-00000001",
    "data.root": "data",
    "data.name": "data.npz",
    "model.name": "net.py:make",
    "model.weights": "weights.safetensors",
}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("start", ["~/", "$PLACE/", "${PLACE}/"])
def test_a_path_is_filled_in(name: str, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{name}: {start}{PATHS[name]}\n")
    by_flag = parse([f"--{name}={start}{PATHS[name]}"])
    assert at(by_flag, name) == f"{tmp_path}/{PATHS[name]}"
    assert parse(["--config", str(file)]) == by_flag == parse([f"--config={start}recipe.yaml"])


def test_an_environment_variable_with_a_quoted_tilde_is_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("HOME", str(tmp_path)), ("XDG_CACHE_HOME", "~/cache"), ("MNIST_ROOT", "~/mnist")):
        monkeypatch.setenv(name, value)
    assert cache_dir() == tmp_path / "cache" / "lockstep"
    with pytest.raises(UserError, match=f"{tmp_path}/mnist"):
        find_folder(parse(["--data.download", "false"]).data)
    with pytest.raises(UserError, match=f"{tmp_path}/other"):
        launch_data(["--root", "~/other", "--no-download"])
    monkeypatch.setenv("MNIST_ROOT", "/data\r")
    with pytest.raises(UserError, match=r"\$MNIST_ROOT is '/data\\r'"):
        find_folder(parse(["--data.download", "false"]).data)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("start", "words"),
    [
        ("$UNSET/", "but $UNSET has no value"),
        ("a/${UNSET}/", "but ${UNSET} has no value"),
        ("$EMPTY/", "but $EMPTY has no value"),
        ("${HOME:-x}/", "has no value"),
        ("~no-such-user/", "no such user"),
        ("a\tb/", "a\\tb/"),
    ],
)
def test_a_path_that_cannot_be_filled_in_is_refused(
    name: str, start: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMPTY", "")
    for flag in (name, "config"):
        line = refusal([f"--{flag}={start}{PATHS[name]}"], capsys)
        assert f"{flag} is" in line
        assert words in line


def test_the_place_of_a_network_is_no_part_of_the_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for place in ("/one", "/two"):
        monkeypatch.setenv("PLACE", place)
        found.append(trajectory(parse([f"--{name}=$PLACE/{path}" for name, path in PATHS.items()])))
    assert found[0] == found[1]


def test_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    content = "optim:\n  lr: 0.5\nmodel.name: tiny\nwandb:\n  tags:\n    - a\n"
    plain = from_file(content, tmp_path)
    assert from_file(content.replace("\n", "\r\n"), tmp_path) == plain
    flags = ["--optim.lr=0.5\r", "--model.name", "tiny\r", "--wandb.tags", "[a]\r"]
    assert parse(flags) == plain == parse(["--config", f"{tmp_path}/recipe.yaml\r"])


def test_a_section_as_a_flag_is_read_as_in_a_file(tmp_path: Path) -> None:
    assert parse(["--optim", "{lr: 0.5, momentum: 010e-2}"]) == from_file(
        "optim: {lr: 0.5, momentum: 010e-2}\n", tmp_path
    )


def test_a_flag_never_takes_another_flag_as_its_value() -> None:
    with pytest.raises(UserError, match="group has no value"):
        parse(["--wandb.group", "--seed=3"])
