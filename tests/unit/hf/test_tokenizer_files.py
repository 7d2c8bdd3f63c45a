"""The tokenizer among exported files is the run's: other libraries read the ids of training."""

import json

import pytest
import tokenizers

from symbiotic_titan.config.tokenizer import Tokenizer
from symbiotic_titan.data.tokenizer import open_tokenizer
from symbiotic_titan.hf.tokenizer_files import (
    files_of_export,
    named_class,
    run_tokenizer,
    tokenizer_note,
)
from tests.helpers.tokenizer_files import (
    QWEN_TOKENS,
    byte_level_bpe,
    sentence_piece,
    whole_words,
    write,
)

GENERATION = ["<|generation_start|>", "<|generation_pad|>", "<|generation_end|>"]


def exported(folder, files):
    """``files`` in a new ``folder``."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def release(folder, tokenizer, **declared):
    write(folder, tokenizer, **declared)
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "generation_config.json").write_text("{}")
    return folder


def test_a_release_without_a_run_keeps_its_files_as_they_are(tmp_path):
    folder = release(tmp_path / "release", byte_level_bpe(QWEN_TOKENS))
    files = files_of_export(folder, None)
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert tokenizer_note(files, None) is None
    assert json.loads(named_class(files)["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }


@pytest.mark.parametrize("listed", [False, True])
def test_added_tokens_get_the_ids_of_training(tmp_path, listed):
    from transformers import AutoTokenizer

    rows = {str(300 + i): {"content": t, "special": True} for i, t in enumerate(QWEN_TOKENS)}
    decoder = {"added_tokens_decoder": rows}
    declared = {"tokenizer_class": "Qwen2Tokenizer", **(decoder if listed else {})}
    folder = release(tmp_path / "release", byte_level_bpe(QWEN_TOKENS), **declared)
    section = Tokenizer(kind="huggingface", path=str(folder), special={"bos": "<|begin|>"})
    run, opened = run_tokenizer(section), open_tokenizer(section)
    assert list(run.added) == ["<|begin|>", *GENERATION]
    files = files_of_export(folder, run)
    assert tokenizer_note(files, run) is None
    theirs = AutoTokenizer.from_pretrained(exported(tmp_path / "out", named_class(files)))
    assert {t: theirs.convert_tokens_to_ids(t) for t in opened.special_ids} == opened.special_ids
    assert theirs.decode([opened.special_ids["<|begin|>"]], skip_special_tokens=True) == ""
    assert (b"<|begin|>" in files["tokenizer_config.json"]) == listed
    assert len(theirs) == opened.vocab_size


def test_another_tokenizer_than_the_releases_takes_the_place_of_all_its_files(tmp_path):
    from transformers import AutoTokenizer

    folder = release(tmp_path / "release", byte_level_bpe(QWEN_TOKENS), chat_template="theirs")
    own = write(tmp_path / "own", byte_level_bpe(["<mine>"]))
    (tmp_path / "own" / "notes.json").write_text("{}")
    section = Tokenizer(kind="huggingface", path=own)
    files = files_of_export(folder, run_tokenizer(section))
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"}
    theirs = AutoTokenizer.from_pretrained(exported(tmp_path / "out", files))
    opened = open_tokenizer(section)
    assert theirs.convert_tokens_to_ids("<vae>") == opened.special.vae and len(opened.added) > 8
    text = "a red circle, größer 圆"
    assert theirs(text, add_special_tokens=False)["input_ids"] == opened.encode(text)


def test_a_run_from_scratch_exports_the_file_it_names(tmp_path):
    path = write(tmp_path / "own", byte_level_bpe()) + "/tokenizer.json"
    files = files_of_export(None, run_tokenizer(Tokenizer(kind="huggingface", path=path)))
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json"}
    assert tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode()).token_to_id("<vae>")
    none = run_tokenizer(Tokenizer())
    assert files_of_export(None, none) == {} == named_class({})
    note = "no tokenizer: neither the run nor a release has a file of one"
    assert tokenizer_note({}, none) == tokenizer_note({}, None) == note


def test_bytes_are_warned_of_where_the_release_has_a_tokenizer(tmp_path):
    folder = release(tmp_path / "release", byte_level_bpe(QWEN_TOKENS))
    run = run_tokenizer(Tokenizer())
    files = files_of_export(folder, run)
    assert files == files_of_export(folder, None)
    assert "the run's was tokenizer.kind = 'bytes', which has no file" in tokenizer_note(files, run)


def test_sentencepiece_has_its_added_tokens_in_the_config_beside_it(tmp_path):
    section = Tokenizer(kind="sentencepiece", path=write(tmp_path / "bare", sentence_piece()))
    run = run_tokenizer(section)
    files = files_of_export(None, run)
    assert files.keys() == {"tokenizer.model"}
    assert "cannot tell the class of tokenizer.model" in tokenizer_note(files, run)
    declared = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>"}
    path = write(tmp_path / "llama", sentence_piece(), **declared, eos_token="</s>")
    run = run_tokenizer(Tokenizer(kind="sentencepiece", path=path))
    files = files_of_export(None, run)
    assert tokenizer_note(files, run) is None
    listed = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
    assert {row["content"]: int(i) for i, row in listed.items()} == run.added


def test_ids_with_gaps_are_named_and_the_file_is_left_as_it_was(tmp_path):
    path = write(tmp_path / "gaps", whole_words(["a", "b"])) + "/tokenizer.json"
    values = json.loads((tmp_path / "gaps" / "tokenizer.json").read_text())
    values["model"]["vocab"] = {"[UNK]": 0, "a": 1, "b": 7}
    (tmp_path / "gaps" / "tokenizer.json").write_text(json.dumps(values))
    run = run_tokenizer(Tokenizer(kind="huggingface", path=path))
    assert run.added["<vae>"] > 7
    files = files_of_export(None, run)
    assert files["tokenizer.json"] == run.content
    assert "tokenizer.json does not have <pad>, " in tokenizer_note(files, run)
    assert "its ids have gaps" in tokenizer_note(files, run)
