"""The whole layer against a plain loop, and what must hold exactly."""

import re
from dataclasses import replace

import pytest
import torch

from symbiotic_titan.moe.experts import PartitionedMoE
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.sequence.modality import PADDING, TEXT, VAE, VIT
from tests.helpers.forked import ROOT
from tests.helpers.moe_reference import (
    GROUPS,
    POOL,
    UNEQUAL,
    assert_close_with_gradients,
    grads,
    make_args,
    make_layer,
    make_tokens,
    routed_output,
)

NO_SHIELD = torch.tensor(1.0)


@pytest.mark.parametrize("groups", [GROUPS, POOL, UNEQUAL], ids=["two", "one", "unequal"])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_float32_layer_equals_the_plain_loop_forward_and_backward(groups, score_function):
    layer = make_layer(make_args(groups, score_function=score_function, route_scale=1.5))
    x_TD, modality_T = make_tokens()
    out_TD, _ = layer(x_TD, modality_T, NO_SHIELD)
    expected_TD = routed_output(layer, x_TD, modality_T)
    assert_close_with_gradients(out_TD, expected_TD, layer, x_TD)


def test_bfloat16_layer_is_as_close_to_float32_as_the_plain_loop_is():
    layer = make_layer(make_args(), torch.bfloat16)
    exact = make_layer(make_args())
    exact.load_state_dict(layer.state_dict())
    x_TD, modality_T = make_tokens(200, dtype=torch.bfloat16)
    exact_x_TD = x_TD.detach().float().requires_grad_()
    direction_TD = torch.randn(200, 16).bfloat16()

    def run(output, model, x):
        return grads((output * direction_TD.to(output.dtype)).sum().float(), model, x)

    out_TD = layer(x_TD, modality_T, NO_SHIELD)[0]
    plain_TD = routed_output(layer, x_TD, modality_T)
    exact_TD = routed_output(exact, exact_x_TD, modality_T)
    assert out_TD.dtype == torch.bfloat16
    ours, plain = run(out_TD, layer, x_TD), run(plain_TD, layer, x_TD)
    wanted = run(exact_TD, exact, exact_x_TD)

    def error(value, target):
        return ((value.float() - target).norm() / target.norm()).item()

    assert error(out_TD, exact_TD) < 1.5 * error(plain_TD, exact_TD)
    for name in wanted:
        assert error(ours[name], wanted[name]) < 1.5 * error(plain[name], wanted[name]) + 1e-3, name


def test_under_autocast_weights_are_rounded_to_the_dtype_of_the_input():
    layer = make_layer(make_args(shared_hidden_dim=8, shared_gate=True))
    x_TD, modality_T = make_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        out_TD, _ = layer(x_TD.bfloat16(), modality_T, NO_SHIELD)
    assert out_TD.dtype == torch.bfloat16
    exact_TD, _ = layer(x_TD, modality_T, NO_SHIELD)
    assert not torch.equal(out_TD.float(), exact_TD)
    torch.testing.assert_close(out_TD.float(), exact_TD, atol=0.05, rtol=0.05)
    for name, grad in grads(out_TD.sum(), layer, x_TD).items():
        assert grad.dtype == torch.float32, name


def pool_and_its_partition(**changes):
    """A layer with one pool, and a partition of its very weights."""
    pool = make_layer(make_args(POOL, **changes))
    if pool.args.selection_bias:
        pool.router["all"].bias.uniform_(-0.3, 0.3)
    parts = PartitionedMoE(make_args(GROUPS, **changes))
    state = pool.state_dict()
    for name in parts.state_dict():
        for group, rows in (("understanding", slice(0, 7)), ("generation", slice(7, 12))):
            if f".{group}." in name:
                state[name] = state[name.replace(group, "all")][rows].clone()
    parts.load_state_dict({name: state[name] for name in parts.state_dict()})
    return pool, parts


