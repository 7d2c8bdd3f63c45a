"""Aria (arXiv 2410.05993): 1-D rotary, softmax over the selected logits, a shared expert twice as wide as a routed one; a SigLIP
image encoder with a position table instead of rotary, whose patches are read by a fixed number of learned queries.

The decoder is causal within an image too. The released files contain a final norm of the image encoder that the model never
uses: it is unmapped.
"""

from collections.abc import Container, Mapping
from math import isqrt
from typing import Any

from symbiotic_titan.config.rows import check_value
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
    chain,
    decoder,
    has_single_experts,
    join,
    patch_embedding,
    same,
    single_experts,
    split,
    swiglu,
    transpose,
    with_biases,
    without_single_experts,
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
# Number of patches of the square that an image is placed on -> number of queries that read it.
QUERIES = {"1225": 128, "4900": 256}
_SUPPORTED = {"hidden_act": "silu", "attention_dropout": 0.0, "mlp_bias": False}
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
_ROTARY_SUPPORTED = {"rope_type": "default", "partial_rotary_factor": 1.0}
_VISION_SUPPORTED = {"hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.0}
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
    """Patches per side of the square that an image is placed on -> number of queries that read it, both ascending.

    Raises:
        ValueError: the setting has another type, a number of patches is no square, or queries do not increase with patches.
    """
    key = "projector_patch_to_query_dict"
    stated = QUERIES if config.get(key) is None else config[key]
    check_value(f"config.json: {key}", stated, dict[str, int])
    if not stated or not all(map(_is_square, stated)):
        raise ValueError(
            f"config.json: {key} = {stated} must have square numbers of patches as keys, since images are placed on squares, e.g. "
            f"{QUERIES}"
        )
    by_patches = {int(patches): number for patches, number in stated.items()}
    by_side = {isqrt(patches): by_patches[patches] for patches in sorted(by_patches)}
    numbers = list(by_side.values())
    if numbers != sorted({number for number in numbers if number > 0}):
        raise ValueError(
            f"config.json: {key} = {stated} must give larger images more queries, and every image at least one, e.g. {QUERIES}"
        )
    check_settings(config, "", {"max_value_projector_patch_to_query_dict": numbers[-1]})
    return by_side


def _is_square(patches: str) -> bool:
    number = int(patches) if patches.isdecimal() else 0
    return number > 0 and isqrt(number) ** 2 == number


def vit_args(config: Config) -> VitArgs:
    """The image encoder of ``vision_config``, with its projector."""
    # The released file has the number of heads under a name that transformers does not read.
    others = {"attention_heads": int}
    values = settings(config, "vision_config", VISION_DEFAULTS, _VISION_SUPPORTED, others)
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
    """See ``Architecture``."""
    beside = settings(config, "", {}, {"vision_feature_layer": -1}, _BESIDE)
    values = settings(config, "text_config", DEFAULTS, _SUPPORTED, _OTHERS)
    heads, width = values["num_attention_heads"], values["intermediate_size"]
    # The released file states two values twice.
    twice = {"moe_intermediate_size": width, "num_experts_per_tok": values["moe_topk"]}
    check_settings(values, "text_config", twice)
    rotary = rotary_settings(values, "text_config", ROTARY_DEFAULTS, _ROTARY_SUPPORTED)
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
            # transformers reads the setting beside the table, whatever the table says.
            tie_embeddings=beside.get("tie_word_embeddings", False),
            vit=vit,
            **LATENTS,
        )


def _experts(
    theirs: str, ours: str, num_experts: int, shapes: Mapping[str, Shape]
) -> list[WeightMapping]:
    """(E, D, 2F) and (E, F, D), in released files and in transformers' memory: the transpose of ours. Or a tensor per expert and
    projection."""
    if has_single_experts(theirs, shapes):
        return single_experts(theirs, ours, num_experts)
    fused = f"{theirs}.gate_up_proj" in shapes
    gate_up, down = (".gate_up_proj", ".down_proj") if fused else (".fc1.weight", ".fc2.weight")
    return [
        WeightMapping(
            (theirs + gate_up,),
            (f"{ours}.w1", f"{ours}.w3"),
            load=chain(transpose, split(1)),
            save=chain(join(1), transpose),
        ),
        WeightMapping((theirs + down,), (f"{ours}.w2",), transpose, transpose),
    ]


def _joined(theirs: str, ours: str, *names: str) -> list[WeightMapping]:
    """Three linear layers of theirs as one of ours, concatenated along the outputs."""
    return [
        WeightMapping(
            tuple(f"{theirs}{name}.{kind}" for name in names),
            (f"{ours}.{kind}",),
            join(0),
            split(0, 3),
        )
        for kind in ("weight", "bias")
    ]


def _vision(theirs: str, vit: VitArgs) -> list[WeightMapping]:
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


def _projector(theirs: str) -> list[WeightMapping]:
    """Cross-attention from learned queries to patches. Queries, keys and values are projected twice; torch's MultiheadAttention
    holds the second three projections in one tensor."""
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
        out.append(WeightMapping((f"{theirs}{inner}in_proj_{kind}",), parts, split(0, 3), join(0)))
    return out


def weight_map(args: ModelArgs, shapes: Mapping[str, Shape]) -> list[WeightMapping]:
    """See ``Architecture``. The decoder is ``language_model.model`` in released files and ``model.language_model`` in transformers
    5's memory (and in what it saves)."""
    in_memory = "model.language_model.norm.weight" in shapes
    prefix = "model.language_model." if in_memory else "language_model.model."
    encoder = "model." if in_memory else ""
    output = "lm_head.weight" if in_memory else "language_model.lm_head.weight"

    def layer(number: int, theirs: str, ours: str) -> list[WeightMapping]:
        out = attention_half(theirs, ours, args)
        out += same(theirs, ours, ("mlp.router.weight", "moe.router.all.weight"))
        out += _experts(f"{theirs}mlp.experts", f"{ours}moe.experts.all", args.num_experts, shapes)
        out += swiglu(f"{theirs}mlp.shared_experts", f"{ours}moe.shared_experts")
        return out

    out = decoder(prefix, args, layer, output)
    out += _vision(f"{encoder}vision_tower.", args.vit)
    return out + _projector(f"{encoder}multi_modal_projector.")


def config_of(config: Config, args: ModelArgs) -> dict[str, Any]:
    """See ``Architecture``."""
    names, top_k = ("moe_num_experts",), ("moe_topk", "num_experts_per_tok")
    return with_experts(config, model_args(config), args, "text_config", *names, top_k=top_k)


def unmapped(args: ModelArgs, names: Container[str]) -> tuple[str, ...]:
    """See ``Architecture``."""
    return (r"(model\.)?vision_tower\.post_layernorm\.",)


ARIA = Architecture(model_args, weight_map, config_of, unmapped, without_single_experts)
