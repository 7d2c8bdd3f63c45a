"""symbiotic convert to-hf: a checkpoint as safetensors."""

import argparse
import sys
from pathlib import Path
from typing import Any

from torchtitan.config import TORCH_DTYPE_MAP

from symbiotic_titan.commands.convert_options import (
    byte_count,
    files_of,
    measured,
    read_config,
    showing_bytes,
    without_extension,
)
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.saved import saved_config
from symbiotic_titan.hf.export import (
    Export,
    export_understanding,
    export_whole,
    find_release_files,
)
from symbiotic_titan.hf.fold import folding_text
from symbiotic_titan.hf.model import check_holds_tensors, open_model
from symbiotic_titan.hf.release_files import release_files_of
from symbiotic_titan.hf.tokenizer_files import run_tokenizer
from symbiotic_titan.model import model_config
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.partition.conversion import parts_table
from symbiotic_titan.weights.new_folder import check_apart
from symbiotic_titan.weights.reader import some_of


def to_hf(options: argparse.Namespace, overrides: list[str]) -> None:
    check_holds_tensors(options.checkpoint, "--checkpoint")
    args, config, sources = exported_model(options, overrides)
    check_apart(options.out, [options.checkpoint, options.release, *sources])
    release_files = release_of(options, config)
    check_apart(options.out, [release_files])
    reader = open_model(options.checkpoint, options.weights)
    settings: dict[str, Any] = {
        "tokenizer": None if config is None else run_tokenizer(config.tokenizer),
        "shard_bytes": byte_count(options.shard_size),
        "dtype": TORCH_DTYPE_MAP[options.dtype] if options.dtype else None,
        "overwrite": options.overwrite,
        "progress": showing_bytes(),
    }
    with measured():
        if options.part == "whole":
            export = export_whole(
                reader, args, options.out, release_files=release_files, **settings
            )
        else:
            assert release_files is not None
            export = export_understanding(reader, args, release_files, options.out, **settings)
    print_export(export)
    print(f"written to {options.out}")
    if export.missing:
        print(
            f"warning: the release has {some_of(export.missing)}, which have no part in our network and are not written: they were not "
            "kept when it was imported, or belong to a layer with other experts",
            file=sys.stderr,
        )
    if export.note is not None:
        print(f"warning: {export.note}", file=sys.stderr)


def print_export(export: Export) -> None:
    parameters = sum(spec.num_values for spec in export.written.values())
    print(f"{len(export.written):,} tensors, {parameters:,} parameters")
    if export.folding is not None:
        print(folding_text(export.folding))
    if export.left_out:
        print(f"left out:\n{parts_table(export.left_out)}")


def release_of(options: argparse.Namespace, config: JobConfig | None) -> Path | None:
    """Where the files of the release are that the checkpoint comes from: of --release, else of the checkpoint, its flavor, or what its
    run started from. --part whole needs none.

    Raises:
        ValueError: there are none.
    """
    if options.release is not None:
        found = release_files_of(options.release)
        if found is None:
            raise ValueError(
                f"--release: {options.release} is neither a released model, with config.json and safetensors, nor a checkpoint made from "
                "one"
            )
        return found
    start = None if config is None else config.checkpoint.initial_load_path
    flavor = "" if config is None else config.model.flavor
    try:
        return find_release_files(options.checkpoint, flavor, *([Path(start)] if start else []))
    except ValueError:
        if options.part == "whole":
            return None
        raise


def exported_model(
    options: argparse.Namespace, overrides: list[str]
) -> tuple[ModelArgs, JobConfig | None, list[str | None]]:
    """(ModelArgs, config, the files they were read from): of --config, else of the checkpoint's model.json, without a config, else of
    its run's config."""
    own = options.checkpoint / model_config.FILE_NAME
    if options.config is None and own.is_file():
        if others := without_extension(overrides):
            raise ValueError(
                f"{own} has the model's shape, so there is no use for {' '.join(others)} without --config"
            )
        return model_config.read_model_config(own), None, []
    path = options.config or str(saved_config(options.checkpoint, overrides))
    config = read_config(path, overrides)
    return model_args(config), config, files_of(config, path)
