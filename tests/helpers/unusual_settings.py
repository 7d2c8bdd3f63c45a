"""Settings of config.json that the decoder may refuse, of every architecture: those that transformers' classes have, and some of other
models.
"""

from typing import Any

Config = dict[str, Any]
Unusual = tuple[Config, ...]


def _each(table: str, **values: Any) -> Unusual:
    return tuple({f"{table}{key}": value} for key, value in values.items())


def _text(table: str) -> Unusual:
    usual = {"hidden_act": "gelu", "attention_dropout": 0.1, "sliding_window": 8}
    rotary = _each(f"{table}rope_parameters.", rope_type="linear")
    return _each(table, **usual, num_key_value_heads=3) + rotary


_QWEN = (
    *_text("text_config."),
    {
        "text_config.mlp_only_layers": [1],
        "text_config.num_hidden_layers": 3,
        "text_config.decoder_sparse_step": 1,
    },
    {
        "text_config.decoder_sparse_step": 2,
        "text_config.num_hidden_layers": 3,
        "text_config.mlp_only_layers": [],
    },
    *_each(
        "text_config.",
        num_experts_per_tok=12,
        norm_topk_prob=False,
        shared_expert_intermediate_size=16,
        attention_bias="yes",
    ),
    *_each(
        "text_config.rope_parameters.",
        mrope_section=[1, 1, 1],
        mrope_interleaved=False,
        partial_rotary_factor=0.5,
    ),
    *_each(
        "vision_config.",
        hidden_act="silu",
        in_channels=1,
        num_position_embeddings=20,
        deepstack_visual_indexes=[1, 0],
        hidden_size=14,
        window_size=8,
        out_hidden_size=20,
    ),
)
# What the decoder may refuse: a setting, with what makes it matter.
UNUSUAL: dict[str, Unusual] = {
    "qwen3_vl_moe": _QWEN,
    "qwen3_omni_moe_thinker": _QWEN,
    "glm4v_moe": (
        *_text("text_config."),
        *_each(
            "text_config.",
            norm_topk_prob=False,
            n_group=2,
            topk_group=2,
            use_qk_norm=True,
            tie_word_embeddings=True,
            num_nextn_predict_layers=1,
        ),
        *_each("text_config.rope_parameters.", partial_rotary_factor=0.75),
        *_each(
            "vision_config.",
            attention_bias=True,
            attention_dropout=0.1,
            rms_norm_eps=1e-3,
            hidden_act="gelu",
            in_channels=1,
            hidden_size=14,
            out_hidden_size=20,
        ),
    ),
    "ernie4_5_vl_moe": (
        *_text("text_config."),
        *_each(
            "text_config.",
            use_bias=True,
            moe_norm_min=0.1,
            moe_k=12,
            moe_intermediate_size=[20],
            mlp_layer_types=["sparse", "dense"],
            norm_topk_prob=False,
        ),
        *_each("text_config.rope_parameters.", mrope_section=[1, 2, 1]),
        *_each(
            "vision_config.",
            hidden_act="gelu",
            temporal_merge_size=3,
            in_channels=1,
            hidden_size=14,
        ),
    ),
    "aria": (
        *_text("text_config."),
        *_each("text_config.", mlp_bias=True, moe_topk=12, moe_z_loss_coeff=1e-5),
        *_each(
            "vision_config.",
            attention_dropout=0.1,
            num_channels=1,
            hidden_act="gelu",
            image_size=17,
        ),
        *_each("", vision_feature_layer=-2, projector_patch_to_query_dict={"16": 4, "20": 6}),
    ),
    "hunyuan_v1_moe": (
        *_text(""),
        *_each(
            "",
            mlp_bias=True,
            moe_topk=12,
            num_shared_expert=2,
            use_qk_norm=False,
            use_cla=True,
            norm_topk_prob=False,
        ),
        *_each("rope_parameters.", factor=4.0),
    ),
}
