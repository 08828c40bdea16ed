"""launch.completion in real shells: TAB completes config fields, their values and subcommands, and file names as before."""

import os
import pty
import select
import shutil
import time
from pathlib import Path

import pytest

from launch import completion
from launch.__main__ import SUBCOMMANDS

SHELLS = {"bash": ("bash", "--norc", "--noprofile", "-i"), "zsh": ("zsh", "-f", "-i")}
CASES = [
    ("python -m train --optim.la", "--optim.label_smoothing"),
    ("python -m train --config x.yaml --optim.wa", "--optim.warmup"),
    ("python -m train --ver", "--version"),
    ("python3 -m train --data.name fash", "fashion_mnist"),
    ("python3 -m train --data.name=fash", "--data.name=fashion_mnist"),
    ("python -m train --train.exact t", "true"),
    ("torchrun --nproc-per-node 2 -m train --train.prec", "--train.precision"),
    ("python -m launch sel", "selftest"),
    ("python -m launch run --nproc 2 -- --train.glo", "--train.global_batch_size"),
    ("python -m train --config some_fi", "some_file.yaml"),
    ("python some_fi", "some_file.yaml"),
]


class Terminal:
    """A shell that believes that a person types."""

    def __init__(self, shell: str, script: Path, folder: Path) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            environment = {
                "PATH": os.environ["PATH"],
                "TERM": "dumb",
                "PS1": "$ ",
                "HOME": str(folder),
                "COLUMNS": "200",
            }
            os.execvpe(shell, SHELLS[shell], environment)
        self.type(f"source {script}; echo rea''dy\n")
        self.read_until("ready\r\n")

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def read_until(self, wanted: str, seconds: float = 60) -> str:
        found, deadline = "", time.monotonic() + seconds
        while wanted not in found:
            assert time.monotonic() < deadline, f"no {wanted!r} in {found!r}"
            if select.select([self.descriptor], [], [], 0.2)[0]:
                found += os.read(self.descriptor, 4096).decode(errors="replace")
        return found

    def close(self) -> None:
        os.close(self.descriptor)
        os.waitpid(self.pid, 0)


@pytest.mark.parametrize("shell", SHELLS)
def test_tab_completes_in_a_real_shell(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    assert completion.main([shell]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "some_file.yaml").touch()
    terminal = Terminal(shell, tmp_path / "script", tmp_path)
    try:
        for typed, wanted in CASES:
            terminal.type(f"{typed}\t")
            terminal.read_until(wanted)
            terminal.type("\x15")  # forget the line
        terminal.type("python -m train --optim.l\t\t")
        listing = terminal.read_until("label_smoothing")
        listing += terminal.read_until("lr") if "optim.lr" not in listing else ""
        assert "--optim.lr" in listing
    finally:
        terminal.close()


def test_script_holds_every_field_and_subcommand() -> None:
    from train.cli import make_parser

    script = completion.script(list(SUBCOMMANDS))
    fields = [action.option_strings[-1] for action in make_parser()._actions if "." in action.dest]
    assert [name for name in [*fields, *SUBCOMMANDS, "--seed", "--config", "--version"] if name not in script] == []
