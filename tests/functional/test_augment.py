"""Augmentation depends only on the rows' keys. When it is off, images are only normalized."""

from typing import Any

import pytest
import torch
from torch import Tensor

from train.config import AugmentConfig
from train.errors import UserError
from train.functional.augment import affine, augment, check_sizes, erase, flip, normalize, shift
from train.functional.hashing import key
from train.functional.rng import row_keys

CPU = torch.device("cpu")
MEAN, STD = [33.3], [78.6]
RGB_MEAN, RGB_STD = [33.3, 120.0, 99.5], [78.6, 30.1, 60.0]
EVERY = [
    {"flip": 0.5},
    {"shift": 3},
    {"rotate": 15.0},
    {"scale": 0.2},
    {"shear": 10.0},
    {"erase": 0.5},
    {"flip": 0.5, "rotate": 10.0, "scale": 0.1, "shear": 5.0, "shift": 2, "erase": 0.5, "erase_size": 12},
]


def batch(num: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random images without a zero pixel, uint8 [num,1,28,28], and their keys."""
    images = torch.randint(1, 256, (num, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return images, row_keys(key(seed, "augment", 0), 0, num, CPU)


def blob(width: int = 28) -> Tensor:
    """Return one smooth blob off the centre, float [1,1,28,width] in 0..255."""
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(float(width)), indexing="ij")
    return 255 * torch.exp(-((y - 9) ** 2 + (x - (width - 1) / 2) ** 2) / 18)[None, None]


def centre(images: Tensor) -> Tensor:
    """Return the centres of mass relative to the images' middle, float [B,2] (y, x)."""
    weights = images[:, 0] / images.sum((1, 2, 3))[:, None, None]
    y, x = (torch.arange(float(size)) - (size - 1) / 2 for size in images.shape[2:])
    return torch.stack(((weights.sum(2) * y).sum(1), (weights.sum(1) * x).sum(1)), 1)


def test_augment_that_is_off_is_normalization_alone() -> None:
    images, keys = batch()
    found = augment(images, keys, AugmentConfig(), MEAN, STD)
    assert found.dtype == torch.float32
    assert torch.equal(found, normalize(images, MEAN, STD))
    assert torch.allclose(found, (images.double() - MEAN[0]).div(STD[0]).float(), atol=1e-6)


def test_normalize_gives_mean_zero_and_deviation_one() -> None:
    images, _ = batch(64)
    values = images.double()
    found = normalize(images, [float(values.mean())], [float(values.std(unbiased=False))])
    assert abs(float(found.double().mean())) < 1e-5
    assert abs(float(found.double().std(unbiased=False)) - 1) < 1e-5


@pytest.mark.parametrize("options", EVERY)
@pytest.mark.parametrize("cut", [1, 13, 16, 31])
def test_augment_is_the_same_bits_however_the_batch_is_cut(options: dict[str, Any], cut: int) -> None:
    config = AugmentConfig(**options)
    images, keys = batch()
    whole = augment(images, keys, config, MEAN, STD)
    parts = [augment(images[at], keys[at], config, MEAN, STD) for at in (slice(0, cut), slice(cut, None))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("options", EVERY)
def test_augment_depends_on_its_keys_only_and_changes_images(options: dict[str, Any]) -> None:
    config = AugmentConfig(**options)
    images, keys = batch()
    original = images.clone()
    state = torch.get_rng_state()
    first = augment(images, keys, config, MEAN, STD)
    torch.rand(3)
    assert torch.equal(augment(images, keys, config, MEAN, STD), first)
    assert torch.equal(images, original)
    assert not torch.equal(first, normalize(images, MEAN, STD))
    assert not torch.equal(augment(images, row_keys(key(0, "augment", 1), 0, 32, CPU), config, MEAN, STD), first)
    torch.set_rng_state(state)
    augment(images, keys, config, MEAN, STD)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("pixels", "num"), [(1, 400), (2, 400), (14, 24)])
def test_shift_moves_by_whole_pixels_within_its_range(pixels: int, num: int) -> None:
    images, keys = batch(num)
    moved = shift(images, keys, pixels)
    assert moved.dtype == torch.uint8
    seen = set()
    padded = torch.nn.functional.pad(images, (pixels,) * 4)
    candidates = [(dy, dx) for dy in range(2 * pixels + 1) for dx in range(2 * pixels + 1)]
    matched = torch.zeros(num, dtype=torch.int64)
    for dy, dx in candidates:
        hits = (padded[:, :, dy : dy + 28, dx : dx + 28] == moved).all(-1).all(-1)[:, 0]
        matched += hits
        if hits.any():
            seen.add((dy, dx))
    assert (matched == 1).all()
    if pixels <= 2:
        assert seen == set(candidates)


def test_affine_without_any_change_is_the_identity() -> None:
    images, keys = batch()
    assert torch.allclose(affine(images, keys, AugmentConfig()), images.float(), atol=0.01)


@pytest.mark.parametrize("width", [28, 40])
def test_affine_rotates_both_ways_by_at_most_its_angle(width: int) -> None:
    keys = row_keys(key(0, "augment", 0), 0, 400, CPU)
    found = centre(affine(blob(width).expand(400, -1, -1, -1), keys, AugmentConfig(rotate=30.0)))
    angles = torch.rad2deg(torch.atan2(found[:, 1], -found[:, 0]))
    assert float(angles.abs().max()) < 30.5
    assert angles.max() > 25
    assert angles.min() < -25
    assert torch.allclose(found.norm(dim=1), torch.tensor(4.5), atol=0.1)


def test_affine_scales_within_its_range() -> None:
    keys = row_keys(key(0, "augment", 0), 0, 400, CPU)
    found = -centre(affine(blob().expand(400, -1, -1, -1), keys, AugmentConfig(scale=0.2)))[:, 0] / 4.5
    assert 0.79 < found.min() < 0.85
    assert 1.15 < found.max() < 1.21


def test_affine_shifts_within_its_range() -> None:
    keys = row_keys(key(0, "augment", 0), 0, 400, CPU)
    config = AugmentConfig(scale=1e-6, shift=3)
    found = centre(affine(blob().expand(400, -1, -1, -1), keys, config)) - torch.tensor([-4.5, 0.0])
    assert 2.7 < float(found.abs().max()) < 3.05


@pytest.mark.parametrize("size", [1, 8, 28])
@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_erase_blanks_one_square_with_its_probability(size: int, probability: float) -> None:
    images, keys = batch(1000)
    blank = erase(images, keys, probability, size)[:, 0] == 0
    erased = blank.flatten(1).any(1)
    assert abs(float(erased.float().mean()) - probability) <= 4 * (probability * (1 - probability) / 1000) ** 0.5
    sides = set()
    for mask in blank[erased]:
        rows, columns = (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
        assert len(rows) == len(columns) == rows[-1] - rows[0] + 1 == columns[-1] - columns[0] + 1
        assert int(mask.sum()) == len(rows) ** 2
        sides.add(len(rows))
    assert sides <= set(range(1, size + 1))
    if probability == 1:
        assert sides == set(range(1, size + 1))
        assert blank.any(0).float().mean() > 0.7  # squares lie everywhere
        assert all(edge.any() for edge in (blank[:, 0], blank[:, -1], blank[:, :, 0], blank[:, :, -1]))
    kept = erase(images, keys, probability, size)[:, 0][~blank]
    assert torch.equal(kept, images[:, 0][~blank])


def colours(height: int = 24, width: int = 40) -> tuple[Tensor, Tensor]:
    """Return random images uint8 [32,3,height,width] without a zero, laid out with the channel innermost; and keys."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(1, 256, (32, height, width, 3), dtype=torch.uint8, generator=generator)
    return images.permute(0, 3, 1, 2), row_keys(key(0, "augment", 0), 0, 32, CPU)


def test_normalize_gives_each_channel_mean_zero_and_deviation_one() -> None:
    images, _ = colours()
    values = images.double().transpose(0, 1).flatten(1)
    found = normalize(images, values.mean(1).tolist(), values.std(1, unbiased=False).tolist())
    assert (found.shape, found.dtype) == (images.shape, torch.float32)
    planes = found.double().transpose(0, 1).flatten(1)
    assert torch.allclose(planes.mean(1), torch.zeros(3, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(planes.std(1, unbiased=False), torch.ones(3, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("options", EVERY)
def test_augment_changes_all_channels_alike(options: dict[str, Any]) -> None:
    """Each channel of a colour image is what the same channel gives as a grey image."""
    config = AugmentConfig(**options)
    images, keys = colours()
    found = augment(images, keys, config, RGB_MEAN, RGB_STD)
    assert not torch.equal(found, normalize(images, RGB_MEAN, RGB_STD))
    for channel in range(3):
        at = slice(channel, channel + 1)
        grey = augment(images[:, at], keys, config, RGB_MEAN[at], RGB_STD[at])
        assert torch.allclose(found[:, at], grey, atol=1e-5)


def test_flip_mirrors_left_to_right_with_its_probability() -> None:
    images, keys = batch(1000)
    found = flip(images, keys, 0.25)
    is_same, is_mirrored = ((found == wanted).flatten(1).all(1) for wanted in (images, images.flip(3)))
    assert bool((is_same ^ is_mirrored).all())
    assert abs(float(is_mirrored.float().mean()) - 0.25) < 0.05


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AugmentConfig(shift=9), "augment.shift is 9 pixels, but the images have 8 x 20 pixels. Use at most 8."),
        (AugmentConfig(erase=0.5, erase_size=30), "augment.erase_size is 30 pixels"),
        (AugmentConfig(erase_size=30), None),
        (AugmentConfig(shift=8, erase=0.5, erase_size=8), None),
    ],
)
def test_changes_larger_than_the_images_are_refused(config: AugmentConfig, message: str | None) -> None:
    if message is None:
        check_sizes(config, (3, 8, 20))
        images, keys = colours(8, 20)
        assert augment(images, keys, config, RGB_MEAN, RGB_STD).shape == (32, 3, 8, 20)
        return
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        check_sizes(config, (3, 8, 20))
