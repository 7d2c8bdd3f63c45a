"""The z-loss of two ranks with experts on both is that of one process with all rows, and so are its gradients."""

import pytest
import torch
import torch.distributed as dist

from symbiotic_titan.losses.balance import z_loss
from symbiotic_titan.losses.terms import StepInputs
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.experts import PartitionedMoE
from symbiotic_titan.moe.partition import tokens_of_groups
from tests.helpers.debug_model import build, config_of, forward
from tests.helpers.gloo import run_on_ranks

RANKS = 2
CASES = {
    "sharded": "",
    "expert_parallel": "--parallelism.expert_parallel_degree 2",
    "recomputed": "--activation_checkpoint.mode full",
}


def tokens_of(output, args):
    """(G,) tokens of the output's records, which are the groups' in every layer."""
    counts_M = output.records[0].counts.sum(1) // args.top_k
    return tokens_of_groups(counts_M, args.groups)


def share(output, tokens_G):
    empty = torch.empty(0)
    return z_loss(StepInputs(None, empty, empty, empty, output.records, group_tokens=tokens_G))


def of_one_process(args):
    """(loss, gradients of the routers) of a plain model that reads the rows of all ranks."""
    model = SymbioticModel(args)
    model.init_weights()
    for layer in model.modules():
        if isinstance(layer, PartitionedMoE):
            layer.router.measures_z = True
    outputs = [forward(model, args, rank) for rank in range(RANKS)]
    tokens_G = sum(tokens_of(output, args) for output in outputs)
    loss = sum(share(output, tokens_G) for output in outputs)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if ".router." in n}


def on_rank(rank, case):
    model, args = build(config_of(f"--losses.z_loss 0.001 {CASES[case]}"))
    output = forward(model, args, rank)
    tokens_G = tokens_of(output, args)
    dist.all_reduce(tokens_G)
    loss = share(output, tokens_G)
    # Every part takes part in the backward, as in a step: FSDP would wait for it.
    (loss + 0.0 * (output.logits.sum() + output.velocity.sum())).backward()
    found = loss.detach().clone()
    dist.all_reduce(found)
    gradients = {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad.full_tensor()
        for name, parameter in model.named_parameters()
        if ".router." in name
    }
    return found, gradients, of_one_process(args)


def all_cases(rank):
    return {case: on_rank(rank, case) for case in CASES}


@pytest.fixture(scope="module")
def results():
    return run_on_ranks(RANKS, all_cases)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradients_are_those_of_one_process(results, case):
    for found, gradients, (loss, expected) in (rank[case] for rank in results):
        assert loss > 1
        torch.testing.assert_close(found, loss)
        assert gradients.keys() == expected.keys() and len(gradients) == 4
        for name, gradient in gradients.items():
            assert gradient.count_nonzero() > 0
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
