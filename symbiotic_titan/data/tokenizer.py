"""Text to token ids and back."""

from typing import Protocol

from torchtitan.components.tokenizer import BaseTokenizer

from symbiotic_titan.sequence.vocabulary import SPECIAL_TOKENS, SpecialTokens

NUM_BYTES = 256


class Tokenizer(Protocol):
    """What the data chain needs of a tokenizer; ``encode`` adds no special tokens."""

    special: SpecialTokens

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class ByteTokenizer(BaseTokenizer):
    """One token per UTF-8 byte, then the special tokens: no files, any text."""

    def __init__(self) -> None:
        super().__init__()
        self.special = SpecialTokens.after(NUM_BYTES)
        self.eos_id = self.special.eos
        self.vocab_size = NUM_BYTES + len(SPECIAL_TOKENS)

    def encode(self, text: str) -> list[int]:
        """Ids of the bytes of ``text``. A lone surrogate, which UTF-8 cannot hold, becomes a question mark."""
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``; special tokens are left out, bytes that form no character become U+FFFD."""
        return bytes(i for i in ids if i < NUM_BYTES).decode("utf-8", errors="replace")

    def get_vocab_size(self) -> int:
        return self.vocab_size
