"""A user's network is imported, kept and compared by content, or refused in one line. So are weights to start from."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT, refusal
from ranks.processes import arguments, rows, train
from torch import nn

from train.__main__ import main
from train.config import ModelConfig
from train.errors import UserError
from train.functional.models import build as build_model
from train.functional.trajectory import trajectory
from train.rundir import RunDir
from train.storage import checkpoint, network

SHAPE, NUM_CLASSES = (1, 12, 12), 4
NET = """
import torch
from torch import nn
from parts.blocks import block
import names

def build(shape, num_classes):
    width = 4 * (shape[1] // 2) * (shape[2] // 2)
    return nn.Sequential(block(shape[0]), nn.Flatten(), nn.Dropout(0.2), nn.Linear(width, num_classes))
"""
BLOCKS = """
from torch import nn

def block(channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
"""
FAST = "--train.max_steps 4 --checkpoint.every_steps 2 --train.num_micro_batches 2 --train.exact true"


def write(folder: Path, text: str, name: str = "net.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def example(folder: Path) -> Path:
    """Write a network of three files, and one that it does not import."""
    write(folder / "parts", "", "__init__.py")
    write(folder / "parts", BLOCKS, "blocks.py")
    write(folder, "A = 1\n", "names.py")
    write(folder, "raise RuntimeError\n", "other.py")
    return write(folder, NET)


def built(path: Path, function: str = "build", seed: int = 0) -> network.Network:
    return network.build(ModelConfig(name=f"{path}:{function}"), SHAPE, NUM_CLASSES, seed)


def linear(before: str, result: str = "nn.Sequential(nn.Flatten(), nn.Linear(144, 4))") -> str:
    imports = "import random\nimport numpy as np\nimport torch\nfrom torch import nn\n\n"
    return f"{imports}def build(shape, num_classes):\n    {before}\n    return {result}\n"


FORWARD = """
from torch import nn
from torch.utils.checkpoint import checkpoint

class Net(nn.Module):
    def __init__(self, shape, num_classes):
        super().__init__()
        self.conv, self.drop, self.fc = nn.Conv2d(1, 2, 3), nn.Dropout(0.5), nn.Linear(200, num_classes)

    def forward(self, images):
        features = self.conv(images)
        return {}

build = Net
"""
REFUSED = {
    "syntax": ("import torch\ndef build(:\n", r"SyntaxError: invalid syntax \(net.py, line 2\)"),
    "null bytes": ("a = 1\0", "net.py:build: (SyntaxError|ValueError): source code"),
    "missing module": ("import torch\nimport no_such_module\n", "ModuleNotFoundError in line 2 of net.py: No mod"),
    "fails at import": ("\n\n1 / 0\n", "ZeroDivisionError in line 3 of net.py: division by zero"),
    "exits": ("import sys\nsys.exit(3)\n", "SystemExit in line 2 of net.py: 3"),
    "no function": ("def biuld(shape, num_classes):\n    pass\n", "net.py has no function build. Did you mean biuld?"),
    "no function but a number": ("build = 3\n", "net.py has no function build"),
    "signature": ("def build(shape):\n    pass\n", r"TypeError: build\(\) takes 1 positional argument"),
    "keywords": ("def build(shape, num_classes, *, width):\n    pass\n", "TypeError.* missing 1 required keyword-only"),
    "function fails": (linear("raise KeyError('x')"), "KeyError in line 7 of net.py: 'x'"),
    "no module": (linear("", "[nn.Linear(1, 1)]"), "It returned list, expected a torch.nn.Module"),
    "class": (linear("", "nn.Linear"), "It returned type, expected a torch.nn.Module"),
    "a shared network": (linear("", "SHARED") + "\nSHARED = nn.Linear(144, 4)\n", "build returned a layer twice"),
    "lazy": (linear("", "nn.Sequential(nn.Flatten(), nn.LazyLinear(4))"), "ValueError: .* an uninitialized parameter"),
    "python draws": (linear("random.random()"), "draws what `seed` does not decide"),
    "numpy draws": (linear("np.random.rand()"), "draws what `seed` does not decide"),
    "draws at import": (linear("") + "\nX = np.random.rand()\n", "draws what `seed` does not decide"),
    "a generator without a seed": (
        linear("x = np.random.RandomState().rand()", "nn.Sequential(nn.Flatten(), nn.PReLU(1, x), nn.Linear(144, 4))"),
        "draws what `seed` does not decide",
    ),
    "momentum": (linear("", "nn.Sequential(nn.BatchNorm2d(1, momentum=None))"), "0 is BatchNorm2d with momentum=None"),
    "forward fails": (linear("", "nn.Sequential(nn.Flatten(), nn.Linear(99, 4))"), "RuntimeError: .*mat1 and mat2"),
    "forward fails in its file": (FORWARD.format("self.fc(features.missing)"), "AttributeError in line 12 of net.py"),
    "a law": (FORWARD.format("self.fc(self.drop(features - features.mean(0)).flatten(1))"), "In training, an image's"),
    "checkpointing": (
        FORWARD.format("self.fc(checkpoint(self.drop, features, use_reentrant=False).flatten(1) ** 2)"),
        "RuntimeError.*: A dropout layer was called outside .* Activation checkpointing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_network_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    text, words = REFUSED[case]
    path = write(tmp_path, text)
    before = list(sys.path)
    with pytest.raises(UserError, match=words) as raised:
        built(path)
    assert str(raised.value).startswith(f"model.name {path}:build: ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    assert sys.path == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model.name {}/none.py:build", ": there is no file "),
        ("--model.name {}:build", "is '"),
        ("--model.name {}/net.py", ", or FILE.py:FUNCTION."),
        ("--model.name {}/net.py:build --model.dropout 0.2", "Use nn.Dropout there"),
        ("--model.name {}/net.py:buidl", "Did you mean build?"),
        (
            "--model.weights {}/none.safetensors",
            "is not a file. Expected a .safetensors file.",
        ),
        ("--model.weights {}/net.py", "cannot be read as a .safetensors file: "),
        ("--model.weights_skip fc.", "without model.weights"),
    ],
)
def test_command_line_refuses_in_one_line(
    flags: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example(tmp_path)
    assert words in refusal(arguments(tmp_path / "run", flags.format(tmp_path)), capsys)


def test_weights_follow_from_the_seed_alone(tmp_path: Path) -> None:
    path = example(tmp_path)

    def sha256(seed: int) -> str:
        return checkpoint.tensors_sha256(built(path, seed=seed).module.state_dict())

    torch.manual_seed(3)
    first, state = sha256(0), torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert sha256(0) == first != sha256(1)


def test_sources_are_the_file_and_its_neighbours(tmp_path: Path) -> None:
    path = example(tmp_path)
    found = built(path)
    assert found.sources == {
        name: (tmp_path / name).read_bytes() for name in ("net.py", "names.py", "parts/__init__.py", "parts/blocks.py")
    }
    assert set(found.sha256) == {"network"}
    moved = tmp_path / "elsewhere"
    assert built(example(moved)).sha256 == found.sha256
    write(moved, "A = 2\n", "names.py")
    assert built(moved / "net.py").sha256 != found.sha256


def test_installed_packages_in_the_folder_are_no_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual environment often lies next to the code."""
    installed = tmp_path / ".venv" / "site-packages"
    write(installed, "A = 1\n", "some_package_of_a_test.py")
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.setattr(network, "INSTALLED", {*network.INSTALLED, str(installed)})
    path = write(tmp_path, linear("import some_package_of_a_test"))
    assert set(built(path).sources) == {"net.py"}


def test_each_network_gets_its_own_neighbours(tmp_path: Path) -> None:
    """Two folders have modules of the same name."""
    for name in ("a", "b"):
        write(tmp_path / name, linear("assert __import__('neighbour').NAME == " + repr(name)))
        write(tmp_path / name, f"NAME = {name!r}\n", "neighbour.py")
    for name in ("a", "b", "a"):
        built(tmp_path / name / "net.py")


def test_trajectory_holds_the_function_and_no_path() -> None:
    one, other, built_in = (
        trajectory({"model": {"name": name, "weights": weights, "weights_skip": "fc."}})
        for name, weights in (("a/b.py:build", "x"), ("/c/b.py:build", "y"), ("vgg", None))
    )
    assert one == other == {"model.name": ":build", "model.weights_skip": "fc."}
    assert built_in["model.name"] == "vgg"


def test_run_keeps_its_source_and_resumes_wherever_the_file_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = example(tmp_path / "first"), RunDir(tmp_path / "run")
    assert main(arguments(run.path, FAST, f"--model.name {path}:build")) == 0
    whole = run.read_summary()
    assert whole is not None
    assert {file.relative_to(run.network).as_posix(): file.read_bytes() for file in run.network.rglob("*.py")} == built(
        path
    ).sources
    (start,) = rows(run.path, "start")
    assert whole.sha256 == start["sha256"]
    assert whole.sha256.keys() == {"data", "network"}
    shutil.rmtree(run.checkpoints / "step-00000004")
    shutil.move(tmp_path / "first", tmp_path / "second")
    flags = arguments(run.path, FAST, f"--model.name {tmp_path}/second/net.py:build")
    assert main(flags) == 0
    again = run.read_summary()
    assert again is not None
    assert again.weights_sha256 == whole.weights_sha256
    shutil.rmtree(run.checkpoints / "step-00000004")
    write(tmp_path / "second" / "parts", BLOCKS.replace("ReLU", "GELU"), "blocks.py")
    capsys.readouterr()
    assert f"belongs to another run: network '{whole.sha256['network'][:12]}' -> '" in refusal(flags, capsys)


FROZEN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 5, 3).requires_grad_(False)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("order", torch.arange(4))
        self.fc = nn.Linear(256, num_classes)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, images):
        return self.fc(self.norm(self.conv(images))[:, self.order].flatten(1).relu())
