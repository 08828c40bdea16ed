"""What a file system cannot do costs a warning at most: no lock, no sync of directories, no rename over a file."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks.processes import arguments, rows

from train.rundir import write_atomically

Python = Callable[..., subprocess.CompletedProcess[str]]
REFUSE = """
import errno, fcntl, os, stat

def refusing(inner, is_refused, code):
    def call(*arguments, **options):
        if is_refused(*arguments):
            raise OSError(code, os.strerror(code))
        return inner(*arguments, **options)
    return call

always = lambda *_: True
is_directory = lambda descriptor: stat.S_ISDIR(os.fstat(descriptor).st_mode)
exists = lambda source, target, *_: os.path.exists(target)
"""
LACKS = {
    "flock, ENOLCK": "fcntl.flock = refusing(fcntl.flock, always, errno.ENOLCK)",
    "flock, ENOSYS": "fcntl.flock = refusing(fcntl.flock, always, errno.ENOSYS)",
    "fsync, EINVAL": "os.fsync = refusing(os.fsync, always, errno.EINVAL)",
    "flock, EOPNOTSUPP": "fcntl.flock = refusing(fcntl.flock, always, errno.EOPNOTSUPP)",
    "fsync of directories, EINVAL": "os.fsync = refusing(os.fsync, is_directory, errno.EINVAL)",
    "fsync of directories, EACCES": "os.fsync = refusing(os.fsync, is_directory, errno.EACCES)",
    "open of directories": "os.open = refusing(os.open, lambda path, *_: os.path.isdir(path), errno.EISDIR)",
    "rename over a file": "os.replace = os.rename = refusing(os.rename, exists, errno.EEXIST)",
    "rename over a file, EPERM": "os.replace = refusing(os.replace, exists, errno.EPERM)",
    "hard links": "os.link = refusing(os.link, always, errno.EPERM)",
    "unlink of open files": "os.unlink = refusing(os.unlink, lambda path, *_: '.lock' in str(path), errno.EBUSY)",
    "chmod": "os.chmod = os.fchmod = refusing(os.chmod, always, errno.EPERM)",
    "a steady clock": "import time; inner = time.time; time.time = lambda: inner() - 9e6 * (os.getpid() % 3)",
    "mmap": "import mmap; mmap.mmap = refusing(mmap.mmap, always, errno.ENODEV)",
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("ability", LACKS)
def test_missing_ability_costs_a_warning_at_most(ability: str, tmp_path: Path, python: Python) -> None:
    (tmp_path / "sitecustomize.py").write_text(REFUSE + LACKS[ability])
    env = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = tmp_path / "run"
    argv = arguments(run, "--train.max_steps 30 --checkpoint.every_steps 10 --log.every_steps 1 --log.report true")
    stopped = python("-m", "train", *argv, "--run.time_limit", "0.0001", **env)
    assert stopped.returncode == 75, stopped.stderr
    done = python("-m", "train", *argv, **env)
    assert done.returncode == 0, done.stderr
    for line in (stopped.stderr + done.stderr).splitlines():
        assert line.startswith("warning: ")
    assert ("flock" in ability) == ("cannot be locked" in done.stderr)
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 31))
    assert json.loads((run / "summary.json").read_text())["outcome"] == "finished"
    assert len(list((run / "checkpoints").glob("step-*"))) == 2
    assert (run / "report.html").exists()


def test_file_is_replaced_where_renaming_over_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, inner = tmp_path / "file", os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target).exists():
            raise FileExistsError(17, "File exists")
        inner(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for content in (b"1", b"2", b"3"):
        write_atomically(path, content)
        assert path.read_bytes() == content
        assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_file_in_a_directory_without_permission_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        write_atomically(path, b"2")
    assert path.read_bytes() == b"1"
