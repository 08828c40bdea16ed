"""Flags, short trainings and reports for checks inside one process, which print a line of JSON each."""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from launch.bench.measures import opened
from train.functional.tables import StepResult
from train.state import Plan, State
from train.storage import checkpoint

BASE = "--data.name random --wandb.mode disabled --train.max_steps 1000000 --train.global_batch_size"
EVERYTHING = (
    "--model.name tiny_bn --model.dropout 0.3 --train.num_micro_batches 2 --augment.shift 2 --augment.rotate 10 "
    "--augment.erase 0.5 --optim.ema 0.9 --optim.clip_norm 1 --optim.label_smoothing 0.1"
)
# A step of configs/fast.yaml
FAST = "--model.name cnn --optim.name adamw --optim.label_smoothing 0.05 --train.precision bf16"
FAST_995 = (
    "--model.name vgg --augment.shift 1 --augment.rotate 8 --augment.scale 0.07 --augment.shear 6 --optim.name adamw "
    "--optim.weight_decay 0.01 --optim.label_smoothing 0.05 --train.num_micro_batches 2 --train.precision bf16"
)

Check = tuple[str, Callable[[], dict[str, Any]]]


class Lab:
    """Trainings on one device. On a CPU, in the dry run, they have fewer and smaller steps."""

    def __init__(self, device: str) -> None:
        self.device, self.on_gpu = device, device == "cuda"
        self.batch = 128 if self.on_gpu else 32
        self.flags = f"{BASE} {self.batch} --train.device {device} {'' if self.on_gpu else '--train.num_threads 1'}"

    def open(self, flags: str) -> AbstractContextManager[tuple[Plan, State, Callable[[], None]]]:
        """Set up a run and a function that makes its next step; later flags win."""
        examples = 15 * self.batch + self.batch // 2  # the last batch of an epoch is a short one
        return opened(f"{self.flags} --data.random_examples {examples} {flags}")

    def train(self, flags: str, steps: int) -> tuple[list[float], list[float], str]:
        """Return the losses, the gradient norms and the weights' SHA-256 of a short training."""
        found: list[StepResult] = []
        with self.open(flags) as (plan, state, make_step):
            while state.step < steps:
                make_step()
                if state.step in (plan.tables.stop, steps):  # the tables hold a stretch of steps, an epoch here
                    found += plan.tables.read_results(len(found), state.step)
            weights = checkpoint.tensors_sha256(state.module.state_dict())
        return [each.loss for each in found], [each.grad_norm for each in found], weights

    def wait(self) -> None:
        """Wait until the device has done all that was started."""
        if self.on_gpu:
            torch.cuda.synchronize()


def options(argv: list[str]) -> argparse.Namespace:
    """Parse --device and the names of groups."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("groups", nargs="*")
    return parser.parse_args(argv)


def report(checks: list[Check]) -> int:
    """Run each check and print what it found, even after one has raised; return the exit code."""
    failed = 0
    for name, work in checks:
        began = time.perf_counter()
        try:
            found = work()
        except Exception as error:  # the other checks must still run
            found = {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        failed += found["ok"] is False
        print(json.dumps({"check": name, **found, "s": round(time.perf_counter() - began, 2)}), flush=True)
    print(f"{failed} of {len(checks)} checks failed" if failed else f"{len(checks)} check(s), none failed", flush=True)
    return 1 if failed else 0