"""


def test_frozen_layers_stay_and_the_others_train_on_any_world_size(tmp_path: Path) -> None:
    path = write(tmp_path, FROZEN)
    flags = (f"--model.name {path}:Net --optim.ema 0.9 --optim.clip_norm 1 --train.max_steps 4 --optim.name adamw",)
    exact = "--train.exact true --train.num_micro_batches 2"
    alone, pair = (train(n, tmp_path / f"{n}", *flags, exact) for n in (1, 2))
    assert alone["weights_sha256"] == pair["weights_sha256"]
    assert alone["ema_weights_sha256"] == pair["ema_weights_sha256"]
    train(2, tmp_path / "fast", *flags)
    begin = network.build(ModelConfig(name=f"{path}:Net"), (1, 28, 28), 10, 0).module.state_dict()
    for run in ("2", "fast"):
        end = safetensors.torch.load_file(tmp_path / run / "checkpoints" / "step-00000004" / "model.safetensors")
        same = {name for name, tensor in end.items() if torch.equal(tensor, begin[name])}
        assert same == {"conv.weight", "conv.bias", "norm.running_mean", "norm.running_var", "order"}


def test_weights_come_from_a_file_but_for_a_prefix(tmp_path: Path) -> None:
    """The file has stock BatchNorm's counters, which ours lacks."""
    path, file = example(tmp_path), tmp_path / "weights.safetensors"
    given = {name: torch.randn_like(tensor) for name, tensor in built(path).module.state_dict().items()}
    safetensors.torch.save_file({**given, "0.1.num_batches_tracked": torch.tensor(7)}, file)

    def loaded(skip: str | None) -> network.Network:
        return network.build(ModelConfig(f"{path}:build", weights=str(file), weights_skip=skip), SHAPE, NUM_CLASSES, 5)

    whole, but_head = loaded(None), loaded("3.")
    assert set(whole.sha256) == {"network", "initial_weights"}
    assert all(torch.equal(tensor, given[name]) for name, tensor in whole.module.state_dict().items())
    drawn = built(path, seed=5).module.state_dict()
    for name, tensor in but_head.module.state_dict().items():
        assert torch.equal(tensor, (drawn if name.startswith("3.") else given)[name])
    with pytest.raises(UserError, match="is fx, but no tensor's name starts so"):
        loaded("fx")
    safetensors.torch.save_file({**given, "3.bias": torch.zeros(7), "extra": torch.zeros(2)}, file)
    with pytest.raises(UserError, match=r"does not fit: 3.bias \[7\] -> \[4\], extra \[2\] -> None. Leave a head out"):
        loaded(None)


