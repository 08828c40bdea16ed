"""The house: imports go one way, the machinery is named where it lives, files stay short, everything public is explained."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# A module may import from the rows above its own only.
LAYERS = [
    {"errors", "sampler", "preempt", "clock", "labels", "graphs", "meter", "versions"},
    {"yamlfile"},
    {"config"},
    {"mathematics", "device"},
    {"cli", "rng", "report", "fingerprint", "watchdog"},
    {"augment", "models", "optim", "charts", "mirror"},
    {"world", "checkpoint", "page", "lease", "tracking"},
    {"data", "reduce", "metrics", "tracer", "tables"},
    {"evaluate", "deploy", "image"},
    {"run"},
    {"summary", "step", "alarms", "exhibits"},
    {"journal", "warmup"},
    {"loop"},
    {"__main__", "export", "predict"},
]
LEVEL = {module: level for level, row in enumerate(LAYERS) for module in row}
TRAIN = sorted((ROOT / "train").glob("*.py"))
LAUNCH = sorted((ROOT / "launch").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
RANK_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(nodes: list[ast.AST]) -> Iterator[str]:
    """The full names that import statements bind or load: `from train import data` is train.data."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def every_import(path: Path) -> set[str]:
    return set(imports(list(ast.walk(ast.parse(path.read_text())))))


def at_import(path: Path) -> set[str]:
    """What a module imports when it is imported itself: outside of functions and of `if TYPE_CHECKING`."""

    def reached(body: list[ast.stmt]) -> Iterator[ast.AST]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            yield node
            for part in ("body", "orelse", "finalbody"):
                yield from reached(getattr(node, part, []))

    return set(imports(list(reached(ast.parse(path.read_text()).body))))


def loads(names: set[str], package: str) -> set[str]:
    """Those names that are a package or lie in it."""
    return {name for name in names if name == package or name.startswith(package + ".")}


def test_layers_name_every_module() -> None:
    assert {path.stem for path in TRAIN} - {"__init__"} <= set(LEVEL)


@pytest.mark.parametrize("path", [path for path in TRAIN if path.stem != "__init__"], ids=name_of)
def test_train_imports_go_one_way(path: Path) -> None:
    own = {name.split(".")[1] for name in loads(every_import(path), "train")} - {"__version__"}
    assert own <= set(LEVEL)
    assert {module for module in own if LEVEL[module] >= LEVEL[path.stem]} == set()
    assert loads(every_import(path), "launch") == set()


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("torch.distributed", {"world", "reduce"}),
        ("accelerate", {"world"}),
        ("wandb", {"mirror"}),
        ("jsonargparse", {"cli"}),
        ("importlib.metadata", {"versions"}),  # elsewhere a package without metadata would end a run
    ],
)
def test_package_is_imported_at_its_home_only(package: str, homes: set[str]) -> None:
    assert {path.stem for path in TRAIN if loads(every_import(path), package)} == homes


def test_torch_distributed_is_named_at_its_home_only() -> None:
    named = {
        path.stem
        for path in TRAIN
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.distributed", "dist."))
    }
    assert named == {"world", "reduce"}


def test_rank_variables_are_read_in_world_only() -> None:
    found = {
        path.stem
        for path in TRAIN
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in RANK_VARIABLES
    }
    assert found == {"world"}


def test_models_know_nothing_of_ranks() -> None:
    for stem in ("models", "optim", "augment", "rng", "sampler", "config"):
        assert loads(every_import(ROOT / "train" / f"{stem}.py"), "train.world") == set()


LIGHT_STEMS = (
    "errors yamlfile config labels mathematics device cli world preempt report charts page fingerprint clock watchdog mirror "
    "tracking lease versions __main__"
)
LIGHT = [ROOT / "train" / f"{stem}.py" for stem in LIGHT_STEMS.split()]


@pytest.mark.parametrize("path", LIGHT, ids=name_of)
def test_light_modules_import_nothing_heavy(path: Path) -> None:
    heavy = ("torch", "torchvision", "numpy", "accelerate", "wandb", "sklearn", "rich", "jsonargparse")
    assert {name for package in heavy for name in loads(at_import(path), package)} == set()


@pytest.mark.parametrize("path", TRAIN, ids=name_of)
def test_slow_packages_are_imported_in_functions_only(path: Path) -> None:
    assert {name for package in ("torchvision", "wandb", "sklearn") for name in loads(at_import(path), package)} == set()


@pytest.mark.parametrize("path", LAUNCH, ids=name_of)
def test_launch_imports_the_config_and_nothing_heavy(path: Path) -> None:
    names = at_import(path)
    own = {".".join(name.split(".")[:2]) for name in loads(names, "train")}
    light = {"errors", "config", "mathematics", "device", "cli", "world", "report", "page", "fingerprint", "__version__"}
    assert own <= {f"train.{name}" for name in light}
    heavy = ("torch", "torchvision", "numpy", "accelerate", "wandb", "sklearn")
    assert {name for package in heavy for name in loads(names, package)} == set()


@pytest.mark.parametrize("path", [*TRAIN, *LAUNCH, *TESTS], ids=name_of)
def test_file_has_at_most_350_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize("path", [*TRAIN, *LAUNCH], ids=name_of)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    definitions: list[ast.AST] = list(tree.body)
    definitions += [inner for node in tree.body if isinstance(node, ast.ClassDef) for inner in node.body]
    for node in definitions:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name_of(path)}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", [*TRAIN, *LAUNCH], ids=name_of)
def test_function_has_at_most_50_lines(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 50, f"{name_of(path)}:{node.lineno} {node.name}"


def test_no_collective_lacks_its_warning() -> None:
    """Every method of World that talks to other ranks says so."""
    (world,) = (node for node in ast.parse((ROOT / "train" / "world.py").read_text()).body if isinstance(node, ast.ClassDef))
    talks = {"all_reduce", "broadcast", "wait_for_everyone", "prepare", "Accelerator"}
    found = 0
    for method in (node for node in world.body if isinstance(node, ast.FunctionDef)):
        called = {
            getattr(node.func, "attr", getattr(node.func, "id", "")) for node in ast.walk(method) if isinstance(node, ast.Call)
        }
        if called & talks:
            found += 1
            assert "Collective: every rank must call it" in (ast.get_docstring(method) or ""), method.name
    assert found >= 4
