"""Hunyuan-A13B against transformers: logits, router choices, tensors, settings."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM
from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import HunYuanMoEV1Gate

from symbiotic_titan.hf.architectures import hunyuan_v1_moe
from symbiotic_titan.hf.architectures.hunyuan_v1_moe import HUNYUAN_V1_MOE
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.vit_args import VitArgs
from tests.helpers.decoder_parity import (
    loaded,
    make_random,
    moved_by,
    run,
    run_released,
    saved,
    shapes_of,
    stored,
    text_row,
)
from tests.helpers.released_configs import HUNYUAN as RELEASED
from tests.helpers.released_configs import HUNYUAN_SIZES as SIZES
from tests.helpers.stored_models import assert_equal_tensors

VIT = VitArgs(dim=16, num_layers=1, num_heads=2, hidden_dim=24, patch=2, merge=2)
ALPHA = RELEASED["rope_scaling"]


def released(tie=True):
    config = HunYuanMoEV1Config(
        **SIZES, rope_theta=10000.0, rope_scaling=ALPHA, tie_word_embeddings=tie
    )
    config._attn_implementation = "eager"
    return make_random(HunYuanMoEV1ForCausalLM(config), gain=1.0)


@pytest.fixture
def pair(tmp_path):
    """(transformers' model, ours of the same tensors, config.json, those tensors)."""
    theirs = released()
    config, tensors = saved(theirs, tmp_path)
    args = replace(HUNYUAN_V1_MOE.model_args(config), vit=VIT)
    return theirs, loaded(HUNYUAN_V1_MOE, args, tensors, new=("vit",)), config, tensors


@pytest.fixture
def tokens_BT():
    return torch.randint(272, (2, 40), generator=torch.Generator().manual_seed(1))


def test_logits_and_router_choices_equal_those_of_transformers(pair, tokens_BT):
    theirs, ours, _, _ = pair
    logits, choices = run(ours, text_row(ours.args, tokens_BT))
    expected, expected_choices = run_released(theirs, HunYuanMoEV1Gate, {"input_ids": tokens_BT})
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert len(choices) == 3
    assert all(torch.equal(a, b) for a, b in zip(choices, expected_choices, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": "before"},
        {"qk_norm": "none"},
        {"rope_theta": 10_000.0},
        {"rotary_interleaved": True},
        {"shared_hidden_dim": 0},
        {"normalize_weights": False},
        {"score_function": "sigmoid"},
        {"norm_eps": 1e-2},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_switch_matters(pair, tokens_BT, changes):
    _, ours, _, _ = pair
    assert moved_by(ours, text_row(ours.args, tokens_BT), **changes) > 5e-3


def test_tensors_come_back_bit_for_bit(pair):
    _, ours, _, tensors = pair
    assert_equal_tensors(stored(HUNYUAN_V1_MOE, ours, shapes_of(tensors)), tensors)


def test_experts_in_one_tensor_are_the_same_experts(pair, tmp_path):
    theirs, ours, _, tensors = pair
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    assert fused.keys() != tensors.keys()
    again = loaded(HUNYUAN_V1_MOE, ours.args, fused, new=("vit",))
    assert_equal_tensors(again.state_dict(), ours.state_dict())
    assert_equal_tensors(stored(HUNYUAN_V1_MOE, again, shapes_of(fused)), fused)


def test_output_of_its_own_is_read_where_it_is_not_tied(tmp_path):
    config, tensors = saved(released(tie=False), tmp_path)
    args = replace(HUNYUAN_V1_MOE.model_args(config), vit=VIT)
    model = loaded(HUNYUAN_V1_MOE, args, tensors, new=("vit",))
    assert torch.equal(model.output.weight, tensors["lm_head.weight"])
    assert_equal_tensors(stored(HUNYUAN_V1_MOE, model, shapes_of(tensors)), tensors)


def test_flavor_is_what_the_released_file_says():
    assert HUNYUAN_V1_MOE.model_args(RELEASED) == FLAVORS["Hunyuan-A13B"]


def test_silent_settings_are_what_transformers_takes():
    assert hunyuan_v1_moe.DEFAULTS.items() <= HunYuanMoEV1Config().to_dict().items()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_cla": True}, "use_cla = True is not supported"),
        ({"use_mla": True}, "use_mla = True"),
        ({"moe_layer_num_skipped": 1}, "moe_layer_num_skipped = 1"),
        ({"num_shared_expert": [2] * 32}, "num_shared_expert = 2"),
        ({"moe_topk": [8] * 31 + [4]}, "moe_topk = .* differs from layer to layer"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'.*only 'silu' is"),
        ({"use_qk_norm": False}, "use_qk_norm = False"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"moe_intermediate_size": [1536] * 32}, "moe_intermediate_size = 1536"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling.rope_type: .* got 'yarn'",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.factor = 4.0"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type = 'dynamic' .* got alpha = None"),
        ({"head_dim": 2, "attention_head_dim": 2}, "more than 2 channels, got .* 2 channels"),
        ({"rope_scaling": {"type": "default", "attn_factor": 2.0}}, "rope_scaling.attn_factor = 2"),
        ({"head_dim": 64}, "attention_head_dim = 128 .* only 64 is"),
        ({"num_experts": []}, "num_experts: must have an entry per layer"),
        ({"num_experts": [[1], [1]]}, r"num_experts: must be an integer, got \[1\]"),
        ({"n_group": 8}, "n_group = 8 is not a setting"),
        ({"attention_sink": 4}, "attention_sink = 4 is not a setting"),
        ({"moe_router_score": "sigmoid"}, "moe_router_score = 'sigmoid' is not a setting"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor = 2.5 is not supported"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace = 1 is not a setting"),
        ({"norm_type": "hf_layer"}, "norm_type: must be one of 'rms', .* got 'hf_layer'"),
        ({"vision_config": {"depth": 2}}, "vision_config = {'depth': 2} is not a setting"),
        ({"use_foo": True}, "use_foo = True is not a setting"),
        ({"moe_drop_tokens": True}, "moe_drop_tokens = True is not a setting"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_what_is_not_supported_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        HUNYUAN_V1_MOE.model_args({**RELEASED, **changes})


def test_config_of_a_slice_states_its_experts_and_nothing_else():
    args = FLAVORS["Hunyuan-A13B"]
    sliced = replace(args, num_experts=48, groups=())
    assert HUNYUAN_V1_MOE.config(RELEASED, sliced) == {**RELEASED, "num_experts": 48}
    assert HUNYUAN_V1_MOE.model_args({**RELEASED, "num_experts": 48}) == sliced
    with pytest.raises(ValueError, match="shared_hidden_dim = 0, but config.json .* has 3072"):
        HUNYUAN_V1_MOE.config(RELEASED, replace(args, shared_hidden_dim=0))


@pytest.mark.parametrize("off", [{"routed_scaling_factor": False}, {"n_group": False}])
def test_what_a_file_calls_false_is_off(off):
    assert HUNYUAN_V1_MOE.model_args({**RELEASED, **off}) == FLAVORS["Hunyuan-A13B"]
