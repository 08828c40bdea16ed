"""The command line of `python -m train`: argv -> Config, by jsonargparse; every refusal is one line.

Light on purpose: `--help` and a config error answer before torch would have been imported.
"""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from train.config import Config, UserError


def recipe_name(argv: Sequence[str]) -> str | None:
    """Return the stem of the last `--config FILE` on a command line, or None."""
    files = config_files(argv)
    return Path(files[-1]).stem if files else None


def run_name(config: Config, argv: Sequence[str], suffix: str) -> str:
    """The name of a run's directory: run.name, else the recipe's name and what tells this run from others of it."""
    return config.run.name or f"{recipe_name(argv) or config.data.name}-{suffix}"


def config_files(argv: Sequence[str]) -> list[str]:
    """The files of all `--config FILE` and `--config=FILE`, in their order."""
    pairs = zip(argv, [*argv[1:], ""], strict=False)
    files = [after if arg == "--config" else arg.partition("=")[2] for arg, after in pairs if re.match("--config(=|$)", arg)]
    return [file for file in files if file]


def check_file(path: Path, names: Sequence[str]) -> None:
    """Raise UserError, naming the file, if it is no YAML mapping of config fields or leaves a number out."""
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {content!r:.40}, expected config fields, such as `seed: 0`.")
    sections = {field.name: field.default_factory for field in dataclasses.fields(Config) if field.name != "seed"}
    known = [*names, *sections]
    for section, value in content.items():
        fields = [f"{section}.{name}" for name in value] if section in sections and isinstance(value, dict) else [str(section)]
        if unknown := [name for name in fields if name not in known]:
            near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]}?" if near else "See --help for the names."
            raise UserError(f"There is no config field {unknown[0]}, which {path} sets. {hint}")
        for name, item in value.items() if isinstance(value, dict) else []:
            field_type = get_type_hints(sections[section])[name]
            if item is None and field_type in (int, float, bool):  # the parser would build the section before it looks
                raise UserError(f"{path}: {section}.{name}: Expected a {field_type.__name__}. Got value: null.")


def _one_line(message: str, names: Sequence[str]) -> str:
    """Turn a parser's message into one line in our own words, with the nearest valid field name where one was missed."""
    text = " ".join(message.split())
    text = re.sub(r"""^Parser key "([^"]*)": """, r"\1: ", text)
    text = re.sub(r"<class '([^']*)'>", r"\1", text).replace("a typing.Literal", "one of ")
    unknown = re.match(r"unrecognized arguments: (?:--)?([^\s=]+)", text)
    unknown = unknown or re.match(r"Group '(?P<g>[^']*)' does not accept option '([^']*)'", text)
    if unknown:
        groups = unknown.groupdict()
        wrong = f"{groups['g']}.{unknown.group(2)}" if "g" in groups else unknown.group(1)
        near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else "See --help for the names."
        return f"There is no config field {wrong}. {hint}"
    return text if text.endswith(".") else text + "."


def make_parser() -> Any:
    """Build the command line of `python -m train` (a jsonargparse.ArgumentParser)."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="python -m train",
        description="Train a CNN on MNIST. Later files and flags win.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below; may be repeated.")
    parser.add_class_arguments(Config)
    return parser


def parse(argv: Sequence[str]) -> Config:
    """Turn a command line into a checked Config.

    Raises UserError with one line; `--help` and `--print_config` print and leave by SystemExit(0).
    """
    parser = make_parser()
    names = [action.dest for action in parser._actions if "." in action.dest or action.dest == "seed"]
    for file in config_files(argv):
        if Path(file).is_file():  # otherwise the parser complains
            check_file(Path(file), names)
    try:
        values = parser.parse_args(list(argv))
        built = parser.instantiate(values)
        return Config(**{f.name: built[f.name] for f in dataclasses.fields(Config)})
    except UserError:
        raise
    except (argparse.ArgumentError, TypeError, ValueError, OSError, RecursionError) as error:
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, UserError):
            inner = inner.__cause__ or inner.__context__
        raise inner or UserError(_one_line(str(getattr(error, "message", error)), names)) from None
