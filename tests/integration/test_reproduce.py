"""A whole study at toy size: two systems, two seeds, two steps each. It takes minutes, as every stage is a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SYSTEMS = ("standard_moe", "symbiotic")


def reproduce(out, *words):
    """In the folder that ``out`` is in: what the command writes is relative to the current folder."""
    command = [sys.executable, "-m", "symbiotic_titan.cli", "reproduce", *SYSTEMS, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = ("--seeds", "0", "1", "--steps", "2", "--out", out.name)
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, env=environment, cwd=out.parent
    )


@pytest.mark.slow
def test_a_study_of_two_systems_and_two_seeds_ends_with_its_page_and_is_not_run_twice(tmp_path):
    out = tmp_path / "study"
    done = reproduce(out)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].endswith("100%, 0 min left")
    reports = []
    for seed in (0, 1):
        for name in SYSTEMS:
            folder = out / f"seed-{seed}" / name
            scores = json.loads((folder / "scores.json").read_text())["scores"]
            assert {"answers/ocr", "heldout/text", "pictures/frechet"} <= set(scores)
            assert list(folder.glob("tb/**/events*"))
            assert [path.name for path in (folder / "checkpoint").glob("step-*")] == ["step-2"]
            report = json.loads((folder / "before.json").read_text())
            reports.append(report["columns"])
    same = [r["original"]["text"] == r["partitioned"]["text"] for r in reports]
    assert same == [True, False, True, False]  # one pool is the original, a split is not
    assert reports[0]["original"] != reports[2]["original"]  # seeds differ
    assert (out / "page/index.html").stat().st_size > 10_000
    again = reproduce(out)
    assert again.returncode == 0 and again.stderr == ""
    other = reproduce(out, "--scale", "2")
    assert other.returncode == 2 and "a study was begun there with scale = 1" in other.stderr
