"""Text generation after prompts, one token of every sequence per forward, and log-likelihoods of given texts.

N here: tokens of a continuation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from symbiotic_titan.data.documents import (
    Document,
    TextSegment,
)
from symbiotic_titan.data.tokenizer import Tokenizer
from symbiotic_titan.flow.noise import keyed_generator
from symbiotic_titan.inference.chunks import ChunkMaker
from symbiotic_titan.inference.session import Session

# Why a text ended: end of turn, one of the caller's stop strings, or the token limit.
Ending = Literal["end", "stop", "length"]

# Logical or over processes: whether any process has an unfinished sequence, from whether this one has.
AnyOf = Callable[[bool], bool]


@dataclass(frozen=True)
class TextSampling:
    """How a token is sampled. A ``temperature`` of 0 is greedy. ``top_p``: nucleus sampling, from the smallest set of tokens
    with at least this total probability (arXiv 1904.09751, section 3.1).

    Raises:
        ValueError: a number out of range.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        rules = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "zero or positive"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name}: must be {rule}, got {getattr(self, name)}")


class TokenSampler:
    """Samples a token for every sequence, except the ids ``banned``. Its random numbers depend on (seed, index of the prompt) alone,
    so a text is the same in any batch."""

    def __init__(
        self, sampling: TextSampling, seed: int, indices: Sequence[int], banned: torch.Tensor
    ) -> None:
        self._sampling = sampling
        self._banned = banned
        self._generators = [keyed_generator("text", seed, index) for index in indices]

    def __call__(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """(B,) int64."""
        logits_BV = logits_BV.index_fill(-1, self._banned, float("-inf"))
        if self._sampling.temperature == 0:
            return logits_BV.argmax(-1)
        # Inverse transform sampling in float64: a float32 cumulative sum over the vocabulary would lose unlikely tokens.
        probability_BV = (logits_BV.double() / self._sampling.temperature).softmax(-1)
        sorted_BV, token_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
        cumulative_BV = sorted_BV.cumsum(-1)
        in_nucleus_BV = cumulative_BV - sorted_BV < self._sampling.top_p
        mass_B1 = (sorted_BV * in_nucleus_BV).sum(-1, keepdim=True)
        # One generator per sequence, on the CPU: the numbers depend neither on the batch nor on the device.
        uniform = [torch.rand(1, generator=g, dtype=torch.float64) for g in self._generators]
        target_B1 = torch.stack(uniform).to(mass_B1.device) * mass_B1
        last_B1 = in_nucleus_BV.sum(-1, keepdim=True) - 1
        # minimum: rounding may put the target past the nucleus.
        rank_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True).minimum(last_B1)
        return token_BV.gather(-1, rank_B1).squeeze(-1)


@dataclass(frozen=True)
class Endings:
    """What ends a text.

    sequences   token ids that end a turn.
    is_stopped  whether token ids contain one of the caller's stop strings.
    """

    sequences: tuple[list[int], ...]
    is_stopped: Callable[[list[int]], bool]

    def length_before(self, ids: list[int]) -> int | None:
        """Length of ``ids`` without the sequence that ends them; None if they do not end with any."""
        for sequence in self.sequences:
            if ids[-len(sequence) :] == sequence:
                return len(ids) - len(sequence)
        return None


@dataclass
class Continuation:
    """Token ids generated so far after a prompt; once finished, without the sequence that ended them."""

    ids: list[int]
    max_tokens: int
    ending: Ending | None = None

    @property
    def num_left(self) -> int:
        """Tokens that may still come."""
        return self.max_tokens - len(self.ids) if self.ending is None else 0

    def add(self, token: int, endings: Endings) -> None:
        self.ids.append(token)
        length = endings.length_before(self.ids)
        if length is not None:
            self.ending = "end"
            del self.ids[length:]
        elif endings.is_stopped(self.ids):
            self.ending = "stop"
        elif len(self.ids) == self.max_tokens:
            self.ending = "length"


@dataclass(frozen=True)
class Completion:
    """The text after a prompt: ``ids`` without the sequence that ended them, ``text`` up to the first stop string."""

    text: str
    ids: list[int]
    ending: Ending


