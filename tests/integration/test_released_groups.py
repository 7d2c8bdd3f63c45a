"""A release that is partitioned itself, from its files to a trained model with a third group and back, as a user does it."""

import copy
import json
import math

import pytest
import torch
from PIL import Image
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

from symbiotic_titan.commands import convert, profile_experts
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.data.sequence_builder import SequenceBuilder
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.hf.model import open_model
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.inference.prompts import PromptMaker
from symbiotic_titan.sequence.modality import VIT
from tests.helpers.decoder_parity import make_random
from tests.helpers.launch import ROOT, train
from tests.helpers.released_models import ERNIE

SPECIAL = ByteTokenizer().special
THIRD = """
[experts.partition.text]
modalities = ["text"]
num_experts = 8
source = "text"

[experts.partition.vision]
modalities = ["vit"]
num_experts = 8
hidden_dim = 16
source = "vision"

[experts.partition.generation]
modalities = ["vae"]
num_experts = 8
hidden_dim = 16
source = "vision"
copy = true

"""


def run(main, *words) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def study(tmp_path_factory, demo):
    """Folder with the release, its import, ``released.toml`` (its own groups) and ``third.toml``."""
    folder = tmp_path_factory.mktemp("ernie")
    config = copy.deepcopy(ERNIE)
    config["text_config"] |= {"vocab_size": 320, "moe_intermediate_size": [24, 16]}
    del config["model_type"]
    made = Ernie4_5_VLMoeConfig(**config | {"image_token_id": SPECIAL.vit})
    make_random(Ernie4_5_VLMoeForConditionalGeneration(made), gain=2.0).save_pretrained(
        folder / "release"
    )
    text = (ROOT / "train_configs" / "debug.toml").read_text().replace("demo_data/", f"{demo}/")
    text = text.replace('flavor = "debug"', f'flavor = "{folder}/imported/model.json"')
    before, rest = text.split("[experts.partition.understanding]")
    rest = "[shielding]" + rest.split("[shielding]", 1)[1]
    (folder / "released.toml").write_text(before + rest)
    (folder / "third.toml").write_text(before + THIRD + rest)
    run(convert.main, "from-hf", "--hf", folder / "release", "--out", folder / "imported")
    return folder


@pytest.fixture(scope="module")
def split(study):
    """The checkpoint with a third group, a copy of the image experts."""
    read = ("--checkpoint", study / "imported")
    profile, plan, out = (study / name for name in ("profile.json", "plan.json", "split"))
    released, third = (("--config", study / f"{name}.toml") for name in ("released", "third"))
    run(profile_experts.main, *released, *read, "--out", profile, "--batches", 2)
    run(convert.main, "plan", *third, "--profile", profile, "--out", plan)
    run(convert.main, "partition", *third, *read, "--plan", plan, "--out", out)
    return out


@pytest.fixture(scope="module")
def trained(study, split):
    """The run that trained it for three steps."""
    settings = {"training.steps": 3, "metrics.log_freq": 1, "lr_scheduler.warmup_steps": 1}
    settings |= {"checkpoint.initial_load_path": split, "job.dump_folder": study / "run"}
    settings["checkpoint.interval"] = 3
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    done = train(study / "run", ["--job.config_file", str(study / "third.toml"), *words])
    assert done.status == 0, done.text[-3000:]
    return done


def test_the_profile_counts_each_pool_with_its_own_tokens(study, split):
    values = json.loads((study / "profile.json").read_text())
    assert values["model"]["groups"] == {"text": 8, "vision": 8}
    for layer in values["counts"]:
        text, vit, _ = (torch.tensor(row) for row in layer)
        assert text[:8].sum() == 3 * values["tokens"]["text"] > 0 and text[8:].sum() == 0
        assert vit[8:].sum() == 3 * values["tokens"]["vit"] > 0 and vit[:8].sum() == 0


