"""Qwen3-Omni's thinker against transformers: logits of text and images, positions, tensors of both kinds of release, settings."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import (
    Qwen3OmniMoeTextConfig,
    Qwen3OmniMoeVisionEncoderConfig,
)
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeThinkerTextTopKRouter,
)

from symbiotic_titan.hf.architectures import qwen3_omni_moe, qwen3_vl_moe
from symbiotic_titan.hf.architectures.qwen3_omni_moe import QWEN3_OMNI_MOE, model_args
from symbiotic_titan.hf.import_model import import_model
from symbiotic_titan.hf.model import HuggingFaceModel
from symbiotic_titan.hf.release_files import RELEASE_FILES, UNMAPPED
from symbiotic_titan.model.flavors import FLAVORS
from tests.helpers.decoder_parity import (
    loaded,
    make_random,
    run,
    run_released,
    saved,
    shapes_of,
    stored,
    text_row,
)
from tests.helpers.image_rows import image_row, released_marked
from tests.helpers.omni_config import OMNI as RELEASED
from tests.helpers.released_models import THINKER
from tests.helpers.stored_models import assert_equal_tensors

# Two tokens between images: the one that ends an image and the one that begins the next.
DOCUMENT = [3, (2, 3), 2, (1, 4), 2, (3, 1), 4]
AUDIO = r"(thinker\.)?audio_tower\."
# The smallest talker and vocoder that transformers builds.
TALKER = {
    "num_code_groups": 2,
    "thinker_hidden_size": 32,
    "accept_hidden_layer": 1,
    "spatial_merge_size": 2,
    "text_config": {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "shared_expert_intermediate_size": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    },
    "code_predictor_config": {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_code_groups": 2,
    },
}
VOCODER = {
    "codebook_size": 8,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "num_quantizers": 2,
    "upsample_rates": [2],
    "upsampling_ratios": [2],
    "decoder_dim": 8,
}


def mapped(tensors):
    """Without what has no counterpart in our network."""
    others = ("talker.", "code2wav.", "audio_tower.", "thinker.audio_tower.", "model.audio_tower.")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(others)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(transformers' thinker, ours, its config.json, its tensors, their folder)."""
    folder = tmp_path_factory.mktemp("thinker")
    values = {key: value for key, value in THINKER.items() if key != "model_type"}
    made = Qwen3OmniMoeThinkerConfig(**values)
    theirs = make_random(Qwen3OmniMoeThinkerForConditionalGeneration(made))
    config, tensors = saved(theirs, folder)
    ours = loaded(QWEN3_OMNI_MOE, model_args(config), tensors)
    return theirs, ours, config, tensors, folder


@pytest.fixture(scope="module")
def row(pair):
    return image_row(pair[1].args, DOCUMENT, 120, torch.Generator().manual_seed(3), opening=123)


def assert_same_forward(found, expected):
    (logits, choices), (their_logits, their_choices) = found, expected
    torch.testing.assert_close(logits, their_logits, atol=1e-5, rtol=1e-5)
    assert their_logits.std() > 0.1 and len(choices) == len(their_choices) > 0
    for mine, other in zip(choices, their_choices, strict=True):
        assert torch.equal(mine, other)


def run_theirs(theirs, inputs):
    return run_released(theirs, Qwen3OmniMoeThinkerTextTopKRouter, inputs)


def test_text_and_images_give_the_same_logits_and_choices(pair, row):
    theirs, ours, *_ = pair
    inputs = released_marked(ours.args, DOCUMENT, row)
    assert_same_forward(run(ours, row), run_theirs(theirs, inputs))
    tokens_BT = torch.randint(112, (2, 24), generator=torch.Generator().manual_seed(2))
    expected = run_theirs(theirs, {"input_ids": tokens_BT})
    assert_same_forward(run(ours, text_row(ours.args, tokens_BT)), expected)


def test_positions_of_images_are_those_of_transformers(pair, row):
    """An image has one moment, so seconds per position do not matter."""
    theirs, ours, *_ = pair
    inputs = released_marked(ours.args, DOCUMENT, row)
    positions_A1T, _ = theirs.get_rope_index(
        inputs["input_ids"], inputs["image_grid_thw"], attention_mask=inputs["attention_mask"]
    )
    assert torch.equal(row.positions, positions_A1T.permute(1, 2, 0).long())


def test_a_dense_first_layer_tied_embeddings_and_weights_that_do_not_sum_to_one(row, tmp_path):
    values = copy.deepcopy({key: value for key, value in THINKER.items() if key != "model_type"})
    values["text_config"] |= {"mlp_only_layers": [0], "norm_topk_prob": False}
    made = Qwen3OmniMoeThinkerConfig(**values, tie_word_embeddings=True)
    theirs = make_random(Qwen3OmniMoeThinkerForConditionalGeneration(made))
    config, tensors = saved(theirs, tmp_path)
    ours = loaded(QWEN3_OMNI_MOE, model_args(config), tensors)
    assert ours.args.num_dense_layers == 1 and ours.args.tie_embeddings
    assert not ours.args.normalize_weights
    expected = run_theirs(theirs, released_marked(ours.args, DOCUMENT, row))
    assert_same_forward(run(ours, row), expected)
    assert_equal_tensors(stored(QWEN3_OMNI_MOE, ours, shapes_of(tensors)), mapped(tensors))


