"""The router's choice, its weights and what it reports."""

import pytest
import torch

from symbiotic_titan.moe.partition import ExpertGroup, MoEArgs
from symbiotic_titan.moe.router import Router
from symbiotic_titan.sequence.modality import NUM_MODALITIES, PADDING, TEXT, VAE, VIT
from tests.helpers.moe_reference import GROUPS, POOL, make_args, make_layer, make_tokens, route


def make_router(**changes):
    return make_layer(make_args(**changes)).router


def test_router_never_leaves_its_group():
    x_TD, modality_T = make_tokens(400)
    experts_TK = make_router()(x_TD, modality_T).experts_TK
    understanding = modality_T < VAE
    assert (experts_TK[understanding] < 7).all()
    assert (experts_TK[modality_T == VAE] >= 7).all()


def test_a_token_never_gets_an_expert_twice():
    x_TD, modality_T = make_tokens(400)
    routing = make_router(top_k=5)(x_TD, modality_T)
    for row in routing.experts_TK[modality_T != PADDING]:
        assert len(set(row.tolist())) == 5


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_choice_weights_and_probabilities_equal_the_reference(score_function, normalize, bias):
    layer = make_layer(
        make_args(
            score_function=score_function,
            normalize_weights=normalize,
            selection_bias=bias,
            route_scale=2.5,
        )
    )
    if bias:
        for router in layer.router.values():
            router.bias.normal_(std=2.0)
    x_TD, modality_T = make_tokens()
    routing = layer.router(x_TD, modality_T)
    sums = [torch.zeros(g.num_experts) for g in GROUPS]
    for t, modality in enumerate(modality_T.tolist()):
        if modality == PADDING:
            continue
        group, experts, weights, probabilities = route(layer, x_TD[t : t + 1], modality)
        index = GROUPS.index(group)
        assert (routing.experts_TK[t] - 7 * index).tolist() == experts[0].tolist()
        torch.testing.assert_close(routing.weights_TK[t], weights[0])
        sums[index] += probabilities[0].detach()
    for prob_sum, expected in zip(routing.record.prob_sum, sums, strict=True):
        torch.testing.assert_close(prob_sum, expected)


def test_selection_bias_changes_the_choice_and_no_weight():
    router = make_router(selection_bias=True, score_function="sigmoid", normalize_weights=False)
    x_TD, modality_T = make_tokens(40)
    plain = router(x_TD, modality_T)
    router["understanding"].bias[3] = 100.0
    biased = router(x_TD, modality_T)
    text = modality_T == 0
    assert (biased.experts_TK[text] == 3).any(-1).all()
    assert not (plain.experts_TK[text] == 3).any(-1).all()
    scores_T = (x_TD @ router["understanding"].weight[3]).sigmoid()
    chosen = biased.experts_TK[text] == 3
    torch.testing.assert_close(biased.weights_TK[text][chosen], scores_T[text])


def test_normalized_weights_sum_to_the_route_scale():
    x_TD, modality_T = make_tokens()
    for score_function in ("softmax", "sigmoid"):
        router = make_router(score_function=score_function, route_scale=2.5)
        sums_T = router(x_TD, modality_T).weights_TK.sum(-1)
        torch.testing.assert_close(sums_T, torch.full_like(sums_T, 2.5))


def test_scores_are_float32_under_autocast_and_in_a_bfloat16_model():
    router = make_router()
    x_TD, modality_T = make_tokens()
    plain = router(x_TD, modality_T)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = router(x_TD, modality_T)
    assert torch.equal(plain.weights_TK, under_autocast.weights_TK)
    assert router.to(torch.bfloat16)(x_TD.bfloat16(), modality_T).weights_TK.dtype == torch.float32


def test_record_counts_by_modality_without_padding():
    x_TD, modality_T = make_tokens(60)
    routing = make_router()(x_TD, modality_T)
    expected = torch.zeros(NUM_MODALITIES, 12, dtype=torch.int64)
    for row, modality in zip(routing.experts_TK.tolist(), modality_T.tolist(), strict=True):
        if modality != PADDING:
            for expert in row:
                expected[modality, expert] += 1
    assert torch.equal(routing.record.counts, expected)
    assert routing.record.num_tokens.tolist() == [30, 15]


def test_only_padding_gives_empty_finite_numbers_and_zero_gradients():
    router = make_router()
    x_TD = torch.randn(5, 16)
    routing = router(x_TD, torch.full((5,), PADDING))
    assert routing.record.counts.sum() == 0
    assert torch.isfinite(routing.weights_TK).all()
    loss = sum(p.sum() for p in routing.record.prob_sum)
    for grad in torch.autograd.grad(loss, list(router.parameters())):
        assert grad.count_nonzero() == 0


def test_bias_is_a_buffer_and_parameters_are_named_by_group():
    router = Router(make_args(selection_bias=True))
    names = ["understanding.weight", "generation.weight"]
    assert [n for n, _ in router.named_parameters()] == names
    assert list(router.state_dict()) == [
        "understanding.weight",
        "understanding.bias",
        "generation.weight",
        "generation.bias",
    ]
    assert Router(make_args(POOL))["all"].bias is None


def test_sigmoid_scores_that_all_underflow_stay_finite():
    args = MoEArgs(4, 4, (ExpertGroup("all", (TEXT, VIT, VAE), 4),), 2, score_function="sigmoid")
    router = Router(args)
    for group in router.values():
        torch.nn.init.constant_(group.weight, -100.0)
    routing = router(torch.ones(3, 4), torch.tensor([TEXT, VAE, PADDING]))
    assert torch.isfinite(routing.weights_TK).all()
    assert torch.isfinite(routing.record.prob_sum[0]).all()
