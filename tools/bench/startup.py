#!/usr/bin/env python3
"""Seconds from the command to the first loss line, by stage: what ``./run_train.sh`` of a config takes before it trains.

Examples: tools/bench/startup.py train_configs/debug.toml --repeats 10
          NGPU=2 tools/bench/startup.py train_configs/debug.toml --against HEAD~1 --model.flavor debug

imports      until the first line of the log: the script, Python, the imports, the config and its checks
build        until the trainer is built: model, optimizer, loader
resume       until training begins: looking for a checkpoint
first_loss   until the line of step 1: the first batch and the first step
end          until the command has ended, after that one step and its checkpoint

Every start is a run of one step in a folder of its own. A stage has the seconds since the stage before (median and quartiles in ms) and
cpu_s, the CPU seconds of all its processes since then: the same when the machine is busy. ``to_first_loss`` is their sum up to that
line. With --against GITREF that commit starts in turn with this checkout, and ``ratio`` is its time (``cpu_ratio``: its CPU time)
divided by ours. The last line is JSON. CPU seconds need Linux.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_timing import interleave, machine, ratio, summary
from step_commits import ROOT, commit_of, unpack

# Stage -> what the line of the log has that ends it.
STAGES = {
    "imports": " - INFO - ",
    "build": "Trainer is initialized",
    "resume": "Training starts at step",
    "first_loss": "step:  1 ",
}
END = "end"


@dataclass(frozen=True)
class Start:
    """One start: seconds of each stage, and the CPU seconds of all processes in it."""

    seconds: dict[str, float]
    cpu_seconds: dict[str, float]

    def to_first_loss(self) -> float:
        return sum(self.seconds[stage] for stage in STAGES)

    def cpu_to_first_loss(self) -> float:
        return sum(self.cpu_seconds[stage] for stage in STAGES)


def cpu_seconds(pid: int) -> float:
    """CPU seconds so far of a process, of those that it has started, and of those of them that have ended; from /proc."""
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        parents[int(entry.name)] = int(fields[1])
        used[int(entry.name)] = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    ticks = sum(used[p] for p in used if pid in _ancestors(p, parents))
    return ticks / os.sysconf("SC_CLK_TCK")


def _ancestors(process: int, parents: dict[int, int]) -> Iterator[int]:
    """``process`` itself, its parent, and so on."""
    while process in parents:
        yield process
        process = parents[process]


def start(root: Path, config: Path, overrides: list[str]) -> Start:
    """Run one step with the ``run_train.sh`` of ``root``.

    Raises:
        SystemExit: it failed, or a stage did not come; the message is what it printed last.
    """
    names = list(STAGES)
    times: dict[str, tuple[float, float]] = {}
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--job.dump_folder", folder, "--training.steps", "1", "--metrics.log_freq", "1"]
        began = time.perf_counter()
        with subprocess.Popen(
            [str(root / "run_train.sh"), *settings, *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "CONFIG_FILE": str(config), "SYMBIOTIC_PYTHON": sys.executable},
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                while len(times) < len(names) and STAGES[names[len(times)]] in line:
                    times[names[len(times)]] = time.perf_counter() - began, cpu_seconds(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            times[END] = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
    if process.returncode or len(times) <= len(names):
        raise SystemExit("".join(lines)[-3000:] + f"startup.py: {root}/run_train.sh did not train")
    return Start(*(_differences([both[i] for both in times.values()]) for i in (0, 1)))


def _differences(times: list[float]) -> dict[str, float]:
    """Times since the beginning, by stage -> times since the stage before."""
    before = [0.0, *times]
    pairs = zip([*STAGES, END], times, before, strict=False)
    return {stage: time - earlier for stage, time, earlier in pairs}


def described(starts: list[Start]) -> dict[str, Any]:
    def stage(seconds: list[float], cpu: list[float]) -> dict[str, float]:
        return {**summary(seconds), "cpu_s": round(statistics.median(cpu), 2)}

    stages = {
        name: stage([s.seconds[name] for s in starts], [s.cpu_seconds[name] for s in starts])
        for name in (*STAGES, END)
    }
    total = stage(
        [s.to_first_loss() for s in starts],
        [s.cpu_to_first_loss() for s in starts],
    )
    return {"to_first_loss": total, "stages": stages}


def measure(roots: dict[str, Path], config: Path, overrides: list[str], repeats: int) -> Any:
    """What each checkout takes, in turn; with two of them also the second over the first. One start each does not count: it fills
    the caches of files and bytecode, and writes the demo data that a checkout lacks."""
    starts: dict[str, list[Start]] = {name: [] for name in roots}

    def contender(name: str) -> None:
        starts[name].append(start(roots[name], config, overrides))

    interleave(
        {name: lambda name=name: contender(name) for name in roots},  # type: ignore[misc]
        repeats=repeats,
        warmup=1,
    )
    counted = {name: of[1:] for name, of in starts.items()}
    result: dict[str, Any] = {name: described(of) for name, of in counted.items()}
    if len(roots) > 1:
        ours, theirs = roots
        wall = {name: [s.to_first_loss() for s in of] for name, of in counted.items()}
        cpu = {name: [s.cpu_to_first_loss() for s in of] for name, of in counted.items()}
        result["ratio"] = round(ratio(wall, theirs, ours), 3)
        result["cpu_ratio"] = round(ratio(cpu, theirs, ours), 3)
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="at least 2")
    parser.add_argument("--against", metavar="GITREF", help="a commit to compare with")
    options, overrides = parser.parse_known_args(arguments)
    config = Path(options.config).resolve()
    if not config.is_file():
        parser.error(f"CONFIG: there is no file {options.config}")
    if options.repeats < 2:
        parser.error(f"--repeats must be at least 2, for quartiles; got {options.repeats}")
    with tempfile.TemporaryDirectory() as folder:
        roots = {"here": ROOT}
        if options.against is not None:
            commit = commit_of(options.against)
            if commit is None:
                parser.error(f"--against: this repository has no commit {options.against}")
            unpack(commit, Path(folder))
            roots[options.against] = Path(folder)
        result = measure(roots, config, overrides, options.repeats)
    print(json.dumps({"config": options.config, **result, **machine()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
