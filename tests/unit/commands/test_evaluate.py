"""The tool runs suites once, shows them side by side, and says what is wrong in one line."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from symbiotic_titan.commands import evaluate
from symbiotic_titan.config.experts import ROUTER_SCORES
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.config.saved import SavedConfig
from symbiotic_titan.demo import scores as demo_world
from symbiotic_titan.demo.write import (
    WorldSize,
    write_world,
)
from symbiotic_titan.evaluation.kept import newest_result, read_result, read_results
from symbiotic_titan.evaluation.suite import SUITES, Suite, measure
from symbiotic_titan.evaluation.suites.generation import (
    ImageRequest,
    ImageSettings,
    generate_images,
)
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.model.symbiotic import SymbioticModel
from tests.helpers.users_parts import forget_modules, users_parts

CONFIG = str(Path(__file__).parents[3] / "train_configs" / "debug.toml")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of the debug config with two checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    with torch.device("meta"):
        model = SymbioticModel(model_args(load_job_config(["--job.config_file", CONFIG])))
    model.to_empty(device="cpu")
    model.init_weights()
    for step in (7, 8):
        for parameter in model.flow_head.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        path = folder / "checkpoint" / f"step-{step}"
        dcp.save(model.state_dict(), checkpoint_id=path, no_dist=True)
    return folder


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "demo_data"
    write_world(folder, 0, WorldSize(4, 8, 100, 60, train_shards=1))
    return folder


@dataclass(frozen=True)
class Drawn(ImageSettings):
    steps: int = 1
    """One is enough"""

    note: str = ""
    """Changes no picture"""

    list_file: str = ""
    """A file"""

    list_files: tuple[str, ...] = ()
    """Several"""


@pytest.fixture
def runs():
    """A suite ``drawn`` that draws two pictures; the folders that it has run in."""
    folders = []

    def run(generator, options, folder, progress):
        folders.append(folder)
        requests = [ImageRequest(prompt, folder / f"{prompt}.png") for prompt in ("a", "b")]
        images = generate_images(generator, requests, options, progress, folder)
        brightness = sum(sum(i.convert("L").histogram()[128:]) for i in images)
        scores = {
            "bright": measure(brightness / 2048, number=2, chance=0.5),
            "routed": measure(routed(generator), number=1),
        }
        return scores

    with SUITES.temporarily(drawn=Suite("drawn", "draws", Drawn, run)):
        yield folders


def routed(generator):
    """Sum of what the first bank gives, which a probe makes 0."""
    banks = next(m for name, m in generator.model.named_modules() if name.endswith("moe.experts"))
    rows = torch.ones(len(banks["understanding"].w1), generator.model.args.dim)
    with torch.no_grad():
        return float(banks["understanding"](rows, torch.ones(len(rows)).long()).abs().sum())


def run(*options):
    return evaluate.main(["--config", CONFIG, *map(str, options)])


@pytest.fixture
def prompts_drawn(monkeypatch):
    drawn, images = [], Generator.images
    monkeypatch.setattr(
        Generator, "images", lambda self, p, **s: drawn.extend(p) or images(self, p, **s)
    )
    return drawn


def test_a_finished_suite_is_not_run_again_and_drawn_images_are_not_drawn_again(
    run_folder, tmp_path, runs, prompts_drawn, capsys, monkeypatch
):
    out = tmp_path / "out"
    arguments = [run_folder, "--suite", "drawn", "--out", out]
    assert run(*arguments) == 0
    first = capsys.readouterr()
    assert prompts_drawn == ["a", "b"] and len(runs) == 1
    assert runs[0].parent.parent == out and runs[0].parent.name.startswith("tiny-step-8-")

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "load", None)  # not even a model is loaded
        assert run(*arguments) == 0
    again = capsys.readouterr()
    assert len(runs) == 1 and again.out == first.out
    assert "(finished before)" in again.err and "(finished before)" not in first.err

    assert run(*arguments, "--drawn.note", "other") == 0
    assert len(runs) == 2 and prompts_drawn == ["a", "b"]
    assert run(*arguments, "--drawn.seed", 3) == 0
    assert len(runs) == 3 and prompts_drawn == ["a", "b"] * 2
    assert len(set(runs)) == 3, "each has files of its own"
    kept = {path.stem: read_result(path) for path in runs[0].parent.glob("*.json")}
    assert kept.keys() == {folder.name for folder in runs}
    assert {result.suite for result in kept.values()} == {"drawn"}
    assert newest_result(out, "drawn").stem == runs[2].name

    assert run(*arguments) == 0
    assert len(runs) == 3, "the first scores were not overwritten"
    found = read_results(out)
    assert len(found) == 3 and {result.step for result in found} == {8}
    assert {result.run for result in found} == {run_folder.resolve()}
    assert len({result.options for result in found}) == 3


@pytest.mark.parametrize("option", ["list_file", "list_files"])
def test_a_changed_file_config_or_checkpoint_is_evaluated_anew(run_folder, tmp_path, runs, option):
    listed = tmp_path / "list.txt"
    listed.write_text("one")
    arguments = ["--suite", "drawn", "--out", tmp_path / "out", f"--drawn.{option}", listed]
    arguments.append(run_folder)
    assert run(*arguments) == 0 and len(runs) == 1
    listed.write_text("one and two")
    assert run(*arguments) == 0 and len(runs) == 2
    assert run(*arguments, "--training.steps", 900) == 0 and len(runs) == 2
    assert run(*arguments, "--data.vit_pixels", 900) == 0 and len(runs) == 3
    for path in (run_folder / "checkpoint" / "step-8").iterdir():
        os.utime(path, ns=(1, len(option)))
    assert run(*arguments) == 0 and len(runs) == 4
    assert len({folder.parent for folder in runs}) == 3, "another config or checkpoint has its own"
    assert runs[0] == runs[1], "the scores of a changed file replace those before"


def test_checkpoints_and_probes_are_compared_side_by_side(run_folder, tmp_path, runs, capsys):
    both = [run_folder / "checkpoint" / f"step-{n}" for n in (7, 8)]
    probes = ["--probe", "none", "--probe", "shared_only"]
    assert run(*both, *probes, "--suite", "drawn", "--compare", "--out", tmp_path) == 0
    header, bright, mass = capsys.readouterr().out.strip("\n").splitlines()
    labels = [
        "tiny/step-7",
        "tiny/step-7 shared_only",
        "tiny/step-8",
        "tiny/step-8 shared_only",
    ]
    assert header.split("  ") and all(label in header for label in labels)
    assert header.endswith("chance  upper bound  number")
    assert bright.split()[-3:] == ["0.500", "-", "2"]
    _, plain, masked, *_ = mass.split()
    assert float(plain) > 0 and float(masked) == 0
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    assert list(comparison["columns"]) == labels
    assert comparison["settings"]["drawn"]["steps"] == 1
    assert len(runs) == len(set(runs)) == 4


def test_the_file_of_a_result_says_what_was_measured_and_how(run_folder, tmp_path, runs):
    checkpoint = run_folder / "checkpoint" / "step-7"
    options = ["--suite", "drawn", "--out", tmp_path, "--probe", "without:generation"]
    assert run(checkpoint, *options) == 0
    values = json.loads(runs[0].with_suffix(".json").read_text())
    assert values["kind"] == "evaluation" and values["suite"] == "drawn"
    assert values["checkpoint"] == str(checkpoint) and values["flavor"] == "debug"
    assert values["probe"] == "without:generation" and values["config"] == CONFIG
    assert values["settings"]["guidance"] == 3.0 and values["seconds"] >= 0
    names = {"score", "interval", "chance", "upper_bound", "number"}
    assert values["scores"]["bright"].keys() == names
    assert all(character not in runs[0].parent.name for character in ": ")


class Blind:
    """A reader of digits that needs no training."""

    def read(self, image):
        return 1


def test_the_demo_world_is_measured_in_all_its_parts(
    run_folder, demo_data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(demo_world, "digit_reader", Blind)
    small = {"data": demo_data, "pictures": 4, "steps": 1, "questions": 2, "knowledge": 2}
    options = [str(v) for k, v in small.items() for v in (f"--demo_world.{k}", v)]
    options += ["--demo_world.loss_rows", "2", "--demo_world.batch_size", "4"]
    assert run(run_folder, "--suite", "demo_world", *options, "--out", tmp_path) == 0
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines()[2:] if line}
    assert {
        "pictures/digit",
        "pictures/frechet",
        "answers/all",
        "knowledge/accuracy",
        "knowledge_heldout/accuracy",
        "heldout/by_task/lm_text",
        "heldout/by_task/t2i_flow",
        "heldout/accuracy/mmu",
    } <= names
    [folder] = tmp_path.iterdir()
    [result] = folder.glob("demo_world-*.json")
    assert (result.with_suffix("") / "pictures.png").stat().st_size < 200_000
    scores = json.loads(result.read_text())["scores"]
    assert 4 < scores["heldout/by_task/lm_text"]["score"] < 8, "as any model with random weights"


def test_suites_and_their_options_are_listed(capsys):
    assert evaluate.main(["--suites"]) == 0
    listed = capsys.readouterr().out
    assert "demo_world: pictures, answers, knowledge" in listed
    assert "--demo_world.pictures 60\n        Held-out captions to use" in listed


MISTAKES = [
    (["--suite", "mmlu"], "--suite = 'mmlu': nothing is registered under this name; choose from"),
    ([], "no suite; give --suite NAME, one of "),
    (["--suite", "drawn", "--drawn.seed", "x"], "--drawn.seed: must be an integer, got 'x'"),
    (["--suite", "drawn", "--drawn.stepz", "1"], "--drawn: unknown key 'stepz'; did you mean"),
    (["--suite", "drawn", "--drawn.steps", "0"], "--drawn.steps: must be at least 1, got 0"),
    (["--suite", "drawn", "--probe", "half"], "--probe half: unknown for this model; choose"),
    (["--suite", "drawn", "--weights", "ema"], "step-8 has no averaged weights; use 'trained'"),
    (["--suite", "drawn", "missing"], "checkpoint missing: no such folder"),
    (["--suite", "far"], "--suite far: needs no_such; install it: pip install no-such"),
    (["--suite", "demo_world", "--demo_world.data", "no"], "--demo_world.data: no demo world in"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_a_users_mistake_is_one_line_before_anything_runs(
    options, message, run_folder, tmp_path, runs, monkeypatch, capsys
):
    far = Suite("far", "", Drawn, lambda *a: {}, ("no_such",), "pip install no-such")
    with SUITES.temporarily(far=far):
        assert run(run_folder, *options, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert runs == []


def test_the_checkpoint_of_another_flavor_is_refused_before_the_first_one_runs(
    run_folder, tmp_path, runs, capsys
):
    mini = CONFIG.replace("debug.toml", "mini.toml")
    both = [str(run_folder), str(run_folder)]
    configs = ["--config", CONFIG, "--config", mini]
    assert evaluate.main([*both, *configs, "--suite", "drawn", "--out", str(tmp_path)]) == 2
    assert "step-8 is of another model" in capsys.readouterr().err and runs == []


def test_configs_are_given_once_or_once_for_each_checkpoint(run_folder, tmp_path, runs, capsys):
    three = [run_folder] * 3
    assert run(*three, "--config", CONFIG, "--suite", "drawn", "--out", tmp_path) == 2
    assert "--config: must be given once, or once for each of the 3" in capsys.readouterr().err
    assert run("--suite", "drawn", "--out", tmp_path) == 2
    assert "no checkpoint; name its folder, or that of a run" in capsys.readouterr().err
    assert evaluate.main(["a", "--config", "none.toml", "--suite", "drawn"]) == 2
    assert "none.toml" in capsys.readouterr().err


def test_the_configs_that_the_runs_kept_need_no_naming(run_folder, tmp_path, runs, capsys):
    assert evaluate.main([str(run_folder), "--suite", "drawn"]) == 2
    assert "tiny is not in the folder of a run that kept its config.toml" in capsys.readouterr().err
    for name, shift in (("a", "2"), ("b", "3")):
        shutil.copytree(run_folder, tmp_path / name)
        settings = ["--job.dump_folder", str(tmp_path / name), "--flow.shift", shift]
        SavedConfig(load_job_config(["--job.config_file", CONFIG, *settings])).write()
    both = [str(tmp_path / "a"), str(tmp_path / "b" / "checkpoint" / "step-7")]
    assert evaluate.main([*both, "--suite", "drawn", "--out", str(tmp_path / "out")]) == 0
    results = [json.loads(f.read_text()) for f in sorted((tmp_path / "out").glob("*/drawn-*.json"))]
    assert [r["label"] for r in results] == ["a/step-8", "b/step-7"]
    assert [r["config"] for r in results] == [str(tmp_path / n / "config.toml") for n in "ab"]
    assert len({r["scores"]["bright"]["score"] for r in results}) == 2


@pytest.fixture
def suites_as_before():
    with users_parts(SUITES, ROUTER_SCORES):
        yield


def test_a_suite_of_the_users_own_module_is_run(
    run_folder, tmp_path, suites_as_before, monkeypatch, capsys
):
    monkeypatch.chdir(Path(CONFIG).parents[1])
    own = ["--experimental.custom_import", "docs.examples.lengths_suite", "--out", tmp_path]
    assert run(run_folder, "--suite", "lengths", "--lengths.answers", 0, *own) == 2
    assert "--lengths.answers: must be at least 1, got 0" in capsys.readouterr().err
    assert run(run_folder, "--suite", "lengths", "--lengths.answers", 3, *own) == 0
    [result] = tmp_path.glob("*/lengths-*.json")
    score = json.loads(result.read_text())["scores"]["lengths/characters"]
    assert score["number"] == 3 and score["score"] >= 0


def test_the_runs_own_module_and_that_of_the_command_line_both_hold(
    run_folder, tmp_path, suites_as_before, monkeypatch, capsys
):
    monkeypatch.chdir(Path(CONFIG).parents[1])
    shutil.copytree(run_folder, tmp_path / "run")
    own = ["--experimental.custom_import", "docs.examples.softplus_score"]
    settings = ["--job.dump_folder", str(tmp_path / "run"), "--experts.score_function", "softplus"]
    with ROUTER_SCORES.temporarily():
        SavedConfig(load_job_config(["--job.config_file", CONFIG, *own, *settings])).write()
    forget_modules()
    brought = ["--experimental.custom_import", "docs.examples.lengths_suite"]
    with ROUTER_SCORES.temporarily():
        assert evaluate.main(["--suites", *brought]) == 0
        assert "--lengths.answers 4" in capsys.readouterr().out
        options = ["--suite", "lengths", "--lengths.answers", "1", "--out", str(tmp_path / "out")]
        # The folder of a run may be a stranger's; a config that is named is one's own.
        assert evaluate.main([str(tmp_path / "run"), *options, *brought]) == 2
        assert "softplus_score' in" in capsys.readouterr().err and "softplus" not in ROUTER_SCORES
        options += ["--config", str(tmp_path / "run" / "config.toml")]
        assert evaluate.main([str(tmp_path / "run"), *options, *brought]) == 0
        assert "softplus" in ROUTER_SCORES
    assert list(tmp_path.glob("out/*/lengths-*.json"))


def test_a_run_that_is_stopped_says_that_it_can_go_on(run_folder, tmp_path, monkeypatch, capsys):
    def stopped(*arguments):
        raise KeyboardInterrupt

    with SUITES.temporarily(stopped=Suite("stopped", "", Drawn, stopped)):
        assert run(run_folder, "--suite", "stopped", "--out", tmp_path) == 130
    assert "stopped; the same command goes on from here" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_only_the_first_of_several_processes_writes(run_folder, tmp_path, runs, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run(run_folder, "--suite", "drawn", "--compare", "--out", tmp_path) == 0
    assert len(runs) == 1 and not [path for path in tmp_path.rglob("*") if path.is_file()]
