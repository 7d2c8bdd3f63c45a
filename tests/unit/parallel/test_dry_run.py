"""Shapes, memory and traffic of a rank: against numbers worked out by hand, and against what autograd saves."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.config.job_config import ActivationCheckpoint

from symbiotic_titan.commands import show_parallel
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.model.decoder import TransformerBlock
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.layers import RMSNorm
from symbiotic_titan.model.rope import frequencies, frequency_axes, rotary_tables
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.parallel import dry_run, dry_run_activations, fsdp, parallelize
from tests.helpers.query_models import with_queries

ROOT = Path(__file__).parents[3]
BF16 = dry_run.Precision(stored=4, computed=2, reduced=4)
TOKENS = 64


def parameter(name, unit, shape, local, gathered, **changes):
    settings = {"shard": 4, "replicate": 1, "expert": 1, "trainable": True} | changes
    return dry_run.ShardedParameter(name, unit, shape, local, gathered, **settings)


# Two units of a block on 4 ranks, the experts on 2 x 2, and a root; ten rows do not divide by four.
BY_HAND = [
    parameter("output.weight", "", (10, 8), (3, 8), 96),
    parameter("layers.0.attention.wq.weight", "layers.0", (8, 8), (2, 8), 64),
    parameter(
        "layers.0.moe.experts.all.w1", "layers.0.moe.experts.all", (4, 8, 8), (1, 8, 8), 128,
        shard=2, expert=2,
    ),
]  # fmt: skip


def test_state_is_weights_gradients_and_two_moments():
    assert dry_run.state_memory(BY_HAND, BF16) == dry_run.StateMemory(4 * 104, 4 * 104, 8 * 104)
    frozen = [replace(BY_HAND[0], trainable=False), *BY_HAND[1:]]
    assert dry_run.state_memory(frozen, BF16) == dry_run.StateMemory(4 * 104, 4 * 80, 8 * 80)


def test_weights_send_what_does_not_stay():
    # Three quarters of 96 and 64, half of 128.
    assert dry_run.weight_traffic(BY_HAND, BF16, 1) == dry_run.Traffic(
        gather_forward=2 * (72 + 48 + 64),
        gather_backward=2 * (72 + 48 + 64),
        reduce_scatter=4 * (72 + 48 + 64),
    )
    assert dry_run.weight_traffic(BY_HAND, BF16, 0).gather_backward == 0


def test_an_average_is_counted_in_float32_whatever_the_weights():
    halves = replace(BF16, stored=2)
    averaged = dry_run.state_memory(BY_HAND, halves, {"output.weight"})
    assert averaged == dry_run.StateMemory(2 * 104, 2 * 104, 4 * 104, 4 * 24)
    assert averaged.total == 8 * 104 + 4 * 24


def test_routers_travel_in_float32_whatever_the_others_do():
    name = "layers.0.moe.router.all.weight"
    router = parameter(name, "layers.0.moe.router", (4, 8), (1, 8), 32, replicate=2)
    halves = dry_run.Precision(stored=4, computed=2, reduced=2)
    assert dry_run.weight_traffic([router], halves, 1) == dry_run.Traffic(
        gather_forward=4 * 24, gather_backward=4 * 24, reduce_scatter=4 * 24, all_reduce=4 * 8
    )
    memory = dry_run.gathered_memory([router], halves, "default")
    assert memory == dry_run.GatheredMemory("layers.0.moe.router", 4 * 32, 4 * 32, 4 * 32)


def test_replicas_sum_their_shards():
    replicated = [replace(p, replicate=2) for p in BY_HAND]
    # A ring over two replicas sends each shard once: 96 / 4, 64 / 4, 128 / 2 numbers.
    assert dry_run.weight_traffic(replicated, BF16, 1).all_reduce == 4 * (24 + 16 + 64)


def test_frozen_weights_send_no_gradients():
    frozen = [replace(p, trainable=False, replicate=2) for p in BY_HAND]
    traffic = dry_run.weight_traffic(frozen, BF16, 1)
    assert traffic.reduce_scatter == traffic.all_reduce == 0 and traffic.gather_forward > 0


@pytest.mark.parametrize(
    ("reshard", "expected"),
    [("default", [0, 0, 1, 0]), ("always", [1, 0, 1, 2]), ("never", [0, 0, 0, 0])],
)
def test_backward_gathers_what_was_freed(reshard, expected):
    stages = ("", "tok_embeddings", "layers.0", "layers.1")
    assert [dry_run.gathers_in_backward(s, "layers.1", reshard) for s in stages] == expected


def test_exchange_goes_out_and_back_in_both_directions():
    # 100 copies of 8 numbers in bf16; three of four ranks are elsewhere.
    traffic = dry_run.exchange_traffic(100, 8, 4, BF16, recomputed=False)
    assert traffic == dry_run.Traffic(exchange_forward=2 * 1200, exchange_backward=2 * 1200)
    again = dry_run.exchange_traffic(100, 8, 4, BF16, recomputed=True)
    assert again == dry_run.Traffic(exchange_forward=2 * 1200, exchange_backward=4 * 1200)
    assert dry_run.exchange_traffic(100, 8, 1, BF16, recomputed=True) == dry_run.Traffic()


def test_stages_hold_all_traffic_of_their_units():
    exchange = dry_run.Traffic(exchange_forward=5)
    stages = dry_run.traffic_by_stage(BY_HAND, BF16, "default", {"layers.0": exchange})
    assert list(stages) == ["", "layers.0"]
    assert stages["layers.0"].exchange_forward == 5
    total = sum(stages.values(), dry_run.Traffic())
    assert total == dry_run.weight_traffic(BY_HAND, BF16, 0) + exchange
    assert total.forward.total == total.gather_forward + 5


def test_gathered_memory_is_the_root_and_two_neighbouring_blocks():
    blocks = [
        parameter(f"layers.{i}.attention.wq.weight", f"layers.{i}", (n,), (n // 4,), n)
        for i, n in enumerate((40, 80, 60, 20))
    ]
    memory = dry_run.gathered_memory([*blocks, BY_HAND[0]], BF16, "default")
    assert memory == dry_run.GatheredMemory("root", 2 * 96, 4 * 96, 2 * (80 + 60 + 96))
    assert dry_run.gathered_memory(blocks, BF16, "never").peak == 2 * 200
    assert dry_run.gathered_memory(blocks, BF16, "default").unit == "layers.1"


def test_equal_layers_share_a_row():
    blocks = [
        parameter(f"vit.layers.{i}.wo.weight", f"vit.layers.{i}", (8, 8), (2, 8), 64)
        for i in range(3)
    ]
    assert dry_run.shape_rows(blocks) == [
        {
            "kind": "vit",
            "parameter": "vit.layers.*.wo.weight",
            "shape": (8, 8),
            "local": (2, 8),
            "count": 3,
        }
    ]
    (row,) = dry_run.traffic_rows(dry_run.traffic_by_stage(blocks, BF16, "default"))
    assert row["stage"] == "vit.layers.0 to vit.layers.2" and row["count"] == 3


# ---- the real model on fake ranks --------------------------------------------------------------------------------------------


def config_of(*overrides, name="debug"):
    path = ROOT / "train_configs" / f"{name}.toml"
    return load_job_config(["--job.config_file", str(path), *overrides])


def on_fake_ranks(num_ranks, *overrides):
    config = config_of(*overrides)
    args = FLAVORS[config.model.flavor]
    args.update_from_config(config)
    return [
        show_parallel.parameters_of_rank(config, args, rank, num_ranks)[0]
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize(
    ("num_ranks", "overrides"),
    [
        (4, "--activation_checkpoint.mode full"),
        (4, "--parallelism.expert_parallel_degree 2"),
        (8, "--parallelism.expert_parallel_degree 2 --parallelism.data_parallel_replicate_degree 2"),
        (8, ""),
    ],
    ids=["fsdp", "ep", "ep_hsdp", "uneven"],
)  # fmt: skip
def test_shards_of_all_ranks_make_up_the_model(num_ranks, overrides):
    ranks = on_fake_ranks(num_ranks, *overrides.split())
    for shards in zip(*ranks, strict=True):
        first = shards[0]
        assert len({(p.name, p.unit, p.gathered) for p in shards}) == 1
        held = sum(prod(p.local) for p in shards)
        assert held == prod(first.shape) * first.replicate
        # Padding makes every shard as large as the first rank's.
        assert first.gathered == prod(first.local) * first.shard


def test_units_are_blocks_grouped_experts_and_shared_experts():
    (parameters, *_) = on_fake_ranks(2)
    units = set(dry_run.units_of(parameters))
    assert {"", "vit", "vit.layers.0", "latent_embedding", "tok_embeddings", "layers.0"} <= units
    assert {
        "layers.2",
        "layers.2.moe.experts.understanding",
        "layers.2.moe.experts.generation",
        "layers.2.moe.shared_experts",
    } <= units


def test_few_experts_are_cut_inside_and_not_padded():
    (parameters, *_) = on_fake_ranks(8)
    experts = {p.name: p for p in parameters}["layers.1.moe.experts.generation.w1"]
    assert experts.shape == (4, 64, 128) and experts.local == (4, 8, 128)
    assert experts.gathered == prod(experts.shape)


@pytest.mark.parametrize("offload", [True, False])
def test_offload_to_the_cpu_reaches_every_unit(offload, monkeypatch):
    policies, original = [], fsdp.fully_shard

    def noted(module, **options):
        policies.append(options["offload_policy"])
        return original(module, **options)

    monkeypatch.setattr(fsdp, "fully_shard", noted)
    (parameters, *_) = on_fake_ranks(2, *(["--training.enable_cpu_offload"] if offload else []))
    assert len(policies) == 2 * len(dry_run.units_of(parameters))  # of both ranks
    assert {isinstance(policy, CPUOffloadPolicy) for policy in policies} == {offload}


def test_one_rank_needs_no_traffic_and_gathers_nothing_apart():
    (parameters,) = on_fake_ranks(1)
    assert {(p.shard, p.unit) for p in parameters} == {(1, "")}
    assert dry_run.weight_traffic(parameters, BF16, 1) == dry_run.Traffic()
    # Routers compute with their stored float32, without a copy.
    num_copied = sum(prod(p.shape) for p in parameters if p.kind != "router")
    assert dry_run.gathered_memory(parameters, BF16, "default").peak == 2 * num_copied


def test_tool_prints_a_table_and_one_line_of_json(capsys):
    path = str(ROOT / "train_configs/debug.toml")
    overrides = ["--training.global_batch_size", "-1", "--parallelism.expert_parallel_degree", "2"]
    overrides += ["--ema.enable"]
    assert show_parallel.main([path, "--ranks", "2", "4", "--json", *overrides]) == 0
    *text, line = capsys.readouterr().out.splitlines()
    assert any("experts understanding" in row and "6 x 64 x 128" in row for row in text)
    two, four = json.loads(line)["reports"]
    assert two["state"]["parameters"] > four["state"]["parameters"]
    assert two["state"]["ema"] == two["state"]["parameters"]  # of all, both in float32
    assert two["traffic_of_a_step"]["exchange_forward"] > 0


def test_tool_refuses_a_layout_that_does_not_fit(capsys):
    path = str(ROOT / "train_configs/debug.toml")
    assert (
        show_parallel.main([path, "--ranks", "2", "--parallelism.expert_parallel_degree", "4"]) == 2
    )
    assert "does not divide the 2 ranks" in capsys.readouterr().err


# ---- activations -------------------------------------------------------------------------------------------------------------


class FusedNorm(torch.autograd.Function):
    """RMSNorm that saves what the CUDA kernel saves; on a CPU the composite saves more."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x)
        return F.rms_norm(x, weight.shape, weight, eps)


