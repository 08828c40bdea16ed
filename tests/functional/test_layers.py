"""Our layers: dropout by keys, BatchNorm merged over micro-batches, both in place of torch's of any dimension."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from train.errors import UserError
from train.functional import rng
from train.functional.hashing import key
from train.functional.layers import BatchNorm, batch_norms, convert, dropouts, merge_statistics, one_pass
from train.functional.rng import uniform
from train.functional.sampler import Sampler
from train.functional.tables import shares

CPU = torch.device("cpu")


def inputs(num: int = 6, channels: int = 1, side: int = 28) -> Tensor:
    return torch.randn(num, channels, side, side, generator=torch.Generator().manual_seed(0))


def keys(num: int, step: int = 0) -> Tensor:
    return rng.row_keys(key(0, "dropout", step), 0, num, CPU)


def batch_norm(channels: int) -> Any:
    """Return our BatchNorm, in training mode."""
    return convert(nn.BatchNorm2d(channels))


def norm_pair(channels: int = 5) -> tuple[BatchNorm, nn.BatchNorm2d]:
    """Return our BatchNorm and torch's, with the same weights, in training mode."""
    ours, theirs = batch_norm(channels), nn.BatchNorm2d(channels)
    generator = torch.Generator().manual_seed(1)
    for name in ("weight", "bias", "running_mean"):
        value = torch.randn(channels, generator=generator)
        for norm in (ours, theirs):
            getattr(norm, name).data.copy_(value)
    return ours, theirs


def dropped(layer: nn.Module, features: Tensor, row: Tensor) -> Tensor:
    """Return what a converted layer makes of features in a pass with these row keys."""
    with one_pass(dropouts(layer), [], row, []):
        return layer(features)


def test_dropout_drops_with_its_probability_and_keeps_the_mean() -> None:
    features = torch.ones(400, 250)
    for probability in (0.1, 0.5, 0.9):
        found = dropped(convert(nn.Dropout(probability)), features, keys(400))
        assert torch.allclose(found.unique(), torch.tensor([0, 1 / (1 - probability)]))
        share = float((found == 0).float().mean())
        assert abs(share - probability) < 4 * (probability * (1 - probability) / features.numel()) ** 0.5


