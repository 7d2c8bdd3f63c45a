"""ERNIE 4.5 VL as released with code of its own: the network of ``ernie4_5_vl_moe``, described by one flat table.

Its config.json has a number of experts for each pool, and the first and the last layer with experts in place of a list of layers.
"""

import copy
from typing import Any

from symbiotic_titan.hf.architectures import ernie4_5_vl_moe
from symbiotic_titan.hf.architectures.base import Architecture, Config
from symbiotic_titan.hf.architectures.settings import ROTARY, check_settings, settings
from symbiotic_titan.model.args import ModelArgs

# What its configuration class takes for a setting that the file leaves out.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 11008,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "moe_k": 2,
    "moe_num_shared_experts": 0,
}
VISION_DEFAULTS = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
}
_SUPPORTED = {
    "hidden_act": "silu",
    "use_bias": False,
    "use_rmsnorm": True,
    "rope_3d": True,
    "compression_ratio": 1.0,
    "temporal_conv_size": 2,
    "use_temporal_conv": True,
    "moe_layer_interval": 1,
    "moe_use_aux_free": True,
    "moe_gate_act": "softmax",
    "moe_norm_gate_logits": True,
    "moe_use_hard_gate": True,
    "moe_use_token_type_bias": False,
    "moe_num_attn_experts": False,
    "moe_group_experts": False,
    "moe_norm_min": 1e-12,
}
# Settings of its training and of kernels, which do not change what is computed.
_OTHERS: dict[str, Any] = {
    **ROTARY,
    "num_key_value_heads": int,
    "head_dim": int,
    "vision_config": Any,
    "moe_num_experts": list[int],
    "moe_intermediate_size": list[int],
    "moe_layer_start_index": Any,
    "moe_layer_end_index": Any,
    "freq_allocation": int,
    "spatial_conv_size": int,
    "pixel_hidden_size": int,
    **dict.fromkeys(
        (
            *(
                "im_patch_id",
                "mm_vocab_size",
                "max_text_id",
                "max_sequence_length",
                "ignored_index",
            ),
            *("modality_detach", "moe_capacity", "moe_gate", "moe_group", "moe_dropout_prob"),
            *("moe_aux_loss_lambda", "moe_z_loss_lambda", "moe_orthogonal_loss_lambda"),
            *("moe_dense_experts_token_type_id", "moe_multimodal_dispatch_use_allgather"),
            *("moe_group_orthogonal_loss", "global_aux_loss", "sinkhorn_2gate", "sinkhorn_temp"),
            *("fuse_rms_norm", "fuse_rope", "fuse_swiglu", "fuse_linear", "fuse_attn_ffn"),
            *("use_flash_attention", "token_balance_loss"),
            *("image_start_token_id", "image_end_token_id", "video_start_token_id"),
            "video_end_token_id",
        ),
        Any,
    ),
}
_VISION_OTHERS = dict.fromkeys(
    (
        *("attn_implementation", "attn_sep", "pp_data_balance", "recompute", "use_recompute"),
        *("vit_first_fwd_bsz", "vit_num_recompute_layers", "tensor_parallel_degree"),
        "tensor_model_parallel_size",
    ),
    Any,
)
_TEXT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "moe_k"),
    *("moe_num_shared_experts", "moe_intermediate_size", "rope_scaling", "rope_parameters"),
)
_VISION = ("depth", "hidden_size", "num_heads", "in_channels", "patch_size", "spatial_merge_size")


def nested(config: Config) -> dict[str, Any]:
    """The same model as config.json of ``ernie4_5_vl_moe`` describes it.

    Raises:
        ValueError: a setting that this network does not support, by its name in ``config``.
    """
    values = settings(config, "", DEFAULTS, _SUPPORTED, _OTHERS)
    vision = settings(config, "vision_config", VISION_DEFAULTS, others=_VISION_OTHERS)
    check_settings(vision, "vision_config", {"embed_dim": vision["hidden_size"]})
    same = {"pixel_hidden_size": "hidden_size", "spatial_conv_size": "spatial_merge_size"}
    check_settings(values, "", {key: vision[other] for key, other in same.items()})
    text = {key: values[key] for key in _TEXT if key in values}
    text.setdefault("num_key_value_heads", values["num_attention_heads"])
    text["rope_theta"] = values.get("rope_theta", 10_000.0)
    text["moe_num_experts"] = _pool_size(values)
    text["mlp_layer_types"] = _layer_types(values)
    images = {key: vision[key] for key in (*_VISION, "hidden_act")}
    images["intermediate_size"] = vision["mlp_ratio"] * vision["hidden_size"]
    sections = (text.get("rope_scaling") or {}).get("mrope_section")
    if sections:
        check_settings(values, "", {"freq_allocation": sections[-1]})
    return {
        "model_type": "ernie4_5_vl_moe",
        "text_config": text,
        "vision_config": images,
        "tie_word_embeddings": values["tie_word_embeddings"],
    }


def _pool_size(values: Config) -> int:
    numbers = values.get("moe_num_experts", [])
    if len(numbers) != 2 or numbers[0] != numbers[1]:
        raise ValueError(
            f"config.json: moe_num_experts must be two equal numbers, of experts for text and for images, got {numbers}"
        )
    return int(numbers[0])


def _layer_types(values: Config) -> list[str]:
    """Which layers are dense. Both pools must be in the same layers, which go up to the last one."""
    layers = values["num_hidden_layers"]
    starts, ends = (
        _pair(values, f"moe_layer_{end}_index", default)
        for end, default in (("start", 0), ("end", -1))
    )
    last = [layers - 1 if end == -1 else end for end in ends]
    if starts[0] != starts[1] or min(last) < layers - 1 or not 0 <= starts[0] <= layers:
        raise ValueError(
            f"config.json: moe_layer_start_index = {starts} and moe_layer_end_index = {ends} must give both pools the same layers, up to "
            f"the last of {layers}"
        )
    return ["dense"] * starts[0] + ["sparse"] * (layers - starts[0])


def _pair(values: Config, key: str, default: int) -> list[int]:
    value = values.get(key, default)
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2 or any(type(number) is not int for number in pair):
        raise ValueError(f"config.json: {key} must be a number or two, got {value!r}")
    return pair


def model_args(config: Config) -> ModelArgs:
    """See ``Architecture``."""
    return ernie4_5_vl_moe.model_args(nested(config))


def config_of(config: Config, args: ModelArgs) -> dict[str, Any]:
    """See ``Architecture``."""
    number = ernie4_5_vl_moe.config_of(nested(config), args)["text_config"]["moe_num_experts"]
    out: dict[str, Any] = copy.deepcopy(dict(config))
    out["moe_num_experts"] = [number, number]
    return out


ERNIE4_5_MOE_VL = Architecture(model_args, ernie4_5_vl_moe.weight_map, config_of)
