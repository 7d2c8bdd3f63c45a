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

from symbiotic_titan.config.job import JobConfig, Model
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.config.tokenizer import FAMILIES, PLAIN, Tokenizer
from symbiotic_titan.data.identity import check_identity, identity_of
from symbiotic_titan.data.tokenizer import ByteTokenizer, Turn, open_tokenizer
from symbiotic_titan.sequence.modality import IGNORE_INDEX
from symbiotic_titan.sequence.vocabulary import SpecialTokens
from symbiotic_titan.train_spec import build_tokenizer
from tests.unit.data.tokenizer_files import (
    QWEN_TOKENS,
    byte_level_bpe,
    sentence_piece,
    unigram,
    whole_words,
    word_piece,
    write,
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Kind of vocabulary -> (tokenizer.kind, folder)."""
    root = tmp_path_factory.mktemp("vocabularies")
    words = ["a", "red", "circle", "<s>", "</s>", "<vit>"]
    return {
        "qwen": ("huggingface", write(root / "qwen", byte_level_bpe(QWEN_TOKENS))),
        "bpe": ("huggingface", write(root / "bpe", byte_level_bpe())),
        "wordpiece": ("huggingface", write(root / "wordpiece", word_piece())),
        "unigram": ("huggingface", write(root / "unigram", unigram())),
        "words": (
            "huggingface",
            write(
                root / "words", whole_words(words), bos_token="<s>", eos_token={"content": "</s>"}
            ),
        ),
        "sentencepiece": ("sentencepiece", write(root / "sp", sentence_piece())),
        "sentencepiece_symbols": (
            "sentencepiece",
            write(
                root / "symbols",
                sentence_piece(user_defined_symbols=["<vit>", "<user>"], pad_id=3, bos_id=-1),
            ),
        ),
    }


@pytest.fixture(scope="session")
def open_(folders):
    return lambda name, **section: open_tokenizer(
        Tokenizer(kind=folders[name][0], path=folders[name][1], **section)
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
    assert all(list(family.special) == roles for family in FAMILIES.values())


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
from symbiotic_titan.data.vocabulary_files import open_vocabulary
text = "a red circle " * 1000
for kind, path in zip(("huggingface", "sentencepiece"), sys.argv[1:]):
    vocabulary = open_vocabulary(Tokenizer(kind=kind, path=path), open(path, "rb").read(), {})
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
    identity = identity_of(make_loader().recipe)
    old = {key: value for key, value in identity.items() if key != "tokenizer"}
    check_identity(old, identity)
    with pytest.raises(ValueError, match="was bytes, now it is sentencepiece"):
        check_identity(old, identity | {"tokenizer": open_("sentencepiece").fingerprint})


# ---- flavors ----------------------------------------------------------------------------------------------------------


def test_a_vocabulary_may_fill_the_flavor_and_not_a_token_more(tmp_path):
    def job(flavor, num_words):
        words = whole_words(str(i) for i in range(num_words))
        section = Tokenizer(kind="huggingface", path=write(tmp_path / flavor, words))
        return JobConfig(model=Model(flavor=flavor), tokenizer=section)

    fits = 151_936 - 11 - 1  # our special tokens, and [UNK]
    assert build_tokenizer(job("1B-A0.3B", fits)).vocab_size == 151_936
    with pytest.raises(
        ValueError,
        match="151937 ids, among them 11 special tokens .* more than the 151936 embeddings of model.flavor = "
        "'30B-A3B'; .* a file with at most 151925 ids",
    ):
        build_tokenizer(job("30B-A3B", fits + 1))


SECTION = """
[tokenizer]
kind = "huggingface"
path = "{path}"
turn_separator = "\\n\\n"
[tokenizer.special]
eos = "<|im_end|>"
[tokenizer.turns]
tool = ["<|im_start|>tool\\n", "<|im_end|>"]
"""


def test_the_section_is_read_from_toml_and_its_types_are_checked(tmp_path, folders):
    file = tmp_path / "job.toml"
    file.write_text(SECTION.format(path="elsewhere"))
    options = ["--job.config_file", str(file), "--tokenizer.path", folders["qwen"][1]]
    tokenizer = build_tokenizer(load_job_config([*options, "--model.flavor", "1B-A0.3B"]))
    assert [tokenizer.special.eos] == tokenizer.turn("tool").suffix
    assert tokenizer.separator == tokenizer.encode("\n\n")
    file.write_text('[tokenizer.turns]\nuser = ["<user>", 1]')
    with pytest.raises(ValueError, match=r"tokenizer.turns.user\[1\]: must be a string, got 1"):
        load_job_config(options)
    file.write_text('[tokenizer]\nkind = "tiktoken"')
    with pytest.raises(ValueError, match="tokenizer.kind: must be one of 'bytes', 'huggingface'"):
        load_job_config(options)


def test_bytes_stay_the_default():
    assert isinstance(build_tokenizer(JobConfig()), ByteTokenizer)


# ---- bad input --------------------------------------------------------------------------------------------------------

FILE = {"kind": "huggingface", "path": "x"}
BAD_SECTIONS = [
    ({"path": "x"}, r"tokenizer.path: has no effect with tokenizer.kind = 'bytes'"),
    ({"family": "qwen"}, r"tokenizer.family: has no effect"),
    ({"turn_separator": "\n"}, r"tokenizer.turn_separator: has no effect"),
    (
        {"kind": "huggingface"},
        r"tokenizer.path: empty; tokenizer.kind = 'huggingface' needs a local",
    ),
    (
        FILE | {"special": {"boss": "<s>"}},
        r"tokenizer.special: unknown key 'boss'; did you mean 'bos'",
    ),
    (FILE | {"special": {"vit": "§"}}, r"at least two characters, got '§'"),
    (FILE | {"turn_tokens": [""]}, r"at least two characters, got ''"),
    (
        FILE | {"turns": {"user": ["<user>"]}},
        r"tokenizer.turns.user: must be two strings.*got \['<user>'\]",
    ),
]


@pytest.mark.parametrize(("section", "message"), BAD_SECTIONS)
def test_a_section_that_cannot_be_meant_is_refused(section, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(**section)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"special": {"vae": "<vit>"}}, r"special.vit: '<vit>' serves vae as well"),
        ({"special": {"vit": "<user>"}}, r"special.vit: '<user>' serves turn_tokens as well"),
        ({"special": {"pad": "[UNK]"}}, r"'\[UNK\]' is what unknown characters become"),
        ({"turns": {"assistant": ["<assistant>", ""]}}, r"turns.assistant: no token stands behind"),
    ],
)
def test_special_tokens_that_cannot_work_are_refused(open_, section, message):
    with pytest.raises(ValueError, match=message):
        open_("wordpiece", **section)


BAD_FILES = [
    ("huggingface", "tokenizer.json", b"{", r"is no vocabulary .*'huggingface': Expecting"),
    ("huggingface", "tokenizer.json", b"\xff\xfe", r"is no vocabulary"),
    ("huggingface", "tokenizer.json", b"[]", r"it describes no model"),
    ("huggingface", "tokenizer.json", b'{"model": null}', r"it describes no model"),
    ("huggingface", "tokenizer.json", b'{"model": {}}', r"the tokenizers library cannot read it"),
    ("sentencepiece", "tokenizer.model", b"", r"it is empty"),
    ("sentencepiece", "tokenizer.model", b"nonsense", r"the sentencepiece library cannot read it"),
]


@pytest.mark.parametrize(("kind", "name", "data", "message"), BAD_FILES)
def test_a_file_that_is_no_vocabulary_is_named(tmp_path, kind, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"tokenizer.path: '{tmp_path}' .*{message}"):
        open_tokenizer(Tokenizer(kind=kind, path=str(tmp_path)))


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("huggingface", [], r"has no tokenizer.json; name the file, or the folder"),
        ("huggingface", ["spiece.model"], r"set tokenizer.kind = 'sentencepiece'"),
        ("huggingface", ["vocab.json", "merges.txt"], r"with AutoTokenizer and save_pretrained"),
        ("sentencepiece", ["tokenizer.json"], r"set tokenizer.kind = 'huggingface'"),
        ("sentencepiece", ["a.model", "b.model"], r"several models \(a.model, b.model\); name one"),
    ],
)
def test_a_folder_without_the_file_says_what_to_do(tmp_path, kind, files, message):
    for name in files:
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=message):
        open_tokenizer(Tokenizer(kind=kind, path=str(tmp_path)))
    with pytest.raises(ValueError, match="there is no file or folder 'nowhere'"):
        open_tokenizer(Tokenizer(kind=kind, path="nowhere"))


def test_the_only_model_of_a_folder_is_found_whatever_its_name(tmp_path, folders):
    data = (Path(folders["sentencepiece"][1]) / "tokenizer.model").read_bytes()
    (tmp_path / "spiece.model").write_bytes(data)
    section = Tokenizer(kind="sentencepiece", path=str(tmp_path))
    assert open_tokenizer(section).encode("a red") != []


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_tokenizer_config_is_named(tmp_path, text):
    write(tmp_path, byte_level_bpe())
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"tokenizer_config.json' (cannot be parsed|must hold a JSON)"
    ):
        open_tokenizer(Tokenizer(kind="huggingface", path=str(tmp_path)))
