"""What `launch doctor` checks on this machine. Each check is a function of the config that yields findings.

Invariant: a check leaves nothing behind but the data cache, waits a bounded time, and never prints a key.
"""

import dataclasses
import netrc
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path
from typing import Literal
from unittest import mock
from urllib.parse import urlsplit

from launch.check import allreduce, selftest
from launch.run import Command, count_gpus, nvidia_nodes
from train.cli import to_yaml
from train.config import Config, DataConfig, RunConfig
from train.errors import RunError, UserError, one_line
from train.rundir import RunDir
from train.world.cores import choose_num_threads, count_cores, why_slow
from train.world.environment import versions
from train.world.launcher import Placement

ROOT = Path(__file__).parents[2]
PROCESS_SECONDS = 180.0  # for what starts processes; a busy machine imports torch in 15
ALLREDUCE_BYTES = 25 << 20  # DDP's largest bucket
STEPS, MAX_EXAMPLES = 3, 512  # of a training that is repeated, and of each of its steps
SPARE_BYTES = 1 << 30
PROBE: Command = (sys.executable, "-m", "launch.check.allreduce")
Status = Literal["OK", "warn", "fail"]


@dataclass
class Finding:
    """One line of the doctor's report. The remedy is dropped where nothing is wrong."""

    name: str
    status: Status
    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.status == "OK":
            self.remedy = ""


def packages(config: Config) -> Iterator[Finding]:
    """Compare Python and packages with the installed metadata: outside its ranges is a failure, untested a warning."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    python, remedy = platform.python_version(), "pip install -c constraints.txt -e ."
    try:
        wanted = metadata("lockstep")["Requires-Python"]
        needed = [Requirement(text) for text in requires("lockstep") or []]
    except PackageNotFoundError:
        yield Finding("packages", "warn", "lockstep is not installed: required versions unknown", remedy)
        return
    fits = SpecifierSet(wanted).contains(python, prereleases=True)
    wrong, untested = [] if fits else [f"Python {python}, not {wanted}"], []
    needed = [item for item in needed if item.marker is None or item.marker.evaluate({"extra": ""})]
    found = versions("torch", *(item.name for item in needed))
    file = ROOT / "constraints.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    parsed = [Requirement(line) for line in lines if not line.startswith("#")]
    pins = {pin.name.lower(): pin.specifier for pin in parsed if pin.marker is None or pin.marker.evaluate()}
    for item in needed:
        pin = pins.get(item.name.lower(), item.specifier)
        if item.name not in found:
            wrong.append(f"{item.name} is missing")
        elif not item.specifier.contains(found[item.name], prereleases=True):
            wrong.append(f"{item.name} {found[item.name]}, not {item.specifier}")
        elif not pin.contains(found[item.name], prereleases=True):
            untested.append(f"{item.name} {found[item.name]}, not {pin}")
    if wrong:
        yield Finding("packages", "fail", "; ".join(wrong), remedy)
    elif untested:
        yield Finding("packages", "warn", f"{'; '.join(untested)}: other bits than a run on those", remedy)
    else:
        which = "the tested versions" if pins else "in the required ranges (no constraints.txt here)"
        yield Finding("packages", "OK", f"Python {python}, {len(needed)} packages, torch {found['torch']}: {which}")


def gpus(config: Config) -> Iterator[Finding]:
    """Check that torch sees the GPUs of this machine."""
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    visible, num_nodes = os.environ.get("CUDA_VISIBLE_DEVICES"), len(nvidia_nodes())
    if names:
        is_same = len(set(names)) == 1
        text = f"{len(names)} x {names[0]}" if is_same else f"different ones: {', '.join(names)}"
        yield Finding("gpus", "OK" if is_same else "warn", text, "train on GPUs of one kind: the slowest sets the pace")
    elif num_nodes and visible != "":
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
        text = f"{num_nodes} on this machine, but torch (built for {built}) sees none"
        text += f" (CUDA_VISIBLE_DEVICES={visible or 'unset'})"
        yield Finding("gpus", "fail", text, "install the driver that nvidia-smi needs, and torch for its CUDA version")
    else:
        status: Status = "fail" if config.train.device == "cuda" else "OK"
        yield Finding("gpus", status, "none: training runs on the CPU", "train.device cpu, or a machine with a GPU")


def cores(config: Config) -> Iterator[Finding]:
    """Check that the cores are free for the threads of a training of one process, and say what limits them."""
    num_cores, num_threads = count_cores(), choose_num_threads(config.train, Placement(0, 1, 0, 1))
    limit = f" of {os.cpu_count()}, by affinity or quota" if num_cores < (os.cpu_count() or 1) else ""
    text, reason = f"{num_cores}{limit}; {num_threads} thread(s) for one process", why_slow(num_threads, 1)
    yield Finding("cores", "warn" if reason else "OK", f"{text}; {reason}" if reason else text, "wait, or stop others")


def precision(config: Config) -> Iterator[Finding]:
    """Check that this machine has the config's device, and that it can compute in the config's precision."""
    from train.world.device import choose_device

    try:
        text = f"{config.train.precision} on {choose_device(config.train, 0, 1).type}"
        yield Finding("precision", "OK", text)
    except UserError as error:
        yield Finding("precision", "fail", str(error), "another train.precision or train.device")


def all_reduce(config: Config, program: Command = PROBE, timeout: float = PROCESS_SECONDS) -> Iterator[Finding]:
    """Check that processes on this machine add up right, and how fast: one per GPU, or two on the CPU."""
    num_gpus = 0 if config.train.device == "cpu" else count_gpus()
    nproc, place = (num_gpus, []) if num_gpus > 1 else (2, ["--cpu"])
    arguments = ["--bytes", "4", str(ALLREDUCE_BYTES), "--timeout", str(timeout), *place]
    try:
        found = allreduce.run_local(program, nproc, arguments, timeout)
    except (RunError, TimeoutError) as error:
        remedy = "CPU: GLOO_SOCKET_IFNAME=lo, firewall on the loopback; GPU: NCCL_DEBUG=INFO, then NCCL_P2P_DISABLE=1"
        yield Finding("all-reduce", "fail", str(error), remedy)
        return
    num_wrong = sum(item["wrong"] for item in found)
    small, large = (max(item["seconds"][str(size)] for item in found) for size in (4, ALLREDUCE_BYTES))
    speed = f"25 MiB at {ALLREDUCE_BYTES / large / 1e9:.2f} GB/s, 4 bytes in {small * 1e6:,.0f} us"
    text = f"{num_wrong:,} wrong sums, {nproc} processes over {found[0]['backend']}: {speed}"
    remedy = "do not train here; on GPUs try NCCL_P2P_DISABLE=1"
    yield Finding("all-reduce", "fail" if num_wrong else "OK", text, remedy)


def deterministic(config: Config) -> Iterator[Finding]:
    """Check that two trainings of the config's model give the same bits: a few steps in exact mode, on noise."""
    micro_batches = config.train.num_micro_batches or 1
    batch = micro_batches * max(1, min(config.train.global_batch_size, MAX_EXAMPLES) // micro_batches)
    quick = dataclasses.replace(
        config.train,
        max_steps=STEPS,
        exact=True,
        global_batch_size=batch,
        num_micro_batches=micro_batches,
        max_micro_batch_size=0,
        compile=False,
        cuda_graphs="off",
    )
    noise = DataConfig(name="random", random_examples=6 + STEPS * batch)
    status: Status = "fail" if config.train.exact else "warn"
    # In exact mode torch makes a folder of Inductor's, which would stay.
    with tempfile.TemporaryDirectory() as directory, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=directory):
        file, runs = Path(directory) / "config.yaml", [RunDir(Path(directory) / name) for name in ("first", "second")]
        file.write_text(to_yaml(dataclasses.replace(config, train=quick, data=noise, run=RunConfig())))
        try:
            for run in runs:
                selftest.train(run, 1, ["--config", str(file)], seconds=PROCESS_SECONDS)
        except (RunError, TimeoutError) as error:
            yield Finding("deterministic", status, one_line(error, 250), "exact mode cannot run here")
            return
        summaries = [run.read_summary() for run in runs]
    is_same = len({summary.weights_sha256 for summary in summaries if summary}) == 1
    bits = "the same bits twice" if is_same else "two runs have different bits"
    text = f"{STEPS} steps of {config.model.name} in {config.train.precision}: {bits}"
    remedy = "exact mode is not exact here; python -m launch selftest"
    yield Finding("deterministic", "OK" if is_same else status, text, remedy)


