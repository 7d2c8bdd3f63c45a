"""Our network against transformers' Qwen3VLMoeForConditionalGeneration, tiny, random, in float32."""

import copy
from dataclasses import replace

import pytest
import torch

from symbiotic_titan.hf.architectures.qwen3_vl_moe import (
    QWEN3_VL_MOE,
    config_of,
    model_args,
    weight_map,
)
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.partition import ExpertGroup
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
from tests.helpers.released_configs import QWEN as RELEASED
from tests.helpers.released_models import QWEN
from tests.helpers.stored_models import assert_equal_tensors

PLACEHOLDER = 120
DOCUMENT = [3, (2, 3), 2, (1, 4), 1, (3, 1), 4]
TEXT = QWEN["text_config"] | {"num_hidden_layers": 3}
VISION = QWEN["vision_config"] | {"depth": 3, "deepstack_visual_indexes": [0, 1]}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def released():
    """(text settings, settings) -> transformers' model with random values."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    def make(text=None, **settings):
        config = Qwen3VLMoeConfig(
            text_config={**TEXT, **(text or {})},
            vision_config=VISION,
            image_token_id=PLACEHOLDER,
            video_token_id=121,
            **settings,
        )
        return make_random(Qwen3VLMoeForConditionalGeneration(config))

    return make


@pytest.fixture(scope="module")
def run_theirs():
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextTopKRouter

    return lambda model, inputs: run_released(model, Qwen3VLMoeTextTopKRouter, inputs)


@pytest.fixture(scope="module")
def pair(released, tmp_path_factory):
    """(transformers' model, ours, its config.json, its tensors)."""
    theirs = released()
    config, tensors = saved(theirs, tmp_path_factory.mktemp("qwen"))
    return theirs, loaded(QWEN3_VL_MOE, model_args(config), tensors), config, tensors


@pytest.fixture(scope="module")
def row(pair):
    return image_row(pair[1].args, DOCUMENT, PLACEHOLDER, torch.Generator().manual_seed(3))


def assert_same_forward(found, expected):
    (logits, choices), (their_logits, their_choices) = found, expected
    torch.testing.assert_close(logits, their_logits, **CLOSE)
    assert their_logits.std() > 0.1
    for mine, other in zip(choices, their_choices, strict=True):
        assert torch.equal(mine, other)


def test_text_gives_the_same_logits_and_choices(pair, run_theirs):
    theirs, ours, *_ = pair
    tokens = torch.randint(112, (2, 24), generator=torch.Generator().manual_seed(2))
    assert_same_forward(
        run(ours, text_row(ours.args, tokens)), run_theirs(theirs, {"input_ids": tokens})
    )


def test_text_with_images_gives_the_same_logits_and_choices(pair, row, run_theirs):
    theirs, ours, *_ = pair
    inputs = released_inputs(ours.args, DOCUMENT, row)
    assert_same_forward(run(ours, row), run_theirs(theirs, inputs))


def test_rotary_positions_are_those_of_transformers(pair, row):
    theirs, ours, *_ = pair
    inputs = released_inputs(ours.args, DOCUMENT, row)
    del inputs["pixel_values"]
    positions_A1T, _ = theirs.model.get_rope_index(**inputs)
    assert torch.equal(row.positions, positions_A1T.permute(1, 2, 0))


@torch.no_grad()
def test_encoder_gives_the_same_tokens_and_deepstack_features(pair, row):
    theirs, ours, *_ = pair
    inputs = released_inputs(ours.args, DOCUMENT, row)
    expected = theirs.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    found = ours._encode(row)
    torch.testing.assert_close(found.tokens[0], expected.pooler_output, **CLOSE)
    assert len(found.deepstack) == len(expected.deepstack_features) == 2
    for mine, other in zip(found.deepstack, expected.deepstack_features, strict=True):
        torch.testing.assert_close(mine[0], other, **CLOSE)


@pytest.mark.parametrize(
    "change",
    [
        {"vit_attention": "bidirectional"},
        {"mrope": "chunked"},
        {"rope_theta": 1e4},
        {"qk_norm": "after"},
        {"normalize_weights": False},
        {"vit": {"activation": "gelu"}},
        {"vit": {"position_grid": 0}},
        {"vit": {"deepstack": ()}},
        {"vit": {"rope_theta": 100.0}},
    ],
    ids=lambda change: "_".join(change.get("vit", change)),
)
def test_every_switch_matters(change, pair, row):
    ours = pair[1]
    vit = change.get("vit")
    change = {"vit": replace(ours.args.vit, **vit)} if vit else change
    assert moved_by(ours, row, **change) > 1e-4


@torch.no_grad()
def test_both_frames_of_the_patch_kernel_matter(pair, row):
    ours = copy.deepcopy(pair[1])
    vit = ours.args.vit
    kernel = ours.vit.patch_embedding.weight.unflatten(
        1, (vit.channels, vit.temporal_patch, vit.patch**2)
    )
    for frame in range(vit.temporal_patch):
        before, kept = run(ours, row)[0], kernel[:, :, frame].clone()
        kernel[:, :, frame] = 0
        assert (run(ours, row)[0] - before).abs().max() > 1e-3
        kernel[:, :, frame] = kept


def test_biases_tied_embeddings_and_leading_dense_layers(released, run_theirs, tmp_path):
    text = {"attention_bias": True, "mlp_only_layers": [0]}
    theirs = released(text, tie_word_embeddings=True)
    config, tensors = saved(theirs, tmp_path)
    ours = loaded(QWEN3_VL_MOE, model_args(config), tensors)
    assert ours.args.num_dense_layers == 1 and ours.args.tie_embeddings and ours.args.qkv_bias
    row = image_row(ours.args, DOCUMENT, PLACEHOLDER, torch.Generator().manual_seed(4))
    inputs = released_inputs(ours.args, DOCUMENT, row)
    assert_same_forward(run(ours, row), run_theirs(theirs, inputs))
    assert_equal_tensors(stored(QWEN3_VL_MOE, ours, shapes_of(tensors)), tensors)


def as_released(tensors):
    """The same tensors in the layout of the released files."""
    return {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("layout", [dict, as_released], ids=["transformers_5", "released"])
def test_every_tensor_is_read_once_and_written_back_bit_for_bit(layout, pair):
    *_, config, tensors = pair
    tensors = layout(tensors)
    ours = loaded(QWEN3_VL_MOE, model_args(config), tensors)
    expected = pair[1].state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert_equal_tensors(stored(QWEN3_VL_MOE, ours, shapes_of(tensors)), tensors)


def test_transformers_reads_the_released_layout_as_we_do(pair, row, run_theirs, tmp_path):
    from safetensors.torch import save_file
    from transformers import Qwen3VLMoeForConditionalGeneration

    theirs, ours, _, tensors = pair
    theirs.config.save_pretrained(tmp_path)
    save_file(as_released(tensors), tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    inputs = released_inputs(ours.args, DOCUMENT, row)
    assert_same_forward(run(ours, row), run_theirs(read, inputs))


def expert_shapes(args, gate_up, down):
    shapes = {}
    for layer in range(args.num_layers):
        experts = f"model.language_model.layers.{layer}.mlp.experts"
        shapes[f"{experts}.gate_up_proj"] = (args.num_experts, *gate_up)
        shapes[f"{experts}.down_proj"] = (args.num_experts, *down)
    return shapes


@pytest.mark.parametrize("width", [16, 32], ids=["gate_up_is_square", "down_is_square"])
def test_a_square_matrix_is_told_by_the_other_one(width, pair):
    args = replace(pair[1].args, expert_hidden_dim=width)
    values = torch.arange(8 * 2 * width * 32.0)
    for gate_up, down in (((32, 2 * width), (width, 32)), ((2 * width, 32), (32, width))):
        found = weight_map(args, expert_shapes(args, gate_up, down))
        link = next(link for link in found if link.theirs[0].endswith("gate_up_proj"))
        gate, up = link.load([values.view(8, *gate_up)])
        transposed = gate_up[0] == 32 and down[0] == width
        assert gate[0, 1, 0] == (1 if transposed else 32)
        assert up[0, 0, 0] == (width if transposed else 32 * width)


def test_experts_of_another_shape_are_refused(pair):
    args = pair[1].args
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.gate_up_proj .* \(32, 32\) and"):
        weight_map(args, expert_shapes(args, (32, 32), (24, 32)))


# ---- config.json ----------------------------------------------------------------------------------------------------------------


def changed(table, key, value):
    config = copy.deepcopy(RELEASED)
    (config[table] if table else config)[key] = value
    return config


def test_the_flavor_is_the_released_config():
    assert model_args(RELEASED) == FLAVORS["Qwen3-VL-30B-A3B"]


def test_the_flavor_has_as_many_parameters_as_the_released_model():
    with torch.device("meta"):
        model = SymbioticModel(FLAVORS["Qwen3-VL-30B-A3B"])
    d, w, heads, kv_heads = 2048, 1152, 32 * 128, 4 * 128
    attention = 2 * d * heads + 2 * d * kv_heads + 2 * 128
    layer = attention + 2 * d + 128 * d + 128 * 3 * d * 768
    text = 2 * 151936 * d + 48 * layer + d
    block = 4 * w + 3 * w * w + 3 * w + w * w + w + 2 * w * 4304 + 4304 + w
    merger = (4 * w) ** 2 + 4 * w + 4 * w * d + d
    vit = 2 * 3 * 256 * w + w + 48**2 * w + 27 * block + 4 * merger + 2 * w + 3 * 2 * 4 * w
    latent = (64 * d + d) + (256 * d + d) + (d * d + d) + d + (2 * d * d + 2 * d) + (64 * d + 64)
    assert text == 30_532_122_624 and vit == 538_631_408
    assert sum(p.numel() for p in model.parameters()) == text + vit + latent


def test_rotary_settings_are_read_in_the_old_and_in_the_new_place():
    config = copy.deepcopy(RELEASED)
    text = config["text_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    assert model_args(config) == model_args(RELEASED)


def test_leading_dense_layers_are_expressed():
    assert model_args(changed("text_config", "mlp_only_layers", [0, 1])).num_dense_layers == 2


@pytest.mark.parametrize(
    ("table", "key", "value", "message"),
    [
        ("text_config", "hidden_act", "relu", r"text_config.hidden_act = 'relu' is not supported"),
        ("text_config", "attention_dropout", 0.1, r"text_config.attention_dropout = 0.1 is not"),
        ("text_config", "norm_topk_prob", False, r"text_config.norm_topk_prob = False is not"),
        ("text_config", "sliding_window", 4096, r"text_config.sliding_window = 4096 is not a"),
        ("text_config", "mlp_only_layers", [3], r"text_config.mlp_only_layers = \[3\] leave the"),
        ("text_config", "decoder_sparse_step", 2, r"decoder_sparse_step = 2 and .* \[0, 2, 4"),
        (
            "text_config",
            "rope_scaling",
            {"rope_type": "yarn", "factor": 4.0},
            r"text_config.rope_scaling.rope_type = 'yarn' is not supported",
        ),
        (
            "text_config",
            "rope_scaling",
            {"mrope_interleaved": False},
            r"text_config.rope_scaling.mrope_interleaved = False is not supported",
        ),
        ("text_config", "num_hidden_layers", "48", r"text_config.num_hidden_layers: must be an"),
        (
            "text_config",
            "decoder_sparse_step",
            0,
            r"text_config.decoder_sparse_step: must be positive",
        ),
        (
            "text_config",
            "num_local_experts",
            64,
            r"num_experts = 128 is not supported.* only 64 is",
        ),
        (
            "text_config",
            "rope_parameters",
            {"rope_theta": 1e6},
            r"text_config.rope_scaling = .* only \{'rope_theta': 1000000.0\} is",
        ),
        ("text_config", "num_experts", 4, r"top_k = 8 does not fit into num_experts = 4"),
        ("vision_config", "hidden_act", "silu", r"vision_config.hidden_act = 'silu' .* 'gelu'"),
        ("vision_config", "num_position_embeddings", 2300, r"num_position_embeddings = 2300 is no"),
        ("vision_config", "out_hidden_size", 3584, r"vision_config.out_hidden_size = 3584 .* 2048"),
        ("vision_config", "in_channels", 4, r"images are read as RGB, got 4"),
        ("vision_config", "patch_size", [16, 16], r"vision_config.patch_size: must be an integer"),
        ("vision_config", "deepstack_visual_indexes", [16, 8], r"vit.deepstack: must be ascending"),
        ("vision_config", "window_size", 112, r"vision_config.window_size = 112 is not a setting"),
        ("", "quantization_config", {"bits": 4}, r"config.json: quantization_config = \{'bits'"),
    ],
)
def test_a_setting_that_is_not_supported_is_named(table, key, value, message):
    with pytest.raises(ValueError, match=message):
        model_args(changed(table, key, value))


def test_fewer_experts_are_written_where_the_file_has_their_number():
    args = model_args(RELEASED)
    fewer = replace(args, num_experts=96, groups=(ExpertGroup("all", (0, 1, 2), 96),))
    assert config_of(RELEASED, fewer) == changed("text_config", "num_experts", 96)
    newer = changed("text_config", "num_local_experts", 128)
    del newer["text_config"]["num_experts"]
    assert config_of(newer, fewer)["text_config"]["num_local_experts"] == 96
    with pytest.raises(ValueError, match="the model has shared_hidden_dim = 768, but"):
        config_of(RELEASED, replace(args, shared_hidden_dim=768))
