"""Hunyuan-A13B, a text decoder: query and key norms behind rotary, a shared expert in every layer, tied embeddings.

It has no image encoder. The one of the flavor is new: nothing on disk stands for ``vit``, it gets initial values. All tokens of
an image share one position, as its 1-D rotary has no axes for rows and columns.
"""

from collections.abc import Mapping
from typing import Any

from symbiotic_titan.backbones.arrangements import (
    LATENTS,
    attention,
    check_settings,
    decoder,
    experts,
    one_value,
    rotary_settings,
    same,
    settings,
    swiglu,
    with_experts,
)
from symbiotic_titan.backbones.backbone import Backbone, Config, Link, Shape
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.flavors import FLAVORS

DEFAULTS = {
    "vocab_size": 290943,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_experts": 1,
    "moe_topk": 1,
}
# The released file has settings of many other models beside these; that it drops out attention while training is no part of the
# network.
_EXPRESSED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_qk_norm": True,
    "use_rotary_pos_emb": True,
    "position_embedding_xdrope": False,
    "use_cla": False,
    "use_mla": False,
    "sliding_window": False,
    "use_mixed_mlp_moe": True,
    "moe_layer_num_skipped": 0,
    "norm_topk_prob": True,
    "group_limited_greedy": False,
    "quantization_config": {},
}
_PER_LAYER = ("num_experts", "moe_topk", "num_shared_expert", "moe_intermediate_size")


def rotary_theta(values: Config, head_dim: int) -> float:
    """The base of the frequencies. ``alpha`` stretches it once and for all, to theta * alpha ** (d / (d - 2)) with the head's
    width d; the file calls that "dynamic".

    Raises:
        ValueError: another kind of scaling.
    """
    rotary = rotary_settings(values)
    theta, alpha = float(rotary["rope_theta"]), rotary.get("alpha")
    if rotary["rope_type"] == "dynamic" and alpha:
        return theta * alpha ** (head_dim / (head_dim - 2))
    check_settings(rotary, "rope_parameters", {"rope_type": "default"})
    return theta


def model_args(config: Config) -> ModelArgs:
    """See ``Backbone``."""
    values = settings(config, "", DEFAULTS)
    width = values["intermediate_size"]
    values = {**values, **{key: one_value(values, key) for key in _PER_LAYER if key in values}}
    check_settings(
        values, "", {**_EXPRESSED, "num_shared_expert": 1, "moe_intermediate_size": width}
    )
    heads = values["num_attention_heads"]
    head_dim = values.get("head_dim") or values.get("attention_head_dim")
    head_dim = head_dim or values["hidden_size"] // heads
    return ModelArgs(
        vocab_size=values["vocab_size"],
        dim=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads", heads),
        head_dim=head_dim,
        num_dense_layers=0,
        dense_hidden_dim=width,
        num_experts=values["num_experts"],
        top_k=values["moe_topk"],
        expert_hidden_dim=width,
        shared_hidden_dim=width,
        qkv_bias=values["attention_bias"],
        o_bias=values["attention_bias"],
        qk_norm="after",
        norm_eps=values["rms_norm_eps"],
        rope_theta=rotary_theta(values, head_dim),
        rotary_layout="shared",
        mrope="none",
        mrope_sections=(),
        tie_embeddings=values["tie_word_embeddings"],
        vit=FLAVORS["Hunyuan-A13B"].vit,
        **LATENTS,
    )


def links(args: ModelArgs, shapes: Mapping[str, Shape]) -> list[Link]:
    """See ``Backbone``."""

    def layer(number: int, theirs: str, ours: str) -> list[Link]:
        out = same(
            theirs,
            ours,
            ("input_layernorm.weight", "attention_norm.weight"),
            ("self_attn.query_layernorm.weight", "attention.q_norm.weight"),
            ("self_attn.key_layernorm.weight", "attention.k_norm.weight"),
            ("post_attention_layernorm.weight", "ffn_norm.weight"),
            ("mlp.gate.wg.weight", "moe.router.all.weight"),
        )
        out += attention(f"{theirs}self_attn", f"{ours}attention", args)
        out += experts(f"{theirs}mlp.experts", f"{ours}moe.experts.all", args.num_experts, shapes)
        out += swiglu(f"{theirs}mlp.shared_mlp", f"{ours}moe.shared_experts")
        return out

    return decoder("model.", args, layer)


def config_of(config: Config, args: ModelArgs) -> dict[str, Any]:
    """See ``Backbone.config``."""
    return with_experts(config, model_args(config), args, "", "num_experts")


HUNYUAN_V1_MOE = Backbone("hunyuan_v1_moe", model_args, links, config_of)