def test_the_third_group_begins_as_the_image_experts(study, split):
    before, after = open_model(study / "imported"), open_model(split)
    for leaf in ("router.{}.weight", "router.{}.bias", *(f"experts.{{}}.w{i}" for i in (1, 2, 3))):
        name = f"layers.2.moe.{leaf}"
        released = before.read(name.format("vision"))
        assert torch.equal(after.read(name.format("vision")), released)
        assert torch.equal(after.read(name.format("generation")), released)
        assert torch.equal(after.read(name.format("text")), before.read(name.format("text")))


def test_groups_that_take_whole_pools_need_no_plan(study, split):
    third, read = ("--config", study / "third.toml"), ("--checkpoint", study / "release")
    run(convert.main, "partition", *third, *read, "--out", study / "bare")
    planned, bare = open_model(split), open_model(study / "bare")
    assert planned.tensors == bare.tensors
    assert all(torch.equal(planned.read(name), bare.read(name)) for name in planned.tensors)
    check = ("check", *third, "--checkpoint", study / "bare", "--original", study / "release")
    report = study / "report.json"
    run(convert.main, *check, "--split", "train", "--batches", 1, "--json", report)
    columns = json.loads(report.read_text())["columns"]
    assert columns["partitioned"] == pytest.approx(columns["original"], abs=1e-5)
    assert columns["original"]["text"] > 0


def test_all_three_groups_are_trained(split, trained):
    losses = trained.scalars("loss/flow")
    assert list(losses) == [1, 2, 3] and all(map(math.isfinite, losses.values()))
    before, after = open_model(split), open_model(trained.folder / "checkpoint" / "step-3")
    for group in ("text", "vision", "generation"):
        for name in (f"layers.1.moe.experts.{group}.w2", f"layers.1.moe.router.{group}.weight"):
            assert not torch.equal(before.read(name), after.read(name)), name


def test_transformers_writes_our_greedy_text_from_the_trained_model(study, trained):
    """Without an image, with one and with two."""
    half, checkpoint = study / "half", trained.folder / "checkpoint" / "step-3"
    words = ("--checkpoint", checkpoint, "--part", "understanding", "--out", half)
    run(convert.main, "to-hf", "--config", study / "third.toml", *words)
    config = json.loads((half / "config.json").read_text())
    assert config == json.loads((study / "release" / "config.json").read_text())
    theirs = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(half).eval()
    ours = Generator.load(study / "third.toml", checkpoint)
    picture = Image.effect_mandelbrot((40, 32), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    questions = ["how many?", "what colour is it?", "where?"]
    images = [[], [picture], [picture.resize((24, 48)), picture]]
    written = set()
    for question, shown in zip(questions, images, strict=True):
        (found,) = ours.text([question], [shown], max_tokens=12)
        expected = generated(theirs, ours, question, shown)
        assert found.ids == expected[: len(found.ids)]
        assert len(found.ids) == 12 or expected[len(found.ids)] == SPECIAL.eos
        written |= set(found.ids)
    assert len(written) > 5


def generated(theirs, ours, question, images):
    """The greedy continuation by ``theirs`` of our layout of the prompt."""
    args, data, tokenizer = ours.model.args, ours.config.data, ours.tokenizer
    document = PromptMaker(tokenizer, args.geometry, data, 384).conversation(question, images)
    size = SequenceSize(document.num_tokens, document.num_vit_tokens, 0)
    row = SequenceBuilder(size, args.geometry, args.rotary_layout, tokenizer.special).build(
        [document]
    )
    inputs = {"input_ids": row.tokens}
    if images:
        grids = [[1, *s.grid] for s in document.segments if hasattr(s, "grid")]
        inputs |= {
            "mm_token_type_ids": (row.span >= 0).int(),
            "moe_mm_token_type_ids": (row.modality == VIT).int(),
            "pixel_values": row.vit_patches[0],
            "image_grid_thw": torch.tensor(grids),
        }
    # What our text never holds: tokens of images that have no text after them, and ids without a token.
    images = [SPECIAL.vit_start, SPECIAL.vit, SPECIAL.vae_start, SPECIAL.vae]
    never = [*images, *range(tokenizer.vocab_size, 320)]
    out = theirs.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=SPECIAL.pad,
        suppress_tokens=never,
    )
    return out[0, document.num_tokens :].tolist()
