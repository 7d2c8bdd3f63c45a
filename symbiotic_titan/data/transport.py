"""A row on its way from a worker process: one tensor instead of one per field.

Every tensor sent between processes occupies a file descriptor on both sides while it lives; with a dozen fields per row,
rows made ahead would exhaust the usual limit of 1024.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch

from symbiotic_titan.sequence.batch import PackedBatch


@dataclass(frozen=True)
class FlatRow:
    """The bytes of all fields behind each other, widest elements first so that each stays aligned."""

    buffer: torch.Tensor
    layout: list[tuple[str, torch.dtype, tuple[int, ...]]]

    @classmethod
    def of(cls, row: PackedBatch) -> "FlatRow":
        values = {f.name: getattr(row, f.name) for f in fields(row)}
        names = sorted(values, key=lambda name: -values[name].element_size())
        buffer = torch.cat([values[name].reshape(-1).view(torch.uint8) for name in names])
        return cls(buffer, [(n, values[n].dtype, tuple(values[n].shape)) for n in names])

    def row(self) -> PackedBatch:
        """The row again; its fields are views of ``buffer``."""
        values: dict[str, Any] = {}
        start = 0
        for name, dtype, shape in self.layout:
            size = dtype.itemsize * torch.Size(shape).numel()
            values[name] = self.buffer[start : start + size].view(dtype).reshape(shape)
            start += size
        return PackedBatch(**values)
