"""Seconds at stated speeds: against numbers worked out by hand, and against the bytes of the same collectives."""

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from torchtitan.config.job_config import ActivationCheckpoint

from symbiotic_titan.commands import show_parallel
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.flops import ModelCost
from symbiotic_titan.parallel.dry_run import (
    Precision,
    ShardedParameter,
    Traffic,
    context_traffic,
)
from symbiotic_titan.parallel.dry_run_activations import regathered_blocks
from symbiotic_titan.parallel.dry_run_seconds import (
    Compute,
    Group,
    Speeds,
    StepSeconds,
    compute_of,
    context_seconds,
    exchange_seconds,
    fsdp_seconds,
    step_seconds,
    tokens_of_row,
)

ROOT = Path(__file__).parents[3]
# 1 GB a second to other nodes, 10 inside a node of 4.
SPEEDS = Speeds(tflops=2.0, network_gbps=8.0, node_gbps=80.0, ranks_per_node=4)
GB = 10**9
BF16 = Precision(stored=4, computed=2, reduced=4)


@pytest.mark.parametrize(
    ("size", "stride", "members"),
    [(4, 1, 4), (16, 1, 4), (2, 1, 2), (8, 2, 2), (4, 4, 1), (4, 16, 1), (1, 1, 1)],
)
def test_neighbours_fill_nodes_and_strides_thin_them_out(size, stride, members):
    assert Group.of(size, stride, 4) == Group(size, members)


@pytest.mark.parametrize(
    ("group", "seconds"),
    [
        (Group(1, 1), 0.0),
        (Group(4, 4), 0.6),  # 6 GB inside the node
        (Group(8, 1), 6.0),  # 6 GB through the adapter
        (Group(8, 4), 6 / 7),  # a seventh through the adapter, see the next test
    ],
)
def test_a_ring_takes_what_its_slower_link_takes(group, seconds):
    assert group.ring(6 * GB, SPEEDS) == pytest.approx(seconds)


def test_a_node_receives_what_it_lacks_through_all_adapters():
    """8 ranks in two nodes gather 8 GB: a node lacks 4 GB, and each of its 4 adapters receives one of them."""
    sent = 8 * GB * 7 / 8
    assert Group(8, 4).ring(sent, SPEEDS) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("group", "seconds"),
    [(Group(4, 4), 0.3), (Group(8, 1), 3.0), (Group(4, 2), 2.0), (Group(1, 1), 0.0)],
)
def test_an_exchange_sends_to_all_others_alike(group, seconds):
    assert group.all_to_all(3 * GB, SPEEDS) == pytest.approx(seconds)


