"""A run's samples are the first filters and the mistakes of the evaluation that counts, the most confident first."""

import json
from pathlib import Path

import safetensors.torch
import torch
from conftest import MNIST
from ranks.processes import train

from train.config import DataConfig, ModelConfig
from train.functional import models
from train.functional.augment import normalize
from train.storage import checkpoint, data
from train.tracking.summary import MAX_MISTAKES
from train.world.world import World

SMALL = "--train.max_steps 12 --eval.every_steps 6 --checkpoint.every_steps 6"


def test_samples_are_those_of_the_averaged_weights(tmp_path: Path, world: World) -> None:
    """They are computed again from the checkpoint's averaged weights. The two ranks' chunks differ in size."""
    run = tmp_path / "run"
    summary = train(2, run, f"{SMALL} --optim.ema 0.5 --eval.batch_size 70 --train.num_micro_batches 2")
    shown = safetensors.torch.load_file(run / "samples.safetensors")
    module = models.build(ModelConfig(name="tiny"), *MNIST, 0)
    state = checkpoint.decode(checkpoint.read(run / "checkpoints" / "step-00000012"))
    checkpoint.restore_model(module, state.ema)
    digits = data.load(DataConfig(name="digits"), world)
    with torch.no_grad():
        probabilities = module(normalize(digits.test.images, digits.mean, digits.std)).softmax(1)
    wrong = (probabilities.argmax(1) != digits.test.labels).nonzero()[:, 0].tolist()
    at, confidences = shown["mistakes_positions"], shown["mistakes_confidences"]
    assert len(wrong) == summary["num_examples"] - summary["results"]["ema"]["correct"] > MAX_MISTAKES
    assert set(at.tolist()) <= set(wrong)
    assert len(at) == MAX_MISTAKES
    torch.testing.assert_close(confidences, probabilities.amax(1)[at])
    assert confidences.tolist() == sorted(confidences.tolist(), reverse=True)
    torch.testing.assert_close(
        confidences[-1], probabilities.amax(1)[wrong].sort(descending=True).values[MAX_MISTAKES - 1]
    )
    assert torch.equal(shown["mistakes_labels"], digits.test.labels[at])
    assert torch.equal(shown["mistakes_predictions"], probabilities.argmax(1)[at])
    assert torch.equal(shown["mistakes_images"], digits.test.images[at])
    assert torch.equal(shown["filters"], state.ema["conv1.weight"][:, 0])
    assert {(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in shown.items()} == {
        ("mistakes_images", torch.uint8, (MAX_MISTAKES, 1, 28, 28)),
        ("mistakes_confidences", torch.float32, (MAX_MISTAKES,)),
        ("filters", torch.float32, (4, 5, 5)),
        *((f"mistakes_{name}", torch.int64, (MAX_MISTAKES,)) for name in ("labels", "predictions", "positions")),
    }


def test_world_size_does_not_change_exact_samples(tmp_path: Path) -> None:
    exact = f"{SMALL} --train.exact true --train.num_micro_batches 4"
    summaries = [train(size, tmp_path / str(size), exact) for size in (1, 2)]
    assert len({json.dumps(summary["results"]["raw"]["confusion"]) for summary in summaries}) == 1
    assert len({(tmp_path / str(size) / "samples.safetensors").read_bytes() for size in (1, 2)}) == 1
