"""A tiny demo world on disk and a loader over it; tokenizer files of every kind."""

from dataclasses import replace

import pytest

from symbiotic_titan.config.data import Data
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.config.tokenizer import Tokenizer
from symbiotic_titan.data.pipeline import build_loader
from symbiotic_titan.data.tokenizer import ByteTokenizer, open_tokenizer
from symbiotic_titan.demo.write import (
    write_world,
)
from symbiotic_titan.sequence.geometry import ImageGeometry
from tests.helpers.demo_world import TINY, WEIGHTS, fixed_texts
from tests.helpers.tokenizer_files import (
    QWEN_TOKENS,
    byte_level_bpe,
    sentence_piece,
    unigram,
    whole_words,
    word_piece,
    write,
)


@pytest.fixture(scope="session")
def demo_world(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("symbiotic_titan.demo.write.standard_library_texts", fixed_texts)
        write_world(out, seed=0, size=TINY)
    return out


@pytest.fixture(scope="session")
def geometry():
    return ImageGeometry(
        vit_patch=4, vit_merge=2, vit_channels=3, latent_channels=3, latent_stride=1, latent_patch=4
    )


@pytest.fixture(scope="session")
def demo_config(demo_world):
    """The four tasks, mixed 3:3:2:2."""
    sources = []
    for task, weight in WEIGHTS.items():
        kind, ending = ("jsonl", "jsonl") if task == "lm" else ("webdataset", "tar")
        path = f"{demo_world}/train/{task}/*.{ending}"
        sources.append({"name": task, "task": task, "format": kind, "path": path, "weight": weight})
    return Data(sources=sources, lookahead=8)


@pytest.fixture(scope="session")
def make_loader(demo_config, geometry):
    """build_loader over the tiny demo world; keywords replace settings, ``data`` replaces fields of the config."""

    def make(data=None, **settings):
        config = replace(demo_config, **(data or {}))
        defaults = {
            "latents": Latents(),
            "geometry": geometry,
            "rotary_layout": "shared",
            "tokenizer": ByteTokenizer(),
            "seq_len": 256,
            "local_batch_size": 1,
            "global_batch_size": 4,
        }
        return build_loader(config, **(defaults | settings))

    return make


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
