"""The average inside real runs: it changes nothing, is what a model loaded with it measures and generates, and resumes bit for bit."""

import json
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from symbiotic_titan.commands import convert, evaluate, generate
from symbiotic_titan.evaluation.suite import SUITES, Suite, measure
from symbiotic_titan.hf.model import open_model
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.weights.dcp import DistributedCheckpoint
from tests.helpers import launch as runs
from tests.integration.test_validation import TRAINING, VALIDATION, assert_same, with_validation


@dataclass(frozen=True)
class NoOptions:
    """Of a suite that has none."""


def size_of_weights(generator, options, folder, progress):
    state = generator.model.state_dict().values()
    return {"norm": measure(float(sum(t.double().square().sum() for t in state)), number=1)}


STEPS = 8
AVERAGED = {
    "ema__enable": True,
    "ema__decay": 0.8,
    "validation__weights": "ema",
    "sampling__weights": "ema",
}
MEASURED = {
    "sampling__enable": True,
    "sampling__freq": STEPS,
    "sampling__steps": 2,
    "checkpoint__interval": 5,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, demo):
    """Where runs go that validate every 8 steps on the held-out demo data."""
    with pytest.MonkeyPatch.context() as patch:
        with_validation(patch, demo)
        yield tmp_path_factory.mktemp("averaged")


@pytest.fixture(scope="module")
def whole(folders, demo):
    """Eight uninterrupted steps, saved asynchronously."""
    settings = AVERAGED | MEASURED | {"checkpoint__async_mode": "async"}
    run = runs.launch(folders / "whole", demo, training__steps=STEPS, **settings)
    assert run.status == 0, run.text[-3000:]
    return run


def checkpoint(run, step=STEPS):
    return run.folder / "checkpoint" / f"step-{step}"


