import dataclasses
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from symbiotic_titan.config.experts import ExpertGroupRow
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.model.args import one_pool, partition_groups, round_vocab_size
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.model_config import write_model_config
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.model.vit_args import VitArgs
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT


def row(modalities, num_experts):
    return ExpertGroupRow(modalities, num_experts)


SPLIT = {"understanding": row(["text", "vit"], 12), "generation": row(["vae"], 4)}


def config(
    partition=None, shared=True, modalities=("vae",), patch=8, seed=3, flavor="debug", vocab_size=0
):
    """The sections that ModelArgs reads, as JobConfig has them."""
    return SimpleNamespace(
        model=SimpleNamespace(flavor=flavor, attention_backend="flex", vocab_size=vocab_size),
        experts=SimpleNamespace(
            partition=partition or {}, shared=shared, score_function=None, new_shared_experts=0
        ),
        shielding=SimpleNamespace(modalities=list(modalities), mode="weights"),
        latents=Latents(patch=patch),
        debug=SimpleNamespace(seed=seed),
    )


@pytest.mark.parametrize("flavor", FLAVORS)
def test_every_flavor_is_complete_and_prints_as_json(flavor):
    args = FLAVORS[flavor]
    groups = json.loads(json.dumps(dataclasses.asdict(args)))["groups"]
    released = {"ERNIE-4.5-VL-28B-A3B": ["text", "vision"]}.get(flavor, ["all"])
    assert [group["name"] for group in groups] == released
    assert sum(group["num_experts"] for group in groups) == args.num_experts


@pytest.mark.parametrize("flavor", ["debug", "mini", "1B-A0.3B", "30B-A3B"])
def test_our_own_flavors_have_a_shared_expert_and_one_dense_layer(flavor):
    args = FLAVORS[flavor]
    assert args.shared_hidden_dim > 0 and args.num_dense_layers == 1


def test_flavors_are_fresh_at_every_look_up():
    FLAVORS["debug"].update_from_config(config(SPLIT))
    assert FLAVORS["debug"].groups == one_pool(16)
    assert FLAVORS["debug"] is not FLAVORS["debug"]


def test_an_unknown_flavor_lists_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"model.flavor: unknown flavor 'tiny'; choose from 1B-A0.3B, 30B-A3B, Aria, debug",
    ):
        FLAVORS["tiny"]
    assert "tiny" not in FLAVORS and "mini" in FLAVORS and len(FLAVORS) == len(set(FLAVORS))


def test_the_config_partitions_shields_and_sizes_the_model():
    args = FLAVORS["debug"]
    args.update_from_config(config(SPLIT))
    assert args.groups == (
        ExpertGroup("understanding", (TEXT, VIT), 12),
        ExpertGroup("generation", (VAE,), 4),
    )
    assert args.moe_args.groups == args.groups
    assert (args.shield_modalities, args.shield_mode, args.init_seed) == ((VAE,), "weights", 3)
    assert args.attention_backend == "flex"
    assert args.geometry == ImageGeometry(
        vit_patch=4,
        vit_merge=2,
        vit_channels=3,
        latent_channels=3,
        latent_stride=1,
        latent_patch=8,
    )


def test_the_number_of_embeddings_is_the_flavors_unless_the_config_gives_another():
    args = FLAVORS["debug"]
    args.update_from_config(config())
    assert args.vocab_size == 320
    args.update_from_config(config(vocab_size=129_344))
    assert args.vocab_size == 129_344
    with torch.device("meta"):
        model = SymbioticModel(args)
    assert model.tok_embeddings.weight.shape == model.output.weight.shape == (129_344, args.dim)


@pytest.mark.parametrize(("ids", "expected"), [(1, 64), (64, 64), (129_288, 129_344)])
def test_numbers_of_embeddings_are_multiples_of_64(ids, expected):
    assert round_vocab_size(ids) == expected


