"""What `launch doctor` looks at on this machine; each check is a function of the config that returns findings.

Invariant: a check changes nothing that stays (the data cache apart), waits a bounded time, and never prints a key.
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
from train.errors import UserError

ROOT = Path(__file__).parents[2]
ALLREDUCE_SECONDS = 120.0  # a busy machine imports torch in 15
ALLREDUCE_BYTES = 25 << 20  # DDP's largest bucket
SLOW_BYTES_PER_SECOND = {"gloo": 50e6, "nccl": 2e9}
LARGEST_ERRORS = {"fp32": 1e-5, "tf32": 0.002, "bf16": 0.02, "fp16": 0.004}  # relative, of a product
WANDB_SECONDS = 2.0
SPARE_BYTES = 1 << 30  # beside the checkpoints: logs, W&B's files, a cache
PROBE = (sys.executable, "-m", "launch.check.allreduce")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; a remedy wherever it is not OK."""

    name: str
    status: Literal["OK", "warn", "fail"]
    text: str
    remedy: str = ""


def python(config: Config) -> Iterator[Finding]:
    """The interpreter against the installed metadata."""
    from packaging.specifiers import SpecifierSet

    found = platform.python_version()
    try:
        wanted = metadata("lockstep")["Requires-Python"]
    except PackageNotFoundError:
        yield Finding(
            "python", "warn", f"{found}; lockstep is not installed, so nothing says which it needs", "pip install -e ."
        )
        return
    if SpecifierSet(wanted).contains(found, prereleases=True):
        yield Finding("python", "OK", f"{found} (needs {wanted})")
    else:
        yield Finding(
            "python", "fail", f"{found}, needs {wanted}", "make PYTHON=python3.12, or another Python of that range"
        )


def packages(config: Config) -> Iterator[Finding]:
    """Installed versions: outside the package's ranges is a failure, other than the tested pins a warning."""
    from packaging.requirements import Requirement

    try:
        ranges = [Requirement(text) for text in requires("lockstep") or []]
    except PackageNotFoundError:
        yield Finding(
            "packages", "warn", "lockstep is not installed, so nothing says which it needs", "pip install -e ."
        )
        return
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
    install = f"pip install {'-c constraints.txt ' if lines else ''}-e ."
    if wrong:
        yield Finding("packages", "fail", "; ".join(wrong), install)
    if other:
        yield Finding("packages", "warn", "; ".join(other) + ": the bits may differ from a run on those", install)
    if not wrong and not other:
        against = (
            "the tested versions" if pinned else "in the ranges of the installed metadata (no constraints.txt here)"
        )
        yield Finding("packages", "OK", f"{len(needed)} packages, torch {version('torch')}: {against}")


def gpus(config: Config) -> Iterator[Finding]:
    """The GPUs that torch sees, and whether the driver and NCCL fit the torch that is installed."""
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    nodes = nvidia_nodes()
    if names:
        same = len(set(names)) == 1
        text = f"{len(names)} x {names[0]}" if same else f"different ones: {', '.join(names)}"
        yield Finding(
            "gpus", "OK" if same else "warn", text, "" if same else "the slowest sets the pace: train on one kind"
        )
        number = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
        yield driver(number.value, torch.version.cuda or "0")
        yield nccl(".".join(map(str, loaded_nccl())))
    elif nodes and visible != "":
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU only"
        text = (
            f"{len(nodes)} on this machine, but torch ({built}) sees none (CUDA_VISIBLE_DEVICES={visible or 'unset'})"
        )
        yield Finding(
            "gpus", "fail", text, "install the NVIDIA driver that nvidia-smi needs, and torch for its CUDA version"
        )
    else:
        needs = config.train.device == "cuda"
        text, remedy = "none: training runs on the CPU", "train.device auto or cpu, or a machine with a GPU"
        yield Finding("gpus", "fail" if needs else "OK", text, remedy if needs else "")


def driver(found: int, built: str) -> Finding:
    """Judge the driver's newest CUDA version, as 1000 * major + 10 * minor, against the CUDA that torch was built for."""
    major, minor = (int(part) for part in f"{built}.0".split(".")[:2])
    text = f"driver supports CUDA {found // 1000}.{found % 1000 // 10}, torch was built for {built}"
    if found // 1000 < major:
        return Finding("driver", "fail", text, f"update the driver, or install torch for CUDA {found // 1000}")
    older = found < 1000 * major + 10 * minor
    return Finding(
        "driver", "warn" if older else "OK", text, "update the driver if a kernel is missing" if older else ""
    )


