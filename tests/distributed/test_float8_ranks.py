"""What float8 adds between ranks: weights gathered in float8, with the scales that the hook after the step computes, and
experts whose rows come in whole blocks."""

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model_converter import build_model_converters

from symbiotic_titan.config.job import (
    Float8,
    JobConfig,
)
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.kernels import grouped_swiglu
from symbiotic_titan.parallel.expert_parallel import apply_expert_parallel
from symbiotic_titan.parallel.float8 import FLOAT8_MULTIPLE, register_float8
from symbiotic_titan.parallel.fsdp import apply_fsdp
from symbiotic_titan.sequence.batch import stack_rows
from tests.distributed.test_expert_parallel import (
    CASES,
    make_inputs,
    make_layer,
    step,
)
from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny_models import MIXED, OTHER, pack_row, tiny_args

DIMS = {"dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1, "pp": 1, "ep": 1, "etp": 1}


def make_args():
    # The gate stays in float32: gloo can gather a unit only if not all of its weights are float8.
    return tiny_args(expert_hidden_dim=32, shared_hidden_dim=32, shared_gate=True)


def make_model(all_gather):
    config, dims = JobConfig(), ParallelDims(**DIMS, world_size=2)
    config.model.converters = ["float8"]
    config.float8 = Float8(emulate=True, all_gather=all_gather)
    config.training.mixed_precision_param = "float32"
    dims.build_mesh()
    register_float8()
    converters = build_model_converters(config, dims)
    with torch.device("meta"):
        model = SymbioticModel(make_args())
    converters.convert(model)
    apply_fsdp(model, dims, config)
    model.to_empty(device="cpu")
    model.init_weights()
    return model, converters


def three_steps(rank, all_gather):
    """(losses of three steps, names of the weights whose scale is ready, the trained weights, the loss after loading them)."""
    model, converters = make_model(all_gather)
    args = make_args()
    batch = stack_rows([pack_row(MIXED, args), pack_row(OTHER, args, seed=10)])
    timesteps_BL = torch.linspace(0.1, 0.9, batch.vae_image.shape[1]).expand(batch.vae_image.shape)

    def loss_of(model):
        output = model(batch, batch.latents, timesteps_BL, torch.tensor(1.0))
        return output.logits.square().mean()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    losses = []
    for _ in range(3):
        loss = loss_of(model)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        converters.post_optimizer_hook([model])
    scaled = {
        name
        for name, parameter in model.named_parameters()
        if getattr(parameter._local_tensor, "_precomputed_scale", None) is not None
    }
    weights = {name: value.full_tensor() for name, value in get_model_state_dict(model).items()}
    fresh, _ = make_model(all_gather)
    set_model_state_dict(fresh, get_model_state_dict(model))
    with torch.no_grad():
        reloaded = (loss_of(model).item(), loss_of(fresh).item())
    return losses, scaled, weights, reloaded


def both_ways(rank):
    return three_steps(rank, True), three_steps(rank, False)


def test_gathering_in_float8_changes_no_number():
    (in_float8, plain), _ = run_on_ranks(2, both_ways)
    losses, scaled, weights, reloaded = in_float8
    expected_losses, none_scaled, expected_weights, _ = plain
    assert losses == expected_losses and losses[0] != losses[2]
    assert {name.rpartition(".")[0] for name in scaled} == {
        *(f"layers.{i}.attention.{w}" for i in (0, 1) for w in ("wq", "wk", "wv", "wo")),
        *(f"layers.0.feed_forward.{w}" for w in ("w1", "w2", "w3")),
        *(f"layers.1.moe.shared_experts.{w}" for w in ("w1", "w2", "w3")),
    }
    assert not none_scaled
    for name, expected in expected_weights.items():
        assert torch.equal(torch.as_tensor(weights[name]), expected), name
    assert reloaded[0] == reloaded[1]


def in_blocks(rank, block_rows):
    """For every case: (rows of each expert on this rank, output, gradients of the layer's own shards)."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    results = {}
    for case, modalities in CASES.items():
        layer = make_layer(torch.float32)
        apply_expert_parallel(layer, mesh)
        seen = []

        def watched(*operands, seen=seen):
            seen.append(operands[-1])
            return grouped_swiglu(*operands)

        for experts in layer.experts.values():
            experts.swiglu = watched
        layer.block_rows = block_rows
        out_TD, _ = step(layer, *make_inputs(modalities, rank, torch.float32))
        grads = [getattr(p.grad, "_local_tensor", p.grad) for p in layer.parameters()]
        results[case] = torch.cat(seen), out_TD, grads
    return results


def with_and_without_blocks(rank):
    return in_blocks(rank, FLOAT8_MULTIPLE), in_blocks(rank, 0)


def test_experts_on_two_ranks_get_whole_blocks_of_rows():
    for blocks, plain in run_on_ranks(2, with_and_without_blocks):
        for case in CASES:
            counts, out_TD, grads = blocks[case]
            _, expected_TD, expected = plain[case]
            assert counts.min() >= FLOAT8_MULTIPLE and not (counts % FLOAT8_MULTIPLE).any()
            torch.testing.assert_close(out_TD, expected_TD, msg=case)
            torch.testing.assert_close(grads, expected, atol=1e-4, rtol=1e-4)
