"""Qwen3-VL with experts (arXiv 2511.21631): interleaved three-axis rotary, query and key norms before it, no shared expert; an image
encoder with a position table, whose middle layers feed the decoder too (``deepstack``).

The decoder is causal within an image too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
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
    nested,
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

# transformers' defaults for settings that config.json does not have.
DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
VISION_DEFAULTS = {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
_ROTARY_DEFAULTS = {
    "rope_type": "default",
    "rope_theta": 500_000.0,
    "mrope_section": [24, 20, 20],
}
_VISION_ROTARY_DEFAULTS = {"rope_type": "axial", "rope_theta": 10_000.0}
_ROTARY_SUPPORTED = {
    "rope_type": "default",
    "mrope_interleaved": True,
    "partial_rotary_factor": 1.0,
}
_ACTIVATIONS: dict[str, Literal["gelu_tanh", "gelu"]] = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}


@dataclass(frozen=True)
class Tables:
    """The settings of this network in a config.json: each field but ``above`` is an argument of ``settings``.

    above             name of the table that holds ``text_config`` and ``vision_config``; "": the file itself.
    beside            other settings of that table, with their types.
    text, rotary      defaults of ``text_config`` and of its rotary settings.
    text_supported, rotary_supported, text_others, vision_supported, vision_others
                      likewise, for settings that only some releases have.
    """

    above: str
    beside: Config
    text: Config
    rotary: Config
    text_supported: Config
    rotary_supported: Config
    text_others: Config
    vision_supported: Config
    vision_others: Config

    def name(self, table: str) -> str:
        return f"{self.above}.{table}" if self.above else table


TABLES = Tables(
    above="",
    beside={"text_config": Any, "vision_config": Any, "tie_word_embeddings": bool},
    text=DEFAULTS,
    rotary=_ROTARY_DEFAULTS,
    text_supported={"hidden_act": "silu", "attention_dropout": 0.0, "norm_topk_prob": True},
    rotary_supported=_ROTARY_SUPPORTED,
    # Settings whose default depends on others, or that have none. transformers 5 writes num_local_experts where the released files
    # have num_experts.
    text_others={**ROTARY, "head_dim": int, "num_local_experts": int, "tie_word_embeddings": bool},
    vision_supported={},
    vision_others=ROTARY,
)


def _text_settings(config: Config, tables: Tables) -> dict[str, Any]:
    table = tables.name("text_config")
    values = settings(config, table, tables.text, tables.text_supported, tables.text_others)
    values["num_experts"] = values.get("num_local_experts", values["num_experts"])
    check_settings(nested(config, table), table, {"num_experts": values["num_experts"]})
    return values


def num_dense_layers(values: Config, table: str) -> int:
    """The number of dense layers before the first MoE layer, by the settings of ``table``.

    Raises:
        ValueError: a later layer is dense.
    """
    step, named = values["decoder_sparse_step"], values["mlp_only_layers"]
    layers = range(values["num_hidden_layers"])
    dense = [i for i in layers if i in named or (i + 1) % step != 0]
    if dense != list(range(len(dense))):
        raise ValueError(
            f"config.json: {table}.decoder_sparse_step = {step} and {table}.mlp_only_layers = {named} leave the layers {dense} "
            "without experts; this network supports that for leading layers only"
        )
    return len(dense)


def vit_args(config: Config, width: int, tables: Tables) -> VitArgs:
    """The image encoder of ``vision_config`` for a decoder of this ``width``."""
    table = tables.name("vision_config")
    values = settings(config, table, VISION_DEFAULTS, tables.vision_supported, tables.vision_others)
    check_settings(values, table, {"out_hidden_size": width})
    axial = {"rope_type": "axial"}
    rotary = rotary_settings(values, table, _VISION_ROTARY_DEFAULTS, axial)
    activation, positions = values["hidden_act"], values["num_position_embeddings"]
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"config.json: {table}.hidden_act = {activation!r} is not supported by this network, only "
            f"{' and '.join(map(repr, _ACTIVATIONS))} are"
        )
    if isqrt(positions) ** 2 != positions:
        raise ValueError(
            f"config.json: {table}.num_position_embeddings = {positions} is no square; the position table has as many "
            "rows as columns"
        )
    with described_by(table):
        return VitArgs(
            dim=values["hidden_size"],
            num_layers=values["depth"],
            num_heads=values["num_heads"],
            hidden_dim=values["intermediate_size"],
            patch=values["patch_size"],
            merge=values["spatial_merge_size"],
            channels=values["in_channels"],
            rope_theta=float(rotary["rope_theta"]),
            activation=_ACTIVATIONS[activation],
            temporal_patch=values["temporal_patch_size"],
            position_grid=isqrt(positions),
            deepstack=tuple(values["deepstack_visual_indexes"]),
            image_resize="qwen",
        )


def network(config: Config, tables: Tables) -> ModelArgs:
    """``Architecture.model_args`` of a config.json with these ``tables``."""
    beside = settings(config, tables.above, {}, others=tables.beside)
    values, table = _text_settings(config, tables), tables.name("text_config")
    rotary = rotary_settings(values, table, tables.rotary, tables.rotary_supported)
    width, heads = values["hidden_size"], values["num_attention_heads"]
    vit, num_dense = vit_args(config, width, tables), num_dense_layers(values, table)
    with described_by(table):
        return ModelArgs(
            vocab_size=values["vocab_size"],
            dim=width,
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values["num_key_value_heads"],
            head_dim=values.get("head_dim", width // heads),
            num_dense_layers=num_dense,
            dense_hidden_dim=values["intermediate_size"],
            num_experts=values["num_experts"],
            top_k=values["num_experts_per_tok"],
            expert_hidden_dim=values["moe_intermediate_size"],
            shared_hidden_dim=0,
            normalize_weights=values.get("norm_topk_prob", True),
            qkv_bias=values["attention_bias"],
            o_bias=values["attention_bias"],
            qk_norm="before",
            norm_eps=values["rms_norm_eps"],
            vit_attention="causal",
            rope_theta=float(rotary["rope_theta"]),
            mrope="interleaved",
            mrope_sections=tuple(rotary["mrope_section"]),
            tie_embeddings=beside.get("tie_word_embeddings", False),
            vit=vit,
            **LATENTS,
        )


def _experts(
    theirs: str, ours: str, args: ModelArgs, shapes: Mapping[str, Shape]
) -> list[WeightMapping]:
    """Released files have (E, D, 2F) and (E, F, D), which is assumed where ``shapes`` lack the tensors; transformers 5 saves
    (E, 2F, D) and (E, D, F). Together the two shapes are unambiguous: 2F and F cannot both equal D. FP8 releases and trainers
    have a tensor per expert and projection.

    Raises:
        ValueError: the tensors have neither layout.
    """
    if has_single_experts(theirs, shapes):
        return single_experts(theirs, ours, args.num_experts)
    gate_up, down = f"{theirs}.gate_up_proj", f"{theirs}.down_proj"
    d, f = args.dim, args.expert_hidden_dim
    released = ((d, 2 * f), (f, d))
    found = tuple(
        shapes.get(name, (0, *shape))[1:]
        for name, shape in zip((gate_up, down), released, strict=True)
    )
    if found == released:
        return [
            WeightMapping(
                (gate_up,),
                (f"{ours}.w1", f"{ours}.w3"),
                load=chain(transpose, split(1)),
                save=chain(join(1), transpose),
            ),
            WeightMapping((down,), (f"{ours}.w2",), transpose, transpose),
        ]
    if found != ((2 * f, d), (d, f)):
        raise ValueError(
            f"{gate_up} and down_proj have the shapes {found[0]} and {found[1]} per expert; the config says {released[0]} and "
            f"{released[1]}, or both transposed"
        )
    return [
        WeightMapping((gate_up,), (f"{ours}.w1", f"{ours}.w3"), split(1), join(1)),
        WeightMapping((down,), (f"{ours}.w2",)),
    ]


def vision(
    theirs: str,
    vit: VitArgs,
    merger: tuple[str, str, str] = ("norm", "linear_fc1", "linear_fc2"),
    deepstack: str = "deepstack_merger_list",
) -> list[WeightMapping]:
    """All mappings of the image encoder, whose released names begin with ``theirs``. ``merger``: names of norm and linear layers in a
    projector; ``deepstack``: name of the list of those that feed the decoder's layers."""
    ours = "vit."
    out = patch_embedding(f"{theirs}patch_embed.proj", f"{ours}patch_embedding", vit, frames=True)
    out += same(theirs, ours, ("pos_embed.weight", "position_embedding.weight"))
    for layer in range(vit.num_layers):
        out += with_biases(
            f"{theirs}blocks.{layer}.",
            f"{ours}layers.{layer}.",
            ("norm1", "attention_norm"),
            ("attn.qkv", "wqkv"),
            ("attn.proj", "wo"),
            ("norm2", "ffn_norm"),
            ("mlp.linear_fc1", "w1"),
            ("mlp.linear_fc2", "w2"),
        )
    mergers = {"merger.": "merger."}
    for i, layer in enumerate(vit.deepstack):
        mergers[f"{deepstack}.{i}."] = f"deepstack_mergers.{layer}."
    names = tuple(zip(merger, ("norm", "w1", "w2"), strict=True))
    for their, our in mergers.items():
        out += with_biases(theirs + their, ours + our, *names)
    return out


