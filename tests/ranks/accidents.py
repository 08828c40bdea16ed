"""Accidents that can happen to a rank. MUTANT=accidents.NAME arranges one before training; STEP is its update."""

import ctypes
import importlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import train.functional.models
import train.functional.tables
import train.loop
import train.step
import train.storage.data
import train.tracking.journal
import train.world.world
from ranks import mutants
from train.functional.sampler import Sampler
from train.state import Plan, State
from train.storage import checkpoint

RANK, STEP = int(os.environ.get("RANK", "0")), int(os.environ.get("STEP", "13"))


def _in_micro_batch(change: Callable[[Any, nn.Module, int, torch.Tensor], torch.Tensor]) -> None:
    inner = train.step._loss_sums

    def changed(plan: Plan, state: State, part: range, batch: Any) -> torch.Tensor:
        losses = zip(part, inner(plan, state, part, batch), strict=True)
        return torch.stack([change(batch, state.model, index, loss) for index, loss in losses])

    train.step._loss_sums = changed


def _in_augment(happens: Callable[[], None], rank: int | None = 1) -> None:
    """Call a function in the augmentation of update STEP, on one rank."""
    own_rows, inner = train.step._own_rows, train.step.augment
    steps = [0]

    def here(plan: Plan, state: State) -> Any:
        steps.append(state.step + 1)
        return own_rows(plan, state)

    def augment(*arguments: Any) -> torch.Tensor:
        if steps[-1] == STEP and rank in (None, RANK):
            happens()
        return inner(*arguments)

    train.step._own_rows, train.step.augment = here, augment


def no_memory_for_data() -> None:
    """Rank 1 has no free memory."""
    free_bytes = train.storage.data.free_bytes
    train.storage.data.free_bytes = lambda device: 0 if RANK == 1 else free_bytes(device)


def broken_loss() -> None:
    """Micro-batch 2 of update STEP, and of STEP + 3, has an infinite loss."""
    _in_micro_batch(
        lambda batch, model, index, loss: (
            loss * torch.inf if index == 2 and batch.step + 1 in (STEP, STEP + 3) else loss
        )
    )


def broken_gradient() -> None:
    """Micro-batch 2 of update STEP has a finite loss whose gradient is NaN."""

    def change(batch: Any, model: nn.Module, index: int, loss: torch.Tensor) -> torch.Tensor:
        if index == 2 and batch.step + 1 == STEP:
            return loss + sum(p * 0 for p in model.parameters() for p in [p.sum()]).sqrt()
        return loss

    _in_micro_batch(change)


def spike() -> None:
    """The loss of update STEP is a hundred times what it is."""
    _in_micro_batch(lambda batch, model, index, loss: loss + (99 * loss).detach() if batch.step + 1 == STEP else loss)


