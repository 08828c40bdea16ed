"""What `launch doctor` checks on this machine. Each check is a function of the config that yields findings.

Invariant: a check leaves nothing behind but the data cache, waits a bounded time, and never prints a key.
"""

import ctypes
import dataclasses
import netrc
import os
import platform
import shutil
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from launch.check import allreduce, repeat
from launch.run import count_gpus, nvidia_nodes
from train.config import Config
from train.errors import UserError, one_line

ROOT = Path(__file__).parents[2]
ALLREDUCE_SECONDS = 120.0  # a busy machine imports torch in 15
ALLREDUCE_BYTES = 25 << 20  # DDP's largest bucket
SLOW_BYTES_PER_SECOND = {"gloo": 50e6, "nccl": 2e9}
LARGEST_ERRORS = {"fp32": 1e-5, "tf32": 0.002, "bf16": 0.02, "fp16": 0.004}  # relative, of a product
WANDB_SECONDS = 2.0
SPARE_BYTES = 1 << 30  # on top of the checkpoints: logs, W&B's files, a cache
PROBE = (sys.executable, "-m", "launch.check.allreduce")
INSTALL = "pip install -e ."
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

    python = platform.python_version()
    try:
        wanted = metadata("lockstep")["Requires-Python"]
        ranges = [Requirement(text) for text in requires("lockstep") or []]
    except PackageNotFoundError:
        text = f"lockstep is not installed: required versions unknown (Python {python})"
        yield Finding("packages", "warn", text, INSTALL)
        return
    fits = SpecifierSet(wanted).contains(python, prereleases=True)
    yield Finding("python", "OK" if fits else "fail", f"{python}, needs {wanted}", "make PYTHON=python3.12")
    needed = [item for item in ranges if item.marker is None or item.marker.evaluate({"extra": ""})]
    file = ROOT / "constraints.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    pinned = {pin.name.lower(): pin for pin in pins if pin.marker is None or pin.marker.evaluate()}
    wrong, other = [], []
    for item in needed:
        try:
            found = version(item.name)
        except PackageNotFoundError:
            wrong.append(f"{item.name} is missing")
            continue
        if not item.specifier.contains(found, prereleases=True):
            wrong.append(f"{item.name} {found}, needs {item.specifier}")
        elif (pin := pinned.get(item.name.lower())) and not pin.specifier.contains(found, prereleases=True):
            other.append(f"{item.name} {found}, tested with {str(pin.specifier).lstrip('=')}")
    remedy = "pip install -c constraints.txt -e ." if lines else INSTALL
    if wrong:
        yield Finding("packages", "fail", "; ".join(wrong), remedy)
    if other:
        yield Finding("packages", "warn", f"{'; '.join(other)}: the bits may differ from a run on those", remedy)
    if not wrong and not other:
        which = "the tested versions" if pinned else "in the required ranges (no constraints.txt here)"
        yield Finding("packages", "OK", f"{len(needed)} packages, torch {version('torch')}: {which}")


def gpus(config: Config) -> Iterator[Finding]:
    """Check the GPUs that torch sees, and whether driver and NCCL fit the installed torch."""
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    visible, num_nodes = os.environ.get("CUDA_VISIBLE_DEVICES"), len(nvidia_nodes())
    if names:
        is_same = len(set(names)) == 1
        text = f"{len(names)} x {names[0]}" if is_same else f"different ones: {', '.join(names)}"
        yield Finding("gpus", "OK" if is_same else "warn", text, "train on GPUs of one kind: the slowest sets the pace")
        number = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
        yield driver(number.value, torch.version.cuda or "0")
        yield nccl(".".join(map(str, loaded_nccl())))
    elif num_nodes and visible != "":
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
        text = f"{num_nodes} on this machine, but torch (built for {built}) sees none"
        text += f" (CUDA_VISIBLE_DEVICES={visible or 'unset'})"
        yield Finding("gpus", "fail", text, "install the driver that nvidia-smi needs, and torch for its CUDA version")
    else:
        status: Status = "fail" if config.train.device == "cuda" else "OK"
        yield Finding("gpus", status, "none: training runs on the CPU", "train.device cpu, or a machine with a GPU")


def driver(found: int, built: str) -> Finding:
    """Compare the driver's newest CUDA version (1000 * major + 10 * minor) with the CUDA that torch was built for."""
    major, minor = (int(part) for part in f"{built}.0".split(".")[:2])
    text = f"driver supports CUDA {found // 1000}.{found % 1000 // 10}, torch was built for {built}"
    if found // 1000 < major:
        return Finding("driver", "fail", text, f"update the driver, or install torch for CUDA {found // 1000}")
    is_older = found < 1000 * major + 10 * minor
    return Finding("driver", "warn" if is_older else "OK", text, "update the driver if a kernel is missing")