def test_sizes_of_a_group_and_copies_reach_the_model():
    rows = {
        "understanding": ExpertGroupRow(["text", "vit"], 16, top_k=4),
        "generation": ExpertGroupRow(["vae"], 8, hidden_dim=40, copy=True),
    }
    args = FLAVORS["debug"]
    args.update_from_config(config(rows))
    assert args.num_experts == 24
    assert (args.moe_args.top_ks, args.moe_args.hidden_dims) == ((4, 2), (64, 40))


def test_an_empty_partition_keeps_the_groups_of_the_flavor(tmp_path):
    groups = (ExpertGroup("text", (TEXT,), 12, top_k=3), ExpertGroup("image", (VIT, VAE), 4, 32))
    path = tmp_path / "model.json"
    write_model_config(path, replace(FLAVORS["debug"], groups=groups))
    args = FLAVORS[str(path)]
    args.update_from_config(config(flavor=str(path)))
    assert args.groups == groups
    args.update_from_config(config(SPLIT, flavor=str(path)))
    assert [group.name for group in args.groups] == ["understanding", "generation"]


def test_an_empty_partition_is_one_pool_and_no_seed_is_seed_zero():
    args = FLAVORS["debug"]
    args.update_from_config(config(seed=None))
    assert args.groups == one_pool(16) and args.init_seed == 0


def test_the_shared_expert_can_be_taken_away():
    args = FLAVORS["debug"]
    args.update_from_config(config(shared=False))
    assert args.moe_args.shared_hidden_dim == 0


def test_groups_that_do_not_add_up_name_the_flavor_and_the_remedy():
    wrong = {"understanding": row(["text", "vit"], 10), "generation": row(["vae"], 4)}
    message = (
        r"experts.partition: the groups hold 14 experts but flavor 'debug' has 16; "
        r"change num_experts of a group by \+2"
    )
    with pytest.raises(ValueError, match=message):
        partition_groups(wrong, 16, "debug")
    with pytest.raises(ValueError, match=message):
        FLAVORS["debug"].update_from_config(config(wrong))


