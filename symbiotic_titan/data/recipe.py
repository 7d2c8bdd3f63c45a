"""From config to LaneRecipe: index the shards, work out the sizes, refuse what cannot work. Runs once, before training."""

from symbiotic_titan.config.data import Data, DataSource, Latents
from symbiotic_titan.data.images import aspect_buckets
from symbiotic_titan.data.lanes import LaneRecipe
from symbiotic_titan.data.latents import build_codec
from symbiotic_titan.data.packing import RowBuilder, RowSize
from symbiotic_titan.data.readers import index_source
from symbiotic_titan.data.samples import IMAGE_DOCUMENT_OVERHEAD, DocumentMaker
from symbiotic_titan.data.tokenizer import Tokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.positions import RotaryLayout


def build_recipe(
    config: Data,
    latents: Latents,
    geometry: ImageGeometry,
    rotary_layout: RotaryLayout,
    tokenizer: Tokenizer,
    seq_len: int,
    global_batch_size: int,
    table: str = "[[data.sources]]",
) -> LaneRecipe:
    """The recipe of all lanes; sources of weight zero are left out. ``table`` is where the user wrote the sources.

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
    size = RowSize(seq_len, config.max_vit_tokens or seq_len, config.max_vae_tokens or seq_len)
    _check_images_fit(config, sources, geometry, size)
    return LaneRecipe(
        config=config,
        sources=sources,
        shards=[index_source(s, f"{table} #{i} ({s.name})") for i, s in rows],
        num_lanes=config.num_lanes or global_batch_size,
        size=size,
        maker=DocumentMaker(config, geometry, build_codec(latents, geometry), tokenizer, seq_len),
        builder=RowBuilder(size, geometry, rotary_layout, tokenizer.special),
    )


def _check_images_fit(
    config: Data, sources: list[DataSource], geometry: ImageGeometry, size: RowSize
) -> None:
    tasks = {source.task for source in sources}
    if "mmu" in tasks:
        num_tokens = config.vit_pixels // geometry.vit_token_pixels**2
        # A question and an answer of one token each.
        _check_image("vit", config.vit_pixels, geometry.vit_token_pixels, num_tokens, 2, size)
    if tasks & {"t2i", "t2i_long"}:
        step = geometry.vae_token_pixels
        buckets = aspect_buckets(config.vae_pixels, step, config.max_aspect)
        num_tokens = max((h * w // step**2 for h, w in buckets), default=0)
        # A caption of one token.
        _check_image("vae", config.vae_pixels, step, num_tokens, 1, size)


def _check_image(
    kind: str, pixels: int, step: int, num_tokens: int, num_text: int, size: RowSize
) -> None:
    """Refuse a row that is too short for the largest image with the least text."""
    if not num_tokens:
        raise ValueError(
            f"data.{kind}_pixels: {pixels} pixels hold no token of {step} x {step}; set at least {step**2}"
        )
    needed = num_tokens + num_text + IMAGE_DOCUMENT_OVERHEAD
    if size.num_tokens < needed:
        raise ValueError(
            f"training.seq_len: {size.num_tokens} is too short for one image of {num_tokens} tokens + "
            f"{needed - num_tokens} of text; raise it to at least {needed} or lower data.{kind}_pixels"
        )
    held = {"vit": size.num_vit_tokens, "vae": size.num_vae_tokens}[kind]
    if held < num_tokens:
        raise ValueError(
            f"data.max_{kind}_tokens: {held} is too few for one image of {num_tokens} tokens; "
            f"raise it to at least {num_tokens} or lower data.{kind}_pixels"
        )
