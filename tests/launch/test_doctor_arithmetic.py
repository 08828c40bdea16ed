"""The doctor's checks of precision and of repeated steps, made to fail on purpose."""

import contextlib
import os
from typing import Any

import pytest
import torch
from test_doctor import look
from torch import Tensor, nn

from launch.check import checks
from train.cli import parse
from train.functional import models


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = "--train.device cpu"
    found = list(checks.precision(parse(cpu.split())))
    assert [(finding.name, finding.status) for finding in found] == [
        (name, "OK") for name in ("fp32", "tf32", "bf16", "fp16")
    ]
    for precision in ("tf32", "fp16"):
        assert look(checks.precision, cpu, f"--train.precision {precision}").status == "fail"
    # silently float32, as fp16 is on a CPU
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: contextlib.nullcontext())
    finding = next(
        each for each in checks.precision(parse([*cpu.split(), "--train.precision", "bf16"])) if each.name == "bf16"
    )
    assert finding.status == "fail"
    assert "torch.float32" in finding.text


def test_fp32_that_is_not_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with NVIDIA_TF32_OVERRIDE=1: 10 bits of mantissa."""

    def conv2d(inputs: Tensor, weight: Tensor) -> Tensor:
        return original((inputs.view(torch.int32) & ~0x1FFF).view(torch.float32), weight)

    original = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    finding = next(checks.precision(parse(["--train.device", "cpu"])))
    assert (finding.name, finding.status) == ("fp32", "fail")


class Undetermined(nn.Module):
    """A model whose backward adds noise to its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(784, 10)
        self.fc.weight.register_hook(lambda gradient: gradient + torch.rand_like(gradient))

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        return self.fc(images.flatten(1))


class Forbidden(Undetermined):
    """A model with an operation that has no deterministic algorithm."""

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        torch.zeros(4, device=images.device).put_(
            torch.tensor([0], device=images.device), torch.ones(1, device=images.device)
        )
        return super().forward(images)


class UndeterminedInBf16(nn.Module):
    """A model whose noise a check in another arithmetic cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(784, 10)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        logits = self.fc(images.flatten(1))
        return logits + torch.rand_like(logits) if logits.dtype == torch.bfloat16 else logits


@pytest.mark.parametrize(
    ("model", "expected"),
    [(Undetermined, "different bits"), (UndeterminedInBf16, "different bits"), (Forbidden, "deterministic")],
)
def test_kernels_that_are_not_deterministic(model: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = "--train.device cpu --train.precision bf16"
    assert look(checks.deterministic, cpu).status == "OK"
    monkeypatch.setitem(models.MODELS, "cnn", lambda dropout: model())
    finding = look(checks.deterministic, cpu)
    assert finding.status == "warn"  # fast mode promises nothing
    finding = look(checks.deterministic, cpu, "--train.exact true --train.num_micro_batches 2")
    assert finding.status == "fail"
    assert expected in finding.text


def test_repeating_a_training_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # a caller's own, such as srun's
    monkeypatch.setenv("LOCAL_RANK", "1")

    def state() -> tuple[Any, ...]:
        tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        flags = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, torch.get_num_threads()
        return dict(os.environ), tf32, flags, torch.get_rng_state().tolist()

    for setting in (True, False):
        torch.backends.cudnn.benchmark = setting
        torch.use_deterministic_algorithms(setting)
        before = state()
        assert (
            look(checks.deterministic, "--train.device cpu --model.name tiny_bn --train.num_micro_batches 2").status
            == "OK"
        )
        assert state() == before
