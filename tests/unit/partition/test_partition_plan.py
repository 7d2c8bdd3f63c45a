"""Partition rules on counts made by hand, and what a plan keeps."""

import json

import pytest
import torch

from symbiotic_titan.config.experts import PARTITION_RULES
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.partition.plan import (
    Plan,
    check_layers,
    make_plan,
    retained_routing_mass,
)
from symbiotic_titan.partition.profile import (
    ModelIdentity,
    Profile,
)
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT

OURS = ("cumulative", "cumulative_counts", "per_modality_max", "balanced", "random")


def bimodal(understanding, generation):
    return (
        ExpertGroup("understanding", (TEXT, VIT), understanding),
        ExpertGroup("generation", (VAE,), generation),
    )


def tripartite(text, vit, vae):
    return (
        ExpertGroup("text", (TEXT,), text),
        ExpertGroup("vit", (VIT,), vit),
        ExpertGroup("vae", (VAE,), vae),
    )


def profile_of(*layers, groups=None) -> Profile:
    """Layers are (text counts, ViT counts)."""
    counts = torch.tensor([[text, vit, [0] * len(text)] for text, vit in layers])
    names = tuple(f"layers.{i}" for i in range(1, len(layers) + 1))
    model = ModelIdentity("tiny", 3, "abc", groups or {"all": counts.shape[-1]}, 2)
    return Profile(model, names, counts, {"text": 10**6, "vit": 10**6, "vae": 0}, {})


def groups_of(plan: Plan, layer: int = 0) -> list[list[int]]:
    sizes = [group.num_experts for group in plan.groups]
    return [part.tolist() for part in plan.order[layer].split(sizes)]


def random_profile(num_experts: int, num_layers: int = 3) -> Profile:
    counts = torch.randint(0, 1000, (num_layers, 2, num_experts))
    return profile_of(*counts.tolist())


@pytest.mark.parametrize("rule", OURS)
@pytest.mark.parametrize(
    "groups",
    [bimodal(24, 8), bimodal(8, 24), tripartite(8, 8, 16), tripartite(11, 11, 10)],
    ids=["24/8", "8/24", "8/8/16", "11/11/10"],
)
def test_every_rule_gives_each_expert_one_slot_in_each_layer(rule, groups):
    plan = make_plan(random_profile(32), groups, rule)
    for row in plan.order.tolist():
        assert sorted(row) == list(range(32))


@pytest.mark.parametrize("rule", ["cumulative", "per_modality_max", "random"])
def test_experts_of_a_group_keep_their_order(rule):
    for part in groups_of(make_plan(random_profile(32), tripartite(8, 8, 16), rule)):
        assert part == sorted(part)


def test_cumulative_gives_the_most_used_to_understanding():
    profile = profile_of(([9, 1, 0, 5, 2, 0], [0, 9, 1, 0, 1, 0]), ([0, 0, 0, 1, 2, 3], [0] * 6))
    plan = make_plan(profile, bimodal(3, 3), "cumulative")
    assert groups_of(plan, 0) == [[0, 1, 3], [2, 4, 5]]
    assert groups_of(plan, 1) == [[3, 4, 5], [0, 1, 2]]


def test_cumulative_does_not_look_at_the_order_of_groups():
    profile = profile_of(([9, 1, 0, 5, 2, 0], [0, 9, 1, 0, 1, 0]))
    plan = make_plan(profile, bimodal(3, 3)[::-1], "cumulative")
    assert groups_of(plan) == [[2, 4, 5], [0, 1, 3]]


def test_cumulative_tripartite_leaves_the_least_used_to_vae_and_divides_the_rest_by_preference():
    text, vit = [50, 40, 0, 1, 30, 0], [49, 0, 30, 0, 1, 2]
    plan = make_plan(profile_of((text, vit)), tripartite(2, 2, 2), "cumulative")
    # Leads of text over ViT among 0, 1, 2, 4: 1, 40, -30, 29. Expert 0 likes text better, but 1 and 4 do more so.
    assert groups_of(plan) == [[1, 4], [0, 2], [3, 5]]


