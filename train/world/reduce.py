"""How the gradients of a step's micro-batches meet: DDP's all-reduce, or one fixed tree in exact mode.

Floating-point addition does not associate, so an all-reduce gives other bits on another world size. The exact tree fixes
the order: the gradient is the sum over M leaves (micro-batches) in one binary tree that depends on M alone. A rank sums
the maximal subtrees that its leaves fill; ranks then exchange partial sums. An addition is bitwise commutative, so every
rank ends with the bits of one process that did all M leaves (the idea is EasyScale's; Li et al., SC'23).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.world.world import World

Node = tuple[int, int]  # the leaves [start, stop) under it


class Tree:
    """The binary tree over M leaves: a node's left child holds the largest power of two of leaves that is not all."""

    def __init__(self, num_leaves: int) -> None:
        self.root: Node = (0, num_leaves)
        self.middle: dict[Node, int] = {}
        nodes = [self.root]
        while nodes:
            start, stop = nodes.pop()
            if stop - start > 1:
                middle = start + (1 << ((stop - start - 1).bit_length() - 1))
                self.middle[start, stop] = middle
                nodes += [(start, middle), (middle, stop)]

    def are_siblings(self, left: Node, right: Node) -> bool:
        """Whether two nodes are the children of one parent."""
        return left[1] == right[0] and self.middle.get((left[0], right[1])) == left[1]

    def subtrees(self, start: int, stop: int) -> list[Node]:
        """The maximal subtrees that the leaves [start, stop) fill, from left to right."""
        stack: list[Node] = []
        for leaf in range(start, stop):
            stack.append((leaf, leaf + 1))
            while len(stack) > 1 and self.are_siblings(stack[-2], stack[-1]):
                right, left = stack.pop(), stack.pop()
                stack.append((left[0], right[1]))
        return stack


class Allreduce:
    """Fast mode: plain DDP. Gradients of a rank's micro-batches add up in place; the last backward averages over ranks."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model, self.world = model, world
        self.loss_scale = float(world.world_size)  # undoes DDP's division: the loss is divided by the examples alone

    @contextmanager
    def micro_batch(self, index: int, own: range) -> Iterator[None]:
        """Run one forward and backward inside. Collective in a rank's last micro-batch: every rank must call it."""
        last = index == own[-1]
        with nullcontext() if last else self.world.accelerator.no_sync(self.model):
            yield


