"""Seconds of compute and of network in a step, at speeds that the user states. Arithmetic; nothing is measured.

Placement: ranks fill one node after another, and groups lie as the trainer's meshes lay them: expert-parallel groups, the ranks that
share sequences and FSDP groups are neighbouring ranks, the FSDP groups of experts take every e-th rank, replicas every s-th. n ranks of
a group have m members in each of its nodes. Every rank has a network adapter of its own. A rank sends B bytes:

    gather, reduce-scatter, all-reduce    rings: B inside the node, and a share (n - m) / (m (n - 1)) of it through its adapter too: what
                                          a node needs is sent to it once, through all of the group's adapters there
    all-to-all                            (m - 1) / (n - 1) of B inside the node, (n - m) / (n - 1) through its adapter

The slower of the two links counts. FSDP's collectives run beside computation; what is longer than that waits. Nothing runs beside an
all-to-all, whose result the next matrix product needs, nor beside context parallelism's gather of keys and values. Left out: latency,
the optimizer, kernels that memory limits, data.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.flops import ModelCost
from symbiotic_titan.parallel.dry_run import (
    Precision,
    ShardedParameter,
    Traffic,
    gathers_in_backward,
    stage_of,
    weight_traffic,
)
from symbiotic_titan.sequence.modality import NUM_MODALITIES, TEXT, VAE, VIT


@dataclass(frozen=True)
class Speeds:
    """What one rank reaches: 10^12 floating-point operations a second in matrix products; 10^9 bits a second that it sends to other
    nodes, and inside its node; and how many ranks a node has."""

    tflops: float
    network_gbps: float
    node_gbps: float
    ranks_per_node: int

    def seconds(self, inside: float, outside: float) -> float:
        """``inside`` bytes to ranks of the node and, meanwhile, ``outside`` bytes to other nodes."""
        return 8e-9 * max(inside / self.node_gbps, outside / self.network_gbps)


@dataclass(frozen=True)
class Group:
    """``size`` ranks, every ``stride``-th, ``members`` of them in each node."""

    size: int
    members: int

    @classmethod
    def of(cls, size: int, stride: int, ranks_per_node: int) -> "Group":
        return cls(size, min(size, max(1, ranks_per_node // stride)))

    def ring(self, num_bytes: float, speeds: Speeds) -> float:
        """Seconds of a ring in which every rank sends ``num_bytes``."""
        if self.size == 1:
            return 0.0
        share = (self.size - self.members) / (self.members * (self.size - 1))
        inside = num_bytes if self.members > 1 else 0.0
        return speeds.seconds(inside, num_bytes * share)

    def all_to_all(self, num_bytes: float, speeds: Speeds) -> float:
        """Seconds in which every rank sends ``num_bytes`` in equal parts to all others."""
        if self.size == 1:
            return 0.0
        outside = num_bytes * (self.size - self.members) / (self.size - 1)
        return speeds.seconds(num_bytes - outside, outside)


@dataclass(frozen=True)
class Compute:
    """Floating-point operations of one micro-batch on one rank.

    forward, backward: of the step; ``backward`` with what activation checkpointing computes again.
    without_loss:      of a forward without logits.
    """

    forward: float
    backward: float
    without_loss: float


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one optimizer step.

    compute_*:  matrix products and attention.
    fsdp_*:     gathers of weights; in the backward sums of gradients too, and HSDP's over replicas.
    exchange_*: expert-parallel all-to-alls.
    context_*:  context parallelism's gathers of keys and values, and sums of their gradients.
    """

    compute_forward: float = 0.0
    compute_backward: float = 0.0
    fsdp_forward: float = 0.0
    fsdp_backward: float = 0.0
    exchange_forward: float = 0.0
    exchange_backward: float = 0.0
    context_forward: float = 0.0
    context_backward: float = 0.0

    def __add__(self, other: "StepSeconds") -> "StepSeconds":
        return StepSeconds(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __mul__(self, times: int) -> "StepSeconds":
        return StepSeconds(*(times * value for value in _values(self)))

    @property
    def compute(self) -> float:
        return self.compute_forward + self.compute_backward

    @property
    def network(self) -> float:
        return self.fsdp_forward + self.fsdp_backward + self.exchange + self.context

    @property
    def exchange(self) -> float:
        return self.exchange_forward + self.exchange_backward

    @property
    def context(self) -> float:
        return self.context_forward + self.context_backward

    @property
    def fsdp_waits(self) -> float:
        """FSDP's seconds that the computation of the same pass is too short to hide."""
        return max(0.0, self.fsdp_forward - self.compute_forward) + max(
            0.0, self.fsdp_backward - self.compute_backward
        )

    @property
    def total(self) -> float:
        return self.compute + self.fsdp_waits + self.exchange + self.context


def _values(seconds: StepSeconds) -> Iterable[float]:
    return asdict(seconds).values()


def tokens_of_row(config: JobConfig) -> tuple[int, ...]:
    """Tokens of each modality in a row: equal parts, except that images have no more than [data] lets a row hold. Text has the rest."""
    length, data = config.training.seq_len, config.data
    tokens = [0] * NUM_MODALITIES
    for modality, most in ((VIT, data.max_vit_tokens), (VAE, data.max_vae_tokens)):
        tokens[modality] = min(most or length, length // NUM_MODALITIES)
    tokens[TEXT] = length - sum(tokens)
    return tuple(tokens)


def compute_of(
    config: JobConfig, args: ModelArgs, cost: ModelCost, recomputed: Sequence[bool]
) -> Compute:
    """One micro-batch of full rows, each a single causal document whose text is labelled; all weights are trained. ``recomputed``: the
    blocks that activation checkpointing computes again, see ``dry_run_activations``."""
    rows, length, tokens = (
        config.training.local_batch_size,
        config.training.seq_len,
        tokens_of_row(config),
    )
    # Of the pairs of query and key that ``cost`` counts a causal document has no more than these.
    unseen = cost.pair_flops[0] * length * (length - 1) // 2
    whole = sum(f * n for f, n in zip(cost.forward_flops, tokens, strict=True)) - unseen
    # The image encoder is what an image token costs more than a generated one, whose own embedding and head are small.
    encoder = max(0, cost.forward_flops[VIT] - cost.forward_flops[VAE]) * tokens[VIT]
    # The ranks of context parallelism share all but the encoder.
    context = config.parallelism.context_parallel_degree
    whole = encoder + (whole - encoder) / context
    logits = cost.logit_flops * tokens[TEXT] / context
    again = (whole - logits - encoder) * sum(recomputed) / len(recomputed)
    return Compute(rows * whole, rows * (2 * whole + again), rows * (whole - logits))


def fsdp_seconds(
    parameters: Sequence[ShardedParameter],
    precision: Precision,
    reshard: str,
    speeds: Speeds,
    num_micro_batches: int = 1,
    gradient_sync: str = "always",
) -> StepSeconds:
    """FSDP's and HSDP's collectives of one micro-batch, the mean over those of a step: not all reduce, see ``Traffic.of_step``."""
    last_block = [s for p in parameters if (s := stage_of(p.unit)).startswith("layers.")][-1:]
    forward = backward = 0.0
    for p in parameters:
        again = gathers_in_backward(stage_of(p.unit), "".join(last_block), reshard)
        traffic = weight_traffic([p], precision, again)
        # Under expert parallelism the ranks that share an expert's shards are one of every expert-parallel group.
        shards = Group.of(p.shard, p.expert, speeds.ranks_per_node)
        replicas = Group.of(p.replicate, p.shard * p.expert, speeds.ranks_per_node)
        forward += shards.ring(traffic.gather_forward, speeds)
        reduced = traffic.of_step(num_micro_batches, gradient_sync)
        backward += shards.ring(traffic.gather_backward, speeds)
        backward += shards.ring(reduced.reduce_scatter, speeds) / num_micro_batches
        backward += replicas.ring(reduced.all_reduce, speeds) / num_micro_batches
    return StepSeconds(fsdp_forward=forward, fsdp_backward=backward)


def exchange_seconds(traffic: Traffic, degree: int, speeds: Speeds) -> StepSeconds:
    """The all-to-alls in ``traffic`` among ``degree`` neighbouring ranks."""
    group = Group.of(degree, 1, speeds.ranks_per_node)
    return StepSeconds(
        exchange_forward=group.all_to_all(traffic.exchange_forward, speeds),
        exchange_backward=group.all_to_all(traffic.exchange_backward, speeds),
    )


def context_seconds(traffic: Traffic, degree: int, speeds: Speeds) -> StepSeconds:
    """The gathers and sums of keys and values in ``traffic`` among ``degree`` neighbouring ranks."""
    group = Group.of(degree, 1, speeds.ranks_per_node)
    return StepSeconds(
        context_forward=group.ring(traffic.context_forward, speeds),
        context_backward=group.ring(traffic.context_backward, speeds),
    )


def step_seconds(
    compute: Compute,
    network: StepSeconds,
    num_micro_batches: int,
    speeds: Speeds,
    *,
    counts_first: bool,
) -> StepSeconds:
    """A step of ``num_micro_batches`` whose collectives take ``network`` each. ``counts_first``: before them, every micro-batch runs a
    forward without gradients."""
    rate = 1e12 * speeds.tflops
    one = network + StepSeconds(
        compute_forward=compute.forward / rate, compute_backward=compute.backward / rate
    )
    if counts_first:
        one += StepSeconds(
            compute_forward=compute.without_loss / rate,
            fsdp_forward=network.fsdp_forward,
            exchange_forward=network.exchange_forward,
            context_forward=network.context_forward,
        )
    return one * num_micro_batches