def grouped(rows_ND, w1, w2, w3, counts_E):
    """The CUDA path of the grouped experts, which a CPU has too, at another speed."""
    offsets = counts_E.cumsum(0).to(torch.int32)
    gate, up = (F.grouped_mm(rows_ND, w.transpose(1, 2), offs=offsets) for w in (w1, w3))
    return F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=offsets)


def block_and_inputs(args, layer, monkeypatch):
    """Block ``layer`` in float32, and what its forward takes."""
    monkeypatch.setattr(
        RMSNorm, "forward", lambda self, x: FusedNorm.apply(x, self.weight, self.eps)
    )
    block = TransformerBlock(args, layer)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    for experts in block.moe.experts.values() if layer else ():
        experts.swiglu = grouped
    num = args.rotary_dim // 2
    axes = frequency_axes(args.mrope, args.mrope_sections, num, torch.device("cpu"))
    positions = torch.arange(TOKENS).view(1, -1, 1).expand(1, -1, 3)
    rotary = rotary_tables(positions, axes, frequencies(num, args.rope_theta, positions.device))
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    h = torch.randn(1, TOKENS, args.dim, requires_grad=True)
    modality = torch.arange(TOKENS).view(1, -1) % 3
    return block, (h, rotary, mask, modality, torch.tensor(1.0))


