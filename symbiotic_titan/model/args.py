"""ModelArgs: all hyperparameters of the network, checked when they are built."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torchtitan.protocols.model import BaseModelArgs

from symbiotic_titan.codecs.codec import codec_info
from symbiotic_titan.config.experts import ExpertGroupRow
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.model.masks import VitAttention
from symbiotic_titan.model.rope import Mrope
from symbiotic_titan.model.vit_args import VitArgs, check_fields, require
from symbiotic_titan.moe.partition import ExpertGroup, MoEArgs
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.modality import NUM_MODALITIES, modality_ids
from symbiotic_titan.sequence.positions import RotaryLayout

VOCAB_MULTIPLE = 64


def one_pool(num_experts: int) -> tuple[ExpertGroup, ...]:
    """The standard MoE: a single group ``all`` in which every modality routes."""
    return (ExpertGroup("all", tuple(range(NUM_MODALITIES)), num_experts),)


def partition_groups(
    partition: Mapping[str, ExpertGroupRow], num_experts: int, flavor: str
) -> tuple[ExpertGroup, ...]:
    """Expert groups of a config's partition, which is not empty.

    Raises:
        ValueError: an unknown modality, or groups whose sizes, without copies, do not sum to the flavor's ``num_experts``. ``MoEArgs``
            checks that every modality has exactly one group.
    """
    groups = tuple(
        ExpertGroup(
            name,
            modality_ids(row.modalities, key=f"experts.partition.{name}.modalities"),
            row.num_experts,
            row.hidden_dim,
            row.top_k,
        )
        for name, row in partition.items()
    )
    held = sum(row.num_experts for row in partition.values() if not row.copy)
    if held != num_experts:
        raise ValueError(
            f"experts.partition: the groups hold {held} experts but flavor {flavor!r} has {num_experts}; "
            f"change num_experts of a group by {num_experts - held:+d}"
        )
    return groups


def round_vocab_size(num_ids: int) -> int:
    """``num_ids``, up to a number of embeddings that divides among ranks and fills the tiles of a matmul."""
    return -(-num_ids // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(kw_only=True)
class ModelArgs(BaseModelArgs):
    """All hyperparameters of the network. A flavor sets them, and ``update_from_config`` overrides some from the job's config.

    Fields with a default are switches for the released backbones.

    Raises:
        ValueError: from construction, ``validate`` and ``update_from_config``: key, value and the rule it breaks.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    # Dense feed-forward of the first layers; all others have the MoE.
    num_dense_layers: int
    dense_hidden_dim: int

    # Routed experts of a MoE layer, and the expert that every token visits (shared_hidden_dim 0: none).
    num_experts: int
    top_k: int
    expert_hidden_dim: int
    shared_hidden_dim: int
    shared_gate: bool = False
    score_function: str = "softmax"
    """A name registered in ``config.experts.ROUTER_SCORES``."""
    selection_bias: bool = False
    normalize_weights: bool = True
    route_scale: float = 1.0
    # Groups of the partition, some with a width or a top_k of their own; empty means one pool.
    groups: tuple[ExpertGroup, ...] = ()
    shield_modalities: tuple[int, ...] = ()
    shield_mode: Literal["output", "weights"] = "output"

    # Attention.
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["none", "before", "after"] = "before"
    """RMSNorm per head on queries and keys: none, before rotary, or after rotary."""
    norm_eps: float = 1e-6
    attention_backend: Literal["sdpa", "flex"] = "sdpa"
    vit_attention: VitAttention = "bidirectional"
    """Whether a token of an input image attends to the later ones of its image, see ``model.masks``."""

    # Rotary positions.
    rope_theta: float
    rotary_fraction: float = 1.0
    """Share of each head's channels that are rotated."""
    rotary_interleaved: bool = False
    """Pairs channels 2i and 2i + 1; otherwise i and i + half."""
    rotary_layout: RotaryLayout = "grid"
    """Positions that the data gives to image tokens, see ``sequence.positions``."""
    mrope: Mrope = "interleaved"
    """Which frequencies read which axis of a position, see ``model.rope``."""
    mrope_sections: tuple[int, ...]
    """Frequencies per axis (temporal, height, width); empty with ``mrope`` none."""

    tie_embeddings: bool = False

    # Input and target images.
    vit: VitArgs
    latent_channels: int
    latent_stride: int
    latent_patch: int
    timestep_width: int = 256
    """Sinusoids that encode a timestep."""

    init_seed: int = 0

    def __post_init__(self) -> None:
        self.groups = self.groups or one_pool(self.num_experts)
        self.validate()

    def validate(self) -> None:
        """Raise ValueError if a rule is broken."""
        may_be_zero = ("num_dense_layers", "shared_hidden_dim", "init_seed")
        check_fields(self, "model", may_be_zero=may_be_zero)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads: must be a multiple of num_kv_heads = {self.num_kv_heads}, got {self.num_heads}",
        )
        require(
            self.num_dense_layers <= self.num_layers,
            f"model.num_dense_layers: must be at most num_layers = {self.num_layers}, got {self.num_dense_layers}",
        )
        for name, divisor in (("dim", 4), ("timestep_width", 2)):
            value = getattr(self, name)
            require(
                value % divisor == 0,
                f"model.{name}: must be a multiple of {divisor} (sinusoids come in pairs), got {value}",
            )
        require(
            len(self.vit.deepstack) <= self.num_layers,
            f"vit.deepstack: each feature is added after a layer of its own, but model.num_layers is {self.num_layers}, "
            f"got {self.vit.deepstack}",
        )
        held = sum(group.num_experts for group in self.groups)
        require(
            held == self.num_experts,
            f"model.groups: hold {held} experts, but num_experts is {self.num_experts}",
        )
        require(
            not self.vit.queries or self.rotary_layout != "grid",
            "model.rotary_layout: 'grid' needs rows and columns of image tokens, which learned queries (vit.queries) do not have; use "
            "'sequence' or 'shared'",
        )
        self._validate_rotary()
        _ = self.moe_args  # the MoE's own rules

    def _validate_rotary(self) -> None:
        require(
            self.rotary_fraction <= 1.0,
            f"model.rotary_fraction: must be at most 1, got {self.rotary_fraction}",
        )
        exact = self.head_dim * self.rotary_fraction
        require(
            self.rotary_dim == exact and self.rotary_dim % 2 == 0,
            f"model.rotary_fraction: must rotate an even number of the {self.head_dim} channels of a head, got {exact:g}",
        )
        if self.mrope == "none":
            require(
                not self.mrope_sections,
                f"model.mrope_sections: has no effect with mrope 'none'; must be empty, got {self.mrope_sections}",
            )
            require(
                self.rotary_layout != "grid",
                "model.rotary_layout: 'grid' gives image tokens rows and columns that mrope 'none' does not read; "
                "use 'sequence' or 'shared', or another mrope",
            )
            return
        require(
            len(self.mrope_sections) == 3 and 2 * sum(self.mrope_sections) == self.rotary_dim,
            f"model.mrope_sections: must be three numbers that sum to half of the {self.rotary_dim} rotated channels, "
            f"got {self.mrope_sections}",
        )
        _, height, width = self.mrope_sections
        if self.mrope == "interleaved":
            require(
                max(3 * height - 2, 3 * width - 1) < self.rotary_dim // 2,
                f"model.mrope_sections: 'interleaved' gives height and width every third frequency each, and there are not that many; "
                f"got {self.mrope_sections}",
            )
        if self.mrope == "pairwise":
            require(
                height == width,
                f"model.mrope_sections: 'pairwise' gives height and width the same number, got {self.mrope_sections}",
            )

    @property
    def rotary_dim(self) -> int:
        """Rotated channels of a head."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def geometry(self) -> ImageGeometry:
        return ImageGeometry(
            vit_patch=self.vit.patch,
            vit_merge=self.vit.merge,
            vit_channels=self.vit.channels,
            latent_channels=self.latent_channels,
            latent_stride=self.latent_stride,
            latent_patch=self.latent_patch,
            vit_mean=self.vit.image_mean,
            vit_std=self.vit.image_std,
            vit_resize=self.vit.image_resize,
            vit_queries=self.vit.queries,
            vit_query_sides=self.vit.query_sides,
            vit_own_delimiters=self.vit.own_delimiters,
        )

    @property
    def moe_args(self) -> MoEArgs:
        return MoEArgs(
            dim=self.dim,
            hidden_dim=self.expert_hidden_dim,
            groups=self.groups,
            top_k=self.top_k,
            score_function=self.score_function,
            selection_bias=self.selection_bias,
            normalize_weights=self.normalize_weights,
            route_scale=self.route_scale,
            shared_hidden_dim=self.shared_hidden_dim,
            shared_gate=self.shared_gate,
            shield_modalities=self.shield_modalities,
            shield_mode=self.shield_mode,
        )

    def update_from_config(self, job_config: JobConfig, **kwargs: object) -> None:  # type: ignore[override]
        """Apply [model], [experts], [shielding], [latents] and debug.seed. torchtitan calls it before the model is built."""
        if job_config.model.vocab_size:
            self.vocab_size = job_config.model.vocab_size
        partition = job_config.experts.partition
        if partition:
            self.groups = partition_groups(partition, self.num_experts, job_config.model.flavor)
            self.num_experts = sum(group.num_experts for group in self.groups)
        if job_config.experts.score_function is not None:
            self.score_function = job_config.experts.score_function
        if not job_config.experts.shared:
            self.shared_hidden_dim, self.shared_gate = 0, False
        if job_config.experts.new_shared_experts:
            require(
                self.shared_hidden_dim == 0,
                f"experts.new_shared_experts: flavor {job_config.model.flavor!r} has a shared expert already; remove the key",
            )
            self.shared_hidden_dim = job_config.experts.new_shared_experts * self.expert_hidden_dim
        self.shield_modalities = modality_ids(
            job_config.shielding.modalities, key="shielding.modalities"
        )
        self.shield_mode = job_config.shielding.mode
        codec = codec_info(job_config.latents)
        self.latent_channels, self.latent_stride = codec.channels, codec.stride
        self.latent_patch = job_config.latents.patch
        self.attention_backend = job_config.model.attention_backend
        self.init_seed = job_config.debug.seed or 0
        self.validate()

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """(number of parameters, FLOPs per training token, forward and backward, mean over the modalities)."""
        return model.nparams_and_flops(seq_len)  # type: ignore[operator]
