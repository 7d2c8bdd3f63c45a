"""ERNIE 4.5 VL: a mixture that is partitioned by modality as released. Text and images have a pool of experts each, of different
widths, with a softmax router and a selection bias per pool; both share a shared expert; dense leading layers; three-axis rotary on
pairs of channels, in which time has the lowest frequencies; tied embeddings; an image encoder whose projector also joins the frames
of a video.

The tokens that begin and end an image visit the experts of images. The decoder is causal within an image too. Tokens of target images
share the image experts until a partition gives them a group of their own.

The files number the image experts after those for text. A router whose chosen probabilities sum to less than ``moe_norm_min`` is the
one case that is computed otherwise: here they always sum to 1.
"""

from collections.abc import Mapping
from typing import Any

from symbiotic_titan.hf.architectures.base import (
    Architecture,
    Config,
    Shape,
    WeightMapping,
)
from symbiotic_titan.hf.architectures.settings import (
    LATENTS,
    ROTARY,
    described_by,
    rotary_settings,
    settings,
    with_experts,
)
from symbiotic_titan.hf.architectures.weight_map import (
    attention_half,
    decoder,
    experts,
    same,
    single_experts,
    stack,
    swiglu,
    transpose,
    unstack,
    with_biases,
)
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.vit_args import VitArgs
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT

POOLS = ("text", "vision")

DEFAULTS = {
    "vocab_size": 103424,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "moe_k": 6,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
}
VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "intermediate_size": 5120,
    "rms_norm_eps": 1e-6,
}
# Frames of a video that its projector joins; transformers reads no other number.
FRAMES = 2
# Width of an expert of each pool.
WIDTHS = [1536, 512]
ROTARY_DEFAULTS = {
    "rope_type": "default",
    "rope_theta": 500_000.0,
    "mrope_section": [22, 22, 20],
}
VISION_ROTARY_DEFAULTS = {"rope_type": "axial", "rope_theta": 10_000.0}
_SUPPORTED = {"hidden_act": "silu", "use_bias": False, "moe_norm_min": 1e-12}
_VISION_SUPPORTED = {"hidden_act": "quick_gelu", "temporal_merge_size": FRAMES}
_OTHERS = {
    **ROTARY,
    "head_dim": int,
    "moe_intermediate_size": list[int],
    "mlp_layer_types": list[str],
    "tie_word_embeddings": Any,  # the one beside text_config decides
}
_BESIDE = {
    "text_config": Any,
    "vision_config": Any,
    "image_start_token_id": Any,
    "image_end_token_id": Any,
    "video_start_token_id": Any,
    "video_end_token_id": Any,
}
# Pixel normalisation of its image processor, which is not in config.json.
_IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
_IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def vit_args(config: Config) -> VitArgs:
    """The image encoder of ``vision_config``, with its projector."""
    values = settings(config, "vision_config", VISION_DEFAULTS, _VISION_SUPPORTED, ROTARY)
    axial = {"rope_type": "axial"}
    rotary = rotary_settings(values, "vision_config", VISION_ROTARY_DEFAULTS, axial)
    with described_by("vision_config"):
        return VitArgs(
            dim=values["hidden_size"],
            num_layers=values["depth"],
            num_heads=values["num_heads"],
            hidden_dim=values["intermediate_size"],
            patch=values["patch_size"],
            merge=values["spatial_merge_size"],
            channels=values["in_channels"],
            norm_eps=values["rms_norm_eps"],
            rope_theta=float(rotary["rope_theta"]),
            last_norm=True,
            patch_bias=False,
            activation="quick_gelu",
            resampled_frames=FRAMES,
            own_delimiters=True,
            image_mean=_IMAGE_MEAN,
            image_std=_IMAGE_STD,
            image_resize="qwen",
        )


def _dense_layers(values: Config) -> int:
    """How many leading layers are dense.

    Raises:
        ValueError: ``mlp_layer_types`` has another length or another order.
    """
    layers = values["num_hidden_layers"]
    kinds = values.get("mlp_layer_types", ["dense"] + ["sparse"] * (layers - 1))
    dense = kinds.count("dense")
    if kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise ValueError(
            f"config.json: text_config.mlp_layer_types must be 'dense' for the first layers and 'sparse' for all others of "
            f"num_hidden_layers = {layers}, got {kinds}"
        )
    return int(dense)


def _widths(values: Config) -> tuple[int, int]:
    widths = values.get("moe_intermediate_size", WIDTHS)
    if len(widths) != len(POOLS) or min(widths) < 1:
        raise ValueError(
            f"config.json: text_config.moe_intermediate_size must be two positive numbers, the widths of an expert for text and for "
            f"images, got {widths}"
        )
    return widths[0], widths[1]


def pools(num_experts: int, width: int) -> tuple[ExpertGroup, ...]:
    """The two pools of ``num_experts`` each; the model's own width is that of the first, ``width`` that of the second."""
    return (
        ExpertGroup("text", (TEXT,), num_experts),
        ExpertGroup("vision", (VIT, VAE), num_experts, hidden_dim=width),
    )


