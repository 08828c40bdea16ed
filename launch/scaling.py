"""The modelled tables of docs/scaling.md: how the time of a step grows with the number of GPUs (`launch plan --scaling`).

An alpha-beta model: a message of n bytes takes alpha + n / beta. Latencies per hop and their sums over a ring and a tree are
the ones by which NCCL chooses its algorithm. Nothing here was measured on GPUs; docs/scaling.md says what was measured.
"""

import math
from dataclasses import dataclass

from launch import model as model_table
from train.errors import UserError

WORLDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BATCHES = (512, 8192, 60000)
EFFICIENCY = 0.9
US = 1e-6


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines; times in seconds, rates per second."""

    per_node: int = 8
    """GPUs of a node: DGX H100."""
    nvlink_bytes_per_second: float = 450e9
    """One direction of a GPU's 18 NVLink 4 links (NVIDIA H100 data sheet: 900 GB/s both ways)."""
    network_bytes_per_second: float = 50e9
    """One 400 Gb/s ConnectX-7 for each GPU (DGX H100 user guide)."""
    protocol_share: float = 0.92
    """Share of a link that carries data in NCCL's LL128 protocol (120 of 128 bytes, less some)."""
    tree_base: float = 4.4 * US
    ring_base: float = 10.0 * US
    """Start of an all-reduce under LL128 (NCCL src/graph/tuning.cc, baseLat), as the hops below (hwLat)."""
    tree_nvlink: float = 1.2 * US
    tree_network: float = 8.5 * US
    ring_nvlink: float = 1.9 * US
    ring_network: float = 4.0 * US
    send_base: float = 8.4 * US
    send_nvlink: float = 3.4 * US
    send_network: float = 9.6 * US
    """A send with its receive: the same file's figures for the Simple protocol of a ring."""
    step_overhead: float = 1000 * US
    """What a step takes without examples: some 150 kernels at 5 to 10 us each. Assumed."""
    flops: float = 0.05 * 989e12
    """bf16 arithmetic per second: 5 % of an H100's dense peak, since the layers are small. Assumed."""


H100 = Cluster()


