"""The main job end to end: it learns, repeats, resumes, stops, and gives the same losses however it is spread out."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from symbiotic_titan.commands import convert
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.config.saved import saved_config
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.model_config import write_model_config
from symbiotic_titan.process import DIVERGED
from symbiotic_titan.weights.damage import newest_complete_step
from tests.helpers.launch import (
    NUM_STEPS,
    ROOT,
    Run,
    arguments_of,
    environments,
    launch,
    read_scalars,
    start_ranks,
    train,
)
from tests.helpers.query_models import with_queries

LOSSES = ("loss/text", "loss/flow", "loss/balance", "grad_norm/all")
# Sums are taken in another order with other ranks: relatively, over 20 float32 steps, 2e-7 was measured for the losses and 1.3e-6
# for the gradient norm.
TOLERANCE = 1e-5


def assert_same(run, reference, tags=LOSSES, last=NUM_STEPS, rtol=0.0):
    """Every logged value of ``run`` up to step ``last`` equals the reference's within ``rtol`` (0: bitwise)."""
    assert run.status == 0, run.text[-3000:]
    for tag in tags:
        ours, theirs = run.scalars(tag), reference.scalars(tag)
        assert set(ours) >= set(range(1, last + 1)), (tag, sorted(ours))
        for step in range(1, last + 1):
            gap = abs(ours[step] - theirs[step])
            assert gap <= rtol * abs(theirs[step]), (tag, step, ours[step], theirs[step])


def test_every_loss_term_falls(reference):
    for tag in ("loss/text", "loss/flow"):
        values = reference.scalars(tag)
        start = sum(values[s] for s in range(1, 4)) / 3
        end = sum(values[s] for s in range(NUM_STEPS - 2, NUM_STEPS + 1)) / 3
        assert end < 0.8 * start, (tag, start, end)


def test_metrics_have_their_names(reference):
    for tag in (
        "loss/total", "loss/by_task/lm_text", "loss/by_task/t2i_flow", "routing/capacity_rate/all",
        "routing/capacity_rate/vae", "routing/imbalance/text", "routing/idle_experts/vit",
        "tokens/vae", "lr/generation", "lr/understanding", "grad_norm/generation", "shield/scale",
        "data/fill", "data/skipped", "perf/tokens_per_second",
    ):  # fmt: skip
        assert reference.scalars(tag), f"{tag} is not logged"
    assert reference.scalars("shield/scale")[1] == 0.0
    assert reference.scalars("tokens/vae")[20] > reference.scalars("tokens/vae")[1] > 0


def test_a_run_keeps_the_config_it_was_started_with(reference):
    saved = load_job_config(["--job.config_file", str(saved_config(reference.folder))])
    given = load_job_config(["--job.config_file", str(reference.folder / "job.toml")])
    assert saved.data == given.data and saved.experts == given.experts
    assert saved.training.steps == NUM_STEPS and saved.checkpoint.interval == 7


def test_a_second_run_resumed_at_any_step_is_bitwise_the_uninterrupted_one(
    tmp_path, demo, reference
):
    first = launch(tmp_path, demo, training__steps=13, training__dataloader__num_workers=2)
    assert first.status == 0, first.text[-3000:]
    assert_same(first, reference, last=13)
    second = launch(tmp_path, demo, training__steps=NUM_STEPS)
    assert "Training starts at step 14" in second.text
    assert_same(second, reference)


# (processes, expert-parallel degree).
Layout = tuple[int, int]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, demo):
    """Layout -> a run that saved asynchronously at step 10 of 12; the save of the last step, which is synchronous, is thrown away."""

    @functools.cache
    def run(layout: Layout) -> Run:
        folder = tmp_path_factory.mktemp("saved")
        run = launch_on(layout, folder, demo, 12)
        shutil.rmtree(folder / "checkpoint" / "step-12")
        return run

    return run


def launch_on(layout: Layout, folder: Path, demo: Path, steps: int) -> Run:
    world_size, expert_parallel = layout
    run = launch(
        folder,
        demo,
        world_size=world_size,
        training__steps=steps,
        parallelism__expert_parallel_degree=expert_parallel,
        checkpoint__async_mode="async",
        checkpoint__interval=10,
    )
    assert run.status == 0, run.text[-3000:]
    return run


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_two_processes_give_the_losses_of_one(saved, reference, expert_parallel):
    assert_same(saved((2, expert_parallel)), reference, last=12, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("saved_on", "resumed_on"), [((2, 2), (1, 1)), ((1, 1), (2, 2)), ((2, 2), (2, 1))]
)
def test_checkpoint_of_one_layout_resumes_on_another(
    tmp_path, demo, saved, reference, saved_on, resumed_on
):
    folder = tmp_path / "run"
    shutil.copytree(saved(saved_on).folder, folder)
    run = launch_on(resumed_on, folder, demo, NUM_STEPS)
    assert "Training starts at step 11" in run.text
    assert_same(run, reference, rtol=TOLERANCE)


