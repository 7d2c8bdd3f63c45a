"""GLM-4.5V against transformers: logits with and without images, router choices, positions, tensors, settings."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration
from transformers.models.glm4v_moe.modeling_glm4v_moe import (
    Glm4vMoeTextConfig,
    Glm4vMoeTextTopkRouter,
    Glm4vMoeVisionConfig,
)

from symbiotic_titan.hf.architectures import glm4v_moe
from symbiotic_titan.hf.architectures.glm4v_moe import GLM4V_MOE
from symbiotic_titan.hf.model import unmapped_names
from symbiotic_titan.model.flavors import FLAVORS
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
from tests.helpers.image_rows import image_row, released_inputs
from tests.helpers.released_configs import GLM as RELEASED
from tests.helpers.released_configs import GLM_4_6V
from tests.helpers.released_models import GLM
from tests.helpers.stored_models import assert_equal_tensors

PLACEHOLDER = 256
# Images wider, higher and smaller than the table of positions, which is 3 x 3 patches.
DOCUMENT = [3, (2, 3), 2, (1, 4), 1, (3, 1), 4, (1, 1), 2]
TEXT = GLM["text_config"] | {"vocab_size": 272}
VISION = GLM["vision_config"]


@pytest.fixture
def pair(tmp_path):
    """(transformers' model, ours of the same tensors, config.json, those tensors)."""
    config = Glm4vMoeConfig(
        text_config=TEXT, vision_config=VISION, image_token_id=PLACEHOLDER, video_token_id=257
    )
    theirs = make_random(Glm4vMoeForConditionalGeneration(config), gain=0.7)
    config, tensors = saved(theirs, tmp_path)
    return theirs, loaded(GLM4V_MOE, GLM4V_MOE.model_args(config), tensors), config, tensors


def images_of(ours):
    return image_row(ours.args, DOCUMENT, PLACEHOLDER, torch.Generator().manual_seed(2))


def assert_like_transformers(pair, row, inputs):
    theirs, ours, _, _ = pair
    logits, choices = run(ours, row)
    expected, expected_choices = run_released(theirs, Glm4vMoeTextTopkRouter, inputs)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert len(choices) == 2
    assert all(torch.equal(a, b) for a, b in zip(choices, expected_choices, strict=True))


def test_logits_and_router_choices_of_text_equal_those_of_transformers(pair):
    tokens_BT = torch.randint(250, (2, 40), generator=torch.Generator().manual_seed(1))
    assert_like_transformers(pair, text_row(pair[1].args, tokens_BT), {"input_ids": tokens_BT})


def test_logits_and_router_choices_with_images_equal_those_of_transformers(pair):
    row = images_of(pair[1])
    assert_like_transformers(pair, row, released_inputs(pair[1].args, DOCUMENT, row))


def test_positions_of_images_are_those_of_transformers(pair):
    theirs, ours, _, _ = pair
    row = images_of(ours)
    inputs = released_inputs(ours.args, DOCUMENT, row)
    positions, _ = theirs.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    )
    assert torch.equal(row.positions, positions.permute(1, 2, 0))


def test_the_selection_bias_changes_choices(pair):
    _, ours, _, _ = pair
    row = images_of(ours)
    _, choices = run(ours, row)
    for block in ours.layers.values():
        if block.moe_enabled:
            block.moe.router["all"].bias.zero_()
    _, unbiased = run(ours, row)
    assert (choices[0] != unbiased[0]).any(-1).float().mean() > 0.2


