"""Special tokens, declared once for data, model and generation."""

from dataclasses import dataclass


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
