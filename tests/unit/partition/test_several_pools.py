"""Conversion of a model that is released in several groups: a group is kept, divided or copied, and what does not fit is refused."""

from dataclasses import replace

import pytest
import torch

from symbiotic_titan.config.experts import ExpertGroupRow
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.parallel.ranks import DataRanks
from symbiotic_titan.partition.apply import partition_checkpoint, plan_of_checkpoint
from symbiotic_titan.partition.evaluate import InsideShares
from symbiotic_titan.partition.plan import Plan, make_plan, retained_routing_mass
from symbiotic_titan.partition.profile import (
    ModelIdentity,
    Profile,
    layer_statistics,
    router_hash,
    too_few_tokens,
)
from symbiotic_titan.sequence.batch import stack_rows
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT
from symbiotic_titan.weights.dcp import DistributedCheckpoint
from tests.helpers.stored_models import make_model, save, tiny_args
from tests.helpers.tiny_models import MIXED, pack_row

# As a model is released that knows no generated images: their tokens are routed with those of input images.
POOLS = (
    ExpertGroup("text", (TEXT,), 5, top_k=3),
    ExpertGroup("vision", (VIT, VAE), 3, hidden_dim=8, top_k=2),
)
WORDS = {"vocab_size": 272}  # those of packed rows
RELEASED = tiny_args(**WORDS, groups=POOLS, score_function="sigmoid", selection_bias=True)
VISION = {"hidden_dim": 8, "top_k": 2}
COPIED = {
    "text": ExpertGroupRow(["text"], 5, top_k=3, source="text"),
    "vision": ExpertGroupRow(["vit"], 3, source="vision", **VISION),
    "generation": ExpertGroupRow(["vae"], 3, source="vision", copy=True, **VISION),
}
DIVIDED = {
    "text": ExpertGroupRow(["text"], 5, top_k=3, source="text"),
    "vision": ExpertGroupRow(["vit"], 2, source="vision", **VISION),
    "generation": ExpertGroupRow(["vae"], 1, source="vision", hidden_dim=8, top_k=1),
}
MODALITIES = {"text": (TEXT,), "vision": (VIT,), "generation": (VAE,)}


def groups_of(rows):
    return tuple(
        ExpertGroup(name, MODALITIES[name], row.num_experts, row.hidden_dim, row.top_k)
        for name, row in rows.items()
    )


def args_of(rows):
    groups = groups_of(rows)
    return replace(RELEASED, groups=groups, num_experts=sum(g.num_experts for g in groups))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(model, folder of its checkpoint, its profile)."""
    model = make_model(RELEASED)
    for weight in model.flow_head.parameters():  # zeros at first
        torch.nn.init.normal_(weight, std=0.1)
    folder = save(model.state_dict(), tmp_path_factory.mktemp("released") / "model")
    routers = router_hash(DistributedCheckpoint(folder))
    identity = ModelIdentity("r", None, routers, {"text": 5, "vision": 3}, 2, {"text": 3})
    counts = torch.zeros(2, 3, 8, dtype=torch.int64)
    counts[:, TEXT, :5] = torch.tensor([9, 1, 5, 3, 6])
    counts[:, VIT, 5:] = torch.tensor([[8, 1, 7], [1, 8, 7]])
    tokens = {"text": 8, "vit": 8, "vae": 0}
    return model, folder, Profile(identity, ("layers.1", "layers.2"), counts, tokens, {})


def loaded(args, folder) -> SymbioticModel:
    model = SymbioticModel(args)
    DistributedCheckpoint(folder).read_into(model.state_dict())
    return model


def same(a, b):
    """Up to the last bits: the routers' product has other columns, which changes how it is summed."""
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def outputs(model):
    batch = stack_rows([pack_row(MIXED, RELEASED)])
    timesteps_BL = torch.full(batch.vae_image.shape, 0.5)
    with torch.no_grad():
        return model(batch, batch.latents, timesteps_BL, torch.tensor(1.0)), batch


