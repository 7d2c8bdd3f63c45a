"""A model in training draws: the same pictures on every layout, and training goes on as if nothing had been drawn."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.parallel.ranks import DataRanks, parallel_dims_of
from symbiotic_titan.training.sample_grids import SampleGrids
from tests.helpers.debug_model import backward, build, config_of, forward
from tests.helpers.gloo import run_on_ranks

EXPERT_PARALLEL = "--parallelism.expert_parallel_degree 2"
LAYOUTS = {
    "fsdp": "",
    "never_reshards": "--parallelism.fsdp_reshard_after_forward never",
    "expert_parallel": EXPERT_PARALLEL,
    "selective": f"{EXPERT_PARALLEL} --activation_checkpoint.mode selective",
    "full_compiled": f"{EXPERT_PARALLEL} --activation_checkpoint.mode full --compile.enable --compile.backend eager",
}


def give_the_head_weights(model):
    """A new flow head is zero, and draws noise whatever it reads."""
    for number, parameter in enumerate(model.flow_head.parameters()):
        generator = torch.Generator().manual_seed(number)
        whole = 0.05 * torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            whole = distribute_tensor(whole, mesh, placements).to_local()
            parameter = parameter.to_local()
        parameter.add_(whole)


def trained_on(model, args, rank):
    """This rank's gradients after a step."""
    model.zero_grad()
    backward(forward(model, args, rank))
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [(g.to_local() if isinstance(g, DTensor) else g).clone() for g in grads]


def draw(rank, layout, stop_at=None):
    """(grids that this rank wrote, whether everything is sharded, whether gradients are bitwise as before, forwards)."""
    config = config_of(layout)
    sampling = config.sampling
    sampling.enable, sampling.steps, sampling.batch_size = True, 3, 1
    sampling.prompts = ["a red circle", "two", "the digit seven"]  # not the same number for each
    model, args = build(config)
    with torch.no_grad():
        give_the_head_weights(model)
    before = trained_on(model, args, rank)
    state = torch.random.get_rng_state()
    grids, asked, forwards = [], [], []
    metrics = SimpleNamespace(
        time_last_log=0.0,
        color=SimpleNamespace(yellow="", green="", blue="", reset=""),
        shows_images=rank == 0,
        log_image=lambda tag, image, step: grids.append(image),
    )

    def stop_requested():
        asked.append(None)
        return len(asked) == stop_at

    size = dist.get_world_size()
    dims = parallel_dims_of(config, size) if size > 1 else None
    handle = model.register_forward_hook(lambda *unused: forwards.append(None))
    samples = SampleGrids(
        model,
        config,
        ByteTokenizer(),
        DataRanks(torch.device("cpu"), rank, size, dims),
        metrics,
        autocast=contextlib.nullcontext,
        stop_requested=stop_requested,
    )
    samples.write_if_due(0)
    handle.remove()
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    sharded = all(isinstance(p, DTensor) for p in model.parameters())
    after = trained_on(model, args, rank)
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return grids, sharded, same, len(forwards)


def cases(rank):
    results = {name: draw(rank, layout) for name, layout in LAYOUTS.items()}
    return results | {"stopped": draw(rank, EXPERT_PARALLEL, stop_at=2)}


@pytest.fixture(scope="module")
def results():
    return run_on_ranks(2, cases)


@pytest.fixture(scope="module")
def alone():
    """The grid that one process draws."""
    [(grids, _, same, _)] = run_on_ranks(1, draw, "")
    assert same
    return grids[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_grid_is_that_of_one_process_and_one_rank_writes_it(results, alone, layout):
    [grid] = results[0][layout][0]
    assert grid.shape == alone.shape
    assert np.abs(grid.astype(int) - alone.astype(int)).max() <= 1
    assert results[1][layout][0] == []


@pytest.mark.parametrize("layout", [*LAYOUTS, "stopped"])
def test_training_goes_on_bitwise_from_a_sharded_model(results, layout):
    for _, sharded, same, _ in (result[layout] for result in results):
        assert sharded and same


def test_every_rank_does_as_many_forwards_as_the_one_with_most_prompts(results):
    for result in results:
        for layout in LAYOUTS:
            assert result[layout][3] == 2 * (1 + 3)  # two prompts, each read and drawn in 3 steps


def test_a_stop_ends_it_between_two_steps_of_the_sampler(results):
    for grids, _, _, forwards in (result["stopped"] for result in results):
        assert grids == [] and forwards == 1 + 2
