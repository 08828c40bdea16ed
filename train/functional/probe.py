"""The laws that a network must keep, checked on the CPU before the first step.

An example's logits are a function of the weights, its image and its row key. Only our BatchNorm layers may mix the
examples of a micro-batch, and only they may keep anything from one pass to the next.
"""

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.errors import UserError
from train.functional import layers, rng
from train.functional.augment import lay_out

WHOLE, PART, ONE = slice(0, 7), slice(2, 7), slice(0, 1)  # batches of images
ROUND_OFF = 1e-4  # of results computed in batches of two sizes, as a share of the largest
MAX_NAMES = 3  # in a message
NOT_BY_SEED = "It draws what `seed` does not decide when it is built. Use torch's generator alone."


def check(
    model: nn.Module,
    shape: tuple[int, int, int],
    num_classes: int,
    channels_last: bool = False,
    *,
    twin: nn.Module | None = None,
    is_averaged: bool = False,
) -> None:
    """Raise UserError if a converted network breaks a law. It is left with hooks and gradients, in evaluation mode.

    `twin` is the same network, built again: it must compute the same, and is left in evaluation mode too. With
    `is_averaged`, a copy of the network must compute with its own weights.
    """
    check_tensors(model)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)
    images = torch.randn(WHOLE.stop, *shape, generator=torch.Generator().manual_seed(0))
    inputs = lay_out(images, memory_format)
    run = partial(logits_of, model, inputs, num_classes)
    drawn = watch_draws(model)
    with torch.random.fork_rng(devices=[]):
        for is_training in (True, False):
            model.train(is_training)
            check_mode(model, run, drawn)
        if twin is not None:
            same = logits_of(twin.to(memory_format=memory_format).eval(), inputs, num_classes, WHOLE)
            if contents(twin) != contents(model) or not torch.equal(same, run(WHOLE)):
                raise UserError(NOT_BY_SEED)
        if is_averaged:
            average = copy.deepcopy(model)
            for parameter in average.parameters():
                parameter.data += 0.1
            if torch.equal(logits_of(average, inputs, num_classes, WHOLE), run(WHOLE)):
                raise UserError(
                    "A copy of it, for optim.ema, computes with the weights of the original: use no lambda."
                )


def check_mode(model: nn.Module, run: Callable[[slice], Tensor], drawn: list[str]) -> None:
    """Raise UserError if passes in the model's current mode, training or evaluation, break a law."""
    tensors, states = contents(model), generators()
    first = results(model, run)
    if generators() != states:
        where = drawn[0] if drawn else "backward"
        advice = "Use nn.Dropout, whose masks we draw by key, and dropout=0 in attention and recurrent layers."
        raise UserError(f"{where} draws from a global random generator. {advice}")
    if changed := [name for name, content in contents(model).items() if content != tensors.get(name)]:
        raise UserError(f"{listed(changed)} changed in a pass. Only the statistics of nn.BatchNorm layers may.")
    torch.manual_seed(1)  # finds a draw that put the generator back
    run(PART)
    run(ONE)
    if results(model, run) != first:
        raise UserError("The same images gave other results in a second pass. A network must keep no state.")
    mode = "training" if model.training else "evaluation"
    rows: list[Tensor] = []  # that reach the BatchNorm layers in a pass
    norms = layers.batch_norms(model)
    for layer in norms:  # the only ones that may mix images
        layer.eval()
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0])) for layer in norms]
    whole, whole_rows = run(WHOLE)[PART], rows.copy()
    rows.clear()
    if not agree(whole, run(PART)):
        raise UserError(
            f"In {mode}, an image's logits depend on the other images of its batch. Only nn.BatchNorm layers may mix "
            "images, in training. Put the batch first in all layers."
        )
    if not all(agree(every[-len(some) :], some) for every, some in zip(whole_rows, rows, strict=False)):
        raise UserError(
            "An nn.BatchNorm layer gets the rows of an image apart from each other, but one pass may compute several "
            "micro-batches. Put the batch first before that layer."
        )
    for hook in hooks:
        hook.remove()


def agree(values: Tensor, others: Tensor) -> bool:
    """Return whether two tensors of equal shape are the same to round-off."""
    return bool((values - others).abs().max() <= ROUND_OFF * values.abs().max())


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


def logits_of(model: nn.Module, images: Tensor, num_classes: int, rows: slice) -> Tensor:
    """Return the logits, float [B,K], of some of the images in the model's current mode."""
    keys = rng.row_keys(0, rows.start, rows.stop, images.device)
    needed = layers.dropouts(model), layers.batch_norms(model), keys, [len(keys)]
    with torch.set_grad_enabled(model.training), layers.one_pass(*needed):
        logits: Any = model(images[rows].clone())
    is_float = isinstance(logits, Tensor) and logits.is_floating_point()
    if not is_float or logits.shape != (len(keys), num_classes):
        got = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"forward returns {got}, expected logits, float [{len(keys)}, {num_classes}].")
    if not logits.isfinite().all():
        raise UserError("Its logits for random images of mean 0 and deviation 1 are not finite.")
    return logits


def results(model: nn.Module, run: Callable[[slice], Tensor]) -> dict[str, bytes]:
    """Return the bits of the logits of all images; and in training, by name, of each trainable parameter's gradient."""
    logits = run(WHOLE)
    found: dict[str, Any] = {"logits": logits}
    if model.training:
        model.zero_grad()
        F.cross_entropy(logits.float(), torch.arange(len(logits)) % logits.shape[1], reduction="sum").backward()
        found |= {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    if unused := [name for name, gradient in found.items() if gradient is None]:
        raise UserError(f"{listed(unused)} got no gradient. Remove what is unused, or call requires_grad_(False).")
    return bits(found)


def listed(found: list[str]) -> str:
    """Return the first of some names as text."""
    return ", ".join(found[:MAX_NAMES]) + (f" and {len(found) - MAX_NAMES} more" if len(found) > MAX_NAMES else "")


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """Return the content of tensors, to compare: NaN equals itself."""
    return {name: tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def contents(model: nn.Module) -> dict[str, bytes]:
    """Return the bits of all parameters, buffers and plain numbers, but for what our own layers store."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found = bits({name: tensor for name, tensor in tensors if not name.endswith(("batch_mean", "batch_var"))})
    for name, module in model.named_modules():
        if not isinstance(module, layers.Dropout):
            plain = {key: value for key, value in vars(module).items() if isinstance(value, (int, float))}
            found |= {f"{name}.{key}".lstrip("."): repr(value).encode() for key, value in plain.items()}
    return found


def generators() -> list[Any]:
    """Return the states of the global generators of torch, NumPy and Python, to compare."""
    state: Any = np.random.get_state()
    _, keys, *rest = state
    return [torch.get_rng_state().numpy().tobytes(), keys.tobytes(), rest, random.getstate()]


def watch_draws(model: nn.Module) -> list[str]:
    """Return a list to which each pass adds the modules that drew from a global generator, the innermost first."""
    entered: list[Any] = []
    drawn: list[str] = []

    def leave(module: nn.Module, *_: Any, name: str) -> None:
        if entered.pop() != generators():
            drawn.append(f"{name} ({type(module).__name__})" if name else "forward")

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_: entered.append(generators()))
        module.register_forward_hook(partial(leave, name=name))
    return drawn
