"""A small vision transformer (Dosovitskiy et al., 2021) of torch's own layers, for images of 8 x 8 pixels and more:

python -m train --model.name configs/networks/vit.py:build --optim.name adamw --optim.lr 0.001
"""

import torch
from torch import Tensor, nn

PATCH, WIDTH, DEPTH, HEADS = 4, 64, 4, 4


def encoder_layer() -> nn.Module:
    """Return self-attention and two linear layers, each with a residual connection."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.1, batch_first=True, norm_first=True)
    # Attention would draw its dropout from torch's global generator, which is refused. That of nn.Dropout layers is
    # drawn by the example's key.
    layer.self_attn.dropout = 0.0
    return layer


class Vit(nn.Module):
    """Patches of PATCH x PATCH pixels are tokens. The mean of the last layer's tokens is classified."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        num_tokens = (height // PATCH) * (width // PATCH)
        self.embed = nn.Conv2d(channels, WIDTH, kernel_size=PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, num_tokens, WIDTH))
        self.layers = nn.Sequential(*(encoder_layer() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits float [B,K] of images float [B,C,H,W]."""
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.layers(tokens)).mean(1))


def build(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the network for images of `shape` (channels, height, width)."""
    return Vit(shape, num_classes)
