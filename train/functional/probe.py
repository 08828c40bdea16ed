"""The laws that a network must keep, checked on the CPU before the first step.

An example's logits are a function of the weights, its image and its row key. Only our BatchNorm layers may mix the
examples of a micro-batch, and only they may keep anything from one pass to the next.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.errors import UserError
from train.functional import layers, rng
from train.functional.augment import lay_out

SIZES = (3, 5, 7, 9, 11, 13, 17)  # of batches; one that is also another dimension could hide a mistake
ROUND_OFF = 1e-4  # of logits computed in batches of two sizes, as a share of the largest
MAX_NAMES = 3  # in a message


def check(model: nn.Module, shape: tuple[int, int, int], num_classes: int, memory_format: torch.memory_format) -> None:
    """Raise UserError if a converted network breaks a law. Errors that its code raises are not caught.

    Makes a few small passes, which leave other gradients and modes behind.
    """
    check_tensors(model)
    probe = Probe(model.to(memory_format=memory_format), shape, num_classes, memory_format)
    with torch.random.fork_rng(devices=[]):
        for is_training in (True, False):
            model.train(is_training)
            check_mode(probe)


def check_mode(probe: "Probe") -> None:
    """Raise UserError if passes in the model's current mode, training or evaluation, break a law."""
    model, before = probe.model, copies(probe.model)
    with refusing_draws(model):
        first = probe.results(probe.whole)
    if changed := [name for name, tensor in copies(model).items() if not same_bits(tensor, before.get(name))]:
        raise UserError(f"{listed(changed)} changed in a pass. Only the statistics of nn.BatchNorm layers may.")
    torch.manual_seed(1)  # finds a draw that put the generator back
    for rows in (probe.part, slice(0, 1)):
        probe.logits(rows)
    again = probe.results(probe.whole)
    if not all(same_bits(first[name], again[name]) for name in first):
        raise UserError("The same images gave other results in a second pass. A network must keep no state.")
    mode = "training" if model.training else "evaluation"
    if model.training:
        for layer in layers.batch_norms(model):  # the only ones that may mix images
            layer.eval()
    whole, part = probe.logits(probe.whole), probe.logits(probe.part)
    if not (whole[probe.part] - part).abs().max() <= ROUND_OFF * whole.abs().max():
        raise UserError(
            f"In {mode}, an image's logits depend on the other images of its batch. Only nn.BatchNorm layers may mix "
            "images, in training. Put the batch first in all layers."
        )


def check_tensors(model: nn.Module) -> None:
    """Raise UserError if a parameter or buffer is not one that a step and a checkpoint can hold."""
    state = model.state_dict()
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{listed(others)} in its state_dict() must be tensors.")
    if others := [name for name, value in model.named_parameters() if value.dtype != torch.float32]:
        raise UserError(f"{listed(others)} must be float32. Choose a lower precision with train.precision.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("It has no trainable parameters.")
    places: dict[int, str] = {}
    for name, tensor in state.items():
        if (other := places.setdefault(tensor.untyped_storage().data_ptr(), name)) != name and tensor.numel():
            raise UserError(f"{other} and {name} share their memory. Register a tensor or a layer under one name.")


class Probe:
    """A network and a few random images, labels and row keys."""

    def __init__(
        self, model: nn.Module, shape: tuple[int, int, int], num_classes: int, memory_format: torch.memory_format
    ) -> None:
        self.model, self.num_classes = model, num_classes
        part, whole = [size for size in SIZES if size not in (*shape, num_classes)][:2]
        images = torch.randn(whole, *shape, generator=torch.Generator().manual_seed(0))
        self.images, self.memory_format = images, memory_format
        self.labels = torch.arange(whole) % num_classes
        self.keys = rng.row_keys(0, 0, whole, images.device)
        self.whole, self.part = slice(0, whole), slice(whole - part, whole)

    def logits(self, rows: slice) -> Tensor:
        """Return the logits, float [B,K], of some images in the model's current mode."""
        with torch.set_grad_enabled(self.model.training), layers.row_keys(layers.dropouts(self.model), self.keys[rows]):
            logits: Any = self.model(lay_out(self.images[rows], self.memory_format))
        num_images = len(self.labels[rows])
        is_tensor = isinstance(logits, Tensor) and logits.is_floating_point()
        if not is_tensor or logits.shape != (num_images, self.num_classes):
            got = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"forward returns {got}, expected logits, float [{num_images}, {self.num_classes}].")
        if not logits.isfinite().all():
            raise UserError("Its logits for random images of mean 0 and deviation 1 are not finite.")
        return logits

    def results(self, rows: slice) -> dict[str, Tensor]:
        """Return the logits of some images; and in training, by name, the gradient of each trainable parameter."""
        logits = self.logits(rows)
        found: dict[str, Any] = {"logits": logits}
        if self.model.training:
            self.model.zero_grad(set_to_none=True)
            F.cross_entropy(logits.float(), self.labels[rows], reduction="sum").backward()
            found |= {name: value.grad for name, value in self.model.named_parameters() if value.requires_grad}
        if unused := [name for name, gradient in found.items() if gradient is None]:
            raise UserError(f"{listed(unused)} got no gradient. Remove what is unused, or call requires_grad_(False).")
        return found


def listed(found: list[str]) -> str:
    """Return the first of some names as text."""
    return ", ".join(found[:MAX_NAMES]) + (f" and {len(found) - MAX_NAMES} more" if len(found) > MAX_NAMES else "")


def same_bits(first: Tensor, second: Tensor | None) -> bool:
    """Return whether two tensors have the same bits, NaN included."""
    if second is None or first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(*(tensor.detach().reshape(-1).view(torch.uint8) for tensor in (first, second)))


def copies(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers, but for the statistics that our BatchNorm layers store."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, layer in model.named_modules():
        if isinstance(layer, layers.BatchNorm):
            del found[f"{name}.batch_mean"], found[f"{name}.batch_var"]
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def generators() -> list[Any]:
    """Return the states of the global generators of torch, NumPy and Python, to compare."""
    state: Any = np.random.get_state()
    _, keys, *rest = state
    return [torch.get_rng_state().numpy().tobytes(), keys.tobytes(), rest, random.getstate()]


@contextmanager
def refusing_draws(model: nn.Module) -> Iterator[None]:
    """Raise UserError if a pass inside draws from a global generator. It names the innermost module that did."""
    entered: list[Any] = [generators()]
    found: list[str] = []

    def leave(module: nn.Module, name: str) -> None:
        if entered.pop() != generators():
            found.append(f"{name} ({type(module).__name__})" if name else "forward")

    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_: entered.append(generators())))
        handles.append(module.register_forward_hook(lambda module, *_, name=name: leave(module, name)))
    yield
    for handle in handles:
        handle.remove()
    if entered.pop() != generators():
        where = found[0] if found else "backward"
        advice = "Use nn.Dropout, whose masks we draw by key, and dropout=0 in attention and recurrent layers"
        raise UserError(f"{where} draws from a global random generator. {advice}.")