LAYERS = [
    (nn.Dropout(0.5), (64,)),
    (nn.Dropout(0.5), (5, 4, 3)),
    (nn.Dropout(0.5, inplace=True), (7, 9)),
    (nn.Dropout1d(0.5), (16, 5)),
    (nn.Dropout2d(0.5), (16, 4, 3)),
    (nn.Dropout3d(0.5), (16, 2, 2, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_dropout_is_a_function_of_the_examples_keys(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, features = convert(copy.deepcopy(layer)), torch.rand(32, *shape) + 1
    whole = dropped(layer, features, keys(32))
    parts = [dropped(layer, features[at], keys(32)[at]) for at in (slice(0, 5), slice(5, 32))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(dropped(layer, features, keys(32)), whole)
    assert not torch.equal(dropped(layer, features, keys(32, step=1)), whole)
    assert not torch.equal(whole[0] == 0, whole[1] == 0)
    assert torch.equal(layer.eval()(features), features)
    assert (features >= 1).all()  # even with inplace=True


@pytest.mark.parametrize(("layer", "shape"), LAYERS[3:], ids=str)
def test_dropout_of_channels_drops_all_or_nothing_of_one(layer: nn.Module, shape: tuple[int, ...]) -> None:
    found = dropped(convert(copy.deepcopy(layer)), torch.ones(6, *shape), keys(6)).flatten(2)
    assert (found == found[:, :, :1]).all()
    assert set(found.unique().tolist()) == {0.0, 2.0}


def test_dropout_of_the_first_call_of_the_first_layer_has_the_columns_from_zero() -> None:
    """These are the bits of the MNIST recipes."""
    features = torch.rand(8, 12)
    expected = features * (uniform(keys(8), 12) >= 0.3) * (1 / 0.7)
    assert torch.equal(dropped(convert(nn.Dropout(0.3)), features, keys(8)), expected)


def test_layers_and_calls_of_a_pass_have_masks_of_their_own() -> None:
    layers = convert(nn.Sequential(nn.Dropout(0.5), nn.Identity(), nn.Dropout(0.0), nn.Dropout(0.5)))
    features = torch.ones(4, 1000)
    masks = []
    for _ in range(2):  # the second pass repeats the first
        with one_pass(dropouts(layers), [], keys(4), []):
            masks += [layers[number](features) for number in (0, 0, 3, 3)]
    for one, other in itertools.combinations(masks[:4], 2):
        assert 0.45 < float((one == other).float().mean()) < 0.55
    assert all(torch.equal(one, other) for one, other in zip(masks[:4], masks[4:], strict=True))


def test_dropout_gives_the_windows_of_an_example_its_key() -> None:
    layer, windows = convert(nn.Dropout(0.5)), torch.ones(6 * 4, 10)  # four windows of each example
    whole = dropped(layer, windows, keys(6))
    assert torch.equal(dropped(layer, windows[8:12], keys(6)[2:3]), whole[8:12])
    assert not torch.equal(whole[8], whole[9])
    with pytest.raises(UserError, match="got 23 rows for 6 examples"):
        dropped(layer, windows[:23], keys(6))


def test_dropout_without_keys_fails_in_training() -> None:
    layer = convert(nn.Dropout(0.5))
    with pytest.raises(RuntimeError, match="Activation checkpointing"):
        layer(torch.ones(2, 3))


def test_activation_checkpointing_fails_instead_of_drawing_another_mask() -> None:
    layer, features = convert(nn.Dropout(0.5)), torch.ones(2, 3, requires_grad=True)
    with one_pass(dropouts(layer), [], keys(2), []):
        out = torch.utils.checkpoint.checkpoint(layer, features, use_reentrant=False)
    with pytest.raises(RuntimeError, match="Activation checkpointing"):
        (out**2).sum().backward()


def test_convert_keeps_weights_options_names_and_shared_layers() -> None:
    shared = nn.Dropout(0.4)
    stock = nn.ModuleDict(
        {
            "norm": nn.BatchNorm1d(3, eps=0.1, momentum=0.3),
            "plain": nn.Sequential(nn.BatchNorm3d(2, affine=False), shared, nn.SyncBatchNorm(4)),
            "again": shared,
            "other": nn.Sequential(nn.InstanceNorm2d(2), nn.AlphaDropout(0.1), nn.GroupNorm(1, 2)),
        }
    )
    stock["norm"].running_mean += 2
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    model: Any = convert(stock)
    assert {n for n in before if "num_batches" not in n} == set(model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [type(layer).__name__ for layer in model["other"]] == ["InstanceNorm2d", "AlphaDropout", "GroupNorm"]
    assert [(norm.momentum, norm.eps) for norm in batch_norms(model)] == [(0.3, 0.1), (0.1, 1e-5), (0.1, 1e-5)]
    assert dropouts(model) == [model["again"]] == [model["plain"][1]]
    assert model["again"].p == 0.4
    copied: Any = copy.deepcopy(model)
    assert [type(layer) for layer in batch_norms(copied)] == [BatchNorm] * 3


@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}])
def test_convert_refuses_a_batch_norm_that_cannot_be_merged(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"1\.0 is BatchNorm2d with momentum=None or track_running_stats=False"):
        convert(nn.Sequential(nn.ReLU(), nn.Sequential(nn.BatchNorm2d(3, **options))))


def merge(
    norm: BatchNorm, means: torch.Tensor, variances: torch.Tensor, counts: list[int], is_sound: bool = True
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
        merge(ours, ours.batch_mean, ours.batch_var, [8])
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
    assert torch.allclose(ours.batch_mean[0], batch.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(ours.batch_var[0], batch.var((0, 2, 3)), atol=1e-6)


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
    merge(ours, *(torch.cat(column) for column in zip(*left, strict=True)), [16 // parts] * parts)
    theirs(batch)
    bias = parts / (16 * 144)  # the parts' variances are unbiased: each a little larger than its share of the whole
    assert torch.allclose(ours.running_mean, theirs.running_mean, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(ours.running_var, theirs.running_var, rtol=2 * bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [[8], [4, 4], [5, 0, 1, 2], [0, 8]])
@pytest.mark.parametrize("rows_per_example", [1, 3])
def test_batch_norm_normalizes_each_micro_batch_of_a_pass_by_itself(sizes: list[int], rows_per_example: int) -> None:
    """One pass over several micro-batches gives what a pass over each of them gives, gradients too."""
    together, alone = norm_pair()[0], norm_pair()[0]
    one, other = (inputs(8 * rows_per_example, 5, 3).requires_grad_() for _ in range(2))
    with one_pass([], [together], None, sizes):
        found = together(one)
    parts = other.split([rows_per_example * size for size in sizes])
    left = [(alone(part), alone.batch_mean, alone.batch_var) for part in parts if len(part)]
    outputs, means, variances = map(torch.cat, zip(*left, strict=True))
    assert torch.equal(found, outputs)
    filled = [size > 0 for size in sizes]
    assert torch.equal(together.batch_mean[filled], means)
    assert torch.equal(together.batch_var[filled], variances)
    assert len(together.batch_mean) == len(together.batch_var) == len(sizes)
    (found**3).sum().backward()
    (outputs**3).sum().backward()
    assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    assert torch.allclose(together.weight.grad, alone.weight.grad)  # type: ignore[arg-type]
    assert together.sizes is None


def test_batch_norm_refuses_rows_that_examples_do_not_share_out() -> None:
    norm = batch_norm(5)
    with one_pass([], [norm], None, [2, 3]), pytest.raises(UserError, match="7 rows for 5 examples"):
        norm(inputs(7, 5, 3))


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
    together, alone = [[batch_norm(width) for width in (4, 32, 17)] for _ in range(2)]
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


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (7,)), (nn.BatchNorm3d, (2, 3, 4))])
def test_batch_norm_of_any_dimension_computes_what_torchs_does(kind: Any, shape: tuple[int, ...]) -> None:
    theirs, batch = kind(5), torch.randn(8, 5, *shape)
    ours: Any = convert(copy.deepcopy(theirs))
    assert torch.equal(ours(batch), theirs(batch))
    merge(ours, ours.batch_mean, ours.batch_var, [8])
    assert torch.allclose(ours.running_var, theirs.running_var)
    assert torch.equal(theirs.eval()(batch), convert(copy.deepcopy(theirs))(batch))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_batch_norm_of_a_single_value_has_variance_zero(shape: tuple[int, ...]) -> None:
    norm, single = batch_norm(3), torch.tensor([[1.0, -2.0, 5.0]]).view(1, 3, *shape).requires_grad_()
    norm.bias.data.fill_(0.5)
    out = norm(single)
    out.sum().backward()
    assert torch.equal(out, torch.full_like(out, 0.5))
    assert torch.equal(norm.batch_mean, torch.tensor([[1.0, -2.0, 5.0]]))
    assert torch.equal(norm.batch_var, torch.zeros(1, 3))
    assert torch.equal(single.grad, torch.zeros_like(single))  # type: ignore[arg-type]


def test_frozen_batch_norm_is_not_merged() -> None:
    """Fine-tuning often keeps BatchNorm in evaluation mode: its statistics stay."""
    model = convert(nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(3)))
    model[0].eval()
    assert batch_norms(model) == [model[1]]


def test_each_layer_is_merged_with_its_own_momentum() -> None:
    norms: Any = convert(nn.Sequential(nn.BatchNorm1d(2, momentum=0.1), nn.BatchNorm1d(2, momentum=0.7)))
    found = torch.ones(1, 8)
    merge_statistics(list(norms), found, torch.ones(1), torch.tensor(True))
    assert torch.allclose(norms[0].running_mean, torch.tensor(0.1))
    assert torch.allclose(norms[1].running_mean, torch.tensor(0.7))


@pytest.mark.slow
def test_compiled_dropout_has_the_same_masks() -> None:
    """Inductor computes the columns of the random numbers symbolically, unless it is kept from it."""
    model, features = (
        convert(nn.Sequential(nn.Dropout(0.3), nn.Dropout2d(0.3), nn.Dropout(0.3))),
        torch.ones(8, 16, 9, 9),
    )
    expected = dropped(model, features, keys(8))
    model.compile()
    assert torch.equal(dropped(model, features, keys(8)), expected)
