"""Key/value cache: a prompt is read once and then extended token by token, or an image is denoised step by step after it.

Sequences are processed in chunks: a chunk is a batch whose tokens follow those of the previous chunks. Padding stays in the cache and
no token attends to it, so sequences of different lengths need no realignment; rotary uses ``positions``, not the cache index.

Shape letters: sequence/shapes.py. T are tokens of a chunk, N the cached tokens and the chunk's.
"""

from typing import Protocol

import torch

from symbiotic_titan.model.masks import Columns
from symbiotic_titan.sequence.batch import PackedBatch


class KeyValueSource(Protocol):
    """Where a layer finds the keys and values of tokens that are not in its input: those of earlier chunks, or of other ranks."""

    def complete(
        self, k_BuTC: torch.Tensor, v_BuTC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, u, N, C) keys and values of all tokens that those of the input may attend to."""
        ...


class SequenceShard(KeyValueSource, Protocol):
    """The part of every sequence that this process computes, see ``parallel.context_parallel``."""

    def columns(self, length: int, device: torch.device) -> torch.Tensor:
        """(T,) int64: which tokens of a sequence of ``length`` these are, in ascending order."""
        ...


class LayerCache:
    """Keys and values of one layer."""

    def __init__(self) -> None:
        self._length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def complete(
        self, k_BuTC: torch.Tensor, v_BuTC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, u, N, C) keys and values: the cached ones, then the chunk's, which the next call overwrites unless ``append`` comes
        first."""
        self._keys, self._values = self._with(self._keys, k_BuTC), self._with(self._values, v_BuTC)
        end = self._length + k_BuTC.shape[2]
        return self._keys[:, :, :end], self._values[:, :, :end]

    def append(self, num_tokens: int) -> None:
        """Add the first ``num_tokens`` tokens of the last chunk to the cache."""
        self._length += num_tokens

    def _with(self, held_BuNC: torch.Tensor | None, new_BuTC: torch.Tensor) -> torch.Tensor:
        start, end = self._length, self._length + new_BuTC.shape[2]
        if held_BuNC is None or held_BuNC.shape[2] < end:
            # Growing by doubling copies every token about once in total, instead of once per chunk.
            size = list(new_BuTC.shape)
            size[2] = end if held_BuNC is None else max(end, 2 * held_BuNC.shape[2])
            larger_BuNC = new_BuTC.new_empty(size)
            if held_BuNC is not None:
                larger_BuNC[:, :, :start] = held_BuNC[:, :, :start]
            held_BuNC = larger_BuNC
        held_BuNC[:, :, start:end] = new_BuTC
        return held_BuNC


class KeyValueCache:
    """Keys and values of all layers for the processed tokens of B sequences. Without gradients.

    A chunk enters the cache only by ``append``: the solver's noisy image tokens change at every step and must not be kept.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        self._columns: Columns | None = None

    @property
    def length(self) -> int:
        """Cached tokens per sequence."""
        return 0 if self._columns is None else self._columns.document.shape[1]

    def columns_with(self, chunk: PackedBatch) -> Columns:
        """What the attention rule reads, for the cached tokens and the chunk's."""
        # Padding is kept too, so that chunks stay rectangular; the rule masks it by its document number.
        new = Columns(chunk.document, chunk.span, chunk.modality)
        if self._columns is None:
            return new
        return Columns(*(torch.cat(pair, dim=1) for pair in zip(self._columns, new, strict=True)))

    def append(self, chunk: PackedBatch) -> None:
        """Add the chunk that the model has just processed."""
        self._columns = self.columns_with(chunk)
        for layer in self.layers:
            layer.append(chunk.tokens.shape[1])
