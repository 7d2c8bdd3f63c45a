"""A released model -> a distributed checkpoint, with its shape and what else belongs to it beside."""

from pathlib import Path

import torch

from symbiotic_titan.hf.model import (
    HuggingFaceModel,
    keep_source,
    source_bytes,
)
from symbiotic_titan.model import model_config as shape_file
from symbiotic_titan.weights.dcp import write_model
from symbiotic_titan.weights.new_folder import new_folder
from symbiotic_titan.weights.reader import (
    InDtype,
    Watch,
    nobody,
    watched,
)


def import_model(
    stored: HuggingFaceModel,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    shape_only: bool = False,
    overwrite: bool = False,
    watch: Watch = nobody,
) -> None:
    """Write ``out``: the tensors in ``dtype`` (None: as they are), a file with the model's shape, and what the released model has
    besides, bit for bit. ``shape_only``: without our tensors, which are then read where they are.

    Raises:
        ValueError: ``out`` exists, or the disk has no room.
        OSError: the disk is full, or the like.
    """

    def finish(folder: Path) -> None:
        shape_file.write_model_config(folder / shape_file.NAME, stored.args)
        keep_source(stored, folder)

    if shape_only:
        with new_folder(out, overwrite=overwrite, num_bytes=source_bytes(stored)) as folder:
            finish(folder)
        return
    values = InDtype(stored, dtype)
    value = watched(values.read, values.tensors, watch)
    write_model(
        out,
        values.tensors,
        value,
        finish,
        finish_bytes=source_bytes(stored),
        overwrite=overwrite,
    )
