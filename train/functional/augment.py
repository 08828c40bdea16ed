"""Augmentation: uint8 images -> normalized float inputs, a whole batch at a time, on the device.

Every change of an image is a function of its row's key (`rng.py`). There is no random stream and no file reading here.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from train.config import AugmentConfig
from train.errors import UserError
from train.functional.rng import uniform

ERASE_SALT, AFFINE_SALT, SHIFT_SALT, FLIP_SALT = 0, 8, 16, 24  # columns of a row's random numbers


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn images, uint8 or float [B,C,H,W] in 0..255, into inputs, float32 of mean 0 and standard deviation 1.

    `mean` and `std` have a number for each channel.
    """
    pairs = zip(mean, std, strict=True)
    # uint8 minus a number is float32
    channels = [(images.narrow(1, at, 1) - low) * (1.0 / unit) for at, (low, unit) in enumerate(pairs)]
    return channels[0] if len(channels) == 1 else torch.cat(channels, 1)


def lay_out(images: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return images [B,C,H,W] in a memory format. With one channel only the strides change, and nothing is copied."""
    if images.shape[1] == 1 and memory_format == torch.channels_last:
        return images.contiguous().view(-1, *images.shape[2:], 1).permute(0, 3, 1, 2)
    return images.to(memory_format=memory_format)


def flip(images: Tensor, keys: Tensor, probability: float) -> Tensor:
    """Mirror some images left to right; [B,C,H,W] in and out."""
    is_flipped = uniform(keys, 1, FLIP_SALT)[:, :, None, None] < probability
    return torch.where(is_flipped, images.flip(3), images)


def shift(images: Tensor, keys: Tensor, pixels: int) -> Tensor:
    """Move each image by up to `pixels` in x and y, filling with 0; [B,C,H,W] in and out."""
    height, width = images.shape[-2:]
    offsets = (uniform(keys, 2, SHIFT_SALT) * (2 * pixels + 1)).long()
    padded = F.pad(images, (pixels,) * 4)
    rows = torch.arange(height, device=images.device) + offsets[:, :1]
    columns = torch.arange(width, device=images.device) + offsets[:, 1:]
    batch = torch.arange(len(images), device=images.device)
    return padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def affine(images: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """Rotate, scale, shear and shift each image about its centre (bilinear, 0 outside); float [B,C,H,W] in 0..255."""
    height, width = images.shape[-2:]
    rotate, scale, shear, dx, dy = (uniform(keys, 5, AFFINE_SALT) * 2 - 1)[:, :, None, None].unbind(1)  # [B,1,1] each
    angle, slant = rotate * math.radians(config.rotate), torch.tan(shear * math.radians(config.shear))
    zoom = 1 / (1 + scale * config.scale)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    x = torch.linspace(-1 + 1 / width, 1 - 1 / width, width, device=images.device)[None, None, :]
    ratio = height / width
    y = torch.linspace(-ratio + 1 / width, ratio - 1 / width, height, device=images.device)[None, :, None]  # as x
    sheared = x + slant * y
    grid_x = cos * sheared - sin * y + dx * (2 * config.shift / width)
    grid_y = sin * sheared + cos * y + dy * (2 * config.shift / width)
    if height != width:  # grid_sample wants halves of the height
        grid_y = grid_y / ratio
    grid = torch.stack((grid_x, grid_y), dim=-1)
    return F.grid_sample(images.to(torch.float32), grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def erase(images: Tensor, keys: Tensor, probability: float, size: int) -> Tensor:
    """Blank a square of side 1..size in some images (random erasing; Zhong et al., 2017); [B,C,H,W] in and out."""
    height, width = images.shape[-2:]
    chance, side, top, left = uniform(keys, 4, ERASE_SALT).unbind(1)
    side = (side * size).long() + 1
    top, left = ((position * (height + 1 - side)).long() for position in (top, left))
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    in_rows = (y >= top[:, None]) & (y < (top + side)[:, None])
    in_columns = (x >= left[:, None]) & (x < (left + side)[:, None])
    blank = in_rows[:, :, None] & in_columns[:, None, :] & (chance < probability)[:, None, None]
    return images.masked_fill(blank[:, None], 0)


def check_sizes(config: AugmentConfig, shape: tuple[int, int, int]) -> None:
    """Raise UserError if a change is larger than images of this shape (C, H, W)."""
    side = min(shape[1:])
    for name, pixels, is_on in (("shift", config.shift, True), ("erase_size", config.erase_size, config.erase)):
        if is_on and pixels > side:
            size = f"{shape[1]} x {shape[2]} pixels"
            raise UserError(f"augment.{name} is {pixels} pixels, but the images have {size}. Use at most {side}.")


def augment(
    images: Tensor, keys: Tensor | None, config: AugmentConfig, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Turn images uint8 [B,C,H,W] into inputs float32 [B,C,H,W]. Without row keys, int64 [B], only normalize."""
    if keys is None:
        return normalize(images, mean, std)
    if config.flip:
        images = flip(images, keys, config.flip)
    if config.rotate or config.scale or config.shear:
        images = affine(images, keys, config)
    elif config.shift:
        images = shift(images, keys, config.shift)
    if config.erase:
        images = erase(images, keys, config.erase, config.erase_size)
    return normalize(images, mean, std)
