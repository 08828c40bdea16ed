"""The same snapshot gives the same bytes, an optimizer resumes with the same bits, and no pickle anywhere."""

import ast

import pytest
import torch
from conftest import MNIST, ROOT
from conftest import small_state as state
from torch import Tensor, nn

from train.config import ModelConfig, OptimConfig
from train.functional import models, optim
from train.storage import checkpoint
from train.storage.checkpoint import Damaged, Snapshot, decode, encode


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_encode_gives_the_same_bytes_for_the_same_state() -> None:
    first = state()
    shuffled = Snapshot(
        *(dict(reversed(list(part.items()))) for part in (first.model, first.optimizer, first.ema, first.meta))
    )
    copied = Snapshot(
        {name: tensor.clone() for name, tensor in first.model.items()}, first.optimizer, first.ema, first.meta
    )
    for same in (first, state(), shuffled, copied, decode(encode(first))):
        assert encode(same) == encode(first)
    assert encode(first) != encode(state(11))
    assert "ema.safetensors" not in encode(Snapshot(first.model, first.optimizer, {}, first.meta))


def test_tensors_sha256_depends_on_content_and_not_on_layout() -> None:
    tensors = {"a": torch.randn(8, 4, 3, 3), "b": torch.arange(6), "c": torch.tensor(1.0), "d": torch.zeros(0, 3)}
    expected = checkpoint.tensors_sha256(tensors)
    last = {**tensors, "a": tensors["a"].to(memory_format=torch.channels_last)}
    assert not last["a"].is_contiguous()
    assert checkpoint.tensors_sha256(last) == expected
    assert checkpoint.tensors_sha256(dict(reversed(tensors.items()))) == expected
    assert checkpoint.tensors_sha256({**tensors, "a": nn.Parameter(tensors["a"])}) == expected
    bit = tensors["a"].clone()
    bit.view(torch.int32)[0, 0, 0, 0] ^= 1
    others = [
        {**tensors, "a": bit},
        {**tensors, "a": tensors["a"].view(4, 8, 3, 3)},
        {**tensors, "b": tensors["b"].view(2, 3)},
        {**tensors, "b": tensors["b"].double()},
        {**tensors, "e": torch.zeros(0)},
        {("x" if name == "a" else name): tensor for name, tensor in tensors.items()},
    ]
    assert len({expected, *map(checkpoint.tensors_sha256, others)}) == 1 + len(others)
    assert len(expected) == 64


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, stop: int) -> None:
    for step in range(first, stop):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():  # like autograd, in the parameter's layout: fused optimizers rely on it
            parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_optimizer_resumes_from_a_checkpoint_with_the_same_bits(name: str, memory_format: torch.memory_format) -> None:
    def fresh(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = models.build(ModelConfig(name="tiny_bn"), *MNIST, seed).to(memory_format=memory_format)  # type: ignore[call-overload]
        return model, optim.build(OptimConfig(name=name, weight_decay=0.01), model)  # type: ignore[arg-type]

    model, optimizer = fresh(0)
    steps(model, optimizer, 0, 3)
    saved = Snapshot(checkpoint.model_tensors(model), checkpoint.optimizer_tensors(optimizer, model), {}, {"step": 3})
    files = encode(saved)
    names = {"sgd": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}[name]
    assert set(saved.optimizer) == {f"{parameter}/{key}" for parameter, _ in model.named_parameters() for key in names}
    steps(model, optimizer, 3, 6)

    other, other_optimizer = fresh(1)
    loaded = decode(files)
    checkpoint.restore_model(other, loaded.model)
    checkpoint.restore_optimizer(other_optimizer, other, loaded.optimizer)
    assert (
        encode(
            Snapshot(
                checkpoint.model_tensors(other), checkpoint.optimizer_tensors(other_optimizer, other), {}, {"step": 3}
            )
        )
        == files
    )
    steps(other, other_optimizer, 3, 6)
    assert checkpoint.tensors_sha256(other.state_dict()) == checkpoint.tensors_sha256(model.state_dict())


def test_restore_model_refuses_another_models_tensors() -> None:
    model = models.build(ModelConfig(name="tiny"), *MNIST, 0)
    own = checkpoint.model_tensors(models.build(ModelConfig(name="tiny"), *MNIST, 1))
    before = checkpoint.tensors_sha256(model.state_dict())
    wrong = {
        "fc2.bias": {name: tensor for name, tensor in own.items() if name != "fc2.bias"},
        "extra": {**own, "extra": torch.zeros(1)},
        "fc1.weight": {**own, "fc1.weight": own["fc1.weight"].t().contiguous()},
        "conv1": checkpoint.model_tensors(models.build(ModelConfig(name="cnn"), *MNIST, 0)),
    }
    for word, tensors in wrong.items():
        with pytest.raises(Damaged, match=word):
            checkpoint.restore_model(model, tensors)
    assert checkpoint.tensors_sha256(model.state_dict()) == before
    checkpoint.restore_model(model, own)
    assert equal(checkpoint.model_tensors(model), own)


def dotted(node: ast.AST) -> str:
    """Return the dotted name of an expression."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def test_sources_never_name_pickle() -> None:
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {
        "torch.save",
        "torch.load",
        "torch.jit.load",
        "torch.jit.save",
        "np.load",
        "np.save",
        "numpy.load",
        "numpy.save",
    }
    sources = [path for folder in ("train", "launch") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 15
    for path in sources:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        without = [
            node.func for node in nodes if isinstance(node, ast.Call) and "allow_pickle=False" in ast.unparse(node)
        ]
        for node in nodes:
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & modules, path
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                assert (node.module or "").split(".")[0] not in modules, path
                assert not names & calls, path
            elif isinstance(node, ast.Attribute):
                is_safe = dotted(node) == "np.load" and node in without
                assert is_safe or dotted(node) not in calls, f"{path}:{node.lineno}"
            elif isinstance(node, ast.keyword):
                assert node.arg != "weights_only", path
                assert node.arg != "allow_pickle" or ast.unparse(node.value) == "False", path