def data(config: Config) -> Iterator[Finding]:
    """Check that the config's data set is on this machine and whole."""
    from train.storage import data
    from train.storage.built_in import DataMissing, title

    remedy = f"python -m launch data {config.data.path or f'--name {config.data.name}'}"
    remedy += f" --root {config.data.root}" if config.data.root else ""
    source = dataclasses.replace(config.data, download=False)
    try:
        found, sha256 = data.prepare(source)
    except DataMissing as error:
        yield Finding("data", "fail", str(error).split(". ")[0], remedy)
    except UserError as error:
        yield Finding("data", "fail", str(error), remedy if config.data.path else f"move it away, then {remedy}")
    else:
        images = f"{len(found.tensors['train_labels']):,} images"
        yield Finding("data", "OK", f"{title(source)}, {images}, sha256 {sha256[:12]}")


def disk(config: Config) -> Iterator[Finding]:
    """Check that the run directory can be written and has room."""
    remedy = "free space there, or another run.dir"
    wanted = Path(config.run.dir).absolute()
    place = next(path for path in (wanted, *wanted.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        yield Finding("disk", "fail", f"{place} cannot be written: {error.strerror}", remedy)
        return
    free = shutil.disk_usage(place).free
    status: Status = "fail" if free < SPARE_BYTES / 10 else "warn" if free < SPARE_BYTES else "OK"
    yield Finding("disk", status, f"{free / 1e9:,.1f} GB free in {place}", remedy)


def wandb(config: Config) -> Iterator[Finding]:
    """Check that there is a key for W&B. Training does not depend on it."""
    from train.tracking.wandb import resolve

    if (mode := resolve(config.wandb).mode) in ("disabled", "offline"):
        yield Finding("wandb", "OK", mode)
        return
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        found = None
    if found or os.environ.get("WANDB_API_KEY"):
        yield Finding("wandb", "OK", f"a key for {host} is set")
    else:
        status: Status = "fail" if config.wandb.mode == "online" else "warn"
        yield Finding("wandb", status, f"no key for {host} is set", "wandb login, or WANDB_MODE=offline")


CHECKS = (packages, gpus, cores, precision, all_reduce, deterministic, data, disk, wandb)
