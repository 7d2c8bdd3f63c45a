"""Protocols for reading stored tensors one at a time, which every checkpoint format implements, and readers that wrap another."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Shape = tuple[int, ...]
Entries = Mapping[str, Shape | None]
"""What a checkpoint has, by name: the shape of a tensor, None for anything else."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""A part of a tensor: its first index and its size in every dim."""

# Our name, and the one of releases for unmapped layers.
_SELECTION_BIAS = re.compile(r"\.moe\.router\.\w+\.bias$|\.e_score_correction_bias$")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_values * self.dtype.itemsize

    def placeholder(self) -> Tensor:
        """A tensor of this shape and dtype on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def box_of(tensor: Tensor) -> Box:
    """The part of ``tensor`` that this rank holds: its shard of a DTensor, else all."""
    if isinstance(tensor, DTensor):
        (chunk,) = tensor.__create_chunk_list__()
        return tuple(chunk.offsets), tuple(chunk.sizes)
    return (0,) * tensor.dim(), tuple(tensor.shape)


def cut(tensor: Tensor, box: Box) -> Tensor:
    """A view of the part of ``tensor`` in ``box``."""
    for dim, (start, size) in enumerate(zip(*box, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


class TensorReader(Protocol):
    """Tensors on disk, read one at a time. ``tensors``: name -> shape and dtype, in the order that is cheapest to read in."""

    tensors: Mapping[str, TensorSpec]

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        ...


class PartReader(TensorReader, Protocol):
    """A ``TensorReader`` that need not read the whole of a tensor."""

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """The tensor, or the part of it in ``box``, on the CPU."""
        ...


class CheckpointReader(TensorReader, Protocol):
    """A model's tensors in a folder, under our names. ``step``: the training step of the checkpoint; None if it has no training
    state."""

    folder: Path

    @property
    def step(self) -> int | None: ...

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill ``tensors`` in place, in their own dtype; a sharded tensor (DTensor) gets its shard. Not a collective."""
        ...


# Called with (bytes done, bytes in total) while a model is written.
ProgressCallback = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """The ``ProgressCallback`` that does nothing."""


def reporting_progress(
    value: Callable[[str], Tensor], specs: Mapping[str, TensorSpec], progress: ProgressCallback
) -> Callable[[str], Tensor]:
    """``value``, wrapped to call ``progress`` for every tensor of ``specs``."""
    done, total = 0, total_bytes(specs.values())

    def reported_value(name: str) -> Tensor:
        nonlocal done
        done += specs[name].num_bytes
        progress(done, total)
        return value(name)

    return reported_value


class PartialReader:
    """Only the tensors ``names`` of ``reader``, in this order."""

    def __init__(self, reader: PartReader, names: Iterable[str]) -> None:
        self.tensors: Mapping[str, TensorSpec] = {name: reader.tensors[name] for name in names}
        self.read = reader.read


class CastingReader:
    """The tensors of ``reader`` cast to ``dtype`` (None: as stored). Integers are not cast, nor are selection biases: experts are
    selected by sums in float32, so a rounded bias could select others. Reading raises ValueError where a cast overflows."""

    def __init__(self, reader: TensorReader, dtype: torch.dtype | None) -> None:
        self._reader = reader
        self.tensors = {
            name: spec
            if dtype is None or _SELECTION_BIAS.search(name) or not spec.dtype.is_floating_point
            else TensorSpec(spec.shape, dtype)
            for name, spec in reader.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        values, dtype = self._reader.read(name), self.tensors[name].dtype
        cast = values.to(dtype)
        if dtype != values.dtype and cast.isinf().any():
            _check_stays_finite(name, values, cast)
        return cast


def _check_stays_finite(name: str, values: Tensor, cast: Tensor) -> None:
    lost = cast.isinf() & values.isfinite()
    if lost.any():
        largest, dtype = float(values[lost].abs().max()), str(cast.dtype).removeprefix("torch.")
        raise ValueError(
            f"--dtype: {name} holds values up to {largest:g}, which are infinite in {dtype}; choose another --dtype, or leave it out"
        )


def total_bytes(specs: Iterable[TensorSpec]) -> int:
    return sum(spec.num_bytes for spec in specs)


def some_of(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