@pytest.mark.parametrize(
    "changes",
    [
        {"vit_attention": "bidirectional"},
        {"mrope": "interleaved"},
        {"mrope": "none", "mrope_sections": (), "rotary_layout": "shared"},
        {"rotary_fraction": 1.0, "mrope_sections": (4, 2, 2)},
        {"rotary_interleaved": True},
        {"rope_theta": 1e6},
        {"qkv_bias": False},
        {"selection_bias": False},
        {"score_function": "softmax"},
        {"normalize_weights": False},
        {"route_scale": 1.0},
        {"shared_hidden_dim": 0},
        {"norm_eps": 1e-2},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_switch_of_the_decoder_matters(pair, changes):
    _, ours, _, _ = pair
    assert moved_by(ours, images_of(ours), **changes) > 5e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layer"},
        {"outer_norms": False},
        {"activation": "gelu"},
        {"position_grid": 0, "position_reading": "bilinear"},
        {"position_reading": "bilinear"},
        {"rope_theta": 10.0},
        {"norm_eps": 1e-2},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_switch_of_the_image_encoder_matters(pair, changes):
    _, ours, _, _ = pair
    assert moved_by(ours, images_of(ours), vit=replace(ours.args.vit, **changes)) > 5e-3


def test_tensors_come_back_bit_for_bit(pair):
    _, ours, _, tensors = pair
    assert_equal_tensors(stored(GLM4V_MOE, ours, shapes_of(tensors)), tensors)


def test_experts_in_one_tensor_are_the_same_experts(pair, tmp_path):
    theirs, ours, _, tensors = pair
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    assert fused.keys() != tensors.keys()
    again = loaded(GLM4V_MOE, ours.args, fused)
    assert_equal_tensors(again.state_dict(), ours.state_dict())
    assert_equal_tensors(stored(GLM4V_MOE, again, shapes_of(fused)), fused)


@pytest.mark.parametrize("layers", [46, 3])
def test_the_layer_that_predicts_further_tokens_comes_after_the_last(layers):
    """A layer that config.json only forgot to count is none."""
    args = GLM4V_MOE.model_args(
        {**RELEASED, "text_config": {**RELEASED["text_config"], "num_hidden_layers": layers}}
    )
    inside = f"model.language_model.layers.{layers - 1}.input_layernorm.weight"
    further = f"model.language_model.layers.{layers}.input_layernorm.weight"
    beyond = f"model.language_model.layers.{layers}0.input_layernorm.weight"
    names = [inside, further, beyond, f"model.language_model.layers.{layers}.eh_proj.weight"]
    assert unmapped_names(GLM4V_MOE, args, names) == [further, names[-1]]
    assert unmapped_names(GLM4V_MOE, args, names[:-1]) == []


def test_flavor_is_what_the_released_file_says():
    assert GLM4V_MOE.model_args(RELEASED) == FLAVORS["GLM-4.5V"]


def test_glm_4_6v_differs_in_its_rotary_frequencies_only():
    expected = replace(FLAVORS["GLM-4.5V"], rope_theta=5e5)
    assert GLM4V_MOE.model_args(GLM_4_6V) == expected


def test_silent_settings_are_what_transformers_takes():
    assert glm4v_moe.DEFAULTS.items() <= Glm4vMoeTextConfig().to_dict().items()
    assert glm4v_moe.VISION_DEFAULTS.items() <= Glm4vMoeVisionConfig().to_dict().items()
    rotary = Glm4vMoeTextConfig().rope_parameters
    assert rotary["rope_theta"] == 10_000.0 and rotary["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    "table, changes, message",
    [
        ("text_config", {"n_group": 4}, "text_config.n_group = 4 is not supported.*only 1 is"),
        ("text_config", {"topk_group": 2}, "text_config.topk_group = 2"),
        ("text_config", {"norm_topk_prob": False}, "text_config.norm_topk_prob = False"),
        ("text_config", {"use_qk_norm": True}, "text_config.use_qk_norm = True"),
        ("text_config", {"hidden_act": "gelu"}, "text_config.hidden_act = 'gelu'"),
        ("text_config", {"sliding_window": 4096}, "text_config.sliding_window = 4096"),
        ("text_config", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type = 'yarn'"),
        ("text_config", {"rope_scaling": {"factor": 4.0}}, "rope_scaling.factor = 4.0 is not a"),
        ("text_config", {"rope_scaling": {"mrope_interleaved": True}}, "mrope_interleaved = True"),
        (
            "vision_config",
            {"rope_parameters": {"rope_type": "axial", "factor": 4.0}},
            "factor = 4.0",
        ),
        ("vision_config", {"hidden_act": "gelu"}, "vision_config.hidden_act = 'gelu'"),
        ("vision_config", {"attention_bias": True}, "vision_config.attention_bias = True"),
        ("vision_config", {"out_hidden_size": 2048}, "vision_config.out_hidden_size = 2048"),
        ("vision_config", {"rms_norm_eps": 1e-6}, "vision_config.rms_norm_eps = 1e-06"),
        ("vision_config", {"window_size": 112}, "vision_config.window_size = 112"),
    ],
)
def test_what_is_not_supported_is_named(table, changes, message):
    config = {**RELEASED, table: {**RELEASED[table], **changes}}
    with pytest.raises(ValueError, match=message):
        GLM4V_MOE.model_args(config)


def test_quantised_files_are_named():
    config = {**RELEASED, "quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(ValueError, match="quantization_config"):
        GLM4V_MOE.model_args(config)


def test_config_of_a_slice_states_its_experts_and_nothing_else():
    sliced = replace(FLAVORS["GLM-4.5V"], num_experts=96, groups=())
    config = GLM4V_MOE.config(RELEASED, sliced)
    assert config == {
        **RELEASED,
        "text_config": {**RELEASED["text_config"], "n_routed_experts": 96},
    }
    assert GLM4V_MOE.model_args(config) == sliced


def test_the_number_of_experts_may_be_stated_twice():
    text = {**RELEASED["text_config"], "num_local_experts": 128}
    twice = {**RELEASED, "text_config": text}
    assert GLM4V_MOE.model_args(twice) == FLAVORS["GLM-4.5V"]
    config = GLM4V_MOE.config(twice, replace(FLAVORS["GLM-4.5V"], num_experts=96, groups=()))
    assert config["text_config"] == text | {"n_routed_experts": 96, "num_local_experts": 96}
    text["num_local_experts"] = 64
    with pytest.raises(ValueError, match="num_local_experts = 64 .* only 128 is"):
        GLM4V_MOE.model_args(twice)
