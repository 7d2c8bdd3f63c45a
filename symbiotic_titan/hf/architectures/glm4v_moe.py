"""GLM-4.5V (arXiv 2507.01006): three-axis rotary in chunks on half of each head, biases on queries, keys and values, a sigmoid router
with a selection bias, a shared expert, dense leading layers; an image encoder with RMSNorm, gated feed-forwards and a position
table.

The decoder is causal within an image too.
"""

import re
from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor

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
    rotary_settings,
    settings,
    with_experts,
)
from symbiotic_titan.hf.architectures.weight_map import (
    attention_half,
    decoder,
    experts,
    patch_embedding,
    same,
    swiglu,
)
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.vit_args import VitArgs

DEFAULTS = {
    "vocab_size": 151424,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
}
VISION_DEFAULTS = {
    "depth": 24,
    "hidden_size": 1536,
    "num_heads": 12,
    "in_channels": 3,
    "image_size": 336,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 4096,
    "intermediate_size": 13696,
}
_SUPPORTED = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "use_qk_norm": False,
}
# transformers uses this epsilon for the projector's LayerNorm regardless of the file.
_VISION_SUPPORTED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "rms_norm_eps": 1e-5,
}
_OTHERS = {
    **ROTARY,
    "partial_rotary_factor": float,
    "head_dim": int,
    "num_local_experts": int,
    "tie_word_embeddings": bool,
    "num_nextn_predict_layers": int,
}
_BESIDE = {
    "text_config": Any,
    "vision_config": Any,
    "tie_word_embeddings": bool,
    "image_start_token_id": Any,
    "image_end_token_id": Any,
    "video_start_token_id": Any,
    "video_end_token_id": Any,
}
ROTARY_DEFAULTS = {
    "rope_type": "default",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [8, 12, 12],
}
_ROTARY_SUPPORTED = {"rope_type": "default", "mrope_interleaved": False}
VISION_ROTARY_DEFAULTS = {"rope_type": "axial", "rope_theta": 10_000.0}
# Pixel normalisation of its image processor, which is not in config.json.
_IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
_IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def vit_args(config: Config, width: int) -> VitArgs:
    """The image encoder of ``vision_config`` for a decoder of this ``width``."""
    values = settings(config, "vision_config", VISION_DEFAULTS, _VISION_SUPPORTED, ROTARY)
    check_settings(values, "vision_config", {"out_hidden_size": width})
    axial = {"rope_type": "axial"}
    rotary = rotary_settings(values, "vision_config", VISION_ROTARY_DEFAULTS, axial)
    with described_by("vision_config"):
        return VitArgs(
            dim=values["hidden_size"],
            num_layers=values["depth"],
            num_heads=values["num_heads"],
            hidden_dim=width,
            patch=values["patch_size"],
            merge=values["spatial_merge_size"],
            channels=values["in_channels"],
            norm="rms",
            outer_norms=True,
            norm_eps=_VISION_SUPPORTED["rms_norm_eps"],
            bias=False,
            activation="swiglu",
            rope_theta=float(rotary["rope_theta"]),
            temporal_patch=values["temporal_patch_size"],
            position_grid=values["image_size"] // values["patch_size"],
            position_reading="bicubic",
            projector_hidden_dim=values["intermediate_size"],
            image_mean=_IMAGE_MEAN,
            image_std=_IMAGE_STD,
            image_resize="glm",
        )


