"""Resize rules, tokenizer kinds and families of special tokens that another package registers."""

from dataclasses import replace

import pytest
from PIL import Image

from symbiotic_titan.config.tokenizer import QWEN, TOKEN_FAMILIES, TOKENIZER_KINDS, Tokenizer
from symbiotic_titan.data.images import vit_patches
from symbiotic_titan.data.tokenizer import ByteTokenizer, open_tokenizer
from symbiotic_titan.extend import (
    register_resize_rule,
    register_token_family,
    register_tokenizer_kind,
)
from symbiotic_titan.model.vit_args import VitArgs
from symbiotic_titan.sequence.geometry import RESIZE_RULES
from tests.helpers.tokenizer_files import QWEN_TOKENS, byte_level_bpe, write


@pytest.fixture(autouse=True)
def own_registries():
    with RESIZE_RULES.temporarily(), TOKENIZER_KINDS.temporarily(), TOKEN_FAMILIES.temporarily():
        yield


def test_a_registered_resize_rule_sizes_input_images(geometry):
    @register_resize_rule("smallest")
    def smallest(height, width, geometry, max_pixels, min_pixels):
        return geometry.vit_token_pixels, 2 * geometry.vit_token_pixels

    segment = vit_patches(
        Image.new("RGB", (50, 90)), 1024, replace(geometry, vit_resize="smallest")
    )
    assert (segment.rows, segment.columns) == (1, 2)


SIZES = {"dim": 32, "num_layers": 1, "num_heads": 2, "hidden_dim": 64, "patch": 4, "merge": 2}


def test_an_unknown_resize_rule_is_refused():
    with pytest.raises(ValueError, match="vit.image_resize = 'largest': .* choose from fit, qwen"):
        VitArgs(**SIZES, image_resize="largest")


def test_a_registered_tokenizer_is_chosen_by_its_name():
    class Shouting(ByteTokenizer):
        def encode(self, text):
            return super().encode(text.upper())

    register_tokenizer_kind("shouting")(lambda section: Shouting())
    assert open_tokenizer(Tokenizer(kind="shouting")).encode("a") == [ord("A")]


def test_a_registered_family_is_found_by_its_signs(tmp_path):
    path = write(tmp_path, byte_level_bpe([*QWEN_TOKENS, "<|mine|>"]))
    section = Tokenizer(kind="huggingface", path=path)
    assert (
        open_tokenizer(section).special == open_tokenizer(replace(section, family="qwen")).special
    )
    special = QWEN.special | {"eos": "<|im_end|>"}
    family = replace(QWEN, special=special, signs=("<|im_start|>", "<|mine|>"))
    register_token_family("mine", family)
    tokenizer = open_tokenizer(section)
    assert tokenizer.special.eos == tokenizer.special_ids["<|im_end|>"]


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="tokenizer.family = 'qwn': .* choose from aria, qwen"):
        Tokenizer(kind="huggingface", path="x", family="qwn")
