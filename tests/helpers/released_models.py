"""Tiny random models on disk as releases come: config.json, a tokenizer, safetensors files with an index."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from symbiotic_titan.codecs.flux import autoencoder_module
from symbiotic_titan.hf.architectures.base import architecture_of
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.symbiotic import SymbioticModel

# 2F differs from D: the two layouts of experts are then told apart by any reader.
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "model_type": "qwen3_vl_moe",
    "image_token_id": 120,
    "video_token_id": 121,
    "text_config": {
        "dtype": "float32",
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_heads": 2,
        "patch_size": 4,
        "num_position_embeddings": 25,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    },
    "tie_word_embeddings": False,
}

# The thinker of Qwen3-Omni: Qwen3-VL's network and sizes under other names, a tensor per expert and projection.
THINKER: dict[str, Any] = {
    "model_type": "qwen3_omni_moe_thinker",
    "text_config": QWEN["text_config"],
    "vision_config": QWEN["vision_config"],
    "audio_config": {
        "num_mel_bins": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "d_model": 16,
        "output_dim": 32,
        "downsample_hidden_size": 8,
    },
    "image_token_id": 120,
    "video_token_id": 121,
    "audio_token_id": 122,
    "vision_start_token_id": 123,
}
OMNI: dict[str, Any] = {
    "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
    "model_type": "qwen3_omni_moe",
    "enable_audio_output": True,
    "thinker_config": THINKER,
    "talker_config": {"num_code_groups": 4},
}

# Sigmoid router with selection bias, shared expert, a dense layer first; a tensor per expert and projection.
GLM: dict[str, Any] = {
    "model_type": "glm4v_moe",
    "text_config": {
        "torch_dtype": "float32",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_intermediate_size": 20,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.5,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 24,
        "num_heads": 2,
        "image_size": 12,
        "patch_size": 4,
        "out_hidden_size": 32,
        "intermediate_size": 40,
    },
}

# A pool of experts for text and one for images, of different widths; tied embeddings; a dense layer first.
ERNIE: dict[str, Any] = {
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
    "model_type": "ernie4_5_vl_moe",
    "image_token_id": 90,
    "text_config": {
        "dtype": "float32",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_intermediate_size": [20, 12],
        "moe_num_experts": 8,
        "moe_k": 3,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500_000.0,
            "mrope_section": [1, 1, 2],
        },
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_heads": 2,
        "patch_size": 4,
    },
    "tie_word_embeddings": True,
}

ARIA: dict[str, Any] = {
    "model_type": "aria",
    "text_config": {
        "model_type": "aria_text",
        "torch_dtype": "float32",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_num_experts": 8,
        "moe_topk": 3,
        "moe_num_shared_experts": 2,
    },
    "vision_config": {
        "model_type": "idefics3_vision",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    },
    "projector_patch_to_query_dict": {"4": 3, "16": 5},
}

# What has no part in our network: a norm that nothing is computed with, and a layer of its own experts that predicts a further
# token; its selection bias is in float32 whatever the rest is in.
ARIA_BESIDE = {f"vision_tower.post_layernorm.{kind}": (16,) for kind in ("weight", "bias")}
_FURTHER = "model.language_model.layers.3."
GLM_BESIDE = {
    f"{_FURTHER}eh_proj.weight": (32, 64),
    f"{_FURTHER}mlp.gate.weight": (8, 32),
    f"{_FURTHER}mlp.gate.e_score_correction_bias": (8,),
    **{f"{_FURTHER}mlp.experts.{i}.up_proj.weight": (20, 32) for i in range(8)},
}

OMNI_BESIDE = {
    "thinker.audio_tower.layers.0.fc1.weight": (16, 16),
    "talker.model.layers.0.mlp.experts.0.up_proj.weight": (12, 16),
    "code2wav.pre_transformer.norm.weight": (16,),
}
# Tells that the names begin with the thinker's.
WHOLE_OMNI = {"thinker.lm_head.weight": (128, 32)}

# What transformers 5 saves; the released files have the last two dims the other way round.
TRANSPOSED = {
    f"model.language_model.layers.{layer}.mlp.experts.{name}": (8, *shape)
    for layer in range(2)
    for name, shape in (("gate_up_proj", (48, 32)), ("down_proj", (32, 24)))
}

# One tensor per expert and projection, as FP8 releases and trainers have.
SINGLE_EXPERTS = {
    f"model.language_model.layers.{layer}.mlp.experts.{i}.{name}_proj.weight": shape
    for layer in range(2)
    for i in range(8)
    for name, shape in (("gate", (24, 32)), ("up", (24, 32)), ("down", (32, 24)))
}

# The text model of Hunyuan-A13B: tied embeddings, and no image encoder.
HUNYUAN: dict[str, Any] = {
    "model_type": "hunyuan_v1_moe",
    "torch_dtype": "float32",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "moe_topk": 2,
    "num_shared_expert": 1,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
}


def args_of(config: Mapping[str, Any]) -> ModelArgs:
    return architecture_of(config).model_args(config)


def random_tensors(
    config: Mapping[str, Any], layout: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Tensors of a release by their names in its files."""
    args = args_of(config)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in SymbioticModel(args).state_dict().items()}
    generator = torch.Generator().manual_seed(6)
    theirs: dict[str, Tensor] = {}
    for mapping in architecture_of(config).weight_map(args, layout):
        ours = [random_tensor(shapes[name], generator).to(dtype) for name in mapping.ours]
        theirs |= {
            n: t.contiguous() for n, t in zip(mapping.theirs, mapping.save(ours), strict=True)
        }
    return theirs


def random_tensor(shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) < 2:
        return torch.empty(shape).uniform_(0.5, 1.5, generator=generator)
    return torch.empty(shape).normal_(std=1.5 * shape[-1] ** -0.5, generator=generator)


def random_besides(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of these shapes, for ``more`` of a release."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(shape, generator=generator).to(
            torch.float32 if name.endswith("correction_bias") else dtype
        )
        for name, shape in shapes.items()
    }


def write_release(
    folder: Path,
    config: Mapping[str, Any] = QWEN,
    *,
    layout: Mapping[str, tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.float32,
    num_files: int = 3,
    more: Mapping[str, Tensor] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Write a release with ``tensors`` (by default random ones) and ``more``, dealt out over files in turn; returns the tensors."""
    if tensors is None:
        tensors = random_tensors(config, layout or {}, dtype)
    tensors = {**tensors, **(more or {})}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "LICENSE").write_text("do as you like")
    (folder / "modeling.py").write_text("raise SystemExit")
    names = [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]
    file_of = {tensor: names[i % num_files] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file({t: v for t, v in tensors.items() if file_of[t] == name}, folder / name)
    index = {"metadata": {"total_size": 0}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def write_flux(path: Path, seed: int = 0, **sizes: Any) -> None:
    """A tiny autoencoder of the Flux kind with random weights: 4 channels, stride 2, so that its tests take milliseconds."""
    module = autoencoder_module()
    sizes = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4} | sizes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = module.AutoEncoder(module.AutoEncoderParams(**sizes)).state_dict()
    save_file(weights, path)
