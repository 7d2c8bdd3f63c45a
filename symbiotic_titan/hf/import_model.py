"""A released model -> a distributed checkpoint, with its model config and its release files."""

from pathlib import Path

import torch

from symbiotic_titan.hf.model import HuggingFaceModel
from symbiotic_titan.hf.release_files import (
    copy_release_files,
    release_files_bytes,
)
from symbiotic_titan.hf.spare_rows import SpareRowsReader, with_spare_rows
from symbiotic_titan.model import model_config
from symbiotic_titan.weights.dcp import write_model
from symbiotic_titan.weights.new_folder import new_folder
from symbiotic_titan.weights.reader import (
    CastingReader,
    ProgressCallback,
    no_progress,
    reporting_progress,
)


def import_model(
    release: HuggingFaceModel,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    shape_only: bool = False,
    spare_rows: int = 0,
    overwrite: bool = False,
    progress: ProgressCallback = no_progress,
) -> None:
    """Write ``out``: the tensors in ``dtype`` (None: as stored), model.json, and the release files bit for bit. ``shape_only``:
    without the tensors, which other commands then read from the release. ``spare_rows``: at least so many rows are added to the
    embedding table and the output projection.

    Raises:
        ValueError: ``out`` exists, the disk has no room, or ``spare_rows`` is negative or has no tensors to add to.
        OSError: writing failed.
    """
    if shape_only and spare_rows:
        raise ValueError(
            "--spare-rows: adds rows to tensors, which --shape-only does not write; leave one of them out"
        )
    args = with_spare_rows(release.args, spare_rows)

    def finish(folder: Path) -> None:
        model_config.write_model_config(folder / model_config.FILE_NAME, args)
        copy_release_files(release, folder)

    if shape_only:
        size = release_files_bytes(release)
        with new_folder(out, overwrite=overwrite, num_bytes=size) as folder:
            finish(folder)
        return
    tensors = CastingReader(SpareRowsReader(release, args.vocab_size), dtype)
    write_model(
        out,
        tensors.tensors,
        reporting_progress(tensors.read, tensors.tensors, progress),
        finish,
        finish_bytes=release_files_bytes(release),
        overwrite=overwrite,
    )
