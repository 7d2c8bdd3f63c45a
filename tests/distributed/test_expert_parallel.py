"""Experts spread over ranks give what one rank gives."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from symbiotic_titan.moe.experts import PartitionedMoE
from symbiotic_titan.moe.partition import ExpertGroup, MoEArgs
from symbiotic_titan.parallel.expert_parallel import apply_expert_parallel, experts_by_slot
from symbiotic_titan.sequence.modality import PADDING, TEXT, VAE, VIT
from tests.helpers.gloo import run_on_ranks

TOKENS = 24  # per rank
ARGS = MoEArgs(
    dim=16,
    hidden_dim=24,
    groups=(ExpertGroup("und", (TEXT, VIT), 12), ExpertGroup("gen", (VAE,), 4)),
    top_k=3,
    shared_hidden_dim=8,
    shield_modalities=(VAE,),
)
# A width and a top-k of its own in two of three groups; the second has fewer experts than the largest top-k.
UNEQUAL = replace(
    ARGS,
    groups=(
        ExpertGroup("text", (TEXT,), 8, top_k=6),
        ExpertGroup("vision", (VIT,), 4, hidden_dim=8, top_k=1),
        ExpertGroup("gen", (VAE,), 4, hidden_dim=40),
    ),
)
MIXED = (TEXT, VIT, VAE, PADDING)
# What each rank's tokens are. Ranks without a group, and ranks without anything to route.
CASES = {
    "mixed": [MIXED, MIXED, MIXED, MIXED],
    "some_without_images": [(TEXT,), MIXED, (VAE,), (TEXT,)],
    "some_only_padding": [(PADDING,), MIXED, (PADDING,), (VAE, TEXT)],
    "one_group_only": [(TEXT,), (TEXT,), (VIT,), (TEXT,)],
    "all_padding": [(PADDING,)] * 4,
}


def make_layer(dtype, args=ARGS):
    torch.manual_seed(1)
    layer = PartitionedMoE(args)
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if "router" in name else 0.3)
    return layer.to(dtype)


def make_inputs(modalities, rank, dtype):
    generator = torch.Generator().manual_seed(2 + rank)
    x_TD = torch.randn(TOKENS, ARGS.dim, generator=generator).to(dtype).requires_grad_()
    kinds = torch.tensor(modalities[rank])
    return x_TD, kinds.repeat(TOKENS // len(kinds))


def step(layer, x_TD, modality_T):
    out_TD, record = layer(x_TD, modality_T, torch.tensor(0.1))
    loss = out_TD.float().square().sum() + sum(p.square().sum() for p in record.prob_sum)
    loss.backward()
    return out_TD.detach(), record.counts


def on_rank(rank, degree, modalities, dtype, args=ARGS):
    """(output, counts, gradient of x, {name: full gradient of each expert weight, own gradient of the rest})."""
    mesh = init_device_mesh("cpu", (degree,), mesh_dim_names=("ep",))
    layer = make_layer(dtype, args)
    apply_expert_parallel(layer, mesh)
    x_TD, modality_T = make_inputs(modalities, rank, dtype)
    out_TD, counts = step(layer, x_TD, modality_T)
    grads = {}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        grads[name] = parameter.grad
        if name.startswith("experts."):
            assert parameter.to_local().shape[0] == parameter.shape[0] // degree
            grads[name] = parameter.grad.full_tensor()
    return out_TD, counts, x_TD.grad, grads


GROUPS = {"equal": ARGS, "unequal": UNEQUAL}


def all_cases_on_rank(rank, degree):
    return {
        (groups, case): on_rank(rank, degree, CASES[case], torch.float32, args)
        for groups, args in GROUPS.items()
        for case in CASES
    }


@pytest.fixture(scope="module", params=[2, 4])
def results(request):
    """What every rank returned for every case; starting processes takes longer than all the cases."""
    return run_on_ranks(request.param, all_cases_on_rank, request.param)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("groups", GROUPS)
def test_every_rank_gets_the_output_and_gradients_of_one_process(results, groups, case):
    sums: dict[str, torch.Tensor] = {}
    for rank, result in enumerate(results):
        out_TD, counts, grad_x_TD, grads = result[groups, case]
        layer = make_layer(torch.float32, GROUPS[groups])
        x_TD, modality_T = make_inputs(CASES[case], rank, torch.float32)
        expected_TD, expected_counts = step(layer, x_TD, modality_T)
        assert torch.equal(counts, expected_counts)
        torch.testing.assert_close(out_TD, expected_TD)
        torch.testing.assert_close(grad_x_TD, x_TD.grad, atol=1e-4, rtol=1e-4)
        for name, parameter in layer.named_parameters():
            if name.startswith("experts."):
                sums[name] = sums.get(name, 0) + parameter.grad
            else:
                torch.testing.assert_close(
                    grads[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name
                )
    # An expert sees the tokens of all ranks, so its gradient is already their sum.
    for name, expected in sums.items():
        torch.testing.assert_close(
            results[0][groups, case][3][name], expected, atol=1e-4, rtol=1e-4, msg=name
        )


def test_bfloat16_and_zero_rows_travel_too():
    results = run_on_ranks(2, on_rank, 2, CASES["mixed"], torch.bfloat16)
    for rank, (out_TD, _, grad_x_TD, _) in enumerate(results):
        layer = make_layer(torch.bfloat16)
        x_TD, modality_T = make_inputs(CASES["mixed"], rank, torch.bfloat16)
        expected_TD, _ = step(layer, x_TD, modality_T)
        torch.testing.assert_close(out_TD, expected_TD, atol=0.02, rtol=0.02)
        torch.testing.assert_close(grad_x_TD, x_TD.grad, atol=0.1, rtol=0.05)


def two_exchanges(rank, args):
    """Row counts of every all-to-all of one forward pass, in order."""
    from torch.distributed import _functional_collectives as collectives

    sizes = []
    original = collectives.all_to_all_single_autograd

    def counted(rows, receive, send, group):
        sizes.append(sum(send))
        return original(rows, receive, send, group)

    collectives.all_to_all_single_autograd = counted
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    layer = make_layer(torch.float32, args)
    apply_expert_parallel(layer, mesh)
    layer(*make_inputs(CASES["mixed"], rank, torch.float32), torch.tensor(1.0))
    return sizes


@pytest.mark.parametrize("groups", GROUPS)
def test_all_groups_take_one_exchange_out_and_one_back_without_padding(groups):
    results = run_on_ranks(2, two_exchanges, GROUPS[groups])
    routed = TOKENS // 4 * {"equal": 3 + 3 + 3, "unequal": 6 + 1 + 3}[groups]
    assert [len(sizes) for sizes in results] == [2, 2]
    assert [sizes[0] for sizes in results] == [routed, routed]
    assert sum(sizes[1] for sizes in results) == 2 * routed


def bad_degree(rank):
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    groups = (ExpertGroup("und", (TEXT, VIT), 12), ExpertGroup("gen", (VAE,), 6))
    layer = PartitionedMoE(MoEArgs(dim=8, hidden_dim=8, groups=groups, top_k=2))
    try:
        apply_expert_parallel(layer, mesh)
    except ValueError as error:
        return str(error)
    return "passed"


def test_degree_that_does_not_divide_is_refused_with_the_nearest():
    message = run_on_ranks(4, bad_degree)[0]
    assert "expert_parallel_degree = 4 does not divide expert group 'gen'" in message
    assert "nearest degrees that divide every group: 3 and 6" in message


def test_a_rank_owns_its_share_of_every_group():
    slots = experts_by_slot((4, 2), 2, torch.device("cpu"))
    assert slots.tolist() == [0, 1, 4, 2, 3, 5]
    assert experts_by_slot((4, 2), 1, torch.device("cpu")).tolist() == list(range(6))
