"""Plan a visit stage by stage: its commands, their ranks, and why some cannot run on this machine."""

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gpu.visit import CannotRun, Failed, Job

STAGES = ("correct", "speed", "ranks")  # ranks that share a GPU may hang: they come last
PYTHON = sys.executable
TESTS = Path(__file__).parents[1]
WORLDS = (2, 3, 4)
SHARING_NCCL = (2, 30)  # the first version that lets several ranks share a GPU
BITS = ("weights_sha256", "ema_weights_sha256", "fingerprints_sha256")
NO_MNIST = "needs MNIST: set MNIST_ROOT, or copy .gpu/ made by tests/gpu/pack.sh"

SMALL = (
    "--data.name digits --train.global_batch_size 64 --train.num_micro_batches 8 --log.every_steps 1 --train.exact true"
)
PLAIN = f"{SMALL} --model.name cnn --train.precision bf16 --train.max_steps"
EVERY = (
    f"{SMALL} --model.name tiny_bn --model.dropout 0.2 --augment.shift 2 --augment.rotate 10 --augment.erase 0.3 "
    "--optim.ema 0.9 --optim.clip_norm 0.5 --optim.lr 0.05 --train.precision bf16 --train.max_steps"
)


@dataclass
class Machine:
    """The facts about a machine that decide which rows can run."""

    device: str
    work: Path
    num_gpus: int = 0
    memory_gb: float = 0.0  # of one GPU
    nccl: tuple[int, ...] = ()
    nccl_library: str = ""  # an unpacked libnccl.so.2 of 2.30 or newer; check.sh may still be unpacking it
    missing: list[str] = field(default_factory=list)  # packages
    has_mnist: bool = False

    @property
    def is_dry(self) -> bool:
        """Whether this is the dry run on a CPU."""
        return self.device == "cpu"

    def spared(self, reason: str) -> str:
        """Return why a dry run leaves a row out, or nothing."""
        return f"not in the dry run: {reason}" if self.is_dry else ""

    def needs(self, *packages: str) -> str:
        """Return why a command that needs packages cannot run, or nothing."""
        absent = [name for name in packages if name in self.missing]
        return f"needs {' and '.join(absent)}: not installed" if absent else ""

    def nccl_env(self) -> dict[str, str]:
        """Return the variables that let NCCL ranks share the only GPU; none where each rank has its own."""
        if self.num_gpus != 1:
            return {}
        env = {
            "LOCKSTEP_SHARE_GPU": "nccl",
            "NCCL_MULTI_RANK_GPU_ENABLE": "1",
            "NCCL_NVLS_ENABLE": "0",
            "NCCL_MAX_CTAS": "2",
        }
        return env | ({"LD_PRELOAD": self.nccl_library} if self.nccl_library else {})

    def why_no_nccl(self, ranks: int) -> str:
        """Return why so many NCCL ranks cannot run here, or nothing."""
        if self.is_dry:
            return "needs a GPU"
        if self.num_gpus > 1:
            return f"needs {ranks} GPUs: this machine has {self.num_gpus}" if ranks > self.num_gpus else ""
        if self.nccl_library or self.nccl >= SHARING_NCCL:
            return ""
        found = ".".join(map(str, self.nccl))
        return (
            f"needs NCCL 2.30 or a second GPU: this machine has one GPU and NCCL {found}, and no .gpu/libnccl.so.2.xz"
        )


def module(name: str, *arguments: str) -> list[str]:
    """Return a command that runs a module of the checkout."""
    return [PYTHON, "-m", name, *arguments]


def train(machine: Machine, name: str, ranks: int, flags: str, limit: float = 150, **extra: Any) -> Job:
    """Train under `launch run`, in a directory of its own; later flags win."""
    quiet = f"--run.name {name} --log.progress false --log.report false --train.device {machine.device}"
    quiet += " --train.num_threads 1" if machine.is_dry else ""
    arguments = f"--nproc {ranks} -- {flags} {quiet}".split()
    return Job(name, limit, module("launch", "run", *arguments, "--run.dir", str(machine.work)), **extra)


