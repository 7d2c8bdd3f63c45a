"""What float8 converts, what it leaves alone, and that the converted model still computes nearly the same."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model_converter import build_model_converters

from symbiotic_titan.config.job import (
    Float8,
    JobConfig,
)
from symbiotic_titan.moe.experts import (
    GroupedExperts,
    PartitionedMoE,
)
from symbiotic_titan.moe.float8_matmul import emulated_float8_swiglu
from symbiotic_titan.moe.kernels import grouped_swiglu
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.parallel.compile import apply_compile
from symbiotic_titan.parallel.float8 import (
    FLOAT8_MULTIPLE,
    convert_grouped_experts,
    register_float8,
    scaled_float8_swiglu,
)
from symbiotic_titan.sequence.batch import stack_rows
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT
from tests.helpers.tiny_models import MIXED, OTHER, pack_row, tiny_args, tiny_model

# Dynamo's own: it looks at .grad of what it traces and makes instances of autograd functions.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning",
    "ignore:.* should not be instantiated:DeprecationWarning",
)

GROUPS = (ExpertGroup("und", (TEXT, VIT), 5), ExpertGroup("gen", (VAE,), 3))
ONE_RANK = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "pp": 1, "ep": 1, "etp": 1}


def make_args(**changes):
    sizes = {"expert_hidden_dim": 32, "shared_hidden_dim": 32, "shared_gate": True}
    return tiny_args(**({"groups": GROUPS} | sizes | changes))


def convert(model, **options):
    register_float8()
    config = JobConfig()
    config.model.converters = ["float8"]
    config.float8 = Float8(**({"emulate": True} | options))
    converters = build_model_converters(config, ParallelDims(**ONE_RANK, world_size=1))
    converters.convert(model)
    return converters


def converted_names(model):
    return {n for n, m in model.named_modules() if type(m).__name__ == "Float8Linear"}


def loss_and_gradients(model):
    args = make_args()
    batch = stack_rows([pack_row(MIXED, args), pack_row(OTHER, args, seed=10)])
    timesteps_BL = torch.linspace(0.1, 0.9, batch.vae_image.shape[1]).expand(batch.vae_image.shape)
    model.zero_grad()
    output = model(batch, batch.latents, timesteps_BL, torch.tensor(0.5))
    used_BT = batch.document >= 0  # logits of padding have no meaning
    loss = output.logits[used_BT].square().mean() + output.velocity.square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_converted_are_the_big_layers_of_the_decoder_and_nothing_else():
    model = tiny_model(make_args())
    convert(model)
    expected = {f"layers.{i}.attention.{w}" for i in (0, 1) for w in ("wq", "wk", "wv", "wo")}
    expected |= {f"layers.0.feed_forward.{w}" for w in ("w1", "w2", "w3")}
    expected |= {f"layers.1.moe.shared_experts.{w}" for w in ("w1", "w2", "w3")}
    assert converted_names(model) == expected
    others = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - expected
    assert {"output", "layers.1.moe.shared_experts.gate"} <= others
    for name in ("router", "vit.", "flow_head.", "latent_embedding."):
        assert any(name in p for p, _ in model.named_parameters())
        assert not any(name in converted for converted in converted_names(model))
    groups = [m for m in model.modules() if isinstance(m, GroupedExperts)]
    assert len(groups) == 2 and all(experts.swiglu is emulated_float8_swiglu for experts in groups)


def test_experts_false_leaves_grouped_experts_alone():
    model = tiny_model(make_args())
    convert(model, experts=False)
    groups = [m for m in model.modules() if isinstance(m, GroupedExperts)]
    assert all(experts.swiglu is grouped_swiglu for experts in groups)
    assert converted_names(model)


def test_a_dim_that_does_not_fit_is_left_out_and_named(caplog):
    model = tiny_model(make_args(dense_hidden_dim=40))
    with caplog.at_level(logging.INFO):
        convert(model)
    assert "layers.0.feed_forward.w1" not in converted_names(model)
    assert (
        "float8 leaves out layers.0.feed_forward.w1, layers.0.feed_forward.w2, layers.0.feed_forward.w3: "
        "a dim is no multiple of 16" in caplog.text
    )
    assert "float8, emulated: 11 linear layers (tensorwise), 2 groups of experts" in caplog.text


def test_names_and_values_of_parameters_stay():
    model = tiny_model(make_args())
    before = {name: p.clone() for name, p in model.state_dict().items()}
    convert(model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


UNEQUAL = (replace(GROUPS[0], top_k=3), replace(GROUPS[1], hidden_dim=16))


@pytest.mark.parametrize(
    ("recipe", "groups"),
    [
        ("tensorwise", GROUPS),
        ("rowwise", GROUPS),
        ("rowwise_with_gw_hp", GROUPS),
        ("rowwise", UNEQUAL),
    ],
    ids=["tensorwise", "rowwise", "rowwise_with_gw_hp", "unequal groups"],
)
def test_loss_and_gradients_stay_near_those_of_float32(recipe, groups):
    """Each rounded matmul adds about 4 percent of noise to a tensor; the loss, a mean, moves far less."""
    model = tiny_model(make_args(groups=groups))
    rounded = copy.deepcopy(model)
    convert(rounded, recipe=recipe)
    loss, gradients = loss_and_gradients(model)
    rounded_loss, rounded_gradients = loss_and_gradients(rounded)
    assert 0 < abs(rounded_loss - loss) < 0.02 * loss
    for name, exact in gradients.items():
        error = float((rounded_gradients[name] - exact).norm() / exact.norm())
        assert error < 0.3, (name, error)


def test_emulation_compiles_without_a_graph_break():
    torch._dynamo.reset()
    eager = tiny_model(make_args())
    convert(eager)
    compiled = copy.deepcopy(eager)
    apply_compile(compiled, "aot_eager")
    loss, gradients = loss_and_gradients(eager)
    compiled_loss, compiled_gradients = loss_and_gradients(compiled)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-4, atol=0)
    for name, expected in gradients.items():
        assert (compiled_gradients[name] - expected).norm() <= 1e-2 * expected.norm(), name
    torch._dynamo.reset()


def test_every_expert_gets_whole_blocks_of_rows_where_the_kernel_asks():
    model = tiny_model(make_args())
    expected_loss, expected = loss_and_gradients(model)
    rows_of_experts = []

    def watched(*operands):
        rows_of_experts.append(operands[-1])
        return grouped_swiglu(*operands)

    for module in model.modules():
        if isinstance(module, GroupedExperts):
            module.swiglu = watched
        if isinstance(module, PartitionedMoE):
            module.block_rows = FLOAT8_MULTIPLE
    loss, gradients = loss_and_gradients(model)
    counts = torch.cat(rows_of_experts)
    assert counts.min() >= FLOAT8_MULTIPLE and not (counts % FLOAT8_MULTIPLE).any()
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradients, expected)


def test_the_kernel_on_a_gpu_asks_for_blocks_of_rows():
    for emulate, block_rows in ((True, 0), (False, FLOAT8_MULTIPLE)):
        model = tiny_model(make_args())
        assert convert_grouped_experts(model, emulate) == 2
        assert model.layers["1"].moe.block_rows == block_rows


def test_hook_after_the_step_does_nothing_on_one_rank():
    model = tiny_model(make_args())
    converters = convert(model, all_gather=True)
    before = copy.deepcopy(model.state_dict())
    converters.post_optimizer_hook([model])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.gpu
def test_kernel_on_a_gpu_equals_the_emulation():
    counts = torch.tensor([32, FLOAT8_MULTIPLE, 64], device="cuda")
    shapes = [(112, 64), (3, 96, 64), (3, 64, 96), (3, 96, 64)]
    tensors = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(0.5).requires_grad_()
        for shape in shapes
    ]
    results = []
    for kernel in (scaled_float8_swiglu(), emulated_float8_swiglu):
        out_ND = kernel(*tensors, counts)
        results.append((out_ND, *torch.autograd.grad(out_ND.float().square().sum(), tensors)))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).float().norm() <= 0.03 * expected.float().norm()
