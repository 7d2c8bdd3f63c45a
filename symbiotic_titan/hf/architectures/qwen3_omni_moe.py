"""Qwen3-Omni with experts (arXiv 2509.17765): its thinker, for text and images. The network is Qwen3-VL's, with weights of the selected
experts that need not sum to 1.

A release is the whole model, with the names of the thinker's tensors and settings below ``thinker``; or the thinker alone, as
transformers' class for it saves. The audio encoder, the talker and its vocoder have no counterpart in our network.
"""

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

from symbiotic_titan.hf.architectures.base import (
    Architecture,
    Config,
    Shape,
    WeightMapping,
)
from symbiotic_titan.hf.architectures.qwen3_vl_moe import (
    TABLES,
    Tables,
    decoder_layer,
    network,
    vision,
)
from symbiotic_titan.hf.architectures.settings import ROTARY, settings, with_experts
from symbiotic_titan.hf.architectures.weight_map import decoder, experts
from symbiotic_titan.model.args import ModelArgs

# transformers' defaults for settings that config.json does not have.
DEFAULTS = {
    "vocab_size": 3584,
    "hidden_size": 2048,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_THINKER = "thinker_config"
# Ids of tokens, and how time becomes positions, which images do not have.
_NOTES = (
    *("audio_token_id", "audio_start_token_id", "audio_end_token_id", "user_token_id"),
    *("position_id_per_seconds", "seconds_per_chunk"),
)
# Settings of the whole model beside the thinker's.
_WHOLE: dict[str, Any] = dict.fromkeys(
    (
        *(_THINKER, "talker_config", "code2wav_config", "enable_audio_output"),
        *("im_start_token_id", "im_end_token_id", "user_token_id", "assistant_token_id"),
        *("system_token_id", "tts_bos_token_id", "tts_eos_token_id", "tts_pad_token_id"),
        "tie_word_embeddings",
    ),
    Any,
)
_ALONE = replace(
    TABLES,
    beside={**TABLES.beside, "audio_config": Any, **dict.fromkeys(_NOTES, Any)},
    text=DEFAULTS,
    rotary={**TABLES.rotary, "rope_theta": 1_000_000.0},
    text_supported={"hidden_act": "silu", "attention_dropout": 0.0, "use_qk_norm": True},
    rotary_supported={**TABLES.rotary_supported, "interleaved": True},
    text_others={**ROTARY, "head_dim": int, "tie_word_embeddings": Any},
    vision_supported={"apply_vit_abs_pos_embed": True},
    # The table of positions has num_position_embeddings entries whatever image_size is.
    vision_others={
        **ROTARY,
        **dict.fromkeys(("image_size", "in_chans", "spatial_patch_size", "tokens_per_second"), Any),
        "tie_word_embeddings": Any,
    },
)
_INSIDE = replace(_ALONE, above=_THINKER)


def tables_of(config: Config) -> Tables:
    """Of a whole model, or of a thinker alone."""
    return _INSIDE if config.get("model_type") == "qwen3_omni_moe" else _ALONE


def model_args(config: Config) -> ModelArgs:
    """See ``Architecture``."""
    tables = tables_of(config)
    if tables.above:
        settings(config, "", {}, others=_WHOLE)
    return network(config, tables)


def weight_map(args: ModelArgs, shapes: Mapping[str, Shape]) -> list[WeightMapping]:
    """See ``Architecture``. Files have ``model`` and ``visual`` where transformers 5's memory (and what it saves on request) has
    ``model.language_model`` and ``model.visual``."""
    above = "thinker." if any(name.startswith("thinker.") for name in shapes) else ""
    in_memory = f"{above}model.language_model.norm.weight" in shapes
    prefix = f"{above}model.language_model." if in_memory else f"{above}model."
    encoder = f"{above}model.visual." if in_memory else f"{above}visual."

    def layer(number: int, theirs: str, ours: str) -> list[WeightMapping]:
        out = decoder_layer(theirs, ours, args, number)
        if number < args.num_dense_layers:
            return out
        theirs, ours = f"{theirs}mlp.experts", f"{ours}moe.experts.all"
        return out + experts(theirs, ours, args.num_experts, shapes)

    merger = ("ln_q", "mlp.0", "mlp.2")
    out = decoder(prefix, args, layer, f"{above}lm_head.weight")
    return out + vision(encoder, args.vit, merger, deepstack="merger_list")


def config_of(config: Config, args: ModelArgs) -> dict[str, Any]:
    """See ``Architecture``."""
    table = tables_of(config).name("text_config")
    width, top_k = ("moe_intermediate_size",), ("num_experts_per_tok",)
    expected = model_args(config)
    return with_experts(config, expected, args, table, "num_experts", width=width, top_k=top_k)


def unmapped(args: ModelArgs, names: Container[str]) -> tuple[str, ...]:
    """See ``Architecture``."""
    return (r"(thinker\.)?(model\.)?audio_tower\.", r"talker\.", r"code2wav\.")


QWEN3_OMNI_MOE = Architecture(model_args, weight_map, config_of, unmapped)
