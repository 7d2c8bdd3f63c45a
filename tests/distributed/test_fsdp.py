"""What FSDP sends and when, on real processes: as planned, the next block ahead, and every way of resharding with equal results."""

from contextlib import nullcontext
from math import prod

import pytest
import torch
import torch.distributed as dist

from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.parallel import (
    dry_run,
    fsdp,
)
from tests.helpers.debug_model import backward, build, config_of, forward
from tests.helpers.gloo import run_on_ranks

RANKS = 2
CASES = {
    "default": "",
    "always": "--parallelism.fsdp_reshard_after_forward always",
    "never": "--parallelism.fsdp_reshard_after_forward never",
    "full": "--activation_checkpoint.mode full",
    "per_op": "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option op",
    "bfloat16": "--training.mixed_precision_param bfloat16",
    "expert_parallel": "--parallelism.expert_parallel_degree 2",
    "expert_parallel_full": "--parallelism.expert_parallel_degree 2 --activation_checkpoint.mode full",
    "expert_parallel_per_op": "--parallelism.expert_parallel_degree 2 --activation_checkpoint.mode selective "
    "--activation_checkpoint.selective_ac_option op",
    "always_per_op": "--parallelism.fsdp_reshard_after_forward always --activation_checkpoint.mode selective "
    "--activation_checkpoint.selective_ac_option op",
    # 13 and 3 experts on two ranks: cut inside every expert, and cut between them with padding.
    "odd_experts": "",
    "odd_experts_padded": "",
    # Groups with a width and a top-k of their own.
    "unequal": "",
    "unequal_expert_parallel": "--parallelism.expert_parallel_degree 2 --activation_checkpoint.mode selective "
    "--activation_checkpoint.selective_ac_option op",
    "deepstack": "",
    "deepstack_per_op": "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option op",
}
EXCHANGING = [case for case in CASES if case.startswith("expert_parallel")]
PLAIN = ("default", "unequal", "deepstack")  # compared with one process
# Features leave the ViT after both of its blocks.
VIT = {"temporal_patch": 2, "position_grid": 5, "deepstack": (0, 1)}


# torch 2.13 has new names for the two collectives that FSDP calls.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
SCATTER = "reduce_scatter_single" if hasattr(dist, "all_gather_single") else "reduce_scatter_tensor"


class Wire:
    """Counts the bytes that FSDP hands to torch.distributed while ``patch`` is in force."""

    def __init__(self, patch):
        self.gathered = self.scattered = self.num_gathers = 0
        self.patch = patch
        self._wrap(dist, GATHER, self._gather)
        self._wrap(dist, SCATTER, self._scatter)

    def _wrap(self, owner, name, note):
        original = getattr(owner, name)

        def noted(*args, **kwargs):
            note(*args, **kwargs)
            return original(*args, **kwargs)

        self.patch.setattr(owner, name, noted)

    def _gather(self, *args, **kwargs):
        self.gathered += (kwargs["output_tensor"] if "output_tensor" in kwargs else args[0]).nbytes
        self.num_gathers += 1

    def _scatter(self, *args, **kwargs):
        self.scattered += (kwargs["input"] if "input" in kwargs else args[1]).nbytes


def norm_in_one_process(args):
    """Of the gradients of the same step: a plain model reads the rows of all ranks."""
    model = SymbioticModel(args)
    model.init_weights()
    for rank in range(RANKS):
        backward(forward(model, args, rank))
    return float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())


def on_rank(rank, case, patch):
    """Shards, traffic, gathers done when each block computes, and the gradient norm of one step."""
    config = config_of(CASES[case])
    if case.startswith("odd"):
        config.experts.partition["understanding"].num_experts = 13
        config.experts.partition["generation"].num_experts = 3
    if case.startswith("unequal"):
        config.experts.partition["understanding"].top_k = 3
        config.experts.partition["generation"].hidden_dim = 40
        config.experts.partition["generation"].top_k = 1
    if case == "odd_experts_padded":
        patch.setattr(fsdp, "expert_shard_placement", lambda num_ranks: lambda weight: None)
    model, args = build(config, **VIT if case.startswith("deepstack") else {})
    wire = Wire(patch)
    ahead = []
    for block in model.layers.values():
        block.attention_norm.register_forward_pre_hook(lambda *_: ahead.append(wire.num_gathers))
    counts_exchanges = case in EXCHANGING  # reading a profile takes longer than the step
    with torch.profiler.profile() if counts_exchanges else nullcontext() as profile:
        output = forward(model, args, rank)
        forward_bytes, ahead_forward = wire.gathered, list(ahead)
        backward(output)
    events = profile.events() if profile else []
    exchanges = sum(event.name == "c10d::alltoall_base_" for event in events)
    norm = torch.stack([p.grad.full_tensor().norm() for p in model.parameters()]).norm()
    parameters = dry_run.sharded_parameters(model)
    return {
        "parameters": parameters,
        "local": {p.name: tuple(q.to_local().shape) for p, q in zip(parameters, model.parameters(), strict=True)},
        "gathered": (forward_bytes, wire.gathered - forward_bytes),
        "scattered": wire.scattered,
        "ahead": ahead_forward,
        "exchanges": exchanges,
        "norm": float(norm),
        "plain_norm": norm_in_one_process(args) if case in PLAIN else None,
    }  # fmt: skip


