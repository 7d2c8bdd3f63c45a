"""A vocabulary of a demo world: its common words as tokens, all else in parts of words or in bytes."""

from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# Its file, below the folder of the demo world.
VOCABULARY = "tokenizer.json"


def vocabulary_of(texts: Iterable[str], size: int) -> str:
    """The content of a tokenizer.json of ``size`` ids, by byte-level byte pair encoding (arXiv 1508.07909). Every numeral is a token of its
    own; special tokens are left to [tokenizer].

    Raises:
        ValueError: ``texts`` are too short to give as many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    numerals = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([numerals, as_letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < size:
        raise ValueError(f"vocabulary: {size} ids are wanted, the texts give {found}")
    return tokenizer.to_str()


def texts_of(fields: Mapping[str, Any]) -> list[str]:
    """The texts of a sample of the demo world.

    Args:
        fields: the JSON beside its image, or its line of JSONL.
    """
    return [fields[key] for key in ("text", "caption", "question", "answer") if key in fields]
