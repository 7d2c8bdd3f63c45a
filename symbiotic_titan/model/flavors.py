"""Named sizes of models.

Ours are functions below. Those of released models are files in ``model/released``, in the format of ``model.model_config``, each with
latent parts for an autoencoder of 16 channels and stride 8:

    Qwen3-VL-30B-A3B   Apache-2.0
    GLM-4.5V           MIT
    Hunyuan-A13B       Tencent's community licence; a text model, so its image encoder is new. Its rotary base is stretched:
                       10,000 * 1000 ** (128 / 126), for the release's alpha = 1000 and heads of 128 channels.
    Aria               Apache-2.0

Every look-up returns fresh ModelArgs, so a caller may change what it gets.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.model_config import read_model_config
from symbiotic_titan.model.vit_args import VitArgs


def debug() -> ModelArgs:
    """Every part of the real model; a training step takes a fraction of a second on one CPU core."""
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
    """Learns the demo world on a CPU. 32 experts leave groups worth splitting (24/8, as the paper's 96/32), and with top-4 experts of
    width 192 a token uses a fifth of the parameters."""
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


_RELEASED = Path(__file__).parent / "released"


class Flavors(Mapping[str, ModelArgs]):
    """Name -> fresh ModelArgs. A name that ends in .json is the path of a model config, such as symbiotic convert writes next to a
    checkpoint."""

    def __init__(self, builders: Mapping[str, Callable[[], ModelArgs]], released: Path) -> None:
        self._builders = dict(builders)
        self._released = {path.stem: path for path in sorted(released.glob("*.json"))}

    def __getitem__(self, name: str) -> ModelArgs:
        if name in self._builders:
            return self._builders[name]()
        if name in self._released:
            return read_model_config(self._released[name])
        if name.endswith(".json"):
            return read_model_config(Path(name))
        raise ValueError(
            f"model.flavor: unknown flavor {name!r}; choose from {', '.join(self)}, or name a model.json"
        )

    def __contains__(self, name: object) -> bool:
        return name in list(self) or (
            isinstance(name, str) and name.endswith(".json") and Path(name).is_file()
        )

    def __iter__(self) -> Iterator[str]:
        return iter([*self._builders, *self._released])

    def __len__(self) -> int:
        return len(self._builders) + len(self._released)


FLAVORS = Flavors(
    {
        "debug": debug,
        "mini": mini,
        "1B-A0.3B": symbiotic_1b_a0_3b,
        "30B-A3B": symbiotic_30b_a3b,
    },
    _RELEASED,
)


def model_args(config: JobConfig) -> ModelArgs:
    """The shape of the config's model.

    Raises:
        ValueError: an unknown flavor, or sections that break its rules.
    """
    args = FLAVORS[config.model.flavor]
    args.update_from_config(config)
    return args
