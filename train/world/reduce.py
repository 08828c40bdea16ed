r"""How the gradients of a step's micro-batches are summed: by DDP's all-reduce, or in exact mode by one fixed tree.

Floating-point addition is not associative, so an all-reduce gives other bits on another world size. Exact mode fixes
the order of the additions: the gradient is the sum over M leaves, the micro-batches, in a binary tree that depends on M
alone. With 6 micro-batches:

                 [0, 6)
               /        \
         [0, 4)          [4, 6)
        /      \         /    \
    [0, 2)   [2, 4)     4      5
    /    \   /    \
   0      1 2      3

On 2 ranks, rank 0 owns the leaves 0 to 2 and adds up the largest subtrees in them: [0, 2) and [2, 3). Rank 1 has [3, 4)
and [4, 6). They exchange these four sums, and each rank adds up the rest: [2, 4), then [0, 4), then [0, 6).

However the leaves are spread over ranks, the same pairs are added, and swapping the two sides of an addition changes no
bit. So every rank ends with the bits of one process that has all leaves. The idea is EasyScale's (Li et al., SC'23).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.world.world import World


class Node(NamedTuple):
    """A node of the tree: the leaves [start, stop) under it."""

    start: int
    stop: int


class Tree:
    """The binary tree over M leaves.

    A node's left child has the largest power of two of its leaves that is fewer than all of them.
    """

    def __init__(self, num_leaves: int) -> None:
        self.root = Node(0, num_leaves)
        self.children: dict[Node, tuple[Node, Node]] = {}
        nodes = [self.root]
        while nodes:
            start, stop = node = nodes.pop()
            if stop - start > 1:
                middle = start + (1 << ((stop - start - 1).bit_length() - 1))
                self.children[node] = Node(start, middle), Node(middle, stop)
                nodes += self.children[node]
        self.parents = {siblings: node for node, siblings in self.children.items()}

    def subtrees(self, start: int, stop: int) -> list[Node]:
        """Return the largest subtrees that the leaves [start, stop) fill, from left to right."""
        found: list[Node] = []
        for leaf in range(start, stop):
            node = Node(leaf, leaf + 1)
            while found and (found[-1], node) in self.parents:
                node = self.parents[found.pop(), node]
            found.append(node)
        return found


class Allreduce:
    """Fast mode: plain DDP. A rank's passes add up in place; the last backward pass averages over the ranks."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model, self.world = model, world
        self.loss_scale = float(world.world_size)  # undoes DDP's division: the loss is divided by the examples alone
        if world.world_size > 1:
            # The first layer's gradient is the last to arrive. What is left of the backward pass then is waiting.
            first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
            first.register_post_accumulate_grad_hook(self._begin_waiting)

    def _begin_waiting(self, _: Tensor) -> None:
        self.world.clock.enter("reduce")

    @contextmanager
    def one_pass(self, part: range, own: range) -> Iterator[None]:
        """Run forward and backward of some of a rank's own micro-batches inside, in order.

        Collective in a rank's last pass: every rank must call it.
        """
        is_last = part.stop == own.stop
        if is_last and self.world.world_size > 1:
            self.world.clock.announce()
        with nullcontext() if is_last else self.world.accelerator.no_sync(self.model):
            yield


class ExactTree:
    """Exact mode: gradients are summed in the order of `Tree`, on any world size.

    All micro-batches run under no_sync. Their gradients are kept on a stack of subtrees, and two of them are added as
    soon as they are siblings. After the last one the ranks exchange their subtrees' sums, each as one flat tensor.
    """

    loss_scale = 1.0

    def __init__(self, model: nn.Module, world: World, num_leaves: int, owners: list[range]) -> None:
        self.model, self.world = model, world
        self.tree = Tree(num_leaves)
        self.subtrees = [self.tree.subtrees(own.start, own.stop) for own in owners]  # of each rank
        # powers of two on both sides: every rank owns one subtree, and all of these have the same shape
        self.is_perfect = num_leaves.bit_count() == 1 and world.world_size.bit_count() == 1
        if world.world_size > 1 and world.device.type == "cuda" and dist.get_backend() == "gloo":
            self.is_perfect = False  # gloo gathers tensors of a GPU, but cannot send them
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.stack: list[tuple[Node, list[Tensor]]] = []  # subtrees of this step, and their sum for each parameter

    @contextmanager
    def one_pass(self, part: range, own: range) -> Iterator[None]:
        """Run forward and backward of one of a rank's own micro-batches inside, in order.

        Collective in a rank's last pass: every rank must call it.
        """
        if part.start == own.start:
            self.stack.clear()  # an error may have left something of the step before
        with self.world.accelerator.no_sync(self.model):
            yield
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]  # None if not used
        self._push(self.stack, Node(part.start, part.stop), gradients)
        for parameter in self.parameters:
            parameter.grad = None
        if part.stop == own.stop:
            _, gradients = self.stack[0]
            if self.world.world_size > 1:
                with self.world.clock.collective():
                    self._add_up_over_ranks(gradients)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.stack.clear()

    def _push(self, stack: list[tuple[Node, list[Tensor]]], node: Node, sums: list[Tensor]) -> None:
        """Put the sums of the next subtree, from left to right, on a stack, and add what has become siblings there."""
        while stack and (stack[-1][0], node) in self.tree.parents:
            left_node, left = stack.pop()
            torch._foreach_add_(left, sums)
            node, sums = self.tree.parents[left_node, node], left
        stack.append((node, sums))

    def _add_up_over_ranks(self, gradients: list[Tensor]) -> None:
        """Put the sum over all leaves into `gradients`. Collective: every rank must call it."""
        rows = [torch.cat([part.flatten() for part in sums]) for _, sums in self.stack]
        total = self._recursive_doubling(rows[0]) if self.is_perfect else self._all_gather(rows)
        parts = total.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def _recursive_doubling(self, total: Tensor) -> Tensor:
        """Add up by log2(world_size) exchanges with rank XOR 2^i. Collective: every rank must call it."""
        distance = 1
        while distance < self.world.world_size:
            partner = self.world.rank ^ distance
            other = torch.empty_like(total)
            exchange = [dist.P2POp(dist.isend, total, partner), dist.P2POp(dist.irecv, other, partner)]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            total += other
            distance *= 2
        return total

    def _all_gather(self, rows: list[Tensor]) -> Tensor:
        """Gather the sums of every rank's subtrees, and add up the tree above. Collective: every rank must call it."""
        width = max(len(nodes) for nodes in self.subtrees)  # ranks must send the same size
        own = torch.stack(rows + rows[:1] * (width - len(rows)))
        gathered = [torch.empty_like(own) for _ in self.subtrees]
        dist.all_gather(gathered, own)
        stack: list[tuple[Node, list[Tensor]]] = []
        for nodes, sums in zip(self.subtrees, gathered, strict=True):
            for node, row in zip(nodes, sums, strict=False):
                self._push(stack, node, [row])
        return stack[0][1][0]
