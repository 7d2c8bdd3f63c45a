"""Generator: images and texts from a trained model, in a few lines.

    generator = Generator.load("outputs/debug")
    generator.images(["a red circle"], seed=1)[0].save("circle.png")
    generator.text(["Which digit is this?"], images=[[Image.open("seven.png")]])[0].text

The result for a prompt depends on the seed and on the prompt's number, not on other prompts or the batch size.
Prompts are laid out as training lays out its documents: see ``inference.prompts``.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from symbiotic_titan.build import build_tokenizer
from symbiotic_titan.codecs.codec import Codec, build_codec
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.config.optimizer import Weights
from symbiotic_titan.config.saved import saved_config
from symbiotic_titan.data.documents import Document
from symbiotic_titan.data.images import aspect_buckets
from symbiotic_titan.data.latents import to_image
from symbiotic_titan.data.tokenizer import Tokenizer
from symbiotic_titan.flow.solver import SolverOptions
from symbiotic_titan.inference.chunks import ChunkMaker
from symbiotic_titan.inference.images import (
    LatentGrid,
    Picture,
    Size,
    choose_size,
    generate_latents,
    noise_of_images,
    unpatchified,
)
from symbiotic_titan.inference.loaded_model import LoadedModel
from symbiotic_titan.inference.prompts import (
    PromptMaker,
    Text,
    ids_of,
)
from symbiotic_titan.inference.session import (
    Autocast,
    Session,
)
from symbiotic_titan.inference.text import (
    AnyOf,
    Completion,
    LogLikelihood,
    TextSampling,
    TokenSampler,
    completion_of,
    continue_prompts,
    endings_of,
    log_likelihoods_of,
)
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.parallel.ranks import (
    DataRanks,
    join_ranks,
)
from symbiotic_titan.weights.damage import find_checkpoint

logger = logging.getLogger(__name__)

# A checkpoint without these was never trained on target images.
_IMAGE_PARTS = ("latent_embedding.", "flow_head.")

Advance = Callable[[int], None]


def _no_progress(count: int) -> None:
    return None


def _uncounted(what: str, total: int) -> Advance:
    return _no_progress


class Generator:
    """Images, texts and log-likelihoods of ``model``, whose config is ``config``. No gradients, and no global random state.

    autocast: the precision that the model computes in. any_of: logical or over processes, of "is any sequence unfinished?".
    cached: use a key-value cache. checkpoint: origin of the weights, noted in pictures.

    Processes that share a model (FSDP, expert parallelism) must call the same methods with the same number of prompts,
    ``batch_size`` and sampler: forwards contain collectives, so all must run the same number of them.
    """

    def __init__(
        self,
        model: SymbioticModel,
        config: JobConfig,
        tokenizer: Tokenizer,
        device: torch.device,
        *,
        autocast: Autocast = contextlib.nullcontext,
        any_of: AnyOf = bool,
        cached: bool = True,
        checkpoint: str = "",
    ) -> None:
        self.model, self.config, self.tokenizer, self.device = model, config, tokenizer, device
        self.geometry = model.args.geometry
        self.cached = cached
        self._autocast, self._any_of, self._checkpoint = autocast, any_of, checkpoint
        self._prompts = PromptMaker(tokenizer, self.geometry, config.data, config.training.seq_len)
        self._chunks = ChunkMaker(
            self.geometry, model.args.rotary_layout, tokenizer.special, device
        )

    @classmethod
    def load(
        cls,
        config: JobConfig | Path | str,
        checkpoint: Path | str | None = None,
        overrides: Sequence[str] = (),
        *,
        cached: bool = True,
        weights: Weights = "trained",
    ) -> "Generator":
        """The config's model with the weights of ``checkpoint``: a checkpoint's folder, or a run's, for its newest complete one.
        None: the config's own run.

        config: a config; a TOML file; or the folder of a run or of one of its checkpoints, which then also gives the weights.
        ``overrides`` are as on the command line (``--section.key``, value, ...). weights: "ema" for the average that the run kept,
        see [ema].

        Raises:
            ValueError: a bad config, one found in a folder that names a module which ``overrides`` do not, or no complete checkpoint of
                its model with these ``weights``.
        """
        if not isinstance(config, JobConfig):
            path = Path(config)
            if path.is_dir():
                checkpoint = checkpoint or path
                path = saved_config(path, overrides)
            config = load_job_config(["--job.config_file", str(path), *overrides])
        config = copy.deepcopy(config)
        config.model.attention_backend = "sdpa"  # FlexAttention would compile for every new length
        ranks = join_ranks(config)
        folder = find_checkpoint(checkpoint or config.job.dump_folder, config.checkpoint.folder)
        loaded = LoadedModel(config, folder, ranks, weights)
        if not any(name.startswith(_IMAGE_PARTS) for name in loaded.stored.tensors):
            logger.warning(
                f"checkpoint {folder} has no parts that generate images: its images will be noise"
            )
        return cls(
            loaded.model,
            config,
            build_tokenizer(config),
            ranks.device,
            autocast=lambda: loaded.autocast,
            any_of=_any_of(ranks),
            cached=cached,
            checkpoint=str(folder) if weights == "trained" else f"{folder} {weights}",
        )

    @property
    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The precision that the model computes in, for callers that run it themselves."""
        return self._autocast()

    @cached_property
    def codec(self) -> Codec:
        """Decodes latents; raises ValueError where its weights are missing."""
        return build_codec(self.config.latents, self.device)

    @cached_property
    def buckets(self) -> list[Size]:
        """(height, width) in pixels of the images that can be generated: the buckets of training."""
        data = self.config.data
        return aspect_buckets(data.vae_pixels, self.geometry.vae_token_pixels, data.max_aspect)

    def images(
        self,
        prompts: Sequence[Text],
        *,
        steps: int = 50,
        guidance: float = 3.0,
        sampler: str = "euler",
        shift: float | None = None,
        seed: int = 0,
        size: Size | None = None,
        aspect: str | None = None,
        batch_size: int = 8,
        first_index: int = 0,
        advance: Advance = _no_progress,
    ) -> list[Picture]:
        """A picture of each caption.

        shift: None is [flow]'s. size: (height, width) of a bucket; aspect: "width:height", for the nearest bucket; without either,
        a square. first_index: number of the first prompt, to regenerate part of a longer list. advance: called after each step of
        the solver with the number of images in it.

        Raises:
            ValueError: a number or a name out of range, a caption longer than a row, or a codec without its weights.
        """
        shift = self.config.flow.shift if shift is None else shift
        sampling = SolverOptions(steps, sampler, shift, guidance)
        height, width = choose_size(size, aspect, self.buckets)
        side = self.geometry.vae_token_pixels
        grid = LatentGrid(height // side, width // side)
        captions = [self._prompts.image(prompt) for prompt in prompts]
        self._prompts.check_room(captions, [grid.num_tokens] * len(captions), "of its image")
        _ = self.codec  # raises before anything is generated
        self._warn_of_guidance(sampling)
        pictures = []
        for batch in _batches(len(prompts), batch_size):
            indices = [first_index + i for i in batch]
            chosen = [captions[i] for i in batch]
            latents = self._latents(chosen, indices, seed, grid, sampling, advance)
            for i, index, image_CHW in zip(batch, indices, self.codec.decode(latents), strict=True):
                settings = {"prompt": prompts[i], "seed": seed, "index": index, **asdict(sampling)}
                settings["checkpoint"] = self._checkpoint
                pictures.append(Picture(to_image(image_CHW), settings))
        return pictures

    def _latents(
        self,
        captions: list[Document],
        indices: list[int],
        seed: int,
        grid: LatentGrid,
        sampling: SolverOptions,
        advance: Advance,
    ) -> list[torch.Tensor]:
        """(C, H, W) latents of an image per caption."""
        latents_BLZ = generate_latents(
            self._session(self.cached),
            self._chunks,
            captions,
            self._prompts.image([]),
            grid,
            noise_of_images(seed, indices, grid, self.geometry).to(self.device),
            sampling,
            lambda: advance(len(captions)),
        )
        return unpatchified(latents_BLZ, grid, self.geometry)

    def _warn_of_guidance(self, sampling: SolverOptions) -> None:
        if sampling.is_guided and self.config.data.condition_dropout == 0:
            logger.warning(
                f"guidance = {sampling.guidance:g} reads images without a caption, which training with "
                "data.condition_dropout = 0 never showed; use a guidance of 1"
            )

    def text(
        self,
        prompts: Sequence[Text],
        images: Sequence[Sequence[Image.Image]] | None = None,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        conversation: bool = True,
        batch_size: int = 8,
        first_index: int = 0,
        advance: Advance = _no_progress,
        progress: Callable[[str, int], Advance] = _uncounted,
    ) -> list[Completion]:
        """The model's answer to each prompt, or with ``conversation = False`` its continuation of plain text.

        images: those shown before each prompt's text. A text ends with the model's turn, at a string of ``stop``, after
        ``max_tokens`` tokens, or at the end of the row (training.seq_len). It never begins an image. A temperature of 0 is greedy.
        advance: called after each batch with the number of texts in it. progress: given ("tokens", how many there may be), its result
        is called after each token of a batch with the number of tokens, and when a text ends with those that it might still have had.

        Raises:
            ValueError: a number out of range, or a prompt longer than a row.
        """
        sampling = TextSampling(max_tokens, temperature, top_p)
        documents = self._documents(prompts, images, conversation)
        self._prompts.check_room(documents, [1] * len(documents), "of its answer")
        limits = [min(max_tokens, self._prompts.seq_len - d.num_tokens) for d in documents]
        completions = []
        advance_tokens = progress("tokens", sum(limits))
        for batch in _batches(len(prompts), batch_size):
            rows = continue_prompts(
                self._session(self.cached),
                self._chunks,
                [documents[i] for i in batch],
                [limits[i] for i in batch],
                TokenSampler(sampling, seed, [first_index + i for i in batch], self._no_text),
                endings_of(self.tokenizer, stop),
                self._any_of,
                advance_tokens,
            )
            completions += [completion_of(row, self.tokenizer, stop) for row in rows]
            advance(len(batch))
        return completions

    def log_likelihoods(
        self,
        pairs: Sequence[tuple[Text, Text]],
        images: Sequence[Sequence[Image.Image]] | None = None,
        *,
        conversation: bool = False,
        batch_size: int = 8,
        advance: Advance = _no_progress,
    ) -> list[LogLikelihood]:
        """Log-likelihood of the second text of each pair after the first: as plain text, or with ``conversation`` as an answer.

        A plain pair is tokenised as one text, as in training, and split after as many ids as the first text has alone.

        Raises:
            ValueError: a pair is longer than a row.
        """
        contexts, continuations = [], []
        for context, continuation in pairs:
            before, ids = ids_of(self.tokenizer, context), ids_of(self.tokenizer, continuation)
            if isinstance(context, str) and isinstance(continuation, str) and not conversation:
                whole = self.tokenizer.encode(context + continuation)
                before, ids = whole[: len(before)], whole[len(before) :]
            contexts.append(before)
            continuations.append(ids)
        documents = self._documents(contexts, images, conversation)
        self._prompts.check_room(documents, [len(ids) for ids in continuations], "after them")
        results = []
        for batch in _batches(len(pairs), batch_size):
            results += log_likelihoods_of(
                self._session(
                    cached=False
                ),  # a single forward each, so a cache would never be read
                self._chunks,
                [documents[i] for i in batch],
                [continuations[i] for i in batch],
            )
            advance(len(batch))
        return results

    def _session(self, cached: bool) -> Session:
        return Session(self.model, cached=cached, autocast=self._autocast)

    def _documents(
        self,
        prompts: Sequence[Text],
        images: Sequence[Sequence[Image.Image]] | None,
        conversation: bool,
    ) -> list[Document]:
        if images is None:
            images = [()] * len(prompts)
        if len(images) != len(prompts):
            raise ValueError(
                f"images: must be a list of images for each of the {len(prompts)} prompts, got {len(images)} lists"
            )
        if conversation:
            pairs = zip(prompts, images, strict=True)
            return [self._prompts.conversation(prompt, seen) for prompt, seen in pairs]
        if any(images):
            raise ValueError("images: are shown in a conversation, not before plain text")
        return [self._prompts.text(prompt) for prompt in prompts]

    @cached_property
    def _no_text(self) -> torch.Tensor:
        """Ids that never occur in a generated text: image tokens, the tokens that begin images, and unused rows of the vocabulary."""
        special = self.tokenizer.special
        unused = range(self.tokenizer.vocab_size, self.model.args.vocab_size)
        ids = [special.vit_start, special.vit, special.vae_start, special.vae, *unused]
        return torch.tensor(ids, device=self.device)


def _batches(count: int, batch_size: int) -> Iterator[range]:
    if batch_size < 1:
        raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
    for start in range(0, count, batch_size):
        yield range(start, min(count, start + batch_size))


def _any_of(ranks: DataRanks) -> AnyOf:
    """Logical or over processes; a collective if there are several."""
    if ranks.dims is None:
        return bool
    return lambda value: bool(ranks.sum(torch.tensor(float(value), device=ranks.device)) > 0)
