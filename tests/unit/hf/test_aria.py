"""Our network against transformers' AriaForConditionalGeneration, tiny, random, in float32."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AriaConfig, AriaForConditionalGeneration, AriaTextConfig
from transformers.models.aria.modeling_aria import AriaTextTopKRouter
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from symbiotic_titan.commands import convert
from symbiotic_titan.hf.architectures import aria
from symbiotic_titan.hf.architectures.aria import ARIA
from symbiotic_titan.hf.model import HuggingFaceModel
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.vit import table_entries
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
from tests.helpers.image_rows import image_row, released_squares
from tests.helpers.released_configs import ARIA as RELEASED
from tests.helpers.stored_models import assert_equal_tensors

PLACEHOLDER = 9
# Patches along a side of the square -> queries; and documents of images in either, with and without an edge of padding.
SIDES = {3: 4, 4: 6}
DOCUMENTS = {
    3: [3, (3, 3), 2, (2, 3), 1, (3, 1), 4],
    4: [(4, 4), 2, (3, 4), (1, 4), 3, (4, 2), 1],
}
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
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 20,
    "patch_size": 4,
}


@pytest.fixture
def pair(tmp_path):
    """(transformers' model, ours of the same tensors, config.json, all tensors on disk)."""
    config = AriaConfig(
        text_config=TEXT,
        vision_config=VISION,
        projector_patch_to_query_dict={side**2: number for side, number in SIDES.items()},
        image_token_index=PLACEHOLDER,
    )
    config._attn_implementation = config.text_config._attn_implementation = "eager"
    theirs = make_random(AriaForConditionalGeneration(config), gain=1.0)
    config, tensors = saved(theirs, tmp_path)
    return theirs, loaded(ARIA, ARIA.model_args(config), tensors), config, tensors


@pytest.fixture
def tokens_BT():
    return torch.randint(10, 272, (2, 40), generator=torch.Generator().manual_seed(1))


def computed_with(tensors):
    """Without the norm that the model has and does not use."""
    return {name: tensor for name, tensor in tensors.items() if "post_layernorm" not in name}


def image_document(args, side):
    generator = torch.Generator().manual_seed(side)
    return image_row(args, DOCUMENTS[side], PLACEHOLDER, generator)


def test_logits_and_router_choices_equal_those_of_transformers(pair, tokens_BT):
    theirs, ours, _, _ = pair
    logits, choices = run(ours, text_row(ours.args, tokens_BT))
    expected, expected_choices = run_released(theirs, AriaTextTopKRouter, {"input_ids": tokens_BT})
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert len(choices) == 3
    assert all(torch.equal(a, b) for a, b in zip(choices, expected_choices, strict=True))


@pytest.mark.parametrize("side", SIDES)
def test_logits_and_router_choices_with_images_equal_those_of_transformers(pair, side):
    theirs, ours, _, _ = pair
    row = image_document(ours.args, side)
    logits, choices = run(ours, row)
    inputs = released_squares(ours.args, DOCUMENTS[side], row)
    expected, expected_choices = run_released(theirs, AriaTextTopKRouter, inputs)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(choices, expected_choices, strict=True))
    other = run(ours, replace(row, vit_patches=row.vit_patches.flip(1)))[0]
    assert (other - logits).abs().max() > 0.1  # the images are in it


