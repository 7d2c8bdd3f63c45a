import dataclasses
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import jinja2
import pytest
import tokenizers

from symbiotic_titan.config.tokenizer import PLAIN, TOKEN_FAMILIES, Tokenizer
from symbiotic_titan.data.fingerprint import (
    check_fingerprint,
    fingerprint_of,
)
from symbiotic_titan.data.tokenizer import ByteTokenizer, Turn, open_tokenizer
from symbiotic_titan.sequence.modality import IGNORE_INDEX, SpecialTokens
from tests.helpers.tokenizer_files import (
    QWEN_TOKENS,
    byte_level_bpe,
    whole_words,
    write,
)

ALL = ["qwen", "bpe", "wordpiece", "unigram", "words", "sentencepiece", "sentencepiece_symbols"]
ANY_TEXT = ["qwen", "bpe", "sentencepiece", "sentencepiece_symbols"]


def special_ids(tokenizer):
    turns = [ids for role in ("user", "assistant") for ids in tokenizer.turn(role)]
    return set(dataclasses.astuple(tokenizer.special)) | {
        i for ids in turns for i in ids if not tokenizer.decode([i])
    }


def conversation(tokenizer, *turns):
    """Ids as samples lay them out, and whether each is trained."""
    ids, trained = [tokenizer.special.bos], [False]
    for number, (role, text) in enumerate(turns):
        prefix, suffix = tokenizer.turn(role)
        untrained = [*(tokenizer.separator if number else []), *prefix]
        body = [*tokenizer.encode(text), *suffix]
        ids += untrained + body
        trained += [False] * len(untrained) + [role == "assistant"] * len(body)
    return ids, trained


# ---- text to ids and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_known_words_survive_encoding_and_decoding(open_, name):
    tokenizer = open_(name)
    assert tokenizer.decode(tokenizer.encode("a red circle")) == "a red circle"
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("name", ANY_TEXT)
def test_emoji_other_scripts_and_invalid_characters_are_no_error(open_, name):
    tokenizer = open_(name)
    for text in ("größer 圆", "👩‍🚀 und 🙂", "a\ud800b", "x\udfff", "tab\tnewline\nend"):
        back = tokenizer.decode(tokenizer.encode(text))
        # SentencePiece replaces white space by spaces.
        expected = text.encode("utf-8", "replace").decode()
        assert back in (expected, " ".join(expected.split()))


def test_special_tokens_and_ids_of_no_token_are_not_decoded(open_):
    for name in ALL:
        tokenizer = open_(name)
        text = tokenizer.encode("a red circle")
        beyond = [tokenizer.vocab_size, 151_935]
        ids = [tokenizer.special.bos, *text, tokenizer.special.vae, *beyond]
        assert tokenizer.decode(ids) == "a red circle"


def test_what_a_file_says_about_cutting_padding_and_ends_is_not_done_to_text(open_):
    tokenizer = open_("wordpiece")
    text = "how many circles are in the picture there are three of them"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 1


# ---- special tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_text_never_becomes_a_special_token(open_, name):
    tokenizer = open_(name)
    tokens = [*tokenizer.special_ids, "<unk>", *QWEN_TOKENS, *PLAIN.tokens]
    for token in tokens:
        for text in (token, f"a {token} b", token + token, f"x{token}"):
            assert special_ids(tokenizer).isdisjoint(tokenizer.encode(text)), text


@pytest.mark.parametrize("name", ANY_TEXT)
def test_a_special_token_in_a_text_comes_back_as_the_text_it_was(open_, name):
    tokenizer = open_(name)
    for token in [*tokenizer.special_ids, "<|im_end|>"]:
        text = f"say {token} twice: {token}"
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_special_role_has_a_default_in_every_family():
    roles = [field.name for field in dataclasses.fields(SpecialTokens)]
    assert all(
        list(family.special) == roles for family in map(TOKEN_FAMILIES.__getitem__, TOKEN_FAMILIES)
    )


def test_qwen_files_keep_their_tokens_and_get_those_for_generated_images_behind(open_, folders):
    tokenizer = open_("qwen")
    file = tokenizers.Tokenizer.from_file(folders["qwen"][1] + "/tokenizer.json")
    size = file.get_vocab_size()
    special = tokenizer.special
    assert special.pad == special.bos == special.eos == file.token_to_id("<|endoftext|>")
    assert special.vit_start == file.token_to_id("<|vision_start|>")
    assert special.vit == file.token_to_id("<|image_pad|>")
    assert (special.vae_start, special.vae, special.vae_end) == (size, size + 1, size + 2)
    assert tokenizer.added == [
        "<|generation_start|>",
        "<|generation_pad|>",
        "<|generation_end|>",
    ]
    assert tokenizer.vocab_size == tokenizer.get_vocab_size() == size + 3
    assert tokenizer.eos_id == special.eos


