"""The update: parameter groups, lr as a closed form of the step, and the moving average of the weights.

Deliberately not here: a scheduler object. `lr(step)` has no state, so a resume has nothing to restore.
"""

import copy
import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from train.config import OptimConfig

ALIGNMENT = 16  # bytes that a vector load of CUDA's kernels takes


def lr(config: OptimConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of `step` (0 .. total_steps - 1).

    Warm-up: linear, for one_cycle along half a cosine from lr/25 (Smith and Topin, 2017); then the schedule's descent
    to final_lr * lr, which would be reached at total_steps.
    """
    warmup_steps = config.warmup * total_steps
    if step < warmup_steps:
        share = (step + 1) / (math.ceil(warmup_steps) + 1) if config.schedule != "one_cycle" else step / warmup_steps
        if config.schedule == "one_cycle":
            share = 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * share)) / 2
        return config.lr * share
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    falling = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * falling)


def build(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer with two groups: tensors of two and more dimensions decay, biases and norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if parameters[0].device.type != "cpu":
        for group in groups:
            group["capturable"] = True  # AdamW can be recorded as a CUDA graph; its bits are the same, and so are SGD's
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
    if config.name == "sgd":
        nesterov = config.momentum > 0
        sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
        if nesterov:  # SGD would begin with uninitialized buffers, and keep them if the first update is left out
            sgd.state.update({p: {"momentum_buffer": torch.zeros_like(p, requires_grad=False)} for p in parameters})
        return sgd
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, config.beta2), fused=True)


class Ema:
    """The exponential moving average of a model's weights and buffers, as a second model that is only evaluated."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average by 1 - decay towards `model`'s weights."""
        average, current = (list(m.state_dict().values()) for m in (self.model, model))
        torch._foreach_lerp_(average, current, 1 - self.decay)


def align_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Move the gradients to tensors of their own if one lies at an odd address, as most do in DDP's buckets.

    CUDA kernels take another path where an address is no multiple of 16 bytes, and those that reduce then add up in
    another order. One process has no buckets, so the norm and the clipped weights would differ between 1 and 2 GPUs.
    """
    gradients = {p: p.grad for p in parameters if p.grad is not None}
    if any(gradient.data_ptr() % ALIGNMENT for gradient in gradients.values()):
        for parameter, copy in zip(gradients, torch._foreach_mul(list(gradients.values()), 1.0), strict=True):
            parameter.grad = copy


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the L2 norm over all gradients, float32 [], with the bits of torch.nn.utils.get_total_norm in half its time."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
