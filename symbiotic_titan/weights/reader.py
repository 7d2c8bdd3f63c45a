"""What every stored model can do, whichever files it lies in."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

# Under our names and, in what a release has besides, under its own.
_SELECTION_BIAS = re.compile(r"\.moe\.router\.\w+\.bias$|\.e_score_correction_bias$")


@dataclass(frozen=True)
class TensorKind:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorKind":
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_values * self.dtype.itemsize

    def placeholder(self) -> Tensor:
        """A tensor of this kind without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class StoredTensors(Protocol):
    """Tensors on disk, read one at a time. ``tensors``: name -> kind, in an order in which reading costs least."""

    tensors: Mapping[str, TensorKind]

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        ...


class StoredModel(StoredTensors, Protocol):
    """A model's tensors in a folder, under our names. ``step``: the training step it was saved at; None where it holds the model
    alone."""

    folder: Path

    @property
    def step(self) -> int | None: ...

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill ``tensors`` in place, in their own dtype; a sharded one takes its own part. Not collective."""
        ...


# (bytes read so far, bytes in all), called as a model is written.
Watch = Callable[[int, int], None]


def nobody(done: int, total: int) -> None:
    """The ``Watch`` of a writer that nobody watches."""


def watched(
    value: Callable[[str], Tensor], kinds: Mapping[str, TensorKind], watch: Watch
) -> Callable[[str], Tensor]:
    """``value``, which tells ``watch`` how far the writing of ``kinds`` has come."""
    done, total = 0, total_bytes(kinds.values())

    def watched_value(name: str) -> Tensor:
        nonlocal done
        done += kinds[name].num_bytes
        watch(done, total)
        return value(name)

    return watched_value


class InDtype:
    """The tensors of ``stored`` in another dtype, or as they are (None). Selection biases stay in float32, in which experts are
    compared. Reading raises ValueError where a value is too large for its dtype."""

    def __init__(self, stored: StoredTensors, dtype: torch.dtype | None) -> None:
        self._stored = stored
        self.tensors = {
            name: kind
            if dtype is None or _SELECTION_BIAS.search(name) or not kind.dtype.is_floating_point
            else TensorKind(kind.shape, dtype)
            for name, kind in stored.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        values, dtype = self._stored.read(name), self.tensors[name].dtype
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


def total_bytes(kinds: Iterable[TensorKind]) -> int:
    return sum(kind.num_bytes for kind in kinds)


def some_of(names: Iterable[str]) -> str:
    """At most three of the names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
