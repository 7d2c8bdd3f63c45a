"""What is compiled has no graph break, equals eager, and is compiled once: no later batch, step or shield compiles again."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from symbiotic_titan.model.args import one_pool
from symbiotic_titan.model.rope import RotaryTables, rotate
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.parallel.compile import apply_compile, compile_units
from symbiotic_titan.sequence.batch import PackedBatch, stack_rows
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT
from tests.helpers.tiny_models import (
    MIXED,
    OTHER,
    deep_args,
    pack_row,
    tiny_args,
    tiny_model,
)

# Dynamo's own: it looks at .grad of what it traces and makes instances of autograd functions.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning",
    "ignore:.* should not be instantiated:DeprecationWarning",
)

GROUPS = (ExpertGroup("und", (TEXT, VIT), 5), ExpertGroup("gen", (VAE,), 3))
TEXT_ONLY = [[("text", 20)], [("text", 11)]]
ONE_TOKEN_IMAGE = [[("text", 3), ("vae", 1, 1), ("text", 4)]]


def shielded_args():
    return tiny_args(groups=GROUPS, num_layers=3, shield_modalities=(VAE,))


def batch_of(documents, seed=0) -> PackedBatch:
    args = shielded_args()
    return stack_rows([pack_row(documents, args, seed), pack_row(OTHER, args, seed + 10)])


def loss_and_gradients(model, batch, scale):
    model.zero_grad()
    timesteps_BL = torch.linspace(0.1, 0.9, batch.vae_image.shape[1]).expand(batch.vae_image.shape)
    output = model(batch, batch.latents, timesteps_BL, torch.tensor(scale))
    used_BT = batch.document >= 0  # logits of padding have no meaning
    loss = output.logits[used_BT].square().mean() + output.velocity.square().mean()
    loss = loss + sum(p.square().sum() for r in output.records for p in r.prob_sum) / 100
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_compiled_model_equals_eager_and_never_compiles_twice():
    eager, compiled = tiny_model(shielded_args()), tiny_model(shielded_args())
    apply_compile(compiled, "aot_eager")
    loss_and_gradients(compiled, batch_of(MIXED), 1.0)
    num_graphs = counters["stats"]["unique_graphs"]
    assert num_graphs > 0
    only_text = stack_rows([pack_row(TEXT_ONLY, shielded_args()) for _ in range(2)])
    for batch, scale in [
        (batch_of(MIXED), 1.0),
        (batch_of(OTHER, seed=3), 0.1),  # other token counts, another shield
        (batch_of(MIXED, seed=2), 0.05),  # on a ramp
        (batch_of(ONE_TOKEN_IMAGE, seed=4), 0.0),
        (only_text, 0.0),  # a group without a token
    ]:
        loss, gradients = loss_and_gradients(compiled, batch, scale)
        expected_loss, expected = loss_and_gradients(eager, batch, scale)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert not counters["graph_break"]


def test_unequal_groups_compile_once_and_equal_eager():
    own = (replace(GROUPS[0], top_k=3), replace(GROUPS[1], hidden_dim=40, top_k=1))
    args = replace(shielded_args(), groups=own)
    eager, compiled = tiny_model(args), tiny_model(args)
    apply_compile(compiled, "aot_eager")
    num_graphs = 0
    for batch in (batch_of(MIXED), batch_of(OTHER, seed=3)):
        loss, gradients = loss_and_gradients(compiled, batch, 0.1)
        expected_loss, expected = loss_and_gradients(eager, batch, 0.1)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)
        num_graphs = num_graphs or counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == num_graphs > 0
    assert not counters["graph_break"]


def test_deepstack_adds_no_graph():
    """What is added between two blocks must leave the next one's input in the form that the first one's has."""
    counts = []
    for args in (deep_args(), tiny_args()):
        torch._dynamo.reset()
        counters.clear()
        args = replace(args, num_dense_layers=0)
        eager, compiled = tiny_model(args), tiny_model(args)
        apply_compile(compiled, "eager")
        loss, gradients = loss_and_gradients(compiled, batch_of(MIXED), 1.0)
        expected_loss, expected = loss_and_gradients(eager, batch_of(MIXED), 1.0)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1]


def test_equal_blocks_share_their_graphs():
    counts = []
    for num_layers in (3, 6):
        torch._dynamo.reset()
        counters.clear()
        model = tiny_model(tiny_args(groups=GROUPS, num_layers=num_layers))
        apply_compile(model, "eager")
        loss_and_gradients(model, batch_of(MIXED), 1.0)
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1]


def test_every_matmul_of_a_block_is_in_a_unit():
    model = tiny_model(tiny_args(groups=one_pool(8)))
    units = {f"{type(u.owner).__name__}.{u.attribute}" for u in compile_units(model)}
    assert units == {
        "VitBlock.forward", "TransformerBlock.attend", "TransformerBlock.feed",
        "Router.forward", "GroupedExperts.swiglu", "SharedExpert.forward",
    }  # fmt: skip


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_compiled_rotation_and_its_gradient_are_those_of_the_eager_one(interleaved):
    tables = RotaryTables(*torch.rand(2, 1, 5, 3).unbind())
    x_BUTC = torch.randn(1, 2, 5, 8, requires_grad=True)
    results = []
    for apply in (rotate, torch.compile(rotate, backend="eager", fullgraph=True)):
        out_BUTC = apply(2 * x_BUTC, tables, interleaved)
        results.append((out_BUTC, *torch.autograd.grad(out_BUTC.square().sum(), x_BUTC)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled) and eager.abs().min() > 0