def decoder_layer(theirs: str, ours: str, args: ModelArgs, number: int) -> list[WeightMapping]:
    """The mappings of one layer, but for the experts themselves."""
    out = attention_half(
        theirs,
        ours,
        args,
        ("self_attn.q_norm.weight", "attention.q_norm.weight"),
        ("self_attn.k_norm.weight", "attention.k_norm.weight"),
    )
    if number < args.num_dense_layers:
        return out + swiglu(f"{theirs}mlp", f"{ours}feed_forward")
    return out + same(theirs, ours, ("mlp.gate.weight", "moe.router.all.weight"))


def model_args(config: Config) -> ModelArgs:
    """See ``Architecture``."""
    return network(config, TABLES)


def weight_map(args: ModelArgs, shapes: Mapping[str, Shape]) -> list[WeightMapping]:
    """See ``Architecture``."""

    def layer(number: int, theirs: str, ours: str) -> list[WeightMapping]:
        out = decoder_layer(theirs, ours, args, number)
        if number < args.num_dense_layers:
            return out
        return out + _experts(f"{theirs}mlp.experts", f"{ours}moe.experts.all", args, shapes)

    return decoder("model.language_model.", args, layer) + vision("model.visual.", args.vit)


def config_of(config: Config, args: ModelArgs) -> dict[str, Any]:
    """See ``Architecture``."""
    names = ("num_experts", "num_local_experts")
    width, top_k = ("moe_intermediate_size",), ("num_experts_per_tok",)
    expected = model_args(config)
    return with_experts(config, expected, args, "text_config", *names, width=width, top_k=top_k)


QWEN3_VL_MOE = Architecture(model_args, weight_map, config_of, export_layout=without_single_experts)
