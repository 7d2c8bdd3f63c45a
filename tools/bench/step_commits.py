"""The training step of this checkout against that of another commit: ``step.py --against GITREF``.

The commit is unpacked into a temporary folder, which is removed at the end. Each of the two has a process of its own
(``step_child.py``) in the current directory, where the configs' data paths begin; the processes take their steps in turn, and the
one that begins changes from round to round. While one works the other waits.

Both train the config file that is named, with the same overrides and number of threads. If the commit does not accept the file, for
it has settings that were not there yet, it trains its own file of that path instead, and the result says so under ``config``. With
--own-config it always trains its own file: what the config of that name cost there.
"""

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_timing import ratio, summary

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]


@dataclass(frozen=True)
class Rounds:
    """What is run: ``steps`` rounds that count after ``warmup`` that do not, with torch's ``threads`` (None: its choice).

    own_config: each commit trains its own file of the config's path.
    """

    steps: int
    warmup: int
    threads: int | None
    overrides: list[str]
    own_config: bool = False


def commit_of(reference: str) -> str | None:
    """The hash of the commit that ``reference`` names in this repository; None if it names none."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", "--end-of-options"]
    found = subprocess.run([*command, f"{reference}^{{commit}}"], capture_output=True, text=True)
    return found.stdout.strip() or None


def unpack(commit: str, folder: Path) -> None:
    """Write the files of ``commit`` to ``folder``."""
    command = ["git", "-C", str(ROOT), "archive", "--format=zip", commit]
    packed = subprocess.run(command, capture_output=True, check=True).stdout
    with zipfile.ZipFile(io.BytesIO(packed)) as files:
        files.extractall(folder)
        for file in files.infolist():
            if (
                mode := file.external_attr >> 16
            ):  # extractall leaves out that a script can be executed
                (folder / file.filename).chmod(mode)


class Child:
    """A process that trains with the package of ``root``."""

    def __init__(self, root: Path, configs: list[Path], folder: Path, rounds: Rounds) -> None:
        folder.mkdir(parents=True)
        self._log = folder / "output.log"
        request = {
            "root": str(root),
            "configs": [str(path) for path in configs],
            "folder": str(folder),
            "steps": rounds.steps + rounds.warmup,
            "threads": rounds.threads,
            "dense": root == ROOT,
            "overrides": rounds.overrides,
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE.with_name("step_child.py")), json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
            bufsize=1,
            env={**os.environ, "PYTHONPATH": str(root)},
        )

    def answer(self) -> dict[str, Any]:
        """Its next line.

        Raises:
            RuntimeError: it has ended; the message is what it printed last.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._log.read_text()[-3000:])
        return json.loads(line)

    def ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        return self.answer()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def children(
    config_file: str, reference: str, rounds: Rounds
) -> Iterator[tuple[Child, Child, bool]]:
    """(the process of this checkout, that of the commit ``reference``, whether both train the same file).

    Raises:
        SystemExit: one of them cannot train the config.
    """
    ours = Path(config_file).resolve()
    commit = commit_of(reference)
    assert commit is not None, reference  # checked with the command line
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        unpack(commit, folder / "commit")
        theirs = [ours]
        if ours.is_relative_to(ROOT):
            own = folder / "commit" / ours.relative_to(ROOT)
            theirs += [own] if own.is_file() else []
            theirs = theirs[-1:] if rounds.own_config else theirs
        pair: list[tuple[Child, str]] = []
        for root, configs, whose in (
            (ROOT, [ours], "this checkout"),
            (folder / "commit", theirs, reference),
        ):
            child = Child(root, configs, folder / f"run-{len(pair)}", rounds)
            stack.callback(child.end)
            pair.append((child, whose))
        taken = []
        for child, whose in pair:
            first = child.answer()
            if "refused" in first:
                raise SystemExit(f"{config_file} with {whose}: {first['refused']}")
            taken.append(Path(first["config"]))
        yield pair[0][0], pair[1][0], taken[0] == taken[1]


def take_turns(this: Child, other: Child, rounds: Rounds) -> dict[str, list[dict[str, float]]]:
    """The answers of all rounds, also of those that do not count: ``this``, ``other`` and ``dense``."""
    answers: dict[str, list[dict[str, float]]] = {"this": [], "other": [], "dense": []}
    for number in range(rounds.warmup + rounds.steps):
        pair = [("this", this), ("other", other)]
        for name, child in pair if number % 2 else reversed(pair):
            answers[name].append(child.ask("step"))
        answers["dense"].append(this.ask("dense"))
    return answers


def compare_commits(config_file: str, reference: str, rounds: Rounds) -> dict[str, Any]:
    """The step of this checkout against that of ``reference``; ``speedup`` is above 1 where this checkout is faster.

    ``speedup`` and its quartiles are of the rounds' ratios of wall time; ``cpu_speedup`` is the median of those of CPU time over all
    threads, which other work on the machine hardly changes. ``largest_loss_difference``: of all rounds, relative. ``share_of_dense``: see
    ``step_dense``; ``share_of_dense_in_documents`` counts attention within documents only.

    Raises:
        SystemExit: one of the two cannot train the config.
    """
    with children(config_file, reference, rounds) as (this, other, is_same_file):
        answers = take_turns(this, other, rounds)
    losses = [
        (a["loss"], b["loss"]) for a, b in zip(answers["this"], answers["other"], strict=True)
    ]
    counted = {name: rows[rounds.warmup :] for name, rows in answers.items()}
    seconds = {name: [row["seconds"] for row in rows] for name, rows in counted.items()}
    cpu = {name: [row["cpu_seconds"] for row in counted[name]] for name in ("this", "other")}
    pairs = zip(seconds["other"], seconds["this"], strict=True)
    low, median, high = statistics.quantiles((a / b for a, b in pairs), n=4, method="inclusive")
    dense = [
        row["seconds"] / seconds["this"][i] * row["in_documents"]
        for i, row in enumerate(counted["dense"])
    ]
    return {
        "speedup": round(median, 3),
        "quartile_1": round(low, 3),
        "quartile_3": round(high, 3),
        "cpu_speedup": round(ratio(cpu, "other", "this"), 3),
        "largest_loss_difference": max(abs(a - b) / abs(b) for a, b in losses),
        "last_losses": losses[-1],
        "config": "the same" if is_same_file else f"the file of {reference} for {reference}",
        "share_of_dense": round(ratio(seconds, "dense", "this"), 3),
        "share_of_dense_in_documents": round(statistics.median(dense), 3),
        "times": {name: summary(values) for name, values in seconds.items()},
    }


def print_commits(path: str, reference: str, result: dict[str, Any]) -> None:
    print(f"{path}: this checkout against {reference}, steps taken in turn")
    for name, row in result["times"].items():
        quartiles = f"({row['quartile_1_ms']} to {row['quartile_3_ms']})"
        print(f"  {name:10s} {row['median_ms']:9.1f} ms  {quartiles}")
    print("  " + "  ".join(f"{k} {v}" for k, v in result.items() if k != "times"))
