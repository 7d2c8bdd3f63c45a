#!/usr/bin/env python
"""Write the demo world: handwritten digits, drawn scenes and English text, as shards that the main job reads.

Example:
    python tools/make_demo_data.py --out demo_data
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from symbiotic_titan.demo.write import (
    SPLITS,
    WORLD_SIZES,
    write_world,
)

WRITTEN = (*SPLITS, "manifest.json")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo_data"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes another world")
    parser.add_argument("--size", choices=sorted(WORLD_SIZES), default="full", help="how much")
    parser.add_argument(
        "--force", action="store_true", help="replace a demo world that is already there"
    )
    options = parser.parse_args(arguments)
    try:
        _check_out(options.out, options.force)
        _write(options.out, options.seed, options.size)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _check_out(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    present = sorted(p.name for p in out.iterdir()) if out.exists() else []
    if present and not force:
        raise ValueError(f"--out {out}: exists and is not empty; pass --force to replace it")
    foreign = [name for name in present if name not in WRITTEN]
    if foreign:
        raise ValueError(
            f"--out {out}: holds {foreign[0]!r}, which is no part of a demo world; "
            "name another folder"
        )


def _write(out: Path, seed: int, size: str) -> None:
    """Write beside ``out`` and move it there when complete, so that an interrupted run leaves nothing half done."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        world = Path(scratch) / "world"
        world.mkdir()
        write_world(world, seed, WORLD_SIZES[size], _progress(WORLD_SIZES[size].num_samples))
        if out.exists():
            shutil.rmtree(out)
        world.rename(out)
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {num_bytes / 1e6:.1f} MB")


def _progress(total: int) -> Callable[[int], None]:
    """A counter on standard error, silent where no one watches."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if sys.stderr.isatty():
            end = "\n" if done >= total else ""
            print(f"\r{done}/{total} samples", end=end, file=sys.stderr, flush=True)

    return advance