def test_other_files_get_our_tokens_behind_their_vocabulary(open_, folders):
    tokenizer = open_("bpe")
    ids = dataclasses.astuple(tokenizer.special)
    size = tokenizers.Tokenizer.from_file(folders["bpe"][1] + "/tokenizer.json").get_vocab_size()
    assert ids == tuple(range(size, size + 9))
    assert tokenizer.vocab_size == size + 11 and len(tokenizer.added) == 11
    assert tokenizer.turn("user") == Turn([size + 9], [])
    assert tokenizer.turn("assistant") == Turn([size + 10], [tokenizer.special.eos])
    assert tokenizer.turn("system") == Turn([], [])


def test_begin_end_and_padding_are_those_that_the_file_declares(open_):
    words = open_("words")
    assert (words.special.bos, words.special.eos) == (4, 5)
    assert words.turn("assistant").suffix == [5]
    assert words.special.pad == 7  # the first that the file lacks
    assert words.special.vit == 6  # a word of the file
    piece = open_("sentencepiece_symbols")
    assert (piece.special.eos, piece.special.pad) == (2, 3)
    assert piece.special.bos >= piece._file.size


def test_a_declared_token_that_stands_for_unknown_text_is_passed_over(tmp_path):
    folder = write(tmp_path, whole_words(["a"]), pad_token="[UNK]")
    tokenizer = open_tokenizer(Tokenizer(kind="huggingface", path=folder))
    assert tokenizer.special.pad == 2 and tokenizer.encode("a b") == [1, 0]


def test_the_section_overrides_the_family(open_):
    tokenizer = open_("qwen", special={"eos": "<|im_end|>", "vit": "<|box_start|>", "vae": "<|x|>"})
    assert tokenizer.special.eos == tokenizer.turn("assistant").suffix[0]
    assert tokenizer.special.vit == tokenizer._file.id_of("<|box_start|>")
    assert "<|x|>" in tokenizer.added and "<|generation_pad|>" not in tokenizer.added
    plain = open_("qwen", family="plain")
    assert "<user>" in plain.added and plain.separator == []


# ---- turns ------------------------------------------------------------------------------------------------------------

CHAT_ML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"