def loaded_nccl() -> tuple[int, int, int]:
    """Return the version of the NCCL in this process; `torch.cuda.nccl.version()` is the one that torch was compiled with."""
    import torch  # noqa: F401  loads it

    number = ctypes.c_int()
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))
    return number.value // 10000, number.value // 100 % 100, number.value % 100


def nccl(loaded: str) -> Finding:
    """Judge the NCCL that is loaded against the one that torch asks for."""
    wanted = next(
        (version(item.split("==")[0]) for item in requires("torch") or [] if item.startswith("nvidia-nccl-cu")), loaded
    )
    if loaded == wanted:
        return Finding("nccl", "OK", loaded)
    text = f"{loaded} is loaded, torch asks for {wanted}"
    return Finding("nccl", "warn", text, "LD_LIBRARY_PATH or LD_PRELOAD puts another libnccl first: unset it")


def precision(config: Config) -> Iterator[Finding]:
    """Whether the device computes in the config's arithmetic, and in the others, closely enough."""
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
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "bf16"
    for name, limit in LARGEST_ERRORS.items():
        try:
            device = choose_device(dataclasses.replace(config.train, precision=name), 0, 1)  # type: ignore[arg-type]
        except UserError as error:
            yield Finding(name, "OK", f"not here: {error}")
            continue
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
        before = set_tf32(name == "tf32", name == "tf32")
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):  # a convolution that is a product, too
            product = conv2d(right.T[..., None, None].to(device), left[..., None, None].to(device)).flatten(1).T
        set_tf32(*before)
        off = float((product.double().cpu() - expected).norm() / expected.norm())
        if product.dtype == dtype and off < limit:
            how = (
                ", emulated: slower than fp32 on this CPU"
                if (device.type, name) == ("cpu", "bf16") and "bf16" not in flags
                else ""
            )
            yield Finding(name, "OK", f"relative error of a convolution {off:.1e}{how}")
        else:
            text = f"a convolution has relative error {off:.1e} (at most {limit}) in {product.dtype}"
            wanted = config.train.precision == name
            yield Finding(
                name, "fail" if wanted else "warn", text, "use another train.precision, and report this to PyTorch"
            )


def all_reduce(
    config: Config, program: tuple[str, ...] = PROBE, timeout: float = ALLREDUCE_SECONDS
) -> Iterator[Finding]:
    """Whether real processes of this machine add up right, and how fast: one per GPU, or two on the CPU."""
    num_gpus = 0 if config.train.device == "cpu" else count_gpus()
    nproc = num_gpus if num_gpus > 1 else 2
    arguments = ["--bytes", "4", str(ALLREDUCE_BYTES), "--timeout", str(timeout), *([] if num_gpus > 1 else ["--cpu"])]
    try:
        found = allreduce.run_local(program, nproc, arguments, timeout)
    except RuntimeError as error:
        help_text = (
            "firewall on the loopback? GLOO_SOCKET_IFNAME=lo; on GPUs see NCCL_DEBUG=INFO, then try NCCL_P2P_DISABLE=1"
        )
        yield Finding("all-reduce", "fail", str(error), help_text)
        return
    backend, wrong = found[0]["backend"], sum(item["wrong"] for item in found)
    seconds = {size: max(item["seconds"][size] for item in found) for size in found[0]["seconds"]}
    speed = ALLREDUCE_BYTES / seconds[str(ALLREDUCE_BYTES)]
    text = (
        f"{nproc} processes over {backend}: 25 MiB at {speed / 1e9:.2f} GB/s, 4 bytes in {seconds['4'] * 1e6:,.0f} us"
    )
    if wrong:
        yield Finding(
            "all-reduce", "fail", f"{wrong:,} wrong sums; {text}", "do not train here; on GPUs try NCCL_P2P_DISABLE=1"
        )
    elif speed < SLOW_BYTES_PER_SECOND[backend]:
        yield Finding(
            "all-reduce", "warn", f"right but slow: {text}", "is the machine busy? On GPUs: nvidia-smi topo -m"
        )
    else:
        yield Finding("all-reduce", "OK", f"right; {text}")