# The estimate is that of the group which saves most: here the one of the wider experts, which chooses fewer of them.
UNEQUAL = (
    ExpertGroup("understanding", (0, 1), 12, hidden_dim=16, top_k=3),
    ExpertGroup("generation", (2,), 4, hidden_dim=192),
)


@pytest.mark.parametrize(
    ("layer", "groups"), [(0, ()), (1, ()), (1, UNEQUAL)], ids=["dense", "experts", "unequal"]
)
def test_saved_bytes_are_those_that_autograd_saves(layer, groups, monkeypatch):
    args = replace(FLAVORS["debug"], groups=groups)
    block, inputs = block_and_inputs(args, layer, monkeypatch)
    if groups:
        inputs[3].fill_(2)
    constant = [*block.parameters(), inputs[2], *inputs[1]]
    known = {t.untyped_storage().data_ptr() for t in constant}
    saved = {}  # kept alive, so that no storage is used twice

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(*inputs)
    measured = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in known)
    estimate = TOKENS * dry_run_activations.saved_by_block(args, 4, TOKENS, has_experts=bool(layer))
    # In float32 the router needs no copy of its input; indices are left out of the dry_run.
    estimate -= TOKENS * 4 * args.dim * layer
    assert measured == pytest.approx(estimate, rel=0.03)


