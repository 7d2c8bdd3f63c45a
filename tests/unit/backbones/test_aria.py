"""The decoder of Aria against transformers: logits, router choices, tensors, settings."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AriaConfig, AriaForConditionalGeneration, AriaTextConfig
from transformers.models.aria.modeling_aria import AriaTextTopKRouter

from symbiotic_titan.backbones import aria
from symbiotic_titan.backbones.aria import ARIA
from symbiotic_titan.checkpoint.hugging_face import HuggingFaceModel
from symbiotic_titan.model.args import VitArgs
from symbiotic_titan.model.flavors import FLAVORS
from tests.unit.backbones.decoder_parity import (
    assert_equal_tensors,
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

VIT = VitArgs(dim=16, num_layers=1, num_heads=2, hidden_dim=24, patch=2, merge=2)
TEXT = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_num_experts": 8,
    "moe_topk": 3,
    "rope_theta": 5000000.0,
}
VISION = {
    "model_type": "idefics3_vision",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
}
# The config.json of rhymes-ai/Aria.
RELEASED = {
    "_name_or_path": "rhymes-ai/Aria",
    "architectures": ["AriaForConditionalGeneration"],
    "auto_map": {"AutoConfig": "modeling_aria.AriaConfig"},
    "ignore_index": -100,
    "image_token_index": 9,
    "initializer_range": 0.02,
    "model_type": "aria",
    "pad_token_id": 2,
    "projector_patch_to_query_dict": {"1225": 128, "4900": 256},
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 1664,
        "max_position_embeddings": 65536,
        "model_type": "aria_text",
        "moe_intermediate_size": 1664,
        "moe_num_experts": 64,
        "moe_topk": 6,
        "num_attention_heads": 20,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 28,
        "num_key_value_heads": 20,
        "rope_theta": 5000000,
        "vocab_size": 100352,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {
        "attention_heads": 16,
        "image_size": 980,
        "intermediate_size": 4304,
        "model_type": "idefics3_vision",
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
    "vision_feature_layer": -1,
}


@pytest.fixture
def pair(tmp_path):
    """(transformers' model, ours of the same tensors, config.json, all tensors on disk)."""
    config = AriaConfig(
        text_config=TEXT, vision_config=VISION, projector_patch_to_query_dict={16: 4}
    )
    config._attn_implementation = config.text_config._attn_implementation = "eager"
    theirs = make_random(AriaForConditionalGeneration(config), gain=1.0)
    config, tensors = saved(theirs, tmp_path)
    args = replace(ARIA.model_args(config), vit=VIT)
    return theirs, loaded(ARIA, args, tensors, new=("vit",)), config, tensors


@pytest.fixture
def tokens_BT():
    return torch.randint(10, 272, (2, 40), generator=torch.Generator().manual_seed(1))


def of_the_decoder(tensors):
    unused = re.compile("|".join(ARIA.unused))
    return {name: tensor for name, tensor in tensors.items() if not unused.match(name)}


def test_logits_and_router_choices_equal_those_of_transformers(pair, tokens_BT):
    theirs, ours, _, _ = pair
    logits, choices = run(ours, text_row(ours.args, tokens_BT))
    expected, expected_choices = run_released(theirs, AriaTextTopKRouter, {"input_ids": tokens_BT})
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert len(choices) == 3
    assert all(torch.equal(a, b) for a, b in zip(choices, expected_choices, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
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


def test_tensors_come_back_bit_for_bit_and_only_those_of_the_image_encoder_stay_behind(pair):
    _, ours, _, tensors = pair
    decoder = of_the_decoder(tensors)
    assert len(decoder) < len(tensors)
    assert not any("vision" in name or "projector" in name for name in decoder)
    assert_equal_tensors(stored(ARIA, ours, shapes_of(tensors)), decoder)


def test_an_imported_folder_says_what_stays_behind(pair, tmp_path):
    _, ours, _, tensors = pair
    folder = HuggingFaceModel(tmp_path)
    assert folder.left_behind.keys() == tensors.keys() - of_the_decoder(tensors).keys()
    name = "layers.1.moe.experts.all.w3"
    assert torch.equal(folder.read(name), ours.state_dict()[name])


def test_names_of_transformers_memory_are_the_same_tensors(pair, tmp_path):
    theirs, ours, _, tensors = pair
    theirs.save_pretrained(tmp_path / "memory", save_original_format=False)
    memory = load_file(tmp_path / "memory" / "model.safetensors")
    assert memory.keys() != tensors.keys()
    again = loaded(ARIA, ours.args, memory, new=("vit",))
    assert_equal_tensors(again.state_dict(), ours.state_dict())
    assert_equal_tensors(stored(ARIA, again, shapes_of(memory)), of_the_decoder(memory))


def test_flavor_is_what_the_released_file_says():
    assert ARIA.model_args(RELEASED) == FLAVORS["Aria"]


def test_silent_settings_are_what_transformers_takes():
    assert aria.DEFAULTS.items() <= AriaTextConfig().to_dict().items()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "gelu"}, "text_config.hidden_act = 'gelu'.*only 'silu' is"),
        ({"mlp_bias": True}, "text_config.mlp_bias = True"),
        ({"sliding_window": 4096}, "text_config.sliding_window = 4096 is not a setting"),
        ({"moe_intermediate_size": 832}, "text_config.moe_intermediate_size = 832"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_parameters.rope_type = 'yarn'"),
    ],
)
def test_what_is_not_expressed_is_named(changes, message):
    config = {**RELEASED, "text_config": {**RELEASED["text_config"], **changes}}
    with pytest.raises(ValueError, match=message):
        ARIA.model_args(config)


def test_config_of_a_slice_states_its_experts_and_nothing_else():
    sliced = replace(FLAVORS["Aria"], num_experts=48, groups=())
    config = ARIA.config(RELEASED, sliced)
    assert config == {**RELEASED, "text_config": {**RELEASED["text_config"], "moe_num_experts": 48}}
    assert RELEASED["text_config"]["moe_num_experts"] == 64
    assert ARIA.model_args(config) == sliced
