"""From config to loader: index the shards, compute the sizes, reject what cannot work. Runs once per process, before training."""

import logging
from collections.abc import Sequence
from math import ceil

import numpy as np
import torch

from symbiotic_titan.config.data import Data, DataSource, used_sources
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data.formats.shard import BadSample, Shard, Stored
from symbiotic_titan.data.image_files import check_image_folder
from symbiotic_titan.data.images import aspect_buckets
from symbiotic_titan.data.latent_cache import cached_sources, encoded_shards
from symbiotic_titan.data.latents import TargetImages
from symbiotic_titan.data.loader import Gather, PackedLoader, streams_of_rank
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.data.readers import Reader, check_names, index_source
from symbiotic_titan.data.samples import DocumentMaker, image_document_overhead
from symbiotic_titan.data.schemas import recognised
from symbiotic_titan.data.sequence_builder import SequenceBuilder
from symbiotic_titan.data.skip_list import check_damage, read_skip_list
from symbiotic_titan.data.stream_state import PipelineSpec
from symbiotic_titan.data.tokenizer import Tokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.positions import RotaryLayout
from symbiotic_titan.sequence.tasks import TASKS, task_number

# Samples of a source among which one is good enough to say in the log what it is.
LOOKED_AT = 4


def build_loader(
    config: Data,
    *,
    latents: Latents,
    geometry: ImageGeometry,
    rotary_layout: RotaryLayout,
    tokenizer: Tokenizer,
    seq_len: int,
    local_batch_size: int,
    global_batch_size: int,
    dp_rank: int = 0,
    dp_world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int | None = None,
    gather: Gather | None = None,
    table: str = "[[data.sources]]",
) -> PackedLoader:
    """The loader of data rank ``dp_rank``, with every shard indexed and every setting checked.

    prefetch_factor: rows that each worker makes ahead, in batches; None: 2.
    gather:          all-gather of a dict over the data ranks; required if there are several.
    table:           where the user wrote the sources of ``config``, for messages.

    Raises:
        ValueError: shards are missing, empty or unreadable, an image cannot fit a packed sequence, or the ranks cannot share the
            streams evenly.
    """
    logger = logging.getLogger(__name__)
    spec = build_spec(
        config, latents, geometry, rotary_layout, tokenizer, seq_len, global_batch_size, table
    )
    # Row r comes from stream r % num_streams: only whole rounds per batch give every number of ranks the same global batches.
    if global_batch_size % spec.num_streams:
        logger.warning(
            f"data.num_lanes: {spec.num_streams} does not divide the global batch size "
            f"{global_batch_size}: which rows share a global batch depends on the number of ranks"
        )
    if pin_memory and not torch.accelerator.is_available():
        logger.warning("training.dataloader.pin_memory: ignored, there is no accelerator here")
        pin_memory = False
    streams = streams_of_rank(spec.num_streams, dp_rank, dp_world_size)
    assert gather is not None or dp_world_size == 1
    return PackedLoader(
        spec,
        streams,
        local_batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
        gather=gather or (lambda states: [states]),
    )


def build_spec(
    config: Data,
    latents: Latents,
    geometry: ImageGeometry,
    rotary_layout: RotaryLayout,
    tokenizer: Tokenizer,
    seq_len: int,
    global_batch_size: int,
    table: str = "[[data.sources]]",
) -> PipelineSpec:
    """The spec of all streams. Sources whose weight is zero in every stage are left out. ``table``: that of the sources, for messages.

    Raises:
        ValueError: no source, shards that are missing, empty or unreadable, or images that cannot fit a packed sequence.
    """
    rows = checked_rows(config, latents, geometry, tokenizer, seq_len, table)
    size = sequence_size(config, seq_len, geometry)
    images = TargetImages(config, latents, geometry, [source for _, source in rows])
    rows = cached_sources(rows, config, latents, geometry, table)
    found = [
        indexed(config, s, f"{table} #{i} ({s.name})", encoded_shards(latents, table, s))
        for i, s in rows
    ]
    return PipelineSpec(
        config=config,
        sources=[source for _, source in rows],
        shards=[shards for shards, _ in found],
        listed=[listed for _, listed in found],
        num_streams=config.num_streams(global_batch_size),
        rows_per_step=global_batch_size,
        tokenizer=tokenizer.fingerprint,
        size=size,
        maker=DocumentMaker(config, geometry, images, tokenizer, seq_len),
        builder=SequenceBuilder(size, geometry, rotary_layout, tokenizer.special, images.form),
    )


def checked_rows(
    config: Data,
    latents: Latents,
    geometry: ImageGeometry,
    tokenizer: Tokenizer,
    seq_len: int,
    table: str,
) -> list[tuple[int, DataSource]]:
    """Sources of a positive weight, now or in a later stage, numbered as in ``table``, from 1. No file is opened.

    Raises:
        ValueError: there is none, or the settings leave no room for their samples.
    """
    # Each source keeps its number in the config, for messages: leaving some out would shift it.
    used = used_sources(config.sources, config.stages)
    rows = [(i, s) for i, s in enumerate(config.sources, start=1) if s in used]
    if not rows:
        raise ValueError(f"{table}: there is none; name at least one source")
    sources = [source for _, source in rows]
    for key in ("max_vit_tokens", "max_vae_tokens"):
        if getattr(config, key) > seq_len:
            raise ValueError(
                f"data.{key}: {getattr(config, key)} is more than a row holds, training.seq_len = "
                f"{seq_len}; lower it, or set 0 for as many as fit"
            )
    size = sequence_size(config, seq_len, geometry)
    overhead = image_document_overhead(tokenizer)
    _check_images_fit(config, sources, geometry, size, overhead)
    _check_texts_fit(sources, size, len(tokenizer.opening))
    for source in sources:
        task = TASKS[source.task]
        if latents.cache and task.has_targets and not task.is_cacheable:
            raise ValueError(
                f"latents.cache: holds one image of a sample, and samples of the task {task.name} may have several; encode while "
                "training, or remove these sources"
            )
    return rows


