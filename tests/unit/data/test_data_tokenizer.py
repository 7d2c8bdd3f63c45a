from dataclasses import astuple

from symbiotic_titan.data.tokenizer import ByteTokenizer, Turn


def test_any_text_survives_encoding_and_decoding():
    tokenizer = ByteTokenizer()
    for text in ("", "a red circle", "größer 圆 🙂", "\x00\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_lie_behind_the_bytes_and_are_not_decoded():
    tokenizer = ByteTokenizer()
    special = tokenizer.special
    assert (special.pad, special.vae_end) == (256, 266)
    assert tokenizer.vocab_size == tokenizer.get_vocab_size() == 267
    assert tokenizer.decode([special.bos, *b"ok", special.eos]) == "ok"


def test_text_that_is_not_unicode_is_replaced_and_not_an_error():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"
    assert tokenizer.decode([0xFF, ord("a")]) == "\ufffda"


def test_ids_of_special_tokens_and_turns_are_those_that_checkpoints_were_trained_with():
    tokenizer = ByteTokenizer()
    assert astuple(tokenizer.special) == (256, 257, 258, 261, 262, 263, 264, 265, 266)
    assert tokenizer.turn("user") == Turn([259], [])
    assert tokenizer.turn("assistant") == Turn([260], [258])
    assert tokenizer.turn("system") == Turn([], []) and tokenizer.separator == []
    assert tokenizer.special_ids["<user>"] == 259 and len(tokenizer.special_ids) == 11
