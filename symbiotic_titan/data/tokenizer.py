"""Text to token ids and back."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

from torchtitan.components.tokenizer import BaseTokenizer

from symbiotic_titan.config.tokenizer import AUTO, TOKEN_FAMILIES, TOKENIZER_KINDS, TokenFamily
from symbiotic_titan.config.tokenizer import Tokenizer as TokenizerSection
from symbiotic_titan.data.vocabulary_files import (
    HuggingFaceVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    declared_tokens,
    find_file,
    open_vocabulary,
)
from symbiotic_titan.sequence.modality import SpecialTokens

NUM_BYTES = 256

# Special tokens of the bytes, in the order of their ids.
BYTE_SPECIALS = (
    *("<pad>", "<bos>", "<eos>", "<user>", "<assistant>"),
    *("<vit_start>", "<vit>", "<vit_end>", "<vae_start>", "<vae>", "<vae_end>"),
)


class Turn(NamedTuple):
    """Ids before and after the text of a turn. ``suffix`` ends the turn: the assistant's is trained like its text."""

    prefix: list[int]
    suffix: list[int]


class Tokenizer(Protocol):
    """What the data chain needs of a tokenizer. Special tokens never come out of ``encode``, whatever the text says.

    Every document begins with ``opening``. In a conversation its turns follow, with ``separator`` between them. ``special_ids``
    names every special token, also those of turns; ``fingerprint`` changes where an id of some text or turn may.
    """

    special: SpecialTokens
    special_ids: dict[str, int]
    opening: list[int]
    separator: list[int]
    fingerprint: str
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def turn(self, role: str) -> Turn: ...


def _turn(turns: Mapping[str, Turn], role: str) -> Turn:
    if role not in turns:
        raise ValueError(
            f"role {role!r} has no turn; known: {', '.join(turns)}; another can be given in [tokenizer.turns]"
        )
    return turns[role]