def all_cases(rank):
    results = {}
    for case in CASES:
        with pytest.MonkeyPatch.context() as patch:
            results[case] = on_rank(rank, case, patch)
    return results


@pytest.fixture(scope="module")
def results():
    return run_on_ranks(RANKS, all_cases)


@pytest.mark.parametrize("case", CASES)
def test_traffic_is_the_planned_one(results, case):
    config = config_of(CASES[case])
    for result in (rank[case] for rank in results):
        reshard = config.parallelism.fsdp_reshard_after_forward
        stages = dry_run.traffic_by_stage(
            result["parameters"], dry_run.Precision.of(config), reshard
        )
        planned = sum(stages.values(), dry_run.Traffic())
        # A collective of n ranks is counted whole; (n - 1) / n of it leaves the rank.
        forward, backward = (size * (RANKS - 1) // RANKS for size in result["gathered"])
        assert (forward, backward) == (planned.gather_forward, planned.gather_backward)
        assert result["scattered"] * (RANKS - 1) // RANKS == planned.reduce_scatter


@pytest.mark.parametrize("case", CASES)
def test_shards_have_the_planned_shapes(results, case):
    for result in (rank[case] for rank in results):
        assert result["local"] == {p.name: p.local for p in result["parameters"]}
    held = sum(prod(p.local) for rank in results for p in rank[case]["parameters"])
    assert held == sum(prod(p.shape) for p in results[0][case]["parameters"])


def test_an_odd_number_of_experts_is_cut_inside_each(results):
    for case, local, gathered in (
        ("odd_experts", (13, 32, 128), 13),
        ("odd_experts_padded", (7, 64, 128), 14),
    ):
        parameters = {p.name: p for p in results[0][case]["parameters"]}
        experts = parameters["layers.1.moe.experts.understanding.w1"]
        assert experts.local == local and experts.gathered == gathered * 64 * 128


@pytest.mark.parametrize("case", CASES)
def test_the_next_block_is_gathered_before_this_one_computes(results, case):
    for result in (rank[case] for rank in results):
        gathers = {stage: 0 for stage in ("layers.0", "layers.1", "layers.2")}
        before = 0
        for unit, members in dry_run.units_of(result["parameters"]).items():
            if members[0].shard == 1:
                continue  # nothing to gather
            stage = dry_run.stage_of(unit)
            if stage in gathers:
                gathers[stage] += 1
            else:
                before += 1
        first, second, third = gathers.values()
        expected = [before + first + second, before + first + second + third]
        assert result["ahead"] == [*expected, expected[-1]]


@pytest.mark.parametrize("case", EXCHANGING)
def test_checkpointing_repeats_the_planned_exchanges(results, case):
    """Of two layers with experts: token counts, out and back in the forward, two gradients in the backward; the forward's
    three again where a block is recomputed whole, none where they are saved."""
    expected = 2 * (3 + 2 + (3 if case.endswith("full") else 0))
    assert [rank[case]["exchanges"] for rank in results] == [expected] * RANKS


@pytest.mark.parametrize("case", PLAIN)
def test_gradients_are_those_of_one_process(results, case):
    for rank in results:
        assert rank[case]["norm"] == pytest.approx(rank[case]["plain_norm"], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients_do_not_depend_on_how_the_model_is_spread(results, case):
    tolerance = 5e-2 if case == "bfloat16" else 1e-5
    references = {"odd": "odd_experts_padded", "deepstack": "deepstack", "unequal": "unequal"}
    reference = references.get(case.split("_")[0], "default")
    for result in results:
        assert result[case]["norm"] == pytest.approx(results[0][reference]["norm"], rel=tolerance)