def test_division_between_text_and_vit_keeps_the_largest_shares():
    profile = random_profile(8, num_layers=1)
    plan = make_plan(profile, tripartite(3, 3, 2), "cumulative")
    text, vit, vae = groups_of(plan)
    shares = profile.counts[0].double() / profile.counts[0].sum(-1, keepdim=True).clamp(min=1)

    def kept(part):
        return shares[TEXT, list(part)].sum() + shares[VIT, list(set(text + vit) - set(part))].sum()

    from itertools import combinations

    best = max(kept(part) for part in combinations(sorted(text + vit), 3))
    assert kept(text) == pytest.approx(best)


def test_shares_keep_a_specialist_of_the_modality_with_few_tokens_and_counts_do_not():
    profile = profile_of(([400, 300, 200, 0], [0, 0, 1, 9]))
    assert groups_of(make_plan(profile, bimodal(2, 2), "cumulative"))[0] == [0, 3]
    assert groups_of(make_plan(profile, bimodal(2, 2), "cumulative_counts"))[0] == [0, 1]


def test_per_modality_max_prefers_a_specialist_to_one_that_serves_both_a_little():
    profile = profile_of(([50, 30, 20, 0], [50, 30, 0, 20]), ([40, 35, 25, 0], [0, 22, 28, 50]))
    assert groups_of(make_plan(profile, bimodal(2, 2), "cumulative"), 1) == [[1, 2], [0, 3]]
    assert groups_of(make_plan(profile, bimodal(2, 2), "per_modality_max"), 1) == [[0, 3], [1, 2]]


def test_balanced_has_the_groups_of_cumulative_with_equal_load_in_every_range():
    profile = profile_of(([8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0], [0] * 12))
    groups = bimodal(8, 4)
    balanced = groups_of(make_plan(profile, groups, "balanced"))
    assert [sorted(p) for p in balanced] == groups_of(make_plan(profile, groups, "cumulative"))
    load = profile.counts[0, TEXT]
    for degree, worst in ((2, 0), (4, 0)):
        loads = [int(load[part].sum()) for part in torch.tensor(balanced[0]).chunk(degree)]
        assert max(loads) - min(loads) <= worst
    assert balanced[1] == [8, 9, 10, 11]  # unused experts keep their order


def test_balanced_cuts_sizes_that_are_no_power_of_two():
    profile = random_profile(14, num_layers=1)
    order = groups_of(make_plan(profile, bimodal(12, 2), "balanced"))[0]
    load = (profile.counts[0, TEXT] + profile.counts[0, VIT])[torch.tensor(order)]
    spread = [[int(part.sum()) for part in load.chunk(degree)] for degree in (2, 4)]
    plain = [[int(part.sum()) for part in load.sort().values.chunk(degree)] for degree in (2, 4)]
    for mine, sorted_loads in zip(spread, plain, strict=True):
        assert max(mine) - min(mine) < 0.5 * (max(sorted_loads) - min(sorted_loads))


def test_random_differs_by_seed_and_by_layer_and_leaves_the_generator_alone():
    profile = random_profile(32)
    before = torch.get_rng_state()
    plans = [make_plan(profile, bimodal(24, 8), "random", seed).order for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(plans[0], plans[1]) and not torch.equal(plans[0], plans[2])
    assert not torch.equal(plans[0][0], plans[0][1])


def test_kept_mass_is_the_share_of_choices_inside_the_group():
    profile = profile_of(([6, 2, 1, 1], [0, 4, 4, 2]), ([5, 5, 0, 0], [10, 10, 0, 0]))
    plan = make_plan(profile, bimodal(2, 2), "cumulative")
    assert groups_of(plan) == [[0, 1], [2, 3]]
    text, vit, vae = retained_routing_mass(profile, plan)
    assert (text.modality, text.mean, text.worst) == ("text", pytest.approx(0.9), 0.8)
    assert (vit.mean, vit.worst, vit.worst_layer) == (pytest.approx(0.7), 0.4, "layers.1")
    assert (vae.modality, vae.mean, vae.random_baseline) == ("vae", None, 0.5)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda c, g: None, "must be a tensor of integers, got NoneType"),
        (lambda c, g: c[:, 0].double(), "must be a tensor of integers"),
        (lambda c, g: torch.zeros(2, 3, dtype=torch.int64), r"must have shape \(1, 4\)"),
        (
            lambda c, g: torch.tensor([[0, 1, 1, 3]]),
            r"row 0 of the order must hold every expert from 0 to 3 once, got \[0, 1, 1, 3\]",
        ),
    ],
)
def test_a_rule_that_gives_no_order_is_named(result, message):
    profile = profile_of(([1, 2, 3, 4], [0] * 4))
    with PARTITION_RULES.temporarily(mine=result):
        with pytest.raises(ValueError, match="experts.partition_rule = 'mine': .*" + message):
            make_plan(profile, bimodal(2, 2), "mine")


