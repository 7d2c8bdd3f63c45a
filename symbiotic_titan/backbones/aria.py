"""Aria, its text decoder: 1-D rotary, a softmax over the chosen logits, shared experts as wide as two.

Its image encoder is not expressed: a projector turns every image into 128 or 256 learned queries, while here a token is a square
of an image, with a place. Its tensors stay behind, and ``vit`` is the flavor's, new, with initial values: what Aria
has learned about images is lost. All tokens of an image share one position.
"""

from collections.abc import Mapping
from typing import Any

from symbiotic_titan.backbones.arrangements import (
    LATENTS,
    attention,
    check_known,
    check_settings,
    decoder,
    join_halves,
    rotary_settings,
    same,
    settings,
    split_halves,
    swiglu,
    transpose,
    with_experts,
)
from symbiotic_titan.backbones.backbone import Backbone, Config, Link, Shape
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.flavors import FLAVORS

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "moe_num_experts": 8,
    "moe_topk": 2,
    "moe_num_shared_experts": 2,
}
_EXPRESSED = {"hidden_act": "silu", "attention_dropout": 0.0, "mlp_bias": False}
_READ_ELSEWHERE = {
    *("num_key_value_heads", "head_dim", "rope_theta", "rope_parameters", "rope_scaling"),
    *("moe_intermediate_size", "num_experts_per_tok"),
    *("moe_z_loss_coeff", "moe_aux_loss_coeff", "pretraining_tp"),
}
# Beside the decoder: the image encoder, which is not expressed.
_BESIDE = {
    *("text_config", "vision_config", "vision_feature_layer", "projector_patch_to_query_dict"),
    *("max_value_projector_patch_to_query_dict", "image_token_index", "tie_word_embeddings"),
    "ignore_index",
}


def model_args(config: Config) -> ModelArgs:
    """See ``Backbone``."""
    values = settings(config, "text_config", DEFAULTS)
    heads, width = values["num_attention_heads"], values["intermediate_size"]
    # The released file says two things twice.
    twice = {"moe_intermediate_size": width, "num_experts_per_tok": values["moe_topk"]}
    check_settings(values, "text_config", {**_EXPRESSED, **twice})
    check_known(values, "text_config", {*DEFAULTS, *_EXPRESSED, *_READ_ELSEWHERE})
    check_known(config, "", _BESIDE)
    rotary = rotary_settings(values)
    check_settings(rotary, "text_config.rope_parameters", {"rope_type": "default"})
    return ModelArgs(
        vocab_size=values["vocab_size"],
        dim=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads", heads),
        head_dim=values.get("head_dim", values["hidden_size"] // heads),
        num_dense_layers=0,
        dense_hidden_dim=width,
        num_experts=values["moe_num_experts"],
        top_k=values["moe_topk"],
        expert_hidden_dim=width,
        shared_hidden_dim=width * values["moe_num_shared_experts"],
        qkv_bias=values["attention_bias"],
        o_bias=values["attention_bias"],
        qk_norm="none",
        norm_eps=values["rms_norm_eps"],
        rope_theta=float(rotary["rope_theta"]),
        rotary_layout="shared",
        mrope="none",
        mrope_sections=(),
        tie_embeddings=bool(values["tie_word_embeddings"] or config.get("tie_word_embeddings")),
        vit=FLAVORS["Aria"].vit,
        **LATENTS,
    )


def _experts(theirs: str, ours: str, shapes: Mapping[str, Shape]) -> list[Link]:
    """(E, D, 2F) and (E, F, D): transposed, in files and in transformers' memory."""
    fused = f"{theirs}.gate_up_proj" in shapes
    gate_up, down = (".gate_up_proj", ".down_proj") if fused else (".fc1.weight", ".fc2.weight")
    halve, join = split_halves(1), join_halves(1)
    return [
        Link(
            (theirs + gate_up,),
            (f"{ours}.w1", f"{ours}.w3"),
            load=lambda tensors: halve(transpose(tensors)),
            save=lambda tensors: transpose(join(tensors)),
        ),
        Link((theirs + down,), (f"{ours}.w2",), transpose, transpose),
    ]


def links(args: ModelArgs, shapes: Mapping[str, Shape]) -> list[Link]:
    """See ``Backbone``. Files name the decoder ``language_model.model``, transformers 5 in memory ``model.language_model``."""
    in_memory = "model.language_model.norm.weight" in shapes
    prefix = "model.language_model." if in_memory else "language_model.model."
    output = "lm_head.weight" if in_memory else "language_model.lm_head.weight"

    def layer(number: int, theirs: str, ours: str) -> list[Link]:
        out = same(
            theirs,
            ours,
            ("input_layernorm.weight", "attention_norm.weight"),
            ("post_attention_layernorm.weight", "ffn_norm.weight"),
            ("mlp.router.weight", "moe.router.all.weight"),
        )
        out += attention(f"{theirs}self_attn", f"{ours}attention", args)
        out += _experts(f"{theirs}mlp.experts", f"{ours}moe.experts.all", shapes)
        out += swiglu(f"{theirs}mlp.shared_experts", f"{ours}moe.shared_experts")
        return out

    return decoder(prefix, args, layer, output)


def config_of(config: Config, args: ModelArgs) -> dict[str, Any]:
    """See ``Backbone.config``."""
    return with_experts(config, model_args(config), args, "text_config", "moe_num_experts")


ARIA = Backbone(
    "aria",
    model_args,
    links,
    config_of,
    unused=(r"(model\.)?vision_tower\.", r"(model\.)?multi_modal_projector\."),
)
