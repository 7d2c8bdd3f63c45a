"""The benchmark of a training step runs the shipped configs at toy size, and every comparison prints finite figures."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import bench_timing
import pytest
import step_child
import step_commits
import step_dense

from symbiotic_titan.data.documents import Document, TextSegment
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.data.sequence_builder import SequenceBuilder
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.demo.write import WorldSize, write_world
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.flops import model_cost
from symbiotic_titan.model.model_config import write_model_config
from symbiotic_titan.sequence.modality import TEXT
from tests.helpers.forked import script_here, start
from tests.helpers.stored_models import make_model, tiny_args
from tests.helpers.structure import ROOT

STEP = ROOT / "tools" / "bench" / "step.py"
TOY = [
    *("--training.seq_len", "160", "--training.local_batch_size", "1"),
    *("--training.global_batch_size", "1", "--training.mixed_precision_param", "float32"),
    *("--data.max_vit_tokens", "64", "--data.max_vae_tokens", "64", "--data.too_long", "skip"),
]
MACHINE = {"torch", "threads", "device", "commit"}
PARTS = {"data", "vit", "attention", "routing", "experts", "optimizer", "other"}


def toy(name, folder):
    """The shipped config ``name`` with few tokens and, where its model is not small, a small one with the same groups of experts."""
    arguments = [str(ROOT / "train_configs" / f"{name}.toml"), *TOY]
    if name == "mini":
        arguments += ["--model.flavor", str(folder / "mini.json")]
    return arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the paths of the shipped configs lead to a small demo world."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "demo_data", 0, WorldSize(4, 8, 100, 60, train_shards=1))
    small = {"dim": 64, "num_layers": 2, "dense_hidden_dim": 64, "expert_hidden_dim": 32}
    args = replace(FLAVORS["mini"], **small, vit=FLAVORS["debug"].vit)
    write_model_config(folder / "mini.json", args)
    return folder


def run_step(folder, *arguments):
    """(exit status, output) of step.py, started in ``folder``."""
    log = folder / "output.log"
    log.write_text("")
    process = start(script_here, str(STEP), list(arguments), str(folder), str(log))
    process.join()
    return process.exitcode, log.read_text()


def last_line(folder, *arguments):
    """The JSON that step.py prints, all of whose numbers are finite."""
    status, text = run_step(folder, *arguments)
    assert status == 0, text
    found = json.loads(text.splitlines()[-1])
    assert all(map(math.isfinite, numbers(found)))
    return found


def numbers(value):
    """Every number in nested tables and lists."""
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize("name", ["debug", "mini"])
def test_shares_of_a_step_of_a_shipped_config(folder, name):
    found = last_line(folder, *toy(name, folder), "--steps", "2", "--warmup", "1")
    assert found.keys() == {*MACHINE, name, "share_of_dense"}
    result = found[name]
    assert result.keys() == {"tokens_per_second", "step_seconds", "share", "share_of_dense"}
    assert result["tokens_per_second"] > 0 and result["step_seconds"] > 0
    assert result["share"].keys() == PARTS and min(result["share"].values()) > 0
    assert sum(result["share"].values()) == pytest.approx(1, abs=0.01)
    assert found["share_of_dense"] == {name: result["share_of_dense"]}
    assert 0 < result["share_of_dense"] < 1


@pytest.mark.parametrize("name", ["debug", "mini"])
def test_variants_of_a_shipped_config_side_by_side(folder, name):
    counts = ["--steps", "2", "--warmup", "1"]
    found = last_line(
        folder, *toy(name, folder), "--compare", "--variants", "eager", "ema", *counts
    )
    assert found.keys() == {*MACHINE, name}
    assert found[name].keys() == {"ema_over_eager", "times"}
    assert found[name]["ema_over_eager"] > 0
    assert found[name]["times"].keys() == {"eager", "ema"}


def check_commits(found, reference, name):
    assert found.keys() == {*MACHINE, "against", name, f"step_speedup_{name}", "share_of_dense"}
    assert found["against"] == reference and found[f"step_speedup_{name}"] > 0
    result = found[name]
    assert result["quartile_1"] <= result["speedup"] <= result["quartile_3"]
    assert result["times"].keys() == {"this", "other", "dense"}
    assert 0 < result["share_of_dense_in_documents"] < result["share_of_dense"] < 1
    assert result["config"] == "the same"
    # Of steps on the same data: those of different data differ by tenths.
    assert result["largest_loss_difference"] < 1e-4 and min(result["last_losses"]) > 1


def test_the_step_against_that_of_the_last_commit(folder):
    counts = ["--steps", "2", "--warmup", "0", "--threads", "1"]
    found = last_line(folder, *toy("debug", folder), "--against", "HEAD", *counts)
    check_commits(found, "HEAD", "debug")
    assert found["debug"]["times"]["this"]["median_ms"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["debug", "mini"])
def test_the_step_against_that_of_a_commit_with_another_layout(folder, name):
    if step_commits.commit_of("d603279") is None:
        pytest.skip("this clone does not reach back to d603279")
    counts = ["--steps", "2", "--warmup", "0"]
    config = str(
        ROOT / "train_configs" / f"{name}.toml"
    )  # whole: it knows not every key of a flavor
    found = last_line(folder, config, *TOY, "--against", "d603279", *counts)
    check_commits(found, "d603279", name)
    assert found[name]["times"]["other"]["median_ms"] > 0


def test_a_trainer_is_found_where_older_layouts_had_it(tmp_path, monkeypatch):
    monkeypatch.setattr(step_child, "checkout", lambda: tmp_path)
    (tmp_path / "symbiotic_titan").mkdir()
    with pytest.raises(ValueError, match=r"it has no symbiotic_titan\.training\.trainer or"):
        step_child.part("trainer", "SymbioticTrainer")
    (tmp_path / "symbiotic_titan" / "trainer.py").touch()
    older = SimpleNamespace(SymbioticTrainer="the trainer")
    monkeypatch.setitem(sys.modules, "symbiotic_titan.trainer", older)
    assert step_child.part("trainer", "SymbioticTrainer") == "the trainer"


def test_a_config_that_neither_of_the_files_is_accepted_for_is_refused_with_its_reason(monkeypatch):
    def load(config, *run):
        if config != "old.toml":
            raise ValueError(f"{config}: no")

    monkeypatch.setattr(step_child, "load_config", load)
    run = ("folder", 2, [])
    assert step_child.accepted(["new.toml", "old.toml"], *run) == "old.toml"
    with pytest.raises(ValueError, match="new.toml: no"):
        step_child.accepted(["new.toml"], *run)


def limit_of(lengths, seq_len):
    """(the dense limit of a step with a row that is packed with documents of these lengths, its cost)."""
    model = make_model(tiny_args())
    cost = model_cost(model, model.args, seq_len)
    trainer = SimpleNamespace(
        model_parts=[model],
        model_args=model.args,
        metrics_processor=SimpleNamespace(cost=cost),
        job_config=SimpleNamespace(
            training=SimpleNamespace(
                local_batch_size=1, seq_len=seq_len, mixed_precision_param="float32"
            )
        ),
        gradient_accumulation_steps=1,
        device="cpu",
        to_device=lambda batch: batch,
    )
    limit = step_dense.DenseLimit(trainer)
    builder = SequenceBuilder(
        SequenceSize(seq_len, 0, 0), model.args.geometry, "grid", ByteTokenizer().special
    )
    for step in ([5], lengths):  # the first no longer counts
        opening, texts = TextSegment([1]), [TextSegment([1] * (n - 1), trained=True) for n in step]
        trainer.to_device(builder.build([Document(0, (opening, text)) for text in texts]))
    return limit, cost


def flops_of_two_texts(cost):
    """Of 48 tokens of text, all labels but the first of each of two documents."""
    return 3 * (48 * cost.forward_flops[TEXT] - 2 * cost.logit_flops)


def test_the_dense_limit_counts_the_flops_of_the_last_steps_tokens(monkeypatch):
    limit, cost = limit_of([24, 24], 64)
    assert limit.flops() == pytest.approx(flops_of_two_texts(cost))
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(bench_timing.time, "perf_counter", lambda: next(clock))
    calls = []
    monkeypatch.setattr(
        step_dense.torch, "mm", lambda a, b: calls.append(2 * a.numel() * b.shape[1])
    )
    assert limit.seconds() == pytest.approx(6.0 * limit.flops() / sum(calls))
    assert sum(calls) == pytest.approx(limit.flops(), rel=0.5)


def test_attention_within_documents_is_what_rows_of_their_length_would_cost():
    limit, cost = limit_of([24, 24], 64)
    model = make_model(tiny_args())
    short = model_cost(model, model.args, 24)
    expected = flops_of_two_texts(short) / flops_of_two_texts(cost)
    assert limit.share_in_documents() == pytest.approx(expected) and expected < 0.95


def test_a_mistake_in_a_config_is_told_in_one_line(folder):
    status, text = run_step(folder, "nowhere.toml")
    assert status == 2
    assert text.splitlines()[-1].startswith("error: job.config_file: no such file: ")
    assert "Traceback" not in text
