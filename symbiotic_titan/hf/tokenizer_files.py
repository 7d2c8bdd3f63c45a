"""The files beside an exported model's tensors: those of its release, with the tokenizer that a run was trained with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from symbiotic_titan.config.tokenizer import Tokenizer as TokenizerSection
from symbiotic_titan.data.tokenizer import FileTokenizer, open_tokenizer
from symbiotic_titan.hf.release_files import small_files

JSON, SENTENCEPIECE, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
# Files that belong to one vocabulary, or name ids of it.
_OF_VOCABULARY = (
    *(JSON, SENTENCEPIECE, CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "chat_template.jinja"),
    "generation_config.json",
)
_SPECIAL = {
    **{"single_word": False, "lstrip": False, "rstrip": False, "normalized": False},
    "special": True,
}

Files = dict[str, bytes]


@dataclass(frozen=True)
class RunTokenizer:
    """The tokenizer of a run.

    kind           tokenizer.kind.
    name, content  of the vocabulary file; empty where that kind has no file that transformers reads.
    beside         files of the same vocabulary in its folder.
    added          special token -> id, of those that training added after the vocabulary.
    """

    kind: str
    name: str = ""
    content: bytes = b""
    beside: Mapping[str, bytes] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)


def run_tokenizer(section: TokenizerSection) -> RunTokenizer:
    """The tokenizer of [tokenizer].

    Raises:
        ValueError: as ``open_tokenizer``.
    """
    opened = open_tokenizer(section)
    if not isinstance(opened, FileTokenizer) or not opened.file_name:
        return RunTokenizer(section.kind)
    path = Path(section.path)
    folder = path if path.is_dir() else path.parent
    beside = {
        file.name: file.read_bytes() for file in small_files(folder) if file.name in _OF_VOCABULARY
    }
    added = {token: opened.special_ids[token] for token in opened.added}
    return RunTokenizer(section.kind, opened.file_name, opened.content, beside, added)


def files_of_export(release_files: Path | None, tokenizer: RunTokenizer | None) -> Files:
    """The small files of the release, with the tokenizer of the run instead of the release's where it is another, and with the tokens
    that training added. ``tokenizer`` None, or without a file: as in the release."""
    files = (
        {path.name: path.read_bytes() for path in small_files(release_files)}
        if release_files
        else {}
    )
    if tokenizer is None or not tokenizer.content:
        return files
    if files.get(tokenizer.name) != tokenizer.content:
        files = {name: data for name, data in files.items() if name not in _OF_VOCABULARY}
        files |= tokenizer.beside
        files[tokenizer.name] = tokenizer.content
        files = named_class(files)
    return _with_tokens(files, tokenizer.added)


def named_class(files: Files) -> Files:
    """``files`` whose tokenizer_config.json names a class. Without one, transformers chooses by the model's type, which it does not
    know where the model is ours. The class here reads tokenizer.json as it is."""
    config = _table(files.get(CONFIG, b"{}"))
    if JSON not in files or "tokenizer_class" in config:
        return files
    return files | {CONFIG: _text(config | {"tokenizer_class": "PreTrainedTokenizerFast"})}


def tokenizer_note(files: Files, tokenizer: RunTokenizer | None) -> str | None:
    """What a user must know of the tokenizer among exported ``files``; None: nothing."""
    if JSON not in files and SENTENCEPIECE not in files:
        return "no tokenizer: neither the run nor a release has a file of one"
    if tokenizer is not None and not tokenizer.content:
        return (
            f"the tokenizer is the release's, but the run's was tokenizer.kind = {tokenizer.kind!r}, which has no file: texts become "
            "other ids than in training"
        )
    if JSON not in files and CONFIG not in files:
        return f"transformers cannot tell the class of {SENTENCEPIECE}: the run has no {CONFIG} beside it"
    if tokenizer is not None and (lost := _misnumbered(files, tokenizer.added)):
        return f"{JSON} does not have {', '.join(lost)}: its ids have gaps, so a token added to it would not get the id of training"
    return None


def _with_tokens(files: Files, added: Mapping[str, int]) -> Files:
    """``files`` with special tokens ``added`` to the vocabulary; unchanged where they would get other ids."""
    if not added:
        return files
    out = dict(files)
    tokens = {i: {"content": token, **_SPECIAL} for token, i in added.items()}
    if JSON in files:
        vocabulary = _table(files[JSON])
        rows = [{"id": i, **row} for i, row in tokens.items()]
        vocabulary["added_tokens"] = [*vocabulary.get("added_tokens", []), *rows]
        out[JSON] = _text(vocabulary)
    config = _table(files.get(CONFIG, b"{}"))
    if "added_tokens_decoder" in config or (CONFIG in files and JSON not in files):
        known = config.get("added_tokens_decoder", {})
        rows_of = {str(i): row for i, row in tokens.items()}
        out[CONFIG] = _text(config | {"added_tokens_decoder": known | rows_of})
    return files if _misnumbered(out, added) else out


def _misnumbered(files: Files, added: Mapping[str, int]) -> list[str]:
    """Tokens that the tokenizers library, which numbers them itself, does not give the ids of ``added``."""
    if JSON not in files or not added:
        return []
    vocabulary = tokenizers.Tokenizer.from_str(files[JSON].decode("utf-8"))
    return [token for token, i in added.items() if vocabulary.token_to_id(token) != i]


def _table(data: bytes) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(data)
    return values


def _text(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
