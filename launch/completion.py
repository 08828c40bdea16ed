"""`python -m launch completion bash|zsh`: print a script that completes `python -m train` and `python -m launch`.

`eval "$(python -m launch completion bash)"` in ~/.bashrc. Every name is in the script: pressing TAB starts no Python. Other
commands of `python` keep their file names. Deliberately no package: those that complete from a parser know no `python -m`.
"""

import argparse
import dataclasses
import shlex
from typing import Any, get_args

from train.cli import Parser, make_parser
from train.config import Config

SHELLS = ("bash", "zsh")
COMMANDS = ("python", "python3", "torchrun", "accelerate")
SCRIPT = """_lockstep() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} program= words= prefix= i
  for ((i = 1; i < COMP_CWORD; i++)); do
    case "${{COMP_WORDS[i-1]}} ${{COMP_WORDS[i]}}" in
      "-m train") program=train ;;
      "-m launch") program=launch; ((i + 1 == COMP_CWORD)) && words={subcommands} ;;
      *" --") [[ $program = launch ]] && program=train ;;
    esac
  done
  COMPREPLY=()
  [[ $program ]] || return 0
  if [[ $cur = --*=* ]]; then prefix="${{cur%%=*}}=" prev=${{cur%%=*}} cur=${{cur#*=}}  # zsh keeps it one word
  elif [[ $cur = "=" ]]; then cur=; elif [[ $prev = "=" ]]; then prev=${{COMP_WORDS[COMP_CWORD-2]}}; fi
  if [[ $program = train && ! $words ]]; then
    case "$prev" in
{values}
    esac
    [[ $words || $cur = -* ]] || return 0
    [[ $words ]] || words={flags}
  fi
  COMPREPLY=($(compgen -P "$prefix" -W "$words" -- "$cur"))
}}
complete -o default -o bashdefault -F _lockstep {commands}
"""
ZSH = "autoload -U +X compinit && compinit -u\nautoload -U +X bashcompinit && bashcompinit\n"


def choices(action: Any) -> tuple[str, ...]:
    """The values that a flag of `python -m train` accepts, where they are few."""
    kind = getattr(action, "_typehint", None)
    values = ("true", "false") if kind is bool else get_args(kind)
    return tuple(value for value in values if isinstance(value, str))


def script(subcommands: list[str]) -> str:
    """Return the script, for bash; zsh runs it too."""
    sections = {field.name for field in dataclasses.fields(Config)} - {
        "seed"
    }  # --optim takes a mapping: not worth a TAB
    actions = [
        action for action in make_parser()._actions if action.help != argparse.SUPPRESS and action.dest not in sections
    ]
    flags = [action.option_strings[-1] for action in actions]
    lines = [
        f"      {action.option_strings[-1]}) words={shlex.quote(' '.join(values))} ;;"
        for action in actions
        if (values := choices(action))
    ]
    return SCRIPT.format(
        subcommands=shlex.quote(" ".join(subcommands)),
        flags=shlex.quote(" ".join(flags)),
        values="\n".join(lines),
        commands=" ".join(COMMANDS),
    )


def main(argv: list[str]) -> int:
    """Print the script for a shell; return the exit code."""
    parser = Parser(prog="python -m launch completion", description=__doc__.split("\n")[0])
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")
    shell = parser.parse_args(argv).shell
    from launch.__main__ import SUBCOMMANDS

    print(ZSH if shell == "zsh" else "", end="")
    print(script(list(SUBCOMMANDS)), end="")
    return 0
