"""Models have fixed sizes, initial weights from the seed, dropout by keys and BatchNorm merged over micro-batches."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import ModelConfig
from train.functional.hashing import key
from train.functional.models import MODELS, BatchNorm2d, Dropout, batch_norms, build, merge_statistics
from train.functional.rng import row_keys
from train.functional.sampler import Sampler
from train.functional.tables import shares

CPU = torch.device("cpu")


def inputs(num: int = 6, channels: int = 1, side: int = 28) -> Tensor:
    return torch.randn(num, channels, side, side, generator=torch.Generator().manual_seed(0))


def keys(num: int, step: int = 0) -> Tensor:
    return row_keys(key(0, "dropout", step), 0, num, CPU)


def norm_pair(channels: int = 5) -> tuple[BatchNorm2d, nn.BatchNorm2d]:
    """Return our BatchNorm and torch's, with the same weights, in training mode."""
    ours, theirs = BatchNorm2d(channels), nn.BatchNorm2d(channels)
    generator = torch.Generator().manual_seed(1)
    for name in ("weight", "bias", "running_mean"):
        value = torch.randn(channels, generator=generator)
        for norm in (ours, theirs):
            getattr(norm, name).data.copy_(value)
    return ours, theirs


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("cnn", 215_194), ("tiny", 3_786), ("vgg", 214_026), ("vgg_wide", 842_762), ("tiny_bn", 2_982)],
)
def test_model_has_its_number_of_parameters(name: str, num_parameters: int) -> None:
    assert sum(p.numel() for p in build(ModelConfig(name=name), 0).parameters()) == num_parameters  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_model_maps_images_to_logits(name: str) -> None:
    model = build(ModelConfig(name=name), 0).train()  # type: ignore[arg-type]
    logits = model(inputs())
    assert logits.shape == (6, 10)
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert model.eval()(inputs(1)).shape == (1, 10)
    assert bool(batch_norms(model)) == (name in ("vgg", "vgg_wide", "tiny_bn"))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_build_depends_on_the_seed_alone(name: str) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        return build(ModelConfig(name=name), seed).state_dict()  # type: ignore[arg-type]

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
    build(ModelConfig(name="tiny"), 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # type: ignore[index]


def test_build_accepts_any_seed() -> None:
    for seed in (0, 2**63, 2**64 - 1, 10**30):
        assert bool(build(ModelConfig(name="tiny"), seed).fc2.weight.isfinite().all())


def test_dropout_drops_with_its_probability_and_keeps_the_mean() -> None:
    features = torch.ones(400, 250)
    for probability in (0.1, 0.5, 0.9):
        dropped = Dropout(probability)(features, keys(400))
        values = dropped.unique()
        assert torch.allclose(values, torch.tensor([0, 1 / (1 - probability)]))
        share = float((dropped == 0).float().mean())
        assert abs(share - probability) < 4 * (probability * (1 - probability) / features.numel()) ** 0.5


def test_dropout_is_a_function_of_the_examples_keys() -> None:
    layer, features = Dropout(0.5), torch.rand(32, 64) + 1
    whole = layer(features, keys(32))
    parts = [layer(features[at], keys(32)[at]) for at in (slice(0, 5), slice(5, 32))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(layer(features, keys(32)), whole)
    assert not torch.equal(layer(features, keys(32, step=1)), whole)
    assert not torch.equal(whole[0] == 0, whole[1] == 0)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_dropout_is_off_without_keys(name: str) -> None:
    plain = build(ModelConfig(name=name), 0).eval()  # type: ignore[arg-type]
    dropping = build(ModelConfig(name=name, dropout=0.5), 0).eval()  # type: ignore[arg-type]
    batch = inputs()
    assert torch.equal(dropping(batch), plain(batch))
    assert torch.equal(plain(batch, keys(6)), plain(batch))
    assert not torch.equal(dropping(batch, keys(6)), plain(batch))


def merge(
    norm: BatchNorm2d, means: torch.Tensor, variances: torch.Tensor, counts: list[int], is_sound: bool = True
) -> None:
    shares = torch.tensor(counts, dtype=torch.float32) / sum(counts)
    merge_statistics([norm], torch.cat((means, variances), dim=1), shares, torch.tensor(is_sound))


def test_batch_norm_computes_what_torchs_does() -> None:
    ours, theirs = norm_pair()
    for _ in range(3):
        batch = (inputs(8, 5, 6) * 3 + 1).requires_grad_()
        copy = batch.detach().clone().requires_grad_()
        mine, reference = ours(batch), theirs(copy)
        assert torch.equal(mine, reference)
        (mine**3).sum().backward()
        (reference**3).sum().backward()
        assert torch.equal(batch.grad, copy.grad)  # type: ignore[arg-type]
        merge(ours, ours.batch_mean[None], ours.batch_var[None], [8])
    for name in ("running_mean", "running_var"):
        assert torch.allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-7)
        getattr(ours, name).copy_(getattr(theirs, name))
    assert torch.equal(ours.eval()(batch), theirs.eval()(batch))


def test_batch_norm_leaves_running_statistics_to_merge() -> None:
    ours, _ = norm_pair()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    batch = inputs(8, 5, 6)
    ours(batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    assert set(before) == {"weight", "bias", "running_mean", "running_var"}
    assert torch.allclose(ours.batch_mean, batch.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(ours.batch_var, batch.var((0, 2, 3)), atol=1e-6)


@pytest.mark.parametrize("cuts", [[16], [8, 8], [1, 15], [4, 4, 4, 4], [3, 5, 0, 8]])
def test_merge_of_micro_batches_equals_the_pooled_statistics(cuts: list[int]) -> None:
    batch = inputs(16, 5, 12) * torch.arange(1, 17)[:, None, None, None] + torch.arange(16)[:, None, None, None]
    ours, _ = norm_pair()
    start_mean, start_var = ours.running_mean.clone(), ours.running_var.clone()  # type: ignore[union-attr]
    parts = [part if len(part) else batch[:1] for part in batch.split(cuts)]  # an empty part: one example with weight 0
    means = torch.stack([part.mean((0, 2, 3)) for part in parts])
    variances = torch.stack([part.var((0, 2, 3), unbiased=False) for part in parts])
    merge(ours, means, variances, cuts)
    mean, variance = batch.mean((0, 2, 3)), batch.var((0, 2, 3), unbiased=False)
    assert torch.allclose(ours.running_mean, start_mean.lerp(mean, 0.1), rtol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(ours.running_var, start_var.lerp(variance, 0.1), rtol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_merge_of_what_forward_left_is_close_to_one_big_batch(parts: int) -> None:
    batch = inputs(16, 5, 12) * 2 + 3
    ours, theirs = norm_pair()
    left = []
    for part in batch.chunk(parts):
        ours(part)
        left.append((ours.batch_mean, ours.batch_var))
    merge(ours, *(torch.stack(column) for column in zip(*left, strict=True)), [16 // parts] * parts)
    theirs(batch)
    bias = parts / (16 * 144)  # the parts' variances are unbiased: each a little larger than its share of the whole
    assert torch.allclose(ours.running_mean, theirs.running_mean, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(ours.running_var, theirs.running_var, rtol=2 * bias)  # type: ignore[arg-type]


def test_cnn_is_the_composition_in_its_docstring() -> None:
    model, batch = build(ModelConfig(name="tiny"), 0), inputs()
    features = F.max_pool2d(F.relu(model.conv1(batch)), 2)
    features = F.max_pool2d(F.relu(model.conv2(features)), 2)
    assert torch.equal(model(batch), model.fc2(F.relu(model.fc1(features.flatten(1)))))


@pytest.mark.parametrize(("num_examples", "num_micro_batches"), [(100, 8), (37, 5), (3, 8), (64, 1), (60_000, 7)])
def test_shares_of_statistics_follow_the_samplers_bounds(num_examples: int, num_micro_batches: int) -> None:
    """A step computes its micro-batches' shares on the device; the sampler computes their bounds on the host."""
    sampler = Sampler(num_examples, 64, num_micro_batches, 0)
    for step in (0, sampler.steps_per_epoch - 1):
        bounds = [sampler.micro_batch(step, index) for index in range(num_micro_batches)]
        counts = torch.tensor([float(stop - start) for start, stop in bounds])
        found = shares(sampler.batch_rows(step), num_micro_batches, torch.device("cpu"))
        assert torch.equal(found, counts / sampler.batch_rows(step))


@pytest.mark.parametrize("is_sound", [True, False])
def test_layers_that_are_merged_together_get_the_bits_of_each_alone(is_sound: bool) -> None:
    """Broken statistics change nothing."""
    together, alone = [[BatchNorm2d(width) for width in (4, 32, 17)] for _ in range(2)]
    rows, counts = 8, [5, 3, 8, 8, 1, 8, 8, 8]
    means, variances = ([inputs(rows, width, 1)[:, :, 0, 0].square() for width in (4, 32, 17)] for _ in range(2))
    if not is_sound:
        means[1][3, 5] = torch.nan
    shares = torch.tensor(counts, dtype=torch.float32) / sum(counts)
    merge_statistics(together, torch.cat([*means, *variances], dim=1), shares, torch.tensor(is_sound))
    for one, other, mean, variance in zip(together, alone, means, variances, strict=True):
        merge(other, mean, variance, counts, is_sound)
        assert torch.equal(one.running_mean, other.running_mean)  # type: ignore[arg-type]
        assert torch.equal(one.running_var, other.running_var)  # type: ignore[arg-type]
        assert is_sound != torch.equal(one.running_mean, torch.zeros(len(mean[0])))  # type: ignore[arg-type]
