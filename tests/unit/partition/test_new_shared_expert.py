"""A shared expert made for a backbone that has none: of the most used experts, and without effect until it is trained."""

from dataclasses import replace

import pytest
import torch

from symbiotic_titan.config.experts import Experts
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.partition.apply import (
    partition_checkpoint,
    plan_of_checkpoint,
)
from symbiotic_titan.partition.plan import (
    Plan,
    make_plan,
)
from symbiotic_titan.partition.profile import (
    ModelIdentity,
    Profile,
    router_hash,
)
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT
from symbiotic_titan.weights.dcp import DistributedCheckpoint
from tests.helpers.stored_models import BIMODAL, make_model, save, tiny_args

BARE = tiny_args(shared_hidden_dim=0)
ONE_POOL = (ExpertGroup("all", (TEXT, VIT, VAE), 8),)

# (text, ViT) choices of two layers. As shares of their modality: layer 1 is led by 6 and 2, layer 2 by 0 and 7.
COUNTS = torch.tensor(
    [
        [[10, 0, 40, 0, 0, 10, 40, 0], [0, 1, 2, 0, 0, 0, 7, 0], [0] * 8],
        [[50, 10, 10, 10, 10, 0, 0, 10], [0, 0, 2, 0, 1, 0, 0, 7], [0] * 8],
    ]
)
MOST_USED = [[2, 6], [0, 7]]


@pytest.fixture
def vlm(tmp_path):
    """(model without a shared expert, folder of its checkpoint, its profile)."""
    model = make_model(BARE)
    folder = save(model.state_dict(), tmp_path / "vlm")
    identity = ModelIdentity(
        "tiny", None, router_hash(DistributedCheckpoint(folder)), {"all": 8}, 2
    )
    tokens = {"text": 10**6, "vit": 10**6, "vae": 0}
    return model, folder, Profile(identity, ("layers.1", "layers.2"), COUNTS, tokens, {})


def converted(vlm, out, groups=BIMODAL, num_shared=2):
    """(the model with its experts in groups and a shared expert, what was done)."""
    _, source, profile = vlm
    plan = make_plan(profile, groups, "cumulative", num_shared=num_shared)
    args = replace(BARE, groups=groups, shared_hidden_dim=num_shared * BARE.expert_hidden_dim)
    conversion = partition_checkpoint(source, args, plan if len(groups) > 1 or num_shared else None, out)  # fmt: skip
    model = SymbioticModel(args)
    DistributedCheckpoint(out).read_into(model.state_dict())
    return model, conversion


def moe_outputs(model, x_TD, modality_T):
    return [
        layer.moe(x_TD, modality_T, torch.ones(()))[0]
        for layer in model.layers.values()
        if hasattr(layer, "moe")
    ]


@pytest.mark.parametrize("groups", [BIMODAL, ONE_POOL], ids=["groups", "one pool"])
def test_it_changes_no_output_and_has_a_gradient(vlm, tmp_path, groups):
    with_shared, _ = converted(vlm, tmp_path / "with", groups)
    without, _ = converted(vlm, tmp_path / "without", groups, num_shared=0)
    x_TD, modality_T = torch.randn(30, 32), torch.tensor([TEXT, VIT, VAE]).repeat(10)
    ours, theirs = (moe_outputs(m, x_TD, modality_T) for m in (with_shared, without))
    assert len(ours) == 2 and all(map(torch.equal, ours, theirs))
    sum(out.square().sum() for out in ours).backward()
    for number in ("1", "2"):
        shared = with_shared.layers[number].moe.shared_experts
        assert (shared.w2.weight.grad != 0).all()
        assert not shared.w1.weight.grad.any()  # until w2 is no longer zero


