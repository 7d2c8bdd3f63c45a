import re
from pathlib import Path

import pytest

from symbiotic_titan.build import build_tokenizer
from symbiotic_titan.config.job import JobConfig, Model
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.config.tokenizer import Tokenizer
from symbiotic_titan.data.tokenizer import ByteTokenizer, open_tokenizer
from symbiotic_titan.model.flavors import model_args
from tests.helpers.tokenizer_files import byte_level_bpe, whole_words, write

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
        "'30B-A3B'; .* set model.vocab_size = 152000; .* a file with at most 151925 ids",
    ):
        build_tokenizer(job("30B-A3B", fits + 1))


def test_a_model_from_scratch_takes_as_many_embeddings_as_its_tokenizer_needs(tmp_path):
    section = ["--tokenizer.kind", "huggingface", "--tokenizer.path"]
    section.append(write(tmp_path, whole_words(str(i) for i in range(1000))))
    with pytest.raises(ValueError, match="320 embeddings of model.flavor = 'debug'") as refusal:
        build_tokenizer(load_job_config(section))
    [size] = re.findall(r"set model.vocab_size = (\d+);", str(refusal.value))
    config = load_job_config([*section, "--model.vocab_size", size])
    assert build_tokenizer(config).vocab_size == 1012 <= model_args(config).vocab_size == 1024
    with pytest.raises(ValueError, match="1000 embeddings of model.vocab_size = 1000; "):
        build_tokenizer(load_job_config([*section, "--model.vocab_size", "1000"]))
    with pytest.raises(ValueError, match=r"model.vocab_size: must .* or 0 \(those of the flavor\)"):
        load_job_config(["--model.vocab_size", "-1"])


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
    with pytest.raises(
        ValueError,
        match="tokenizer.kind = 'tiktoken': .* choose from bytes, huggingface, sentencepiece",
    ):
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
        open_tokenizer(Tokenizer(**section))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"special": {"vae": "<vit>"}}, r"special.vit: '<vit>' serves vae as well"),
        ({"special": {"vit": "<user>"}}, r"special.vit: '<user>' serves turn_tokens as well"),
        ({"special": {"pad": "[UNK]"}}, r"'\[UNK\]' is what unknown characters become"),
        ({"turns": {"assistant": ["<assistant>", ""]}}, r"turns.assistant: no token comes after"),
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
