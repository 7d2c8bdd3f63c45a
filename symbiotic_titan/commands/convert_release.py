"""The commands of symbiotic convert that read a release: from-hf, which imports it, and tokenizer, which makes its tokenizer.json."""

import argparse
import sys
from pathlib import Path

from torchtitan.config import TORCH_DTYPE_MAP

from symbiotic_titan.commands.convert_options import measured, showing_bytes, without_extension
from symbiotic_titan.config.files import check_file, replacing
from symbiotic_titan.config.tokenizer import Tokenizer
from symbiotic_titan.data.tiktoken_files import tokenizer_json
from symbiotic_titan.data.tokenizer import open_tokenizer
from symbiotic_titan.hf.import_model import import_model
from symbiotic_titan.hf.model import HuggingFaceModel
from symbiotic_titan.hf.release_files import RELEASE_FILES, UNMAPPED
from symbiotic_titan.hf.spare_rows import TABLES, with_spare_rows
from symbiotic_titan.model import model_config
from symbiotic_titan.partition.conversion import parts_table
from symbiotic_titan.weights.new_folder import check_apart


def check_release(folder: Path) -> None:
    """Pass if ``--hf`` is a folder.

    Raises:
        ValueError: it is a file, does not exist, or is the name of a model on a hub.
    """
    if not folder.is_dir():
        found = "is a file" if folder.is_file() else "no such folder"
        raise ValueError(
            f"--hf: {folder}: {found}; give the local folder of a download (nothing is fetched here)"
        )


def from_hf(options: argparse.Namespace, overrides: list[str]) -> None:
    if others := without_extension(overrides):
        raise ValueError(f"from-hf reads no config, so it has no use for {' '.join(others)}")
    check_release(options.hf)
    check_apart(options.out, [options.hf])
    with measured():
        release = HuggingFaceModel(options.hf)
        import_model(
            release,
            options.out,
            dtype=TORCH_DTYPE_MAP[options.dtype] if options.dtype else None,
            shape_only=options.shape_only,
            spare_rows=options.spare_rows,
            overwrite=options.overwrite,
            progress=showing_bytes(),
        )
    args = release.args
    print(
        f"{release.model_type}: {args.num_layers} layers, {args.num_experts} experts, top-{args.top_k}, "
        f"{sum(spec.num_values for spec in release.tensors.values()):,} parameters"
    )
    print(parts_table(release.tensors))
    if unmapped := release.unmapped.tensors:
        print(
            f"not mapped, as the network has no such part; {RELEASE_FILES}/{UNMAPPED} keeps it for to-hf:\n{parts_table(unmapped)}"
        )
    if release.z_loss:
        layers = args.num_layers - args.num_dense_layers
        print(
            f"trained with a router z-loss of {release.z_loss:g} in each of {layers} layers; to go on with it: "
            f"losses.z_loss = {release.z_loss * layers:g} (of the mean over layers)"
        )
    num_rows = with_spare_rows(args, options.spare_rows).vocab_size
    if num_rows > args.vocab_size:
        print(
            f"spare embeddings: {args.vocab_size:,} -> {num_rows:,} rows of {' and '.join(TABLES)}; each new row is the mean of the others"
        )
    if warning := tokenizer_warning(options.hf, num_rows):
        print(f"warning: {warning}", file=sys.stderr)
    flavor = options.out / model_config.FILE_NAME
    print(
        f"written to {options.out}; next, as a run needs the latent parts too:\n  symbiotic convert partition "
        f"--checkpoint {options.hf if options.shape_only else options.out} --config CONFIG --out START\n"
        f'where CONFIG has model.flavor = "{flavor}"; it trains from START'
    )


def tokenizer_warning(release: Path, num_rows: int) -> str | None:
    """What to do where a release's tokenizer has no room for our special tokens in ``num_rows`` embeddings, or is no tokenizer.json."""
    try:
        tokenizer = open_tokenizer(Tokenizer(kind="huggingface", path=str(release)))
    except ValueError as error:
        return str(error)
    more = tokenizer.vocab_size - num_rows
    if more <= 0:
        return None
    return (
        f"the tokenizer has {tokenizer.vocab_size:,} ids with the special tokens that it lacks ({', '.join(tokenizer.added)}), the model "
        f"has {num_rows:,} embeddings; add --spare-rows {more}, or name unused tokens of the file in [tokenizer.special]"
    )


def tokenizer(options: argparse.Namespace, overrides: list[str]) -> None:
    if overrides:
        raise ValueError(f"tokenizer reads no config, so it has no use for {' '.join(overrides)}")
    if not options.vocabulary.is_file():
        raise ValueError(f"--vocabulary: {options.vocabulary}: no such file")
    check_apart(options.out, [options.vocabulary])
    check_file(options.out, "--out")
    if options.out.exists() and not options.overwrite:
        raise ValueError(
            f"{options.out} exists; choose another --out, or replace it with --overwrite"
        )
    try:
        made = tokenizer_json(options.vocabulary, options.pattern)
    except ValueError as error:
        raise ValueError(f"--vocabulary: {options.vocabulary}: {error}") from None
    with replacing(options.out) as unfinished:
        unfinished.write_text(made.text, encoding="utf-8")
    print(
        f"{made.num_ranks:,} tokens and {len(made.special):,} special ones, written to {options.out}; "
        f'tokenizer.kind = "huggingface" reads it'
    )
