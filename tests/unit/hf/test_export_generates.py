"""transformers loads what to-hf writes and answers as we do, also where a shared expert was made for a release without one."""

from dataclasses import replace

import pytest
import torch

from symbiotic_titan.build import build_tokenizer
from symbiotic_titan.commands import convert
from symbiotic_titan.config.saved import SavedConfig
from symbiotic_titan.hf.model import open_model
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.partition.apply import partition_checkpoint
from tests.helpers.decoder_parity import run
from tests.helpers.stored_models import plan_for, save
from tests.helpers.talking_release import (
    ANSWERS,
    PICTURES,
    QUESTIONS,
    answers_of_transformers,
    config_for,
    rows,
    teach,
    write_talking_release,
)


def to_hf(*words) -> int:
    return convert.main(["to-hf", *map(str, words)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of the release, step of a run that began with it and a made shared expert, its config, its model)."""
    folder = tmp_path_factory.mktemp("trained")
    release, shape = folder / "release", folder / "shape"
    write_talking_release(release)
    words = ["from-hf", "--hf", release, "--out", shape, "--shape-only"]
    assert convert.main([*map(str, words)]) == 0
    overrides = ["--experts.new_shared_experts", "2", "--checkpoint.initial_load_path"]
    config = config_for(
        release, shape / "model.json", folder / "run", *overrides, str(folder / "start")
    )
    args = model_args(config)
    plan = replace(
        plan_for(release, args.groups),
        layers=("layers.0", "layers.1"),
        shared=torch.tensor([[0, 3], [2, 1]]),
    )
    partition_checkpoint(release, args, plan, folder / "start")
    model = SymbioticModel(args)
    open_model(folder / "start").read_into(model.state_dict())
    assert teach(model, config) < 0.1
    assert model.layers["1"].moe.shared_experts.w2.weight.abs().mean() > 1e-3
    SavedConfig(config).write()
    step = save(model.state_dict(), folder / "run" / "checkpoint" / "step-40")
    return release, step, config, model.eval()


def test_the_half_with_a_made_shared_expert_generates_our_text(trained, tmp_path, capsys):
    from transformers import AutoModelForImageTextToText

    release, step, config, model = trained
    assert to_hf("--checkpoint", step, "--part", "understanding", "--out", tmp_path / "half") == 0
    out = capsys.readouterr()
    told = (
        "is folded into the routed experts: each is 48 wider, 36,864 parameters in all; the model"
    )
    assert told in out.out and not out.err
    theirs, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "half", output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == "Qwen3VLMoeForConditionalGeneration"
    generator = Generator(model, config, build_tokenizer(config), torch.device("cpu"))
    ours = [done.text for done in generator.text(QUESTIONS, PICTURES, max_tokens=24)]
    assert answers_of_transformers(tmp_path / "half", theirs.eval()) == ours == ANSWERS
    row, _ = rows(model, config)[1]
    expected = run(model, row)[0]
    with torch.no_grad():
        found = theirs(input_ids=row.tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
