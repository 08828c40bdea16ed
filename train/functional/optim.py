"""The update: parameter groups, the learning rate as a closed form of the step, the moving average of the weights.

There is no scheduler object on purpose: `lr` has no state, so a resume has nothing to restore.
"""

import copy
import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from train.config import OptimConfig

ALIGNMENT = 16  # bytes of one vector load in CUDA's kernels


def lr(config: OptimConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of `step` (0 .. total_steps - 1).

    The warm-up is linear; that of one_cycle follows half a cosine from lr/25 (Smith and Topin, 2017). Then the schedule
    descends to final_lr * lr, which it would reach at total_steps.
    """
    warmup_steps = config.warmup * total_steps
    if step < warmup_steps:
        if config.schedule != "one_cycle":
            return config.lr * ((step + 1) / (math.ceil(warmup_steps) + 1))
        rise = (1 - math.cos(math.pi * (step / warmup_steps))) / 2
        return config.lr * (1 / 25 + (1 - 1 / 25) * rise)
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    falling = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * falling)


def build(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer. Tensors of two and more dimensions get weight decay, biases and norms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if parameters[0].device.type != "cpu":
        for group in groups:
            group["capturable"] = True  # so that a CUDA graph can record AdamW; the bits do not change
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
    if config.name == "sgd":
        nesterov = config.momentum > 0
        sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
        if nesterov:  # SGD starts with uninitialized buffers, and keeps them if the first update is skipped
            sgd.state.update({p: {"momentum_buffer": torch.zeros_like(p, requires_grad=False)} for p in parameters})
        return sgd
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, config.beta2), fused=True)


class Ema:
    """The exponential moving average of a model's weights and buffers, as a second model for evaluation."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average by 1 - decay towards `model`'s weights."""
        tensors = (m.state_dict().values() for m in (self.model, model))
        average, current = ([tensor for tensor in each if tensor.is_floating_point()] for each in tensors)
        torch._foreach_lerp_(average, current, 1 - self.decay)


def align_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Copy the gradients to tensors of their own if one is not aligned to 16 bytes, as most are not in DDP's buckets.

    CUDA's reductions add up in another order at such an address. A single process has no buckets, so without the copy
    the gradient norm and the clipped weights differ between 1 and 2 GPUs.
    """
    gradients = {p: p.grad for p in parameters if p.grad is not None}
    if any(gradient.data_ptr() % ALIGNMENT for gradient in gradients.values()):
        for parameter, aligned in zip(gradients, torch._foreach_mul(list(gradients.values()), 1.0), strict=True):
            parameter.grad = aligned


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the L2 norm of all gradients, float32 []: the bits of torch.nn.utils.get_total_norm in half its time."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
