"""lm-eval gives a partitioned model the same likelihoods through our model class as its understanding half through transformers."""

import copy
import importlib
from dataclasses import replace

import pytest
import torch

from symbiotic_titan.build import build_tokenizer
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.hf.export import export_understanding
from symbiotic_titan.hf.model import HuggingFaceModel, open_model
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.partition.apply import partition_checkpoint
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT
from tests.helpers.forked import ROOT
from tests.helpers.released_models import QWEN, write_release
from tests.helpers.stored_models import plan_for
from tests.helpers.tokenizer_files import QWEN_TOKENS, byte_level_bpe, write

pytestmark = pytest.mark.slow  # importing lm-eval takes seconds
for package in ("lm_eval", "accelerate", "peft"):
    pytest.importorskip(package, reason="needs lm-eval[hf]")

GROUPS = (ExpertGroup("understanding", (TEXT, VIT), 5), ExpertGroup("generation", (VAE,), 3))
OPENING = "<|endoftext|>"
PAIRS = [
    ("how many circles are in the picture?", " three of them"),
    ("a red", " circle"),
    ("größer and a blue", " square"),
    ("", "a blue square"),
]


def save_release(folder):
    tokenizer = byte_level_bpe(QWEN_TOKENS)
    ids = tokenizer.get_vocab()
    config = copy.deepcopy(QWEN) | {"image_token_id": ids["<|image_pad|>"]}
    config |= {"video_token_id": ids["<|box_start|>"]}
    config["text_config"]["vocab_size"] = 320
    write_release(folder, config)
    declared = {"bos_token": OPENING, "eos_token": "<|im_end|>", "pad_token": OPENING}
    write(folder, tokenizer, tokenizer_class="PreTrainedTokenizerFast", **declared)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """(the partitioned model, folder of its understanding half)."""
    folder = tmp_path_factory.mktemp("study")
    save_release(folder / "release")
    stored = HuggingFaceModel(folder / "release")
    args = replace(stored.args, groups=GROUPS)
    plan = plan_for(folder / "release")
    plan = replace(plan, groups=GROUPS, layers=("layers.0", "layers.1"))
    partition_checkpoint(folder / "release", args, plan, folder / "split")
    split = open_model(folder / "split")
    export_understanding(split, args, folder / "release", folder / "half", shard_bytes=10**6)
    model = SymbioticModel(args)
    split.read_into(model.state_dict())
    config = load_job_config(
        [
            *("--job.config_file", str(ROOT / "train_configs" / "debug.toml")),
            *("--tokenizer.kind", "huggingface", "--tokenizer.path", str(folder / "release")),
        ]
    )
    generator = Generator(model.eval(), config, build_tokenizer(config), torch.device("cpu"))
    return generator, folder / "half"


def likelihoods(model):
    instance = importlib.import_module("lm_eval.api.instance").Instance
    requests = [instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    return model.loglikelihood(requests, disable_tqdm=True)


def theirs(half, *, opened):
    """lm-eval's model class for transformers, as --model hf makes it."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(half).eval()
    tokenizer = AutoTokenizer.from_pretrained(half, add_bos_token=opened)
    settings = {"add_bos_token": opened, "device": "cpu", "batch_size": 3}
    return HFLM(pretrained=model, tokenizer=tokenizer, **settings)


def test_an_export_has_the_likelihoods_of_its_model_after_the_same_opening(ours):
    generator, half = ours
    lm = importlib.import_module("symbiotic_titan.evaluation.suites.lm_eval_model")
    found = likelihoods(lm.GeneratorLM(generator, batch_size=3))
    wanted = likelihoods(theirs(half, opened=True))
    assert [value for value, _ in found] == pytest.approx([v for v, _ in wanted], abs=1e-4)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in wanted]
    bare = likelihoods(theirs(half, opened=False))
    assert abs(bare[0][0] - found[0][0]) > 0.1, "the opening makes a difference"
