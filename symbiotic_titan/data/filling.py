"""Which setting keeps packed sequences from being full, for one warning at the start of a run."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from symbiotic_titan.config.data import Data
from symbiotic_titan.data.documents import Document
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.sequence.tasks import task_names

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


def limiting(left: SequenceSize, waiting: Iterable[Document]) -> str:
    """The key of the config that refuses most of the ``waiting`` documents for which a sequence has positions ``left``; that of its length
    where it has none for any."""
    refused: Counter[str] = Counter()
    lengths = [document.num_tokens for document in waiting]
    if not lengths:
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


def advice(fillings: Sequence[Filling], config: Data, size: SequenceSize) -> str | None:
    """A line that names the setting that keeps most sequences of ``fillings`` from being full, and what to do; None if they are full."""
    rows = sum(filling.rows for filling in fillings)
    used = sum(filling.tokens for filling in fillings) / max(rows * size.num_tokens, 1)
    limits = sum((filling.limits for filling in fillings), Counter[str]())
    if not rows or used >= LEAST_FULL or not limits:
        return None
    key, count = limits.most_common(1)[0]
    value, remedy = _value_and_remedy(key, config, size)
    what = (
        "no other sample waited" if key == "data.lookahead" else "samples that waited were left out"
    )
    return (
        f"rows are {used:.0%} full in the first steps, the rest is padding. In {count} of {rows} rows {what} because of {key} = {value}: "
        f"{remedy}; symbiotic show-batch shows the effect"
    )


def _value_and_remedy(key: str, config: Data, size: SequenceSize) -> tuple[object, str]:
    if key == "training.seq_len":
        others = [f"data.lookahead = {config.lookahead}"]
        if config.packing == "longest_first":
            others.append("set data.packing = 'fullest'")
        return size.num_tokens, f"raise it, or {', or '.join(others)}"
    if key == "data.packing":
        return repr(config.packing), "choose another, such as 'fullest'"
    if key.startswith("data.max_row_share."):
        share = config.max_row_share[key.rpartition(".")[2]]
        return share, "raise it, or lower the weights of this task's sources"
    if key == "data.lookahead":
        return config.lookahead, "raise it, so that more samples wait"
    return getattr(config, key.removeprefix("data.")), "raise it, or set 0 for as many as fit"