def indexed(
    config: Data, source: DataSource, where: str, encoded: Sequence[Stored] = ()
) -> tuple[list[Shard], np.ndarray]:
    """The shards of ``source``, checked for the fields that its task needs, and the samples that its ``skip_list`` names.

    encoded: where ``source`` is a cache of latents, the shards that it was made of, which the list names.
    """
    if source.image_folder:
        check_image_folder(source.image_folder, where)
    skips = source.bad_samples_of(config) == "skip"
    # A damaged end of a file is then one more bad sample, instead of an error before training.
    tolerant = skips or bool(source.skip_list)
    folder, limits = config.cache_folder, config.limits
    shards = index_source(source, where, cache_folder=folder, tolerant=tolerant, limits=limits)
    check_names(source, shards, where)
    _log_recognised(source, shards)
    listed = read_skip_list(source, encoded or shards, where)
    if source.skip_list and not skips:
        check_damage(shards, listed, where)
    return shards, listed


def _log_recognised(source: DataSource, shards: list[Shard]) -> None:
    """Say in the log what was recognised in the first good sample of ``source``, unless that is a plain one."""
    task, reader = TASKS[source.task], Reader(shards)
    for sample in range(min(shards[0].num_samples, LOOKED_AT)):
        try:
            text = recognised(task, reader.read(0, sample), source.keys)
        except (BadSample, RecursionError):
            continue
        if text:
            logging.getLogger(__name__).info(f"source {source.name!r}: {text}")
        return


def sequence_size(config: Data, seq_len: int, geometry: ImageGeometry) -> SequenceSize:
    """Room in a packed sequence of ``seq_len`` positions."""
    tokens, patches = geometry.vit_room(config.max_vit_tokens or seq_len, config.seen_pixels)
    return SequenceSize(
        seq_len,
        tokens,
        config.max_vae_tokens or seq_len,
        {task_number(task): config.row_tokens_of(task, seq_len) for task in config.max_row_share},
        patches,
    )


def _check_images_fit(
    config: Data,
    sources: list[DataSource],
    geometry: ImageGeometry,
    size: SequenceSize,
    overhead: int,
) -> None:
    tasks = {source.task for source in sources}
    for task in sorted(name for name in tasks if TASKS[name].input_images):
        num_tokens, _ = geometry.vit_budget(config.vit_pixels)
        num_text = overhead + 2  # a question and an answer of one token each
        pixels, step = config.vit_pixels, geometry.vit_token_pixels
        held = config.max_vit_tokens or size.num_tokens
        _check_image("vit", pixels, step, num_tokens, num_text, size, task, held)
    for task in sorted(name for name in tasks if TASKS[name].has_targets):
        step = geometry.vae_token_pixels
        buckets = aspect_buckets(config.vae_pixels, step, config.max_aspect)
        num_tokens = max((h * w // step**2 for h, w in buckets), default=0)  # 0 is refused below
        num_text = overhead + 1  # a caption of one token
        held = size.num_vae_tokens
        _check_image("vae", config.vae_pixels, step, num_tokens, num_text, size, task, held)


def _check_image(
    kind: str,
    pixels: int,
    step: int,
    num_tokens: int,
    num_text: int,
    size: SequenceSize,
    task: str,
    held: int,
) -> None:
    """Refuse sizes that the largest image with the least text does not fit: the sequence, the task's share of it, or ``held``, the
    image tokens that a sequence may hold. Training would otherwise skip such samples, or stop at the first one."""
    if not num_tokens:
        raise ValueError(
            f"data.{kind}_pixels: {pixels} pixels hold no token of {step} x {step}; set at least {step**2}"
        )
    needed = num_tokens + num_text
    if size.num_tokens < needed:
        raise ValueError(
            f"training.seq_len: {size.num_tokens} is too short for one image of {num_tokens} tokens + "
            f"{needed - num_tokens} of text; raise it to at least {needed} or lower data.{kind}_pixels"
        )
    if size.of_task(task_number(task)) < needed:
        raise ValueError(
            f"data.max_row_share.{task}: {size.of_task(task_number(task))} of {size.num_tokens} positions are too few for one "
            f"image of {num_tokens} tokens + {needed - num_tokens} of text; raise it to at least "
            f"{ceil(1000 * needed / size.num_tokens) / 1000}, or lower data.{kind}_pixels"
        )
    if held < num_tokens:
        raise ValueError(
            f"data.max_{kind}_tokens: {held} is too few for one image of {num_tokens} tokens; "
            f"raise it to at least {num_tokens} or lower data.{kind}_pixels"
        )


def _check_texts_fit(sources: list[DataSource], size: SequenceSize, opening: int) -> None:
    """Refuse a task's share of a sequence that holds only the ``opening`` tokens: splitting a text over it would never advance."""
    for source in sources:
        num_tokens = size.of_task(task_number(source.task))
        if TASKS[source.task].splits_text and num_tokens <= opening:
            raise ValueError(
                f"data.max_row_share.{source.task}: {num_tokens} of {size.num_tokens} positions are too few for any text; raise it"
            )
