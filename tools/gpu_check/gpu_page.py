"""The page of a GPU check: tables from its JSON lines."""

import json
import re
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "" if value is None else str(value).replace("|", "/")


def flat(values: Line, prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def table(rows: dict[str, Line]) -> str:
    """One row for each part; columns are the values that any of them has."""
    flats = {name: flat(row) for name, row in rows.items()}
    columns = list(dict.fromkeys(key for row in flats.values() for key in row))
    head = f"| | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}"
    lines = [
        f"| {name} | {' | '.join(cell(row.get(c)) for c in columns)} |"
        for name, row in flats.items()
    ]
    return "\n".join([head, *lines])


def lists(rows: dict[str, Line]) -> str:
    """A table of two columns for each part: where parts have many values."""
    texts = []
    for name, row in rows.items():
        lines = [f"| {key} | {cell(value)} |" for key, value in flat(row).items()]
        texts.append("\n".join([f"**{name}**\n", "| | |", "|---|---|", *lines]))
    return "\n\n".join(texts)


TITLES = {
    "install": ("Machine", lists),
    "ceilings": ("Ceilings: a copy within the memory, and square matmuls", table),
    "correctness": (
        "What must be equal: relative L2 distances to a plain reference, and their bound",
        lists,
    ),
    "debug_gpu": ("Whole runs of debug_gpu.toml, compared step by step", table),
    "moe": ("The MoE layer, forward and backward, and its phases", lists),
    "1b": ("Training steps of 1b_a0.3b.toml", lists),
}


def page(lines: list[Line]) -> str:
    device = device_of(lines)
    texts = [
        f"# The GPU check on {device}",
        "Made by `tools/gpu_check.sh` on a machine with one device. On one device communication (NCCL), expert parallelism and the overlap "
        "of both with computation stay unverified. A time is the median over rounds in which contenders take turns, by the device's own "
        "events, after a warm-up and with the L2 cache emptied before each call.",
    ]
    statuses = {line["stage"]: line for line in lines if "status" in line}
    texts.append(
        table(
            {
                stage: {
                    key: line.get(key) for key in ("status", "seconds", "cpu_seconds", "failed")
                }
                for stage, line in statuses.items()
            }
        )
    )
    for stage, (title, layout) in TITLES.items():
        parts = {
            line["part"]: {k: v for k, v in line.items() if k not in ("stage", "part")}
            for line in lines
            if line["stage"] == stage and "part" in line
        }
        if parts:
            texts += [f"## {title}", layout(parts)]
    return "\n\n".join(texts) + "\n"


def device_of(lines: list[Line]) -> str:
    found = [line["device"] for line in lines if line.get("part") == "machine" and "device" in line]
    return str(found[0]) if found else "an unknown device"


def write_page(file: Path, folder: Path) -> Path:
    """``folder``/gpu_DEVICE_YYYYMM.md, dated by the file."""
    from datetime import datetime

    lines = [json.loads(text) for text in file.read_text().splitlines()]
    name = re.sub(r"[^a-z0-9]+", "-", device_of(lines).lower().removeprefix("nvidia ")).strip("-")
    date = datetime.fromtimestamp(file.stat().st_mtime)
    path = folder / f"gpu_{name}_{date:%Y%m}.md"
    path.write_text(page(lines))
    return path
