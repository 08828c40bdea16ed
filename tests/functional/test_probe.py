"""Networks that would break a law are refused in one line that names the culprit. Sound ones of many kinds pass."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.errors import UserError
from train.functional import probe
from train.functional.layers import convert

SHAPE, NUM_CLASSES = (3, 12, 10), 4


class Net(nn.Module):
    """A convolution, something between, and a linear layer."""

    def __init__(self, between: nn.Module | Callable[[Tensor], Any] | None = None, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(SHAPE[0], width, 3, stride=2)
        self.between = between or nn.Identity()
        self.fc = nn.Linear(width, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.between(F.relu(self.conv(images)))
        return self.fc(features.mean((2, 3)))


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        self.count += 1
        return features


class Remembers(nn.Module):
    """Keeps the last mean in an attribute: no buffer, and yet a state."""

    last: Any = 0.0

    def forward(self, features: Tensor) -> Tensor:
        last, self.last = self.last, features.detach().mean()
        return features + 0.1 * last


class HiddenDraw(nn.Module):
    """Puts the global generator back after a draw."""

    def forward(self, features: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            return features * torch.rand(features.shape)


class Attention(nn.Module):
    """Self-attention over pixels, as a stock module."""

    def __init__(self, layer: nn.Module, *, is_batch_first: bool = True) -> None:
        super().__init__()
        self.layer, self.is_batch_first = layer, is_batch_first

    def forward(self, features: Tensor) -> Tensor:
        tokens = features.flatten(2).permute(0, 2, 1) if self.is_batch_first else features.flatten(2).permute(2, 0, 1)
        tokens = (
            self.layer(tokens, tokens, tokens)[0]
            if isinstance(self.layer, nn.MultiheadAttention)
            else self.layer(tokens)
        )
        return (tokens.permute(0, 2, 1) if self.is_batch_first else tokens.permute(1, 2, 0)).unflatten(
            2, features.shape[2:]
        )


def encoder(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, **{"batch_first": True, **options})


def encoder_without_attention_dropout(**options: Any) -> nn.TransformerEncoderLayer:
    layer = encoder(dropout=0.1, **options)
    layer.self_attn.dropout = 0.0
    return layer


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.also_conv = self.conv


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 2)


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(8))
        self.conv.requires_grad_(False)

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.between.train(False)
        return self


SABOTAGED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "torch.rand": (lambda: Net(lambda x: x * torch.rand(())), "forward draws from a global random generator"),
    "F.dropout": (lambda: Net(F.dropout), "forward draws from a global"),
    "F.dropout in evaluation": (lambda: Net(Only(False, F.dropout)), r"between \(Only\) draws from a global"),
    "numpy": (lambda: Net(lambda x: x * float(np.random.rand())), "forward draws from a global"),
    "python": (lambda: Net(lambda x: x * random.random()), "forward draws from a global"),
    "a draw that is hidden": (lambda: Net(HiddenDraw()), "other results in a second pass"),
    "a draw in backward": (lambda: Net(NoisyBackward.apply), "backward draws from a global"),
    "AlphaDropout": (lambda: Net(nn.AlphaDropout(0.1)), r"between \(AlphaDropout\) draws"),
    "attention's dropout": (
        lambda: Net(Attention(nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True))),
        r"between.layer \(MultiheadAttention\) draws .* dropout=0 in attention",
    ),
    "a stock transformer layer": (lambda: Net(Attention(encoder())), r"between.layer.self_attn \(Multi.* draws"),
    "a counter": (lambda: Net(Counter()), "between.count changed in a pass"),
    "InstanceNorm": (lambda: Net(nn.InstanceNorm2d(8, track_running_stats=True)), "between.running_mean, between.ru"),
    "spectral norm": (lambda: Net(nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))), "_u, .* changed"),
    "a BatchNorm of their own": (lambda: Net(type("Norm", (nn.BatchNorm2d,), {})(8)), "between.running_mean"),
    "hidden state": (lambda: Net(Remembers()), "other results in a second pass"),
    "weights changed in place": (lambda: Net(Clamped(8, 8, 1)), "between.weight changed in a pass"),
    "an unused layer": (Unused, "spare.weight, spare.bias got no gradient"),
    "a detached layer": (lambda: Net(lambda x: x.detach()), "conv.weight, conv.bias got no gradient"),
    "a mean over the batch": (lambda: Net(lambda x: x - x.mean(0)), "In training, an image's logits depend on"),
    "functional BatchNorm": (lambda: Net(lambda x: F.batch_norm(x, None, None, training=True)), "In training, an"),
    "a mean in evaluation": (lambda: Net(Only(False, lambda x: x - x.mean(0))), "In evaluation, an image's logits"),
    "a mean behind BatchNorm": (
        lambda: Net(nn.Sequential(nn.BatchNorm2d(8), Only(True, lambda x: x - x.mean(0)))),
        "In training, an image's",
    ),
    "the sequence first": (
        lambda: Net(Attention(encoder_without_attention_dropout(batch_first=False), is_batch_first=False)),
        "got 20 rows for 7 examples. Put the batch first",
    ),
    "a transposed batch": (lambda: Net(Attention(encoder(dropout=0.0, batch_first=False))), "logits depend on"),
    "no logits": (lambda: nn.Conv2d(3, 4, 3), r"forward returns torch.float32 \[7, 4, 10, 8\], expected .* \[7, 4\]"),
    "too many classes": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(360, 5)), r"\[7, 5\], expected"),
    "a tuple": (lambda: Returns(lambda x: (x, x)), "forward returns tuple"),
    "labels": (lambda: Returns(lambda x: x.argmax(1)), r"forward returns torch.int64 \[7\]"),
    "squeezed": (lambda: Returns(torch.squeeze), r"forward returns torch.float32 \[4\], expected .* \[1, 4\]"),
    "not finite": (lambda: Returns(lambda x: x / 0), "not finite"),
    "float64": (lambda: Net().double(), "conv.weight, conv.bias, fc.weight and 1 more must be float32"),
    "nothing to train": (lambda: Net().requires_grad_(False), "no trainable parameters"),
    "tied layers": (Tied, "conv.weight and also_conv.weight share their memory"),
    "BatchNorm of pixels first": (lambda: Net(Tokens(nn.BatchNorm1d(8), is_image_first=False)), "rows of an image"),
    "a state that is no tensor": (lambda: Net(Extra()), "between._extra_state .* must be tensors"),
}  # fmt: skip


class Only(nn.Module):
    """Applies a function in one mode only."""

    def __init__(self, is_training: bool, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.is_training, self.function = is_training, function

    def forward(self, features: Tensor) -> Tensor:
        return self.function(features) if self.training == self.is_training else features


class Returns(nn.Module):
    """Applies a function to sound logits."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.function = Net(), function

    def forward(self, images: Tensor) -> Any:
        return self.function(self.net(images))


