"""What [sampling] asks for, checked before anything is built."""

from symbiotic_titan.codecs.files import codec_info
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.data.images import aspect_buckets
from symbiotic_titan.data.latents import generates
from symbiotic_titan.data.tokenizer import open_tokenizer
from symbiotic_titan.flow.sampler import FlowSampling
from symbiotic_titan.generation.images import choose_size
from symbiotic_titan.generation.prompts import PromptMaker
from symbiotic_titan.sequence.geometry import ImageGeometry


def check_sampling(config: JobConfig, geometry: ImageGeometry) -> None:
    """Pass if the pictures can be drawn and shown, and if the run teaches the model to draw.

    Raises:
        ValueError: names the key.
    """
    sampling = config.sampling
    if not sampling.enable:
        return
    why = None
    if not sampling.prompts:
        why = "there is nothing to draw; give captions in sampling.prompts"
    elif not generates(config.data.sources):
        why = "no source in [[data.sources]] has images to be generated; add one"
    elif not config.metrics.enable_tensorboard:
        why = "pictures are shown in TensorBoard; set metrics.enable_tensorboard = true"
    if why is not None:
        raise ValueError(f"sampling.enable = true: {why}, or set it to false")
    codec_info(config.latents)  # raises where nothing could decode a picture
    try:
        _check_request(config, geometry)
    except ValueError as error:
        raise ValueError(f"[sampling] {error}") from None


def _check_request(config: JobConfig, geometry: ImageGeometry) -> None:
    sampling, data, side = config.sampling, config.data, geometry.vae_token_pixels
    shift = config.flow.shift if sampling.shift is None else sampling.shift
    FlowSampling(sampling.steps, sampling.sampler, shift, sampling.guidance)
    buckets = aspect_buckets(data.vae_pixels, side, data.max_aspect)
    height, width = choose_size(None, sampling.aspect, buckets)
    maker = PromptMaker(open_tokenizer(config.tokenizer), geometry, data, config.training.seq_len)
    captions = [maker.image(prompt) for prompt in sampling.prompts]
    num_tokens = height // side * (width // side)
    maker.check_room(captions, [num_tokens] * len(captions), "of its image")
