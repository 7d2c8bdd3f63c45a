"""Packing: which documents share a packed sequence, and which setting keeps it from being full. Its tensors are made in
``data.sequence_builder``."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from symbiotic_titan.data.documents import (
    Document,
)
from symbiotic_titan.sequence.tasks import task_names


@dataclass(frozen=True)
class SequenceSize:
    """Room in a packed sequence.

    num_tokens:      positions, T.
    num_vit_tokens:  ViT tokens among them.
    num_vae_tokens:  latent tokens among them.
    task_tokens:     task number -> positions that its documents may take; a task without an entry may take all.
    num_vit_patches: ViT patches of the sequence, P; None if a ViT token is always a square of patches, which then gives the number.
    """

    num_tokens: int
    num_vit_tokens: int
    num_vae_tokens: int
    task_tokens: dict[int, int] = field(default_factory=dict)
    num_vit_patches: int | None = None

    def of_task(self, task: int) -> int:
        """Positions that documents of ``task`` may take."""
        return min(self.num_tokens, self.task_tokens.get(task, self.num_tokens))

    def fits(self, document: Document) -> bool:
        return (
            document.num_tokens <= self.num_tokens
            and document.num_vit_tokens <= self.num_vit_tokens
            and document.num_vae_tokens <= self.num_vae_tokens
            and document.num_tokens <= self.task_tokens.get(document.task, self.num_tokens)
        )

    def minus(self, document: Document) -> "SequenceSize":
        """The remaining room after ``document``."""
        return SequenceSize(
            self.num_tokens - document.num_tokens,
            self.num_vit_tokens - document.num_vit_tokens,
            self.num_vae_tokens - document.num_vae_tokens,
            {
                task: left - document.num_tokens * (task == document.task)
                for task, left in self.task_tokens.items()
            },
        )


# data.packing: (waiting documents by age, room) -> indices of the next sequence's documents, in order. They must include 0, the
# oldest, so that no document waits forever. A pure function, because a resumed run must choose as the original would have.
Packing = Callable[[list[Document], SequenceSize], list[int]]


def check_choice(name: str, chosen: object, waiting: list[Document], size: SequenceSize) -> None:
    """Raise ValueError unless ``chosen``, returned by the packing ``name``, is as ``Packing`` demands."""
    where = f"data.packing = {name!r} returned {chosen!r}"
    if (
        not isinstance(chosen, list)
        or not all(isinstance(i, int) and 0 <= i < len(waiting) for i in chosen)
        or len(set(chosen)) < len(chosen)
        or 0 not in chosen
    ):
        raise ValueError(
            f"{where}; it must be a list of different integers from 0 to {len(waiting) - 1} (the waiting documents), 0 among them"
        )
    left = size
    for i in chosen:
        if not left.fits(waiting[i]):
            raise ValueError(
                f"{where}; together they must fit into {size}, but from number {i} on they do not: test each with "
                "size.fits and take it off with size.minus"
            )
        left = left.minus(waiting[i])


def longest_first(waiting: list[Document], size: SequenceSize) -> list[int]:
    """The oldest document, then repeatedly the longest that still fits (ties to the oldest).

    First-fit decreasing for one bin at a time. The oldest goes first, so that no document waits for more than ``len(waiting)``
    sequences.
    """
    chosen = [0]
    left = size.minus(waiting[0])
    by_length = sorted(range(1, len(waiting)), key=lambda i: (-waiting[i].num_tokens, i))
    for i in by_length:
        if left.fits(waiting[i]):
            chosen.append(i)
            left = left.minus(waiting[i])
    return chosen


def fullest(waiting: list[Document], size: SequenceSize) -> list[int]:
    """The oldest document, then those, by age, that leave the fewest positions empty.

    Dynamic programming over subset sums. It keeps one subset per reachable length, the first found, which favours older documents.
    The result is optimal, except where the image or task limits rule out the subset that was kept but not another of the same
    length. At most num_tokens x len(waiting) steps; stops early when the sequence is full.
    """
    left = size.minus(waiting[0])
    tasks = list(left.task_tokens)
    limits = [left.num_vit_tokens, left.num_vae_tokens, *left.task_tokens.values()]
    # All limits are bit fields of one Python integer, so that one subtraction and one comparison check them all. A subtraction that
    # takes a limit below zero borrows, and so clears, the guard bit above its field.
    width = size.num_tokens.bit_length() + 1
    spare = _side_by_side([1 << width - 1] * len(limits), width)
    rest = _side_by_side([min(limit, size.num_tokens) for limit in limits], width) + spare
    # Length without the oldest document -> (remaining limits, document added last).
    reached = {0: (rest, 0)}
    for i, document in enumerate(waiting[1:], start=1):
        count = document.num_tokens
        of_task = [count * (task == document.task) for task in tasks]
        needs = [document.num_vit_tokens, document.num_vae_tokens, *of_task]
        longest, needed = left.num_tokens - count, _side_by_side(needs, width)
        reached |= {
            length + count: (rest - needed, i)
            for length, (rest, _) in reached.items()
            if length <= longest and (rest - needed) & spare == spare
            if length + count not in reached
        }
        if left.num_tokens in reached:
            break
    chosen, length = [], max(reached)
    while length:
        chosen.append(reached[length][1])
        length -= waiting[chosen[-1]].num_tokens
    return [0, *reversed(chosen)]


def _side_by_side(values: list[int], width: int) -> int:
    """``values`` as the fields of one integer; none is negative, each has at most ``width`` bits."""
    return sum(value << width * number for number, value in enumerate(values))


# ---- how full the sequences are -------------------------------------------------------------------------------------------

# Share of the positions of a sequence, on average, below which a setting is wrong more likely than not.
LEAST_FULL = 0.8
# Sequences of a stream that are looked at. Looking compares a sequence that is not full with every waiting document.
NUM_ROWS = 64


@dataclass(frozen=True)
class Filling:
    """The first sequences that a stream made since the start.

    rows:    their number.
    tokens:  positions that are used.
    limits:  key of the config -> sequences that are less than ``LEAST_FULL`` because of it.
    """

    rows: int = 0
    tokens: int = 0
    limits: Counter[str] = field(default_factory=Counter)

    def after(
        self, chosen: Sequence[Document], waiting: Sequence[Document], size: SequenceSize
    ) -> "Filling":
        """With one more sequence, of the ``chosen`` documents, while others are ``waiting``. Past ``NUM_ROWS`` nothing is added."""
        if self.rows >= NUM_ROWS:
            return self
        left = size
        for document in chosen:
            left = left.minus(document)
        limits, used = Counter(self.limits), size.num_tokens - left.num_tokens
        if used < LEAST_FULL * size.num_tokens:
            limits[limiting(left, waiting)] += 1
        return Filling(self.rows + 1, self.tokens + used, limits)


def limiting(left: SequenceSize, waiting: Sequence[Document]) -> str:
    """The key of the config that refuses most of the ``waiting`` documents for which a sequence has positions ``left``; that of its length
    where it has none for any."""
    refused: Counter[str] = Counter()
    if not waiting:
        return "data.lookahead"
    for document in waiting:
        if document.num_tokens <= left.num_tokens:
            refused.update(_refusals(left, document) or ["data.packing"])
    return refused.most_common(1)[0][0] if refused else "training.seq_len"


def _refusals(left: SequenceSize, document: Document) -> list[str]:
    keys = []
    if document.num_vit_tokens > left.num_vit_tokens:
        keys.append("data.max_vit_tokens")
    if document.num_vae_tokens > left.num_vae_tokens:
        keys.append("data.max_vae_tokens")
    if document.num_tokens > left.of_task(document.task):
        keys.append(f"data.max_row_share.{task_names()[document.task]}")
    return keys