def test_a_model_whose_queries_read_the_images_trains_alike_on_one_process_and_on_two(
    tmp_path, demo
):
    """Six queries an image instead of a token for each of its squares; the two are compiled and share the experts."""
    write_model_config(tmp_path / "model.json", with_queries(FLAVORS["debug"], {8: 6}))
    settings = {"model__flavor": tmp_path / "model.json"}
    one = launch(tmp_path / "one", demo, training__steps=NUM_STEPS, **settings)
    two = launch(
        tmp_path / "two",
        demo,
        world_size=2,
        training__steps=8,
        parallelism__expert_parallel_degree=2,
        compile__enable=True,
        compile__backend="aot_eager",
        **settings,
    )
    assert_same(two, one, tags=(*LOSSES, "tokens/vit"), last=8, rtol=TOLERANCE)
    answers = one.scalars("loss/by_task/mmu_text")  # of the steps that hold questions
    assert len(answers) > NUM_STEPS / 2
    assert answers[max(answers)] < 0.8 * answers[min(answers)]


def test_a_run_begins_with_an_export_as_with_the_checkpoint_it_was_made_of(tmp_path, demo):
    """Of one process and of two that share the experts."""
    source = launch(tmp_path / "source", demo, training__steps=2)
    assert source.status == 0, source.text[-3000:]
    checkpoint, export = source.folder / "checkpoint" / "step-2", tmp_path / "export"
    config = ["--config", str(source.folder / "job.toml"), "--part", "whole"]
    assert (
        convert.main(["to-hf", "--checkpoint", str(checkpoint), "--out", str(export), *config]) == 0
    )
    begin = {"training__steps": 4, "checkpoint__initial_load_model_only": True}
    first = launch(tmp_path / "a", demo, checkpoint__initial_load_path=checkpoint, **begin)
    second = launch(tmp_path / "b", demo, checkpoint__initial_load_path=export, **begin)
    shared = {"world_size": 2, "parallelism__expert_parallel_degree": 2}
    third = launch(tmp_path / "c", demo, checkpoint__initial_load_path=export, **begin, **shared)
    for run, rtol in ((second, 0.0), (third, TOLERANCE)):
        assert run.status == 0 and "Loading the weights in" in run.text, run.text[-3000:]
        for tag in LOSSES:
            assert run.scalars(tag) == pytest.approx(first.scalars(tag), rel=rtol, abs=0)
    begin["checkpoint__initial_load_model_only"] = False
    refused = launch(tmp_path / "d", demo, checkpoint__initial_load_path=export, **begin)
    assert refused.status == 2 and "set checkpoint.initial_load_model_only" in refused.text


def test_full_activation_checkpointing_counts_records_once_and_is_profiled(
    tmp_path, demo, reference
):
    profiling = {"enable_profiling": True, "profile_freq": 5}
    run = launch(
        tmp_path,
        demo,
        training__steps=6,
        activation_checkpoint__mode="full",
        **{f"profiling__{key}": value for key, value in profiling.items()},
    )
    tags = (*LOSSES, "routing/capacity_rate/all", "tokens/vae")
    assert_same(run, reference, tags=tags, last=6, rtol=1e-5)
    (trace,) = (path for path in (tmp_path / "profile_traces").rglob("*") if path.is_file())
    assert trace == tmp_path / "profile_traces/iteration_5/rank0_trace.json"
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"aten::mm", "Optimizer.step#AdamW.step"} <= {event.get("name") for event in events}
    assert "Warning" not in run.text


