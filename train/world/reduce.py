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
from concurrent.futures import ThreadPoolExecutor
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
    """Fast mode: plain DDP. A rank's micro-batches add up in place; the last backward pass averages over the ranks."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model, self.world = model, world
        self.loss_scale = float(world.world_size)  # undoes DDP's division: the loss is divided by the examples alone

    @contextmanager
    def micro_batch(self, index: int, own: range) -> Iterator[None]:
        """Run one forward and backward inside. Collective in a rank's last micro-batch: every rank must call it."""
        is_last = index == own[-1]
        with nullcontext() if is_last else self.world.accelerator.no_sync(self.model):
            yield


class ExactTree:
    """Exact mode: gradients are summed in the order of `Tree`, on any world size.

    1. `micro_batch` runs all micro-batches but the last under no_sync. It keeps their gradients on a stack of subtrees,
       and adds two of them as soon as they are siblings.
    2. The last backward pass calls `_reduce_bucket`, DDP's communication hook, with a bucket of gradients at a time. It
       adds the stack's sums of these parameters.
    3. A thread exchanges the sums with the other ranks while the backward pass computes the next bucket. It has one
       queue, and DDP fixes the order of the buckets, so the exchanges have the same order on all ranks.
    """

    loss_scale = 1.0

    def __init__(self, model: nn.Module, world: World, num_leaves: int, owners: list[range]) -> None:
        self.model, self.world, self.owners = model, world, owners
        self.tree = Tree(num_leaves)
        self.subtrees = [self.tree.subtrees(own.start, own.stop) for own in owners]  # of each rank
        # powers of two on both sides: every rank owns one subtree, and all of these have the same shape
        self.is_perfect = num_leaves.bit_count() == 1 and world.world_size.bit_count() == 1
        on_gpu = world.device.type == "cuda"
        if world.world_size > 1 and on_gpu and dist.get_backend() == "gloo":
            self.is_perfect = False  # gloo gathers tensors of a GPU, but cannot send them
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.stack: list[tuple[Node, dict[Tensor, Tensor]]] = []  # subtrees of this step and {parameter: their sum}
        if world.world_size > 1:
            # a new thread's device is GPU 0: without this, every rank's thread would open a context there
            initializer = (torch.cuda.set_device, (world.device,)) if on_gpu else ()
            self.thread = ThreadPoolExecutor(1, "exact-tree", *initializer)
            model.register_comm_hook(None, self._reduce_bucket)  # type: ignore[operator]

    @contextmanager
    def micro_batch(self, index: int, own: range) -> Iterator[None]:
        """Run one forward and backward inside. Collective in a rank's last micro-batch: every rank must call it."""
        is_last = index == own[-1]
        if index == own[0]:
            self.stack.clear()  # an error may have left something of the step before
        if is_last and self.world.world_size > 1:
            yield
            self.stack.clear()
            return
        with self.world.accelerator.no_sync(self.model):
            yield
        self._push(index)
        if is_last:
            for parameter, gradient in self.stack.pop()[1].items():
                parameter.grad = gradient

    def _push(self, leaf: int) -> None:
        """Move the parameters' gradients, of one leaf, to the stack, and add what has become siblings there."""
        sums: dict[Tensor, Tensor] = {p: p.grad for p in self.parameters if p.grad is not None}
        for parameter in self.parameters:
            parameter.grad = None
        node = Node(leaf, leaf + 1)
        while self.stack and (self.stack[-1][0], node) in self.tree.parents:
            left_node, left = self.stack.pop()
            torch._foreach_add_(list(left.values()), list(sums.values()))
            node, sums = self.tree.parents[left_node, node], left
        self.stack.append((node, sums))

    def _reduce_bucket(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Add the stack to a bucket, which holds the last micro-batch's gradients, and start the exchange."""
        buffer = bucket.buffer()
        last = self.owners[self.world.rank][-1]
        node, sums = Node(last, last + 1), [buffer]  # of this rank's subtrees, from left to right
        for left_node, left in reversed(self.stack):
            flat = self._flatten(left, bucket)
            if (left_node, node) in self.tree.parents:
                buffer.add_(flat)
                node = self.tree.parents[left_node, node]
            else:
                sums.insert(0, flat)
        on_gpu = buffer.is_cuda
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if on_gpu else None)
        ready = torch.cuda.current_stream(buffer.device).record_event() if on_gpu else None
        self.thread.submit(self._exchange, future, sums, buffer, ready)
        return future

    def _flatten(self, gradients: dict[Tensor, Tensor], bucket: dist.GradBucket) -> Tensor:
        """Return the gradients of a bucket's parameters, laid out as in the bucket."""
        flat = torch.empty_like(bucket.buffer())
        for parameter, view in zip(bucket.parameters(), bucket.gradients(), strict=True):
            # the view's strides are contiguous, but the bucket has the parameter's own order (channels_last)
            place = flat.as_strided(parameter.size(), parameter.stride(), view.storage_offset())
            place.copy_(gradients[parameter])
        return flat

    def _exchange(self, future: torch.futures.Future, sums: list[Tensor], buffer: Tensor, ready: object) -> None:
        """Exchange sums in the thread, and hand the bucket, which then holds the sum over all leaves, to DDP."""
        try:
            if ready is not None:
                torch.cuda.current_stream(buffer.device).wait_event(ready)  # type: ignore[arg-type]
            if self.is_perfect:
                self._recursive_doubling(buffer)
            else:
                self._all_gather(sums, buffer)
            future.set_result(buffer)
        except Exception as error:  # DDP raises it in the backward pass that waits
            future.set_exception(error)

    def _recursive_doubling(self, buffer: Tensor) -> None:
        """Add up by log2(world_size) exchanges with rank XOR 2^i. Collective: every rank must call it."""
        distance = 1
        while distance < self.world.world_size:
            partner = self.world.rank ^ distance
            other = torch.empty_like(buffer)
            exchange = [dist.P2POp(dist.isend, buffer, partner), dist.P2POp(dist.irecv, other, partner)]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            buffer.add_(other)
            distance *= 2

    def _all_gather(self, sums: list[Tensor], buffer: Tensor) -> None:
        """Gather the sums of every rank's subtrees, and add up the tree above. Collective: every rank must call it."""
        width = max(len(nodes) for nodes in self.subtrees)  # ranks must send the same size
        own = buffer.new_zeros(width, buffer.numel())
        for row, part in zip(own, sums, strict=False):
            row.copy_(part)
        gathered = [torch.empty_like(own) for _ in self.subtrees]
        dist.all_gather(gathered, own)
        known: dict[Node, Tensor] = {}
        for nodes, rows in zip(self.subtrees, gathered, strict=True):
            known.update(zip(nodes, rows, strict=False))

        def total(node: Node) -> Tensor:
            if node in known:
                return known[node]
            left, right = self.tree.children[node]
            return total(left) + total(right)

        buffer.copy_(total(self.tree.root))
