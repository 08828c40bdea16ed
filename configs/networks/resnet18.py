"""torchvision's ResNet-18 for small images of any number of channels. It has BatchNorm, so fix the micro-batches:

python -m train --model.name configs/networks/resnet18.py:build --train.num_micro_batches 8
"""

import torchvision
from torch import nn


def build(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the network for images of `shape` (channels, height, width)."""
    network = torchvision.models.resnet18(weights=None, num_classes=num_classes)
    # The original quarters an image of 224 x 224 pixels in its first layers. A small image is kept as it is.
    network.conv1 = nn.Conv2d(shape[0], 64, kernel_size=3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network
