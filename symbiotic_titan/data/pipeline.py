"""From config to PipelineSpec: index the shards, work out the sizes, refuse what cannot work. Runs once, before training."""

from math import ceil

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data.formats.shard import Shard
from symbiotic_titan.data.images import aspect_buckets
from symbiotic_titan.data.latent_cache import cached_sources
from symbiotic_titan.data.latents import TargetImages
from symbiotic_titan.data.packing import SequenceBuilder, SequenceSize
from symbiotic_titan.data.readers import check_names, index_source
from symbiotic_titan.data.samples import DocumentMaker, image_document_overhead
from symbiotic_titan.data.streams import PipelineSpec
from symbiotic_titan.data.tokenizer import Tokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.positions import RotaryLayout
from symbiotic_titan.sequence.tasks import TASKS, task_number


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
    """The spec of all streams; sources of weight zero are left out. ``table`` is where the user wrote the sources.

    Raises:
        ValueError: no source, shards that are missing, empty or unreadable, or images that cannot fit a row.
    """
    rows = [(i, s) for i, s in enumerate(config.sources, start=1) if s.weight > 0]
    if not rows:
        raise ValueError(f"{table}: there is none; name at least one source")
    sources = [source for _, source in rows]
    for key in ("max_vit_tokens", "max_vae_tokens"):
        if getattr(config, key) > seq_len:
            raise ValueError(
                f"data.{key}: {getattr(config, key)} is more than a row holds, training.seq_len = "
                f"{seq_len}; lower it, or set 0 for as many as fit"
            )
    size = row_size(config, seq_len, geometry)
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
    images = TargetImages(config, latents, geometry, sources)
    rows = cached_sources(rows, config, latents, geometry, table)
    return PipelineSpec(
        config=config,
        sources=[source for _, source in rows],
        shards=[indexed(config, s, f"{table} #{i} ({s.name})") for i, s in rows],
        num_streams=config.num_lanes or global_batch_size,
        tokenizer=tokenizer.fingerprint,
        size=size,
        maker=DocumentMaker(config, geometry, images, tokenizer, seq_len),
        builder=SequenceBuilder(size, geometry, rotary_layout, tokenizer.special, images.form),
    )


def indexed(config: Data, source: DataSource, where: str) -> list[Shard]:
    """The shards of ``source``, and a look at whether its samples have what its task needs."""
    tolerant = source.bad_samples_of(config) == "skip"
    shards = index_source(source, where, cache_folder=config.cache_folder, tolerant=tolerant)
    check_names(source, shards, where)
    return shards


def row_size(config: Data, seq_len: int, geometry: ImageGeometry) -> SequenceSize:
    """What a row of ``seq_len`` positions holds."""
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
        num_tokens = max((h * w // step**2 for h, w in buckets), default=0)
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
    """Refuse a row, or a part of it for ``task``, that is too short for the largest image with the least text, and a row that may
    hold fewer tokens of such images, ``held``, than one has."""
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
    """Refuse a share of a task whose texts are split that holds nothing after the ``opening`` tokens of a document."""
    for source in sources:
        num_tokens = size.of_task(task_number(source.task))
        if TASKS[source.task].splits_text and num_tokens <= opening:
            raise ValueError(
                f"data.max_row_share.{source.task}: {num_tokens} of {size.num_tokens} positions are too few for any text; raise it"
            )
