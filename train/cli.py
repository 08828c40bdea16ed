"""Command lines and YAML files -> Config. Every refusal is one line, and nothing heavy is imported before it.

A file is read as the flags that it stands for: its scalars are texts, and `_plain_value` turns a field's text into its
value, from a file and from a flag alike. Numbers are those of YAML 1.2. YAML is read as less than YAML: no aliases
(nine lines of them expand to gigabytes), no deep nesting, no repeated key, no tags. jsonargparse does the rest.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml

from train import __version__
from train.config import Config
from train.errors import UserError, did_you_mean, refused

MAX_BYTES = 65536  # of a YAML file
MAX_DEPTH = 8
MAX_MESSAGE = 400  # characters of a parser's message, which repeats its input
PATHS = ("run.dir", "run.resume", "data.name", "data.root", "model.name", "model.weights")
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
INTEGER = re.compile(r"[-+]?[0-9]{1,4000}|0o[0-7]{1,4000}|0x[0-9a-fA-F]{1,3000}")  # Python reads 4,300 digits
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)(e[-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.IGNORECASE)
VARIABLE = re.compile(r"\$(\w+|\{[^}]*\}?)", re.ASCII)
CLOCK = re.compile(r"(?:([0-9]{1,9})-)?([0-9]{1,9}(?::[0-5]?[0-9]){0,2})")
NULL = re.compile(r"(null|Null|NULL|~)\Z")
EXPECTED = {int: "an int", float: "a float", bool: "true or false", list[str]: "a list, such as [a, b]"}
DECIMALS = "Write decimals with a point, not a comma."
Field = dataclasses.Field[Any]
SECTIONS: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}
FIELDS: dict[str, Any] = {"seed": dataclasses.fields(Config)[0]} | {
    f"{section}.{field.name}": field for section, build in SECTIONS.items() for field in dataclasses.fields(build)
}
RENAMED = {
    "train.micro_batches": "train.num_micro_batches",
    "train.micro_batch_limit": "train.max_micro_batch_size",
    "wandb.entity": "wandb.project, as ENTITY/PROJECT",
    **dict.fromkeys(("wandb.start_seconds", "wandb.finish_seconds"), "wandb.timeout"),
    **dict.fromkeys(("wandb.histograms", "wandb.confusion", "wandb.mistakes"), "wandb.media"),
    **dict.fromkeys(("wandb.checkpoints", "wandb.code"), "wandb.artifacts"),
    "wandb.system": "$WANDB_X_DISABLE_STATS=true",
    "wandb.alerts": "a setting of your W&B account",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose refusals are a UserError: one line, with the nearest valid name."""

    def __init__(self, *, description: str | None, **kwargs: Any) -> None:
        """Show the description's first paragraph: it may be a module's docstring, None under `python -OO`."""
        super().__init__(description=(description or "").partition("\n\n")[0], allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage and exiting."""
        hint = "See --help."
        if wrong := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            guess = did_you_mean(wrong[1], list(self._option_string_actions), "")
            hint = "Pass training options after `--`." if "TRAIN ARGUMENTS" in (self.usage or "") else hint
            hint = f"{guess} {hint}".lstrip()
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


def recipe_name(argv: Sequence[str]) -> str | None:
    """Return the stem of the last `--config FILE` or `--config=FILE` on a command line, or None."""
    pairs = zip(argv, [*argv[1:], ""], strict=False)
    files = [
        after if arg == "--config" else arg.partition("=")[2] for arg, after in pairs if re.match("--config(=|$)", arg)
    ]
    stems = [Path(file).stem for file in files if file]
    return stems[-1] if stems else None


def run_name(config: Config, argv: Sequence[str], suffix: str) -> str:
    """Return run.name, or a name from the recipe and a suffix that distinguishes its runs.

    Raises UserError if the suffix breaks the rule of run.name.
    """
    stem = recipe_name(argv) or Path(config.data.name).stem
    stem = re.sub("[^A-Za-z0-9._=+-]+", "-", stem).lstrip("._=+-")[:100] or "run"
    return config.run.name or dataclasses.replace(config.run, name=f"{stem}-{suffix}").name or ""


class _Loader(yaml.SafeLoader):
    """Refuses what a config never needs and what may be an attack or a slip."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, unless it is an alias or nested too deep."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not read, write the value out", mark)
        if tag := self.peek_event().tag:
            raise yaml.composer.ComposerError(None, None, f"the tag {tag} is not read", self.peek_event().start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, "nested too deep", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Construct a mapping, unless a key repeats: the last one would win silently."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is set twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Texts(_Loader):
    """Reads every scalar as a text, except null: its field decides what it means."""

    yaml_implicit_resolvers = {letter: [("tag:yaml.org,2002:null", NULL)] for letter in "nN~"}  # noqa: RUF012


def load_yaml(text: str, loader: type[_Loader] = _Loader) -> Any:
    """Parse YAML. Raises ValueError with one line that says what is wrong."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text):,} characters, more than the {MAX_BYTES:,} that are read")
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join((getattr(error, "problem", None) or str(error)).split())
        raise ValueError(f"{problem[:200]}{f' in line {mark.line + 1}' if mark else ''}") from None


def expand_path(name: str, text: str) -> str:
    """Return a path with its ~, ~USER, $VARIABLE and ${VARIABLE} filled in. Raises UserError if one is unknown."""
    if any(unicodedata.category(letter) == "Cc" and letter != "\n" for letter in text):
        raise UserError(f"{name} is {text[:200]!r}. Remove the control character.")
    if re.match(r"[a-z0-9]+://", text):
        raise UserError(f"{name} is {text[:200]}. Expected a path in a file system, not an address.")
    path = os.path.expanduser(os.path.expandvars(text))
    found = VARIABLE.findall(text)
    if unset := [variable for variable in found if not os.environ.get(variable.strip("{}"))] or VARIABLE.findall(path):
        raise UserError(f"{name} is {text}, but ${unset[0]} has no value. Set it, or write the path out.")
    if path.startswith("~"):
        raise UserError(f"{name} is {text}, but there is no such user. Write ./{text} for a file of this name.")
    return path


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML, which `--config` reads back to an equal Config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _no_field(wrong: str) -> UserError:
    """Return the refusal of an unknown config field, with its new name or the nearest valid one."""
    if renamed := [new for old, new in RENAMED.items() if wrong in (old, old.partition(".")[2])]:
        return UserError(f"{wrong} is now {renamed[0]}.")
    is_comma = re.fullmatch(r"\w+\.[0-9]+", wrong)  # {lr: 0,001} has a field 001
    hint = DECIMALS if is_comma else did_you_mean(wrong, [*FIELDS, *SECTIONS], "See --help for the names.")
    return UserError(f"There is no config field {' '.join(wrong.split())[:80]}. {hint}")


def _number(field: Field, text: str) -> int | float | None:
    """Return the number of a field that a text stands for in YAML 1.2, or None. Minutes may be a time, as in Slurm."""
    if INTEGER.fullmatch(text) and field.type is int:
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    if FLOAT.fullmatch(text) and field.type is float:
        return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
    if field.metadata["range"].unit == "minutes" and (clock := CLOCK.fullmatch(text)):
        parts = [int(part) for part in clock[2].split(":")]
        if clock[1] is None and len(parts) == 2:
            parts = [0, *parts]  # M:SS
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return (int(clock[1] or 0) * 24 + hours) * 60 + minutes + seconds / 60
    return None


def _plain_value(name: str, given: Any) -> str:
    """Return a field's value in the form that the parser cannot misread. Raises UserError if it is none.

    This is where a text becomes a value. `given` is a flag's text or what a file holds: also None, a list or a mapping.
    """
    field, choices = FIELDS[name], get_args(FIELDS[name].type)
    hint = f"Expected {EXPECTED.get(field.type, 'a text')}."
    if given is None and type(None) in choices:
        return "null"
    if field.type == list[str]:
        items = load_yaml(given, _Texts) if isinstance(given, str) else given
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return json.dumps(items)
    elif isinstance(given, str):
        text = given.strip()
        if str in (field.type, *choices):
            return expand_path(name, given) if name in PATHS else given
        if field.type in (int, float):
            if (number := _number(field, text)) is not None:
                return re.sub(r"(inf|nan)", r".\1", repr(number))
            hint += f" {DECIMALS}" if "," in text else ""
        elif field.type is bool and text.lower() in BOOLEANS:
            return json.dumps(BOOLEANS[text.lower()])
        elif choices:
            if "on" in choices and text in ("true", "false"):  # in the configs of earlier runs
                text = "on" if text == "true" else "off"
            if text in choices:
                return text
            hint = f"Expected one of {', '.join(choices)}. {did_you_mean(text, choices, '')}".rstrip()
    shown = "null" if given is None else str(given) or "empty"
    raise UserError(f"{name} is {shown:.200}. {hint}")


def _flags(content: Any) -> Iterator[str]:
    """Yield the flags that a YAML mapping of config fields stands for. Raises UserError."""
    if not isinstance(content, dict):
        raise UserError(f"it holds {content or 'nothing'!s:.40}, expected config fields, such as `seed: 0`.")
    seen = set()
    for key, value in content.items():
        is_section = key in SECTIONS and isinstance(value, dict)
        fields = {f"{key}.{name}": item for name, item in value.items()} if is_section else {str(key): value}
        for name, item in fields.items():
            if name in SECTIONS:
                shown = item or "empty"
                raise UserError(f"{name} is {shown!s:.40}. Expected its fields, such as `{name}: {{name: value}}`.")
            if name not in FIELDS:
                raise _no_field(name)
            if name in seen:
                raise UserError(f"{name} is set twice. Remove one of the two.")
            seen.add(name)
            yield f"--{name}={_plain_value(name, item)}"


def _odd_character(text: str) -> str:
    """Say where a file has a character that looks like another one, such as a full-width colon."""
    for number, line in enumerate(text.split("\n"), 1):
        for letter in line.partition("#")[0]:
            if not (letter.isalnum() or letter == "\t" or (letter.isascii() and letter.isprintable())):
                return f" Line {number} has U+{ord(letter):04X} {unicodedata.name(letter, '(a control character)')}."
    return ""


def _file_flags(path: Path) -> list[str]:
    """Return the flags that a YAML file stands for. Raises UserError that names the file."""
    if not path.is_file():  # a pipe would block
        raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}. Expected a YAML file.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes. Expected a YAML file of at most {MAX_BYTES:,}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not YAML in UTF-8: {error.reason} at byte {error.start}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        return list(_flags(load_yaml(text, _Texts)))
    except ValueError as error:
        problem = error if isinstance(error, UserError) else f"not YAML: {error}."
        raise UserError(f"{path}: {problem}{_odd_character(text)}") from None


def _plain_arguments(argv: Sequence[str]) -> Iterator[str]:
    """Yield a command line with each file as the flags that it stands for, and each value in its plain form."""
    rest = iter([argument.rstrip("\r") for argument in argv])  # of a file with Windows line ends
    for argument in rest:
        flag, equals, text = argument.partition("=")
        name = flag.removeprefix("--")
        if name != flag and "." in name and name not in FIELDS:
            raise _no_field(name)
        if name == flag or name not in (*FIELDS, *SECTIONS, "config"):
            yield argument
            continue
        if not equals:
            text = next(rest, "--")
            if text.startswith("--"):
                raise UserError(f"{flag} has no value. Give one after it.")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"{text[:40]!a} is not UTF-8. Names and texts on the command line must be.")
        with refused(f"{flag} is not YAML"):
            if name == "config":
                yield from _file_flags(Path(expand_path(flag, text)))
            elif name in SECTIONS:
                yield from _flags({name: load_yaml(text, _Texts)})
            else:
                yield f"{flag}={_plain_value(name, None if NULL.match(text) else text)}"


def _one_line(message: str) -> UserError:
    """Turn a parser's message into one line in our words, with the nearest valid field name."""
    text = " ".join(message.split())[:MAX_MESSAGE]
    if unknown := re.match(r"unrecognized arguments: (?:--)?([^\s=]+)", text):
        return _no_field(unknown[1])
    return UserError(text if text.endswith(".") else text + ".")


@functools.cache
def make_parser() -> Any:
    """Build the command line of `python -m train` (a jsonargparse.ArgumentParser)."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    jsonargparse.set_loader("plain", lambda text: text, json_superset=False)  # it must not read values as YAML 1.1
    parser = jsonargparse.ArgumentParser(
        prog="python -m train",
        description="Train a CNN on MNIST. Later files and flags win. Paths may have ~ and $VARIABLES in them.",
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode="plain",
    )
    parser.add_argument(
        "--version", action="version", version=f"lockstep {__version__}", help="Print the version and exit."
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below; may be repeated.")
    parser.add_class_arguments(Config)
    for action in parser._actions:
        if action.dest in SECTIONS:  # jsonargparse says that it takes a file
            action.help = argparse.SUPPRESS
    return parser


def parse(argv: Sequence[str]) -> Config:
    """Turn a command line into a checked Config.

    Raises UserError with one line. `--help` and `--print_config` print and exit by SystemExit(0).
    """
    parser = make_parser()
    try:
        values = parser.parse_args(list(_plain_arguments(argv)))
        built = parser.instantiate(values)
        return Config(**{f.name: built[f.name] for f in dataclasses.fields(Config)})
    except UserError:
        raise
    except (argparse.ArgumentError, TypeError, ValueError, OSError, RecursionError) as error:
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, UserError):
            inner = inner.__cause__ or inner.__context__
        raise inner or _one_line(str(getattr(error, "message", error))) from None