def test_tokens_of_images_equal_those_of_transformers_whatever_else_is_in_the_row(pair):
    """Also after unused tokens and next to patches that no query reads."""
    theirs, ours, _, _ = pair
    row = image_document(ours.args, 4)
    inputs = released_squares(ours.args, DOCUMENTS[4], row)
    with torch.no_grad():
        features = theirs.get_image_features(
            inputs["pixel_values"], inputs["pixel_mask"], return_dict=True
        ).pooler_output
        padded = replace(
            row,
            vit_patches=F.pad(row.vit_patches, (0, 0, 0, 5), value=3.0),
            vit_coords=F.pad(row.vit_coords, (0, 0, 0, 5)),
            vit_image=F.pad(row.vit_image, (0, 5), value=-1),
            vit_index=F.pad(row.vit_index, (0, 7), value=row.tokens.shape[1]),
        )
        found, found_padded = ours._encode(row).tokens, ours._encode(padded).tokens
    torch.testing.assert_close(found[0], features.flatten(0, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found_padded[:, :-7], found, atol=1e-5, rtol=0)
    assert found_padded.isfinite().all()


@pytest.mark.parametrize("length", [35, 70])
def test_places_of_patches_are_those_of_the_released_table(length):
    """For every shape of an image whose longer side has so many patches."""
    config = Idefics3VisionConfig(hidden_size=1, image_size=980, patch_size=14, num_channels=1)
    embeddings = Idefics3VisionEmbeddings(config)
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(4900.0)[:, None])
        pixels = torch.zeros(1, 1, 14 * length, 14 * length)
        for short in range(1, length + 1):
            mask = torch.zeros(1, length, length, dtype=torch.bool)
            mask[:, :, :short] = True
            expected = embeddings(pixels, mask).view(length, length)[:, :short]
            coords_1PA = torch.cartesian_prod(torch.arange(length), torch.arange(short))[None]
            sizes_1PA = torch.tensor([length, short]).expand_as(coords_1PA)
            cells_1PX, weights_1PX = table_entries(coords_1PA, sizes_1PA, 70, "floor")
            assert torch.equal(cells_1PX.view(length, short), expected.long())
            assert (weights_1PX == 1).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"vit_attention": "bidirectional"},
        {"rotary_layout": "shared"},
        {"position_reading": "bilinear"},
        {"norm_eps": 1e-2},
        {"rope_theta": 100.0},
        {"activation": "gelu"},
        {"num_heads": 4},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_switch_for_images_matters(pair, changes):
    _, ours, _, _ = pair
    row = image_document(ours.args, 4)
    if "rotary_layout" in changes:  # the data reads it
        other = image_document(replace(ours.args, **changes), 4)
        assert (run(ours, other)[0] - run(ours, row)[0]).abs().max() > 1e-3
        return
    if "vit_attention" not in changes:
        changes = {"vit": replace(ours.args.vit, **changes)}
    assert moved_by(ours, row, **changes) > 1e-4


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


def test_tensors_come_back_bit_for_bit_but_for_a_norm_that_nothing_is_computed_with(pair):
    _, ours, _, tensors = pair
    assert len(tensors) - len(computed_with(tensors)) == 2
    assert_equal_tensors(stored(ARIA, ours, shapes_of(tensors)), computed_with(tensors))


def test_the_unmapped_norm_changes_nothing(pair, tokens_BT):
    theirs, ours, _, _ = pair
    inputs = released_squares(ours.args, DOCUMENTS[4], image_document(ours.args, 4))
    before, _ = run_released(theirs, AriaTextTopKRouter, inputs)
    with torch.no_grad():
        theirs.model.vision_tower.post_layernorm.weight.zero_()
    after, _ = run_released(theirs, AriaTextTopKRouter, inputs)
    assert torch.equal(before, after)


def test_an_imported_folder_says_what_is_unmapped(pair, tmp_path):
    _, ours, _, tensors = pair
    folder = HuggingFaceModel(tmp_path)
    assert folder.unmapped.tensors.keys() == tensors.keys() - computed_with(tensors).keys()
    name = "layers.1.moe.experts.all.w3"
    assert torch.equal(folder.read(name), ours.state_dict()[name])


def test_the_z_loss_of_its_training_is_told_at_import(pair, tmp_path, tmp_path_factory, capsys):
    *_, config, _ = pair
    for weight, told in ((1e-5, "losses.z_loss = 3e-05"), (0.0, "")):
        config["text_config"]["moe_z_loss_coeff"] = weight
        (tmp_path / "config.json").write_text(json.dumps(config))
        out = tmp_path_factory.mktemp("imported") / "aria"
        assert convert.main(["from-hf", "--hf", str(tmp_path), "--out", str(out)]) == 0
        text = capsys.readouterr().out
        assert told in text and ("z-loss" in text) == bool(told)


