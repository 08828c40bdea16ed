"""The config has rules, a command line, and one line for each mistake."""

import ast
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train.config
from train import __version__
from train.cli import make_parser, parse, recipe_name, to_yaml
from train.config import Config
from train.errors import UserError
from train.functional.trajectory import trajectory

SECTIONS = {
    field.name: field.default_factory for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)
}
FIELDS = {
    f"{section}.{field.name}": field for section, build in SECTIONS.items() for field in dataclasses.fields(build)  # type: ignore
}  # fmt: skip

# field: values that a rule refuses, and the values at its edge that it allows
RULES: dict[str, tuple[list[Any], list[Any]]] = {
    "seed": ([-1], [0, 10**30]),
    "run.dir": ([""], ["."]),
    "run.name": (
        ["", "a/b", "..", "-x", "a b", ".hidden", "a\nb", "ü", "a" * 201],
        [None, "a", "lr=0.1", "2024-01-01", "A+b_c.d"],
    ),
    "run.time_limit": ([-1.0, 1.1e6, float("nan")], [0.0, 1e6]),
    "run.resume": ([""], ["never", "runs/a/checkpoints/step-00000001"]),
    "data.validation": ([-1], [0, 1]),
    "data.random_examples": ([5, 0, -1, 10**7 + 1], [6, 10**7]),
    "model.dropout": ([-0.1, 1.0, 1.5, float("nan")], [0.0, 0.999]),
    "augment.flip": ([-0.1, 1.1, float("nan")], [0.0, 1.0]),
    "augment.shift": ([-1, 10**7 + 1], [0, 10**7]),
    "augment.rotate": ([-0.1, 180.1, float("nan")], [0.0, 180.0]),
    "augment.scale": ([-0.1, 1.0], [0.0, 0.99]),
    "augment.shear": ([-1.0, 90.0], [0.0, 89.9]),
    "augment.erase": ([-0.1, 1.1, float("nan")], [0.0, 1.0]),
    "augment.erase_size": ([0, 10**7 + 1], [1, 10**7]),
    "optim.lr": ([0.0, -1.0, 1000.0, float("inf"), float("nan")], [1e-9, 999.0]),
    "optim.momentum": ([-0.1, 1.0], [0.0, 0.999]),
    "optim.beta2": ([-0.1, 1.0], [0.0, 0.999]),
    "optim.weight_decay": ([-0.1, 1.0], [0.0, 0.999]),
    "optim.label_smoothing": ([-0.1, 1.0], [0.0, 0.999]),
    "optim.ema": ([-0.1, 1.0], [0.0, 0.9999]),
    "optim.warmup": ([-0.1, 1.1], [0.0, 1.0]),
    "optim.final_lr": ([-0.1, 1.1], [0.0, 1.0]),
    "optim.clip_norm": ([-0.1, float("nan"), float("inf"), 1e9], [0.0, 5.0]),
    "train.epochs": ([0, -1, 10**7 + 1], [1, 10**7]),
    "train.max_steps": ([-1, 10**7 + 1], [0, 1, 10**7]),
    "train.global_batch_size": ([0, -8], [1]),
    "train.num_micro_batches": ([-1, 513, 3], [0, 1, 512]),
    "train.max_micro_batch_size": ([-1], [0, 1]),
    "train.num_threads": ([-1, 4097], [0, 1, 4096]),
    "train.profile_steps": (["3", "5:3", "3:3", "a:b", "-1:3", "1:2:3", ""], [None, "0:1", "20:30"]),
    "train.timeout": ([0, 10**7 + 1], [1]),
    "eval.every_steps": ([-1, 10**7 + 1], [0, 1, 10**7]),
    "eval.batch_size": ([0, 10**7 + 1], [1]),
    "checkpoint.every_steps": ([-1, 10**7 + 1], [0, 1, 10**7]),
    "checkpoint.keep": ([0, -1, 10**7 + 1], [1]),
    "log.every_steps": ([0, 10**7 + 1], [1]),
    "log.spike": ([-1.0, 0.5, 1.0], [0.0, 1.1]),
    "log.slow_rank": ([-1.0, 0.5, 1.0], [0.0, 1.1]),
    "optim.max_skips": ([0, -1], [1]),
    "wandb.timeout": ([0], [1]),
}
# rules about several fields: (fields, what the message must advise)
PAIRS = [
    ({"exact": True}, ["train.exact", "train.num_micro_batches", "8"]),
    (
        {"global_batch_size": 500, "num_micro_batches": 8},
        ["500", "8 micro-batches", "496 or 504", "train.num_micro_batches 5"],
    ),
    ({"global_batch_size": 4, "num_micro_batches": 8}, ["train.num_micro_batches is 8", "4 examples"]),
    (
        {"global_batch_size": 64, "num_micro_batches": 2, "max_micro_batch_size": 10},
        ["32 examples", "train.num_micro_batches 7 or more"],
    ),
]