def accelerate(machine: Machine, name: str, ranks: int, **extra: Any) -> Job:
    """Train under `accelerate launch`."""
    flags = f"--num_processes {ranks} --num_machines 1 --mixed_precision no --dynamo_backend no"
    flags += " --multi_gpu" if ranks > 1 else ""
    steps = "--train.max_steps 8 --train.num_threads 1" if machine.is_dry else ""
    training = f"--config configs/smoke.yaml --run.name {name} --log.progress false --log.report false {steps}"
    command = [*module("accelerate.commands.launch"), *flags.split(), "-m", "train", *training.split()]
    extra["env"] = {**extra.get("env", {}), **({"ACCELERATE_USE_CPU": "1"} if machine.is_dry else {})}
    return Job(name, 100, [*command, "--run.dir", str(machine.work)], **extra)


def compare(work: Path, names: Iterable[str]) -> str:
    """Return a line that reports the same bits for all trainings; raise Failed if they differ."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        path = work / name / "summary.json"
        if path.exists():
            summary = json.loads(path.read_text())
            found[name] = summary | {"fingerprints_sha256": (summary.get("fingerprints") or {}).get("sha256")}
    if len(found) < 2:
        raise CannotRun(f"needs two trainings that finished: there is {' '.join(found) or 'none'}")
    first = next(iter(found))
    wrong = [
        f"{name} {key[:-7]}" for name, run in found.items() for key in BITS if run.get(key) != found[first].get(key)
    ]
    if wrong:
        raise Failed(f"other bits than {first}: {', '.join(wrong)}")
    return f"{len(found)} trainings, {sorted(run['world_size'] for run in found.values())} ranks, have the same bits"


def unit(name: str, limit: float, machine: Machine, *groups: str, **extra: Any) -> Job:
    """Run groups of checks in one process."""
    return Job(name, limit, module("gpu.unit", "--device", machine.device, *groups), **extra)


def correct(machine: Machine) -> list[list[Job]]:
    """Return, in waves, the checks that time nothing and can run side by side."""
    no_gpu = "needs a GPU" if machine.is_dry else ""
    no_gloo = f"this machine has {machine.num_gpus} GPUs: NCCL exchanges between them" if machine.num_gpus > 1 else ""
    share = {} if machine.is_dry else {"LOCKSTEP_SHARE_GPU": "gloo"}
    steps = "12" if machine.is_dry else "60"
    as_every, in_suite = (
        machine.spared("every-1 and gloo-every-2 show the same"),
        machine.spared("tests/launch/test_selftest.py runs it"),
    )
    small = "--data.name digits --train.max_steps 8" if machine.is_dry else ""
    gpu_tests = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    pytest = [*module("pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", "not compile"), *gpu_tests]
    doctor = (
        f"--data.name {'digits' if machine.is_dry else 'mnist'} --train.precision bf16 --train.device {machine.device}"
    )
    models = ("modes-cnn", "modes-vgg", "modes-tiny_bn")
    modes = [models] if machine.is_dry else [(name,) for name in models]  # a process each, or one for all
    trainings = [
        train(machine, "quickstart", 1, f"--config configs/quickstart.yaml {small}"),
        train(machine, "every-1", 1, f"{EVERY} {steps}"),
        train(machine, "gloo-every-2", 2, f"{EVERY} {steps}", env=share, why_not=no_gloo),
        *(train(machine, f"gloo-every-{n}", n, f"{EVERY} 60", env=share, why_not=no_gloo or as_every) for n in (3, 4)),
        train(machine, "plain-1", 1, f"{PLAIN} 60", why_not=as_every),
        train(machine, "gloo-plain-2", 2, f"{PLAIN} 60", env=share, why_not=no_gloo or as_every),
    ]
    checks = [
        *(unit("modes" if machine.is_dry else each[0], 150, machine, *each) for each in modes),
        unit("numbers", 120, machine, "alignment", "hook", "parity"),
        unit("graphs", 120, machine, "graphs", why_not=no_gpu),
        unit("waits", 90, machine, "waits", why_not=no_gpu),
        Job("doctor", 150, module("launch", "doctor", "--", *doctor.split(), "--wandb.mode", "disabled")),
        Job("selftest", 140, module("launch", "selftest", "--device", machine.device), why_not=in_suite),
        Job("pytest", 150, pytest, why_not=machine.needs("pytest", "hypothesis")),
        accelerate(machine, "accelerate-1", 1, why_not=machine.spared("accelerate-2 shows the same")),
    ]
    gloo = [f"gloo-every-{n}" for n in WORLDS]
    export = module("launch", "export", str(machine.work / "quickstart"), "--format", "onnx")
    onnx = Job("export", 60, export, why_not=machine.needs("onnx", "onnxscript", "onnxruntime"), after="quickstart")
    after = [
        Job("gloo-bits", 10, partial(compare, machine.work, ["every-1", *gloo]), why_not=no_gloo),
        Job(
            "gloo-plain-bits",
            10,
            partial(compare, machine.work, ["plain-1", "gloo-plain-2"]),
            why_not=no_gloo or as_every,
        ),
        onnx,
    ]
    return [[*trainings, *checks], after]


def wait_for(library: str, seconds: float = 60) -> str:
    """Wait until check.sh has unpacked NCCL; raise Failed if it does not."""
    began = time.monotonic()
    while not Path(library).exists():
        if time.monotonic() - began > seconds:
            raise Failed(f"{library} was not unpacked within {seconds:g} s")
        time.sleep(0.1)
    return f"{library}, {Path(library).stat().st_size / 1e6:.0f} MB"


def ranks(machine: Machine, *, is_alone: bool) -> list[list[Job]]:
    """Return the trainings on several ranks over NCCL, in small waves, because on one GPU they take turns.

    On a CPU return only those that show the program's own behaviour, over gloo.
    """
    env, why = machine.nccl_env(), machine.why_no_nccl
    library = partial(wait_for, machine.nccl_library)
    unpacked = [Job("nccl-unpacked", 90, library)] if machine.nccl_library else []
    version = unit("nccl-version", 60, machine, "nccl", env=env, why_not=why(2))
    two = {"env": env, "why_not": why(2), "after": "nccl-version"}
    every = {2: train(machine, "nccl-every-2", 2, f"{EVERY} 60", 90, **two)}
    for n in (3, 4):
        every[n] = train(
            machine, f"nccl-every-{n}", n, f"{EVERY} 60", 90, env=env, why_not=why(n), after="nccl-every-2"
        )
    plain = train(machine, "nccl-plain-2", 2, f"{PLAIN} 60", 90, **two)
    first = (
        [train(machine, "every-1", 1, f"{EVERY} 60"), train(machine, "plain-1", 1, f"{PLAIN} 60")] if is_alone else []
    )
    names = [job.name for job in every.values()]
    bits = [
        Job("nccl-bits", 10, partial(compare, machine.work, ["every-1", *names]), why_not=why(2)),
        Job("nccl-plain-bits", 10, partial(compare, machine.work, ["plain-1", "nccl-plain-2"]), why_not=why(2)),
    ]
    on_two = {"env": env} if machine.is_dry else {**two, "after": "nccl-every-2"}
    killed = Job("killed-rank", 90, module("gpu.killed", machine.device, str(machine.work)), **on_two)
    launched = accelerate(machine, "accelerate-2", 2, **on_two)
    return [
        [*unpacked, version],
        [] if machine.is_dry else first,
        [every[2], plain],
        [every[3], every[4]],
        bits,
        [launched],
        [killed],
    ]


def speed(machine: Machine) -> list[list[Job]]:
    """Return what is timed, each alone on the card."""
    why = "" if machine.is_dry or machine.has_mnist else NO_MNIST
    small = "--data.name digits --train.max_steps 6 --log.every_steps 3" if machine.is_dry else ""
    on = "--train.cuda_graphs auto" if machine.is_dry else "--train.cuda_graphs on"
    fast, slower = f"--config configs/fast.yaml {small}", f"--config configs/fast-99.5.yaml {small}"
    seeds = (1,) if machine.is_dry else (1, 2, 3)
    spared = machine.spared("fast-graph-1 shows the same")
    jobs = [
        Job("speeds", 170, module("gpu.speed", "--device", machine.device)),
        *(train(machine, f"fast-graph-{seed}", 1, f"{fast} {on} --seed {seed}", 60, why_not=why) for seed in seeds),
        train(machine, "fast-ordinary-1", 1, f"{fast} --train.cuda_graphs off --seed 1", 60, why_not=why or spared),
        train(machine, "fast-99.5-graph", 1, f"{slower} {on} --seed 1", 60, why_not=why),
        Job("throughput", 60, module("launch", "bench", "throughput", "--repeats", "1" if machine.is_dry else "20")),
    ]
    return [[job] for job in jobs]


def waves(machine: Machine, parts: list[str]) -> list[tuple[str, list[Job]]]:
    """Return the requested stages as (stage, jobs that may run side by side)."""
    made = {
        "correct": lambda: correct(machine),
        "speed": lambda: speed(machine),
        "ranks": lambda: ranks(machine, is_alone="correct" not in parts),
    }
    return [(stage, jobs) for stage in STAGES if stage in parts for jobs in made[stage]() if jobs]
