"""The average over ranks: that of whole weights, sharded as they are, and saved for any other number of ranks."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from symbiotic_titan.checkpoint.manager import read_beforehand
from symbiotic_titan.checkpoint.start import Start, entries_of
from symbiotic_titan.optim.ema import EMA, averaged_parameters
from symbiotic_titan.weights.damage import read_metadata
from symbiotic_titan.weights.dcp import DistributedCheckpoint
from tests.helpers.debug_model import backward, build, config_of, forward
from tests.helpers.gloo import run_on_ranks

SHARED = "--ema.enable --ema.decay 0.6 --ema.interval 1"
EXPERT_PARALLEL = f"{SHARED} --parallelism.expert_parallel_degree 2"
LAYOUTS = {
    "fsdp": (2, f"{SHARED} --parallelism.fsdp_reshard_after_forward never"),
    "expert_parallel_fsdp": (4, EXPERT_PARALLEL),
    "expert_parallel_hsdp": (
        4,
        f"{EXPERT_PARALLEL} --parallelism.data_parallel_replicate_degree 2",
    ),
}


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()).clone()


def make(overrides):
    config = config_of(overrides)
    model, args = build(config)
    groups = averaged_parameters([name for name, _ in model.named_parameters()], config)
    return model, args, EMA(model, groups, config.ema)


def move(model, number):
    """What an optimizer would do to the weights, the same on all numbers of ranks."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.01 * number).add_(0.1 / number)


def free_gathered(model):
    """As training does after a measurement."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trained(rank, overrides):
    """Weights and averages after three updates; what the model gives with the averages; whether its weights were left alone."""
    model, args, ema = make(overrides)
    backward(forward(model, args, rank))  # the optimizer's step follows a backward in training
    for number in (1, 2, 3):
        move(model, number)
        ema.update(number)
    before = {name: whole(p) for name, p in model.named_parameters()}
    with torch.no_grad(), ema.applied():
        averaged = forward(model, args, 0).logits.clone()
    free_gathered(model)
    with torch.no_grad():
        own = forward(model, args, 0).logits.clone()
    free_gathered(model)
    same = all(torch.equal(whole(p), before[name]) for name, p in model.named_parameters())
    sharded = all(
        isinstance(average, DTensor) and average.placements == p.placements
        for name, p in model.named_parameters()
        if (average := ema.tensors.get(name)) is not None
    )
    averages = {name: whole(average) for name, average in ema.tensors.items()}
    return before, averages, averaged, own, same, sharded, ema.metrics()


@pytest.fixture(scope="module")
def one_rank():
    return run_on_ranks(1, trained, SHARED)[0]


@pytest.mark.parametrize(
    "layout",
    [
        "fsdp",
        "expert_parallel_fsdp",
        pytest.param("expert_parallel_hsdp", marks=pytest.mark.matrix),
    ],
)
def test_averages_of_shards_are_those_of_whole_weights(one_rank, layout):
    weights, averages, averaged, own, _, _, metrics = one_rank
    assert not torch.allclose(averaged, own, rtol=1e-3)
    for found in run_on_ranks(LAYOUTS[layout][0], trained, LAYOUTS[layout][1]):
        assert found[4] and found[5], "weights restored, averages sharded as they are"
        assert found[1].keys() == averages.keys() == weights.keys()
        for name, average in averages.items():
            torch.testing.assert_close(found[1][name], average, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found[2], averaged, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[3], own, rtol=1e-4, atol=1e-5)
        assert found[6] == pytest.approx(metrics, rel=1e-5)


def saved(rank, overrides, folder):
    model, _, ema = make(overrides)
    move(model, 1)
    ema.update(1)
    state = {"ema": ema, "param_groups": {"json": ""}, **model.state_dict()}
    dcp.save(state, checkpoint_id=folder)
    return {name: whole(average) for name, average in ema.tensors.items()}


def start_of(rank, folder):
    metadata, _ = read_metadata(folder)
    return Start(folder, 1, entries_of(metadata), True, metadata if rank == 0 else None)


def restored_and_saved(rank, overrides, source, target):
    model, _, ema = make(overrides)
    assert read_beforehand(start_of(rank, source), ema) == ["ema"]
    state = {"ema": ema, "param_groups": {"json": ""}, **model.state_dict()}
    dcp.save(state, checkpoint_id=target)
    return ema.num_updates, {name: whole(average) for name, average in ema.tensors.items()}


def test_a_saved_average_loads_bit_for_bit_on_other_numbers_of_ranks(tmp_path):
    [first] = run_on_ranks(1, saved, SHARED, tmp_path / "a")
    for found in run_on_ranks(
        2, restored_and_saved, EXPERT_PARALLEL, tmp_path / "a", tmp_path / "b"
    ):
        assert found[0] == 1
        assert all(torch.equal(found[1][name], average) for name, average in first.items())
    [(updates, third)] = run_on_ranks(1, restored_and_saved, SHARED, tmp_path / "b", tmp_path / "c")
    assert updates == 1 and third.keys() == first.keys()
    assert all(torch.equal(third[name], average) for name, average in first.items())
    stored = DistributedCheckpoint(tmp_path / "c", "ema")
    assert stored.averaged == first.keys() and stored.num_updates == 1
    assert all(torch.equal(stored.read(name), average) for name, average in first.items())


def of_other_groups(rank, source):
    """Averages after resuming ``source``, which averaged one group, with another setting."""
    model, _, ema = make(f"{SHARED} --ema.groups generation")
    move(model, 1)
    ema.update(1)
    dcp.save({"ema": ema, **model.state_dict()}, checkpoint_id=source)
    weights = {name: whole(p) for name, p in model.named_parameters()}
    _, _, every = make(SHARED)
    read_beforehand(start_of(rank, source), every)
    read_beforehand(start_of(rank, source), None)
    return weights, ema.tensors, every.tensors


def test_parameters_that_join_start_from_their_weights(tmp_path):
    [(weights, averages, every)] = run_on_ranks(1, of_other_groups, tmp_path / "a")
    assert averages.keys() < every.keys() == weights.keys()
    for name, tensor in every.items():
        assert torch.equal(tensor, averages.get(name, weights[name]))
