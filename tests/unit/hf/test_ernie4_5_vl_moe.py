"""ERNIE 4.5 VL against transformers: logits and expert choices of text and images, positions, tensors, settings."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration
from transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeTextConfig,
    Ernie4_5_VLMoeVisionConfig,
)
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeMoeTopKRouter,
)

from symbiotic_titan.hf.architectures import ernie4_5_vl_moe
from symbiotic_titan.hf.architectures.base import architecture_of
from symbiotic_titan.hf.architectures.ernie4_5_vl_moe import ERNIE4_5_VL_MOE
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.sequence.modality import TEXT, VIT
from tests.helpers.decoder_parity import (
    loaded,
    make_random,
    moved_by,
    of_all_pools,
    run,
    run_released,
    saved,
    shapes_of,
    stored,
    text_row,
)
from tests.helpers.image_rows import image_row, released_inputs
from tests.helpers.released_configs import ERNIE as RELEASED
from tests.helpers.released_configs import ERNIE_FLAT
from tests.helpers.released_models import ERNIE
from tests.helpers.stored_models import assert_equal_tensors

PLACEHOLDER = 256
DOCUMENT = [3, (2, 3), 2, (1, 4), 3, (3, 1), 4, (1, 1), 2]
TEXT_CONFIG = ERNIE["text_config"] | {"vocab_size": 272}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(transformers' model, ours of the same tensors, config.json, those tensors)."""
    config = Ernie4_5_VLMoeConfig(
        text_config=TEXT_CONFIG, vision_config=ERNIE["vision_config"], image_token_id=PLACEHOLDER
    )
    theirs = make_random(Ernie4_5_VLMoeForConditionalGeneration(config), gain=1.0)
    config, tensors = saved(theirs, tmp_path_factory.mktemp("released"))
    ours = loaded(ERNIE4_5_VL_MOE, ERNIE4_5_VL_MOE.model_args(config), tensors)
    return theirs, ours, config, tensors


def images_of(ours):
    return image_row(ours.args, DOCUMENT, PLACEHOLDER, torch.Generator().manual_seed(2))


def assert_like_transformers(pair, row, inputs):
    theirs, ours, _, _ = pair
    logits, choices = run(ours, row)
    expected, expected_choices = run_released(theirs, Ernie4_5_VLMoeMoeTopKRouter, inputs)
    expected_choices = of_all_pools(expected_choices, row, first=8)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert len(choices) == 2
    assert all(torch.equal(a, b) for a, b in zip(choices, expected_choices, strict=True))
    return choices


def test_text_alone_visits_the_text_experts_that_transformers_chooses(pair):
    tokens_BT = torch.randint(250, (2, 40), generator=torch.Generator().manual_seed(1))
    row = text_row(pair[1].args, tokens_BT)
    choices = assert_like_transformers(pair, row, {"input_ids": tokens_BT})
    assert all((experts_TK < 8).all() for experts_TK in choices)


def test_images_and_the_tokens_around_them_visit_the_image_experts_that_transformers_chooses(pair):
    row = images_of(pair[1])
    is_image_T, is_vit_T = row.span.flatten() >= 0, row.modality.flatten() == VIT
    assert is_vit_T.sum() == is_image_T.sum() + 2 * 4
    choices = assert_like_transformers(pair, row, released_inputs(pair[1].args, DOCUMENT, row))
    for experts_TK in choices:
        assert torch.equal((experts_TK >= 8).all(-1), is_vit_T)
        assert torch.equal((experts_TK < 8).all(-1), ~is_vit_T)


def test_positions_of_images_are_those_of_transformers(pair):
    theirs, ours, _, _ = pair
    row = images_of(ours)
    inputs = released_inputs(ours.args, DOCUMENT, row)
    positions, _ = theirs.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    )
    assert torch.equal(row.positions, positions.permute(1, 2, 0))