def test_a_copied_pool_needs_no_plan_and_changes_no_output(tmp_path, released):
    model, source, _ = released
    args, out = args_of(COPIED), tmp_path / "out"
    conversion = partition_checkpoint(source, args, None, out, rows=COPIED)
    assert conversion.totals()["new"] == conversion.totals()["dropped"] == 0
    before, _ = outputs(model)
    after, _ = outputs(loaded(args, out))
    same(before.logits, after.logits)  # of text, which attends to vit tokens
    assert before.velocity.any()
    same(before.velocity, after.velocity)  # and of what the copy computes
    new, old = DistributedCheckpoint(out), model.state_dict()
    for leaf in ("experts.{}.w1", "experts.{}.w2", "router.{}.weight", "router.{}.bias"):
        for group in ("vision", "generation"):
            copy = new.read(f"layers.1.moe.{leaf.format(group)}")
            assert torch.equal(copy, old[f"layers.1.moe.{leaf.format('vision')}"])
    plan = plan_of_checkpoint(out)
    assert [vars(s) for s in plan.sources][2] == {"pool": "vision", "copy": True}
    inside = InsideShares(plan, torch.device("cpu"))
    with inside.counting(model):
        outputs(model)
    assert set(map(tuple, inside.shares(DataRanks(torch.device("cpu"), 0, 1, None)).values())) == {
        (1.0, 1.0)
    }


def test_groups_of_one_source_divide_it_by_the_rule(tmp_path, released):
    model, source, profile = released
    groups = groups_of(DIVIDED)
    made = make_plan(profile, groups, "cumulative", rows=DIVIDED)
    assert made.order.tolist() == [[0, 1, 2, 3, 4, 0, 2, 1], [0, 1, 2, 3, 4, 1, 2, 0]]
    made.save(tmp_path / "plan.json", {})
    plan = Plan.load(tmp_path / "plan.json")
    assert (plan.groups, plan.sources) == (made.groups, made.sources)
    text, vit, _ = retained_routing_mass(profile, plan)
    assert (text.mean, vit.mean) == (1.0, pytest.approx(15 / 16))
    assert (text.random_baseline, vit.random_baseline) == (1.0, pytest.approx(2 / 3))
    partition_checkpoint(source, args_of(DIVIDED), plan, tmp_path / "out", rows=DIVIDED)
    new, old = DistributedCheckpoint(tmp_path / "out"), model.state_dict()
    for layer, owners in (("layers.1", ([0, 2], [1])), ("layers.2", ([1, 2], [0]))):
        for group, experts in zip(("vision", "generation"), owners, strict=True):
            for leaf in ("experts.{}.w3", "router.{}.weight", "router.{}.bias"):
                taken = new.read(f"{layer}.moe.{leaf.format(group)}")
                assert torch.equal(taken, old[f"{layer}.moe.{leaf.format('vision')}"][experts])
    assert outputs(loaded(args_of(DIVIDED), tmp_path / "out"))[0].velocity.isfinite().all()


def test_groups_that_stay_as_they_are_are_copied_by_name(tmp_path, released):
    model, source, _ = released
    partition_checkpoint(source, RELEASED, None, tmp_path / "out")
    state = loaded(RELEASED, tmp_path / "out").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_one_pool_is_split_into_groups_of_unequal_top_k_or_copied(tmp_path):
    whole = make_model(tiny_args(**WORDS))
    source = save(whole.state_dict(), tmp_path / "vlm")
    rows = {
        "understanding": ExpertGroupRow(["text", "vit"], 8),
        "generation": ExpertGroupRow(["vae"], 8, hidden_dim=16, top_k=1, copy=True),
    }
    und, gen = (
        ExpertGroup("understanding", (TEXT, VIT), 8),
        ExpertGroup("generation", (VAE,), 8, 16, 1),
    )
    args = tiny_args(**WORDS, groups=(und, gen), num_experts=16)
    partition_checkpoint(source, args, None, tmp_path / "copied", rows=rows)
    text_only = stack_rows([pack_row([[("text", 9), ("vit", 2, 2), ("text", 5)]], args)])
    scale, times = torch.tensor(1.0), torch.zeros(text_only.vae_image.shape)
    results = [
        model(text_only, text_only.latents, times, scale).logits
        for model in (whole, loaded(args, tmp_path / "copied"))
    ]
    same(*results)
    counts = torch.randint(1, 99, (2, 3, 8))
    identity = ModelIdentity("t", None, router_hash(DistributedCheckpoint(source)), {"all": 8}, 2)
    profile = Profile(identity, ("layers.1", "layers.2"), counts, {"text": 9, "vit": 9}, {})
    split = tiny_args(**WORDS, groups=(replace(und, num_experts=5), replace(gen, num_experts=3)))
    plan = make_plan(profile, split.groups, "cumulative")
    partition_checkpoint(source, split, plan, tmp_path / "split")
    stored = DistributedCheckpoint(tmp_path / "split")
    for layer, row in zip(plan.layers, plan.order, strict=True):
        taken = stored.read(f"{layer}.moe.experts.generation.w2")
        assert torch.equal(taken, whole.state_dict()[f"{layer}.moe.experts.all.w2"][row[5:]])
    wide = replace(split, groups=(split.groups[0], replace(split.groups[1], hidden_dim=24)))
    with pytest.raises(ValueError, match=r"generation.hidden_dim: .*16 in .* 'all', got 24; set"):
        partition_checkpoint(source, wide, plan, tmp_path / "wide")


