"""Tiny vocabulary files, trained on a few sentences."""

import base64
import io
import json

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

SENTENCES = [
    "a red circle and a blue square",
    "how many circles are in the picture?",
    "there are three of them, <|im_end|> is text here",
    "größer 圆",
]
QWEN_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|box_start|>",
]


def byte_level_bpe(special=()):
    """As GPT-2's and Qwen's: any text, ids of the special tokens behind the others."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def word_piece():
    """As BERT's: lower case, special tokens in front and put around each text, cut and padded to 8."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer


def unigram():
    """As T5's: special tokens are pieces among others, which it finds in a text; spaces become part of the words."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=special,
        unk_token="<unk>",
        initial_alphabet=list("</>|_"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def whole_words(words):
    """Finds any of its words between spaces, also one that is special."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def sentence_piece(**options):
    """The bytes of a ``.model``."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=out,
        vocab_size=340,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"model_type": "bpe", "byte_fallback": True, **options},
    )
    return out.getvalue()


def write(folder, tokenizer, **declared):
    """``tokenizer`` as tokenizer.json or tokenizer.model in ``folder``, with a tokenizer_config.json where something is declared."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, bytes):
        (folder / "tokenizer.model").write_bytes(tokenizer)
    else:
        tokenizer.save(str(folder / "tokenizer.json"))
    if declared:
        (folder / "tokenizer_config.json").write_text(json.dumps(declared))
    return str(folder)


def write_vocabulary(path):
    """A tiktoken vocabulary of the single bytes and two merges."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"re", b"red"]
    lines = [b"%b %d" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    path.write_bytes(b"\n".join(lines) + b"\n")
