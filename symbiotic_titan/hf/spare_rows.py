"""Further rows for the embedding table and the output projection of a released model whose vocabulary fills them.

Special tokens that the release's tokenizer lacks take the ids after its own. Many releases have more rows than their tokenizer has ids;
where one has not, rows are added when it is imported. A new row is the mean of the existing ones, so a new token begins with an average
probability: a row of noise would have been far from all others, and so often the most probable.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from symbiotic_titan.model.args import ModelArgs, round_vocab_size
from symbiotic_titan.weights.reader import CheckpointReader, TensorSpec, cut
from symbiotic_titan.weights.safetensors import copy_into

TABLES = ("tok_embeddings.weight", "output.weight")


def with_spare_rows(args: ModelArgs, num_rows: int) -> ModelArgs:
    """``args`` with at least ``num_rows`` further embeddings.

    Raises:
        ValueError: ``num_rows`` is negative.
    """
    if num_rows < 0:
        raise ValueError(f"--spare-rows: must be zero or positive, got {num_rows}")
    if num_rows == 0:
        return args
    return replace(args, vocab_size=round_vocab_size(args.vocab_size + num_rows))


class SpareRowsReader:
    """The tensors of ``reader`` with ``vocab_size`` rows in both tables: a ``CheckpointReader``. Tied tables stay equal."""

    def __init__(self, reader: CheckpointReader, vocab_size: int) -> None:
        self._reader = reader
        self.folder: Path = reader.folder
        self.step = reader.step
        self.tensors: Mapping[str, TensorSpec] = {
            name: TensorSpec((vocab_size, *spec.shape[1:]), spec.dtype) if name in TABLES else spec
            for name, spec in reader.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        values = self._reader.read(name)
        more = self.tensors[name].shape[0] - len(values) if name in TABLES else 0
        if not more:
            return values
        mean_D = values.mean(0, dtype=torch.float32).to(values.dtype)
        return torch.cat([values, mean_D.expand(more, -1)])

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        copy_into(tensors, lambda name, box: cut(self.read(name), box))