class ByteTokenizer(BaseTokenizer):
    """One token per UTF-8 byte, then the special tokens: no files, any text."""

    fingerprint = "bytes"

    def __init__(self) -> None:
        super().__init__()
        self.special_ids = {token: NUM_BYTES + i for i, token in enumerate(BYTE_SPECIALS)}
        pad, bos, eos, user, assistant, *image = self.special_ids.values()
        self.special = SpecialTokens(pad, bos, eos, *image)
        self.opening = [bos]
        self.separator: list[int] = []
        self.eos_id = eos
        self.vocab_size = NUM_BYTES + len(BYTE_SPECIALS)
        self.added: list[str] = []
        self.reserved: dict[str, str] = {}
        self._turns = {
            "system": Turn([], []),
            "user": Turn([user], []),
            "assistant": Turn([assistant], [eos]),
        }

    def encode(self, text: str) -> list[int]:
        """Ids of the bytes of ``text``. A lone surrogate, which UTF-8 cannot hold, becomes a question mark."""
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``; special tokens are left out, bytes that form no character become U+FFFD."""
        return bytes(i for i in ids if i < NUM_BYTES).decode("utf-8", errors="replace")

    def turn(self, role: str) -> Turn:
        """Raises ValueError where ``role`` is none of system, user, assistant."""
        return _turn(self._turns, role)

    def get_vocab_size(self) -> int:
        return self.vocab_size


class FileTokenizer(BaseTokenizer):
    """A vocabulary file, and after its ids the special tokens that it lacks. ``added``: those; ``reserved``: role -> token of the file
    that the family reserves, used instead of adding one.

    Made of the file's content, not of its path: so it travels to worker processes, and they cannot read another file.
    """

    def __init__(
        self,
        section: TokenizerSection,
        data: bytes,
        declared: Mapping[str, str],
        vocabulary: Callable[[bytes, Mapping[str, str]], Vocabulary],
    ) -> None:
        super().__init__()
        self._made_of = (section, data, declared, vocabulary)
        self._file = open_vocabulary(section.path, section.kind, data, declared, vocabulary)
        family = _family(section, self._file)
        self.reserved = _reserved_tokens(family, section, self._file)
        family = section.adapted(replace(family, special=family.special | self.reserved))
        self.added = [token for token in family.tokens if self._file.id_of(token) is None]
        self.vocab_size = self._file.size + len(self.added)
        self.special_ids = self._file.special | {
            token: self._id_of(token) for token in family.tokens
        }
        self._spelled = {i: self._spell(token) for token, i in self.special_ids.items()}
        self.special = SpecialTokens(**{r: self.special_ids[t] for r, t in family.special.items()})
        self.eos_id = self.special.eos
        self.opening = self._encode_with_special(family.opening)
        self.separator = self._encode_with_special(family.turn_separator)
        self._turns = {
            role: Turn(self._encode_with_special(before), self._encode_with_special(after))
            for role, (before, after) in family.turns.items()
        }
        self._check(family)
        layout = repr((self.special, sorted(self._turns.items()), self.separator))
        # The usual opening is left out, as in states that were saved before there were others.
        layout += "" if self.opening == [self.special.bos] else repr(self.opening)
        content = sha256(data + layout.encode()).hexdigest()[:16]
        self.fingerprint = f"{section.kind} {content}"

    def __reduce__(self) -> tuple[Any, ...]:
        return FileTokenizer, self._made_of

    @property
    def content(self) -> bytes:
        """The vocabulary file."""
        return self._made_of[1]

    @property
    def file_name(self) -> str:
        """The name by which other libraries know such a file; empty where they know none."""
        return getattr(self._made_of[3], "file_name", "")

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, where a special token that is spelled out is text. A lone surrogate becomes a question mark."""
        ids = self._file.encode(text.encode("utf-8", errors="replace").decode("utf-8"))
        if self._spelled.keys().isdisjoint(ids):
            return ids
        return [part for i in ids for part in self._spelled.get(i, (i,))]

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``; special tokens and ids of no token are left out."""
        size = self._file.size
        return self._file.decode([i for i in ids if i < size and i not in self._spelled])

    def turn(self, role: str) -> Turn:
        """Raises ValueError where nothing says how a turn of ``role`` looks."""
        return _turn(self._turns, role)

    def get_vocab_size(self) -> int:
        return self.vocab_size

    def _id_of(self, token: str) -> int:
        own = self._file.id_of(token)
        return self._file.size + self.added.index(token) if own is None else own

    def _spell(self, token: str) -> list[int]:
        """Ids of the characters of ``token``, for vocabularies that find it in a text although it is special."""
        ids: list[int] = []
        for character in token:
            byte_ids = [self._file.id_of(f"<0x{byte:02X}>") for byte in character.encode()]
            own = self._file.id_of(character)
            if own is not None:
                ids.append(own)
            elif None not in byte_ids:
                ids += [i for i in byte_ids if i is not None]
            else:
                ids += self._file.encode(character)
        return ids

    def _encode_with_special(self, text: str) -> list[int]:
        """Ids of a string of the config, where special tokens count as such."""
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        ids: list[int] = []
        for part in filter(None, parts):
            ids += [self.special_ids[part]] if part in self.special_ids else self.encode(part)
        return ids

    def _check(self, family: TokenFamily) -> None:
        for token in family.tokens:
            if self.special_ids[token] == self._file.unknown:
                raise ValueError(
                    f"tokenizer.special: {token!r} is what unknown characters become in this file; choose another "
                    "token, one that the file lacks is added"
                )
        if not self._turns["assistant"].suffix:
            raise ValueError(
                "tokenizer.turns.assistant: no token comes after its text; name the token that ends an answer, "
                "or nothing would tell generation where to stop"
            )


def _family(section: TokenizerSection, file: Vocabulary) -> TokenFamily:
    """The section's family; with ``auto``, of the families whose signs the file has, the one with the most."""
    if section.family == AUTO:
        families = [TOKEN_FAMILIES[name] for name in TOKEN_FAMILIES]
        matching = [f for f in families if all(file.id_of(t) is not None for t in f.signs)]
        family = max(
            matching, key=lambda family: len(family.signs)
        )  # ``plain`` has none, so it always matches
    else:
        family = TOKEN_FAMILIES[section.family]
    if not family.prefers_declared:
        return family
    declared = {r: token for r, token in file.declared.items() if file.id_of(token) != file.unknown}
    return replace(family, special=family.special | declared)


def _reserved_tokens(
    family: TokenFamily, section: TokenizerSection, file: Vocabulary
) -> dict[str, str]:
    """Role -> reserved token of the file, for every role whose token it lacks; empty where it does not have enough of them."""
    lacking = [
        role
        for role, token in family.special.items()
        if role not in section.special and file.id_of(token) is None
    ]
    turns = [*section.turns.values(), *family.turns.values()]
    used = {*family.special.values(), *family.turn_tokens}
    used |= {*section.special.values(), *section.turn_tokens}
    unused = [
        token
        for token in sorted(file.special, key=lambda token: file.special[token])
        if re.fullmatch(family.reserved, token)
        and token not in used
        and not any(token in text for turn in turns for text in turn)
    ]
    if not lacking or len(unused) < len(lacking):
        return {}
    return dict(zip(lacking, unused[-len(lacking) :], strict=True))


def open_tokenizer(section: TokenizerSection) -> ByteTokenizer | FileTokenizer:
    """The tokenizer of [tokenizer].

    Raises:
        ValueError: the file is missing or no vocabulary, or its special tokens do not fit the section.
    """
    return TOKENIZER_KINDS[section.kind](section)


def open_bytes(section: TokenizerSection) -> ByteTokenizer:
    section.refuse_file_settings()
    return ByteTokenizer()


def open_huggingface(section: TokenizerSection) -> FileTokenizer:
    file = find_file(section.path, section.kind, "tokenizer.json")
    declared = declared_tokens(file.parent)
    return FileTokenizer(section, file.read_bytes(), declared, HuggingFaceVocabulary)


def open_sentencepiece(section: TokenizerSection) -> FileTokenizer:
    file = find_file(section.path, section.kind, "tokenizer.model", pattern="*.model")
    return FileTokenizer(section, file.read_bytes(), {}, SentencePieceVocabulary)
