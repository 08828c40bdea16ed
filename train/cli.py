"""The command line of `python -m train`: argv -> Config, by jsonargparse; every refusal is one line.

Light on purpose: `--help` and a config error answer before torch would have been imported.
"""

import argparse
import dataclasses
import difflib
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from train import __version__, yamlfile
from train.config import Config
from train.errors import UserError

ALIAS = re.compile(r"^(--[\w.]+=)?[\[{&-](.*[\s\[{,:])?&\w.*[\s\[{,:]\*\w", re.DOTALL)
MAX_FLAG = 4096  # characters; the parser's C code overflows its stack on deeply nested values
MAX_MESSAGE = 400  # characters of a parser's message, which repeats what it was given


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose refusals are a UserError: one line, with the nearest valid name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing usage and leaving."""
        hint = "See --help."
        if wrong := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            hint = did_you_mean(wrong[1], list(self._option_string_actions), hint)
            message = f"{self.prog} has no option {wrong[1]}"
        elif wrong := re.match(r"argument ([^:]+): invalid choice: '?([^' ]*)", message):
            names = wrong[1].split("/")
            choices = next(a.choices for a in self._actions if names[0] in (*a.option_strings, a.metavar, a.dest)) or ()
            hint = did_you_mean(wrong[2], list(choices), hint)
            message = f"{wrong[1]} is {wrong[2]}. Use one of: {', '.join(choices)}"
        raise UserError(f"{' '.join(message.split())[:MAX_MESSAGE]}. {hint}")


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line at the first `--` into a command's own options and the arguments of the training."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:end]), list(argv[end + 1 :])


def did_you_mean(wrong: str, names: Sequence[str], otherwise: str) -> str:
    """`Did you mean NAME?` for the nearest of the valid names, or `otherwise`."""
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else otherwise


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
    files = [
        after if arg == "--config" else arg.partition("=")[2] for arg, after in pairs if re.match("--config(=|$)", arg)
    ]
    return [file for file in files if file]


def check_file(path: Path, names: Sequence[str]) -> None:
    """Raise UserError, naming the file, if it is no YAML mapping of config fields or leaves a number out."""
    content = yamlfile.read(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {content!r:.40}, expected config fields, such as `seed: 0`.")
    sections = {field.name: field.default_factory for field in dataclasses.fields(Config) if field.name != "seed"}
    known = [*names, *sections]
    for section, value in content.items():
        fields = (
            [f"{section}.{name}" for name in value]
            if section in sections and isinstance(value, dict)
            else [str(section)]
        )
        if unknown := [name for name in fields if name not in known]:
            raise UserError(
                f"There is no config field {unknown[0][:80]}, which {path} sets. "
                + did_you_mean(unknown[0], known, "See --help for the names.")
            )
        if section in sections and not isinstance(value, dict):
            raise UserError(
                f"{path}: {section} is {value!r:.40}. Expected fields of it, such as `{section}: {{name: value}}`."
            )
        for name, item in value.items() if section in sections else []:
            field_type = get_type_hints(sections[section])[name]
            if item is None and type(None) not in get_args(
                field_type
            ):  # the parser would build the section before it looks
                raise UserError(
                    f"{path}: {section}.{name} is null. Expected {getattr(field_type, '__name__', 'a value')}."
                )


def _one_line(message: str, names: Sequence[str]) -> str:
    """Turn a parser's message into one line in our own words, with the nearest valid field name where one was missed."""
    text = " ".join(message.split())[:MAX_MESSAGE]
    text = re.sub(r"""^Parser key "([^"]*)": """, r"\1: ", text)
    text = re.sub(r"<class '([^']*)'>", r"\1", text).replace("a typing.Literal", "one of ").replace("a int", "an int")
    unknown = re.match(r"unrecognized arguments: (?:--)?([^\s=]+)", text)
    unknown = unknown or re.match(r"Group '(?P<g>[^']*)' does not accept option '([^']*)'", text)
    if unknown:
        groups = unknown.groupdict()
        wrong = f"{groups['g']}.{unknown.group(2)}" if "g" in groups else unknown.group(1)
        return f"There is no config field {wrong}. {did_you_mean(wrong, names, 'See --help for the names.')}"
    if choice := re.search(r"one of \[(.*)\]\. Got value: (.*)", text):
        return f"{text.rstrip('.')}. {did_you_mean(choice[2], choice[1].replace(chr(39), '').split(', '), '')}".rstrip()
    return text if text.endswith(".") else text + "."


@functools.cache
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
    parser.add_argument(
        "--version", action="version", version=f"lockstep {__version__}", help="Print the version and leave."
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
        check_file(Path(file), names)
    for value in argv:  # a flag's value is read as YAML too
        if not value.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UserError(f"{value[:40]!a} is not UTF-8. Names and texts on the command line must be.")
        if ALIAS.search(value):
            raise UserError(f"{value[:40]}... uses YAML aliases, which are not read. Write the value out.")
        if len(value) > MAX_FLAG:
            raise UserError(f"{value[:40]}... has {len(value):,} characters. A flag takes at most {MAX_FLAG:,}.")
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
