"""On real processes exact mode gives the same bits on every world size, in every checkpoint and after kills."""

import hashlib
import itertools
import json
import signal
from pathlib import Path

import pytest
import torch
from ranks.processes import Ranks, arguments, rows, train, wait_for_step

from train.world.reduce import Node, Tree

EXACT = (
    "--train.exact true --train.num_micro_batches 8 --log.every_steps 1 --checkpoint.every_steps 7 --checkpoint.keep 99"
)
PLAIN = "--model.name tiny"
EVERYTHING = (
    "--model.name tiny_bn --model.dropout 0.2 --augment.shift 2 --augment.rotate 10 --augment.erase 0.3 "
    "--optim.ema 0.9 --optim.clip_norm 0.5 --optim.lr 0.05"
)


def losses_and_norms(run: Path) -> list[tuple]:
    """Return every logged loss and gradient norm, to the last bit."""
    return [(row["step"], row["loss"].hex(), row["grad_norm"].hex()) for row in rows(run, "train")]


def checkpoint_bytes(run: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of every checkpoint."""
    files = sorted((run / "checkpoints").rglob("*.*"))
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()
    }


@pytest.mark.sample(1)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("features", [EVERYTHING, PLAIN], ids=["everything", "plain"])
def test_every_world_size_gives_the_same_bits(tmp_path: Path, precision: str, features: str) -> None:
    flags = (EXACT, features, f"--train.precision {precision} --train.max_steps 24")  # with an epoch's short last batch
    alone = train(1, tmp_path / "world-1", *flags)
    for world_size in (2, 3, 4, 6, 8):
        run = tmp_path / f"world-{world_size}"
        summary = train(world_size, run, *flags)
        assert summary["world_size"] == world_size
        for name in ("weights_sha256", "ema_weights_sha256", "results"):
            assert summary.get(name) == alone.get(name), (world_size, name)
        assert losses_and_norms(run) == losses_and_norms(tmp_path / "world-1")
        assert checkpoint_bytes(run) == checkpoint_bytes(tmp_path / "world-1")


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "feature",
    [
        "--model.name tiny_bn",
        "--model.dropout 0.5",
        "--augment.scale 0.2 --augment.shear 10",
        "--optim.clip_norm 0.1",
        "--optim.ema 0.99",
        "--optim.name adamw --optim.lr 0.003",
        "--train.num_micro_batches 6 --train.global_batch_size 66",
        "--train.global_batch_size 1024 --train.num_micro_batches 16",
        "--train.channels_last false",
    ],
)
def test_each_feature_alone_gives_the_same_bits(tmp_path: Path, feature: str) -> None:
    flags = (EXACT, PLAIN, "--train.max_steps 8", feature)
    hashes = {train(world_size, tmp_path / f"world-{world_size}", *flags)["weights_sha256"] for world_size in (1, 2, 3)}
    assert len(hashes) == 1


def test_fast_mode_does_not_give_the_same_bits(tmp_path: Path) -> None:
    """This shows that the comparison above can fail. Without the tree it does."""
    flags = ("--train.max_steps 24 --train.num_micro_batches 8",)
    assert len({train(n, tmp_path / f"{n}", *flags)["weights_sha256"] for n in (1, 2, 4)}) > 1


def test_killed_on_4_resumed_on_1_then_on_3_is_the_undisturbed_run(tmp_path: Path) -> None:
    flags = (EXACT, EVERYTHING, "--train.epochs 4")
    undisturbed = train(1, tmp_path / "undisturbed", *flags)
    run = tmp_path / "moved"
    for world_size, step in ((4, 16), (1, 44)):
        ranks = Ranks(world_size, arguments(run, *flags), tmp_path / "logs")
        wait_for_step(run, step)
        ranks.signal(signal.SIGKILL)
        ranks.wait()
    moved = train(3, run, *flags)
    assert [row["world_size"] for row in rows(run, "start")] == [4, 1, 3]
    for name in ("weights_sha256", "ema_weights_sha256", "results"):
        assert moved[name] == undisturbed[name]
    assert losses_and_norms(run) == losses_and_norms(tmp_path / "undisturbed")
    assert checkpoint_bytes(run) == checkpoint_bytes(tmp_path / "undisturbed")


def test_changed_environment_is_warned_of_at_resume(tmp_path: Path) -> None:
    flags = (EXACT, PLAIN, "--train.max_steps 30")
    ranks = Ranks(1, arguments(tmp_path / "run", *flags), tmp_path / "logs")
    wait_for_step(tmp_path / "run", 8)
    ranks.signal(signal.SIGTERM)
    assert ranks.wait() == [75]
    train(1, tmp_path / "run", *flags, "--train.num_threads 2")
    log = (tmp_path / "run-logs" / "rank-0.log").read_text()
    assert "The bits may differ from an undisturbed run's: num_threads 1 -> 2." in log
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000007" / "state.json").read_text())
    assert state["environment"]["num_threads"] == 1
    assert state["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]


@pytest.mark.parametrize("num_leaves", range(1, 40))
def test_tree_covers_all_leaves_in_order_and_ranks_own_its_subtrees(num_leaves: int) -> None:
    tree = Tree(num_leaves)

    def total(node: Node) -> str:
        if node.stop - node.start == 1:
            return str(node.start)
        left, right = tree.children[node]
        return f"({total(left)} {total(right)})"

    assert total(tree.root).replace("(", "").replace(")", "").split() == [str(leaf) for leaf in range(num_leaves)]
    assert len(tree.children) == num_leaves - 1
    for world_size in range(1, num_leaves + 1):
        bounds = [num_leaves * rank // world_size for rank in range(world_size + 1)]
        owned = [tree.subtrees(start, stop) for start, stop in itertools.pairwise(bounds)]
        nodes = [node for each in owned for node in each]
        assert [node.start for node in nodes[1:]] == [node.stop for node in nodes[:-1]]
        for each in owned:
            assert not any(pair in tree.parents for pair in itertools.pairwise(each))  # siblings would be one subtree
            assert all(node.stop - node.start == 1 or node in tree.children for node in each)


def test_tree_of_6_leaves_is_the_one_that_the_docstring_draws() -> None:
    tree = Tree(6)
    assert tree.children[Node(0, 6)] == ((0, 4), (4, 6))
    assert tree.children[Node(0, 4)] == ((0, 2), (2, 4))
    assert tree.subtrees(0, 3) == [(0, 2), (2, 3)]
    assert tree.subtrees(3, 6) == [(3, 4), (4, 6)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gpu_run_repeats_and_resumes_with_the_same_bits(tmp_path: Path, precision: str) -> None:
    flags = (EXACT, EVERYTHING, f"--train.device cuda --train.precision {precision} --train.epochs 4")
    first, second = (train(1, tmp_path / name, *flags) for name in ("first", "second"))
    assert first["weights_sha256"] == second["weights_sha256"]
    ranks = Ranks(1, arguments(tmp_path / "killed", *flags), tmp_path / "logs")
    wait_for_step(tmp_path / "killed", 20)
    ranks.signal(signal.SIGKILL)
    ranks.wait()
    assert train(1, tmp_path / "killed", *flags)["weights_sha256"] == first["weights_sha256"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU, two of them")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_two_gpus_give_the_bits_of_one(tmp_path: Path, precision: str) -> None:
    flags = (EXACT, EVERYTHING, f"--train.device cuda --train.precision {precision} --train.max_steps 24")
    hashes = {train(n, tmp_path / f"{n}", *flags)["weights_sha256"] for n in (1, 2)}
    assert len(hashes) == 1