def test_fine_tuning_starts_from_a_checkpoint_and_remembers_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file may move, and a checkpoint's content may not change."""
    assert main(arguments(tmp_path / "old", FAST)) == 0
    file = shutil.copy(tmp_path / "old" / "checkpoints" / "step-00000004" / "model.safetensors", tmp_path)
    run = RunDir(tmp_path / "new")
    assert main(arguments(run.path, FAST, f"--model.weights {file} --model.weights_skip fc2.")) == 0
    fresh = build_model(ModelConfig("tiny"), (1, 28, 28), 10, 0).state_dict()
    old, new = (
        safetensors.torch.load_file(tmp_path / name / "checkpoints" / "step-00000002" / "model.safetensors")
        for name in ("old", "new")
    )
    assert not any(torch.equal(new[name], each[name]) for name in new for each in (old, fresh))
    shutil.rmtree(run.checkpoints / "step-00000004")
    other = shutil.copy(tmp_path / "old" / "checkpoints" / "step-00000002" / "model.safetensors", tmp_path / "x")
    capsys.readouterr()
    line = refusal(arguments(run.path, FAST, f"--model.weights {other} --model.weights_skip fc2."), capsys)
    assert "belongs to another run: initial_weights '" in line
    os.rename(file, tmp_path / "moved")
    assert main(arguments(run.path, FAST, f"--model.weights {tmp_path}/moved --model.weights_skip fc2.")) == 0


@pytest.mark.parametrize("name", ["resnet18", "vit"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 24, 40)])
def test_example_network_passes(name: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.models
    from torchvision.models.resnet import BasicBlock

    def shallow(weights: None, num_classes: int) -> nn.Module:  # faster
        return torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)

    monkeypatch.setattr(torchvision.models, "resnet18", shallow)
    path = ROOT / "configs" / "networks" / f"{name}.py"
    found = network.build(ModelConfig(f"{path}:build"), shape, 37, 0, channels_last=True)
    assert set(found.sources) == {f"{name}.py"}
    assert isinstance(found.module, nn.Module)