def test_it_is_made_of_the_most_used_experts_which_stay(vlm, tmp_path):
    model, conversion = converted(vlm, tmp_path / "out")
    old, new = vlm[0].state_dict(), model.state_dict()
    plan = plan_of_checkpoint(tmp_path / "out")
    assert plan.shared.tolist() == MOST_USED
    for layer, experts in zip(plan.layers, MOST_USED, strict=True):
        for leaf in ("w1", "w3"):
            bank = old[f"{layer}.moe.experts.all.{leaf}"]
            shared = new[f"{layer}.moe.shared_experts.{leaf}.weight"]
            assert torch.equal(shared, torch.cat([bank[e] for e in experts]))
        assert not new[f"{layer}.moe.shared_experts.w2.weight"].any()
        for group, order in zip(BIMODAL, plan.order[plan.layers.index(layer)].split([5, 3]), strict=True):  # fmt: skip
            bank = new[f"{layer}.moe.experts.{group.name}.w2"]
            assert torch.equal(bank, old[f"{layer}.moe.experts.all.w2"][order])
    what = {row["tensor"]: row["what"] for row in conversion.rows()}
    assert what["layers.*.moe.shared_experts.w1.weight"] == "copied"
    assert what["layers.*.moe.shared_experts.w2.weight"] == "new"
    totals = conversion.totals()
    assert totals["after"] - totals["before"] == 2 * 3 * 2 * 16 * 32 and totals["dropped"] == 0


def test_with_its_way_out_copied_it_would_say_what_the_experts_say(vlm, tmp_path):
    """The halves that are copied fit together: w1, w3 and w2 of the same experts in the same order."""
    model, _ = converted(vlm, tmp_path / "out")
    old = vlm[0].state_dict()
    x_TD = torch.randn(5, 32)
    shared = model.layers["1"].moe.shared_experts
    w1, w2, w3 = (
        old[f"layers.1.moe.experts.all.{leaf}"][MOST_USED[0]] for leaf in ("w1", "w2", "w3")
    )
    with torch.no_grad():
        shared.w2.weight.copy_(torch.cat(list(w2), dim=1))
        got = shared(x_TD, torch.zeros(5, dtype=torch.int64), torch.ones(()))
    expected = sum(
        (torch.nn.functional.silu(x_TD @ a.T) * (x_TD @ c.T)) @ b.T
        for a, b, c in zip(w1, w2, w3, strict=True)
    )
    torch.testing.assert_close(got, expected)


def test_plans_keep_it_on_disk_and_older_plans_have_none(vlm, tmp_path):
    plan = make_plan(vlm[2], BIMODAL, "cumulative", num_shared=2)
    plan.save(tmp_path / "plan.json", {})
    assert Plan.load(tmp_path / "plan.json").shared.tolist() == MOST_USED
    values = plan.values()
    del values["shared"]
    assert Plan.of_values(values, "old").shared.shape == (2, 0)
    for wrong in ([[0], [8]], [[0]], [0, 1], [[0], [1, 2]]):
        with pytest.raises(
            ValueError, match="plan:? old.*(shared must list experts from 0 to 7 for each|damaged)"
        ):
            Plan.of_values({**values, "shared": wrong}, "old")


def test_a_plan_and_a_config_that_disagree_are_refused(vlm, tmp_path):
    _, source, profile = vlm
    plan = make_plan(profile, BIMODAL, "cumulative", num_shared=2)
    bare = replace(BARE, groups=BIMODAL)
    with pytest.raises(
        ValueError,
        match="2 times a routed expert's width, .* of 0 times; set experts.new_shared_experts = 2",
    ):
        partition_checkpoint(source, bare, plan, tmp_path / "out")
    without = make_plan(profile, BIMODAL, "cumulative")
    with pytest.raises(
        ValueError, match="no shared expert .* make the plan with experts.new_shared_experts"
    ):
        partition_checkpoint(source, replace(bare, shared_hidden_dim=16), without, tmp_path / "out")
    with pytest.raises(ValueError, match="must be at most the 8 experts of a layer, got 9"):
        make_plan(profile, BIMODAL, "cumulative", num_shared=9)


def test_the_config_makes_it_for_a_flavor_without_one_only():
    config = JobConfig()
    config.model.flavor = "Qwen3-VL-30B-A3B"
    config.experts = Experts(new_shared_experts=2)
    args = FLAVORS[config.model.flavor]
    args.update_from_config(config)
    assert args.shared_hidden_dim == 2 * args.expert_hidden_dim
    config.model.flavor = "debug"
    with pytest.raises(
        ValueError, match="experts.new_shared_experts: flavor 'debug' has a shared expert already"
    ):
        FLAVORS["debug"].update_from_config(config)
    with pytest.raises(
        ValueError, match="new_shared_experts = 1: has no effect with experts.shared = false"
    ):
        Experts(new_shared_experts=1, shared=False)
    with pytest.raises(
        ValueError, match="experts.new_shared_experts: must be zero or positive, got -1"
    ):
        Experts(new_shared_experts=-1)
