"""A sequence shared by two ranks: keys and values with their gradients, and the model's outputs and gradients, are those of one process."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from symbiotic_titan.config.losses import Flow
from symbiotic_titan.inference.held_out import held_out_losses
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.parallel.context_parallel import HeadTailShard
from symbiotic_titan.parallel.ranks import data_ranks, parallel_dims_of
from symbiotic_titan.sequence.batch import stack_rows
from symbiotic_titan.sequence.modality import IGNORE_INDEX
from tests.helpers.debug_model import build, config_of
from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny_models import MIXED, OTHER, pack_row, run_model

RANKS, LENGTH = 2, 48
CP = "--parallelism.context_parallel_degree 2"
CASES = {
    "plain": CP,
    "expert_parallel": f"{CP} --parallelism.expert_parallel_degree 2",
    "full": f"{CP} --activation_checkpoint.mode full",
    "per_op": f"{CP} --activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option op",
    "compiled": f"{CP} --compile.enable --compile.backend aot_eager",
    "bfloat16": f"{CP} --training.mixed_precision_param bfloat16",
}
TOLERANCE = {"bfloat16": 5e-2}
# Features leave the ViT after both of its blocks, so every way of an image token into the decoder has a gradient.
VIT = {"deepstack": (0, 1)}


def batch_of(args):
    batch = stack_rows([pack_row(MIXED, args), pack_row(OTHER, args, seed=7)])
    batch.task[:] = batch.document.clamp(max=2)
    batch.labels[:] = batch.tokens.where((batch.span < 0) & (batch.document >= 0), IGNORE_INDEX)
    return batch


def make_head_matter(model):
    """The flow head begins with zeros, which would hide its inputs; every element gets the same value, on any shard."""
    with torch.no_grad():
        for parameter in model.flow_head.parameters():
            parameter.add_(0.01)


def loss_of(model, batch):
    """Of this process's part: squares of the logits of labelled tokens and of velocities, and counted tokens by their probabilities."""
    own = model.own_part(batch)
    output = run_model(model, batch)
    assert output.logits.shape[:2] == own.tokens.shape
    logits = output.logits.float()[own.labels != IGNORE_INDEX]
    probabilities = sum(
        (p * torch.arange(len(p))).sum() for r in output.records for p in r.prob_sum
    )
    return logits.square().sum() + output.velocity.square().sum() + probabilities


def gathered_keys():
    """(gathered keys and values, gradients of this rank's) where rank r's loss weighs them by r + 1, and the same without ranks."""
    mesh = init_device_mesh("cpu", (RANKS,))
    shard = HeadTailShard(mesh)
    torch.manual_seed(1)
    k, v, weights = torch.randn(3, 2, 3, LENGTH, 4)
    columns_T = shard.columns(LENGTH, torch.device("cpu"))
    own = [x.index_select(2, columns_T).requires_grad_() for x in (k, v)]
    keys, values = shard.complete(*own)
    ((shard.rank + 1) * (keys * weights + values * weights.square()).sum()).backward()
    total = sum(range(1, RANKS + 1))
    expected = [total * w.index_select(2, columns_T) for w in (weights, weights.square())]
    return {
        "keys": keys.equal(k) and values.equal(v),
        "gradients": all(torch.allclose(x.grad, e) for x, e in zip(own, expected, strict=True)),
    }


def of_one_process(args):
    model = SymbioticModel(args)
    model.init_weights()
    make_head_matter(model)
    loss = loss_of(model, batch_of(args))
    loss.backward()
    held_out = held_out_losses(model, [batch_of(args)], Flow())
    return float(loss), {n: p.grad for n, p in model.named_parameters()}, held_out


def clean(name):
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def on_ranks(rank, case):
    config = config_of(CASES[case])
    model, args = build(config, **VIT)
    make_head_matter(model)
    ranks = data_ranks(torch.device("cpu"), parallel_dims_of(config, RANKS))
    loss = loss_of(model, batch_of(args))
    loss.backward()
    total = float(ranks.sum(loss.detach().clone()))
    gradients = {clean(n): p.grad.full_tensor() for n, p in model.named_parameters()}
    held_out = held_out_losses(model, [batch_of(args)], Flow(), sum_over_ranks=ranks.sum)
    plain_loss, plain_gradients, plain_held_out = of_one_process(args)
    return {
        "losses": (total, plain_loss),
        "gaps": {
            name: float((gradients[name] - g).norm() / g.norm().clamp(min=1e-6))
            for name, g in plain_gradients.items()
        },
        "held_out": (held_out, plain_held_out),
        "ranks": (ranks.rank, ranks.size, ranks.once([3, 4]), ranks.each().rank),
    }


def all_cases(rank):
    return {"gathered": gathered_keys()} | {case: on_ranks(rank, case) for case in CASES}


@pytest.fixture(scope="module")
def results():
    return run_on_ranks(RANKS, all_cases)


def test_keys_and_values_come_in_the_order_of_the_sequence_and_gradients_go_back(results):
    assert all(rank["gathered"] == {"keys": True, "gradients": True} for rank in results)


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_that_of_one_process(results, case):
    """The image encoder's too, of which every rank has the part that its own tokens cause."""
    for rank in results:
        ours, theirs = rank[case]["losses"]
        assert ours == pytest.approx(theirs, rel=TOLERANCE.get(case, 1e-5))
        gaps = rank[case]["gaps"]
        assert any(name.startswith("vit.") for name in gaps)
        wrong = {name: gap for name, gap in gaps.items() if gap > TOLERANCE.get(case, 1e-4)}
        assert not wrong


@pytest.mark.parametrize("case", ["plain", "expert_parallel"])
def test_held_out_losses_and_answers_are_those_of_one_process(results, case):
    for rank in results:
        ours, theirs = rank[case]["held_out"]
        assert theirs["flow"] > 0 and ours == pytest.approx(theirs, rel=1e-5)


def test_ranks_that_share_rows_are_one_data_rank(results):
    assert [rank["plain"]["ranks"] for rank in results] == [(0, 1, [3, 4], 0), (0, 1, [0, 0], 1)]
