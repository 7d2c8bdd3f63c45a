"""Modalities and their integers in tensors; special tokens, declared once for data, model and generation."""

from dataclasses import dataclass

# A token's modality. Padding is not a modality; it comes last, so that a table with NUM_MODALITIES + 1 entries covers it too.
TEXT, VIT, VAE = 0, 1, 2
NUM_MODALITIES = 3
PADDING = 3
MODALITY_NAMES = ("text", "vit", "vae")
# A set of modalities is a number whose bit m stands for modality m.
NUM_MODALITY_SETS = 2**NUM_MODALITIES

# Task of a padding token; real tasks are numbered by their index in ``tasks.TASKS``.
NO_TASK = -1

# Label of a token that has no next-token loss (upstream uses the same value).
IGNORE_INDEX = -100


def modality_ids(names: list[str] | tuple[str, ...], *, key: str) -> tuple[int, ...]:
    """Integers of modality ``names``, in the order given.

    Raises:
        ValueError: a name is not a modality; the message names the config ``key``.
    """
    for name in names:
        if name not in MODALITY_NAMES:
            raise ValueError(
                f"{key}: unknown modality {name!r}; choose from {', '.join(MODALITY_NAMES)}"
            )
    return tuple(MODALITY_NAMES.index(name) for name in names)


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that documents need; [tokenizer.special] gives their strings.

    ``vit`` and ``vae`` are placeholders, whose embeddings the image overwrites. The ``*_start`` and ``*_end`` tokens around an image
    are ordinary text tokens. ``pad``, ``bos`` and ``eos`` may be the same token.
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
