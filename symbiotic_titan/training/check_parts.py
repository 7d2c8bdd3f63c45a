"""What the parts of a run refuse as they are built, refused without building them: for the dry run of a run on another machine.

The rules are those of the parts themselves: of the tokenizer, the loaders and the schedules. Imported only where they are asked, so
that a config can be checked without the data pipeline.
"""

from dataclasses import replace
from pathlib import Path

from symbiotic_titan.build import build_tokenizer, loader_options
from symbiotic_titan.codecs.codec import codec_info
from symbiotic_titan.config.data import used_sources
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.tokenizer import Tokenizer as TokenizerSection
from symbiotic_titan.data.images import aspect_buckets
from symbiotic_titan.data.latents import generates
from symbiotic_titan.data.pipeline import checked_rows
from symbiotic_titan.data.tokenizer import open_tokenizer
from symbiotic_titan.flow.solver import SolverOptions
from symbiotic_titan.inference.held_out import TABLES, held_out_data
from symbiotic_titan.inference.images import choose_size
from symbiotic_titan.inference.prompts import PromptMaker
from symbiotic_titan.optim.lr_schedule import schedule_factor
from symbiotic_titan.sequence.geometry import ImageGeometry


class NoTokens:
    """In place of a tokenizer whose file is elsewhere: it adds no token to a document, so nothing is refused that fits with any."""

    opening: tuple[int, ...] = ()
    separator: tuple[int, ...] = ()

    def turn(self, role: str) -> tuple[int, ...]:
        return ()


def is_here(section: TokenizerSection) -> bool:
    """Whether the tokenizer can be opened on this machine, or names no file, which is a mistake on any."""
    return not section.path or Path(section.path).exists()


def check_parts(config: JobConfig) -> list[str]:
    """Refuse what tokenizer, loaders and schedules of a run on another machine would refuse. Returns what depends on that machine and was
    not checked, in words.

    Raises:
        ValueError: names key, value, rule and remedy; the same message as from the run.
    """
    check_rows(config)
    rules = [row.schedule() for row in config.optimizer.param_groups if not row.frozen]
    for changes in rules or [{}]:
        schedule_factor(replace(config.lr_scheduler, **changes), config.training.steps)
    unchecked = ["the device", "files of data and their contents"]
    if not is_here(config.tokenizer):
        unchecked.append(f"the tokenizer ({config.tokenizer.path} is not here)")
    if config.latents.path or config.latents.cache:
        unchecked.append("weights of the codec, cached latents")
    if config.checkpoint.enable:
        unchecked.append("checkpoints")
    return unchecked


def check_rows(config: JobConfig) -> None:
    """Refuse a vocabulary that the model has no rows for, and sources, for training or held out, that packed rows have no room for."""
    tokenizer = build_tokenizer(config) if is_here(config.tokenizer) else NoTokens()
    options = loader_options(config, tokenizer, 0, 1)  # type: ignore[arg-type]
    known = {key: options[key] for key in ("latents", "geometry", "tokenizer", "seq_len")}
    checked_rows(config.data, **known, table=TABLES["train"])
    if config.validation.enable:
        checked_rows(held_out_data(config), **known, table=TABLES["validation"])
    if generates(used_sources(config.data.sources, config.data.stages)):
        codec_info(config.latents)


def check_sampling(config: JobConfig, geometry: ImageGeometry, *, elsewhere: bool) -> None:
    """Check that the images of [sampling] can be generated and shown, and that the run trains image generation. ``elsewhere``:
    where the run's tokenizer is not here, the lengths of its prompts are not checked.

    Raises:
        ValueError: names the key.
    """
    sampling = config.sampling
    why = None
    if not sampling.prompts:
        why = "there are no prompts; give captions in sampling.prompts"
    elif not generates(used_sources(config.data.sources, config.data.stages)):
        why = "no source in [[data.sources]] has target images; add one"
    elif not (config.metrics.enable_tensorboard or config.metrics.enable_wandb):
        why = "sample grids are shown in TensorBoard and W&B; set metrics.enable_tensorboard = true"
    if why is not None:
        raise ValueError(f"sampling.enable = true: {why}, or set it to false")
    codec_info(config.latents)  # raises where latents could not be decoded
    try:
        _check_request(config, geometry, elsewhere)
    except ValueError as error:
        raise ValueError(f"[sampling] {error}") from None


def _check_request(config: JobConfig, geometry: ImageGeometry, elsewhere: bool) -> None:
    sampling, data, side = config.sampling, config.data, geometry.vae_token_pixels
    shift = config.flow.shift if sampling.shift is None else sampling.shift
    SolverOptions(sampling.steps, sampling.sampler, shift, sampling.guidance)
    buckets = aspect_buckets(data.vae_pixels, side, data.max_aspect)
    height, width = choose_size(None, sampling.aspect, buckets)
    if elsewhere and not is_here(config.tokenizer):
        return
    maker = PromptMaker(open_tokenizer(config.tokenizer), geometry, data, config.training.seq_len)
    captions = [maker.image(prompt) for prompt in sampling.prompts]
    num_tokens = height // side * (width // side)
    maker.check_room(captions, [num_tokens] * len(captions), "of its image")
