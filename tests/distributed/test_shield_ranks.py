"""The shield of the debug model on one process and on two under FSDP2, with activation checkpointing and compiled: gradients equal
those of the plain single process with explicit detach, and no new scale compiles anything."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from symbiotic_titan.config.experts import Shielding
from symbiotic_titan.config.optimizer import clean_name
from symbiotic_titan.optim.shield_schedule import shield_scale
from symbiotic_titan.sequence.modality import modality_ids
from tests.helpers.debug_model import backward, build, config_of, forward
from tests.helpers.gloo import run_on_ranks
from tests.helpers.shield_reference import DEEP, MODES, assert_within_1e6, use_plain_shield

SETS = {"output": ("vae",), "weights": ("text", "vae")}
PER_OP = "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option op"
COMPILED = "--compile.enable --compile.backend aot_eager"
CASES = {
    "kept": "",
    "per_op": PER_OP,
    "compiled": COMPILED,
    "compiled_per_op": f"{COMPILED} {PER_OP}",
}
# Full checkpointing: tests/unit/moe/test_moe_gradient_shield.py.
ON_ONE = ("per_op", "compiled")
ON_TWO = ("kept", "per_op", "compiled_per_op")
RANKS = 2
RAMP = Shielding(steps=2, after_scale=0.1, ramp="linear")
# Before, on the ramp, after; and no shield at all.
SCALES = [*(shield_scale(RAMP, step) for step in (1, 2, 3)), 1.0]


def shielded_model(mode, overrides):
    """The debug model with a flow head that is not zero, so that VAE tokens have gradients."""
    names = ",".join(SETS[mode])
    config = config_of(f"--shielding.mode {mode} --shielding.modalities {names} {overrides}")
    model, args = build(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.flow_head.parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                parameter.to_local().add_(shard_of(noise, parameter))
            else:
                parameter.add_(noise)
    return model, args


def shard_of(full, parameter):
    (placement,) = parameter.placements
    mesh = parameter.device_mesh
    return full.chunk(mesh.size(), dim=placement.dim)[mesh.get_local_rank()]


def gradients(model, args, rank, scale):
    model.zero_grad()
    backward(forward(model, args, rank, scale))
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[clean_name(name)] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return found


def run_cases(rank, cases):
    """(mode, case) -> for every scale the gradients, and the graphs compiled after the first one."""
    results = {}
    for mode in MODES:
        for case in cases:
            torch._dynamo.reset()
            counters.clear()
            model, args = shielded_model(mode, CASES[case])
            found = [gradients(model, args, rank, SCALES[0])]
            num_graphs = counters["stats"]["unique_graphs"]
            assert bool(num_graphs) == case.startswith("compiled")
            found += [gradients(model, args, rank, scale) for scale in SCALES[1:]]
            results[mode, case] = found, counters["stats"]["unique_graphs"] - num_graphs
    return results


def explicit_detach(rank):
    """(mode, rank whose rows are read) -> for every scale the gradients of plain autograd."""
    results = {}
    for mode in MODES:
        model, args = shielded_model(mode, "")
        use_plain_shield(model, mode, modality_ids(SETS[mode], key="test"))
        for rows in range(RANKS):
            results[mode, rows] = [gradients(model, args, rows, scale) for scale in SCALES]
    return results


@pytest.fixture(scope="module")
def plain():
    return run_on_ranks(1, explicit_detach)[0]


@pytest.fixture(scope="module")
def one_process():
    return run_on_ranks(1, run_cases, ON_ONE)[0]


@pytest.fixture(scope="module")
def two_processes():
    return run_on_ranks(RANKS, run_cases, ON_TWO)


def test_the_shield_acts_on_this_model(plain):
    weight = "layers.2.moe.shared_experts.w1.weight"
    for mode in MODES:
        blocked, *_, unshielded = plain[mode, 0]
        assert (blocked[weight] - unshielded[weight]).abs().max() > 1e-4


@pytest.mark.parametrize("case", ON_ONE)
@pytest.mark.parametrize("mode", MODES)
def test_one_process_equals_explicit_detach(plain, one_process, mode, case):
    found, _ = one_process[mode, case]
    for ours, expected in zip(found, plain[mode, 0], strict=True):
        assert_within_1e6(ours, expected, relative=DEEP)


@pytest.mark.parametrize("case", ON_TWO)
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_explicit_detach(plain, two_processes, mode, case):
    """Gradients are summed over the ranks, whose rows differ."""
    for rank in two_processes:
        found, _ = rank[mode, case]
        for ours, first, second in zip(found, plain[mode, 0], plain[mode, 1], strict=True):
            expected = {name: first[name] + second[name] for name in first}
            assert_within_1e6(ours, expected, relative=DEEP)


def test_no_scale_compiles_anything(one_process, two_processes):
    for results in (one_process, *two_processes):
        assert not any(num_graphs for _, num_graphs in results.values())