def loaded_nccl() -> tuple[int, int, int]:
    """Return the version of the loaded NCCL; `torch.cuda.nccl.version()` is the one that torch was compiled with."""
    import torch  # noqa: F401  loads it

    number = ctypes.c_int()
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))
    return number.value // 10000, number.value // 100 % 100, number.value % 100


def nccl(loaded: str) -> Finding:
    """Compare the loaded NCCL with the one that torch requires."""
    names = [item.split("==")[0] for item in requires("torch") or [] if item.startswith("nvidia-nccl-cu")]
    wanted = version(names[0]) if names else loaded
    text = loaded if loaded == wanted else f"{loaded} is loaded, torch requires {wanted}"
    remedy = "LD_LIBRARY_PATH or LD_PRELOAD puts another libnccl first: unset it"
    return Finding("nccl", "OK" if loaded == wanted else "warn", text, remedy)


def precision(config: Config) -> Iterator[Finding]:
    """Check that the device computes in the config's precision, and in the others, closely enough."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, before `deterministic` needs it
    import torch
    from torch.nn.functional import conv2d

    from train.world.device import choose_device, set_tf32

    try:
        choose_device(config.train, 0, 1)
    except UserError as error:
        yield Finding("precision", "fail", str(error), "another train.precision or train.device")
        return
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    expected = left.double() @ right.double()
    for name, limit in LARGEST_ERRORS.items():
        try:
            device = choose_device(dataclasses.replace(config.train, precision=name), 0, 1)  # type: ignore[arg-type]
        except UserError as error:
            yield Finding(name, "OK", f"not here: {error}")
            continue
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
        before = set_tf32(name == "tf32", name == "tf32")
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):  # a product, as a convolution
            product = conv2d(right.T[..., None, None].to(device), left[..., None, None].to(device)).flatten(1).T
        set_tf32(*before)
        relative_error = float((product.double().cpu() - expected).norm() / expected.norm())
        text = f"relative error of a convolution {relative_error:.1e}, at most {limit}, in {product.dtype}"
        if product.dtype == dtype and relative_error < limit:
            yield Finding(name, "OK", text + (", slower than fp32" if is_emulated(device.type, name) else ""))
        else:
            status: Status = "fail" if config.train.precision == name else "warn"
            yield Finding(name, status, text, "use another train.precision, and report this to PyTorch")


def is_emulated(device_type: str, precision: str) -> bool:
    """Whether this CPU has no instructions for bf16."""
    cpu = Path("/proc/cpuinfo")
    return (device_type, precision) == ("cpu", "bf16") and cpu.exists() and "bf16" not in cpu.read_text()


def all_reduce(
    config: Config, program: tuple[str, ...] = PROBE, timeout: float = ALLREDUCE_SECONDS
) -> Iterator[Finding]:
    """Check that processes on this machine add up right, and how fast: one per GPU, or two on the CPU."""
    num_gpus = 0 if config.train.device == "cpu" else count_gpus()
    nproc, place = (num_gpus, []) if num_gpus > 1 else (2, ["--cpu"])
    arguments = ["--bytes", "4", str(ALLREDUCE_BYTES), "--timeout", str(timeout), *place]
    try:
        found = allreduce.run_local(program, nproc, arguments, timeout)
    except RuntimeError as error:
        remedy = "CPU: GLOO_SOCKET_IFNAME=lo, firewall on the loopback; GPU: NCCL_DEBUG=INFO, then NCCL_P2P_DISABLE=1"
        yield Finding("all-reduce", "fail", str(error), remedy)
        return
    backend, wrong = found[0]["backend"], sum(item["wrong"] for item in found)
    small, large = (max(item["seconds"][str(size)] for item in found) for size in (4, ALLREDUCE_BYTES))
    speed = ALLREDUCE_BYTES / large
    text = f"{nproc} processes over {backend}: 25 MiB at {speed / 1e9:.2f} GB/s, 4 bytes in {small * 1e6:,.0f} us"
    if wrong:
        remedy = "do not train here; on GPUs try NCCL_P2P_DISABLE=1"
        yield Finding("all-reduce", "fail", f"{wrong:,} wrong sums; {text}", remedy)
    elif speed < SLOW_BYTES_PER_SECOND[backend]:
        remedy = "is the machine busy? On GPUs: nvidia-smi topo -m"
        yield Finding("all-reduce", "warn", f"right but slow: {text}", remedy)
    else:
        yield Finding("all-reduce", "OK", f"right; {text}")


def deterministic(config: Config) -> Iterator[Finding]:
    """Check that the config's training step gives the same bits twice in exact mode."""
    status: Status = "fail" if config.train.exact else "warn"
    try:
        first, second, device = repeat.train_twice(config)
    except (RuntimeError, UserError) as error:
        yield Finding("deterministic", status, one_line(error, 120), "exact mode cannot run here")
        return
    steps = f"{repeat.STEPS} steps of {config.model.name} on {device} in {config.train.precision}"
    if first == second:
        yield Finding("deterministic", "OK", f"{steps}: the same bits twice")
    else:
        remedy = "exact mode is not exact here; python -m launch selftest"
        yield Finding("deterministic", status, f"{steps}: two runs have different bits", remedy)


