"""Command lines and YAML files -> Config. Every refusal is one line, and nothing heavy is imported before it.

YAML is read as less than YAML: no aliases (nine lines of them expand to gigabytes), no deep nesting, no repeated key,
no tags. jsonargparse does the rest; `_one_line` puts its messages into our words.
"""

import argparse
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from train import __version__
from train.config import Config
from train.errors import UserError, did_you_mean

MAX_BYTES = 65536  # of a YAML file
MAX_DEPTH = 8
MAX_FLAG = 4096  # characters; the parser's C code overflows its stack on deeply nested values
MAX_MESSAGE = 400  # characters of a parser's message, which repeats its input
ALIAS = re.compile(r"^(--[\w.]+=)?[\[{&-](.*[\s\[{,:])?&\w.*[\s\[{,:]\*\w", re.DOTALL)
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

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

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


def config_files(argv: Sequence[str]) -> list[str]:
    """Return the files of all `--config FILE` and `--config=FILE`, in their order."""
    pairs = zip(argv, [*argv[1:], ""], strict=False)
    files = [
        after if arg == "--config" else arg.partition("=")[2] for arg, after in pairs if re.match("--config(=|$)", arg)
    ]
    return [file for file in files if file]


def recipe_name(argv: Sequence[str]) -> str | None:
    """Return the stem of the last `--config FILE` on a command line, or None."""
    files = config_files(argv)
    return Path(files[-1]).stem if files else None


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


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that jsonargparse, but not YAML 1.1, would read back as floats, such as 1e3."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_.]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(text: str) -> Any:
    """Parse YAML. Raises ValueError with one line that says what is wrong."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text):,} characters, more than the {MAX_BYTES:,} that are read")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join((getattr(error, "problem", None) or str(error)).split())
        raise ValueError(f"{problem[:200]}{f' in line {mark.line + 1}' if mark else ''}") from None


def read_yaml(path: Path) -> Any:
    """Parse a YAML file. Raises UserError that names it."""
    if not path.is_file():  # a pipe would block, and a config is read more than once
        raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}. Expected a YAML file.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes. Expected a YAML file of at most {MAX_BYTES:,}.")
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not YAML in UTF-8: {error.reason} at byte {error.start}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not YAML: {error}.") from None


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML, which `--config` reads back to an equal Config."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False)


def _no_field(wrong: str, names: Sequence[str], source: str = "") -> UserError:
    """Return the refusal of an unknown config field, with its new name or the nearest valid one."""
    renamed = [new for old, new in RENAMED.items() if wrong in (old, old.partition(".")[2])]
    if renamed:
        return UserError(f"{wrong}{source} is now {renamed[0]}.")
    name, hint = " ".join(wrong.split())[:80], did_you_mean(wrong, names, "See --help for the names.")
    return UserError(f"There is no config field {name}{source}. {hint}")


def check_file(path: Path, names: Sequence[str]) -> None:
    """Raise UserError, naming the file, if it is no YAML mapping of config fields."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {content!r:.40}, expected config fields, such as `seed: 0`.")
    sections = [field.name for field in dataclasses.fields(Config) if field.name != "seed"]
    known = [*names, *sections]
    for section, value in content.items():
        is_section = section in sections
        fields = [f"{section}.{name}" for name in value] if is_section and isinstance(value, dict) else [str(section)]
        if unknown := [name for name in fields if name not in known]:
            raise _no_field(unknown[0], known, f" in {path}")
        if is_section and not isinstance(value, dict):
            expected = f"Expected its fields, such as `{section}: {{name: value}}`."
            raise UserError(f"{path}: {section} is {value!r:.40}. {expected}")


def _one_line(message: str, names: Sequence[str]) -> UserError:
    """Turn a parser's message into one line in our words, with the nearest valid field name."""
    text = " ".join(message.split())[:MAX_MESSAGE]
    text = re.sub(r"""^Parser key "([^"]*)": """, r"\1: ", text)
    text = re.sub(r"<class '([^']*)'>", r"\1", text).replace("a typing.Literal", "one of ").replace("a int", "an int")
    if unknown := re.match(r"unrecognized arguments: (?:--)?([^\s=]+)", text):
        return _no_field(unknown[1], names)
    if unknown := re.match(r"Group '([^']*)' does not accept option '([^']*)'", text):
        return _no_field(f"{unknown[1]}.{unknown[2]}", names)
    if choice := re.search(r"one of \[(.*)\]\. Got value: (.*)", text):
        hint = did_you_mean(choice[2], choice[1].replace("'", "").split(", "), "")
        return UserError(f"{text.rstrip('.')}. {hint}".rstrip())
    return UserError(text if text.endswith(".") else text + ".")


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
        "--version", action="version", version=f"lockstep {__version__}", help="Print the version and exit."
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below; may be repeated.")
    parser.add_class_arguments(Config)
    return parser


def _check_flag(value: str) -> None:
    """Raise UserError for a flag that the YAML parser must not see: a flag's value is read as YAML too."""
    if not value.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"{value[:40]!a} is not UTF-8. Names and texts on the command line must be.")
    if ALIAS.search(value):
        raise UserError(f"{value[:40]}... uses YAML aliases, which are not read. Write the value out.")
    if len(value) > MAX_FLAG:
        raise UserError(f"{value[:40]}... has {len(value):,} characters. A flag takes at most {MAX_FLAG:,}.")


def parse(argv: Sequence[str]) -> Config:
    """Turn a command line into a checked Config.

    Raises UserError with one line. `--help` and `--print_config` print and exit by SystemExit(0).
    """
    parser = make_parser()
    names = [action.dest for action in parser._actions if "." in action.dest or action.dest == "seed"]
    for file in config_files(argv):
        check_file(Path(file), names)
    for value in argv:
        _check_flag(value)
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
        raise inner or _one_line(str(getattr(error, "message", error)), names) from None
