"""Modalities and the integers that stand for them in tensors; special tokens, declared once for data, model and generation."""

from dataclasses import dataclass

# A token's modality. Padding is none of them, and comes after them so that a table of size NUM_MODALITIES + 1 covers all.
TEXT, VIT, VAE = 0, 1, 2
NUM_MODALITIES = 3
PADDING = 3
MODALITY_NAMES = ("text", "vit", "vae")

# The number of a task is its place in ``tasks.TASKS``; a padding token belongs to none.
NO_TASK = -1

# Label of a token that has no next-token loss (upstream uses the same value).
IGNORE_INDEX = -100


def modality_ids(names: list[str] | tuple[str, ...], *, key: str) -> tuple[int, ...]:
    """Integers of modality ``names``, in the order given.

    Raises:
        ValueError: a name is no modality; the message names the config ``key`` it came from.
    """
    for name in names:
        if name not in MODALITY_NAMES:
            raise ValueError(
                f"{key}: unknown modality {name!r}; choose from {', '.join(MODALITY_NAMES)}"
            )
    return tuple(MODALITY_NAMES.index(name) for name in names)


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that the layout of a document needs; which strings stand for them is [tokenizer.special].

    ``vit`` and ``vae`` are placeholders: positions whose embedding is overwritten by the image. The ``*_start`` and
    ``*_end`` tokens around an image are ordinary text tokens. ``pad``, ``bos`` and ``eos`` may be one token.
    """

    pad: int
    bos: int
    eos: int
    vit_start: int
    vit: int
    vit_end: int
    vae_start: int
    vae: int
    vae_end: int