def model_args(config: Config) -> ModelArgs:
    """See ``Architecture``."""
    beside = settings(config, "", {"tie_word_embeddings": True}, others=_BESIDE)
    values = settings(config, "text_config", DEFAULTS, _SUPPORTED, _OTHERS)
    supported = {"rope_type": "default"}
    rotary = rotary_settings(values, "text_config", ROTARY_DEFAULTS, supported)
    width, heads = values["hidden_size"], values["num_attention_heads"]
    text_width, vision_width = _widths(values)
    vit = vit_args(config)
    with described_by("text_config"):
        return ModelArgs(
            vocab_size=values["vocab_size"],
            dim=width,
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values["num_key_value_heads"],
            head_dim=values.get("head_dim", width // heads),
            num_dense_layers=_dense_layers(values),
            dense_hidden_dim=values["intermediate_size"],
            num_experts=2 * values["moe_num_experts"],
            top_k=values["moe_k"],
            expert_hidden_dim=text_width,
            shared_hidden_dim=text_width * values["moe_num_shared_experts"],
            groups=pools(values["moe_num_experts"], vision_width),
            selection_bias=True,
            qk_norm="none",
            norm_eps=values["rms_norm_eps"],
            vit_attention="causal",
            rope_theta=float(rotary["rope_theta"]),
            rotary_interleaved=True,
            mrope="pairwise",
            # Theirs are in the order height, width, time.
            mrope_sections=(*rotary["mrope_section"][2:], *rotary["mrope_section"][:2]),
            tie_embeddings=beside["tie_word_embeddings"],
            vit=vit,
            **LATENTS,
        )


def _vision(theirs: str, vit: VitArgs) -> list[WeightMapping]:
    ours = "vit."
    out = same(theirs, ours, ("patch_embed.proj.weight", "patch_embedding.weight"))
    out += with_biases(theirs, ours, ("ln", "last_norm"))
    for layer in range(vit.num_layers):
        out += with_biases(
            f"{theirs}blocks.{layer}.",
            f"{ours}layers.{layer}.",
            ("norm1", "attention_norm"),
            ("attn.qkv", "wqkv"),
            ("attn.proj", "wo"),
            ("norm2", "ffn_norm"),
            ("mlp.fc1", "w1"),
            ("mlp.fc2", "w2"),
        )
    return out


def _resampler(theirs: str, *, in_memory: bool) -> list[WeightMapping]:
    ours = "vit.merger."
    first, second, norm = ("fc1", "fc2", "ln") if in_memory else ("0", "2", "3")
    out = with_biases(theirs, ours, ("mlp", "project"))
    out += same(theirs, ours, ("after_norm.weight", "last_norm.weight"))
    for stage in ("spatial", "temporal"):
        names = ((first, "w1"), (second, "w2"), (norm, "norm"))
        out += with_biases(f"{theirs}{stage}_linear.", f"{ours}{stage}.", *names)
    return out


def _pools_on_disk(theirs: str, ours: str, args: ModelArgs) -> list[WeightMapping]:
    """Two pools as the files have them: routers (D, E), both biases in one tensor (2, E), image experts numbered after those for
    text."""
    out, first = [], 0
    for group, gate in zip(args.groups, ("gate.weight", "gate.weight_1"), strict=True):
        router = (f"{ours}router.{group.name}.weight",)
        out.append(WeightMapping((f"{theirs}{gate}",), router, transpose, transpose))
        pool = f"{ours}experts.{group.name}"
        out += single_experts(f"{theirs}experts", pool, group.num_experts, first=first)
        first += group.num_experts
    biases = tuple(f"{ours}router.{group.name}.bias" for group in args.groups)
    name = f"{theirs}moe_statics.e_score_correction_bias"
    return [*out, WeightMapping((name,), biases, unstack, stack)]


def _pools_in_memory(
    theirs: str, ours: str, args: ModelArgs, shapes: Mapping[str, Shape]
) -> list[WeightMapping]:
    """Two pools as transformers 5 holds and may save them."""
    out = []
    for group in args.groups:
        pool, router = f"{theirs}{group.name}_moe.", f"{ours}router.{group.name}."
        out += same(f"{pool}gate.", router, ("weight", "weight"))
        bias = f"{pool}gate.moe_statics.e_score_correction_bias"
        out.append(WeightMapping((bias,), (f"{router}bias",), unstack, stack))
        pool_of_ours = f"{ours}experts.{group.name}"
        out += experts(f"{pool}experts", pool_of_ours, group.num_experts, shapes)
    return out


def weight_map(args: ModelArgs, shapes: Mapping[str, Shape]) -> list[WeightMapping]:
    """See ``Architecture``. Three layouts: as released with code of its own (``vision_model``), as transformers 5 saves it
    (``model.vision_model``), and as transformers 5 holds it (``model.language_model`` and ``model.vision_tower``)."""
    in_memory = "model.language_model.norm.weight" in shapes
    prefix = "model.language_model." if in_memory else "model."
    encoder = "model.vision_tower." if in_memory else "model.vision_model."
    if "vision_model.ln.weight" in shapes:
        encoder = "vision_model."

    def layer(number: int, theirs: str, ours: str) -> list[WeightMapping]:
        out = attention_half(theirs, ours, args)
        if number < args.num_dense_layers:
            return out + swiglu(f"{theirs}mlp", f"{ours}feed_forward")
        if in_memory:
            out += _pools_in_memory(f"{theirs}mlp.", f"{ours}moe.", args, shapes)
        else:
            out += _pools_on_disk(f"{theirs}mlp.", f"{ours}moe.", args)
        if args.shared_hidden_dim:
            out += swiglu(f"{theirs}mlp.shared_experts", f"{ours}moe.shared_experts")
        return out

    out = decoder(prefix, args, layer) + _vision(encoder, args.vit)
    return out + _resampler("model.resampler_model.", in_memory=in_memory)


def config_of(config: Config, args: ModelArgs) -> dict[str, Any]:
    """See ``Architecture``."""
    return with_experts(config, model_args(config), args, "text_config", "moe_num_experts")


ERNIE4_5_VL_MOE = Architecture(model_args, weight_map, config_of)