def test_names_of_transformers_memory_are_the_same_tensors(pair, tmp_path):
    theirs, ours, _, tensors = pair
    theirs.save_pretrained(tmp_path / "memory", save_original_format=False)
    memory = load_file(tmp_path / "memory" / "model.safetensors")
    assert memory.keys() != tensors.keys()
    again = loaded(ARIA, ours.args, memory)
    assert_equal_tensors(again.state_dict(), ours.state_dict())
    assert_equal_tensors(stored(ARIA, again, shapes_of(memory)), computed_with(memory))


def test_flavor_is_what_the_released_file_says():
    assert ARIA.model_args(RELEASED) == FLAVORS["Aria"]


def test_silent_settings_are_what_transformers_takes():
    assert aria.DEFAULTS.items() <= AriaTextConfig().to_dict().items()
    assert aria.VISION_DEFAULTS.items() <= Idefics3VisionConfig().to_dict().items()
    stated = AriaConfig().projector_patch_to_query_dict
    assert {str(patches): number for patches, number in stated.items()} == aria.QUERIES


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "gelu"}, "text_config.hidden_act = 'gelu'.*only 'silu' is"),
        ({"mlp_bias": True}, "text_config.mlp_bias = True"),
        ({"sliding_window": 4096}, "text_config.sliding_window = 4096 is not a setting"),
        (
            {"rope_scaling": {"factor": 4.0}},
            "text_config.rope_scaling.factor = 4.0 is not a setting",
        ),
        ({"moe_intermediate_size": 832}, "text_config.moe_intermediate_size = 832"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type = 'yarn'"),
    ],
)
def test_what_is_not_supported_is_named(changes, message):
    config = {**RELEASED, "text_config": {**RELEASED["text_config"], **changes}}
    with pytest.raises(ValueError, match=message):
        ARIA.model_args(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vision_feature_layer": -2}, "vision_feature_layer = -2"),
        ({"projector_patch_to_query_dict": {"1200": 128}}, "query_dict = {'1200': 128} must have square numbers"),
        ({"projector_patch_to_query_dict": {"many": 128}}, "query_dict = {'many': 128} must have square numbers"),
        ({"projector_patch_to_query_dict": {}}, "query_dict = {} must have square numbers"),
        ({"projector_patch_to_query_dict": {"1225": 128.7}}, "query_dict.1225: must be an integer, got 128.7"),
        ({"projector_patch_to_query_dict": [1]}, "projector_patch_to_query_dict: must be a table"),
        ({"projector_patch_to_query_dict": {"1225": 0}}, "query_dict = .* at least one"),
        ({"projector_patch_to_query_dict": {"0": 128}}, "query_dict = {'0': 128} must have square numbers"),
        ({"max_value_projector_patch_to_query_dict": 64}, "max_value_.* = 64 .*only 256"),
        ({"vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act = 'gelu'"),
        ({"vision_config": {"attention_heads": 8}}, "vision_config.attention_heads = 8 .*only 16"),
        ({"vision_config": {"image_size": [980, 490]}}, "vision_config.image_size"),
        ({"vision_config": {"num_registers": 4}}, "vision_config.num_registers = 4"),
        ({"projector_patch_to_query_dict": {"1225": 256, "4900": 128}}, "query_dict = .* larger images more queries"),
    ],
)  # fmt: skip
def test_what_is_not_supported_of_the_image_encoder_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ARIA.model_args({**RELEASED, **changes})


def test_embeddings_are_tied_by_the_setting_beside_the_table():
    """As in transformers 5, whose class for the table has the setting too."""
    tied = {"text_config": {**RELEASED["text_config"], "tie_word_embeddings": True}}
    assert not ARIA.model_args({**RELEASED, **tied}).tie_embeddings
    assert ARIA.model_args({**RELEASED, "tie_word_embeddings": True}).tie_embeddings


def test_config_of_a_slice_states_its_experts_and_nothing_else():
    sliced = replace(FLAVORS["Aria"], num_experts=48, groups=())
    config = ARIA.config(RELEASED, sliced)
    assert config == {**RELEASED, "text_config": {**RELEASED["text_config"], "moe_num_experts": 48}}
    assert RELEASED["text_config"]["moe_num_experts"] == 64
    assert ARIA.model_args(config) == sliced
