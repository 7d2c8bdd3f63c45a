"""transformers loads what to-hf writes and answers as we do, also where a shared expert was made for a release without one."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from symbiotic_titan.build import build_tokenizer
from symbiotic_titan.commands import convert
from symbiotic_titan.config.saved import SavedConfig
from symbiotic_titan.hf.model import HuggingFaceModel, open_model
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


def test_the_whole_is_read_by_us_and_its_tokenizer_and_processor_by_transformers(trained, tmp_path):
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    release, step, config, model = trained
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert to_hf("--checkpoint", step, "--part", "whole", "--out", whole) == 0
    table = json.loads((whole / "config.json").read_text())
    shape = json.loads((whole / "model.json").read_text())
    assert table["model_type"] == "symbiotic_titan" and table["dtype"] == "float32"
    assert {key: table[key] for key in shape if key != "kind"} | {"kind": "model shape"} == shape
    ours = build_tokenizer(config)
    theirs = AutoTokenizer.from_pretrained(whole)
    assert {t: theirs.convert_tokens_to_ids(t) for t in ours.special_ids} == ours.special_ids
    assert "<|generation_pad|>" in ours.added and theirs.chat_template
    assert theirs("a<|generation_pad|>b")["input_ids"][1] == ours.special.vae
    assert AutoImageProcessor.from_pretrained(whole).patch_size == 4
    for auto in (AutoConfig, AutoModel):
        with pytest.raises(ValueError, match="symbiotic_titan"):
            auto.from_pretrained(whole)
    for name in ("generation_config.json", "chat_template.jinja", "LICENSE"):
        assert (whole / name).read_bytes() == (release / name).read_bytes()
    generator = Generator.load(config, whole)
    assert [done.text for done in generator.text(QUESTIONS, PICTURES, max_tokens=24)] == ANSWERS
    # What was written holds all that a further export needs: no config of the run, no release.
    assert to_hf("--checkpoint", whole, "--part", "whole", "--out", again) == 0
    assert contents(again) == contents(whole)


def test_the_half_is_the_same_from_the_whole_and_from_the_checkpoint(trained, tmp_path, capsys):
    _, step, _, _ = trained
    first, whole, second = (tmp_path / name for name in ("first", "whole", "second"))
    assert to_hf("--checkpoint", step, "--part", "understanding", "--out", first) == 0
    assert to_hf("--checkpoint", step, "--part", "whole", "--out", whole) == 0
    assert to_hf("--checkpoint", whole, "--part", "understanding", "--out", second) == 0
    assert contents(first) == contents(second)
    assert not capsys.readouterr().err
    assert HuggingFaceModel(first).args.expert_hidden_dim == 72


def contents(folder) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_release_is_found_where_the_run_started_or_is_named(trained, tmp_path, capsys):
    release, step, config, _ = trained
    shape = shutil.copy(Path(config.model.flavor), tmp_path / "model.json")
    words = ("--checkpoint", step, "--part", "understanding", "--config", tmp_path / "moved.toml")
    moved = copy.deepcopy(config)
    moved.model.flavor, moved.job.dump_folder = str(shape), str(tmp_path)

    def write(start: str) -> None:
        moved.checkpoint.initial_load_path = start
        SavedConfig(moved).write()
        (tmp_path / "config.toml").rename(tmp_path / "moved.toml")

    write(config.checkpoint.initial_load_path)
    assert to_hf(*words, "--out", tmp_path / "start") == 0
    write(str(release))
    assert to_hf(*words, "--out", tmp_path / "release") == 0
    write("")
    capsys.readouterr()
    assert to_hf(*words, "--out", tmp_path / "none") == 2
    error = capsys.readouterr().err
    assert "Name the release, or a checkpoint made from it, with --release" in error
    assert to_hf(*words, "--out", tmp_path / "named", "--release", release) == 0
    exports = [contents(tmp_path / name) for name in ("start", "release", "named")]
    assert exports[0] == exports[1] == exports[2]
    assert to_hf(*words, "--out", tmp_path / "none", "--release", tmp_path / "no") == 2
    assert "is neither a released model, with config.json" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
