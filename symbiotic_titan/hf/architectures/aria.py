"""Aria (arXiv 2410.05993): 1-D rotary, a softmax over the chosen logits, shared experts as wide as two; a SigLIP image encoder with a
table of positions and without rotary, whose patches a fixed number of learned queries read.

Its decoder is causal over the tokens of an image as well. The released files hold a last norm of the image encoder that the model
does not compute with: it stays behind.

Letters: W width of the encoder.
"""

from collections.abc import Container, Mapping
from math import isqrt
from typing import Any

from symbiotic_titan.config.rows import check_value
from symbiotic_titan.hf.architectures.base import (
    Backbone,
    Config,
    Link,
    Shape,
)
from symbiotic_titan.hf.architectures.weight_map import (
    LATENTS,
    ROTARY,
    attention,
    chain,
    check_settings,
    decoder,
    described_by,
    join,
    patch_embedding,
    rotary_settings,
    same,
    settings,
    split,
    swiglu,
    transpose,
    with_biases,
    with_experts,
)
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.vit_args import VitArgs

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
VISION_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-6,
}
# Patches of the square that an image is laid in -> queries that read it.
QUERIES = {"1225": 128, "4900": 256}
_EXPRESSED = {"hidden_act": "silu", "attention_dropout": 0.0, "mlp_bias": False}
_OTHERS = {
    **ROTARY,
    "num_key_value_heads": int,
    "head_dim": int,
    "moe_intermediate_size": int,
    "num_experts_per_tok": int,
    "moe_z_loss_coeff": Any,
    "moe_aux_loss_coeff": Any,
    "pretraining_tp": Any,
}
ROTARY_DEFAULTS = {"rope_type": "default", "rope_theta": 10_000.0}
_ROTARY_EXPRESSED = {"rope_type": "default", "partial_rotary_factor": 1.0}
_VISION_EXPRESSED = {"hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.0}
_BESIDE = {
    "text_config": Any,
    "vision_config": Any,
    "projector_patch_to_query_dict": Any,
    "max_value_projector_patch_to_query_dict": Any,
    "image_token_index": Any,
    "tie_word_embeddings": bool,
    "ignore_index": Any,
}


def queries(config: Config) -> dict[int, int]:
    """Patches along a side of the square that an image is laid in -> queries that read it, both rising.

    Raises:
        ValueError: something else stands there, a number of patches is no square, or more patches have not more queries.
    """
    key = "projector_patch_to_query_dict"
    stated = QUERIES if config.get(key) is None else config[key]
    check_value(f"config.json: {key}", stated, dict[str, int])
    if not stated or not all(map(_is_square, stated)):
        raise ValueError(
            f"config.json: {key} = {stated} must name numbers of patches that are squares, since images are laid in squares, e.g. "
            f"{QUERIES}"
        )
    by_patches = {int(patches): number for patches, number in stated.items()}
    by_side = {isqrt(patches): by_patches[patches] for patches in sorted(by_patches)}
    numbers = list(by_side.values())
    if numbers != sorted({number for number in numbers if number > 0}):
        raise ValueError(
            f"config.json: {key} = {stated} must give more queries, and at least one, to more patches, e.g. {QUERIES}"
        )
    check_settings(config, "", {"max_value_projector_patch_to_query_dict": numbers[-1]})
    return by_side


def _is_square(patches: str) -> bool:
    number = int(patches) if patches.isdecimal() else 0
    return number > 0 and isqrt(number) ** 2 == number


def vit_args(config: Config) -> VitArgs:
    """The image encoder of ``vision_config`` and its projector."""
    # The released file states the heads under a name that transformers does not read.
    others = {"attention_heads": int}
    values = settings(config, "vision_config", VISION_DEFAULTS, _VISION_EXPRESSED, others)
    check_settings(values, "vision_config", {"attention_heads": values["num_attention_heads"]})
    by_side = queries(config)
    with described_by("vision_config"):
        return VitArgs(
            dim=values["hidden_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            hidden_dim=values["intermediate_size"],
            patch=values["patch_size"],
            merge=1,
            queries=tuple(by_side.values()),
            query_sides=tuple(by_side),
            channels=values["num_channels"],
            norm_eps=values["layer_norm_eps"],
            rope_theta=0.0,
            position_grid=values["image_size"] // values["patch_size"],
            position_reading="floor",
            image_resize="aria",
        )


def model_args(config: Config) -> ModelArgs:
    """See ``Backbone``."""
    beside = settings(config, "", {}, {"vision_feature_layer": -1}, _BESIDE)
    values = settings(config, "text_config", DEFAULTS, _EXPRESSED, _OTHERS)
    heads, width = values["num_attention_heads"], values["intermediate_size"]
    # The released file says two things twice.
    twice = {"moe_intermediate_size": width, "num_experts_per_tok": values["moe_topk"]}
    check_settings(values, "text_config", twice)
    rotary = rotary_settings(values, "text_config", ROTARY_DEFAULTS, _ROTARY_EXPRESSED)
    vit = vit_args(config)
    with described_by("text_config"):
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
            vit_attention="causal",
            rope_theta=float(rotary["rope_theta"]),
            rotary_layout="sequence",
            mrope="none",
            mrope_sections=(),
            tie_embeddings=bool(values["tie_word_embeddings"] or beside.get("tie_word_embeddings")),
            vit=vit,
            **LATENTS,
        )


def _experts(theirs: str, ours: str, shapes: Mapping[str, Shape]) -> list[Link]:
    """(E, D, 2F) and (E, F, D): transposed, in files and in transformers' memory."""
    fused = f"{theirs}.gate_up_proj" in shapes
    gate_up, down = (".gate_up_proj", ".down_proj") if fused else (".fc1.weight", ".fc2.weight")
    return [
        Link(
            (theirs + gate_up,),
            (f"{ours}.w1", f"{ours}.w3"),
            load=chain(transpose, split(1)),
            save=chain(join(1), transpose),
        ),
        Link((theirs + down,), (f"{ours}.w2",), transpose, transpose),
    ]


def _joined(theirs: str, ours: str, *names: str) -> list[Link]:
    """Three linear layers side by side as one."""
    return [
        Link(
            tuple(f"{theirs}{name}.{kind}" for name in names),
            (f"{ours}.{kind}",),
            join(0),
            split(0, 3),
        )
        for kind in ("weight", "bias")
    ]


def _vision(theirs: str, vit: VitArgs) -> list[Link]:
    ours = "vit."
    out = patch_embedding(
        f"{theirs}embeddings.patch_embedding", f"{ours}patch_embedding", vit, frames=False
    )
    table = "position_embedding.weight"
    out += same(theirs, ours, (f"embeddings.{table}", table))
    for layer in range(vit.num_layers):
        block, our_block = f"{theirs}encoder.layers.{layer}.", f"{ours}layers.{layer}."
        out += _joined(f"{block}self_attn.", f"{our_block}wqkv", "q_proj", "k_proj", "v_proj")
        out += with_biases(
            block,
            our_block,
            ("self_attn.out_proj", "wo"),
            ("layer_norm1", "attention_norm"),
            ("layer_norm2", "ffn_norm"),
            ("mlp.fc1", "w1"),
            ("mlp.fc2", "w2"),
        )
    return out


def _projector(theirs: str) -> list[Link]:
    """Its queries, keys and values are projected twice, the second time by the three parts of one tensor."""
    ours, inner = "vit.merger.", "cross_attn.multihead_attn."
    out = same(
        theirs,
        ours,
        ("query", "queries.weight"),
        ("cross_attn.q_proj.weight", "wq.0.weight"),
        ("cross_attn.k_proj.weight", "wk.0.weight"),
        ("cross_attn.v_proj.weight", "wv.0.weight"),
        ("feed_forward.linear_in.weight", "w1.weight"),
        ("feed_forward.linear_out.weight", "w2.weight"),
    )
    out += with_biases(
        theirs,
        ours,
        ("cross_attn.layer_norm", "query_norm"),
        ("cross_attn.layer_norm_kv", "patch_norm"),
        (f"{inner}out_proj", "wo.0"),
        ("cross_attn.linear", "wo.1"),
        ("layer_norm", "last_norm"),
    )
    for kind in ("weight", "bias"):
        parts = tuple(f"{ours}{part}.1.{kind}" for part in ("wq", "wk", "wv"))
        out.append(Link((f"{theirs}{inner}in_proj_{kind}",), parts, split(0, 3), join(0)))
    return out


def links(args: ModelArgs, shapes: Mapping[str, Shape]) -> list[Link]:
    """See ``Backbone``. Files name the decoder ``language_model.model``, transformers 5 in memory ``model.language_model``."""
    in_memory = "model.language_model.norm.weight" in shapes
    prefix = "model.language_model." if in_memory else "language_model.model."
    encoder = "model." if in_memory else ""
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

    out = decoder(prefix, args, layer, output)
    out += _vision(f"{encoder}vision_tower.", args.vit)
    return out + _projector(f"{encoder}multi_modal_projector.")


def config_of(config: Config, args: ModelArgs) -> dict[str, Any]:
    """See ``Backbone.config``."""
    return with_experts(config, model_args(config), args, "text_config", "moe_num_experts")


def unused(args: ModelArgs, names: Container[str]) -> tuple[str, ...]:
    """See ``Backbone``."""
    return (r"(model\.)?vision_tower\.post_layernorm\.",)


ARIA = Backbone("aria", model_args, links, config_of, unused)