class SavedByPolicy(TorchDispatchMode):
    """Bytes that per-op checkpointing keeps: listed ops, of matrix products every second."""

    def __init__(self):
        super().__init__()
        self.num_bytes = self.num_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_product = func == torch.ops.aten.mm.default
        self.num_products += is_product
        if func in parallelize._SAVED_OPS and not (is_product and self.num_products % 2 == 0):
            tensors = result if isinstance(result, tuple) else (result,)
            self.num_bytes += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
        return result


@pytest.mark.parametrize(
    ("layer", "groups"), [(0, ()), (1, ()), (1, UNEQUAL)], ids=["dense", "experts", "unequal"]
)
def test_per_op_bytes_are_those_of_the_saved_ops(layer, groups, monkeypatch):
    args = replace(FLAVORS["debug"], groups=groups)
    block, inputs = block_and_inputs(args, layer, monkeypatch)
    if groups:
        inputs[3].fill_(2)
    with SavedByPolicy() as kept:
        block(*inputs)
    estimate = dry_run_activations.saved_per_op(
        args, 4, has_experts=bool(layer), expert_parallel=False
    )
    assert kept.num_bytes + 4 * TOKENS * args.dim == pytest.approx(TOKENS * estimate, rel=0.03)


def test_modes_differ_as_their_formulas_say():
    def decoder(*overrides):
        config = config_of(*overrides)
        args = FLAVORS["debug"]
        memory = dry_run_activations.activation_memory(config, args, BF16, expert_parallel=False)
        return memory.decoder, memory.recomputed

    everything, nothing_again = decoder("--activation_checkpoint.mode", "none")
    full, again = decoder("--activation_checkpoint.mode", "full")
    per_op, _ = decoder(
        "--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op"
    )  # fmt: skip
    assert nothing_again == 0 and again > 0
    assert full == 3 * 768 * 128 * 2 and full < per_op < everything


def test_patches_that_queries_read_are_held_for_whole_images():
    """A square of 8 patches a side becomes six tokens, so 96 tokens are 16 images."""

    def images(args, *overrides):
        config = config_of("--model.attention_backend", args.attention_backend, *overrides)
        memory = dry_run_activations.activation_memory(config, args, BF16, expert_parallel=False)
        return memory.vit, memory.masks

    squares = replace(FLAVORS["debug"], attention_backend="flex")
    queries = with_queries(squares, {8: 6})
    num_patches, length, rows = 16 * 8**2, 384, 2
    assert images(queries)[0] * 96 * 4 == images(squares)[0] * num_patches
    assert images(queries, "--data.max_vit_tokens", "101") == images(queries)
    _, masks = images(replace(queries, attention_backend="sdpa"))
    assert masks == rows * (length**2 + num_patches**2 + 96 * num_patches)


def test_every_second_layer_is_recomputed():
    config = ActivationCheckpoint(mode="selective", selective_ac_option="2")
    assert dry_run_activations.recomputed_blocks(config, 5) == [False, True, False, True, False]
    config = ActivationCheckpoint(mode="selective", selective_ac_option="op")
    assert dry_run_activations.recomputed_blocks(config, 2) == [False, False]
    assert dry_run_activations.recomputed_blocks(ActivationCheckpoint(mode="full"), 2) == [
        True,
        True,
    ]