def deterministic(config: Config) -> Iterator[Finding]:
    """Whether the config's training step gives the same bits twice in exact mode."""
    status: Literal["warn", "fail"] = "fail" if config.train.exact else "warn"
    try:
        (first, second), device = repeat.weights(config, times=2)
    except (RuntimeError, UserError) as error:
        yield Finding("deterministic", status, f"{str(error).splitlines()[0][:120]}", "exact mode cannot run here")
        return
    steps = f"{repeat.STEPS} steps of {config.model.name} on {device} in {config.train.precision}"
    if first == second:
        yield Finding("deterministic", "OK", f"{steps}: the same bits twice")
    else:
        text = f"{steps}: two runs have different bits"
        yield Finding(
            "deterministic", status, text, "exact mode cannot keep its promise here; python -m launch selftest"
        )


def data(config: Config) -> Iterator[Finding]:
    """Whether the config's data set is on this machine and whole."""
    from train.storage import data

    root = f" --root {config.data.root}" if config.data.root else ""
    try:
        tensors, sha256 = data.prepare(dataclasses.replace(config.data, download=False))
    except data.DataMissing as error:
        text = str(error).split(". Either")[0]
        yield Finding("data", "fail", text, f"python -m launch data --name {config.data.name}{root}")
    except UserError as error:
        yield Finding(
            "data", "fail", str(error), f"delete it, then python -m launch data --name {config.data.name}{root}"
        )
    else:
        yield Finding(
            "data", "OK", f"{config.data.name}, {len(tensors['train_labels']):,} images, sha256 {sha256[:12]}"
        )


def disk(config: Config) -> Iterator[Finding]:
    """Whether the run directory can be written and holds the checkpoints to come."""
    from train.functional import models

    wanted = Path(config.run.dir).absolute()
    place = next(path for path in (wanted, *wanted.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        text = f"{place} cannot be written: {error.strerror}"
        yield Finding("disk", "fail", text, "free space there, or another run.dir")
        return
    parameters = sum(parameter.nbytes for parameter in models.build(config.model, 0).parameters())
    copies = 1 + (2 if config.optim.name == "adamw" else 1) + bool(config.optim.ema)
    need = parameters * copies * (config.checkpoint.keep + 2)  # the best one, and one that is being written
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:,.1f} GB free in {place}; this run's checkpoints need {need / 1e6:,.0f} MB"
    status: Literal["OK", "warn", "fail"] = "fail" if free < need else "warn" if free < need + SPARE_BYTES else "OK"
    yield Finding("disk", status, text, "" if status == "OK" else "free space there, or another run.dir")


def wandb_key(host: str) -> bool:
    """Whether there is a key for a W&B server; the key itself is not returned."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def reach(url: str, seconds: float) -> str:
    """Return "" if a server answers in time, whatever it says; otherwise why not."""
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

    thread = threading.Thread(target=ask, daemon=True)  # the time-out of sockets does not bound the look-up of a name
    thread.start()
    thread.join(seconds)
    return reason[0]


def wandb(config: Config) -> Iterator[Finding]:
    """Whether runs can be mirrored online; nothing depends on it but the mirror."""
    mode = config.wandb.mode if config.wandb.mode != "auto" else os.environ.get("WANDB_MODE", "auto")
    if mode in ("disabled", "offline"):
        yield Finding("wandb", "OK", mode)
        return
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = urlsplit(url).hostname or url
    has_key = wandb_key(host)
    status: Literal["warn", "fail"] = "fail" if mode == "online" else "warn"
    if why := reach(url, WANDB_SECONDS):
        key = "a key is set" if has_key else "no key is set"
        yield Finding(
            "wandb", status, f"{host} does not answer ({why[:100]}); {key}", "runs go offline; WANDB_MODE=offline"
        )
    elif not has_key:
        yield Finding(
            "wandb", status, f"{host} answers, but there is no key for it", "wandb login, or WANDB_MODE=offline"
        )
    else:
        yield Finding("wandb", "OK", f"{host} answers, and a key is set")


def slurm(config: Config) -> Iterator[Finding]:
    """Whether this machine can submit jobs; `--slurm` looks closer."""
    found = shutil.which("sbatch")
    yield Finding("slurm", "OK", f"{found}; `doctor --slurm` looks closer" if found else "none here")


CHECKS = (python, packages, gpus, precision, all_reduce, deterministic, data, disk, wandb, slurm)
