"""The tensors of a packed sequence, labels among them.

A packed sequence is one row of a batch: T positions, filled by whole documents and padded at the end. All its tensors have
static sizes, so that every step of training compiles to the same graph and takes the same memory.
"""

from functools import lru_cache

import numpy as np
import torch

from symbiotic_titan.data.documents import (
    Document,
    TextSegment,
    TokenForm,
    VaeSegment,
    VitSegment,
)
from symbiotic_titan.data.images import vit_patch_coords
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.geometry import ImageGeometry, coords
from symbiotic_titan.sequence.modality import (
    IGNORE_INDEX,
    NO_TASK,
    PADDING,
    TEXT,
    VAE,
    VIT,
    SpecialTokens,
)
from symbiotic_titan.sequence.positions import RotaryLayout, image_positions, text_positions


class SequenceBuilder:
    """Builds packed sequences of one size from documents."""

    def __init__(
        self,
        size: SequenceSize,
        geometry: ImageGeometry,
        layout: RotaryLayout,
        special: SpecialTokens,
        latents: TokenForm | None = None,
    ) -> None:
        stated = size.num_vit_patches is not None
        assert stated or not geometry.vit_queries, (
            "the number of queries does not tell that of patches"
        )
        self._size = size
        self._geometry = geometry
        self._layout = layout
        self._special = special
        self._latents = latents or TokenForm(geometry.vae_token_values, torch.float32)

    def build(self, documents: list[Document]) -> PackedBatch:
        """A batch of one sequence (B = 1): the documents one after another, then padding."""
        sequence = _Sequence(self._geometry, self._layout, self._special, self._latents)
        for number, document in enumerate(documents):
            sequence.add(number, document)
        return sequence.padded(self._size)


class _Sequence:
    """A sequence under construction: lists with one entry per token, ViT patch or latent token."""

    def __init__(
        self,
        geometry: ImageGeometry,
        layout: RotaryLayout,
        special: SpecialTokens,
        latents: TokenForm,
    ) -> None:
        self._geometry, self._layout, self._special = geometry, layout, special
        self._modality_of = (
            {special.vit_start: VIT, special.vit_end: VIT} if geometry.vit_own_delimiters else {}
        )
        self._num_spans = 0
        self._tokens: list[int] = []
        self._trained: list[bool] = []
        self._modality: list[int] = []
        self._document: list[int] = []
        self._task: list[int] = []
        self._span: list[int] = []
        self._positions = [torch.empty(0, 3, dtype=torch.int64)]
        self._vit = _Images(TokenForm(geometry.vit_patch_values, torch.float32))
        self._vae = _Images(latents)

    def add(self, number: int, document: Document) -> None:
        position = 0  # of every document: its place in the packed sequence must not change it
        for segment in document.segments:
            start = len(self._tokens)
            if isinstance(segment, TextSegment):
                self._append(segment.ids, segment.trained, TEXT, span=-1)
                self._set_delimiters(segment.ids, start)
                positions_T3, position = text_positions(position, len(segment.ids))
            else:
                self._append_image(segment, start)
                positions_T3, position = image_positions(
                    position, segment.rows, segment.columns, self._layout
                )
            self._positions.append(positions_T3)
        self._document += [number] * document.num_tokens
        self._task += [document.task] * document.num_tokens

    def _append(self, ids: list[int], trained: bool, modality: int, span: int) -> None:
        self._tokens += ids
        self._trained += [trained] * len(ids)
        self._modality += [modality] * len(ids)
        self._span += [span] * len(ids)

    def _set_delimiters(self, ids: list[int], start: int) -> None:
        for place, token in enumerate(ids if self._modality_of else (), start):
            self._modality[place] = self._modality_of.get(token, TEXT)

    def _append_image(self, segment: VitSegment | VaeSegment, start: int) -> None:
        count, span = segment.rows * segment.columns, self._num_spans
        self._num_spans += 1
        if isinstance(segment, VitSegment):
            self._append([self._special.vit] * count, False, VIT, span)
            at = _vit_coords(*segment.grid, self._geometry.vit_merge)
            self._vit.add(segment.patches, at, span, range(start, start + count))
        else:
            self._append([self._special.vae] * count, False, VAE, span)
            at = _vae_coords(segment.rows, segment.columns)
            self._vae.add(segment.latents, at, span, range(start, start + count))

    def padded(self, size: SequenceSize) -> PackedBatch:
        """The sequence as a batch of one, every list padded to its static size."""
        num_tokens, num_patches = size.num_tokens, size.num_vit_patches
        if num_patches is None:
            num_patches = size.num_vit_tokens * self._geometry.vit_merge**2
        vit_values, vit_coords, vit_image = self._vit.padded(num_patches)
        latents, vae_coords, vae_image = self._vae.padded(size.num_vae_tokens)
        return PackedBatch(
            tokens=_padded(_int64(self._tokens), num_tokens, self._special.pad),
            modality=_padded(_int64(self._modality), num_tokens, PADDING),
            document=_padded(_int64(self._document), num_tokens, -1),
            span=_padded(_int64(self._span), num_tokens, -1),
            positions=_padded(torch.cat(self._positions), num_tokens, 0),
            labels=_padded(self._labels(), num_tokens, IGNORE_INDEX),
            task=_padded(_int64(self._task), num_tokens, NO_TASK),
            vit_patches=vit_values,
            vit_coords=vit_coords,
            vit_image=vit_image,
            vit_index=_padded(self._vit.index(), size.num_vit_tokens, num_tokens),
            latents=latents,
            vae_coords=vae_coords,
            vae_image=vae_image,
            vae_index=_padded(self._vae.index(), size.num_vae_tokens, num_tokens),
        )

    def _labels(self) -> torch.Tensor:
        """The next token if that token is trained. A document's first token never is, so no label crosses documents."""
        following = zip(self._tokens[1:], self._trained[1:], strict=True)
        return _int64([token if trained else IGNORE_INDEX for token, trained in following])