def test_tensors_come_back_bit_for_bit_as_saved_and_as_held_in_memory(pair, tmp_path):
    theirs, ours, _, tensors, _ = pair
    assert_equal_tensors(stored(QWEN3_OMNI_MOE, ours, shapes_of(tensors)), mapped(tensors))
    theirs.save_pretrained(tmp_path, save_original_format=False)
    fused = load_file(tmp_path / "model.safetensors")
    assert fused.keys() != tensors.keys()
    again = loaded(QWEN3_OMNI_MOE, ours.args, fused)
    assert_equal_tensors(again.state_dict(), ours.state_dict())
    assert_equal_tensors(stored(QWEN3_OMNI_MOE, again, shapes_of(fused)), mapped(fused))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(transformers' whole model with talker and vocoder, its folder)."""
    values = {"thinker_config": THINKER, "talker_config": TALKER, "code2wav_config": VOCODER}
    folder = tmp_path_factory.mktemp("whole")
    made = Qwen3OmniMoeConfig(**values)
    theirs = make_random(Qwen3OmniMoeForConditionalGeneration(made))
    theirs.save_pretrained(folder)
    return theirs, folder


def test_the_whole_release_holds_the_same_thinker(whole, row):
    theirs, folder = whole
    release = HuggingFaceModel(folder)
    kept = {name.split(".")[0] for name in release.unmapped.tensors}
    assert kept == {"thinker", "talker", "code2wav"}
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() - mapped(tensors).keys() == release.unmapped.tensors.keys()
    ours = loaded(QWEN3_OMNI_MOE, release.args, tensors)
    inputs = released_marked(ours.args, DOCUMENT, row)
    assert_same_forward(run(ours, row), run_theirs(theirs.thinker, inputs))


def test_talker_vocoder_and_audio_encoder_are_written_back(whole, row, tmp_path):
    from tests.unit.hf.test_export import export

    theirs, folder = whole
    release = HuggingFaceModel(folder)
    import_model(release, tmp_path / "imported")
    kept = load_file(tmp_path / "imported" / RELEASE_FILES / UNMAPPED)
    assert kept.keys() == release.unmapped.tensors.keys()
    done = export(tmp_path / "imported", release.args, tmp_path / "back")
    assert not done.missing
    again = Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    assert_equal_tensors(again.state_dict(), theirs.state_dict())
    inputs = released_marked(release.args, DOCUMENT, row)
    found, expected = (run_theirs(model.thinker, inputs)[0] for model in (again, theirs))
    assert torch.equal(found, expected)


# ---- config.json ----------------------------------------------------------------------------------------------------------------


def changed(table, key, value):
    config = copy.deepcopy(RELEASED)
    inside = config
    for name in table.split(".") if table else ():
        inside = inside[name]
    inside[key] = value
    return config


def test_the_flavor_is_the_released_config_whole_and_alone():
    assert model_args(RELEASED) == FLAVORS["Qwen3-Omni-30B-A3B"]
    assert model_args(RELEASED["thinker_config"]) == FLAVORS["Qwen3-Omni-30B-A3B"]


def test_silent_settings_are_what_transformers_takes():
    text = Qwen3OmniMoeTextConfig().to_dict()
    assert qwen3_omni_moe.DEFAULTS.items() <= text.items()
    assert text["rope_parameters"]["rope_theta"] == 1e6
    vision = Qwen3OmniMoeVisionEncoderConfig().to_dict()
    vision["deepstack_visual_indexes"] = list(vision["deepstack_visual_indexes"])
    assert qwen3_vl_moe.VISION_DEFAULTS.items() <= vision.items()


@pytest.mark.parametrize("enabled", [True, False])
def test_settings_of_the_talker_do_not_change_the_thinker(enabled):
    config = changed("", "enable_audio_output", enabled)
    config["talker_config"]["text_config"]["hidden_size"] = 512
    assert model_args(config) == model_args(RELEASED)


@pytest.mark.parametrize(
    "table, key, value, message",
    [
        ("", "thinker_config", None, "config.json has no thinker_config, a table"),
        ("", "thinker_config", [1], r"thinker_config: must be a table, got \[1\]"),
        ("", "quantization_config", {"bits": 4}, "config.json: quantization_config = "),
        ("thinker_config", "text_config", None, "has no thinker_config.text_config, a table"),
        ("thinker_config", "window", 3, "config.json: thinker_config.window = 3 is not a setting"),
        ("thinker_config.text_config", "hidden_act", "relu", "text_config.hidden_act = 'relu'"),
        ("thinker_config.text_config", "use_qk_norm", False, "config.use_qk_norm = False is not"),
        ("thinker_config.text_config", "sliding_window", 64, "text_config.sliding_window = 64 is"),
        ("thinker_config.text_config", "mlp_only_layers", [3], r"only_layers = \[3\] leave the"),
        ("thinker_config.text_config.rope_scaling", "interleaved", False, "interleaved = False is"),
        ("thinker_config.text_config.rope_scaling", "rope_type", "yarn", "rope_type = 'yarn' is"),
        ("thinker_config.vision_config", "out_hidden_size", 3584, "out_hidden_size = 3584 .* 2048"),
        ("thinker_config.vision_config", "apply_vit_abs_pos_embed", False, "embed = False is not"),
        ("thinker_config.vision_config", "num_position_embeddings", 5, "embeddings = 5 is no squ"),
    ],
)
def test_what_is_not_supported_is_named_with_its_table(table, key, value, message):
    with pytest.raises(ValueError, match=message) as error:
        model_args(changed(table, key, value))
    named = f"{table}.{key}" if table else key
    assert named.removesuffix(".rope_scaling") in str(error.value)
    assert "\n" not in str(error.value)


def test_fewer_experts_are_written_where_the_file_has_their_number():
    args = replace(model_args(RELEASED), num_experts=96, groups=())
    expected = changed("thinker_config.text_config", "num_experts", 96)
    assert QWEN3_OMNI_MOE.config(RELEASED, args) == expected
    alone = QWEN3_OMNI_MOE.config(RELEASED["thinker_config"], args)
    assert alone == expected["thinker_config"]
    assert model_args(alone) == args
