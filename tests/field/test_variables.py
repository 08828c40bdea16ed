"""The caller's environment is read on purpose, refused in one line, or without effect; exact mode is never bent."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks.processes import arguments, train

from train.config import TrainConfig, WandbConfig
from train.errors import UserError
from train.tracking.wandb import resolve
from train.world.launcher import accept_placement

EXACT = "--train.exact true --train.num_micro_batches 2 --train.max_steps 6"
MODES = {
    "": "online", "online": "online", "Online": "online", "run": "online",
    "offline": "offline", "OFFLINE": "offline", "dryrun": "offline",
    "disabled": "disabled", "false": "disabled", "False": "disabled", "0": "disabled", "off": "disabled",
}  # fmt: skip


@pytest.mark.parametrize("word", MODES)
def test_wandb_mode_is_read_in_any_case(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", word)
    assert resolve(WandbConfig()).mode == MODES[word]
    assert resolve(WandbConfig(mode="offline")).mode == "offline"


@pytest.mark.parametrize("word", ["ofline", "maybe", "2"])
def test_other_wandb_mode_is_refused(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", word)
    with pytest.raises(UserError, match=f"WANDB_MODE is {word}"):
        resolve(WandbConfig())


def test_wandb_disabled_disables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert resolve(WandbConfig()).mode == "disabled"
    assert resolve(WandbConfig(mode="online")).mode == "online"


@pytest.mark.parametrize(
    ("variables", "asked", "project"),
    [
        ({}, None, "lockstep"),
        ({"WANDB_PROJECT": "mine"}, None, "mine"),
        ({"WANDB_PROJECT": "mine", "WANDB_ENTITY": "us"}, None, "us/mine"),
        ({"WANDB_PROJECT": "mine"}, "given", "given"),
        ({"WANDB_ENTITY": "us"}, "given", "us/given"),
        ({"WANDB_ENTITY": "us"}, "them/given", "them/given"),
    ],
)
def test_wandb_project_comes_from_the_config_first(
    variables: dict[str, str], asked: str | None, project: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert resolve(WandbConfig(project=asked)).project == project


BENDING = {
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_USE_FSDP": "1",
    "ACCELERATE_USE_DEEPSPEED": "True",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "NVIDIA_TF32_OVERRIDE": "1",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "DNNL_DEFAULT_FPMATH_MODE": "ANY",
    "PYTORCH_TUNABLEOP_ENABLED": "1",
}


@pytest.mark.parametrize("name", BENDING)
def test_variable_that_would_change_the_result_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, BENDING[name])
    with pytest.raises(UserError, match=f"{name} is {BENDING[name]}: it would change the result"):
        accept_placement(TrainConfig())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the hash of the weights that no variable may change."""
    return str(train(1, tmp_path_factory.mktemp("runs") / "run", EXACT)["weights_sha256"])


WITHOUT_EFFECT = [
    {"ACCELERATE_USE_FSDP": "0", "ACCELERATE_DYNAMO_BACKEND": "NO", "NVIDIA_TF32_OVERRIDE": "0"},
    {"ACCELERATE_CPU_AFFINITY": "1", "ACCELERATE_DEBUG_MODE": "perhaps", "ACCELERATE_SPLIT_BATCHES": "x"},
    {"CUBLAS_WORKSPACE_CONFIG": "nonsense", "OMP_NUM_THREADS": "7", "MKL_NUM_THREADS": "3", "OMP_WAIT_POLICY": "x"},
    {"PYTHONHASHSEED": "9", "LC_ALL": "C", "LANG": "tr_TR", "TZ": "Asia/Kathmandu", "COLUMNS": "3", "TERM": "nonsense"},
    {"http_proxy": "http://127.0.0.1:9", "PIP_INDEX_URL": "x", "SLURM_JOB_ID": "1", "SLURM_GPUS_ON_NODE": "x"},
    {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "ACCELERATE_USE_CPU": "junk", "ACCELERATE_MIXED_PRECISION": ""},
    {"PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error", "PYTHONSAFEPATH": "1"},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "NODE_RANK": "3", "CUDA_VISIBLE_DEVICES": "7", "NCCL_DEBUG": "INFO"},
]


@pytest.mark.parametrize("variables", WITHOUT_EFFECT, ids=lambda variables: "+".join(variables))
def test_variable_without_effect_leaves_the_bits_alone(
    variables: dict[str, str], undisturbed: str, tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = python("-m", "train", *arguments(tmp_path / "run", EXACT), **variables)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["weights_sha256"] == undisturbed


def test_variable_that_selects_kernels_is_named_and_recorded(
    tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    argv = arguments(tmp_path / "run", EXACT)
    done = python("-m", "train", *argv, "--run.time_limit", "0.0001", ATEN_CPU_CAPABILITY="default")
    assert "other bits than without ATEN_CPU_CAPABILITY" in done.stdout
    resumed = python("-m", "train", *argv)
    assert "The bits may differ" in resumed.stdout
    assert "ATEN_CPU_CAPABILITY" in resumed.stdout