def test_an_unknown_modality_names_its_key():
    with pytest.raises(
        ValueError, match=r"experts.partition.a.modalities: unknown modality 'audio'"
    ):
        partition_groups({"a": row(["audio"], 16)}, 16, "debug")
    with pytest.raises(ValueError, match=r"shielding.modalities: unknown modality 'audio'"):
        FLAVORS["debug"].update_from_config(config(modalities=["audio"]))


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ({"a": row(["text", "vit"], 16)}, "no expert group for vae"),
        ({"a": row(["text", "vit", "vae"], 8), "b": row(["vae"], 8)}, "must be in exactly one"),
        ({"a": row(["text", "vit"], 15), "b": row(["vae"], 1)}, "top_k = 2 does not fit"),
    ],
)
def test_the_rules_of_the_moe_are_checked_with_the_config(partition, message):
    with pytest.raises(ValueError, match=message):
        FLAVORS["debug"].update_from_config(config(partition))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, r"model.dim: must be positive, got 0"),
        ({"num_dense_layers": -1}, r"model.num_dense_layers: must be zero or positive, got -1"),
        ({"dim": 30}, r"model.dim: must be a multiple of 4 \(sinusoids come in pairs\), got 30"),
        ({"num_layers": "two"}, r"model.num_layers: must be an integer, got 'two'"),
        ({"qk_norm": "both"}, r"model.qk_norm: must be one of 'none', 'before', 'after', got 'both'"),
        ({"num_kv_heads": 3}, r"model.num_heads: must be a multiple of num_kv_heads = 3, got 4"),
        ({"num_dense_layers": 3}, r"model.num_dense_layers: must be at most num_layers = 2, got 3"),
        ({"num_experts": 9}, r"model.groups: hold 8 experts, but num_experts is 9"),
        ({"timestep_width": 15}, r"model.timestep_width: must be a multiple of 2 .*, got 15"),
        ({"rotary_fraction": 1.5}, r"model.rotary_fraction: must be at most 1, got 1.5"),
        ({"rotary_fraction": 0.3}, r"model.rotary_fraction: must rotate an even number of the 16 .*, got 4.8"),
        ({"mrope_sections": (4, 2)}, r"model.mrope_sections: must be three numbers .* 16 rotated .*, got \(4, 2\)"),
        ({"mrope": "none"}, r"model.mrope_sections: has no effect with mrope 'none'"),
        ({"mrope": "none", "mrope_sections": ()}, r"model.rotary_layout: 'grid' gives image tokens rows and columns"),
        ({"attention_backend": "flash"}, r"model.attention_backend: must be one of 'sdpa', 'flex', got 'flash'"),
        ({"vit_attention": "none"}, r"model.vit_attention: must be one of 'bidirectional', 'causal', got 'none'"),
    ],
)  # fmt: skip
def test_args_that_break_a_rule_name_key_value_and_rule(args, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(args, **changes)


@pytest.mark.parametrize("kind", ["interleaved", "pairwise"])
def test_sections_must_fit_the_kind_of_mrope(args, kind):
    with pytest.raises(ValueError, match=rf"model.mrope_sections: '{kind}' .* got \(1, 4, 3\)"):
        replace(args, mrope=kind, mrope_sections=(1, 4, 3))


@pytest.mark.parametrize("layers", [(1, 0), (0, 0), (2,), (-1, 0)])
def test_deepstack_names_ascending_layers_of_the_encoder(deep, layers):
    vit = replace(deep.vit, num_layers=2)
    with pytest.raises(
        ValueError, match=r"vit.deepstack: must be ascending indices of the 2 layers"
    ):
        replace(vit, deepstack=layers)


def test_every_deepstack_feature_needs_a_layer_of_the_decoder(deep):
    with pytest.raises(
        ValueError, match=r"vit.deepstack: .* but model.num_layers is 1, got \(0, 1"
    ):
        replace(deep, num_layers=1)


def test_vit_heads_must_hold_pairs_for_rows_and_columns(args):
    with pytest.raises(
        ValueError, match=r"vit.dim: must be a multiple of 4 \* vit.num_heads = 32 .*, got 16"
    ):
        replace(args.vit, num_heads=8)
    table = {"rope_theta": 0.0, "position_grid": 4}
    assert replace(args.vit, num_heads=8, **table).head_dim == 2
    with pytest.raises(ValueError, match=r"vit.dim: must be a multiple of vit.num_heads = 3, got"):
        replace(args.vit, num_heads=3, **table)
    with pytest.raises(
        ValueError, match=r"vit.rope_theta: with 0 .* and vit.position_grid = 0, patches have no"
    ):
        replace(args.vit, rope_theta=0.0)
    with pytest.raises(ValueError, match=r"vit.patch: must be positive, got 0"):
        replace(args.vit, patch=0)
    assert isinstance(args.vit, VitArgs) and args.vit.head_dim == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_resize": "fit"}, r"vit.image_resize: must be 'aria' with .* got 'fit' with vit.queries = \(3, 5\)"),
        ({"queries": (), "query_sides": ()}, r"vit.image_resize: .* got 'aria' with vit.queries = \(\)"),
        ({"query_sides": (4,)}, r"vit.query_sides: must be one for each of vit.queries = \(3, 5\), got \(4,\)"),
        ({"queries": (5, 3)}, r"vit.queries: must be positive and ascending, got \(5, 3\)"),
        ({"queries": (0, 3)}, r"vit.queries: must be positive and ascending, got \(0, 3\)"),
        ({"query_sides": (4, 4)}, r"vit.query_sides: must be positive and ascending, got \(4, 4\)"),
        ({"merge": 2}, r"vit.merge: must be 1 with learned queries"),
        ({"projector_hidden_dim": 8}, r"vit.projector_hidden_dim: must be 0 with learned queries"),
        ({"deepstack": (0,)}, r"vit.deepstack: must be \(\) with learned queries"),
    ],
)  # fmt: skip
def test_queries_exclude_what_needs_a_token_per_square(query_args, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(query_args.vit, **changes)


def test_tokens_that_are_queries_have_no_rows_and_columns(query_args):
    with pytest.raises(
        ValueError, match="model.rotary_layout: 'grid' .* queries .* do not have; use"
    ):
        replace(query_args, rotary_layout="grid")
