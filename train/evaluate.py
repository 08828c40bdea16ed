"""Exact evaluation: every example of a split counted once, on any world size, and a certificate that it was so.

The split is cut into batches that do not depend on the world size, each rank computes a contiguous block of them, and
per-example results meet by adding zeros: nothing is padded, dropped or averaged twice.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.functional.augment import lay_out, normalize
from train.functional.sampler import share
from train.rundir import Evaluation
from train.storage.data import Data
from train.world.world import World


@dataclass(frozen=True)
class Result:
    """Counts over a split; `predictions` int64 [N] and `confidences` float32 [N] in the split's order, on the CPU."""

    num_examples: int
    correct: int
    loss: float
    predictions: Tensor
    confidences: Tensor  # probability of the predicted class, 0..1
    confusion: list[list[int]]  # [label][prediction]

    @property
    def accuracy(self) -> float:
        """Share of examples whose label was predicted, 0..1."""
        return self.correct / self.num_examples

    def record(self) -> dict[str, Any]:
        """The scalars of a metrics row."""
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "correct": self.correct,
            "num_examples": self.num_examples,
        }

    def evaluation(self) -> Evaluation:
        """Return what the summary says of these counts."""
        sha256 = predictions_sha256(self.predictions, len(self.confusion))
        return Evaluation(self.accuracy, self.loss, self.correct, sha256, self.confusion)


def predictions_sha256(predictions: Tensor, num_classes: int) -> str:
    """Return the SHA-256 of predictions, int64 [N] on the CPU: a byte each, or eight if there are over 256 classes."""
    dtype = torch.uint8 if num_classes <= 256 else torch.int64
    return hashlib.sha256(predictions.to(dtype).numpy().tobytes()).hexdigest()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, data: Data, world: World, memory_format: torch.memory_format) -> Tensor:
    """Return the logits, float32 [B,K], that an unwrapped model in evaluation mode gives for images uint8 [B,C,H,W]."""
    with world.accelerator.autocast():
        logits = model(lay_out(normalize(images, data.mean, data.std), memory_format))
    return logits.float()


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, batch_size: int, world: World, memory_format: torch.memory_format) -> Result:
    """Evaluate an unwrapped model on `data.test` in batches of `batch_size` examples.

    Collective: every rank must call it. Raises RuntimeError if an example was not evaluated exactly once.
    """
    split, num_examples = data.test, len(data.test)
    num_batches = -(-num_examples // batch_size)
    # Rows: predictions, losses, how often each example was seen, and confidences. Zeros elsewhere add up exactly.
    table = torch.zeros(4, num_examples, dtype=torch.float64, device=world.device)
    was_training = model.training
    model.eval()
    for batch in range(*share(num_batches, world.world_size, world.rank)):
        rows = slice(batch * batch_size, min((batch + 1) * batch_size, num_examples))
        logits = predict(model, split.images[rows], data, world, memory_format)
        table[0, rows] = logits.argmax(1).double()
        table[1, rows] = F.cross_entropy(logits, split.labels[rows], reduction="none").double()
        table[2, rows] += 1
        table[3, rows] = logits.softmax(1).amax(1).double()
    model.train(was_training)
    world.all_reduce_sum_(table)
    world.wait()
    predictions, losses, seen, confidences = table.cpu()
    if not bool((seen == 1).all()):
        wrong = int((seen != 1).sum())
        raise RuntimeError(
            f"The evaluation used {wrong} of {num_examples} examples not exactly once. Its sums are void."
        )
    predicted, labels, num_classes = predictions.long(), split.labels.cpu(), data.num_classes
    confusion = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, -1)
    return Result(
        num_examples=num_examples,
        correct=int((predicted == labels).sum()),
        loss=float(losses.sum()) / num_examples,
        predictions=predicted,
        confidences=confidences.float(),
        confusion=confusion.tolist(),
    )
