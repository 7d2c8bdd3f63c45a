"""Named sizes. Each is a function that returns complete, fresh ModelArgs: nobody can change a flavor for somebody else."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.model_config import read_model_config
from symbiotic_titan.model.vit_args import VitArgs


def debug() -> ModelArgs:
    """Trains a step in a fraction of a second on one CPU core, with every part of the real model present."""
    return ModelArgs(
        vocab_size=320,  # 256 bytes and 11 special tokens, padded to a multiple of 64
        dim=128,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        num_dense_layers=1,
        dense_hidden_dim=256,
        num_experts=16,
        top_k=2,
        expert_hidden_dim=64,
        shared_hidden_dim=64,
        rope_theta=10_000.0,
        mrope_sections=(6, 5, 5),
        vit=VitArgs(dim=64, num_layers=2, num_heads=2, hidden_dim=128, patch=4, merge=2),
        latent_channels=3,
        latent_stride=1,
        latent_patch=4,
        timestep_width=64,
    )


def mini() -> ModelArgs:
    """Learns the demo world on a CPU. 32 experts leave groups worth splitting (24/8 as the paper's 96/32), and top-4 of width
    192 lets a token pay for a fifth of the parameters."""
    return ModelArgs(
        vocab_size=320,  # as debug
        dim=256,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        num_dense_layers=1,
        dense_hidden_dim=768,
        num_experts=32,
        top_k=4,
        expert_hidden_dim=192,
        shared_hidden_dim=192,
        rope_theta=10_000.0,
        mrope_sections=(6, 5, 5),
        vit=VitArgs(dim=192, num_layers=4, num_heads=6, hidden_dim=512, patch=4, merge=2),
        latent_channels=3,
        latent_stride=1,
        latent_patch=4,
    )


def symbiotic_1b_a0_3b() -> ModelArgs:
    """About 1 billion parameters, 0.3 billion active: a real tokenizer, one node."""
    return ModelArgs(
        vocab_size=151936,
        dim=768,
        num_layers=16,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        num_dense_layers=1,
        dense_hidden_dim=3072,
        num_experts=64,
        top_k=6,
        expert_hidden_dim=320,
        shared_hidden_dim=320,
        rope_theta=1_000_000.0,
        mrope_sections=(12, 10, 10),
        vit=VitArgs(dim=512, num_layers=12, num_heads=8, hidden_dim=2048, patch=16, merge=2),
        latent_channels=16,
        latent_stride=8,
        latent_patch=2,
    )


def symbiotic_30b_a3b() -> ModelArgs:
    """The paper's size: decoder and experts shaped as Qwen3-VL-30B-A3B, with one shared expert and a dense first layer."""
    return ModelArgs(
        vocab_size=151936,
        dim=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        num_dense_layers=1,
        dense_hidden_dim=6144,
        num_experts=128,
        top_k=8,
        expert_hidden_dim=768,
        shared_hidden_dim=768,
        rope_theta=5_000_000.0,
        mrope_sections=(24, 20, 20),
        vit=VitArgs(dim=1152, num_layers=27, num_heads=16, hidden_dim=4304, patch=16, merge=2),
        latent_channels=16,
        latent_stride=8,
        latent_patch=2,
    )


def qwen3_vl_30b_a3b() -> ModelArgs:
    """The released Qwen3-VL-30B-A3B (Apache-2.0), with latent parts for an autoencoder of 16 channels and stride 8."""
    return ModelArgs(
        vocab_size=151936,
        dim=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        num_dense_layers=0,
        dense_hidden_dim=6144,
        num_experts=128,
        top_k=8,
        expert_hidden_dim=768,
        shared_hidden_dim=0,
        vit_attention="causal",
        rope_theta=5_000_000.0,
        mrope_sections=(24, 20, 20),
        vit=VitArgs(
            dim=1152,
            num_layers=27,
            num_heads=16,
            hidden_dim=4304,
            patch=16,
            merge=2,
            temporal_patch=2,
            position_grid=48,
            deepstack=(8, 16, 24),
            image_resize="qwen",
        ),
        latent_channels=16,
        latent_stride=8,
        latent_patch=2,
    )


def glm_4_5v() -> ModelArgs:
    """The released GLM-4.5V (MIT), with latent parts as above."""
    return ModelArgs(
        vocab_size=151552,
        dim=4096,
        num_layers=46,
        num_heads=96,
        num_kv_heads=8,
        head_dim=128,
        num_dense_layers=1,
        dense_hidden_dim=10944,
        num_experts=128,
        top_k=8,
        expert_hidden_dim=1408,
        shared_hidden_dim=1408,
        score_function="sigmoid",
        selection_bias=True,
        qkv_bias=True,
        qk_norm="none",
        norm_eps=1e-5,
        vit_attention="causal",
        rope_theta=10_000.0,
        rotary_fraction=0.5,
        mrope="chunked",
        mrope_sections=(8, 12, 12),
        vit=VitArgs(
            dim=1536,
            num_layers=24,
            num_heads=12,
            hidden_dim=4096,
            patch=14,
            merge=2,
            norm="rms",
            outer_norms=True,
            norm_eps=1e-5,
            bias=False,
            activation="swiglu",
            temporal_patch=2,
            position_grid=24,
            position_reading="bicubic",
            projector_hidden_dim=10944,
            image_mean=(0.48145466, 0.4578275, 0.40821073),
            image_std=(0.26862954, 0.26130258, 0.27577711),
            image_resize="glm",
        ),
        latent_channels=16,
        latent_stride=8,
        latent_patch=2,
    )


def hunyuan_a13b() -> ModelArgs:
    """The released text decoder Hunyuan-A13B (Tencent's community licence), with a new image encoder and latent parts as above."""
    return ModelArgs(
        vocab_size=128167,
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        num_dense_layers=0,
        dense_hidden_dim=3072,
        num_experts=64,
        top_k=8,
        expert_hidden_dim=3072,
        shared_hidden_dim=3072,
        qk_norm="after",
        norm_eps=1e-5,
        rope_theta=10_000.0 * 1000.0 ** (128 / 126),  # stretched by alpha = 1000
        rotary_layout="shared",
        mrope="none",
        mrope_sections=(),
        tie_embeddings=True,
        vit=VitArgs(dim=1152, num_layers=27, num_heads=16, hidden_dim=4304, patch=16, merge=2),
        latent_channels=16,
        latent_stride=8,
        latent_patch=2,
    )


def aria() -> ModelArgs:
    """The released Aria (Apache-2.0), with latent parts as above."""
    return ModelArgs(
        vocab_size=100352,
        dim=2560,
        num_layers=28,
        num_heads=20,
        num_kv_heads=20,
        head_dim=128,
        num_dense_layers=0,
        dense_hidden_dim=1664,
        num_experts=64,
        top_k=6,
        expert_hidden_dim=1664,
        shared_hidden_dim=2 * 1664,
        qk_norm="none",
        vit_attention="causal",
        rope_theta=5_000_000.0,
        rotary_layout="sequence",
        mrope="none",
        mrope_sections=(),
        vit=VitArgs(
            dim=1152,
            num_layers=27,
            num_heads=16,
            hidden_dim=4304,
            patch=14,
            merge=1,
            queries=(128, 256),
            query_sides=(35, 70),
            rope_theta=0.0,
            position_grid=70,
            position_reading="floor",
            image_resize="aria",
        ),
        latent_channels=16,
        latent_stride=8,
        latent_patch=2,
    )


class Flavors(Mapping[str, ModelArgs]):
    """Name -> fresh ModelArgs at every look-up. A name that ends in .json is the path of a shape file, as tools/convert.py writes
    it beside a checkpoint."""

    def __init__(self, builders: Mapping[str, Callable[[], ModelArgs]]) -> None:
        self._builders = dict(builders)

    def __getitem__(self, name: str) -> ModelArgs:
        if name.endswith(".json"):
            return read_model_config(Path(name))
        if name not in self._builders:
            raise ValueError(
                f"model.flavor: unknown flavor {name!r}; choose from {', '.join(self._builders)}, or name a model.json"
            )
        return self._builders[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._builders or (
            isinstance(name, str) and name.endswith(".json") and Path(name).is_file()
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._builders)

    def __len__(self) -> int:
        return len(self._builders)


FLAVORS = Flavors(
    {
        "debug": debug,
        "mini": mini,
        "1B-A0.3B": symbiotic_1b_a0_3b,
        "30B-A3B": symbiotic_30b_a3b,
        "Qwen3-VL-30B-A3B": qwen3_vl_30b_a3b,
        "GLM-4.5V": glm_4_5v,
        "Hunyuan-A13B": hunyuan_a13b,
        "Aria": aria,
    }
)
