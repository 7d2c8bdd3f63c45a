"""Benchmarks take turns, and their baselines compute the same thing."""

import json
import re
import statistics
import time

import bench_timing as timing
import pytest
import torch
from stopwatch import Stopwatch

from tests.helpers.forked import script_here, start
from tests.helpers.structure import ROOT
from tools.bench import moe

BENCH = ROOT / "tools" / "bench"


def test_contenders_take_turns_and_warm_up_does_not_count():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    times = timing.interleave(contenders, repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert [len(t) for t in times.values()] == [3, 3]


def test_times_are_seconds():
    times = timing.interleave({"nap": lambda: time.sleep(0.01)}, repeats=2, warmup=0)
    assert 0.01 <= min(times["nap"]) < 1.0


def test_ratio_is_taken_within_rounds():
    # The second round was slow for both: a quotient of medians would not be 2.
    times = {"a": [2.0, 20.0, 2.2], "b": [1.0, 10.0, 1.1]}
    assert timing.ratio(times, "a", "b") == pytest.approx(2.0)


def test_summary_is_median_and_quartiles_in_milliseconds():
    seconds = [0.001, 0.002, 0.003, 0.004, 0.1]
    row = timing.summary(seconds)
    assert row["median_ms"] == 1e3 * statistics.median(seconds)
    assert row["quartile_1_ms"] == 2.0 and row["quartile_3_ms"] == 4.0


def test_restart_keeps_what_is_set_and_adds_what_is_missing(monkeypatch):
    started = []
    monkeypatch.setattr(timing.os, "execv", lambda *a: started.append(a))
    monkeypatch.setenv("SET", "mine")
    timing.restart_with({"SET": "theirs"})
    assert not started and timing.os.environ["SET"] == "mine"
    monkeypatch.setenv("MISSING", "")  # so that it is taken back afterwards
    monkeypatch.delenv("MISSING")
    timing.restart_with({"SET": "theirs", "MISSING": "now"})
    assert len(started) == 1 and timing.os.environ["MISSING"] == "now"
    monkeypatch.delenv("MISSING")


def test_machine_says_what_a_number_depends_on():
    assert set(timing.machine()) == {"torch", "threads", "device", "commit"}


def test_the_loop_baseline_computes_what_the_layer_computes():
    case = moe.Case(moe.Shape(20, 8, 12), torch.float32, num_experts=8, top_k=2)
    loop, layer = moe.LoopMoE(case), moe.our_layer(case, case.pool)
    with torch.no_grad():
        layer.router["all"].weight.copy_(loop.router.weight)
        for index, expert in enumerate(loop.experts):
            for name in ("w1", "w2", "w3"):
                getattr(layer.experts["all"], name)[index] = getattr(expert, name).weight
    x_TD = torch.randn(20, 8)
    out_TD, _ = layer(x_TD, torch.zeros(20, dtype=torch.int64), torch.tensor(1.0))
    torch.testing.assert_close(out_TD, loop(x_TD))


def test_the_torchtitan_baseline_computes_what_the_layer_computes(monkeypatch):
    case = moe.Case(moe.Shape(20, 8, 12), torch.float32, num_experts=8, top_k=2)
    theirs, layer = moe.torchtitan_layer(case), moe.our_layer(case, case.pool)
    theirs.experts.use_grouped_mm = False  # these matmuls need a GPU, and counting does
    monkeypatch.setattr(torch, "histc", lambda x, bins, min, max: x.bincount(minlength=bins))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        layer.router["all"].weight.copy_(theirs.router.gate.weight)
        for name in ("w1", "w2", "w3"):
            getattr(layer.experts["all"], name).copy_(getattr(theirs.experts, name))
    x_TD = torch.randn(20, 8)
    out_TD, _ = layer(x_TD, torch.zeros(20, dtype=torch.int64), torch.tensor(1.0))
    torch.testing.assert_close(out_TD, theirs(x_TD[None])[0])
    assert not moe.runs_here("torchtitan", case, "cpu")


def test_phases_of_a_layer_add_up_to_the_whole_and_leave_its_gradients_alone():
    case = moe.Case(moe.SHAPES["toy"], torch.float32, num_experts=16, top_k=2)
    found = moe.phases(case, repeats=2, warmup=0)
    assert list(found) == list(moe.PHASES) and min(found.values()) > 0
    watched, plain = (moe.our_layer(case, case.partition) for _ in range(2))
    for parameter in watched.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plain.load_state_dict(watched.state_dict())
    watch = Stopwatch(timing.Clock("cpu"))
    watch.watch(watched.router, "forward", "router")
    watch.watch(watched.dispatcher, "dispatch", "dispatch")
    x_TD, modality_T = torch.randn(64, 16, requires_grad=True), moe.modalities(case.shape, "cpu")
    gradients = []
    for layer in (watched, plain):
        out_TD, _ = layer(x_TD, modality_T, torch.tensor(1.0))
        gradients.append(torch.autograd.grad(out_TD.square().sum(), [x_TD, *layer.parameters()]))
    assert all(map(torch.equal, *gradients))
    seconds = watch.take()
    assert set(seconds) == {"router", "dispatch"} and not watch.take()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning",
    "ignore:.* should not be instantiated:DeprecationWarning",
)
def test_a_compiled_function_is_watched_from_outside_its_graph():
    layer = torch.nn.Linear(4, 4)
    expected = torch.autograd.grad(layer(torch.ones(2, 4)).square().sum(), layer.weight)
    layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    watch = Stopwatch(timing.Clock("cpu"))
    watch.watch(layer, "forward", "linear")
    found = torch.autograd.grad(layer(torch.ones(2, 4)).square().sum(), layer.weight)
    assert torch.equal(*found, *expected) and watch.take()["linear"] > 0
    torch._dynamo.reset()