def with_value(path: str, value: Any) -> Config:
    """Return a Config with one field set to a value."""
    section, _, name = path.rpartition(".")
    return Config(**{section: SECTIONS[section](**{name: value})}) if section else Config(**{name: value})  # type: ignore


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, (bad, _) in RULES.items() for value in bad])
def test_config_refuses_a_bad_value_in_one_line_that_names_field_and_value(path: str, value: Any) -> None:
    with pytest.raises(UserError) as error:
        with_value(path, value)
    message = str(error.value)
    assert path in message
    assert "\n" not in message
    assert message.endswith(".")
    assert str(value) in message or repr(value) in message


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, (_, good) in RULES.items() for value in good])
def test_config_accepts_the_values_at_the_edge_of_a_rule(path: str, value: Any) -> None:
    config = with_value(path, value)
    section, _, name = path.rpartition(".")
    assert getattr(getattr(config, section) if section else config, name) == value


@pytest.mark.parametrize(("values", "words"), PAIRS)
def test_config_refuses_fields_that_do_not_fit_and_names_what_does(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        train.config.TrainConfig(**values)
    assert [word for word in words if word not in str(error.value)] == []


@given(size=st.integers(1, 5000), parts=st.integers(1, 5000))
def test_config_advises_only_batch_sizes_that_it_accepts(size: int, parts: int) -> None:
    try:
        train.config.TrainConfig(global_batch_size=size, num_micro_batches=parts)
    except UserError as error:
        if parts <= size:
            advice = str(error).split("Use ")[1]
            low, high = (int(word) for word in advice.split(",")[0].split(" or "))
            down = int(advice.rstrip(".").split()[-1])
            assert low < size < high
            for better in ((low, parts), (high, parts), (size, down)):
                train.config.TrainConfig(global_batch_size=better[0], num_micro_batches=better[1])
        return
    assert size % parts == 0


def test_config_checks_every_number_that_has_a_rule() -> None:
    numbers = {path for path, field in FIELDS.items() if field.type in (int, float)} | {"seed"}
    assert numbers - set(RULES) == set()


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.epochs = 2  # type: ignore[misc]


def test_config_field_help_is_its_docstring() -> None:
    docs = {}
    for definition in ast.parse(Path(train.config.__file__).read_text()).body:
        if isinstance(definition, ast.ClassDef):
            body = definition.body
            for node, after in zip(body, [*body[1:], None], strict=True):
                if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
                    docs[definition.name, node.target.id] = " ".join(ast.literal_eval(after.value).split())  # type: ignore
    shown = {action.dest: " ".join((action.help or "").split()) for action in make_parser()._actions}
    for path in [*FIELDS, "seed"]:
        section, _, name = path.rpartition(".")
        owner = SECTIONS[section].__name__ if section else "Config"  # type: ignore[union-attr]
        assert docs[owner, name].endswith("."), path
        assert docs[owner, name] == shown[path], path


FLAGS = ["--seed", "7", "--optim.lr", "1e-3", "--data.name", "digits", "--wandb.tags", "[a, b]", "--run.name", "a"]


def test_parse_reads_flags_of_every_kind() -> None:
    config = parse([*FLAGS, "--train.exact", "true", "--train.num_micro_batches=8", "--data.root=/x"])
    assert (config.seed, config.optim.lr, config.data.name, config.wandb.tags) == (7, 0.001, "digits", ["a", "b"])
    assert (config.train.exact, config.train.num_micro_batches, config.data.root) == (True, 8, "/x")
    assert parse([]) == Config()


def test_parse_lets_later_files_and_flags_win(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("seed: 1\noptim: {lr: 0.5, momentum: 0.5}\n")
    second.write_text("optim: {lr: 0.25}\n")
    config = parse(["--config", str(first), "--config", str(second)])
    assert (config.seed, config.optim.lr, config.optim.momentum) == (1, 0.25, 0.5)
    assert parse(["--config", str(second), "--config", str(first)]).optim.lr == 0.5
    assert parse(["--config", str(first), "--optim.lr", "0.125"]).optim.lr == 0.125
    assert parse(["--optim.lr", "0.125", "--config", str(first)]).optim.lr == 0.5
    assert parse(["--optim.lr", "1", "--optim.lr", "2"]).optim.lr == 2


def test_parse_reads_back_what_print_config_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse([*FLAGS, "--print_config"])
    assert leaving.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse(["--config", str(file)]) == parse(FLAGS) != Config()


@pytest.mark.parametrize("text", ["on", "off", "auto", "'on'", "true", "false"])
def test_graphs_are_switched_on_and_off_by_yaml_too(text: str, tmp_path: Path) -> None:
    """The configs of earlier runs contain true or false."""
    file = tmp_path / "recipe.yaml"
    file.write_text(f"train: {{cuda_graphs: {text}}}\n")
    wanted = {"true": "on", "false": "off"}.get(text, text.strip("'"))
    config = parse(["--config", str(file)])
    assert config.train.cuda_graphs == wanted
    file.write_text(to_yaml(config))
    assert parse(["--config", str(file)]) == config == parse(["--train.cuda_graphs", wanted])


STRINGS = ["a: b", "yes", "2024", "2024-01-01", "1.5", "0x10", "#1", "- x", "{a", "line\nbreak", "", "é", "1e3", "1e-3"]


@pytest.mark.parametrize("text", STRINGS)
def test_to_yaml_is_read_back_to_an_equal_config(text: str, tmp_path: Path) -> None:
    config = Config(
        seed=3, wandb=train.config.WandbConfig(project=text, tags=[text]), optim=train.config.OptimConfig(lr=1e-5)
    )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert parse(["--config", str(file)]) == config


# command line or YAML -> what the one line must contain
FLAG_MISTAKES = [
    (["--optim.lrr", "1"], ["optim.lrr", "optim.lr?"]),
    (["--optim.momentm=1"], ["optim.momentm", "optim.momentum?"]),
    (["--train.precission", "bf16"], ["train.precission", "train.precision?"]),
    (["--epochs", "3"], ["epochs", "train.epochs?"]),
    (["--zzz", "3"], ["zzz", "--help"]),
    (["surplus"], ["surplus"]),
    (["--seed"], ["--seed"]),
    (["--seed", "x"], ["seed", "int", "x"]),
    (["--seed", "1.5"], ["seed", "int", "1.5"]),
    (["--train.exact", "maybe"], ["train.exact is maybe", "true or false"]),
    (["--data.name", "mnst"], ["data.name", "mnst", "Did you mean mnist?"]),
    (["--model.name", "cnm"], ["model.name", "Did you mean cnn?"]),
    (["--optim.lr", "fast"], ["optim.lr", "float", "fast"]),
    (["--optim.lr", "-1"], ["optim.lr is -1.0"]),
    (["--train.num_micro_batches", "3"], ["Use 510 or 513, or train.num_micro_batches 2."]),
    (["--train.micro_batches", "4"], ["train.micro_batches is now train.num_micro_batches."]),
    (["--micro_batches", "4"], ["micro_batches is now train.num_micro_batches."]),
    (["--wandb.system", "false"], ["wandb.system is now $WANDB_X_DISABLE_STATS=true."]),
    (["--config", "missing.yaml"], ["missing.yaml", "not exist"]),
    (["--config", "."], ["not a file"]),
]
FILE_MISTAKES = [
    ("optim: {momentm: 0.1}\n", ["optim.momentm", "optim.momentum?"]),
    ("sed: 3\n", ["sed", "seed?"]),
    ("optm: {lr: 0.1}\n", ["optm", "optim"]),
    ("optim: {lr: -1}\n", ["optim.lr is -1"]),
    ("optim: [1,\n", ["recipe.yaml"]),
    ("train: {micro_batch_limit: 4}\n", ["recipe.yaml: train.micro_batch_limit is now train.max_micro_batch_size."]),
    ("wandb: {alerts: false}\n", ["recipe.yaml: wandb.alerts is now a setting of your W&B account."]),
    ("3\n", ["recipe.yaml"]),
    ("\x00", ["recipe.yaml"]),
    ("train: {epochs: null}\n", ["train.epochs", "int"]),
    ("train: {epochs: many}\n", ["train.epochs", "int", "many"]),
    ("train: {global_batch_size: 500, num_micro_batches: 8}\n", ["496 or 504"]),
]


@pytest.mark.parametrize(("argv", "words"), FLAG_MISTAKES)
def test_parse_refuses_a_wrong_flag_in_one_line(argv: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(argv)
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(("text", "words"), FILE_MISTAKES)
def test_parse_refuses_a_wrong_file_in_one_line(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        parse(["--config", str(tmp_path / "recipe.yaml")])
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == []


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse(["--version"])
    assert (leaving.value.code, capsys.readouterr().out) == (0, f"lockstep {__version__}\n")


def test_parse_takes_no_abbreviated_flag() -> None:
    with pytest.raises(UserError, match="see"):
        parse(["--see", "3"])


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ([], None),
        (["--seed", "1"], None),
        (["--config", "configs/fast.yaml"], "fast"),
        (["--config=a.yaml"], "a"),
        (["--config", "a.yaml", "--config=b.yaml"], "b"),
        (["--config=a.yaml", "--config", "b.yaml"], "b"),
        (["--config"], None),
    ],
)
def test_recipe_name_is_the_last_files_stem(argv: list[str], name: str | None) -> None:
    assert recipe_name(argv) == name


def test_trajectory_holds_what_decides_the_weights_and_nothing_else() -> None:
    flat = trajectory(Config())
    assert {
        "seed",
        "optim.lr",
        "train.num_micro_batches",
        "train.precision",
        "data.validation",
        "augment.shift",
    } <= set(flat)
    assert not {path for path in flat if path.split(".")[0] in ("run", "eval", "checkpoint", "log", "wandb")}
    assert not {"data.name", "data.root", "data.fallback", "train.device", "train.num_threads", "train.timeout"} & set(
        flat
    )
    assert flat != trajectory(with_value("optim.lr", 0.2))
    assert flat == trajectory(with_value("train.device", "cpu"))


@pytest.mark.parametrize(
    ("argv", "code"), [(["--help"], 0), (["--print_config"], 0), (["--optim.lr", "-1"], 2), (["--zzz"], 2)]
)
def test_command_line_answers_without_torch_or_numpy(argv: list[str], code: int, python: Callable) -> None:
    script = (
        "import sys; from train.__main__ import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as leaving: code = leaving.code\n"
        "print(); print(code, sorted({'torch', 'numpy', 'accelerate', 'wandb'} & set(sys.modules)))"
    )
    done = python("-c", script, *argv)
    assert done.stdout.splitlines()[-1] == f"{code} []"
    assert len(done.stderr.splitlines()) == (1 if code else 0)


@pytest.mark.parametrize(
    ("argv", "code", "line"), [(["--help"], 0, ""), (["--optim.lrr", "1"], 2, "error: There is no config")]
)
def test_command_line_leaves_with_its_code_and_at_most_one_line(
    argv: list[str], code: int, line: str, python: Callable
) -> None:
    done = python("-m", "train", *argv)
    assert done.returncode == code
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == (1 if line else 0)
    assert "Traceback" not in done.stderr
    assert ("optim.lr" in done.stdout) == (code == 0)
    assert sys.executable not in done.stderr