def data(config: Config) -> Iterator[Finding]:
    """Check that the config's data set is on this machine and whole."""
    from train.storage import data

    remedy = f"python -m launch data --name {config.data.name}"
    remedy += f" --root {config.data.root}" if config.data.root else ""
    try:
        tensors, sha256 = data.prepare(dataclasses.replace(config.data, download=False))
    except data.DataMissing as error:
        yield Finding("data", "fail", str(error).split(". ")[0], remedy)
    except UserError as error:
        yield Finding("data", "fail", str(error), f"delete it, then {remedy}")
    else:
        text = f"{config.data.name}, {len(tensors['train_labels']):,} images, sha256 {sha256[:12]}"
        yield Finding("data", "OK", text)


def disk(config: Config) -> Iterator[Finding]:
    """Check that the run directory can be written and has room for the checkpoints."""
    from train.functional import models

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
    parameters = sum(parameter.nbytes for parameter in models.build(config.model, 0).parameters())
    copies = 1 + (2 if config.optim.name == "adamw" else 1) + bool(config.optim.ema)
    needed = parameters * copies * (config.checkpoint.keep + 2)  # the best one, and one that is being written
    free = shutil.disk_usage(place).free
    status: Status = "fail" if free < needed else "warn" if free < needed + SPARE_BYTES else "OK"
    text = f"{free / 1e9:,.1f} GB free in {place}; this run's checkpoints need {needed / 1e6:,.0f} MB"
    yield Finding("disk", status, text, remedy)


def has_wandb_key(host: str) -> bool:
    """Whether there is a key for a W&B server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def reach(url: str, seconds: float) -> str:
    """Return "" if a server answers in time, whatever the answer; otherwise why not."""
    reason = [f"no answer within {seconds:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=seconds).close()
        except urllib.error.HTTPError:
            pass
        except Exception as error:  # sockets, TLS and HTTP raise many kinds; each means that nothing useful answers
            reason[0] = str(getattr(error, "reason", error))
            return
        reason[0] = ""

    thread = threading.Thread(target=ask, daemon=True)  # a socket's time-out does not bound the look-up of a name
    thread.start()
    thread.join(seconds)
    return reason[0]


def wandb(config: Config) -> Iterator[Finding]:
    """Check that runs can be mirrored online. Training does not depend on it."""
    mode = config.wandb.mode if config.wandb.mode != "auto" else os.environ.get("WANDB_MODE", "auto")
    if mode in ("disabled", "offline"):
        yield Finding("wandb", "OK", mode)
        return
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = urlsplit(url).hostname or url
    has_key, reason = has_wandb_key(host), reach(url, WANDB_SECONDS)
    text = f"{host} does not answer ({reason[:100]})" if reason else f"{host} answers"
    text += "; a key is set" if has_key else "; no key is set"
    is_good = has_key and not reason
    status: Status = "OK" if is_good else "fail" if mode == "online" else "warn"
    remedy = "WANDB_MODE=offline; runs go offline by themselves" if reason else "wandb login, or WANDB_MODE=offline"
    yield Finding("wandb", status, text, remedy)


def slurm(config: Config) -> Iterator[Finding]:
    """Check whether this machine can submit jobs."""
    found = shutil.which("sbatch")
    yield Finding("slurm", "OK", f"{found}; `doctor --slurm` checks the cluster" if found else "none here")


CHECKS = (packages, gpus, precision, all_reduce, deterministic, data, disk, wandb, slurm)
