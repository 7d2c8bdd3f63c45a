"""Random config.json files of every architecture, small enough to run: every setting that transformers' config classes have is drawn.

An even seed draws settings that the decoder supports. An odd one also sets one of ``UNUSUAL``, which it may
refuse.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from tests.helpers.parity_table import CASES as TABLE
from tests.helpers.parity_table import Case
from tests.helpers.released_configs import HUNYUAN_SIZES
from tests.helpers.released_models import THINKER
from tests.helpers.unusual_settings import UNUSUAL

Config = dict[str, Any]
Draw = Callable[[Random], Config]


def shared(rng: Random) -> Config:
    """Settings of any decoder: widths, heads, and those that change nothing."""
    heads = rng.choice([2, 4])
    return {
        "vocab_size": rng.choice([128, 136]),
        "hidden_size": rng.choice([24, 32, 48]),
        "intermediate_size": rng.choice([20, 36]),
        "num_hidden_layers": rng.choice([2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([1, 2, heads]),
        "head_dim": rng.choice([8, 16, 24]),
        "hidden_act": "silu",
        "max_position_embeddings": rng.choice([32, 4096]),
        "initializer_range": rng.choice([0.02, 0.1]),
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-3]),
        "use_cache": rng.choice([True, False]),
        "attention_bias": rng.choice([True, False]),
        "attention_dropout": 0.0,
        "pad_token_id": rng.choice([None, 3]),
        "bos_token_id": rng.choice([None, 1]),
        "eos_token_id": rng.choice([None, 2, [2, 4]]),
    }


def qwen_text(rng: Random) -> Config:
    text = shared(rng)
    layers, half = text["num_hidden_layers"], text["head_dim"] // 2
    each = rng.randint(0, half // 3)
    return text | {
        "moe_intermediate_size": rng.choice([12, 24]),
        "num_experts": rng.choice([4, 6, 9]),
        "num_experts_per_tok": rng.choice([1, 2, 4]),
        "norm_topk_prob": True,
        "output_router_logits": rng.choice([True, False]),
        "router_aux_loss_coef": rng.choice([0.0, 0.001]),
        # Either leaves dense layers only before those with experts.
        **rng.choice(
            [
                {"decoder_sparse_step": 1, "mlp_only_layers": rng.choice([[], [0], None])},
                {"decoder_sparse_step": layers, "mlp_only_layers": []},
            ]
        ),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rng.choice([1e4, 5e6]),
            "mrope_section": [half - 2 * each, each, each],
            "mrope_interleaved": True,
        },
    }


def qwen_vision(rng: Random, width: int, layers: int) -> Config:
    heads, depth = rng.choice([1, 2]), rng.choice([1, 2, 3])
    fed = rng.sample(range(depth), rng.randint(0, min(depth, layers)))
    return {
        "depth": depth,
        "hidden_size": heads * rng.choice([8, 12]),
        "hidden_act": rng.choice(["gelu_pytorch_tanh", "gelu"]),
        "intermediate_size": rng.choice([20, 32]),
        "num_heads": heads,
        "in_channels": 3,
        "patch_size": rng.choice([2, 4]),
        "spatial_merge_size": rng.choice([1, 2, 3]),
        "temporal_patch_size": rng.choice([1, 2]),
        "out_hidden_size": width,
        "num_position_embeddings": rng.choice([9, 25]),
        "deepstack_visual_indexes": sorted(fed),
        "initializer_range": rng.choice([0.02, 0.1]),
        "rope_parameters": {"rope_type": "axial", "rope_theta": rng.choice([1e4, 100.0])},
    }


def qwen3_vl_moe(rng: Random) -> Config:
    text = qwen_text(rng)
    # The class has the setting, and reads the one beside the table.
    text["tie_word_embeddings"] = rng.choice([True, False])
    return {
        "text_config": text,
        "vision_config": qwen_vision(rng, text["hidden_size"], text["num_hidden_layers"]),
        "image_token_id": 120,
        "video_token_id": rng.choice([121, 122]),
        "vision_start_token_id": rng.choice([123, 124]),
        "vision_end_token_id": rng.choice([125, 126]),
        "tie_word_embeddings": rng.choice([True, False]),
    }


def qwen3_omni_moe_thinker(rng: Random) -> Config:
    config = qwen3_vl_moe(rng)
    config["text_config"]["norm_topk_prob"] = rng.choice([True, False])
    del config["vision_end_token_id"], config["text_config"]["tie_word_embeddings"]
    return config | {
        "audio_config": THINKER["audio_config"] | {"n_window": rng.choice([50, 25])},
        "vision_start_token_id": 123,
        "audio_token_id": rng.choice([121, 122]),
        "audio_start_token_id": rng.choice([124, 125]),
        "user_token_id": rng.choice([5, 6]),
        "position_id_per_seconds": rng.choice([13, 25]),
        "initializer_range": rng.choice([0.02, 0.1]),
    }


def image_ids(rng: Random) -> Config:
    names = ("image_start", "image_end", "video_start", "video_end", "video")
    return {f"{name}_token_id": 91 + 2 * i + rng.choice([0, 1]) for i, name in enumerate(names)}


def glm4v_moe(rng: Random) -> Config:
    text = shared(rng) | {"vocab_size": rng.choice([104, 106])}
    fraction = rng.choice([0.5, 1.0])
    half = int(text["head_dim"] * fraction) // 2
    first, second = sorted(rng.choices(range(half + 1), k=2))
    text |= {
        "moe_intermediate_size": rng.choice([12, 24]),
        "n_routed_experts": rng.choice([4, 6, 9]),
        "num_experts_per_tok": rng.choice([1, 2, 4]),
        "n_shared_experts": rng.choice([1, 2]),
        "routed_scaling_factor": rng.choice([1.0, 2.5]),
        "first_k_dense_replace": rng.choice([0, 1]),
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "output_router_logits": rng.choice([True, False]),
        "router_aux_loss_coef": rng.choice([0.0, 0.001]),
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rng.choice([1e4, 5e5]),
            "partial_rotary_factor": fraction,
            "mrope_section": [first, second - first, half - second],
        },
    }
    heads, patch = rng.choice([1, 2]), rng.choice([2, 4])
    vision = {
        "depth": rng.choice([1, 2]),
        "hidden_size": heads * rng.choice([8, 12]),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "num_heads": heads,
        "in_channels": 3,
        "image_size": patch * rng.choice([3, 5]) + rng.choice([0, 1]),
        "patch_size": patch,
        "rms_norm_eps": 1e-5,
        "spatial_merge_size": rng.choice([1, 2, 3]),
        "temporal_patch_size": rng.choice([1, 2]),
        "out_hidden_size": text["hidden_size"],
        "intermediate_size": rng.choice([20, 32]),
        "initializer_range": rng.choice([0.02, 0.1]),
        "rope_parameters": {"rope_type": "axial", "rope_theta": rng.choice([1e4, 100.0])},
    }
    return {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": 90,
        **image_ids(rng),
        "tie_word_embeddings": rng.choice([True, False]),
    }


def ernie4_5_vl_moe(rng: Random) -> Config:
    text = shared(rng) | {"vocab_size": rng.choice([104, 106])}
    del text["attention_bias"], text["attention_dropout"]
    layers, half = text["num_hidden_layers"], text["head_dim"] // 2
    each, dense = rng.randint(0, (half - 1) // 2), rng.randint(0, layers - 1)
    text |= {
        "moe_intermediate_size": rng.choice([[20, 12], [12, 20], [16, 16]]),
        "moe_num_experts": rng.choice([4, 6, 9]),
        "moe_k": rng.choice([1, 2, 4]),
        "moe_num_shared_experts": rng.choice([1, 2, 3]),
        "moe_norm_min": 1e-12,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense),
        "use_bias": False,
        "output_router_logits": rng.choice([True, False]),
        "router_aux_loss_coef": rng.choice([0.0, 0.001]),
        "tie_word_embeddings": rng.choice([True, False]),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rng.choice([1e4, 5e5]),
            "mrope_section": [each, each, half - 2 * each],
        },
    }
    heads = rng.choice([1, 2])
    vision = {
        "depth": rng.choice([1, 2]),
        "hidden_size": heads * rng.choice([8, 12]),
        "hidden_act": "quick_gelu",
        "num_heads": heads,
        "in_channels": 3,
        "patch_size": rng.choice([2, 4]),
        "spatial_merge_size": rng.choice([1, 2, 3]),
        "temporal_merge_size": 2,
        "intermediate_size": rng.choice([20, 32]),
        "rms_norm_eps": rng.choice([1e-6, 1e-3]),
        "initializer_range": rng.choice([0.02, 0.1]),
        "rope_parameters": {"rope_type": "axial", "rope_theta": rng.choice([1e4, 100.0])},
    }
    return {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": 90,
        **image_ids(rng),
        "tie_word_embeddings": rng.choice([True, False]),
    }


def aria(rng: Random) -> Config:
    text = shared(rng) | {
        "moe_num_experts": rng.choice([4, 6, 9]),
        "moe_topk": rng.choice([1, 2, 4]),
        "moe_num_shared_experts": rng.choice([1, 2, 3]),
        "mlp_bias": False,
        "pretraining_tp": rng.choice([1, 2]),
        "tie_word_embeddings": rng.choice([True, False]),
        "rope_parameters": {"rope_type": "default", "rope_theta": rng.choice([1e4, 5e6])},
    }
    text["num_key_value_heads"] = rng.choice([None, 1, 2])
    text["head_dim"] = rng.choice([None, 8, 16])
    heads, patch = rng.choice([1, 2]), rng.choice([2, 4])
    vision = {
        "model_type": "idefics3_vision",
        "hidden_size": heads * rng.choice([6, 8]),
        "intermediate_size": rng.choice([20, 24]),
        "num_hidden_layers": rng.choice([1, 2]),
        "num_attention_heads": heads,
        "num_channels": 3,
        "image_size": patch * rng.choice([4, 7]),
        "patch_size": patch,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": rng.choice([1e-6, 1e-3]),
        "attention_dropout": 0.0,
        "initializer_range": rng.choice([0.02, 0.1]),
    }
    return {
        "text_config": text,
        "vision_config": vision,
        "projector_patch_to_query_dict": rng.choice([{"4": 3, "16": 5}, {"16": 7}, {"9": 2, "16": 4}]),
        "vision_feature_layer": -1,
        "image_token_index": 120,
        "initializer_range": rng.choice([0.02, 0.1]),
        "tie_word_embeddings": rng.choice([True, False]),
    }  # fmt: skip


def hunyuan_v1_moe(rng: Random) -> Config:
    config = HUNYUAN_SIZES | shared(rng)
    top_k = rng.choice([1, 2, 4])
    return config | {
        "num_experts": rng.choice([4, 6, 9]),
        "moe_topk": rng.choice([top_k, [top_k] * config["num_hidden_layers"]]),
        "num_key_value_heads": rng.choice([None, 1, 2]),
        "output_router_logits": rng.choice([True, False]),
        "pretraining_tp": rng.choice([1, 2]),
        "eod_token_id": rng.choice([None, 3]),
        "sep_token_id": rng.choice([None, 4]),
        "tie_word_embeddings": rng.choice([True, False]),
        "rope_parameters": rng.choice(
            [
                {"rope_type": "default", "rope_theta": 1e4},
                {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0},
            ]
        ),
    }


DRAWS: dict[str, Draw] = {
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_omni_moe_thinker": qwen3_omni_moe_thinker,
    "glm4v_moe": glm4v_moe,
    "ernie4_5_vl_moe": ernie4_5_vl_moe,
    "aria": aria,
    "hunyuan_v1_moe": hunyuan_v1_moe,
}


@dataclass(frozen=True)
class RandomCase:
    """``unusual``: the setting that the decoder may refuse, or ""."""

    case: Case
    unusual: str


def random_case(model_type: str, seed: int) -> RandomCase:
    config = copy.deepcopy(DRAWS[model_type](Random(f"{model_type} {seed}")))
    config["model_type"] = model_type
    unusual: Config = {}
    if seed % 2:
        choices = UNUSUAL[model_type]
        unusual = choices[seed // 2 % len(choices)]
    for path, value in unusual.items():
        _set(config, path, value)
    like = next(case for case in TABLE if case.config["model_type"] == model_type)
    placeholder = config.get("image_token_id", config.get("image_token_index", 0))
    case = replace(like, config=config, placeholder=placeholder)
    return RandomCase(case, next(iter(unusual), ""))


def _set(config: Config, path: str, value: Any) -> None:
    *above, key = path.split(".")
    for name in above:
        config = config[name]
    config[key] = value
