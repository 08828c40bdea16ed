"""Read YAML that a person or a stranger wrote: small, flat, plain values, or one line that says why not; and write it.

Deliberately less than YAML: no aliases (nine lines of them expand to gigabytes), no deep nesting, no repeated key, no tags.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from train.errors import UserError


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that jsonargparse, but not YAML 1.1, would read back as floats, such as 1e3."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_.]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)

MAX_BYTES = 65536
MAX_DEPTH = 8


class _Loader(yaml.SafeLoader):
    """Refuses what is never needed in a config and may be an attack or a slip."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, unless it is an alias or lies too deep."""
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


def load(text: str) -> Any:
    """Parse YAML; raise ValueError with one line about what is wrong with it."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text):,} characters, more than the {MAX_BYTES:,} that are read")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join((getattr(error, "problem", None) or str(error)).split())
        raise ValueError(f"{problem[:200]}{f' in line {mark.line + 1}' if mark else ''}") from None


def read(path: Path) -> Any:
    """Parse a YAML file; raise UserError, naming it, if that cannot be done."""
    if not path.is_file():  # a pipe would block, and a config is read more than once
        raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}. Expected a YAML file.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes. Expected a YAML file of at most {MAX_BYTES:,}.")
    try:
        return load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not YAML in UTF-8: {error.reason} at byte {error.start}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not YAML: {error}.") from None


def dump(content: dict[str, Any]) -> str:
    """Write plain values as YAML that `load` and jsonargparse read back."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)