def parameter(name, unit, gathered, shard, replicate=1, expert=1):
    return ShardedParameter(name, unit, (gathered,), (gathered // shard,), gathered, shard, replicate, expert, True)  # fmt: skip


def test_experts_are_gathered_across_nodes_and_the_rest_inside_too():
    """On 16 ranks with 4 expert-parallel neighbours, those that share an expert's shards are in different nodes."""
    precision = Precision(stored=4, computed=2, reduced=4)
    dense = parameter("layers.0.attention.wq.weight", "layers.0", GB, shard=16)
    experts = parameter("layers.0.moe.experts.all.w1", "layers.0.moe.experts.all", GB, 4, expert=4)
    for p, group in ((dense, Group(16, 4)), (experts, Group(4, 1))):
        sent = GB * (p.shard - 1) // p.shard
        seconds = fsdp_seconds([p], precision, "always", SPEEDS)
        assert seconds.fsdp_forward == pytest.approx(group.ring(2 * sent, SPEEDS))
        # The last block is gathered twice in the backward, then its gradients are summed in float32.
        assert seconds.fsdp_backward == pytest.approx(group.ring((2 * 2 + 4) * sent, SPEEDS))
    replicas = parameter("layers.0.attention.wq.weight", "layers.0", GB, shard=8, replicate=2)
    more = fsdp_seconds([replicas], precision, "default", SPEEDS)
    one = fsdp_seconds([replace(replicas, replicate=1)], precision, "default", SPEEDS)
    assert more.fsdp_backward - one.fsdp_backward == pytest.approx(4 * GB / 8 / GB)


@pytest.mark.parametrize("gradient_sync, scatters", [("always", 5), ("last", 1)])
def test_a_step_sums_over_replicas_once_and_over_shards_as_chosen(gradient_sync, scatters):
    precision = Precision(stored=4, computed=2, reduced=4)
    weight = parameter("layers.0.attention.wq.weight", "layers.0", GB, shard=8, replicate=2)
    once = fsdp_seconds([weight], precision, "default", SPEEDS)
    mean = fsdp_seconds([weight], precision, "default", SPEEDS, 5, gradient_sync)
    assert mean.fsdp_forward == once.fsdp_forward
    summed = Group.of(2, 8, SPEEDS.ranks_per_node).ring(4 * GB // 8, SPEEDS)
    scattered = Group.of(8, 1, SPEEDS.ranks_per_node).ring(4 * GB * 7 // 8, SPEEDS)
    saved = 4 * summed + (5 - scatters) * scattered
    assert 5 * (once.fsdp_backward - mean.fsdp_backward) == pytest.approx(saved)
    assert summed > 0 and scattered > 0


def test_exchanges_are_those_of_the_traffic():
    seconds = exchange_seconds(
        Traffic(exchange_forward=3 * GB, exchange_backward=6 * GB), 4, SPEEDS
    )
    assert seconds.exchange_forward == pytest.approx(0.3)
    assert seconds.exchange_backward == pytest.approx(0.6) and seconds.network == seconds.exchange


def test_keys_and_values_are_gathered_and_their_gradients_summed():
    # 100 tokens with 8 channels of keys and of values in bf16; three of four ranks are elsewhere.
    traffic = context_traffic(100, 8, 4, BF16, recomputed=False)
    assert traffic == Traffic(context_forward=2400, context_backward=2400)
    again = context_traffic(100, 8, 4, BF16, recomputed=True)
    assert again == Traffic(context_forward=2400, context_backward=4800)
    assert context_traffic(100, 8, 1, BF16, recomputed=True) == Traffic()
    for settings, expected in (
        ({"mode": "selective", "selective_ac_option": "op"}, True),
        ({"mode": "none"}, False),
    ):
        config = ActivationCheckpoint(**settings)
        assert regathered_blocks(config, 2) == [expected] * 2


def test_keys_and_values_are_waited_for():
    traffic = Traffic(context_forward=3 * GB, context_backward=6 * GB)
    seconds = context_seconds(traffic, 4, SPEEDS)
    ring = Group.of(4, 1, SPEEDS.ranks_per_node).ring
    assert seconds.context_forward == ring(3 * GB, SPEEDS) > 0
    assert seconds.total == seconds.network == ring(3 * GB, SPEEDS) + ring(6 * GB, SPEEDS)


def test_what_computation_hides_is_not_waited_for():
    network = StepSeconds(fsdp_forward=3.0, fsdp_backward=3.0, exchange_forward=0.5)
    compute = Compute(forward=4e12, backward=8e12, without_loss=3e12)
    step = step_seconds(compute, network, 10, SPEEDS, counts_first=False)
    assert (step.compute_forward, step.compute_backward) == (20.0, 40.0)
    assert step.fsdp_waits == 10.0 and step.total == 20 + 40 + 10 + 5
    counted = step_seconds(compute, network, 10, SPEEDS, counts_first=True)
    assert counted.compute_forward == 35.0 and counted.fsdp_forward == 60.0
    assert counted.exchange_forward == 10.0 and counted.compute_backward == 40.0


def config_of(*overrides):
    path = str(ROOT / "train_configs" / "30b_a3b.toml")
    return load_job_config(["--job.config_file", path, *overrides])


def test_a_row_has_no_more_image_tokens_than_it_may_hold():
    assert tokens_of_row(config_of()) == (4096 - 64 - 1365, 64, 1365)
    assert tokens_of_row(config_of("--data.max_vit_tokens", "0")) == (1366, 1365, 1365)


def test_compute_counts_rows_tokens_and_what_is_computed_again():
    config = config_of("--training.local_batch_size", "3", "--training.seq_len", "300", "--data.max_vit_tokens", "0")  # fmt: skip
    args = replace(FLAVORS["debug"], num_layers=2)
    # A token attends to 300 keys at 8 FLOPs each, and in a causal row to (1 + 300) / 2; 1000 are those of logits, 500 of the encoder.
    attention = 300 * 8
    forward = (6000 + attention, 5500 + attention, 5000 + attention)
    cost = ModelCost(0, (0, 0, 0), forward, (attention,) * 3, 1000, (8, 0, 0))
    whole = 100 * (6000 + 5500 + 5000) + 300 * 301 // 2 * 8
    blocks = whole - 100 * 1000 - 100 * 500
    assert compute_of(config, args, cost, [False, False]) == Compute(
        3 * whole, 6 * whole, 3 * (whole - 100 * 1000)
    )
    assert compute_of(config, args, cost, [True, False]).backward == 6 * whole + 3 * blocks / 2
    # Two ranks share the sequences, and both encode all images.
    config.parallelism.context_parallel_degree = 2
    shared, encoder = whole - 100 * 500, 100 * 500
    assert compute_of(config, args, cost, [False, False]) == Compute(
        3 * (encoder + shared / 2),
        6 * (encoder + shared / 2),
        3 * (encoder + (shared - 100 * 1000) / 2),
    )


def test_gradients_that_are_reduced_once_are_counted_unsharded():
    def report(gradient_sync):
        path = str(ROOT / "train_configs/debug.toml")
        sync = ["--parallelism.fsdp_gradient_sync", gradient_sync]
        config = load_job_config(
            ["--job.config_file", path, "--training.global_batch_size", "16", *sync]
        )
        return show_parallel.report(config, 2)

    always, last = report("always"), report("last")
    held = last["gathered"]["unsharded_gradients"]
    assert (
        always["gathered"]["unsharded_gradients"] == 0 and last["total"] - always["total"] == held
    )
    assert held == 4 * sum(prod(p["shape"]) * p["count"] for p in last["parameters"])
    scattered = [r["traffic_of_a_step"]["reduce_scatter"] for r in (always, last)]
    assert scattered[0] == last["micro_batches"] * scattered[1] > scattered[1] > 0
