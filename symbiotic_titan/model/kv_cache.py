"""Keys and values of columns that were read before, so that rows can be read chunk by chunk: a prompt, then a token at a time, or
a prompt, then an image again and again.

A chunk is a batch whose columns follow those of the chunks before it. Padding stays where it was read and nobody sees it, so rows
of different lengths are not moved; a token's place is what ``positions`` says, not its column.

Letters: B rows, T columns of a chunk, S columns read so far and the chunk's, J key/value heads, C head width.
"""

import torch

from symbiotic_titan.model.masks import Columns
from symbiotic_titan.sequence.batch import PackedBatch


class LayerCache:
    """Keys and values of one layer. The memory grows by doubling, so a column is copied about once."""

    def __init__(self) -> None:
        self._length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def with_chunk(
        self, k_BuTC: torch.Tensor, v_BuTC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, J, S, C) keys and values: those kept and, behind them, a chunk's. The next call overwrites the chunk's unless
        ``keep`` comes between."""
        self._keys, self._values = self._with(self._keys, k_BuTC), self._with(self._values, v_BuTC)
        end = self._length + k_BuTC.shape[2]
        return self._keys[:, :, :end], self._values[:, :, :end]

    def append(self, num_columns: int) -> None:
        """Keep the columns of the chunk that was joined last."""
        self._length += num_columns

    def _with(self, held_BuNC: torch.Tensor | None, new_BuTC: torch.Tensor) -> torch.Tensor:
        start, end = self._length, self._length + new_BuTC.shape[2]
        if held_BuNC is None or held_BuNC.shape[2] < end:
            size = list(new_BuTC.shape)
            size[2] = end if held_BuNC is None else max(end, 2 * held_BuNC.shape[2])
            larger_BuNC = new_BuTC.new_empty(size)
            if held_BuNC is not None:
                larger_BuNC[:, :, :start] = held_BuNC[:, :, :start]
            held_BuNC = larger_BuNC
        held_BuNC[:, :, start:end] = new_BuTC
        return held_BuNC


class KeyValueCache:
    """The columns of B rows that every layer has read. Given to the model with the next chunk; nothing of a chunk is kept unless
    ``keep`` says so. Without gradients."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        self._columns: Columns | None = None

    @property
    def length(self) -> int:
        """Columns kept."""
        return 0 if self._columns is None else self._columns.document.shape[1]

    def columns_with(self, chunk: PackedBatch) -> Columns:
        """What the mask's rule asks of every column, kept and the chunk's."""
        new = Columns(chunk.document, chunk.span, chunk.modality)
        if self._columns is None:
            return new
        return Columns(*(torch.cat(pair, dim=1) for pair in zip(self._columns, new, strict=True)))

    def append(self, chunk: PackedBatch) -> None:
        """Keep the chunk that the model has just read."""
        self._columns = self.columns_with(chunk)
        for layer in self.layers:
            layer.append(chunk.tokens.shape[1])
