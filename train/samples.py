"""What a run shows beside numbers: its most confident mistakes and the filters that it learned first -> samples.safetensors.

Invariant: everything is of the evaluation that counts, of the averaged weights where there are any. Deliberately without
words or pictures: the report and W&B draw.
"""

import torch
from torch import Tensor, nn

from train.evaluate import Result
from train.state import Plan, State

MOST_MISTAKES = 100


def collect(plan: Plan, state: State, results: dict[str, Result]) -> dict[str, Tensor]:
    """Return CPU tensors of the last of `results`: K mistakes, the most confident first, and the first convolution.

    `mistakes_images` uint8 [K,28,28]; `mistakes_labels`, `mistakes_predictions`, `mistakes_positions` (in the evaluated
    split) int64 [K]; `mistakes_confidences` float32 [K], 0..1; `filters` float32 [C,h,w]. A host-device sync.
    """
    result, labels = list(results.values())[-1], plan.data.test.labels.cpu()
    wrong = (result.predictions != labels).nonzero()[:, 0]
    order = result.confidences[wrong].argsort(descending=True, stable=True)
    at = wrong[order[:MOST_MISTAKES]]
    module = list(state.modules.values())[-1]
    first = next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
    return {
        "mistakes_images": plan.data.test.images[at.to(plan.world.device), 0].cpu(),
        "mistakes_labels": labels[at],
        "mistakes_predictions": result.predictions[at],
        "mistakes_confidences": result.confidences[at],
        "mistakes_positions": at,
        "filters": first.weight.detach()[:, 0].to("cpu", torch.float32).contiguous(),
    }