@pytest.mark.parametrize(
    "router",
    [
        {"score_function": "softmax"},
        {"score_function": "sigmoid"},
        {"score_function": "sigmoid", "selection_bias": True, "route_scale": 2.5},
    ],
    ids=["softmax", "sigmoid", "biased"],
)
def test_token_routed_inside_its_group_gets_exactly_the_unpartitioned_output(router):
    """With many rows for every expert: MKL adds in another order where a float32 matmul has one to three, by up to 5e-7."""
    pool, parts = pool_and_its_partition(**router, shared_hidden_dim=8)
    x_TD, modality_T = make_tokens(600)
    choice_TK = pool.router(x_TD, modality_T).experts_TK
    und, gen = (choice_TK < 7).all(-1), (choice_TK >= 7).all(-1)
    inside = torch.where(modality_T == VAE, gen, und) & (modality_T != PADDING)
    assert inside.sum() > 40
    out_pool, _ = pool(x_TD, modality_T, NO_SHIELD)
    out_parts, _ = parts(x_TD, modality_T, NO_SHIELD)
    assert torch.equal(out_pool[inside], out_parts[inside])
    outside = ~inside & (modality_T != PADDING)
    assert not torch.equal(out_pool[outside], out_parts[outside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(dtype):
    layer = make_layer(make_args(shared_hidden_dim=8), dtype)
    x_TD, modality_T = make_tokens(300, dtype=dtype)

    def run():
        out_TD, record = layer(x_TD, modality_T, NO_SHIELD)
        loss = out_TD.float().square().sum() + sum(p.square().sum() for p in record.prob_sum)
        return [out_TD, *grads(loss, layer, x_TD).values()]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_padding_gets_exact_zeros_and_no_gradient_and_touches_no_other_token(bad):
    layer = make_layer(make_args())
    x_TD, modality_T = make_tokens(40)
    clean_TD, _ = layer(x_TD, modality_T, NO_SHIELD)
    dirty_TD = x_TD.detach().clone()
    dirty_TD[modality_T == PADDING] = bad
    dirty_TD.requires_grad_()
    out_TD, _ = layer(dirty_TD, modality_T, NO_SHIELD)
    assert torch.equal(out_TD, clean_TD)
    assert (out_TD[modality_T == PADDING] == 0).all()
    found, expected = (
        grads(out.square().sum(), layer.experts, x)
        for out, x in ((out_TD, dirty_TD), (clean_TD, x_TD))
    )
    for name, grad in found.items():
        if name == "input0":
            real = modality_T != PADDING
            assert torch.equal(grad[real], expected[name][real])
        else:
            assert torch.equal(grad, expected[name]), name


def test_padding_rows_are_not_computed():
    layer = make_layer(make_args())
    rows = []
    for experts in layer.experts.values():
        experts.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    x_TD, modality_T = make_tokens(40)
    layer(x_TD, modality_T, NO_SHIELD)
    assert rows == [20 * 3, 10 * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modalities", [(TEXT, VIT), (VAE,), (PADDING,), ()])
def test_empty_groups_experts_and_batches_have_zero_gradients_that_exist(modalities, dtype):
    layer = make_layer(make_args(shared_hidden_dim=8, shield_modalities=(VAE,)), dtype)
    modality_T = torch.tensor(modalities, dtype=torch.int64)
    x_TD = torch.randn(len(modalities), 16).to(dtype).requires_grad_()
    out_TD, record = layer(x_TD, modality_T, torch.tensor(0.0))
    assert out_TD.shape == x_TD.shape
    loss = out_TD.sum() + sum(p.sum() for p in record.prob_sum)
    routed = {g.name for g in GROUPS if set(g.modalities) & set(modalities)}
    for name, grad in grads(loss, layer, x_TD).items():
        assert torch.isfinite(grad).all(), name
        if name.startswith("experts."):
            assert (grad.count_nonzero() > 0) == (name.split(".")[1] in routed), name


def test_an_expert_that_was_not_chosen_has_a_zero_gradient():
    layer = make_layer(make_args())
    x_TD, modality_T = make_tokens(2)
    out_TD, record = layer(x_TD, modality_T, NO_SHIELD)
    idle = record.counts.sum(0)[:7] == 0
    assert idle.any()
    grad = grads(out_TD.sum(), layer)["experts.understanding.w2"]
    assert (grad[idle] == 0).all() and grad[~idle].abs().amax((1, 2)).min() > 0


def test_three_groups_of_44_42_42_run():
    groups = tuple(ExpertGroup(f"g{i}", (i,), size) for i, size in enumerate((44, 42, 42)))
    layer = make_layer(make_args(groups, top_k=8))
    x_TD, modality_T = make_tokens(64)
    out_TD, record = layer(x_TD, modality_T, NO_SHIELD)
    torch.testing.assert_close(out_TD, routed_output(layer, x_TD, modality_T))
    assert record.counts.shape == (3, 128)


def test_frozen_experts_get_no_gradient_and_pass_one_on():
    layer = make_layer(make_args())
    x_TD, modality_T = make_tokens()
    expected = grads(layer(x_TD, modality_T, NO_SHIELD)[0].sum(), layer, x_TD)["input0"]
    layer.experts.requires_grad_(False)
    out_TD, _ = layer(x_TD, modality_T, NO_SHIELD)
    out_TD.sum().backward()
    assert all(p.grad is None for p in layer.experts.parameters())
    torch.testing.assert_close(x_TD.grad, expected)


def test_inference_mode_gives_the_training_output():
    layer = make_layer(make_args(shared_hidden_dim=8, shield_modalities=(VAE,)))
    x_TD, modality_T = make_tokens()
    out_TD, _ = layer(x_TD, modality_T, NO_SHIELD)
    with torch.inference_mode():
        assert torch.equal(layer(x_TD, modality_T, NO_SHIELD)[0], out_TD)


def test_activation_checkpointing_counts_once_and_changes_nothing():
    from torch.utils.checkpoint import checkpoint

    layer = make_layer(make_args(shared_hidden_dim=8))
    x_TD, modality_T = make_tokens()

    def run(forward):
        out_TD, record = forward(x_TD, modality_T, NO_SHIELD)
        loss = out_TD.square().sum() + record.prob_sum[0].square().sum()
        return [out_TD, record.counts, *grads(loss, layer, x_TD).values()]

    checkpointed = run(lambda *a: checkpoint(layer, *a, use_reentrant=False))
    for ours, expected in zip(checkpointed, run(layer), strict=True):
        assert torch.equal(ours, expected)


def test_layer_is_built_on_meta_without_memory_or_random_numbers():
    before = torch.get_rng_state()
    with torch.device("meta"):
        layer = PartitionedMoE(make_args(shared_hidden_dim=8, selection_bias=True))
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), before)


def reset(layer):
    """What a user does with a model that was built on ``meta``, over memory that held NaN."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(float("nan"))
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


@pytest.mark.parametrize("after", [None, reset], ids=["as built", "reset"])
def test_every_matrix_begins_as_that_of_a_linear_layer(after):
    torch.manual_seed(0)
    args = make_args(dim=48, hidden_dim=64, shared_hidden_dim=80, shared_gate=True)
    layer = PartitionedMoE(replace(args, selection_bias=True))
    if after is not None:
        after(layer)
    for name, weight in layer.named_parameters():
        bound = weight.shape[-1] ** -0.5
        assert bool((weight.abs() <= bound).all()), name
        mean, std = weight.mean().item(), weight.std(correction=0).item()
        error = 4 / weight.numel() ** 0.5  # four standard errors, generously
        assert abs(mean) < error * bound and abs(std / bound * 3**0.5 - 1) < error, name
    assert [b.tolist() for b in layer.buffers()] == [[0.0] * 7, [0.0] * 5]
    w1_EFD = layer.experts["generation"].w1
    assert not torch.equal(w1_EFD[0], w1_EFD[1])


def test_without_a_shield_no_scale_is_needed_and_a_shield_needs_one():
    layer = make_layer(make_args(shared_hidden_dim=8))
    x_TD, modality_T = make_tokens()
    plain_TD = layer(x_TD, modality_T)[0]
    assert torch.equal(plain_TD, layer(x_TD, modality_T, NO_SHIELD)[0])
    shielded = PartitionedMoE(replace(layer.args, shield_modalities=(VAE,)))
    shielded.load_state_dict(layer.state_dict())
    with pytest.raises(
        ValueError, match=r"shield_modalities = \(2,\) needs a shield_scale in every call: 0 stops"
    ):
        shielded(x_TD, modality_T)

    def shared_grads(scale):
        out_TD, _ = shielded(x_TD, modality_T, scale)
        return torch.autograd.grad(out_TD.sum(), [*shielded.shared_experts.parameters()])

    whole = shared_grads(1.0)
    for part, same, all_of_it in zip(
        shared_grads(0.25), shared_grads(torch.tensor(0.25)), whole, strict=True
    ):
        assert torch.equal(part, same) and not torch.equal(part, all_of_it)


def test_the_example_of_the_python_api_computes_and_trains():
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    [code] = re.findall(r"^```python\n(import torch\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(code, "api.md", "exec"), names)  # the page's own block
    out_TD, loss, moe = (names[key] for key in ("out_TD", "loss", "moe"))
    assert out_TD.shape == (100, 64) and 0.005 < out_TD.std().item() < 1
    assert 0 < loss.item() < 2
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert parameter.grad.abs().max() > 0, name
