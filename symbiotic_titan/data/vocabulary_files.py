"""Vocabularies that other tools trained, with the same few methods: Hugging Face's tokenizer.json, SentencePiece."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

TIKTOKEN_REMEDY = (
    "it is a tiktoken vocabulary: make a file that is read with symbiotic convert tokenizer --vocabulary FILE --out "
    "FOLDER/tokenizer.json"
)

# Roles that a file may give tokens to by itself.
DECLARED_ROLES = ("bos", "eos", "pad")


class Vocabulary(Protocol):
    """Ids 0 .. size-1.

    ``special``: token -> id where a token stands for no text; ``unknown``: the id of text without a token of its own, None where
    every text has one; ``declared``: role -> token.
    """

    size: int
    special: dict[str, int]
    unknown: int | None
    declared: dict[str, str]

    def id_of(self, token: str) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class HuggingFaceVocabulary:
    """A ``tokenizer.json``. ``declared`` comes from the tokenizer_config.json beside it.

    Raises:
        ValueError: ``data`` is none.
    """

    file_name = "tokenizer.json"

    def __init__(self, data: bytes, declared: Mapping[str, str]) -> None:
        content = json.loads(data)
        model = content.get("model") if isinstance(content, dict) else None
        if not isinstance(model, dict):
            raise ValueError("it describes no model")
        self._tokenizer = _parsed(data.decode("utf-8"))
        # Files are saved with whatever their last user had set; sequences are cut and padded by packing.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A special token that a text spells out is text. Not saved by pickle, therefore set here.
        self._tokenizer.encode_special_tokens = True
        self._ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(self._ids.values(), default=-1) + 1
        self.unknown: int | None = model.get("unk_id", self._ids.get(str(model.get("unk_token"))))
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {
            token.content: i for i, token in added.items() if token.special and i != self.unknown
        }
        self.declared = dict(declared)

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _parsed(text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"the tokenizers library cannot read it ({error})") from error


class SentencePieceVocabulary:
    """A SentencePiece ``.model``, which declares its own begin, end and padding.

    Raises:
        ValueError: ``data`` is none.
    """

    file_name = "tokenizer.model"

    def __init__(self, data: bytes, declared: Mapping[str, str]) -> None:
        del declared  # its own are in the file
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ValueError(f"the sentencepiece library cannot read it ({error})") from error
        self.size = self._model.get_piece_size()
        self.unknown: int | None = self._model.unk_id()
        control = [i for i in range(self.size) if self._model.is_control(i)]
        self.special = {self._model.id_to_piece(i): i for i in control}
        ids = {
            "bos": self._model.bos_id(),
            "eos": self._model.eos_id(),
            "pad": self._model.pad_id(),
        }
        self.declared = {role: self._model.id_to_piece(i) for role, i in ids.items() if i >= 0}

    def id_of(self, token: str) -> int | None:
        own = self._model.piece_to_id(token)
        return own if self._model.id_to_piece(own) == token else None

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


def find_file(path: str, kind: str, name: str, pattern: str = "") -> Path:
    """The vocabulary file at ``path``, or in that folder the file ``name`` or the only one that matches ``pattern``.

    ``kind``: of the tokenizer, for messages.

    Raises:
        ValueError: there is none, or there are several.
    """
    if not path:
        raise ValueError(
            f"tokenizer.path: empty; tokenizer.kind = {kind!r} needs a local file or folder"
        )
    found = Path(path)
    if found.is_file():
        return found
    if not found.is_dir():
        raise ValueError(f"tokenizer.path: there is no file or folder {path!r}")
    if (found / name).is_file():
        return found / name
    matching = sorted(found.glob(pattern)) if pattern else []
    if len(matching) == 1:
        return matching[0]
    if matching:
        names = ", ".join(m.name for m in matching)
        raise ValueError(f"tokenizer.path: {path!r} has several models ({names}); name one of them")
    raise ValueError(f"tokenizer.path: {path!r} has no {name}; {_remedy(found, pattern)}")


def _remedy(folder: Path, pattern: str) -> str:
    from symbiotic_titan.data.tiktoken_files import SUFFIX, is_tiktoken  # only after a mistake

    if pattern != "*.model" and (models := list(folder.glob("*.model"))):
        if is_tiktoken(models[0].read_bytes()):
            return TIKTOKEN_REMEDY
        return "it has a SentencePiece model: set tokenizer.kind = 'sentencepiece'"
    if (folder / "tokenizer.json").is_file():
        return "it has a tokenizer.json: set tokenizer.kind = 'huggingface'"
    if list(folder.glob(f"*{SUFFIX}")):
        return TIKTOKEN_REMEDY
    if (folder / "vocab.json").is_file() or (folder / "vocab.txt").is_file():
        return "save its vocabulary as tokenizer.json once, with AutoTokenizer and save_pretrained of transformers"
    return "name the file, or the folder that holds it"


def declared_tokens(folder: Path) -> dict[str, str]:
    """Role -> token, as the tokenizer_config.json in ``folder`` says, if there is one.

    Raises:
        ValueError: it is no JSON object.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"tokenizer.path: {str(file)!r} cannot be parsed ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"tokenizer.path: {str(file)!r} must hold a JSON object")
    tokens = {role: config.get(f"{role}_token") for role in DECLARED_ROLES}
    # Either a string or a table that describes one.
    tokens = {r: t.get("content") if isinstance(t, dict) else t for r, t in tokens.items()}
    return {role: token for role, token in tokens.items() if isinstance(token, str)}


def open_vocabulary(
    path: str,
    kind: str,
    data: bytes,
    declared: Mapping[str, str],
    make: Callable[[bytes, Mapping[str, str]], Vocabulary],
) -> Vocabulary:
    """The vocabulary that ``make`` reads from ``data``, the content of the file at ``path``; ``kind``: of the tokenizer.

    Raises:
        ValueError: it holds none.
    """
    try:
        vocabulary = make(data, declared)
        if not vocabulary.size:
            raise ValueError("it is empty")
    except ValueError as error:
        from symbiotic_titan.data.tiktoken_files import is_tiktoken

        remedy = f"; {TIKTOKEN_REMEDY}" if is_tiktoken(data) else ""
        raise ValueError(
            f"tokenizer.path: {path!r} is no vocabulary of tokenizer.kind = {kind!r}: {error}{remedy}"
        ) from error
    return vocabulary
