"""Weight mappings that several architectures share: layers, experts, patch embeddings, and how their tensors are rearranged."""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from symbiotic_titan.hf.architectures.base import (
    ByRows,
    Shape,
    TensorTransform,
    WeightMapping,
    stack,
)
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.vit_args import VitArgs

_SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")


def unstack(tensors: list[Tensor]) -> list[Tensor]:
    return list(tensors[0].unbind())


def split(dim: int, parts: int = 2) -> TensorTransform:
    """Split one tensor into ``parts`` of equal size, e.g. gate and up."""
    return _by_rows(lambda tensors: list(tensors[0].chunk(parts, dim)), dim)


def join(dim: int) -> TensorTransform:
    return _by_rows(lambda tensors: [torch.cat(tensors, dim)], dim)


def _by_rows(transform: TensorTransform, dim: int) -> TensorTransform:
    """``transform``, which works along ``dim``."""
    return ByRows(transform, dim + 1) if dim > 0 else transform


def chain(*steps: TensorTransform) -> TensorTransform:
    """Apply ``steps`` one after the other."""

    def transform(tensors: list[Tensor]) -> list[Tensor]:
        for step in steps:
            tensors = step(tensors)
        return tensors

    by_rows = [step.min_dims for step in steps if isinstance(step, ByRows)]
    return ByRows(transform, max(by_rows)) if len(by_rows) == len(steps) else transform


def _transpose(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.transpose(-1, -2).contiguous() for tensor in tensors]


transpose = ByRows(_transpose, min_dims=3)
"""(E, in, out) <-> (E, out, in)."""


def same(theirs: str, ours: str, *names: tuple[str, str]) -> list[WeightMapping]:
    """Tensors that differ in name only; ``names``: (their name, our name), appended to the prefixes ``theirs`` and ``ours``."""
    return [WeightMapping((theirs + their,), (ours + our,)) for their, our in names]


def with_biases(theirs: str, ours: str, *names: tuple[str, str]) -> list[WeightMapping]:
    """``same`` for the weight and the bias of linear layers and norms."""
    both = [(t + kind, o + kind) for t, o in names for kind in (".weight", ".bias")]
    return same(theirs, ours, *both)


def swiglu(theirs: str, ours: str) -> list[WeightMapping]:
    """The three projections of a gated feed-forward."""
    return same(
        theirs,
        ours,
        (".gate_proj.weight", ".w1.weight"),
        (".down_proj.weight", ".w2.weight"),
        (".up_proj.weight", ".w3.weight"),
    )


def attention(theirs: str, ours: str, args: ModelArgs) -> list[WeightMapping]:
    """The four projections, with biases where ``args`` say so."""
    mappings = []
    for their, our in (("q_proj", "wq"), ("k_proj", "wk"), ("v_proj", "wv"), ("o_proj", "wo")):
        mappings += same(f"{theirs}.{their}", f"{ours}.{our}", (".weight", ".weight"))
        if args.o_bias if our == "wo" else args.qkv_bias:
            mappings += same(f"{theirs}.{their}", f"{ours}.{our}", (".bias", ".bias"))
    return mappings


def attention_half(
    theirs: str, ours: str, args: ModelArgs, *norms: tuple[str, str]
) -> list[WeightMapping]:
    """The attention of a decoder layer, and the layer's two norms. ``norms``: (their name, our name) of those of queries and keys, whose
    names differ between releases."""
    out = same(
        theirs,
        ours,
        ("input_layernorm.weight", "attention_norm.weight"),
        *norms,
        ("post_attention_layernorm.weight", "ffn_norm.weight"),
    )
    return out + attention(f"{theirs}self_attn", f"{ours}attention", args)


def experts(
    theirs: str, ours: str, num_experts: int, shapes: Mapping[str, Shape]
) -> list[WeightMapping]:
    """The routed experts of a layer. ``shapes`` tell which of two layouts the files have: one tensor per expert and projection, as
    on the Hub, or ``gate_up_proj`` (E, 2F, D) and ``down_proj`` (E, D, F), as transformers 5 holds and may save them."""
    if f"{theirs}.gate_up_proj" in shapes:
        gate_up = WeightMapping(
            (f"{theirs}.gate_up_proj",),
            (f"{ours}.w1", f"{ours}.w3"),
            split(1),
            join(1),
        )
        return [gate_up, *same(theirs, ours, (".down_proj", ".w2"))]
    return single_experts(theirs, ours, num_experts)


def has_single_experts(theirs: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether the experts of a layer have a tensor each."""
    return f"{theirs}.0.gate_proj.weight" in shapes


def without_single_experts(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """An ``Architecture.export_layout``: experts are written in one tensor, also where they had a tensor each. transformers merges
    those of some architectures only; it would give the others new random experts, with a warning."""
    return {name: shape for name, shape in shapes.items() if not _SINGLE_EXPERT.search(name)}


def single_experts(
    theirs: str, ours: str, num_experts: int, *, first: int = 0
) -> list[WeightMapping]:
    """One tensor per expert and projection: (F, D), (D, F) and (F, D). The files number the experts from ``first``."""
    return [
        WeightMapping(
            tuple(f"{theirs}.{first + i}.{their}.weight" for i in range(num_experts)),
            (f"{ours}.{our}",),
            stack,
            unstack,
        )
        for their, our in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"))
    ]


def patch_embedding(theirs: str, ours: str, vit: VitArgs, *, frames: bool) -> list[WeightMapping]:
    """The convolution that embeds patches, as a linear layer: its stride equals its kernel, so each patch is multiplied once.
    ``frames``: the kernel has a time dimension too."""
    kernel = (vit.channels, *([vit.temporal_patch] if frames else []), vit.patch, vit.patch)
    weight = WeightMapping(
        (f"{theirs}.weight",),
        (f"{ours}.weight",),
        # (width, channels, frames, patch, patch), or without frames
        load=lambda tensors: [tensors[0].flatten(1)],
        save=lambda tensors: [tensors[0].unflatten(1, kernel)],
    )
    return [weight, *same(theirs, ours, (".bias", ".bias"))]


def decoder(
    prefix: str,
    args: ModelArgs,
    layer: Callable[[int, str, str], list[WeightMapping]],
    output: str = "lm_head.weight",
) -> list[WeightMapping]:
    """All mappings of a decoder. ``prefix``: of all released names but ``output``. ``layer(number, their prefix, our prefix)`` maps
    one layer."""
    out = ends(f"{prefix}embed_tokens.weight", f"{prefix}norm.weight", output, args)
    for i in range(args.num_layers):
        out += layer(i, f"{prefix}layers.{i}.", f"layers.{i}.")
    return out


def ends(embeddings: str, norm: str, output: str, args: ModelArgs) -> list[WeightMapping]:
    """Embedding table, last norm and output projection. A tied output projection is not stored: its values are the table's."""
    table = "tok_embeddings.weight"
    mappings = same("", "", (norm, "norm.weight"))
    if not args.tie_embeddings:
        return mappings + same("", "", (embeddings, table), (output, "output.weight"))
    tied = WeightMapping(
        (embeddings,),
        (table, "output.weight"),
        load=ByRows(lambda tensors: [tensors[0], tensors[0]], min_dims=1),
        save=lambda tensors: [tensors[0]],
    )
    return [*mappings, tied]
