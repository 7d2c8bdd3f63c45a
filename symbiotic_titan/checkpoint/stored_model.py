"""What every stored model can do, whichever files it lies in."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

_SELECTION_BIAS = re.compile(r"\.moe\.router\.\w+\.bias$")


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
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        return self.num_values * self.dtype.itemsize

    def placeholder(self) -> Tensor:
        """A tensor of this kind without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class StoredModel(Protocol):
    """A model's tensors in a folder, under our names, read one at a time.

    tensors  name -> kind, in an order in which reading costs least.
    step     the training step it was saved at; None where it holds the model alone.
    """

    folder: Path
    tensors: Mapping[str, TensorKind]

    @property
    def step(self) -> int | None: ...

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        ...

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
    compared."""

    def __init__(self, stored: StoredModel, dtype: torch.dtype | None) -> None:
        self._stored = stored
        self.tensors = {
            name: kind
            if dtype is None or _SELECTION_BIAS.search(name)
            else TensorKind(kind.shape, dtype)
            for name, kind in stored.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        return self._stored.read(name).to(self.tensors[name].dtype)


def total_bytes(kinds: Iterable[TensorKind]) -> int:
    return sum(kind.num_bytes for kind in kinds)


def some_of(names: Iterable[str]) -> str:
    """At most three of the names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