def stopped() -> None:
    """Rank 1 is stopped by SIGSTOP, as by a debugger or a hypervisor."""
    _in_augment(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def silent() -> None:
    """Rank 1 waits for something that never comes: a file on a dead server."""
    _in_augment(lambda: time.sleep(1000))


def hangs_alone() -> None:
    """The only rank waits for something that never comes."""
    _in_augment(lambda: time.sleep(1000), rank=None)


def deaf() -> None:
    """Rank 1 hangs in C code that holds the interpreter's lock."""
    _in_augment(lambda: ctypes.PyDLL(None).sleep(1000))  # type: ignore[func-returns-value]


def leaves() -> None:
    """Rank 1 ends without output and without an error."""
    _in_augment(lambda: os._exit(0))


def fails() -> None:
    """Rank 1 raises an error that no other rank has."""

    def fail() -> None:
        raise ValueError("only here")

    _in_augment(fail)


def fails_and_cannot_close() -> None:
    """As `fails`, but leaving the process group never ends, as with NCCL after collectives that others never join."""
    fails()
    torch.distributed.destroy_process_group = lambda *_: time.sleep(1000)


def slow_rank() -> None:
    """Rank 1 needs 60 ms more for each step."""
    inner = train.step.augment
    train.step.augment = lambda *arguments: (time.sleep(0.06 * (RANK == 1)), inner(*arguments))[1]


def _announced(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function: it writes a file when it begins, and then waits until the file is removed."""

    def waits(*arguments: Any, **options: Any) -> Any:
        marker = Path(os.environ["MARKER"])
        if RANK == 0 and not marker.with_suffix(".done").exists():
            marker.touch()
            deadline = time.monotonic() + 60
            while marker.exists() and time.monotonic() < deadline:
                time.sleep(0.002)
            marker.with_suffix(".done").touch()
        return inner(*arguments, **options)

    return waits


def waits_in_evaluate() -> None:
    """The first evaluation waits for the test."""
    train.loop.evaluate = _announced(train.loop.evaluate)


def waits_in_save() -> None:
    """The writing of the first checkpoint waits for the test."""
    checkpoint.write = _announced(checkpoint.write)


def waits_in_start() -> None:
    """The loading of the data waits for the test."""
    train.loop.data.load = _announced(train.loop.data.load)


def nobody() -> None:
    """The rank runs as a user without any files."""
    importlib.import_module("psutil")  # accelerate imports it later, and that user may not be able to read this Python
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def nobody_and_slow() -> None:
    """As `nobody`, with steps slow enough to disturb it."""
    nobody()
    mutants.slow_steps()


# One sleep for each phase, in a function that belongs to it. The real duration is recorded.
PLACES: dict[str, tuple[Any, str]] = {
    "data": (Sampler, "rank_examples"),
    "augment": (train.step, "augment"),
    "forward_backward": (train.step, "_loss_sums"),
    "optimizer": (train.step.optim, "grad_norm"),
    "log": (train.tracking.journal.Journal, "_log"),
    "evaluate": (train.loop, "evaluate"),
    "save": (checkpoint, "write"),
}


def sleeps() -> None:
    """Sleep 40 ms in every call of the function of PHASE. For `reduce` only rank 1 sleeps, if there is one."""
    phase = os.environ["PHASE"]
    if phase == "reduce" and RANK == 0:
        return  # waits for rank 1, which sleeps in augment
    home, name = PLACES["augment" if phase == "reduce" else phase]
    inner, slept = getattr(home, name), Path(os.environ["SLEPT"])

    def slow(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        time.sleep(0.04)
        with open(slept, "a") as file:
            file.write(f"{time.perf_counter() - began}\n")
        return inner(*arguments, **options)

    setattr(home, name, slow)


def slow_first_call() -> None:
    """The first augmented batch takes three seconds, as when a library loads and plans."""
    inner, calls = train.step.augment, []

    def augment(*arguments: Any) -> torch.Tensor:
        calls.append(time.sleep(0.0 if calls else 3.0))  # type: ignore[func-returns-value]
        return inner(*arguments)

    train.step.augment = augment


def runs_ahead() -> None:
    """The host runs ahead, as on a GPU: rows of the log are read and written later."""
    train.world.world.World.runs_ahead = True  # type: ignore[assignment, method-assign]
    if "LAGS" in os.environ:
        inner = train.tracking.journal.Journal._log

        def log(self: train.tracking.journal.Journal) -> None:
            with open(os.environ["LAGS"], "a") as file:
                file.write(f"{self.unlogged[-1].step} {self.state.step}\n")
            inner(self)

        train.tracking.journal.Journal._log = log  # type: ignore[method-assign]
    if "MOST_ROWS" in os.environ:
        train.functional.tables.MAX_EXAMPLES = int(os.environ["MOST_ROWS"])


def runs_ahead_with_broken_loss() -> None:
    """As `runs_ahead`, with numbers that are not finite."""
    runs_ahead()
    broken_loss()


def _in_forward(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    inner = train.functional.models.Cnn.forward
    forward = lambda self, images: change(inner(self, images))  # noqa: E731
    train.functional.models.Cnn.forward = forward  # type: ignore[method-assign]


def noisy_gradients() -> None:
    """The backward pass makes noise, as an atomic addition does."""

    def add_noise(logits: torch.Tensor) -> torch.Tensor:
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * (1 + os.urandom(1)[0]))
        return logits

    _in_forward(add_noise)


def noisy_bf16() -> None:
    """Only a kernel for bf16 is noisy. A check in another precision would not find it."""
    _in_forward(lambda logits: logits * (1 + os.urandom(1)[0]) if logits.dtype == torch.bfloat16 else logits)


def undetermined_operation() -> None:
    """The model has an operation without a deterministic algorithm."""

    def forward(logits: torch.Tensor) -> torch.Tensor:
        torch.zeros(4).put_(torch.tensor([0]), torch.ones(1))
        return logits

    _in_forward(forward)
