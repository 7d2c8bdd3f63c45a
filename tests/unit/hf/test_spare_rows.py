"""Embeddings are added at conversion where a vocabulary fills the table, and an export holds them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from symbiotic_titan.build import build_tokenizer
from symbiotic_titan.commands import convert
from symbiotic_titan.config.job import JobConfig, Model
from symbiotic_titan.config.tokenizer import Tokenizer
from symbiotic_titan.hf.model import open_model
from symbiotic_titan.hf.spare_rows import with_spare_rows
from symbiotic_titan.model.model_config import read_model_config
from symbiotic_titan.weights.safetensors import slices_in
from tests.helpers.released_models import (
    GLM,
    GLM_BESIDE,
    HUNYUAN,
    QWEN,
    args_of,
    random_besides,
    random_tensors,
    write_release,
)
from tests.helpers.tokenizer_files import whole_words, write

# Of the layer that predicts a further token: its own table fits the old vocabulary only.
FURTHER = "model.language_model.layers.3."


def run(*words) -> None:
    assert convert.main([str(word) for word in words]) == 0


def import_and_export(folder, release, *words):
    """(tensors of the checkpoint, tensors of the export, its config.json)."""
    run("from-hf", "--hf", release, "--out", folder / "imported", *words)
    run(
        *("to-hf", "--checkpoint", folder / "imported", "--part", "understanding"),
        *("--out", folder / "back"),
    )
    reader = open_model(folder / "imported")
    ours = {name: reader.read(name) for name in reader.tensors}
    theirs = {name: piece.read() for name, piece in slices_in(folder / "back").items()}
    return ours, theirs, json.loads((folder / "back" / "config.json").read_text())


@pytest.mark.parametrize(("number", "expected"), [(0, 128), (1, 192), (64, 192), (65, 256)])
def test_rows_are_added_up_to_a_multiple(number, expected):
    assert with_spare_rows(args_of(QWEN), number).vocab_size == expected


@pytest.mark.parametrize("config", [QWEN, HUNYUAN], ids=["untied", "tied"])
def test_added_rows_are_the_mean_of_the_others_and_are_written_back(tmp_path, config, capsys):
    tensors = write_release(tmp_path / "release", config, dtype=torch.bfloat16)
    ours, theirs, written = import_and_export(tmp_path, tmp_path / "release", "--spare-rows", 6)
    assert "each new row is the mean of the others" in capsys.readouterr().out
    text = config.get("text_config", config)
    before, after = text["vocab_size"], text["vocab_size"] + 64
    assert read_model_config(tmp_path / "imported" / "model.json").vocab_size == after
    assert written.get("text_config", written)["vocab_size"] == after
    for name in ("tok_embeddings.weight", "output.weight"):
        table = ours[name].float()
        assert table.shape == (after, 32)
        mean = sum(row.double() for row in table[:before]) / before
        assert torch.allclose(table[before:].double(), mean.expand(64, -1), atol=1e-3, rtol=0.01)
        assert torch.equal(table[before:], table[before].expand(64, -1))
    tied = torch.equal(ours["tok_embeddings.weight"], ours["output.weight"])
    assert tied == text.get("tie_word_embeddings", False)
    assert theirs.keys() == tensors.keys()
    grown = {name for name in tensors if theirs[name].shape != tensors[name].shape}
    assert len(grown) == (1 if tied else 2)
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name][: len(tensor)], tensor), name


def test_transformers_loads_what_has_more_rows(tmp_path):
    from transformers import Qwen3VLMoeForConditionalGeneration

    write_release(tmp_path / "release", QWEN)
    ours, _, _ = import_and_export(tmp_path, tmp_path / "release", "--spare-rows", 1)
    theirs, report = Qwen3VLMoeForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem]
    assert torch.equal(theirs.lm_head.weight, ours["output.weight"])


def test_a_further_layer_with_a_table_of_its_own_is_left_out(tmp_path, capsys):
    config = {**GLM, "text_config": {**GLM["text_config"], "num_nextn_predict_layers": 1}}
    shapes = GLM_BESIDE | {f"{FURTHER}embed_tokens.weight": (96, 32)}
    more = random_besides(shapes, torch.float32)
    tensors = random_tensors(config, {}, torch.float32)
    write_release(tmp_path / "release", config, tensors=tensors, more=more)
    _, theirs, written = import_and_export(tmp_path, tmp_path / "release", "--spare-rows", 1)
    assert theirs.keys() == tensors.keys()
    assert written["text_config"]["num_nextn_predict_layers"] == 0
    assert f"the release has {FURTHER}" in capsys.readouterr().err
    kept = load_file(tmp_path / "imported" / "hugging_face" / "left_behind.safetensors")
    assert kept.keys() == more.keys()


def test_the_conversion_says_how_many_rows_the_special_tokens_need(tmp_path, capsys):
    """And with them, the tokenizer that was refused is accepted."""
    write_release(tmp_path / "release", QWEN)
    path = write(tmp_path / "release", whole_words(str(i) for i in range(127)))
    run("from-hf", "--hf", tmp_path / "release", "--out", tmp_path / "full")
    error = capsys.readouterr().err
    assert (
        "warning: the tokenizer has 139 ids with the special tokens that it lacks (<pad>, " in error
    )
    assert "the model has 128 embeddings; add --spare-rows 11, or name unused tokens" in error
    section = Tokenizer(kind="huggingface", path=path)

    def tokenizer(folder):
        flavor = str(tmp_path / folder / "model.json")
        return build_tokenizer(JobConfig(model=Model(flavor=flavor), tokenizer=section))

    with pytest.raises(ValueError, match="139 ids.* 128 embeddings.*from-hf --spare-rows 11 adds"):
        tokenizer("full")
    run(*("from-hf", "--hf", tmp_path / "release", "--out", tmp_path / "more", "--spare-rows", 11))
    assert "warning" not in capsys.readouterr().err
    assert tokenizer("more").vocab_size == 139


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--spare-rows", "-1"], "--spare-rows: must be zero or positive, got -1"),
        (["--spare-rows", "6", "--shape-only"], "--spare-rows: adds rows to tensors, which --shape-only"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_added_are_one_line(tmp_path, capsys, words, message):
    write_release(tmp_path / "release", QWEN)
    command = ["from-hf", "--hf", str(tmp_path / "release"), "--out", str(tmp_path / "out"), *words]
    assert convert.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "out").exists()
