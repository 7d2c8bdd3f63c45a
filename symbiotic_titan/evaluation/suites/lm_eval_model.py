"""lm-eval's interface of a model, implemented by a Generator. Needs the extra ``lm-eval``.

    results = lm_eval.simple_evaluate(GeneratorLM(generator), tasks=["mmlu"])

Texts are plain text after the tokenizer's opening, as in the training task lm; prompts with images are questions in a conversation.
As in lm-eval's own models, a context that is too long is truncated at its beginning.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from PIL import Image

from symbiotic_titan.evaluation.suite import Advance, Progress
from symbiotic_titan.inference.generator import Generator

logger = logging.getLogger(__name__)

# Stands in the text of a task where an image is shown.
IMAGE_PLACEHOLDER = "<image>"


def _no_progress(what: str, total: int) -> Advance:
    return lambda count: None


class GeneratorLM(TemplateLM):
    """Processes that share a model all run every request and get the same results."""

    MULTIMODAL = True

    def __init__(
        self, generator: Generator, *, batch_size: int = 8, progress: Progress = _no_progress
    ) -> None:
        super().__init__()
        self.generator, self.batch_size, self.progress = generator, batch_size, progress

    @property
    def eot_token_id(self) -> int:
        return self.generator.tokenizer.special.eos

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: the opening's last, or end of text if the tokenizer has no opening."""
        return [self.eot_token_id, *self.generator.tokenizer.opening][-1]

    @property
    def max_length(self) -> int:
        """Maximum tokens of a text: those of a row, less the opening."""
        return self.generator.config.training.seq_len - len(self.generator.tokenizer.opening)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self.generator.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is what greedy decoding gives) of each (texts, context, continuation)."""
        pairs = [(self._without_prefix(context), ids) for _, context, ids in requests]
        self._warn_of_cuts(sum(len(c) + len(ids) > self.max_length for c, ids in pairs))
        pairs = [(_last(context, self.max_length - len(ids)), ids) for context, ids in pairs]
        # Batch texts of similar length, because rows are padded to the longest.
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        found = self.generator.log_likelihoods(
            [pairs[i] for i in order],
            batch_size=self.batch_size,
            advance=self.progress("log-likelihoods", len(pairs)),
        )
        results = {i: (one.sum, one.is_greedy) for i, one in zip(order, found, strict=True)}
        return [results[i] for i in range(len(pairs))]

    def _without_prefix(self, context: list[int]) -> list[int]:
        """``context`` without an opening, as the generator adds one to every text."""
        is_opened = self.generator.tokenizer.opening and context[:1] == [self.prefix_token_id]
        return context[1:] if is_opened else context

    def _warn_of_cuts(self, number: int) -> None:
        if number:
            logger.warning(
                f"{number} contexts are cut at their beginning: with what follows they have more than the "
                f"{self.max_length} tokens of a row"
            )

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts; those longer than a sequence are split into windows with one token of context each."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(
                ids,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += value
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generated text up to a string of ``until``. Requests with equal settings are batched.

        It takes at most half a row; if a task sets no limit, lm-eval asks for 256 tokens.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr((request.args[1], len(request.args) > 2))].append(number)
        advance = self.progress("texts", len(requests))
        texts: dict[int, str] = {}
        for numbers in groups.values():
            for number, text in zip(
                numbers, self._write([requests[i].args for i in numbers], advance), strict=True
            ):
                texts[number] = text
        return [texts[number] for number in range(len(requests))]

    def _write(self, requests: Sequence[tuple[Any, ...]], advance: Advance) -> list[str]:
        """Texts of requests that differ in prompt and images only."""
        settings = normalize_gen_kwargs(requests[0][1])
        most = min(settings["max_gen_toks"], self.max_length // 2)
        images: list[list[Image.Image]] | None = None
        prompts: list[str | list[int]]
        if len(requests[0]) > 2:
            images = [request[2]["visual"] for request in requests]
            prompts = [request[0].replace(IMAGE_PLACEHOLDER, "") for request in requests]
        else:
            contexts = [self.tok_encode(request[0]) for request in requests]
            self._warn_of_cuts(sum(len(ids) > self.max_length - most for ids in contexts))
            prompts = [_last(ids, self.max_length - most) for ids in contexts]
        completions = self.generator.text(
            prompts,
            images,
            max_tokens=most,
            temperature=settings.get("temperature", 0.0),
            top_p=settings.get("top_p", 1.0),
            stop=[string for string in settings["until"] if string],
            conversation=images is not None,
            batch_size=self.batch_size,
            advance=advance,
        )
        return [completion.text for completion in completions]


def _last(ids: list[int], count: int) -> list[int]:
    return ids[-count:] if count > 0 else []