class _Images:
    """Values, coordinates, span numbers and positions of all images of one kind in a sequence."""

    def __init__(self, form: TokenForm) -> None:
        self._values = [torch.empty(0, form.num_values, dtype=form.dtype)]
        self._coords: list[torch.Tensor] = []
        self._spans: list[torch.Tensor] = []
        self._index: list[int] = []

    def add(
        self, values_NQ: torch.Tensor, coords_N2: torch.Tensor, span: int, positions: range
    ) -> None:
        self._values.append(values_NQ)
        self._coords.append(coords_N2)
        self._spans.append(torch.full((len(values_NQ),), span))
        self._index += positions

    def padded(self, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """((1, length, Q) values, (1, length, 2) coordinates, (1, length) span numbers)."""
        values_NQ = torch.cat(self._values)
        coords_N2 = torch.cat([torch.empty(0, 2, dtype=torch.int64), *self._coords])
        spans_N = torch.cat([torch.empty(0, dtype=torch.int64), *self._spans])
        return (
            _padded(values_NQ, length, 0),
            _padded(coords_N2, length, 0),
            _padded(spans_N, length, -1),
        )

    def index(self) -> torch.Tensor:
        return _int64(self._index)


# Cached: images come in few sizes, and computing coordinates was a tenth of the time of building a sequence. Sharing the results is
# safe, because ``padded`` copies them.
_vit_coords = lru_cache(256)(vit_patch_coords)
_vae_coords = lru_cache(256)(coords)


def _int64(values: list[int]) -> torch.Tensor:
    """``torch.tensor(values, dtype=int64)`` through NumPy: for lists, in a third of the time."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _padded(values: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    """(1, length, ...): ``values`` along dim 1, then ``fill``."""
    out = values.new_full((1, length, *values.shape[1:]), fill)
    out[0, : len(values)] = values
    return out
