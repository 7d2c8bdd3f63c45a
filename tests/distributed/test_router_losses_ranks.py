"""The routers' losses on two ranks, of which one has no token of a group, are those of one process with all rows, and so are their
gradients."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from symbiotic_titan.losses.balance import balance, z_loss
from symbiotic_titan.losses.terms import StepInputs
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.experts import PartitionedMoE
from symbiotic_titan.moe.partition import tokens_of_groups
from symbiotic_titan.moe.record import routing_totals
from tests.helpers.debug_model import build, config_of, forward
from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny_models import MIXED, OTHER

RANKS = 2
CASES = {
    "sharded": "",
    "expert_parallel": "--parallelism.expert_parallel_degree 2",
    "recomputed": "--activation_checkpoint.mode full",
}


def output_of(model, args, rank):
    """Rank 1 has texts alone: none of its tokens is in the group of generation."""
    texts = [[("text", 30)], [("text", 9)]]
    return forward(model, args, rank, documents=(texts, texts) if rank else (MIXED, OTHER))


def shares_of(output, routing, args):
    """(3,) of the z-loss, and of the balancing loss in both scopes. ``routing``: that of the step, whose counts give its tokens."""
    empty = torch.empty(0)
    tokens_G = tokens_of_groups(routing.counts[0].sum(1) // args.top_k, args.groups)
    batches_G = torch.tensor([2.0, 1.0])
    local = StepInputs(
        None, empty, empty, empty, output.records, group_tokens=tokens_G, group_batches=batches_G
    )
    step = replace(local, step_routing=routing)
    return torch.stack([z_loss(local), balance(local), balance(step)])


def of_one_process(args):
    """(losses, gradients of the routers) of a plain model that reads the rows of all ranks."""
    model = SymbioticModel(args)
    model.init_weights()
    for layer in model.modules():
        if isinstance(layer, PartitionedMoE):
            layer.router.measures_z = True
    outputs = [output_of(model, args, rank) for rank in range(RANKS)]
    first, second = (routing_totals(output.records) for output in outputs)
    losses = sum(shares_of(output, first + second, args) for output in outputs)
    losses.sum().backward()
    return losses.detach(), {n: p.grad for n, p in model.named_parameters() if ".router." in n}


def on_rank(rank, case):
    model, args = build(config_of(f"--losses.z_loss 0.001 {CASES[case]}"))
    output = output_of(model, args, rank)
    own = routing_totals(output.records)
    assert (own.num_tokens[0, 1] > 0) == (rank == 0)
    step = own.map(torch.clone)
    step.map(dist.all_reduce)
    shares = shares_of(output, step, args)
    # Every part takes part in the backward, as in a step: FSDP would wait for it.
    (shares.sum() + 0.0 * (output.logits.sum() + output.velocity.sum())).backward()
    found = shares.detach().clone()
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
def test_the_losses_and_their_gradients_are_those_of_one_process(results, case):
    for found, gradients, (losses, expected) in (rank[case] for rank in results):
        z, local, step = losses.tolist()
        assert z > 1 and local > 1.5 and step > 1.5 and local != step
        torch.testing.assert_close(found, losses)
        assert gradients.keys() == expected.keys() and len(gradients) == 4
        for name, gradient in gradients.items():
            assert gradient.count_nonzero() > 0
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