def grids(run):
    """Step -> the grid of generated images, as PNG; of several event files the later wins."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in sorted((run.folder / "tb").glob("*/events*")):
        events = EventAccumulator(str(file), size_guidance={"images": 0})
        events.Reload()
        if "sampling/pictures" in events.Tags()["images"]:
            pictures = events.Images("sampling/pictures")
            found |= {event.step: event.encoded_image_string for event in pictures}
    return found


def test_training_and_measuring_with_the_average_is_bitwise_training(whole, reference):
    assert_same(whole, reference, TRAINING, range(1, STEPS + 1))
    decays = whole.scalars("ema/decay")
    assert decays[1] == pytest.approx(0.1) and decays[STEPS] == pytest.approx(8 / 17)
    distances = whole.scalars("ema/distance/understanding")
    assert all(0 < distances[step] < 0.1 for step in range(1, STEPS + 1))


def test_a_resumed_run_is_the_uninterrupted_one(whole, folders, demo):
    """Weights, averages, validation and pictures."""
    shutil.copytree(checkpoint(whole, 5), folders / "resumed" / "checkpoint" / "step-5")
    settings = AVERAGED | MEASURED
    run = runs.launch(folders / "resumed", demo, training__steps=STEPS, **settings)
    assert_same(run, whole, TRAINING, range(6, STEPS + 1))
    assert_same(run, whole, VALIDATION, [STEPS])
    assert grids(run)[STEPS] == grids(whole)[STEPS]
    for weights in ("trained", "ema"):
        ours, theirs = (DistributedCheckpoint(checkpoint(r), weights) for r in (run, whole))
        assert ours.tensors.keys() == theirs.tensors.keys() and ours.num_updates == STEPS
        for name in theirs.tensors:
            assert torch.equal(ours.read(name), theirs.read(name)), (weights, name)


def test_a_run_that_starts_from_the_average_measures_what_was_measured_with_it(
    whole, folders, demo
):
    start = {
        "checkpoint__initial_load_path": checkpoint(whole),
        "checkpoint__initial_load_weights": "ema",
    }
    run = runs.launch(folders / "second", demo, training__steps=1, **start, **MEASURED)
    assert run.status == 0 and "step-8 (ema)" in run.text, run.text[-3000:]
    for tag in VALIDATION:
        assert run.scalars(tag)[0] == whole.scalars(tag)[STEPS], tag
        assert tag.startswith("validation/accuracy") or run.scalars(tag)[1] != run.scalars(tag)[0]
    assert grids(run)[0] == grids(whole)[STEPS]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="ep"),
        pytest.param(
            {
                "compile__enable": True,
                "compile__backend": "aot_eager",
                "parallelism__fsdp_reshard_after_forward": "never",
                "optimizer__implementation": "foreach",
            },
            id="ep_compile_never_reshards_foreach",
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_two_processes_go_on_with_the_average_of_one(whole, tmp_path, folders, demo, settings):
    shutil.copytree(checkpoint(whole, 5), tmp_path / "checkpoint" / "step-5")
    ranks = {"world_size": 2, "parallelism__expert_parallel_degree": 2}
    run = runs.launch(tmp_path, demo, training__steps=STEPS, **AVERAGED, **ranks, **settings)
    assert_same(run, whole, TRAINING, range(6, STEPS + 1), 1e-5)
    assert_same(run, whole, VALIDATION, [STEPS], 1e-5)
    ours, theirs = (DistributedCheckpoint(checkpoint(r), "ema") for r in (run, whole))
    for name in theirs.tensors:
        torch.testing.assert_close(ours.read(name), theirs.read(name), rtol=1e-4, atol=1e-6)


def test_a_run_may_drop_its_average_and_begin_another(whole, folders, demo):
    shutil.copytree(checkpoint(whole, 5), folders / "dropped" / "checkpoint" / "step-5")
    without = runs.launch(folders / "dropped", demo, training__steps=6)
    assert without.status == 0, without.text[-3000:]
    assert "[ema] is off: the average of" in without.text
    assert not DistributedCheckpoint(checkpoint(without, 6)).averaged
    one_group = {"ema__enable": True, "ema__groups": "generation"}
    again = runs.launch(folders / "dropped", demo, training__steps=7, **one_group)
    assert "has no average of" in again.text and "which starts from the weights" in again.text
    stored = DistributedCheckpoint(checkpoint(again, 7), "ema")
    assert stored.num_updates == 1 and set() < stored.averaged < stored.tensors.keys()


def test_commands_take_the_average(whole, tmp_path):
    averages = DistributedCheckpoint(checkpoint(whole), "ema")
    config = ["--config", str(whole.folder / "job.toml")]
    export = [*config, "--part", "whole", "--checkpoint", str(checkpoint(whole))]
    export += ["--weights", "ema", "--out", str(tmp_path / "export")]
    assert convert.main(["to-hf", *export]) == 0
    exported = open_model(tmp_path / "export")
    assert exported.tensors.keys() == averages.tensors.keys()
    assert all(torch.equal(exported.read(name), averages.read(name)) for name in exported.tensors)

    prompt = ["--prompt", "a red circle", "--steps", "2", "--out", str(tmp_path / "images")]
    image = ["image", "--run", str(whole.folder), "--weights", "ema", *prompt]
    assert generate.main(image) == 0
    generator = Generator.load(whole.folder, tmp_path / "export")
    [expected] = generator.images(["a red circle"], steps=2)
    [trained] = Generator.load(whole.folder).images(["a red circle"], steps=2)
    [drawn] = Generator.load(whole.folder, weights="ema").images(["a red circle"], steps=2)
    assert np.array_equal(np.asarray(drawn.image), np.asarray(expected.image))
    assert not np.array_equal(np.asarray(drawn.image), np.asarray(trained.image))

    with SUITES.temporarily(norm=Suite("norm", "their size", NoOptions, size_of_weights)):
        both = ["--weights", "trained", "--weights", "ema", "--compare", "--suite", "norm"]
        assert evaluate.main([str(whole.folder), *both, "--out", str(tmp_path / "scores")]) == 0
    columns = json.loads((tmp_path / "scores" / "comparison.json").read_text())["columns"]
    for weights, label in (("trained", "whole/step-8"), ("ema", "whole/step-8 ema")):
        stored = DistributedCheckpoint(checkpoint(whole), weights)
        size = sum(float(stored.read(n).double().square().sum()) for n in stored.tensors)
        assert columns[label]["norm"]["score"] == pytest.approx(size, rel=1e-9)


def test_weights_that_a_checkpoint_lacks_are_refused_in_one_line(
    reference, folders, demo, tmp_path, capsys
):
    prompt = ["--prompt", "x", "--out", str(tmp_path / "images")]
    image = ["image", "--run", str(reference.folder), "--weights", "ema", *prompt]
    assert generate.main(image) == 2
    assert "step-20 has no averaged weights; use 'trained'" in capsys.readouterr().err
    scores = ["--suite", "demo_world", "--demo_world.data", str(demo), "--weights", "ema"]
    scores += ["--out", str(tmp_path / "scores")]
    assert evaluate.main([str(reference.folder), *scores]) == 2
    assert "has no averaged weights" in capsys.readouterr().err
    config = ["--config", str(reference.folder / "job.toml"), "--part", "whole"]
    export = ["--checkpoint", str(checkpoint(reference, 20)), "--out", str(tmp_path / "export")]
    assert convert.main(["to-hf", *config, *export, "--weights", "ema"]) == 2
    assert "has no averaged weights" in capsys.readouterr().err
    start = {
        "checkpoint__initial_load_path": checkpoint(reference, 20),
        "checkpoint__initial_load_weights": "ema",
    }
    run = runs.launch(tmp_path / "run", demo, **start)
    assert run.status == 2 and "checkpoint.initial_load_weights = 'ema': " in run.text
    assert not (tmp_path / "export").exists()
    assert not [path for path in (tmp_path / "run").iterdir() if path.is_dir()]
    assert not (tmp_path / "images").exists()