def model_args(config: Config) -> ModelArgs:
    """See ``Architecture``."""
    beside = settings(config, "", {}, others=_BESIDE)
    values = settings(config, "text_config", DEFAULTS, _SUPPORTED, _OTHERS)
    # Some files have the number of experts under both names.
    check_settings(values, "text_config", {"num_local_experts": values["n_routed_experts"]})
    rotary = rotary_settings(values, "text_config", ROTARY_DEFAULTS, _ROTARY_SUPPORTED)
    width, heads = values["hidden_size"], values["num_attention_heads"]
    expert_width = values["moe_intermediate_size"]
    vit = vit_args(config, width)
    with described_by("text_config"):
        return ModelArgs(
            vocab_size=values["vocab_size"],
            dim=width,
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values["num_key_value_heads"],
            head_dim=values.get("head_dim", width // heads),
            num_dense_layers=values["first_k_dense_replace"],
            dense_hidden_dim=values["intermediate_size"],
            num_experts=values["n_routed_experts"],
            top_k=values["num_experts_per_tok"],
            expert_hidden_dim=expert_width,
            shared_hidden_dim=expert_width * values["n_shared_experts"],
            score_function="sigmoid",
            selection_bias=True,
            route_scale=float(values["routed_scaling_factor"]),
            qkv_bias=values["attention_bias"],
            qk_norm="none",
            norm_eps=values["rms_norm_eps"],
            vit_attention="causal",
            rope_theta=float(rotary["rope_theta"]),
            rotary_fraction=float(rotary["partial_rotary_factor"]),
            mrope="chunked",
            mrope_sections=tuple(rotary["mrope_section"]),
            tie_embeddings=bool(
                beside.get("tie_word_embeddings") or values.get("tie_word_embeddings")
            ),
            vit=vit,
            **LATENTS,
        )


def _vision(vit: VitArgs) -> list[WeightMapping]:
    theirs, ours = "model.visual.", "vit."

    # The convolution that merges patches has stride = kernel, so it is a linear layer over the patches of a token. Theirs:
    # (decoder width, encoder width, merge, merge); ours: (decoder width, merge * merge * encoder width).
    def as_linear(tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0].permute(0, 2, 3, 1).flatten(1)]

    def as_convolution(tensors: list[Tensor]) -> list[Tensor]:
        squares = tensors[0].unflatten(1, (vit.merge, vit.merge, vit.dim))
        return [squares.permute(0, 3, 1, 2).contiguous()]

    out = patch_embedding(f"{theirs}patch_embed.proj", f"{ours}patch_embedding", vit, frames=True)
    out.append(
        WeightMapping(
            (f"{theirs}downsample.weight",),
            (f"{ours}merger.join.weight",),
            as_linear,
            as_convolution,
        )
    )
    out += same(
        theirs,
        ours,
        ("post_conv_layernorm.weight", "patch_norm.weight"),
        ("embeddings.position_embedding.weight", "position_embedding.weight"),
        ("post_layernorm.weight", "last_norm.weight"),
        ("downsample.bias", "merger.join.bias"),
        ("merger.proj.weight", "merger.project.weight"),
        ("merger.post_projection_norm.weight", "merger.norm.weight"),
        ("merger.post_projection_norm.bias", "merger.norm.bias"),
    )
    out += swiglu(f"{theirs}merger", f"{ours}merger.feed_forward")
    for layer in range(vit.num_layers):
        block, our_block = f"{theirs}blocks.{layer}.", f"{ours}layers.{layer}."
        out += same(
            block,
            our_block,
            ("norm1.weight", "attention_norm.weight"),
            ("attn.qkv.weight", "wqkv.weight"),
            ("attn.proj.weight", "wo.weight"),
            ("norm2.weight", "ffn_norm.weight"),
        )
        out += swiglu(f"{block}mlp", our_block.removesuffix("."))
    return out


def weight_map(args: ModelArgs, shapes: Mapping[str, Shape]) -> list[WeightMapping]:
    """See ``Architecture``."""

    def layer(number: int, theirs: str, ours: str) -> list[WeightMapping]:
        out = attention_half(theirs, ours, args)
        if number < args.num_dense_layers:
            return out + swiglu(f"{theirs}mlp", f"{ours}feed_forward")
        out += same(
            theirs,
            ours,
            ("mlp.gate.weight", "moe.router.all.weight"),
            ("mlp.gate.e_score_correction_bias", "moe.router.all.bias"),
        )
        out += experts(f"{theirs}mlp.experts", f"{ours}moe.experts.all", args.num_experts, shapes)
        return out + swiglu(f"{theirs}mlp.shared_experts", f"{ours}moe.shared_experts")

    return decoder("model.language_model.", args, layer) + _vision(args.vit)


def config_of(config: Config, args: ModelArgs) -> dict[str, Any]:
    """See ``Architecture``."""
    names = ("n_routed_experts", "num_local_experts")
    top_k = ("num_experts_per_tok",)
    return with_experts(config, model_args(config), args, "text_config", *names, top_k=top_k)


def unmapped(args: ModelArgs, names: Container[str]) -> tuple[str, ...]:
    """See ``Architecture``. The multi-token-prediction layer after the last decoder layer, which neither transformers nor this
    network runs. Its ``eh_proj`` distinguishes it from a decoder layer that config.json failed to count."""
    prediction_layer = f"model.language_model.layers.{args.num_layers}."
    return (re.escape(prediction_layer),) if f"{prediction_layer}eh_proj.weight" in names else ()


GLM4V_MOE = Architecture(model_args, weight_map, config_of, unmapped)
