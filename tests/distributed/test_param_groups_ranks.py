"""Parameter groups over ranks: frozen parameters hold nothing, ratios and projections are those of whole parameters, and
optimizer state finds its parameters after the groups were changed."""

import logging

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor
from torchtitan.config import LRScheduler

from symbiotic_titan.config.optimizer import ParamGroupRow
from symbiotic_titan.extensions.momentum_projection import project
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.optim.build import (
    build_optimizers,
    freeze_parameters,
)
from symbiotic_titan.optim.group_norms import group_grad_norms, group_update_ratios
from symbiotic_titan.optim.group_record import GroupRecord
from symbiotic_titan.optim.lr_schedule import build_schedulers
from tests.helpers.debug_model import backward, build, config_of, forward
from tests.helpers.gloo import run_on_ranks

EXPERT_PARALLEL = "--parallelism.expert_parallel_degree 2"
LAYOUTS = {
    "expert_parallel": (2, EXPERT_PARALLEL),
    "expert_parallel_hsdp": (
        4,
        f"{EXPERT_PARALLEL} --parallelism.data_parallel_replicate_degree 2",
    ),
}
GENERATION = ParamGroupRow("generation", [r"\.generation\.", "^flow_head"], lr=4e-3)
REST = ParamGroupRow("rest", [".*"])
FROZEN = ParamGroupRow("frozen", ["^vit", r"\.moe\.shared"], frozen=True)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()).clone()


def make(overrides, rows):
    config = config_of(overrides)
    config.optimizer.param_groups = rows
    config.optimizer.weight_decay = 0.1
    with pytest.MonkeyPatch.context() as patch:
        # As the train spec does it: before FSDP, which looks at the flag.
        plain_init = SymbioticModel.__init__

        def init_frozen(self, args):
            plain_init(self, args)
            freeze_parameters(self, rows)

        patch.setattr(SymbioticModel, "__init__", init_frozen)
        model, args = build(config)
    optimizers = build_optimizers([model], config.optimizer, None)
    schedule = LRScheduler(warmup_steps=0, decay_ratio=0.0)
    build_schedulers(optimizers, schedule, 10)
    return model, args, optimizers


def norm(tensors):
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


def check_ratios_and_norms(rank, overrides):
    """Against whole tensors and real differences. Returns what the functions say."""
    model, args, optimizers = make(overrides, [GENERATION, REST])
    for _ in range(2):
        optimizers.zero_grad()
        backward(forward(model, args, rank))
        before = {p: whole(p) for p in model.parameters()}
        optimizers.step()
    ratios, norms = group_update_ratios(optimizers), group_grad_norms(optimizers.groups)
    for group in optimizers.groups:
        change = norm(whole(p) - before[p] for p in group["params"])
        weight = norm(whole(p) for p in group["params"])
        gradient = norm(whole(p.grad) for p in group["params"] if p.grad is not None)
        assert 0 < ratios[group["name"]] == pytest.approx(change / weight, rel=1e-4)
        assert 0 < norms[group["name"]] == pytest.approx(gradient, rel=1e-5)
    return ratios, norms


def check_projection(rank, overrides):
    """Against the same on whole tensors; every other gradient opposes its momentum."""
    model, args, _ = make(overrides, [REST])
    backward(forward(model, args, rank))
    parameters = [p for p in model.parameters() if p.grad is not None]
    momenta = [(-1) ** i * p.grad * p.grad.abs().sqrt() for i, p in enumerate(parameters)]
    before = [whole(p.grad) for p in parameters]
    expected = [gradient.clone() for gradient in before]
    project(expected, [whole(momentum) for momentum in momenta])
    project([p.grad for p in parameters], momenta)
    for i, (parameter, gradient) in enumerate(zip(parameters, before, strict=True)):
        found = whole(parameter.grad)
        limit = 1e-6 * float(gradient.abs().max())
        torch.testing.assert_close(found, expected[i], atol=limit, rtol=1e-5)
        assert torch.equal(found, gradient) == (i % 2 == 0 or not gradient.any())


def check_frozen(rank, overrides, folder):
    """Frozen parameters stay, get no gradient, and have no state in memory or in a checkpoint."""
    model, args, optimizers = make(overrides, [FROZEN, GENERATION, REST])
    named = dict(model.named_parameters())
    frozen = {name: whole(p) for name, p in named.items() if not p.requires_grad}
    assert any("shared" in name for name in frozen) and len(frozen) < len(named)
    backward(forward(model, args, rank))
    optimizers.step()
    for name, before in frozen.items():
        assert torch.equal(whole(named[name]), before) and named[name].grad is None
    dcp.save({"optimizer": optimizers}, checkpoint_id=folder)
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    in_memory = {name for name, p in named.items() if p in optimizers.optimizers[0].state}
    in_checkpoint = {
        key.removeprefix("optimizer.state.").rpartition(".")[0]
        for key in saved
        if key.startswith("optimizer.")
    }
    assert in_memory == in_checkpoint == named.keys() - frozen.keys()


def check_all(rank, overrides, folder):
    check_projection(rank, overrides)
    check_frozen(rank, overrides, folder)
    return check_ratios_and_norms(rank, overrides)


@pytest.mark.parametrize(
    "layout",
    [pytest.param("expert_parallel", marks=pytest.mark.matrix), "expert_parallel_hsdp"],
)
def test_norms_ratios_and_projections_are_of_whole_parameters_and_the_frozen_have_no_state(
    layout, tmp_path
):
    num_ranks, overrides = LAYOUTS[layout]
    results = run_on_ranks(num_ranks, check_all, overrides, str(tmp_path))
    assert all(result == results[0] for result in results)


def saved_and_loaded(rank, folder):
    """Momenta of a run that was saved, the same in a run with other groups and meshes, its rates, and what it logged."""
    model, args, optimizers = make("", [GENERATION, REST])
    backward(forward(model, args, rank))
    optimizers.step()
    state = {"optimizer": optimizers, "param_groups": GroupRecord(model, optimizers)}
    dcp.save(state, checkpoint_id=folder)
    saved = momenta_of(optimizers)

    head = ParamGroupRow("head", ["^flow_head"], lr=5e-4)
    generation = ParamGroupRow("generation", [r"\.generation\."], lr=5e-4)
    model, args, optimizers = make(EXPERT_PARALLEL, [head, generation, REST])
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    state = {"optimizer": optimizers, "param_groups": GroupRecord(model, optimizers)}
    dcp.load(state, checkpoint_id=folder)
    rates = {group["name"]: group["lr"] for group in optimizers.groups}
    loaded = momenta_of(optimizers)
    backward(forward(model, args, rank))
    optimizers.step()
    return saved, loaded, rates, [line for line in lines if line.startswith("group ")]


def momenta_of(optimizers):
    return {k: whole(v) for k, v in optimizers.state_dict().items() if k.endswith("exp_avg")}


def test_state_finds_its_parameters_on_other_meshes_and_in_other_groups(tmp_path):
    for saved, loaded, rates, lines in run_on_ranks(2, saved_and_loaded, str(tmp_path)):
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
        assert rates["head"] == rates["generation"] == 5e-4
        head, generation = lines
        assert head.startswith("group head: parameters joined: ") and "(from generation)" in head
        assert generation.startswith("group generation: lr 0.004 -> 0.0005, parameters left: ")