class ExactTree:
    """Exact mode: gradients are summed in the order of `Tree`, on any world size.

    Behind DDP it is a communication hook: earlier micro-batches run under no_sync and leave their gradients on a stack
    of subtrees; in the last backward the hook adds each bucket to the stack's and hands the exchange to a thread, so
    communication overlaps with the rest of the backward. The thread's order is the buckets' order: the same everywhere.
    """

    loss_scale = 1.0

    def __init__(self, model: nn.Module, world: World, num_leaves: int, owners: list[range]) -> None:
        self.model, self.world, self.owners = model, world, owners
        self.tree = Tree(num_leaves)
        self.subtrees = [self.tree.subtrees(own.start, own.stop) for own in owners]
        # powers of two on both sides: every rank owns one subtree, and all of these are alike
        self.is_perfect = num_leaves.bit_count() == 1 and world.world_size.bit_count() == 1
        on_gpu = world.device.type == "cuda"
        if world.world_size > 1 and on_gpu and dist.get_backend() == "gloo":
            self.is_perfect = False  # gloo gathers tensors of a GPU, but cannot send them
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.stack: list[tuple[Node, dict[Tensor, Tensor]]] = []
        if world.world_size > 1:
            # a new thread's device is GPU 0: an exchange from there would open a context on it in every rank
            initializer = (torch.cuda.set_device, (world.device,)) if on_gpu else ()
            self.thread = ThreadPoolExecutor(1, "exact-tree", *initializer)
            model.register_comm_hook(None, self._hook)  # type: ignore[operator]

    @contextmanager
    def micro_batch(self, index: int, own: range) -> Iterator[None]:
        """Run one forward and backward inside. Collective in a rank's last micro-batch: every rank must call it."""
        if index == own[0]:
            self.stack.clear()  # of a step that was given up halfway
        if index == own[-1] and self.world.world_size > 1:
            yield
            self.stack.clear()
            return
        with self.world.accelerator.no_sync(self.model):
            yield
        gradients: dict[Tensor, Tensor] = {p: p.grad for p in self.parameters if p.grad is not None}
        for parameter in self.parameters:
            parameter.grad = None
        self.stack.append(((index, index + 1), gradients))
        while len(self.stack) > 1 and self.tree.are_siblings(self.stack[-2][0], self.stack[-1][0]):
            (right_node, right), (left_node, left) = self.stack.pop(), self.stack.pop()
            torch._foreach_add_(list(left.values()), list(right.values()))
            self.stack.append(((left_node[0], right_node[1]), left))
        if index == own[-1]:
            for tensor, gradient in self.stack.pop()[1].items():
                tensor.grad = gradient

    def _hook(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Add this bucket, the last micro-batch's gradients, to the stack's, and start the exchange."""
        buffer = bucket.buffer()
        # bucket.gradients() has contiguous strides, but the elements lie in the parameter's own (channels_last) order.
        offsets = [view.storage_offset() for view in bucket.gradients()]
        places = list(zip(bucket.parameters(), offsets, strict=True))
        last = self.owners[self.world.rank][-1]
        node: Node = (last, last + 1)
        waiting = list(self.stack)
        pieces = [buffer]
        while waiting:
            left_node, left = waiting.pop()
            flat = torch.empty_like(buffer)
            for parameter, offset in places:
                flat.as_strided(parameter.size(), parameter.stride(), offset).copy_(left[parameter])
            if len(pieces) == 1 and self.tree.are_siblings(left_node, node):
                buffer.add_(flat)
                node = (left_node[0], node[1])
            else:
                pieces.insert(0, flat)
        future: torch.futures.Future[Tensor]
        on_gpu = buffer.is_cuda
        future = torch.futures.Future(devices=[buffer.device] if on_gpu else None)
        ready = torch.cuda.current_stream(buffer.device).record_event() if on_gpu else None
        self.thread.submit(self._finish, future, pieces, buffer, ready)
        return future

    def _finish(self, future: torch.futures.Future, pieces: list[Tensor], buffer: Tensor, ready: object) -> None:
        """Exchange in the thread and hand DDP the bucket, which now holds the sum over all leaves."""
        try:
            if ready is not None:
                torch.cuda.current_stream(buffer.device).wait_event(ready)  # type: ignore[arg-type]
            if self.is_perfect:
                self._double(buffer)
            else:
                self._gather(pieces, buffer)
            future.set_result(buffer)
        except Exception as error:  # DDP raises it in the backward that waits
            future.set_exception(error)

    def _double(self, buffer: Tensor) -> None:
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

    def _gather(self, pieces: list[Tensor], buffer: Tensor) -> None:
        """Gather every rank's maximal subtrees and add up the tree above them. Collective: every rank must call it."""
        width = max(len(nodes) for nodes in self.subtrees)
        own = buffer.new_zeros(width, buffer.numel())
        for row, piece in zip(own, pieces, strict=False):
            row.copy_(piece)
        gathered = [torch.empty_like(own) for _ in self.subtrees]
        dist.all_gather(gathered, own)
        sums = {
            node: rows[number]
            for nodes, rows in zip(self.subtrees, gathered, strict=True)
            for number, node in enumerate(nodes)
        }

        def total(node: Node) -> Tensor:
            if node in sums:
                return sums[node]
            middle = self.tree.middle[node]
            return total((node[0], middle)) + total((middle, node[1]))

        buffer.copy_(total(self.tree.root))
