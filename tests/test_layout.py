"""Imports go one way, a package is imported where it belongs, files stay short, and everything public is explained."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# The rooms from the ground up: a module imports from its own room and from those before it.
# BELOW has the modules of train/ that are below the rest of it.
BELOW = {f"train.{stem}": "ground" for stem in ("errors", "config", "cli", "rundir")}
BELOW |= {"train.state": "state", "train.evaluate": "state"}
ROOMS = ["ground", "train.functional", "train.world", "train.storage", "train.report", "state"]
ROOMS += ["train.tracking", "train", "launch", "launch.deploy", "launch.check", "launch.bench"]
TRAIN = sorted((ROOT / "train").rglob("*.py"))
LAUNCH = sorted((ROOT / "launch").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
RANK_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(nodes: list[ast.AST]) -> Iterator[str]:
    """Yield the full names that imports bind or load: `from train.world import signals` is train.world.signals."""
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
    """Return what a module imports when it is imported itself: outside of functions and of `if TYPE_CHECKING`."""

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
    """Return those names that are a package or are in it."""
    return {name for name in names if name == package or name.startswith(package + ".")}


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(path) for path in [*TRAIN, *LAUNCH]}


def room_of(module: str) -> int:
    return ROOMS.index(BELOW.get(module) or (module if module in ROOMS else module.rpartition(".")[0]))


@pytest.mark.parametrize("path", [*TRAIN, *LAUNCH], ids=name_of)
def test_imports_go_one_way_between_rooms(path: Path) -> None:
    used = {name if name in MODULES else name.rpartition(".")[0] for name in every_import(path)}
    used = {module for module in used & MODULES if module != "train"}  # train itself is its version
    assert {module for module in used if room_of(module) > room_of(module_of(path))} == set()


@pytest.mark.parametrize("room", [path.parent for path in [*TRAIN, *LAUNCH] if path.stem == "__init__"], ids=name_of)
def test_room_is_small_enough_to_look_around_in(room: Path) -> None:
    """About a dozen names fit on a screen."""
    names = [path for path in room.iterdir() if path.name not in ("__init__.py", "__pycache__")]
    assert len(names) <= 15


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("torch.distributed", {"world", "reduce"}),
        ("accelerate", {"world"}),
        ("wandb", {"wandb"}),
        ("jsonargparse", {"cli"}),
        ("importlib.metadata", {"environment"}),  # elsewhere a package without metadata would end a run
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


def test_rank_variables_are_read_in_launcher_only() -> None:
    found = {
        path.stem
        for path in TRAIN
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in RANK_VARIABLES
    }
    assert found == {"launcher"}


def test_functional_imports_nothing_of_ranks_and_files() -> None:
    for path in (ROOT / "train" / "functional").glob("*.py"):
        for room in ("world", "storage", "tracking", "report"):
            assert loads(every_import(path), f"train.{room}") == set()


LIGHT_STEMS = (
    "errors config trajectory cli cores signals process rundir records "
    "charts page fingerprint wandb lease launcher environment __main__"
)
LIGHT = [path for path in TRAIN if path.stem in LIGHT_STEMS.split()]


@pytest.mark.parametrize("path", LIGHT, ids=name_of)
def test_light_modules_import_nothing_heavy(path: Path) -> None:
    heavy = ("torch", "torchvision", "numpy", "accelerate", "wandb", "sklearn", "rich", "jsonargparse")
    assert {name for package in heavy for name in loads(at_import(path), package)} == set()


@pytest.mark.parametrize("path", TRAIN, ids=name_of)
def test_slow_packages_are_imported_in_functions_only(path: Path) -> None:
    assert {
        name for package in ("torchvision", "wandb", "sklearn") for name in loads(at_import(path), package)
    } == set()


@pytest.mark.parametrize("path", LAUNCH, ids=name_of)
def test_launch_imports_the_config_and_nothing_heavy(path: Path) -> None:
    names = at_import(path)
    own = {name if name in MODULES else name.rpartition(".")[0] for name in loads(names, "train")}
    light = {module_of(path) for path in LIGHT} | {"train"}
    assert own <= light | {module for module in MODULES if module.endswith("__init__")}
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


MNIST_READERS = ("train/storage/built_in.py", "launch/deploy/image.py")
OWN_CNNS = "train/functional/models.py"


@pytest.mark.parametrize("path", [*TRAIN, *LAUNCH], ids=name_of)
def test_shape_of_mnist_is_in_its_readers_and_in_our_cnns_only(path: Path) -> None:
    """28 pixels, one channel and ten classes are facts of one data set. All else takes them from the data.

    10 is also a number of seconds and steps, so only its uses as a number of classes are looked for.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        text = ast.unparse(node) if isinstance(node, (ast.Constant, ast.Subscript, ast.Call, ast.keyword)) else ""
        if text in ("28", "range(10)") or text.endswith("[:, 0]") or text.endswith("classes=10"):
            found.add(f"line {node.lineno}: {text}")
        if isinstance(node, ast.Name) and node.id in ("NUM_CLASSES", "IMAGE_SIDE"):
            found.add(f"line {node.lineno}: {node.id}")
    assert found == set() or name_of(path) in (*MNIST_READERS, OWN_CNNS)


def test_no_collective_lacks_its_warning() -> None:
    """The docstring of every method of World that needs other ranks warns of it."""
    (world,) = (
        node
        for node in ast.parse((ROOT / "train" / "world" / "world.py").read_text()).body
        if isinstance(node, ast.ClassDef)
    )
    talks = {"all_reduce", "broadcast", "wait_for_everyone", "prepare", "Accelerator"}
    found = 0
    for method in (node for node in world.body if isinstance(node, ast.FunctionDef)):
        called = {
            getattr(node.func, "attr", getattr(node.func, "id", ""))
            for node in ast.walk(method)
            if isinstance(node, ast.Call)
        }
        if called & talks:
            found += 1
            assert "Collective: every rank must call it" in (ast.get_docstring(method) or ""), method.name
    assert found >= 4


@pytest.mark.xdist_group("layout")
def test_group_of_tests_stays_on_one_worker(request: pytest.FixtureRequest) -> None:
    """pytest-xdist sends tests by the group at the end of their ids; with a newer pytest it is silently missing."""
    is_grouped = getattr(request.config.option, "loadgroup", False)
    assert request.node.nodeid.endswith("@layout") == is_grouped