def test_the_cpu_of_a_machine_with_a_gpu_is_measured_without_the_gpu(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(timing.os, "execv", lambda *a: started.append(a))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    timing.use_device("cuda")
    assert not started and moe.parse(["--dtypes", "float32"]).device == "cuda"
    assert moe.parse([]).dtypes == ["bfloat16"]
    timing.use_device("cpu")
    assert len(started) == 1 and timing.os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, problem in (("cuda", "there is no CUDA device; choose cpu"), ("tpu", "must be cpu")):
        with pytest.raises(SystemExit):
            moe.parse(["--device", name])
        assert f"error: argument --device: {problem}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "sizes"), [(128, 8, [96, 32]), (16, 2, [12, 4]), (16, 8, [8, 8])]
)
def test_a_group_of_the_moe_bench_has_at_least_as_many_experts_as_a_token_visits(
    num_experts, top_k, sizes
):
    case = moe.Case(moe.SHAPES["toy"], torch.float32, num_experts, top_k)
    assert [group.num_experts for group in case.partition] == sizes
    assert [group.num_experts for group in case.pool] == [num_experts]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--experts", "6"], "--experts must be positive multiples of 4, .* got 6"),
        (["--experts", "16", "8"], "--top-k must be at most half of --experts, .* got 8 of 8"),
        (["--top-k", "2", "0"], "--top-k must be at least 1, got 0"),
        (["--repeats", "1"], "--repeats must be at least 2 to have a spread, got 1"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_impossible_layers_are_refused_in_one_line(options, problem, capsys):
    with pytest.raises(SystemExit):
        moe.parse(["--top-k", "8", *options] if "--top-k" not in options else options)
    assert re.search(f"error: {problem}.*$", capsys.readouterr().err.splitlines()[-1])


def test_the_moe_bench_prints_a_ratio_for_every_case(tmp_path, monkeypatch):
    for key, value in moe.ENVIRONMENT.items():
        monkeypatch.setenv(key, value)  # or it starts itself again
    log = tmp_path / "output.log"
    sizes = ["--shapes", "toy", "--experts", "8", "16", "--top-k", "2", "4", "--repeats", "2"]
    options = [*sizes, "--skip", "transformers", "--threads", "1"]
    process = start(script_here, str(BENCH / "moe.py"), options, str(tmp_path), str(log))
    process.join()
    assert process.exitcode == 0, log.read_text()
    found = json.loads(log.read_text().splitlines()[-1])
    cases = [f"toy_{dtype}_E{e}_K{k}" for dtype in moe.DTYPES for e in (8, 16) for k in (2, 4)]
    keys = {"partitioned_over_standard", "loop_over_partitioned", "partitioned_over_dense"}
    assert list(found["all"]) == list(found["times"]) == cases
    assert all(set(row) == keys and min(row.values()) > 0 for row in found["all"].values())
    for key in keys:
        worst = max if key == "partitioned_over_standard" else min
        assert found["worst"][key] == worst(row[key] for row in found["all"].values())
        assert found[key] == found["all"][cases[0]][key]


def test_ratios_name_their_direction():
    times = {"partitioned": [2.0, 2.0], "standard": [2.0, 2.0], "dense": [1.0, 1.0]}
    assert moe.ratios(times) == {"partitioned_over_standard": 1.0, "partitioned_over_dense": 0.5}


@pytest.mark.parametrize(
    "script", sorted(p.name for p in BENCH.glob("*.py") if "def main(" in p.read_text())
)
def test_a_benchmark_is_started_by_its_path_from_anywhere(script, tmp_path):
    log = tmp_path / "output.log"
    process = start(script_here, str(BENCH / script), ["--help"], str(tmp_path), str(log))
    process.join()
    assert process.exitcode == 0 and f"tools/bench/{script}" in log.read_text(), log.read_text()
