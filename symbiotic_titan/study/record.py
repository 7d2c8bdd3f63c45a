"""On what and for how long a study was run: OUT/record.json, to which every start of it adds.

with recorded(out, at_once=2):
    ...
"""

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from symbiotic_titan.config.files import read_json, write_json
from symbiotic_titan.process import ROOT

FILE, KIND = "record.json", "study record"


def read_record(out: Path) -> dict[str, Any]:
    """``commits``, ``machines``, ``at_once`` (processes), ``starts`` and ``seconds`` of all of them; empty where nothing was recorded.

    Raises:
        ValueError: a damaged file.
    """
    path = out / FILE
    return read_json(path, KIND, ("commits", "machines", "seconds")) if path.is_file() else {}


@contextmanager
def recorded(out: Path, at_once: int) -> Iterator[None]:
    """Add the seconds of the block to the record, also where it ends by an error or by Ctrl-C."""
    before = read_record(out)
    start = time.monotonic()
    try:
        yield
    finally:
        known = {"commits": commit(), "machines": machine(), "at_once": at_once}
        values: dict[str, Any] = {
            key: list(dict.fromkeys([*before.get(key, []), value])) for key, value in known.items()
        }
        values["starts"] = before.get("starts", 0) + 1
        values["seconds"] = round(before.get("seconds", 0) + time.monotonic() - start)
        write_json(out / FILE, KIND, values)


def commit() -> str:
    """Of the checkout that this package is in, with ``-dirty`` where a tracked file was changed; ``unknown`` without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> str:
    """Processor, cores, Python and torch; no name of the machine."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    processor = found[1] if found else platform.machine()
    versions = f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}"
    return f"{processor}, {os.cpu_count()} cores, {versions}"
