"""Documents: what a sample becomes and what packing lays out. Plain values, so that packing needs no decoder and no tokenizer."""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class TokenForm:
    """One token of an image as a batch carries it: ``num_values`` numbers of type ``dtype``."""

    num_values: int
    dtype: torch.dtype


@dataclass(frozen=True)
class TextSegment:
    """Token ids. With ``trained`` each of them is the label of the token before it; with ``shrinks`` they are cut first where a
    document is too long and may be truncated."""

    ids: list[int]
    trained: bool = False
    shrinks: bool = False


@dataclass(frozen=True)
class VitSegment:
    """An input image.

    patches: (P, Q) float32, normalised by the geometry's mean and standard deviation, in merge-window order: the patches of one
             token are adjacent; tokens, and patches within a token, are in row-major order.
    rows, columns: of tokens.
    grid:    rows and columns of patches.
    """

    patches: torch.Tensor
    rows: int
    columns: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class VaeSegment:
    """A target image of ``rows`` x ``columns`` tokens: (L, Z) clean latents, or pixels that the training device will encode."""

    latents: torch.Tensor
    rows: int
    columns: int


Segment = TextSegment | VitSegment | VaeSegment


@dataclass(frozen=True)
class Document:
    """Segments that attend to each other and to nothing else.

    task:      its number, see ``sequence.tasks``.
    truncated: whether its text was cut to fit.
    """

    task: int
    segments: tuple[Segment, ...]
    truncated: bool = False

    # Cached: packing asks for the lengths of every waiting document again for every sequence.
    @cached_property
    def num_vit_tokens(self) -> int:
        return sum(s.rows * s.columns for s in self.segments if isinstance(s, VitSegment))

    @cached_property
    def num_vit_patches(self) -> int:
        return sum(len(s.patches) for s in self.segments if isinstance(s, VitSegment))

    @cached_property
    def num_vae_tokens(self) -> int:
        return sum(s.rows * s.columns for s in self.segments if isinstance(s, VaeSegment))

    @cached_property
    def num_tokens(self) -> int:
        text = sum(len(s.ids) for s in self.segments if isinstance(s, TextSegment))
        return text + self.num_vit_tokens + self.num_vae_tokens


def drop_overlap(last: list[int], ids: list[int]) -> list[int]:
    """``ids`` without a prefix that repeats ``last``: a special token that ends one turn and begins the next occurs once."""
    return ids[len(last) :] if ids[: len(last)] == last else ids
