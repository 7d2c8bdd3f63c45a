"""A tiktoken vocabulary as a tokenizer.json: tokens in base64 with their ranks, and what the release's Python code adds to them.

The file has no merges. tiktoken merges the neighbours whose concatenation has the lowest rank, whichever they are; so every split of a
token into two tokens becomes a merge of that rank. No code of the release is run: the pattern that splits a text into words, and the
special tokens, are known by the file's name or given.
"""

import base64
import binascii
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SUFFIX = ".tiktoken"
_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_EXTRAS = tuple(f"<|extra_{i}|>" for i in range(205))


@dataclass(frozen=True)
class _Known:
    """What the Python code of a release adds to its vocabulary. ``special``: tokens with the ids after it, in this order."""

    special: tuple[str, ...]
    pattern: str = _PATTERN
    composed: bool = True  # a text is brought into Unicode's form C first


_KNOWN = {
    "hy.tiktoken": _Known(
        ("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>", *_EXTRAS)
    ),
    "qwen.tiktoken": _Known(("<|endoftext|>", "<|im_start|>", "<|im_end|>", *_EXTRAS)),
}


@dataclass(frozen=True)
class TokenizerFile:
    """The ``text`` of a tokenizer.json, how many tokens have ranks, and the special tokens with their ids."""

    text: str
    num_ranks: int
    special: dict[str, int]


def is_tiktoken(data: bytes) -> bool:
    """Whether the first lines of a file are tokens in base64 with their ranks."""
    lines = data[:4096].splitlines()[:-1] or data[:4096].splitlines()
    try:
        return bool(lines) and all(_entry(line) for line in lines if line.strip())
    except ValueError:
        return False


def tokenizer_json(path: Path, pattern: str | None = None) -> TokenizerFile:
    """The vocabulary at ``path`` as a tokenizer.json. ``pattern``: instead of the one that is known by the file's name. Special tokens
    are the known ones, and those that a tokenizer_config.json beside it lists in ``added_tokens_decoder``.

    Raises:
        ValueError: it is no tiktoken vocabulary, its pattern is neither known nor given, or ids of special tokens are in use.
    """
    ranks = _ranks(path.read_bytes())
    known = _KNOWN.get(path.name)
    if pattern is None and known is None:
        raise ValueError(
            f"the pattern that splits a text is known for {', '.join(_KNOWN)} only; give the one in the release's Python code as --pattern"
        )
    token_of = dict(enumerate(known.special if known else (), start=len(ranks)))
    token_of |= _declared(path.parent / "tokenizer_config.json")
    made = _tokenizer(ranks, pattern or (known.pattern if known else ""))
    if known is not None and known.composed:
        made.normalizer = normalizers.NFC()
    _add_special(made, len(ranks), token_of)
    special = {token: number for number, token in sorted(token_of.items())}
    return TokenizerFile(made.to_str(pretty=True), len(ranks), special)


def _entry(line: bytes) -> tuple[bytes, int]:
    parts = line.split()
    try:
        token, rank = parts
        return base64.b64decode(token, validate=True), int(rank)
    except (ValueError, binascii.Error):
        raise ValueError("a token in base64 and its rank are expected per line") from None


def _ranks(data: bytes) -> dict[bytes, int]:
    """Token -> rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = _entry(line)
        except ValueError as error:
            raise ValueError(f"no tiktoken vocabulary: line {number}: {error}") from None
        ranks[token] = rank
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise ValueError(
            f"its {len(ranks):,} tokens must have the ranks 0, 1, 2 .., each once; the file is damaged"
        )
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        raise ValueError(f"it lacks {len(lacking)} of the 256 single bytes; the file is damaged")
    return ranks


def _tokenizer(ranks: dict[bytes, int], pattern: str) -> Tokenizer:
    letters = _letters_of_bytes()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [(spelled(left), spelled(right)) for _, left, right in sorted(_merges(ranks))]
    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    # A word that is a token is not merged together, as in tiktoken.
    made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    try:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"--pattern: no regular expression: {error}") from error
    as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, as_letters])
    made.decoder = decoders.ByteLevel()
    return made


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[tuple[int, int, int], bytes, bytes]]:
    """((rank of the whole, of its left part, of its right part), left, right) of every split of a token into two tokens."""
    for token, rank in ranks.items():
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in ranks and right in ranks:
                yield (rank, ranks[left], ranks[right]), left, right


def _letters_of_bytes() -> list[str]:
    """The letter that byte-level vocabularies write each byte as (GPT-2's table): itself where it is printable, else one from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _declared(config: Path) -> dict[int, str]:
    """Id -> token in the ``added_tokens_decoder`` of a tokenizer_config.json, if there is one."""
    if not config.is_file():
        return {}
    try:
        added: Any = json.loads(config.read_bytes()).get("added_tokens_decoder") or {}
        return {int(number): str(row["content"]) for number, row in added.items()}
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{config} cannot be used: {type(error).__name__}: {error}") from None


def _add_special(made: Tokenizer, num_ranks: int, token_of: dict[int, str]) -> None:
    """Add special tokens under their ids; ids between them get a token of no use, as the library counts on."""
    first, last = min(token_of, default=num_ranks), max(token_of, default=num_ranks - 1)
    if first < num_ranks:
        raise ValueError(
            f"special token {token_of[first]!r} has the id {first}, which is one of the {num_ranks:,} ranks"
        )
    tokens = [token_of.get(i, f"<|unused_{i}|>") for i in range(num_ranks, last + 1)]
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise ValueError(f"special token {twice!r} has two ids")
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