def nodes_of(world_size: int, cluster: Cluster) -> int:
    """Machines that a world fills."""
    return -(-world_size // cluster.per_node)


def ring(num_bytes: int, world_size: int, cluster: Cluster = H100) -> float:
    """Seconds of a ring all-reduce: 2 (W - 1) hops, of which 2 (nodes - 1) cross the network."""
    if world_size == 1:
        return 0.0
    hops, nodes = 2 * (world_size - 1), nodes_of(world_size, cluster)
    crossing = 2 * (nodes - 1)
    latency = cluster.ring_base + (hops - crossing) * cluster.ring_nvlink + crossing * cluster.ring_network
    # as many rings as GPUs of a node, each with a network card of its own
    whole = cluster.nvlink_bytes_per_second if nodes == 1 else cluster.per_node * cluster.network_bytes_per_second
    return latency + hops / world_size * num_bytes / (
        min(whole, cluster.nvlink_bytes_per_second) * cluster.protocol_share
    )


def tree(num_bytes: int, world_size: int, cluster: Cluster = H100) -> float:
    """Seconds of a double binary tree (a chain inside each node): up and down again."""
    if world_size == 1:
        return 0.0
    nodes = nodes_of(world_size, cluster)
    chain = math.ceil(world_size / nodes) - 1
    hops = chain * cluster.tree_nvlink + math.ceil(math.log2(nodes)) * cluster.tree_network
    whole = cluster.nvlink_bytes_per_second if nodes == 1 else cluster.per_node * cluster.network_bytes_per_second
    return (
        cluster.tree_base
        + 2 * hops
        + 2 * num_bytes / (min(whole, cluster.nvlink_bytes_per_second) * cluster.protocol_share)
    )


def doubling(num_bytes: int, world_size: int, cluster: Cluster = H100) -> float:
    """Seconds of exact mode's recursive doubling: log2(W) exchanges of all bytes; the first ones stay inside a node."""
    if world_size & (world_size - 1):
        raise UserError(f"Recursive doubling needs a power of two, not {world_size} ranks.")
    levels = world_size.bit_length() - 1
    inside = min(levels, cluster.per_node.bit_length() - 1)
    near = cluster.send_base + cluster.send_nvlink + num_bytes / cluster.nvlink_bytes_per_second
    far = cluster.send_base + cluster.send_network + num_bytes / cluster.network_bytes_per_second
    return inside * near + (levels - inside) * far


@dataclass(frozen=True)
class Workload:
    """What a step of a model sends and computes."""

    gradient_bytes: int
    flop_per_image: int  # forward, and twice that backward

    def communication(self, world_size: int, *, exact: bool, cluster: Cluster = H100) -> float:
        """Seconds in a step: gradients, and the table of losses with a row per micro-batch (one per rank).

        Nothing is hidden behind the backward pass: the gradients fill one bucket of DDP, which is whole at its end.
        """
        table_bytes = 8 * (world_size + 1)
        table = min(ring(table_bytes, world_size, cluster), tree(table_bytes, world_size, cluster))
        if exact:
            return doubling(self.gradient_bytes, world_size, cluster) + table
        return (
            min(ring(self.gradient_bytes, world_size, cluster), tree(self.gradient_bytes, world_size, cluster)) + table
        )

    def step(self, world_size: int, batch: float, *, exact: bool = False, cluster: Cluster = H100) -> float:
        """Seconds of a step of `batch` examples over all ranks."""
        compute = batch / world_size * self.flop_per_image / cluster.flops
        return cluster.step_overhead + compute + self.communication(world_size, exact=exact, cluster=cluster)

    def weak_batch(self, world_size: int, *, exact: bool = False, cluster: Cluster = H100) -> int:
        """The least global batch at which a GPU computes 90 % of what one alone does with the same share of it."""
        image = self.flop_per_image / cluster.flops
        hidden = EFFICIENCY / (1 - EFFICIENCY) * self.communication(world_size, exact=exact, cluster=cluster)
        return world_size * max(1, math.ceil((hidden - cluster.step_overhead) / image))

    def strong_batch(self, world_size: int, *, exact: bool = False, cluster: Cluster = H100) -> int:
        """The least global batch that W GPUs do 0.9 W times as fast as one GPU does it."""
        image = self.flop_per_image / cluster.flops
        lost = (
            EFFICIENCY
            * world_size
            * (cluster.step_overhead + self.communication(world_size, exact=exact, cluster=cluster))
        )
        return max(world_size, math.ceil((lost - cluster.step_overhead) / ((1 - EFFICIENCY) * image)))


def workload(name: str = "cnn") -> Workload:
    """Read a model's gradient bytes and arithmetic off its layers."""
    from train.functional.models import MODELS

    layers = model_table.layers(MODELS[name](0.0))
    gradient_bytes = 4 * sum(layer.parameters for layer in layers)
    return Workload(gradient_bytes, 3 * 2 * sum(layer.multiply_adds for layer in layers))


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---:"] * len(head), *rows])


def page() -> str:
    """The generated part of docs/scaling.md."""
    work = workload()
    size = work.gradient_bytes
    communication, steps, batches = [], [], []
    for world in WORLDS:
        times = (ring(size, world), tree(size, world), doubling(size, world), tree(8 * (world + 1), world))
        communication.append([f"{world:,}", *(f"{seconds / US:,.0f}" for seconds in times)])
        faster = [work.step(1, batch) / work.step(world, batch) for batch in BATCHES]
        cells = [
            f"{1e3 * work.step(world, batch):.2f} ({gain:.1f} x)" for batch, gain in zip(BATCHES, faster, strict=True)
        ]
        steps.append(
            [f"{world:,}", *(cell if batch >= world else "-" for batch, cell in zip(BATCHES, cells, strict=True))]
        )
        least = [find(world, exact=exact) for exact in (False, True) for find in (work.weak_batch, work.strong_batch)]
        batches.append([f"{world:,}", *(f"{batch:,}" for batch in least)])
    return "\n\n".join(
        [
            f"`cnn`: {size:,} bytes of gradients per step, {work.flop_per_image / 1e6:.1f} MFLOP per image forward and backward.",
            "Communication of a step, in microseconds:",
            table(["GPUs", "ring", "tree", "exact: doubling", "table of losses (tree)"], communication[1:]),
            "A step in milliseconds, fast mode, and how much faster than one GPU does the same global batch:",
            table(["GPUs", *(f"{batch:,} examples" for batch in BATCHES)], steps),
            "The least global batch for an efficiency of 90 %:",
            table(["GPUs", "fast, weak", "fast, strong", "exact, weak", "exact, strong"], batches[1:]),
        ]
    )