class Transposed(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.T


class Clamped(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.01, 0.01)
        return super().forward(input)


class Tokens(nn.Module):
    """Applies a layer to all pixels of all images, as rows of features."""

    def __init__(self, layer: nn.Module, *, is_image_first: bool) -> None:
        super().__init__()
        self.layer, self.order = layer, (0, 2, 3, 1) if is_image_first else (2, 3, 0, 1)

    def forward(self, features: Tensor) -> Tensor:
        rows = features.permute(self.order)
        found = self.layer(rows.flatten(0, 2)).view(rows.shape)
        return found.permute([self.order.index(axis) for axis in range(4)])


class Extra(nn.Identity):
    def get_extra_state(self) -> str:
        return "text"


class NoisyBackward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, features: Tensor) -> Tensor:
        return features.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * torch.rand(gradient.shape)


SOUND: dict[str, Callable[[], nn.Module]] = {
    "plain": Net,
    "BatchNorm": lambda: Net(nn.BatchNorm2d(8)),
    "dropout": lambda: Net(nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.2))),
    "GroupNorm": lambda: Net(nn.GroupNorm(2, 8)),
    "InstanceNorm": lambda: Net(nn.InstanceNorm2d(8, affine=True)),
    "LayerNorm": lambda: Net(nn.LayerNorm((8, 5, 4))),
    "depthwise": lambda: Net(nn.Conv2d(8, 8, 3, groups=8, padding=1)),
    "weight norm": lambda: Net(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))),
    "attention": lambda: Net(Attention(nn.MultiheadAttention(8, 2, batch_first=True))),
    "transformer": lambda: Net(Attention(encoder_without_attention_dropout())),
    "sequence first": lambda: Net(Attention(encoder(dropout=0.0, batch_first=False), is_batch_first=False)),
    "frozen": Frozen,
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(360, 4)),
    "BatchNorm of pixels": lambda: Net(Tokens(nn.BatchNorm1d(8), is_image_first=True)),
    "BatchNorm of features": lambda: nn.Sequential(nn.Flatten(), nn.Linear(360, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)),
    # BatchNorm over few examples makes their round-off larger in each layer.
    "a deep network with BatchNorm": lambda: nn.Sequential(
        *(nn.Flatten(), nn.Linear(360, 256)),
        *(layer for _ in range(20) for layer in (nn.BatchNorm1d(256), nn.Tanh(), nn.Linear(256, 256))),
        nn.Linear(256, 4),
    ),
}


def check(make: Callable[[], nn.Module], *, channels_last: bool = False) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make()
    probe.check(convert(module), SHAPE, NUM_CLASSES, channels_last)


@pytest.mark.parametrize("case", SABOTAGED)
def test_sabotaged_network_is_refused_in_one_line(case: str) -> None:
    make, words = SABOTAGED[case]
    with pytest.raises(UserError, match=words) as raised:
        check(make)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", SOUND)
def test_sound_network_passes(case: str, channels_last: bool) -> None:
    before = torch.get_rng_state()
    check(SOUND[case], channels_last=channels_last)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "vgg11_bn"])
def test_networks_of_torchvision_pass_unchanged(name: str) -> None:
    import torchvision.models

    with torch.random.fork_rng(devices=[]):
        module = getattr(torchvision.models, name)(weights=None, num_classes=7)
    probe.check(convert(module), (3, 32, 32), 7, channels_last=True)


@pytest.mark.parametrize("num_classes", [5, 7])
def test_as_many_images_as_classes_hide_no_transposed_logits(num_classes: int) -> None:
    transposed = convert(nn.Sequential(nn.Flatten(), nn.Linear(360, num_classes), Transposed()))
    with pytest.raises(UserError, match="forward returns"):
        probe.check(transposed, SHAPE, num_classes)