def test_the_selection_bias_of_each_pool_changes_choices(pair):
    ours = deepcopy(pair[1])
    row = images_of(ours)
    _, choices = run(ours, row)
    for block in ours.layers.values():
        if block.moe_enabled:
            for router in block.moe.router.values():
                router.bias.zero_()
    _, unbiased = run(ours, row)
    moved_T = (choices[0] != unbiased[0]).any(-1)
    for modality in (TEXT, VIT):
        assert moved_T[row.modality.flatten() == modality].float().mean() > 0.2


@pytest.mark.parametrize(
    "changes",
    [
        {"vit_attention": "bidirectional"},
        {"mrope": "chunked"},
        {"rotary_interleaved": False},
        {"rope_theta": 1e3},
        {"selection_bias": False},
        {"score_function": "sigmoid"},
        {"normalize_weights": False},
        {"shared_hidden_dim": 0},
        {"norm_eps": 1e-1},
        {"top_k": 2},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_switch_of_the_decoder_matters(pair, changes):
    _, ours, _, _ = pair
    assert moved_by(ours, images_of(ours), **changes) > 5e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "rms"},
        {"last_norm": False},
        {"activation": "gelu"},
        {"rope_theta": 10.0},
        {"norm_eps": 1e-1},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_switch_of_the_image_encoder_matters(pair, changes):
    _, ours, _, _ = pair
    vit = replace(ours.args.vit, **changes)
    # quick_gelu is an approximation of gelu: its difference is small by design.
    least = 1e-3 if "activation" in changes else 5e-3
    assert moved_by(ours, images_of(ours), vit=vit) > least


def test_tensors_come_back_bit_for_bit(pair):
    _, ours, _, tensors = pair
    assert "model.layers.2.mlp.experts.15.up_proj.weight" in tensors
    assert_equal_tensors(stored(ERNIE4_5_VL_MOE, ours, shapes_of(tensors)), tensors)


def test_the_layout_of_memory_holds_the_same_model(pair, tmp_path):
    theirs, ours, _, tensors = pair
    theirs.save_pretrained(tmp_path / "memory", save_original_format=False)
    memory = load_file(tmp_path / "memory" / "model.safetensors")
    assert memory.keys() != tensors.keys()
    again = loaded(ERNIE4_5_VL_MOE, ours.args, memory)
    assert_equal_tensors(again.state_dict(), ours.state_dict())
    assert_equal_tensors(stored(ERNIE4_5_VL_MOE, again, shapes_of(memory)), memory)


def test_the_image_encoder_may_stand_beside_the_decoder(pair):
    """As in the releases with code of their own."""
    _, ours, _, tensors = pair
    beside = {name.replace("model.vision_model", "vision_model"): t for name, t in tensors.items()}
    again = loaded(ERNIE4_5_VL_MOE, ours.args, beside)
    assert_equal_tensors(again.state_dict(), ours.state_dict())
    assert_equal_tensors(stored(ERNIE4_5_VL_MOE, again, shapes_of(beside)), beside)


def test_flavor_is_what_the_released_files_say():
    flavor = FLAVORS["ERNIE-4.5-VL-28B-A3B"]
    assert ERNIE4_5_VL_MOE.model_args(RELEASED) == flavor
    assert architecture_of(ERNIE_FLAT).model_args(ERNIE_FLAT) == flavor
    assert [(g.name, g.num_experts, g.hidden_dim) for g in flavor.groups] == [
        ("text", 64, None),
        ("vision", 64, 512),
    ]


def test_the_released_model_has_as_many_parameters_as_that_of_transformers():
    values = {key: value for key, value in RELEASED.items() if key != "model_type"}
    with torch.device("meta"):
        theirs = Ernie4_5_VLMoeForConditionalGeneration(Ernie4_5_VLMoeConfig(**values))
        ours = SymbioticModel(FLAVORS["ERNIE-4.5-VL-28B-A3B"])
    latent = ("latent_embedding.", "flow_head.")
    count = sum(p.numel() for name, p in ours.named_parameters() if not name.startswith(latent))
    biases = 27 * 2 * 64  # buffers of ours
    assert count + biases == sum(p.numel() for p in theirs.parameters())
    assert 29.3e9 < count < 29.5e9


def test_silent_settings_are_what_transformers_takes():
    text, vision = Ernie4_5_VLMoeTextConfig().to_dict(), Ernie4_5_VLMoeVisionConfig().to_dict()
    assert ernie4_5_vl_moe.DEFAULTS.items() <= text.items()
    assert ernie4_5_vl_moe.VISION_DEFAULTS.items() <= vision.items()
    assert text["moe_intermediate_size"] == ernie4_5_vl_moe.WIDTHS
    assert text["rope_parameters"]["rope_theta"] == 500_000.0
    silent = {**RELEASED, "text_config": {}, "vision_config": {}}
    assert ERNIE4_5_VL_MOE.model_args(silent) == FLAVORS["ERNIE-4.5-VL-28B-A3B"]


@pytest.mark.parametrize(
    "table, changes, message",
    [
        ("text_config", {"use_bias": True}, "text_config.use_bias = True is not supported"),
        ("text_config", {"hidden_act": "gelu"}, "text_config.hidden_act = 'gelu'"),
        ("text_config", {"moe_norm_min": 1e-3}, "text_config.moe_norm_min = 0.001"),
        ("text_config", {"moe_intermediate_size": [8]}, "must be two positive numbers.*got .8."),
        (
            "text_config",
            {"mlp_layer_types": ["sparse"] * 27 + ["dense"]},
            "mlp_layer_types must be 'dense' for the first layers",
        ),
        ("text_config", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
        (
            "text_config",
            {"rope_parameters": {"mrope_section": [24, 20, 20]}},
            "mrope_sections: 'pairwise' gives height and width the same number",
        ),
        ("text_config", {"rope_parameters": {"mrope_section": [32, 32]}}, "must be three numbers"),
        ("text_config", {"sliding_window": 4096}, "text_config.sliding_window = 4096"),
        ("vision_config", {"hidden_act": "gelu"}, "vision_config.hidden_act = 'gelu'"),
        ("vision_config", {"temporal_merge_size": 4}, "vision_config.temporal_merge_size = 4"),
    ],
)
def test_what_is_not_supported_is_named(table, changes, message):
    config = {**RELEASED, table: {**RELEASED[table], **changes}}
    with pytest.raises(ValueError, match=message):
        ERNIE4_5_VL_MOE.model_args(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"moe_num_experts": [64, 32]}, "moe_num_experts must be two equal numbers"),
        ({"moe_layer_start_index": [1, 2]}, "must give both pools the same layers"),
        ({"moe_layer_end_index": [29, 20]}, "must give both pools the same layers"),
        ({"moe_layer_start_index": "1"}, "moe_layer_start_index must be a number or two"),
        ({"moe_layer_interval": 2}, "moe_layer_interval = 2"),
        ({"moe_gate_act": "sigmoid"}, "moe_gate_act = 'sigmoid'"),
        ({"moe_use_aux_free": False}, "moe_use_aux_free = False"),
        ({"freq_allocation": 16}, "freq_allocation = 16"),
        ({"spatial_conv_size": 4}, "spatial_conv_size = 4"),
        ({"use_window": 7}, "use_window = 7"),
    ],
)
def test_what_is_not_supported_of_a_flat_file_is_named(changes, message):
    config = {**ERNIE_FLAT, **changes}
    with pytest.raises(ValueError, match=message):
        architecture_of(config).model_args(config)


@pytest.mark.parametrize(
    "released, table, number", [(RELEASED, "text_config", 48), (ERNIE_FLAT, None, [48, 48])]
)
def test_config_of_a_slice_states_its_experts_and_nothing_else(released, table, number):
    args = FLAVORS["ERNIE-4.5-VL-28B-A3B"]
    groups = tuple(replace(group, num_experts=48) for group in args.groups)
    sliced = replace(args, num_experts=96, groups=groups)
    config = architecture_of(released).config(released, sliced)
    expected = {**released, "moe_num_experts": number}
    if table:
        expected = {**released, table: {**released[table], "moe_num_experts": number}}
    assert config == expected
    assert architecture_of(config).model_args(config) == sliced