def changed(rows, name, **changes):
    return {**rows, name: replace(rows[name], **changes)}


REFUSED = {
    "no source": (
        {name: replace(row, source=None, copy=False) for name, row in COPIED.items()},
        "is already partitioned into text, vision; start from the checkpoint before that, or name with",
    ),
    "unknown source": (
        changed(COPIED, "generation", source="visio"),
        "experts.partition.generation.source: must be a group of the checkpoint, text or vision, got 'visio'",
    ),
    "no source of that name": (
        changed(COPIED, "generation", source=None),
        "experts.partition.generation.source: must be a group of the checkpoint, text or vision, got none",
    ),
    "smaller copy": (
        changed(COPIED, "generation", num_experts=2),
        "experts.partition.generation.num_experts: a copy holds all 3 experts of the checkpoint's group 'vision', got 2",
    ),
    "wrong sum": (
        changed(COPIED, "text", num_experts=4),
        "the groups that divide the checkpoint's group 'text' (text) hold 4 experts, but it has 5; change num_experts of one of them by +1",
    ),
    "nothing left": (
        changed(COPIED, "vision", source="text", num_experts=3),
        "(text, vision) hold 8 experts, but it has 5",
    ),
    "other width": (
        changed(COPIED, "vision", hidden_dim=16),
        "experts.partition.vision.hidden_dim: a group has the width of the experts that it takes, 8 in the checkpoint's group "
        "'vision', got 16; set it to 8",
    ),
    "the flavor's width": (
        changed(COPIED, "generation", hidden_dim=None),
        "experts.partition.generation.hidden_dim: a group has the width of the experts that it takes, 8",
    ),
    "divided without a plan": (DIVIDED, "--plan must say which expert goes where"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_do_not_fit_the_pools_are_refused(tmp_path, released, case):
    rows, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        partition_checkpoint(released[1], args_of(rows), None, tmp_path / "out", rows=rows)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_plan_of_other_sources_and_a_new_shared_expert_are_refused(tmp_path, released):
    _, source, profile = released
    plan = make_plan(profile, groups_of(COPIED), "cumulative", rows=COPIED)
    other = changed(COPIED, "generation", copy=False)
    swapped = changed(other, "vision", copy=True)
    with pytest.raises(
        ValueError, match="the plan takes the group 'vision' from 'vision' with copy = false"
    ):
        partition_checkpoint(source, args_of(swapped), plan, tmp_path / "out", rows=swapped)
    with pytest.raises(
        ValueError, match="experts.new_shared_experts = 1: is made of experts that all"
    ):
        make_plan(profile, groups_of(COPIED), "cumulative", num_shared=1, rows=COPIED)


def test_a_profile_of_several_groups_is_read_group_by_group(tmp_path, released):
    profile = released[2]
    profile.save(tmp_path / "profile.json")
    again = Profile.load(tmp_path / "profile.json")
    assert again.model == profile.model and again.model.top_k_of("text") == 3
    row, _ = layer_statistics(profile)
    assert row["imbalance_text"] == pytest.approx(9 / 4.8)
    assert row["imbalance_vit"] == pytest.approx(8 / (16 / 3))
    assert row["top_1_in_both"] is None  # they share no expert
    warning = too_few_tokens(profile)
    assert "8 text tokens were read; ranks of 5 experts are noisy with fewer than 167" in warning
    assert "8 vit tokens were read; ranks of 3 experts are noisy with fewer than 150" in warning
