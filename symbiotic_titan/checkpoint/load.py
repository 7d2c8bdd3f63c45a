"""Loads a distributed checkpoint on many ranks when only the first rank has read its metadata.

``.metadata`` lists every shard of every rank that saved: 119 MB for 30 billion parameters on 256 ranks, and it takes longer to unpickle
than a rank's tensors take to read. torch.distributed.checkpoint has every rank plan its reads from all of it. Here the ranks say what
they need, the first one answers with the saved shards that overlap it, and each rank plans its reads from its answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from symbiotic_titan.weights.dcp import SafePlanner, SafeReader, cause_of, check_holds
from symbiotic_titan.weights.reader import Box, Entries, box_of


@dataclass
class Held:
    """What a checkpoint has of one entry. ``shards``: the saved ones and where their bytes are; of anything but a tensor there is one,
    without a box."""

    shape: tuple[int, ...] | None
    shards: list[tuple[Box | None, Any]] = field(default_factory=list)


def load(state: dict[str, Any], folder: Path, entries: Entries, metadata: Metadata | None) -> None:
    """As ``torch.distributed.checkpoint.load`` on all ranks of the default group.

    entries: of the checkpoint. metadata: also of the checkpoint; the first rank needs it, the others pass None.

    Raises:
        ValueError: the checkpoint lacks an entry of ``state``, or its bytes are damaged, or name what may run code.
    """
    planner = _Planner(folder, entries, metadata)
    try:
        dcp.load(state, storage_reader=_Reader(folder), planner=planner)
    except CheckpointException as error:
        cause = cause_of(error)
        if isinstance(cause, ValueError):
            raise cause from None
        raise ValueError(
            f"checkpoint {folder} cannot be read, its bytes are damaged ({type(cause).__name__}: {cause}); use another copy of the "
            "checkpoint, or name an older one with checkpoint.load_step"
        ) from error


class _Reader(SafeReader):
    """Leaves the metadata to the planner."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({}, storage_data={})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        self.storage_data = plan.storage_data
        return super().read_data(plan, planner)


class _Planner(SafePlanner):
    def __init__(self, folder: Path, entries: Entries, stored: Metadata | None) -> None:
        super().__init__()
        self._folder, self._entries, self._stored = folder, entries, stored

    def create_local_plan(self) -> LoadPlan:
        """On every rank: what it needs."""
        check_holds(self._folder, self._entries, self.state_dict)
        state = self.state_dict.items()
        needed = {name: box_of(v) if isinstance(v, Tensor) else None for name, v in state}
        return LoadPlan([], planner_data=needed)

    def create_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """On the first rank: what each of them gets."""
        assert self._stored is not None
        shards = SavedShards(self._stored)
        return [LoadPlan([], planner_data=shards.of(plan.planner_data)) for plan in plans]

    def finish_plan(self, plan: LoadPlan) -> LoadPlan:
        """On every rank: its reads."""
        self.metadata = as_metadata(plan.planner_data)
        reads = super().create_local_plan()
        return LoadPlan(reads.items, storage_data=self.metadata.storage_data)


class SavedShards:
    """Looks up shards in a checkpoint's metadata."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._places: Mapping[MetadataIndex, Any] = metadata.storage_data or {}
        self._boxes: dict[str, _Boxes] = {}

    def of(self, needed: Mapping[str, Box | None]) -> dict[str, Held]:
        """What the checkpoint has of the entries ``needed``, of tensors the shards that overlap the boxes."""
        return {name: self._held(name, box) for name, box in needed.items()}

    def _held(self, name: str, needed: Box | None) -> Held:
        entry = self._metadata.state_dict_metadata[name]
        if not isinstance(entry, TensorStorageMetadata):
            return Held(None, [(None, self._places[MetadataIndex(name)])])
        if name not in self._boxes:
            self._boxes[name] = _Boxes(entry.chunks)
        # Another shape is refused by the rank that asked, which needs no shards for that.
        fits = needed is not None and len(needed[0]) == len(entry.size)
        found = self._boxes[name].overlapping(needed) if needed is not None and fits else []
        held = Held(tuple(entry.size))
        for box in found:
            held.shards.append((box, self._places[MetadataIndex(name, torch.Size(box[0]))]))
        return held


class _Boxes:
    """The saved shards of a tensor."""

    def __init__(self, chunks: list[ChunkStorageMetadata]) -> None:
        self._boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]
        self._set = set(self._boxes)
        self._starts = np.array([box[0] for box in self._boxes])
        self._ends = self._starts + np.array([box[1] for box in self._boxes])

    def overlapping(self, needed: Box) -> list[Box]:
        if (
            needed in self._set
        ):  # the run is resumed on as many ranks; shards do not overlap each other
            return [needed]
        start = np.array(needed[0])
        meets = (self._starts < start + np.array(needed[1])) & (start < self._ends)
        return [self._boxes[i] for i in np.flatnonzero(meets.all(axis=1))]


def as_metadata(held: Mapping[str, Held]) -> Metadata:
    """``held`` as the metadata of a checkpoint that has nothing else."""
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, Any] = {}
    for name, part in held.items():
        if part.shape is None:
            entries[name] = dcp.metadata.BytesStorageMetadata()
            places[MetadataIndex(name)] = part.shards[0][1]
            continue
        chunks = []
        for box, place in part.shards:
            assert box is not None
            offset = torch.Size(box[0])
            chunks.append(ChunkStorageMetadata(offset, torch.Size(box[1])))
            places[MetadataIndex(name, offset)] = place
        entries[name] = TensorStorageMetadata(TensorProperties(), torch.Size(part.shape), chunks)
    return Metadata(entries, storage_data=places)
