"""The learning rates are torch's schedulers', and so are the updates, the moving average and the norm."""

import copy
import itertools
import math

import pytest
import torch
from conftest import MNIST
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from train.config import ModelConfig, OptimConfig
from train.functional.layers import batch_norms
from train.functional.models import build as build_model
from train.functional.optim import Ema, build, grad_norm, lr

SCHEDULES = ("one_cycle", "cosine", "linear", "constant")


def torch_lrs(make: object, total_steps: int, base: float) -> list[float]:
    """Return the learning rates that a torch scheduler sets."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = make(optimizer)  # type: ignore[operator]
    found = []
    for _ in range(total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def our_lrs(config: OptimConfig, total_steps: int) -> list[float]:
    return [lr(config, step, total_steps) for step in range(total_steps)]


@pytest.mark.parametrize(("total_steps", "warmup"), [(10, 0.2), (100, 0.3), (235, 0.2), (50, 0.5), (1000, 0.05)])
@pytest.mark.parametrize("final_lr", [0.01, 0.5])
def test_lr_one_cycle_is_torchs(total_steps: int, warmup: float, final_lr: float) -> None:
    """Torch peaks at pct * total - 1 and ends at total - 1, so it gets one more step and the share with our peak."""
    config = OptimConfig(lr=0.3, schedule="one_cycle", warmup=warmup, final_lr=final_lr)
    share = (warmup * total_steps + 1) / (total_steps + 1)

    def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        return lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.3, total_steps=total_steps + 1, pct_start=share, div_factor=25,
            final_div_factor=1 / (25 * final_lr), cycle_momentum=False,
        )  # fmt: skip

    assert our_lrs(config, total_steps) == pytest.approx(torch_lrs(make, total_steps, 0.3), rel=1e-9)


@pytest.mark.parametrize("total_steps", [1, 2, 10, 235])
@pytest.mark.parametrize("final_lr", [0.0, 0.1, 1.0])
def test_lr_cosine_and_linear_are_torchs(total_steps: int, final_lr: float) -> None:
    for schedule, make in (
        (
            "cosine",
            lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps, eta_min=0.2 * final_lr),
        ),
        ("linear", lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, final_lr, total_iters=total_steps)),
    ):
        config = OptimConfig(lr=0.2, schedule=schedule, warmup=0.0, final_lr=final_lr)  # type: ignore[arg-type]
        assert our_lrs(config, total_steps) == pytest.approx(torch_lrs(make, total_steps, 0.2), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_lr_warms_up_linearly_like_torch(schedule: str) -> None:
    config = OptimConfig(lr=0.2, schedule=schedule, warmup=0.1)  # type: ignore[arg-type]
    expected = torch_lrs(lambda optimizer: lr_scheduler.LinearLR(optimizer, 1 / 11, 1.0, total_iters=10), 11, 0.2)
    assert our_lrs(config, 100)[:11] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("one_cycle", 0, 1 / 25),
        ("one_cycle", 10, (1 + 1 / 25) / 2),
        ("one_cycle", 20, 1.0),
        ("one_cycle", 60, 0.55),
        ("one_cycle", 100, 0.1),
        ("cosine", 0, 1 / 21),
        ("cosine", 20, 1.0),
        ("cosine", 60, 0.55),
        ("cosine", 100, 0.1),
        ("linear", 19, 20 / 21),
        ("linear", 20, 1.0),
        ("linear", 40, 0.775),
        ("linear", 100, 0.1),
        ("constant", 20, 1.0),
        ("constant", 99, 1.0),
    ],
)
def test_lr_at_the_corners(schedule: str, step: int, expected: float) -> None:
    config = OptimConfig(lr=0.4, schedule=schedule, warmup=0.2, final_lr=0.1)  # type: ignore[arg-type]
    assert lr(config, step, 100) == pytest.approx(0.4 * expected, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("total_steps", [1, 2, 7, 100])
def test_lr_rises_then_falls_and_stays_within_its_bounds(schedule: str, warmup: float, total_steps: int) -> None:
    config = OptimConfig(lr=0.4, schedule=schedule, warmup=warmup, final_lr=0.01)  # type: ignore[arg-type]
    values = our_lrs(config, total_steps)
    assert all(math.isfinite(value) and 0 < value <= 0.4 for value in values)
    peak = values.index(max(values))
    assert abs(peak - warmup * total_steps) <= 1
    for number, (left, right) in enumerate(itertools.pairwise(values)):
        assert (right >= left) if number < peak else (right <= left)


@pytest.mark.parametrize("name", ["cnn", "tiny_bn"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_build_decays_kernels_and_matrices_only(name: str, optimizer: str) -> None:
    model = build_model(ModelConfig(name=name), *MNIST, 0)  # type: ignore[arg-type]
    built = build(OptimConfig(name=optimizer, weight_decay=0.05, momentum=0.8, beta2=0.95), model)  # type: ignore[arg-type]
    decays = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for parameter_name, parameter in model.named_parameters():
        is_bias_or_norm = parameter_name.endswith("bias") or any(
            parameter is norm.weight for norm in batch_norms(model)
        )
        assert decays[id(parameter)] == (0 if is_bias_or_norm else 0.05), parameter_name


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_build_updates_as_torchs_plain_optimizer(name: str) -> None:
    config = OptimConfig(name=name, lr=0.05, momentum=0.8, beta2=0.95, weight_decay=0.0)  # type: ignore[arg-type]
    model = build_model(ModelConfig(name="tiny"), *MNIST, 0)
    other = copy.deepcopy(model)
    ours = build(config, model)
    theirs: torch.optim.Optimizer = (
        torch.optim.SGD(other.parameters(), 0.05, momentum=0.8, nesterov=True, foreach=False)
        if name == "sgd"
        else torch.optim.AdamW(other.parameters(), 0.05, betas=(0.8, 0.95), weight_decay=0.0, foreach=False)
    )
    for step in range(3):
        for left, right in zip(model.parameters(), other.parameters(), strict=True):
            left.grad = torch.randn(left.shape, generator=torch.Generator().manual_seed(step))
            right.grad = left.grad.clone()
        ours.step()
        theirs.step()
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(left, right, rtol=1e-4, atol=1e-6)


def test_build_accepts_sgd_without_momentum() -> None:
    model = nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.ones(2, 2), torch.ones(2)
    before = model.weight.detach().clone()
    build(OptimConfig(momentum=0.0, lr=0.5), model).step()
    assert torch.allclose(model.weight, before - 0.5)


@pytest.mark.parametrize("name", ["tiny", "tiny_bn"])
@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_ema_matches_torchs_averaged_model(name: str, decay: float) -> None:
    model = build_model(ModelConfig(name=name), *MNIST, 0)  # type: ignore[arg-type]
    ours = Ema(model, decay)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    theirs.update_parameters(model)  # its first update copies
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        ours.update(model)
        theirs.update_parameters(model)
    expected = theirs.module.state_dict()
    for key, tensor in ours.model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
        assert not torch.equal(tensor, model.state_dict()[key]), key


def test_ema_is_a_copy_in_evaluation_mode() -> None:
    model = build_model(ModelConfig(name="tiny_bn"), *MNIST, 0).train()
    ema = Ema(model, 0.9)
    assert model.training
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in ema.model.state_dict().values():
        tensor.zero_()
    ema.update(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.allclose(ema.model.fc.weight, before["fc.weight"] * 0.1)


def test_grad_norm_is_the_norm_over_all_gradients() -> None:
    model = build_model(ModelConfig(name="tiny"), *MNIST, 0)
    parameters = list(model.parameters())
    for number, parameter in enumerate(parameters[1:]):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    expected = math.sqrt(sum(p.numel() * (number + 1) ** 2 for number, p in enumerate(parameters[1:])))
    found = grad_norm(parameters)
    assert found.shape == ()
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(expected, rel=1e-6)
