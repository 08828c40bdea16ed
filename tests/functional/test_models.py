"""The built-in models have fixed sizes, initial weights from the seed, and take any shape that is large enough."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MNIST
from torch import Tensor

from train.config import ModelConfig
from train.errors import UserError
from train.functional.layers import batch_norms
from train.functional.models import MODELS, build


def inputs(num: int = 6, channels: int = 1, side: int = 28) -> Tensor:
    return torch.randn(num, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("cnn", 215_194), ("tiny", 3_786), ("vgg", 214_026), ("vgg_wide", 842_762), ("tiny_bn", 2_982)],
)
def test_model_has_its_number_of_parameters(name: str, num_parameters: int) -> None:
    assert sum(p.numel() for p in build(ModelConfig(name=name), *MNIST, 0).parameters()) == num_parameters


@pytest.mark.parametrize("name", sorted(MODELS))
def test_model_maps_images_to_logits(name: str) -> None:
    model = build(ModelConfig(name=name), *MNIST, 0).train()
    assert bool(batch_norms(model)) == (name in ("vgg", "vgg_wide", "tiny_bn"))
    logits = model(inputs())
    assert logits.shape == (6, 10)
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert model.eval()(inputs(1)).shape == (1, 10)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_build_depends_on_the_seed_alone(name: str) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        return build(ModelConfig(name=name), *MNIST, seed).state_dict()

    torch.manual_seed(1)
    first = weights(0)
    torch.manual_seed(2)
    again, other = weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first.keys() == again.keys() == other.keys()
    changed = [name for name in first if not torch.equal(first[name], other[name])]
    assert {name for name, tensor in first.items() if tensor.ndim >= 2} <= set(changed)


def test_build_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    build(ModelConfig(name="tiny"), *MNIST, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # type: ignore[index]


def test_build_accepts_any_seed() -> None:
    for seed in (0, 2**63, 2**64 - 1, 10**30):
        assert bool(build(ModelConfig(name="tiny"), *MNIST, seed).fc2.weight.isfinite().all())


def test_cnn_is_the_composition_in_its_docstring() -> None:
    model, batch = build(ModelConfig(name="tiny"), *MNIST, 0), inputs()
    features = F.max_pool2d(F.relu(model.conv1(batch)), 2)
    features = F.max_pool2d(F.relu(model.conv2(features)), 2)
    assert torch.equal(model(batch), model.fc2(F.relu(model.fc1(features.flatten(1)))))


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("channels", [1, 3])
def test_model_takes_its_shape_from_the_data(name: str, channels: int) -> None:
    least = MODELS[name][0]
    for height, width in ((least, least), (least + 3, 41), (64, least)):
        model = build(ModelConfig(name=name), (channels, height, width), 37, 0)
        assert model(torch.zeros(2, channels, height, width)).shape == (2, 37)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_model_refuses_images_that_are_too_small(name: str) -> None:
    least = MODELS[name][0]
    with pytest.raises(
        UserError, match=f"{name} needs images of at least {least} x {least} pixels, got 64 x {least - 1}"
    ):
        build(ModelConfig(name=name), (3, 64, least - 1), 10, 0)
