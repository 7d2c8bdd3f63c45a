"""Builders of the parts of a run from its config: loader, tokenizer, loss, parallel model."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.data.loader import PackedLoader
from symbiotic_titan.data.tokenizer import ByteTokenizer, FileTokenizer, open_tokenizer
from symbiotic_titan.losses.step import LossFunction
from symbiotic_titan.losses.terms import plain_text_errors
from symbiotic_titan.model.args import round_vocab_size
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.parallel.ranks import gather_over_ranks


def build_dataloader(
    *,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    table: str = "[[data.sources]]",
) -> PackedLoader:
    """Packed rows of the configured mixture, with the geometry of the configured flavor. ``table``: that of the sources, for messages."""
    # Imported here: a config is checked, or a model run, without the data pipeline.
    from symbiotic_titan.data.pipeline import build_loader

    workers = job_config.training.dataloader
    return build_loader(
        job_config.data,
        **loader_options(job_config, tokenizer, dp_rank, dp_world_size),
        num_workers=workers.num_workers,
        pin_memory=workers.pin_memory,
        prefetch_factor=workers.prefetch_factor,
        table=table,
    )


def loader_options(
    job_config: JobConfig, tokenizer: BaseTokenizer, dp_rank: int, dp_world_size: int
) -> dict[str, Any]:
    """Arguments of ``build_loader``: the shape of a row, and which rows belong to this rank."""
    args = model_args(job_config)
    return {
        "latents": job_config.latents,
        "geometry": args.geometry,
        "rotary_layout": args.rotary_layout,
        "tokenizer": tokenizer,
        "seq_len": job_config.training.seq_len,
        "local_batch_size": job_config.training.local_batch_size,
        "global_batch_size": global_batch_size(job_config, dp_world_size),
        "dp_rank": dp_rank,
        "dp_world_size": dp_world_size,
        "gather": gather_over_ranks if dp_world_size > 1 else None,
    }


def build_tokenizer(job_config: JobConfig) -> ByteTokenizer | FileTokenizer:
    """The tokenizer of [tokenizer].

    Raises:
        ValueError: its file cannot be used, or the model has fewer embeddings than it has ids.
    """
    tokenizer = open_tokenizer(job_config.tokenizer)
    model, num_rows, added = job_config.model, model_args(job_config).vocab_size, tokenizer.added
    if tokenizer.vocab_size > num_rows:
        key = "vocab_size" if model.vocab_size else "flavor"
        raise ValueError(
            f"[tokenizer]: {tokenizer.vocab_size} ids, among them {len(added)} special tokens that the file lacks, are more "
            f"than the {num_rows} embeddings of model.{key} = {getattr(model, key)!r}; for a model trained from scratch, set "
            f"model.vocab_size = {round_vocab_size(tokenizer.vocab_size)}; for a release, symbiotic convert from-hf --spare-rows "
            f"{tokenizer.vocab_size - num_rows} adds embeddings; or name unused tokens of the file in [tokenizer.special], or use a "
            f"file with at most {num_rows - len(added)} ids"
        )
    reserved = ", ".join(f"{token} as {role}" for role, token in tokenizer.reserved.items())
    logger.info(
        f"tokenizer: {tokenizer.fingerprint}, {tokenizer.vocab_size} ids of {num_rows} embeddings"
        + (f"; added after those of the file: {' '.join(added)}" if added else "")
        + (f"; reserved tokens of the file: {reserved}" if reserved else "")
    )
    return tokenizer


def build_loss(job_config: JobConfig, **kwargs: Any) -> LossFunction:
    """The terms of [losses], which the trainer sums over micro-batches and ranks."""
    settings = job_config.compile
    if not (settings.enable and "loss" in settings.components):
        return LossFunction(job_config.losses)
    # Compiled, the float32 copy of the logits and the softmax are never written to memory.
    compiled = torch.compile(plain_text_errors, backend=settings.backend, fullgraph=True)

    def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # Batches differ in their number of rows alone; a graph for any number needs no second compilation.
        rows_NV, labels_N = logits.flatten(0, -2), labels.flatten()
        for rows in (rows_NV, labels_N):
            torch._dynamo.maybe_mark_dynamic(rows, 0)
        return compiled(rows_NV, labels_N).view_as(labels)

    return LossFunction(job_config.losses, cross_entropy=cross_entropy)


def global_batch_size(config: JobConfig, num_data_ranks: int) -> int:
    """Rows of one optimizer step over all ranks; -1 in the config means one micro-batch per rank."""
    total = config.training.global_batch_size
    return total if total > 0 else config.training.local_batch_size * num_data_ranks


def with_rows_of_rank(config: JobConfig, num_ranks: int) -> JobConfig:
    """``config``, or where a rank has fewer rows of the global batch than ``training.local_batch_size``, a copy in which it is that many:
    so a run can go on on more ranks without another setting. Rows, their order and their noise stay the same."""
    # Bad degrees are refused later, by name.
    num_data_ranks = max(1, num_ranks // max(1, config.parallelism.context_parallel_degree))
    rows, rest = divmod(config.training.global_batch_size, num_data_ranks)
    if rest or not 0 < rows < config.training.local_batch_size:
        return config
    logger.info(
        f"training.local_batch_size: {rows} instead of {config.training.local_batch_size}, which is all that each of {num_data_ranks} "
        f"ranks has of training.global_batch_size = {config.training.global_batch_size}"
    )
    changed = copy.copy(config)
    changed.training = replace(config.training, local_batch_size=rows)
    return changed
