"""The tool draws and writes from a checkpoint, the same as the API, and says what is wrong in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

from symbiotic_titan.commands import generate
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.config.saved import SavedConfig
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.model.symbiotic import SymbioticModel

CONFIG = str(Path(__file__).parents[3] / "train_configs" / "debug.toml")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of the debug config with two checkpoints, the newer of which is not complete."""
    folder = tmp_path_factory.mktemp("run")
    with torch.device("meta"):
        model = SymbioticModel(model_args(load_job_config(["--job.config_file", CONFIG])))
    model.to_empty(device="cpu")
    model.init_weights()
    for parameter in model.flow_head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    dcp.save(model.state_dict(), checkpoint_id=folder / "checkpoint" / "step-7", no_dist=True)
    (folder / "checkpoint" / "step-8").mkdir()
    return folder


def run(kind, *options):
    return generate.main([kind, "--config", CONFIG, *map(str, options)])


def test_a_checkpoint_without_the_parts_that_draw_is_warned_of(run_folder, tmp_path, caplog):
    whole = Generator.load(CONFIG, run_folder).model.state_dict()
    kept = {n: t for n, t in whole.items() if not n.startswith(("flow_head", "latent_embedding"))}
    dcp.save(kept, checkpoint_id=tmp_path / "step-1", no_dist=True)
    assert run("text", "--checkpoint", tmp_path / "step-1", "--prompt", "x", "--out", tmp_path) == 0
    assert "step-1 has no parts that generate images: its images will be noise" in caplog.text


def test_images_are_written_with_their_settings_and_as_the_api_draws_them(run_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("two\n\n  three \n")
    settings = ["--steps", 2, "--seed", 5, "--aspect", "3:2"]
    prompts = ["--prompt", "one", "--prompts-file", tmp_path / "prompts.txt"]
    out = tmp_path / "images"
    assert run("image", "--run", run_folder, *prompts, *settings, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["0000.png", "0001.png", "0002.png"]

    generator = Generator.load(CONFIG, run_folder / "checkpoint" / "step-7")
    [expected] = generator.images(["three"], steps=2, seed=5, aspect="3:2", first_index=2)
    with Image.open(out / "0002.png") as image:
        assert image.size == (40, 24)
        assert np.abs(np.asarray(image, float) - np.asarray(expected.image, float)).max() <= 1
        assert image.text["prompt"] == "three" and image.text["index"] == "2"
        assert image.text["checkpoint"] == str(run_folder / "checkpoint" / "step-7")
        assert image.text["seed"] == "5" and image.text["sampler"] == "euler"


def test_the_config_that_the_run_kept_needs_no_naming(run_folder, tmp_path, capsys):
    prompt = ["--prompt", "one", "--steps", "2", "--out", str(tmp_path)]
    checkpoint = run_folder / "checkpoint" / "step-7"
    assert generate.main(["image", "--checkpoint", str(checkpoint), *prompt]) == 2
    assert (
        "step-7 is not in the folder of a run that kept its config.toml" in capsys.readouterr().err
    )
    assert generate.main(["image", *prompt]) == 2
    assert "no model; give --run, --checkpoint or --config" in capsys.readouterr().err

    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    settings = ["--job.dump_folder", str(run), "--flow.shift", "2"]
    SavedConfig(load_job_config(["--job.config_file", CONFIG, *settings])).write()
    assert generate.main(["image", "--run", str(run), *prompt]) == 0
    generator = Generator.load(run)
    assert generator.config.flow.shift == 2
    [expected] = generator.images(["one"], steps=2)
    with Image.open(tmp_path / "0000.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected.image))
        assert image.text["shift"] == "2.0"
    by_step = Generator.load(run / "checkpoint" / "step-7", overrides=["--flow.shift", "3"])
    assert by_step.config.flow.shift == 3


def test_texts_are_printed_and_written(run_folder, tmp_path, capsys):
    Image.new("RGB", (30, 50)).save(tmp_path / "shown.jpg")
    options = ["--prompt", "what?", "--image", tmp_path / "shown.jpg", "--max-tokens", 3]
    assert run("text", "--run", run_folder, *options, "--out", tmp_path) == 0
    [line] = (tmp_path / "texts.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["prompt"] == "what?" and row["tokens"] <= 3
    assert f"what?\n  {row['text']}" in capsys.readouterr().out


MISTAKES = [
    (["--aspect", "5:1"], "aspect '5:1': must be width:height"),
    (["--size", "32", "30"], "size 32 x 30: no bucket"),
    (["--prompt", "a" * 400], "prompt #1: its 404 tokens"),
    (["--steps", "0"], "steps: must be at least 1, got 0"),
    (
        ["--sampler", "rk4"],
        "sampler = 'rk4': nothing is registered under this name; choose from euler",
    ),
    (["--prompts-file", "missing.txt"], "missing.txt"),
    (["--latents.codec", "flux"], "latents.path: codec 'flux' needs its weights"),
    (["--model.flavor", "huge"], "model.flavor: unknown flavor 'huge'"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_a_users_mistake_is_one_line(options, message, run_folder, tmp_path, capsys):
    status = run("image", "--run", run_folder, "--prompt", "x", "--out", tmp_path, *options)
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and message in error


def test_a_checkpoint_of_another_flavor_is_refused(run_folder, tmp_path, capsys):
    options = ["--run", str(run_folder), "--prompt", "x", "--out", str(tmp_path)]
    mini = CONFIG.replace("debug.toml", "mini.toml")
    assert generate.main(["image", "--config", mini, *options]) == 2
    assert "step-7 is of another model: tok_embeddings.weight has shape" in capsys.readouterr().err


def test_a_missing_checkpoint_and_a_missing_prompt_are_named(run_folder, tmp_path, capsys):
    assert run("image", "--run", tmp_path / "none", "--prompt", "x", "--out", tmp_path) == 2
    assert f"checkpoint {tmp_path / 'none'}: no such folder" in capsys.readouterr().err
    assert run("image", "--run", run_folder, "--out", tmp_path) == 2
    assert "no prompt; give --prompt TEXT or --prompts-file FILE" in capsys.readouterr().err
    (tmp_path / "no.png").write_text("no picture")
    options = ["--prompt", "x", "--image", tmp_path / "no.png", "--out", tmp_path]
    assert run("text", "--run", run_folder, *options) == 2
    assert "no.png: cannot be read as an image" in capsys.readouterr().err


def test_guidance_that_was_not_trained_for_is_warned_of(run_folder, tmp_path, caplog):
    options = ["--prompt", "x", "--out", tmp_path, "--steps", 1, "--data.condition_dropout", "0"]
    assert run("image", "--run", run_folder, *options, "--guidance", 1) == 0
    assert "guidance" not in caplog.text
    assert run("image", "--run", run_folder, *options, "--guidance", 2) == 0
    assert "guidance = 2 reads images without a caption" in caplog.text