def test_a_rule_cannot_change_the_profile():
    def spoil(counts, groups):
        counts.zero_()
        return torch.arange(4).unsqueeze(0)

    profile = profile_of(([1, 2, 3, 4], [0] * 4))
    with PARTITION_RULES.temporarily(mine=spoil):
        make_plan(profile, bimodal(2, 2), "mine")
    assert profile.counts.sum() == 10


def test_plans_for_other_models_are_refused():
    profile = profile_of(([1, 2, 3, 4], [0] * 4))
    with pytest.raises(ValueError, match="'nope': nothing is registered.*choose from cumulative"):
        make_plan(profile, bimodal(2, 2), "nope")
    with pytest.raises(ValueError, match="hold 5 experts, but the profile is of a model with 4"):
        make_plan(profile, bimodal(3, 2), "cumulative")
    split = profile_of(([1, 2, 3, 4], [0] * 4), groups={"a": 2, "b": 2})
    with pytest.raises(ValueError, match="partitioned into a, b; profile the model before"):
        make_plan(split, bimodal(2, 2), "cumulative")


def test_plan_survives_its_file_and_damage_is_named(tmp_path):
    path = tmp_path / "plan.json"
    plan = make_plan(random_profile(8), bimodal(6, 2), "random", seed=5)
    plan.save(path, {"profile": "p.json"})
    loaded = Plan.load(path)
    assert torch.equal(loaded.order, plan.order)
    assert (loaded.groups, loaded.seed, loaded.model) == (plan.groups, 5, plan.model)
    values = json.loads(path.read_text())
    values["order"][1][0] = values["order"][1][1]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="row 1 of the order must hold every expert"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(order=None), "order: must be a list"),
        (lambda v: v.update(order=[[0.5]]), r"order\[0\]\[0\]: must be an integer, got 0.5"),
        (lambda v: v["order"][0].__setitem__(0, 2**70), "is damaged"),
        (lambda v: v.update(layers="layers.1"), "layers: must be a list"),
        (lambda v: v.update(layers=["a", "b", "c"]), r"layers: must be names such as layers.3"),
        (lambda v: v.update(layers=["layers.1"] * 3), "each once"),
        (lambda v: v.update(seed="5"), "seed: must be an integer, got '5'"),
        (lambda v: v.update(groups=[]), "groups: must be a table"),
        (lambda v: v["groups"].update(generation=2), "groups.generation: must be a table"),
        (
            lambda v: v["groups"]["generation"].update(num_experts="2"),
            "groups.generation.num_experts: must be an integer, got '2'",
        ),
        (
            lambda v: v["groups"]["generation"].update(num_experts=-2),
            "groups.generation.num_experts: must be at least 1, got -2",
        ),
        (
            lambda v: v["groups"]["generation"].update(modalities="vae"),
            "groups.generation.modalities: must be a list",
        ),
        (
            lambda v: v["groups"]["understanding"].update(modalities=["sound"]),
            "unknown modality 'sound'",
        ),
        (lambda v: v["model"].update(groups=None), "model.groups: must be a table"),
        (lambda v: v.update(shared=[[9]] * 3), "shared must list experts from 0 to 7 for each"),
        (lambda v: v.update(shared=3), "shared: must be a list"),
    ],
)
def test_what_is_wrong_in_a_plan_is_named(tmp_path, change, message):
    path = tmp_path / "plan.json"
    make_plan(random_profile(8), bimodal(6, 2), "random").save(path, {})
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_plan_of_other_layers_is_refused():
    plan = make_plan(random_profile(8, 2), bimodal(6, 2), "random")
    check_layers(plan, ["layers.2", "layers.1"])
    with pytest.raises(ValueError, match="of other layers than the model: layers.1, layers.3 have"):
        check_layers(plan, ["layers.2", "layers.3"])
