import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from symbiotic_titan.config.optimizer import clean_name
from symbiotic_titan.model.initialize import initialize, leaving_out
from symbiotic_titan.model.symbiotic import SymbioticModel


def weights(model):
    return {clean_name(name): p.detach().clone() for name, p in model.named_parameters()}


def built(args, wrap=lambda model: None):
    """From meta to initialised on memory full of NaN, as the trainer does it; ``wrap`` comes in between."""
    with torch.device("meta"):
        model = SymbioticModel(args)
    wrap(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
        model.init_weights()
    return model


def wrap_blocks(model):
    for name, block in model.layers.items():
        model.layers[name] = checkpoint_wrapper(block)


def compile_blocks(model):
    for name, block in model.layers.items():
        model.layers[name] = torch.compile(block)


@pytest.mark.parametrize("wrap", [wrap_blocks, compile_blocks])
def test_weights_do_not_depend_on_wrappers(args, wrap):
    plain, wrapped = weights(built(args)), weights(built(args, wrap))
    assert plain.keys() == wrapped.keys()
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)


def test_weights_depend_on_the_seed_and_not_on_the_global_generator(args, make_args):
    torch.manual_seed(1)
    first = weights(built(args))
    torch.manual_seed(2)
    again = weights(built(args))
    other = weights(built(make_args(init_seed=1)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "layers.1.attention.wq.weight"
    assert not torch.equal(first[name], other[name])


def test_every_parameter_is_initialised_and_no_two_matrices_are_alike(make_args):
    model = built(make_args(selection_bias=True, qkv_bias=True, o_bias=True, shared_gate=True))
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert any(name.endswith("router.all.bias") for name in tensors)
    assert all(t.isfinite().all() for t in tensors.values())
    drawn = [t for t in tensors.values() if t.ndim > 1 and t.any()]
    heads = {tuple(t.flatten()[:4].tolist()) for t in drawn}
    assert len(heads) == len(drawn)


def test_what_a_checkpoint_will_give_is_not_drawn_and_the_rest_has_the_same_bits(make_args):
    args = make_args(selection_bias=True)
    whole = built(args).state_dict()
    given = {n for n in whole if n.startswith("layers.") and "ffn_norm" not in n}
    with leaving_out(given):
        partial = built(args, wrap_blocks)
    tensors = dict(partial.named_parameters()) | dict(partial.named_buffers())
    tensors = {clean_name(name): tensor for name, tensor in tensors.items()}
    assert any(name.endswith("router.all.bias") for name in given)
    assert {name for name, t in tensors.items() if t.isnan().all()} == given
    assert all(torch.equal(tensors[name], whole[name]) for name in whole.keys() - given)
    assert all(t.isfinite().all() for t in built(args).state_dict().values())


def test_spread_of_the_weights(make_args):
    args = make_args(dim=128, num_layers=8, num_dense_layers=1)
    got = weights(built(args))
    assert got["tok_embeddings.weight"].std().item() == pytest.approx(1.0, rel=0.05)
    assert got["layers.3.attention.wq.weight"].std().item() == pytest.approx(128**-0.5, rel=0.1)
    w2 = got["layers.3.moe.experts.all.w2"]
    assert w2.std().item() == pytest.approx((24 * 2 * 8) ** -0.5, rel=0.1)
    assert (got["layers.3.attention_norm.weight"] == 1).all()
    assert not got["flow_head.output.weight"].any()
    assert not got["vit.layers.0.wo.bias"].any()


def test_tied_embeddings_start_small_enough_to_be_an_output(make_args):
    tied = weights(built(make_args(tie_embeddings=True)))["tok_embeddings.weight"]
    assert tied.std().item() == pytest.approx(32**-0.5, rel=0.1)


def test_a_parameter_without_a_rule_is_named(args):
    model = built(args)
    model.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(AssertionError, match="no rule initialises the parameter scale"):
        initialize(copy.deepcopy(model), seed=0)


def test_a_new_group_does_not_change_the_other_weights(make_args):
    """Attention, embeddings and dense layers start equal under every partition: comparisons are paired."""
    from symbiotic_titan.moe.partition import ExpertGroup

    groups = (ExpertGroup("understanding", (0, 1), 6), ExpertGroup("generation", (2,), 2))
    one, two = weights(built(make_args())), weights(built(make_args(groups=groups)))
    shared = one.keys() & two.keys()
    assert len(shared) > 30
    assert all(torch.equal(one[name], two[name]) for name in shared)


def test_a_sharded_parameter_gets_its_slice_of_the_plain_one(args):
    """The second of two ranks, of which only this one exists: nothing is communicated."""
    plain = weights(built(args))
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        sharded = weights(built(args, lambda model: fully_shard(model, mesh=mesh)))
        for name, parameter in sharded.items():
            second_half = plain[name][(len(plain[name]) + 1) // 2 :]
            assert torch.equal(parameter.to_local(), second_half), name
    finally:
        dist.destroy_process_group()
