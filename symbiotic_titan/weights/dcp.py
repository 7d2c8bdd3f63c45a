"""Tensors of a distributed checkpoint, read one at a time and written one at a time: the model is never whole in memory.

A checkpoint is a folder that torch.distributed.checkpoint wrote on any number of ranks. The model's tensors lie in it under
their bare names, whether the folder holds a whole training state or the model alone.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem

from symbiotic_titan.weights.damage import damage_of
from symbiotic_titan.weights.new_folder import new_folder
from symbiotic_titan.weights.reader import (
    TensorKind,
    some_of,
    total_bytes,
)

# What a training checkpoint holds besides the model.
_TRAINING_STATE = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")


@contextmanager
def _single_process():
    """torch warns when one process saves or loads by itself, which is what happens here on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        yield


class _CachedReader(FileSystemReader):
    """Reads the metadata once; a training checkpoint's can be large, and every tensor's load asks for it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata: Metadata = super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class DistributedCheckpoint:
    """The model part of a distributed checkpoint: a ``StoredModel``.

    Raises:
        ValueError: the folder is no distributed checkpoint, or not a complete one.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"checkpoint {folder}: no such folder")
        damage = damage_of(folder)
        if not (folder / ".metadata").is_file() and any(folder.glob("step-*")):
            damage = "it is a folder of checkpoints; name one of them"
        if damage is None and not (folder / ".metadata").is_file():
            damage = "it is not a distributed checkpoint"
        if damage is not None:
            raise ValueError(f"checkpoint {folder}: {damage}")
        self.folder = folder
        self._reader = _CachedReader(folder)
        self.tensors: Mapping[str, TensorKind] = {
            name: TensorKind(tuple(entry.size), entry.properties.dtype)
            for name, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(_TRAINING_STATE)
        }

    def read(self, name: str) -> torch.Tensor:
        kind = self.tensors[name]
        tensors = {name: torch.empty(kind.shape, dtype=kind.dtype)}
        self.read_into(tensors)
        return tensors[name]

    def read_into(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """As ``StoredModel.read_into``; ValueError where a file's bytes are damaged."""
        self._load(dict(tensors))

    @property
    def step(self) -> int | None:
        """The training step it was saved at; None where it holds the model alone."""
        if "train_state.step" not in self._reader.read_metadata().state_dict_metadata:
            return None
        state = {"train_state.step": 0}
        self._load(state)
        return state["train_state.step"]

    def _load(self, state: dict[str, Any]) -> None:
        try:
            with _single_process():
                dcp.load(state, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:
            if len(state) > 1:  # one at a time, which tells the damaged file
                for name, value in state.items():
                    self._load({name: value})
            places = self._reader.read_metadata().storage_data or {}
            files = {place.relative_path for index, place in places.items() if index.fqn in state}
            cause, _ = next(iter(error.failures.values()))
            raise ValueError(
                f"checkpoint {self.folder}: {some_of(sorted(files))} cannot be read, its bytes are damaged "
                f"({type(cause).__name__}); use another copy of the checkpoint"
            ) from None


class _StreamingPlanner(DefaultSavePlanner):
    """Asks for a tensor's values at the moment that they are written."""

    def __init__(self, value: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self._value = value

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.index.fqn is not None and write_item.tensor_data is not None
        tensor = self._value(write_item.index.fqn)
        assert tensor.shape == write_item.tensor_data.size
        assert tensor.dtype == write_item.tensor_data.properties.dtype
        return tensor


def _disk_error(error: BaseException | None) -> OSError | None:
    """The disk's error that led to ``error``, if one did: torch.save ends in another while it handles that of the file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def write_model(
    folder: Path,
    tensors: Mapping[str, TensorKind],
    value: Callable[[str], torch.Tensor],
    finish: Callable[[Path], None] = lambda folder: None,
    *,
    finish_bytes: int = 0,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint of ``tensors``; ``value(name)`` is called for each in order, just before it is written.

    ``finish`` adds its own files to the folder, of ``finish_bytes`` but for small ones; the folder is renamed when all is written, so
    ``folder`` never looks complete before it is. One file per tensor: torch keeps a file's tensors in memory until the file is closed.

    Raises:
        ValueError: ``folder`` exists, or the disk has no room for it.
        OSError: the disk is full, or the like.
    """
    state = {name: kind.placeholder() for name, kind in tensors.items()}
    size = total_bytes(tensors.values()) + finish_bytes
    with new_folder(folder, overwrite=overwrite, num_bytes=size) as unfinished:
        writer = FileSystemWriter(unfinished, single_file_per_rank=False, thread_count=1)
        planner = _StreamingPlanner(value)
        try:
            with _single_process():
                dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise _disk_error(cause) or cause from None
        finish(unfinished)
