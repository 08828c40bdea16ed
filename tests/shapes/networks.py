"""Networks as a user writes them, of torch's own layers: `--model.name networks.py:FUNCTION`."""

from torch import nn

Shape = tuple[int, int, int]  # of an image: channels, height, width


def resnet18(shape: Shape, num_classes: int) -> nn.Module:
    """Build torchvision's ResNet-18 as it is."""
    import torchvision

    assert shape[0] == 3
    return torchvision.models.resnet18(num_classes=num_classes)


def mlp(shape: Shape, num_classes: int) -> nn.Module:
    """Build one hidden layer, with dropout."""
    num_pixels = shape[0] * shape[1] * shape[2]
    layers = nn.Linear(num_pixels, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, num_classes)
    return nn.Sequential(nn.Flatten(), *layers)


def small(shape: Shape, num_classes: int) -> nn.Module:
    """Build one convolution, with Dropout2d, GroupNorm, and BatchNorm1d on vectors."""
    return nn.Sequential(
        *(nn.Conv2d(shape[0], 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Dropout2d(0.2)),
        *(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.BatchNorm1d(72), nn.Linear(72, num_classes)),
    )
