"""Every line of a document that starts a benchmark is run as it stands, at toy size: its last line is JSON with finite numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from symbiotic_titan.demo.write import WorldSize, write_world
from tests.helpers.documented import ROOT, documented
from tests.helpers.forked import script_here, start
from tests.helpers.toy_checkout import with_options

# Whose documented lines test_bench_startup.py, test_bench_step.py, test_bench_step_against.py and test_bench_output_layer.py run.
OWN_TESTS = {"output_layer", "startup", "step"}
BENCHES = [
    command
    for command in documented()
    if command.words[0].startswith("tools/bench/") and Path(command.words[0]).stem not in OWN_TESTS
]
# What a toy run changes of the documented line: counts and sizes, nothing that chooses what is measured.
TOY: dict[str, dict[str, str]] = {
    "attention": {"--length": "32", "--rows": "1", "--repeats": "2"},
    "checkpoint": {"--gigabytes": "0.01", "--repeats": "2"},
    "context_parallel": {"--seq-len": "256", "--degrees": "2", "--steps": "2"},
    "convert": {"--gigabytes": "0.03", "--shard-gigabytes": "0.01", "--narrow": "32"},
    "generate": {"--batch": "1", "--steps": "1", "--tokens": "2", "--repeats": "2"},
    "index": {"--samples": "40", "--small": "30", "--large": "60", "--repeats": "2"},
    "loader": {
        "--samples": "8",
        "--rows": "2",
        "--repeats": "2",
        "--memory-samples": "10",
        "--photos": "2",
    },
    "moe": {"--shapes": "toy", "--experts": "16", "--top-k": "2", "--repeats": "2"},
    "packing": {"--samples": "60", "--repeats": "2"},
}
MACHINE = {"torch", "threads", "device", "commit"}
# The keys of the JSON, beside those of the machine. A dot leads into a table.
KEYS: dict[str, set[str]] = {
    "attention": {"layers", "lengths.32.times.dense", "lengths.32.dense_over_causal"},
    "checkpoint": {
        *("save_s.plain", "save_s.digests", "save_over", "load_s.plain", "load_s.verified"),
        *("load_over", "gigabytes", "share_of_training", "hash_gb_per_s.sha256"),
    },
    "context_parallel": {
        *("saved_share.2", "largest_loss_difference", "seq_len"),
        *("degrees.2.saved_mib", "degrees.2.rss_mib", "degrees.2.state_mib", "degrees.2.losses"),
    },
    "convert": {"gigabytes", "seconds", "gb_per_second", "peak_gb", "peak_over_shard", "bar"},
    "generate": {
        *("images_per_minute_cached", "images_per_minute_uncached", "image_cached_over_uncached"),
        *("tokens_per_second_cached", "tokens_per_second_uncached", "text_cached_over_uncached"),
        "times.image_cached",
    },
    "index": {
        *("us_per_sample", "tarfile_us_per_sample", "over.tar", "over.walk", "shuffle_10m.mb"),
        *("json_us_per_sample.lines", "json_us_per_sample.array", "cached_open_s_10m.tar"),
        *("private_mb_per_process.tar.30", "private_mb_per_process.jsonl.60"),
    },
    "loader": {"bar", "cases"},
    "moe": {
        *("partitioned_over_standard", "loop_over_partitioned", "transformers_over_partitioned"),
        *("partitioned_over_dense", "all", "times"),
    },
    "packing": {"fill.demo", "fill.lognormal", "bar", "met", "cases.demo.fullest"},
}


def toy_lines() -> dict[str, list[str]]:
    """Toy run, as text -> its words. Lines that differ only in what a toy run changes are run once."""
    found = {}
    for command in BENCHES:
        words = with_options(list(command.words), TOY[Path(command.words[0]).stem])
        found[" ".join(sorted(words))] = words
    return {" ".join(words): words for words in found.values()}


LINES = toy_lines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where documented commands are started: the shipped configs and a small demo world."""
    folder = tmp_path_factory.mktemp("checkout")
    write_world(folder / "demo_data", 0, WorldSize(4, 8, 100, 60, train_shards=1))
    (folder / "train_configs").symlink_to(ROOT / "train_configs")
    return folder


def numbers(value: Any) -> list[float]:
    """Every number in nested tables and lists."""
    if isinstance(value, dict | list):
        values = value.values() if isinstance(value, dict) else value
        return [number for inner in values for number in numbers(inner)]
    return [value] if isinstance(value, int | float) else []


def at(table: Any, path: str) -> Any:
    for key in path.split("."):
        table = table[key]
    return table


def run(folder: Path, script: str, arguments: list[str]) -> str:
    log = folder / "output.log"
    log.write_text("")
    # The variables that benchmarks would start themselves again with.
    environment = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16384"}
    process = start(script_here, str(ROOT / script), arguments, str(folder), str(log), environment)
    process.join()
    assert process.exitcode == 0, log.read_text()
    return log.read_text()


@pytest.mark.parametrize("line", LINES)
def test_a_documented_benchmark_prints_finite_figures(line, folder):
    script, *arguments = LINES[line]
    name = Path(script).stem
    found = json.loads(run(folder, script, arguments).splitlines()[-1])
    assert found.keys() >= MACHINE
    assert all(at(found, path) is not None for path in KEYS[name])
    assert len(numbers(found)) > len(MACHINE) and all(map(math.isfinite, numbers(found)))
    assert found.get("cases", {None: 1}), "nothing was measured"


def test_every_benchmark_is_named_by_a_document():
    benches = {p.stem for p in (ROOT / "tools/bench").glob("*.py") if "def main(" in p.read_text()}
    assert benches == {Path(command.words[0]).stem for command in BENCHES} | OWN_TESTS
