"""An export of each architecture continues a prompt in transformers with the tokens that our generator chooses."""

import copy
from dataclasses import replace

import pytest
import torch

from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.data.documents import TextSegment
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.data.sequence_builder import SequenceBuilder
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.hf.export import export_understanding
from symbiotic_titan.hf.model import HuggingFaceModel
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.inference.prompts import PromptMaker
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.model.vit_args import VitArgs
from tests.helpers.forked import ROOT
from tests.helpers.image_rows import released_inputs, released_squares
from tests.helpers.pictures import picture
from tests.helpers.released_configs import HUNYUAN, HUNYUAN_SIZES
from tests.helpers.released_models import ARIA, GLM, QWEN, write_release

TOKENIZER = ByteTokenizer()
SPECIAL = TOKENIZER.special
NUM_TOKENS = 12
# Tables where a release states its vocabulary and the token of an image.
QWEN_BYTES = {"image_token_id": SPECIAL.vit, "vision_start_token_id": SPECIAL.vit_start}
RELEASES = {
    "qwen3_vl_moe": (QWEN, QWEN_BYTES),
    "glm4v_moe": (GLM, {"image_token_id": SPECIAL.vit}),
    "aria": (ARIA, {"image_token_index": SPECIAL.vit}),
}


def in_bytes(config, settings):
    out = copy.deepcopy(config) | settings
    out["text_config"]["vocab_size"] = 320
    return out


def ours_of(stored, args):
    model = SymbioticModel(args)
    model.init_weights()
    state = model.state_dict()
    stored.read_into({name: state[name] for name in stored.tensors})
    return model.eval()


def job(args):
    """The debug config with room for the images of ``args``."""
    config = load_job_config(["--job.config_file", str(ROOT / "train_configs" / "debug.toml")])
    if args.vit.queries:
        side = max(args.vit.query_sides) * args.vit.patch
        config.data.vit_pixels, config.data.vit_min_pixels = side**2, 64
    return config


def continued(theirs, inputs):
    """Greedy tokens under the rules of our generator: no token that begins an image, an end of turn ends the text."""
    banned = [SPECIAL.vit_start, SPECIAL.vit, SPECIAL.vae_start, SPECIAL.vae]
    banned += range(TOKENIZER.vocab_size, 320)
    settings = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "pad_token_id": SPECIAL.pad}
    out = theirs.generate(**inputs, **settings, suppress_tokens=banned, eos_token_id=[SPECIAL.eos])
    ids = out[0, inputs["input_ids"].shape[1] :].tolist()
    return ids[: ids.index(SPECIAL.eos)] if SPECIAL.eos in ids else ids


@pytest.mark.parametrize("images", [[], [picture(1, 32, 24)]], ids=["text", "image"])
@pytest.mark.parametrize("name", RELEASES)
def test_transformers_continues_as_our_generator(tmp_path, name, images):
    from transformers import AutoModelForImageTextToText

    write_release(tmp_path / "release", in_bytes(*RELEASES[name]))
    stored = HuggingFaceModel(tmp_path / "release")
    out, args = tmp_path / "export", stored.args
    export_understanding(stored, args, tmp_path / "release", out, shard_bytes=10**6)
    theirs = AutoModelForImageTextToText.from_pretrained(out).eval()
    config = job(args)
    ours = Generator(ours_of(stored, args), config, TOKENIZER, torch.device("cpu"))
    [found] = ours.text(["which one?"], [images], max_tokens=NUM_TOKENS)
    prompts = PromptMaker(TOKENIZER, args.geometry, config.data, config.training.seq_len)
    document = prompts.conversation("which one?", images)
    patches = document.num_vit_patches
    size = SequenceSize(document.num_tokens, document.num_vit_tokens, 1, num_vit_patches=patches)
    row = SequenceBuilder(size, args.geometry, args.rotary_layout, SPECIAL).build([document])
    inputs = {"input_ids": row.tokens}
    if images:
        make, merge = (
            (released_squares, 1) if args.vit.queries else (released_inputs, args.vit.merge)
        )
        segments = [
            len(s.ids) if isinstance(s, TextSegment) else tuple(n // merge for n in s.grid)
            for s in document.segments
        ]
        inputs = make(args, segments, row)
    assert continued(theirs, inputs) == found.ids
    assert len(set(found.ids)) > 2


def test_transformers_continues_a_text_of_hunyuan_as_our_generator(tmp_path):
    from transformers import AutoModelForCausalLM

    tiny = VitArgs(dim=16, num_layers=1, num_heads=2, hidden_dim=24, patch=2, merge=2)
    sizes = HUNYUAN_SIZES | {"vocab_size": 320}
    lists = ("moe_intermediate_size", "attention_head_dim")
    config = {key: value for key, value in HUNYUAN.items() if key not in lists} | sizes
    config |= {"num_shared_expert": [1] * 3}
    write_release(tmp_path / "release", config)
    stored = HuggingFaceModel(tmp_path / "release")
    args = replace(stored.args, vit=tiny)  # the release has no image encoder
    out = tmp_path / "export"
    export_understanding(stored, stored.args, tmp_path / "release", out, shard_bytes=10**6)
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    ours = Generator(ours_of(stored, args), job(args), TOKENIZER, torch.device("cpu"))
    [found] = ours.text(["which one?"], max_tokens=NUM_TOKENS, conversation=False)
    ids = [*TOKENIZER.opening, *TOKENIZER.encode("which one?")]
    assert continued(theirs, {"input_ids": torch.tensor([ids])}) == found.ids
    assert len(set(found.ids)) > 2
