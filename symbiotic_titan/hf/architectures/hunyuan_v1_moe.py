"""Hunyuan-A13B, a text decoder: query and key norms after rotary, a shared expert in every layer, tied embeddings.

It has no image encoder, so the flavor adds a new one, which starts from initial values. All tokens of an image share one position,
because 1-D rotary has no axes for rows and columns.
"""

from collections.abc import Mapping
from typing import Any, Literal

from symbiotic_titan.hf.architectures.base import (
    Architecture,
    Config,
    Shape,
    WeightMapping,
)
from symbiotic_titan.hf.architectures.settings import (
    LATENTS,
    ROTARY,
    check_settings,
    described_by,
    one_value,
    rotary_settings,
    settings,
    with_experts,
)
from symbiotic_titan.hf.architectures.weight_map import (
    attention_half,
    decoder,
    experts,
    same,
    swiglu,
)
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
ROTARY_DEFAULTS = {"rope_type": "default", "rope_theta": 10_000.0}
_ROTARY_SUPPORTED = {"factor": 1.0, "partial_rotary_factor": 1.0}
# Besides ``alpha`` the released file has settings of other kinds of scaling.
_ROTARY_OTHERS = {
    "rope_type": Literal["default", "dynamic"],
    "alpha": float,
    "beta_fast": Any,
    "beta_slow": Any,
    "mscale": Any,
    "mscale_all_dim": Any,
}
_SUPPORTED = {
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
    "routed_scaling_factor": 1.0,
    "num_shared_expert": 1,
    "group_limited_greedy": False,
    "quantization_config": {},
}
# The released file has settings of many other models. They have no effect while their switches, in ``_SUPPORTED`` or unlisted, are
# off: ``kv_lora_rank`` needs ``use_mla``. ``attention_dropout`` matters in training only, and this network has none.
_OTHERS: dict[str, Any] = {
    **ROTARY,
    "num_key_value_heads": int,
    "head_dim": int,
    "attention_head_dim": int,
    "moe_intermediate_size": int,
    "norm_type": Literal["rms", "hf_rms"],
    **dict.fromkeys(
        (
            *("attention_dropout", "pretraining_tp", "org_vocab_size", "cla_share_factor"),
            *("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
            *("dense_list", "pool_type", "pad_id", "eod_token_id", "sep_token_id", "mask_init_id"),
            *("im_start_id", "im_end_id", "im_newline_id", "text_start_id", "text_end_id"),
            *("video_start_id", "video_end_id", "num_media_embeds", "anyres_pooling_size"),
            *("vit_input_resolution", "vit_mapping_type", "vit_norm_type", "vit_patch"),
            "vit_token",
        ),
        Any,
    ),
}
_PER_LAYER = ("num_experts", "moe_topk", "num_shared_expert", "moe_intermediate_size")


def rotary_theta(values: Config, head_dim: int) -> float:
    """The base of the rotary frequencies. Despite its name, "dynamic" scaling by ``alpha`` is constant: theta * alpha ** (d / (d - 2))
    for heads of d channels.

    Raises:
        ValueError: another kind of scaling, or heads of at most 2 channels, for which that exponent is undefined.
    """
    rotary = rotary_settings(values, "", ROTARY_DEFAULTS, _ROTARY_SUPPORTED, _ROTARY_OTHERS)
    theta = float(rotary["rope_theta"])
    if rotary["rope_type"] == "default":
        return theta
    if "alpha" not in rotary or head_dim <= 2:
        raise ValueError(
            "config.json: rope_type = 'dynamic' of the rotary settings is supported by this network only with an alpha and heads of more "
            f"than 2 channels, got alpha = {rotary.get('alpha')} and {head_dim} channels"
        )
    return float(theta * rotary["alpha"] ** (head_dim / (head_dim - 2)))


def model_args(config: Config) -> ModelArgs:
    """See ``Architecture``."""
    stated = {key: one_value(config, key) for key in _PER_LAYER if key in config}
    if (
        config.get("routed_scaling_factor") is False
    ):  # how files of this family say that a setting is off
        stated["routed_scaling_factor"] = None
    values = settings({**config, **stated}, "", DEFAULTS, _SUPPORTED, _OTHERS)
    width, heads = values["intermediate_size"], values["num_attention_heads"]
    head_dim = values.get("attention_head_dim", values["hidden_size"] // heads)
    head_dim = values.get("head_dim", head_dim)
    # The released file states two values twice.
    check_settings(values, "", {"moe_intermediate_size": width, "attention_head_dim": head_dim})
    rope_theta = rotary_theta(values, head_dim)
    with described_by(""):
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
            rope_theta=rope_theta,
            rotary_layout="shared",
            mrope="none",
            mrope_sections=(),
            tie_embeddings=values["tie_word_embeddings"],
            vit=FLAVORS["Hunyuan-A13B"].vit,
            **LATENTS,
        )


def weight_map(args: ModelArgs, shapes: Mapping[str, Shape]) -> list[WeightMapping]:
    """See ``Architecture``."""

    def layer(number: int, theirs: str, ours: str) -> list[WeightMapping]:
        out = attention_half(
            theirs,
            ours,
            args,
            ("self_attn.query_layernorm.weight", "attention.q_norm.weight"),
            ("self_attn.key_layernorm.weight", "attention.k_norm.weight"),
        )
        out += same(theirs, ours, ("mlp.gate.wg.weight", "moe.router.all.weight"))
        out += experts(f"{theirs}mlp.experts", f"{ours}moe.experts.all", args.num_experts, shapes)
        out += swiglu(f"{theirs}mlp.shared_mlp", f"{ours}moe.shared_experts")
        return out

    return decoder("model.", args, layer)


def config_of(config: Config, args: ModelArgs) -> dict[str, Any]:
    """See ``Architecture``."""
    return with_experts(config, model_args(config), args, "", "num_experts", top_k=("moe_topk",))


HUNYUAN_V1_MOE = Architecture(model_args, weight_map, config_of)
