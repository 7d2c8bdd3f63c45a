"""Partitions are checked when they are made, with messages a user can act on."""

import pytest

from symbiotic_titan.moe.partition import ExpertGroup, MoEArgs, check_expert_parallel_degree

UND, GEN = ExpertGroup("und", (0, 1), 96), ExpertGroup("gen", (2,), 32)


def args(groups=(UND, GEN), **changes):
    return MoEArgs(**({"dim": 8, "hidden_dim": 8, "groups": groups, "top_k": 4} | changes))


def test_sizes_of_a_partition():
    assert args().num_experts == 128
    assert args().group_sizes == (96, 32)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((), "at least one group, got none"),
        ((UND,), "no expert group for vae; every modality must be in exactly one group"),
        ((UND, ExpertGroup("gen", (1, 2), 32)), "'vit' is in expert groups 'und' and 'gen'"),
        ((ExpertGroup("und", (0, 0, 1, 2), 9),), "'text' is in expert groups 'und' and 'und'"),
        ((UND, ExpertGroup("gen", (2, 3), 32)), "'gen': 3 is no modality; choose from 0 to 2"),
        ((UND, ExpertGroup("und", (2,), 32)), "'und' is given 2 times; names are unique"),
        ((UND, ExpertGroup("gen", (2,), 3)), "'gen': top_k = 4 does not fit into num_experts = 3"),
        ((UND, ExpertGroup("gen.x", (2,), 32)), "'gen.x': a name is lower-case letters"),
        ((UND, ExpertGroup("", (2,), 32)), "'': a name is lower-case letters"),
        ((UND, ExpertGroup("forward", (2,), 32)), "'forward': torch modules have an attribute"),
        ((UND, ExpertGroup("keys", (2,), 32)), "'keys': torch modules have an attribute"),
        ((UND, ExpertGroup("training", (2,), 32)), "'training': torch modules have an attribute"),
    ],
)
def test_bad_groups_are_named(groups, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        args(groups)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"hidden_dim": -1}, "hidden_dim must be at least 1, got -1"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"shared_hidden_dim": -1}, "shared_hidden_dim must be 0"),
        (
            {"score_function": "relu"},
            "score_function = 'relu': nothing is registered under this name",
        ),
        ({"shield_mode": "all"}, "shield_mode must be one of output, weights, got 'all'"),
        ({"shield_modalities": (5,)}, "shield_modalities: 5 is no modality"),
        ({"shared_gate": True}, "shared_gate has no effect without a shared expert"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        args(**changes)


@pytest.mark.parametrize("degree", [1, 2, 4, 8, 16, 32])
def test_degree_that_divides_every_group_passes(degree):
    assert check_expert_parallel_degree((UND, GEN), degree) is None


@pytest.mark.parametrize(
    ("sizes", "degree", "message"),
    [
        ((96, 32), 3, r"= 3 does not divide expert group 'g1' \(num_experts = 32\); .*: 2 and 4"),
        ((44, 42), 4, r"= 4 does not divide expert group 'g1' \(num_experts = 42\); .*: 2$"),
        ((44, 42), 7, r"= 7 does not divide expert group 'g0' \(num_experts = 44\); .*: 2$"),
        ((7, 5), 2, r"does not divide expert group 'g0' .*: 1$"),
        ((8, 8), 0, r"expert_parallel_degree must be at least 1, got 0"),
    ],
)
def test_degree_that_does_not_divide_names_group_and_nearest_degrees(sizes, degree, message):
    groups = [ExpertGroup(f"g{i}", (i,), size) for i, size in enumerate(sizes)]
    with pytest.raises(ValueError, match=message):
        check_expert_parallel_degree(groups, degree)