def test_turns_of_qwen_are_those_of_its_chat_template(open_, folders):
    turns = [("system", "s"), ("user", "how many?"), ("assistant", "three"), ("user", "and red?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    text = jinja2.Template(CHAT_ML, keep_trailing_newline=True).render(messages=messages)
    file = tokenizers.Tokenizer.from_file(folders["qwen"][1] + "/tokenizer.json")
    ids, _ = conversation(open_("qwen"), *turns)
    # Begun by the token between two texts; nothing follows the last turn.
    assert ids == file.encode("<|endoftext|>" + text.removesuffix("\n")).ids


@pytest.mark.parametrize("name", ["qwen", "bpe", "sentencepiece"])
def test_what_is_trained_is_the_answers_and_what_ends_them(open_, name):
    tokenizer = open_(name)
    turns = [("user", "how many?"), ("assistant", "three"), ("user", "red?"), ("assistant", "one")]
    ids, trained = conversation(tokenizer, *turns)
    end = tokenizer.turn("assistant").suffix
    assert len(end) == 1
    labelled = [i for i, is_trained in zip(ids, trained, strict=True) if is_trained]
    assert labelled == [*tokenizer.encode("three"), *end, *tokenizer.encode("one"), *end]


def test_turns_can_be_given_as_text_with_tokens_of_the_file(open_):
    tokenizer = open_(
        "bpe",
        turns={"user": ["### Q: ", ""], "assistant": ["<A>", "{eos}!"], "tool": ["<T>", ""]},
        turn_tokens=["<A>", "<T>"],
        turn_separator="\n\n",
    )
    assert tokenizer.turn("user") == Turn(tokenizer.encode("### Q: "), [])
    [answer] = tokenizer.turn("assistant").prefix
    assert answer >= tokenizer._file.size and [answer] != tokenizer.turn("tool").prefix
    assert tokenizer.turn("assistant").suffix == [tokenizer.special.eos, *tokenizer.encode("!")]
    assert tokenizer.separator == tokenizer.encode("\n\n")
    assert "<user>" not in tokenizer.added  # no turn uses it any more


def test_an_unknown_role_is_named_with_those_that_are_known(open_):
    for tokenizer in (ByteTokenizer(), open_("qwen")):
        with pytest.raises(
            ValueError, match="role 'tool' has no turn; known: system, user, assistant"
        ):
            tokenizer.turn("tool")


def _answers(path):
    answers = set()
    for shard in Path(path).glob("*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    answers.add(json.load(tar.extractfile(member))["answer"])
    return answers


def test_labels_of_packed_questions_are_answers_and_nothing_else(
    open_, make_loader, demo_config, demo_world
):
    tokenizer = open_("qwen")
    sources = [source for source in demo_config.sources if source.task == "mmu"]
    loader = make_loader({"sources": sources}, tokenizer=tokenizer, seq_len=512)
    batch = next(iter(loader))
    labels = batch.labels[batch.labels != IGNORE_INDEX].tolist()
    [end] = tokenizer.turn("assistant").suffix
    answers, ids = [], []
    for label in labels:
        if label == end:
            answers.append(tokenizer.decode(ids))
            ids = []
        else:
            ids.append(label)
    assert not ids and len(answers) == batch.document.max() + 1
    assert set(answers) <= _answers(demo_world / "train" / "mmu")


# ---- worker processes and resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_pickled_tokenizer_is_the_same_without_its_file(open_, folders, tmp_path, name):
    kind, folder = folders[name]
    [file] = [f for f in Path(folder).iterdir() if f.name != "tokenizer_config.json"]
    copy = tmp_path / file.name
    copy.write_bytes(file.read_bytes())
    tokenizer = open_tokenizer(Tokenizer(kind=kind, path=str(copy)))
    copy.unlink()
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other.fingerprint == tokenizer.fingerprint and other.special == tokenizer.special
    text = "a red circle <|im_end|> <vit> [CLS]"
    assert other.encode(text) == tokenizer.encode(text)


FORKED = """
import os, sys
from symbiotic_titan.config.tokenizer import Tokenizer
from symbiotic_titan.data.tokenizer import open_tokenizer
text = "a red circle " * 1000
for kind, path in zip(("huggingface", "sentencepiece"), sys.argv[1:]):
    vocabulary = open_tokenizer(Tokenizer(kind=kind, path=path))
    ids = vocabulary.encode(text)
    child = os.fork()
    if child == 0:
        os._exit(0 if vocabulary.encode(text) == ids else 1)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_worker_encodes_without_a_word_about_parallelism(folders):
    files = [
        folders["bpe"][1] + "/tokenizer.json",
        folders["sentencepiece"][1] + "/tokenizer.model",
    ]
    command = [sys.executable, "-c", FORKED, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_fingerprint_is_of_content_tokens_and_turns_and_not_of_the_path(open_, tmp_path):
    one = open_("bpe").fingerprint
    moved = write(tmp_path, byte_level_bpe())
    assert open_tokenizer(Tokenizer(kind="huggingface", path=moved)).fingerprint == one
    assert one.startswith("huggingface ")
    others = [
        open_("qwen", family="plain"),
        open_("bpe", family="qwen"),
        open_("bpe", special={"pad": "<eos>"}),
        open_("bpe", turns={"user": ["<user> ", ""]}),
        open_("bpe", turn_separator="\n"),
        open_("sentencepiece"),
    ]
    assert len({one, "bytes", *(t.fingerprint for t in others)}) == 8


def test_resuming_with_another_tokenizer_is_refused(open_, make_loader):
    saved = make_loader().state_dict()
    make_loader().load_state_dict(saved)
    with pytest.raises(
        ValueError, match=r"tokenizer .* was bytes, now it is huggingface [0-9a-f]{16}; samples"
    ):
        make_loader(tokenizer=open_("qwen")).load_state_dict(saved)


def test_a_state_from_before_there_were_other_tokenizers_is_one_of_bytes(open_, make_loader):
    identity = fingerprint_of(make_loader().spec)
    old = {key: value for key, value in identity.items() if key != "tokenizer"}
    check_fingerprint(old, identity)
    with pytest.raises(ValueError, match="was bytes, now it is sentencepiece"):
        check_fingerprint(old, identity | {"tokenizer": open_("sentencepiece").fingerprint})
