"""Any bytes and values give a config, an IDX file or one line with the reason. Each format has one safe reader."""

import ast
import contextlib
import dataclasses
import io
import re
from typing import Any

import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from train import cli
from train.cli import parse, to_yaml
from train.config import Config
from train.errors import UserError, did_you_mean

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["cnn", "bf16", "digits", "1e3"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
SECTIONS = {field.name: field.default_factory for field in dataclasses.fields(Config) if field.name != "seed"}
NAMES = [f"{section}.{field.name}" for section, build in SECTIONS.items() for field in dataclasses.fields(build)]  # type: ignore


def is_config_or_one_line(argv: list[str]) -> None:
    try:
        assert isinstance(parse(argv), Config)
    except UserError as error:
        if "\n" in str(error):
            raise AssertionError(str(error)) from error


@given(content=st.dictionaries(st.sampled_from([*SECTIONS, "seed", "x"]), VALUES, max_size=3), data=st.data())
@settings(deadline=None, max_examples=60)
def test_any_mapping_is_a_config_or_refused(
    content: dict, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for path in data.draw(st.lists(st.sampled_from(NAMES), max_size=3)):
        section, name = path.split(".")
        if isinstance(content.setdefault(section, {}), dict):
            content[section][name] = data.draw(VALUES)
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8", errors="replace")
    is_config_or_one_line(["--config", str(file)])


@given(
    content=st.binary(max_size=200)
    | st.text(max_size=100).map(str.encode)
    | st.text("ab:{}[]&*- \n\"'|>?!%@", max_size=60).map(str.encode)
)
@settings(deadline=None, max_examples=100)
def test_any_bytes_are_a_config_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    is_config_or_one_line(["--config", str(file)])


@given(
    name=st.sampled_from([f"--{name}" for name in [*NAMES, "seed", *SECTIONS]]) | st.text(max_size=10),
    value=st.text(max_size=20) | VALUES.map(str) | st.text("[]{}:,&* -'\"a1", max_size=20),
)
@settings(deadline=None, max_examples=100)
def test_any_flag_is_a_config_or_refused(name: str, value: str) -> None:
    if name not in ("-h", "--help", "--version") and not name.startswith("--print_config"):
        is_config_or_one_line([name, value])


@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 10**40),
            "run.name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,50}", fullmatch=True),
            "wandb.notes": st.text(st.characters(codec="utf-8"), max_size=40)
            | st.sampled_from(["#", "~", "null", "1e3"]),
            "wandb.group": st.text(max_size=9),
            "wandb.tags": st.lists(st.text(max_size=9), max_size=4),
            "data.root": st.text("ab/. '#:,[{0-", max_size=9),
            "model.weights_skip": st.none() | st.text(max_size=9).filter(lambda text: text.strip() != "null"),
            "train.profile_steps": st.sampled_from([None, "0:10", "20:30"]),
            "train.cuda_graphs": st.sampled_from(["auto", "on", "off"]),
            "train.exact": st.just(False),
            "run.time_limit": st.floats(0, 1e6),
            "optim.lr": st.floats(1e-12, 999),
            "optim.momentum": st.floats(0, 0.999),
            "train.epochs": st.integers(1, 10**7),
        },
    )
)
@settings(deadline=None, max_examples=60)
def test_any_config_that_was_written_is_read_back(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    sections: dict[str, Any] = {}
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        sections.setdefault(section, {})[name] = value
    seed = sections.pop("", {"seed": 0})["seed"]
    config = Config(seed=seed, **{name: SECTIONS[name](**fields) for name, fields in sections.items()})  # type: ignore[operator]
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert parse(["--config", str(file)]) == config
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed:
        parse(["--config", str(file), "--print_config"])
    file.write_text(printed.getvalue(), encoding="utf-8")
    assert parse(["--config", str(file)]) == config


# The source code


def test_nothing_reads_yaml_or_tensors_in_an_unsafe_way() -> None:
    """One safe loader reads all YAML, and nothing evaluates or unpickles (ruff bans the imports).

    Nothing is executed but the file that `model.name` gives.

    torch.distributed's collectives of objects unpickle what any process in the group has sent.
    """
    unsafe = {
        "yaml.load",
        "yaml.safe_load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "eval",
        "exec",
        "os.system",
        "torch.load",
    }
    found = {
        f"{path.stem}: {ast.unparse(node.func)}"
        for path in [*(ROOT / "train").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (
            ast.unparse(node.func) in unsafe
            or re.search(r"_object(_list)?$", ast.unparse(node.func))
            or any(keyword.arg == "shell" for keyword in node.keywords)
        )
    }
    assert found == {"cli: yaml.load", "network: exec"}
    assert issubclass(cli._Loader, yaml.SafeLoader)


def test_did_you_mean_is_silent_about_what_is_far_away() -> None:
    assert did_you_mean("rum", ["run", "data"], "") == "Did you mean run?"
    assert did_you_mean("zzz", ["run", "data"], "Use run.") == "Use run."