def endings_of(tokenizer: Tokenizer, stop: Sequence[str]) -> Endings:
    """End of the assistant's turn, end of text, and the stop strings ``stop``."""

    def is_stopped(ids: list[int]) -> bool:
        if not stop:
            return False
        text = tokenizer.decode(ids)
        return any(string in text for string in stop)

    return Endings((tokenizer.turn("assistant").suffix, [tokenizer.special.eos]), is_stopped)


def completion_of(row: Continuation, tokenizer: Tokenizer, stop: Sequence[str]) -> Completion:
    assert row.ending is not None
    text = tokenizer.decode(row.ids)
    ends = [text.index(string) for string in stop if string in text]
    return Completion(text[: min(ends, default=None)], row.ids, row.ending)


def continue_prompts(
    session: Session,
    chunks: ChunkMaker,
    documents: Sequence[Document],
    max_tokens: Sequence[int],
    sample: Callable[[torch.Tensor], torch.Tensor],
    endings: Endings,
    any_of: AnyOf = bool,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Continuation]:
    """Generate at most ``max_tokens`` tokens after each prompt.

    ``sample``: (B, V) logits -> (B,) tokens. ``any_of``: logical or over processes. All of them run as many forwards as the longest
    text of any needs, because forwards contain collectives. ``advance``: called after each of them with the number of tokens that came,
    or will not come as their text has ended; the sum is that of ``max_tokens``.
    """
    rows = [Continuation([], limit) for limit in max_tokens]
    num_left = sum(max_tokens)
    prompts = chunks.prompts(documents)
    positions_B = prompts.positions
    logits_BNV = session.prefill(prompts.batch, prompts.lengths.unsqueeze(1) - 1).logits
    while True:
        tokens_B = sample(logits_BNV[:, 0])
        for row, token in zip(rows, tokens_B.tolist(), strict=True):  # device sync
            if row.ending is None:
                row.add(token, endings)
        before, num_left = num_left, sum(row.num_left for row in rows)
        if num_left < before:  # else only other processes go on
            advance(before - num_left)
        active = [row.ending is None for row in rows]
        if not any_of(any(active)):
            return rows
        active_B = torch.tensor(active, device=tokens_B.device)
        chunk = chunks.tokens(tokens_B, positions_B, active_B)
        logits_BNV = session.decode(chunk).logits
        positions_B = positions_B + 1


class LogLikelihood(NamedTuple):
    """Sum of the log-probabilities of a continuation's tokens, and whether greedy decoding would give all of them."""

    sum: float
    is_greedy: bool
    num_tokens: int


def log_likelihoods_of(
    session: Session,
    chunks: ChunkMaker,
    documents: Sequence[Document],
    continuations: Sequence[list[int]],
) -> list[LogLikelihood]:
    """Log-likelihood of each continuation of its document; one forward."""
    whole = [
        Document(document.task, (*document.segments, TextSegment(ids)))
        for document, ids in zip(documents, continuations, strict=True)
    ]
    prompts = chunks.prompts(whole)
    device = prompts.lengths.device
    longest = max(len(ids) for ids in continuations)
    padded = [ids + [0] * (longest - len(ids)) for ids in continuations]
    wanted_BN = torch.tensor(padded, dtype=torch.int64, device=device)
    counts_B1 = torch.tensor([[len(ids)] for ids in continuations], device=device)
    number_N = torch.arange(longest, device=device)
    index_BN = (prompts.lengths.unsqueeze(1) - counts_B1 + number_N - 1).clamp(
        max=prompts.batch.tokens.shape[1] - 1
    )
    logits_BNV = session.prefill(prompts.batch, index_BN).logits.float()
    log_p_BN = logits_BNV.log_softmax(-1).gather(-1, wanted_BN.unsqueeze(-1)).squeeze(-1)
    counted_BN = number_N < counts_B1
    sums = (log_p_BN.double() * counted_BN).sum(-1).tolist()  # device sync
    greedy = ((logits_BNV.argmax(-1) == wanted_BN) | ~counted_BN).all(-1).tolist()
    return [
        LogLikelihood(total, is_greedy, len(ids))
        for total, is_greedy, ids in zip(sums, greedy, continuations, strict=True)
    ]