def test_global_balance_of_two_micro_batches_equals_one_of_twice_the_rows(tmp_path, demo):
    runs = [
        launch(
            tmp_path / name,
            demo,
            training__steps=8,
            losses__balance_scope="global",
            losses__balance=1.0,
            training__local_batch_size=rows,
        )
        for name, rows in (("split", 2), ("whole", 4))
    ]
    assert_same(runs[0], runs[1], last=8, rtol=10 * TOLERANCE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal_saves_and_exits_with_status_0(tmp_path, demo, reference, number):
    arguments = arguments_of(tmp_path, demo, {"training.steps": 100_000})
    ranks = start_ranks(tmp_path, arguments)
    ranks.wait_for("step:  3")
    ranks.send(number)
    statuses, [text] = ranks.wait(60), ranks.texts()
    assert statuses == [0], text[-3000:]
    assert f"{number.name}: saving a checkpoint" in text
    steps = [int(path.name.split("-")[1]) for path in (tmp_path / "checkpoint").glob("step-*")]
    last = min(max(steps) + 3, NUM_STEPS)
    resumed = launch(tmp_path, demo, training__steps=last)
    assert f"Training starts at step {max(steps) + 1}" in resumed.text
    assert_same(resumed, reference, last=last)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, demo, reference):
    first = launch(tmp_path, demo, training__steps=8, checkpoint__interval=4)
    assert first.status == 0, first.text[-3000:]
    data = next((tmp_path / "checkpoint" / "step-8").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    second = launch(tmp_path, demo, training__steps=9)
    assert "step-8 is skipped and renamed to damaged-8" in second.text
    assert "Training starts at step 5" in second.text
    assert_same(second, reference, last=9)


def test_no_complete_checkpoint_and_another_model_are_told_in_one_line(tmp_path, demo):
    first = launch(tmp_path, demo, training__steps=2)
    assert first.status == 0, first.text[-3000:]
    config = tmp_path / "job.toml"
    text = config.read_text().replace("num_experts = 12", "num_experts = 8")
    config.write_text(text.replace("num_experts = 4\n", "num_experts = 8\n"))
    arguments = arguments_of(tmp_path / "other", demo, {"training.steps": 3})
    arguments[1] = str(config)
    arguments += ["--job.dump_folder", str(tmp_path)]
    other = train(tmp_path / "other", arguments)
    assert other.status == 2 and "is of another model" in other.text
    kept = load_job_config(["--job.config_file", str(saved_config(tmp_path))])
    assert kept.experts.partition["generation"].num_experts == 4  # that of the run, which goes on
    next((tmp_path / "checkpoint" / "step-2").glob("*.distcp")).unlink()
    third = launch(tmp_path, demo, training__steps=3)
    assert third.status == 2 and "no checkpoint in" in third.text and "is missing" in third.text


def test_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path, demo):
    run = launch(
        tmp_path,
        demo,
        training__steps=NUM_STEPS,
        training__max_norm=1e30,
        optimizer__lr=1e30,
        checkpoint__interval=1,
        checkpoint__async_mode="async",
        lr_scheduler__warmup_steps=0,
    )
    assert run.status == DIVERGED and "Traceback" not in run.text
    assert "not finite" in run.text and "the weights were not changed" in run.text
    # The save of step 1 was under way: it was brought to its end.
    assert newest_complete_step(tmp_path / "checkpoint")[:2] == (1, {})


def test_weights_that_are_not_finite_are_not_saved(tmp_path, demo):
    """Without Adam's eps, 0 / 0 is the update of rows that no token has read; losses and gradients of the step are finite."""
    run = launch(tmp_path, demo, training__steps=1, training__seq_len=256, optimizer__eps=0.0)
    assert run.status == DIVERGED and "Traceback" not in run.text
    assert "step 1: its checkpoint was not written, because it is not finite in" in run.text
    assert "tok_embeddings.weight (NaN)" in run.text
    assert not list(tmp_path.glob("checkpoint/step-*"))


def test_text_only_rank_and_batches_without_images_do_not_hang(tmp_path, demo):
    folder = tmp_path / "run"
    arguments = arguments_of(
        folder, demo, {"training.steps": 4, "parallelism.expert_parallel_degree": 2}
    )
    config = folder / "job.toml"
    text = config.read_text()
    head, *sources = text.split("[[data.sources]]")
    tail = sources[-1][sources[-1].index("[checkpoint]") :]
    (lm,) = [source for source in sources if 'name = "lm"' in source]
    config.write_text(f"{head}[[data.sources]]{lm}{tail}")
    run = train(folder, arguments, world_size=2)
    assert run.status == 0, run.text[-3000:]
    assert "flow: " not in run.text and "balance: " in run.text  # there is none
    assert read_scalars(folder, "loss/total")[4] > read_scalars(folder, "loss/text")[4]
    assert read_scalars(folder, "loss/text")[4] > 0.0


def test_first_loss_line_comes_within_thirty_seconds(tmp_path, demo):
    arguments = arguments_of(tmp_path, demo, {"training.steps": 2})
    start = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "symbiotic_titan.train", *arguments],
        cwd=ROOT,
        env=environments(1)[0],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "step:  1" in line)
        seconds = time.monotonic() - start
        process.stdout.read()
    assert "text:" in line and seconds < 30
