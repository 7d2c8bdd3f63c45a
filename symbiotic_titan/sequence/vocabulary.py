"""Special tokens, declared once for data, model and generation."""

from dataclasses import dataclass

# Order matters: ids are assigned in this order behind the ordinary tokens of the tokenizer.
SPECIAL_TOKENS = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<user>",
    "<assistant>",
    "<vit_start>",
    "<vit>",
    "<vit_end>",
    "<vae_start>",
    "<vae>",
    "<vae_end>",
)


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens.

    ``vit`` and ``vae`` are placeholders: positions whose embedding is overwritten by the image. The ``*_start`` and
    ``*_end`` tokens around an image are ordinary text tokens.
    """

    pad: int
    bos: int
    eos: int
    user: int
    assistant: int
    vit_start: int
    vit: int
    vit_end: int
    vae_start: int
    vae: int
    vae_end: int

    @classmethod
    def after(cls, num_ordinary: int) -> "SpecialTokens":
        """Special tokens that follow ``num_ordinary`` ordinary ids, in the order of SPECIAL_TOKENS."""
        names = [name.strip("<>") for name in SPECIAL_TOKENS]
        return cls(**{name: num_ordinary + i for i, name in enumerate(names)})
