#!/usr/bin/env python
"""Write the demo world: handwritten digits, painted scenes and English text, as shards that the main job reads.

Example:
    symbiotic make-demo-data --out demo_data
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from symbiotic_titan.demo.write import (
    SPLITS,
    WORLD_SIZES,
    write_world,
)
from symbiotic_titan.process import Counter, exit_status

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

    def run() -> None:
        _check_out(options.out, options.force)
        _write(options.out, options.seed, options.size)

    return exit_status(run)


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
    """Write beside ``out`` and move it there when complete, so that an interrupted run leaves no partial data there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        world = Path(scratch) / "world"
        world.mkdir()
        write_world(
            world, seed, WORLD_SIZES[size], Counter("samples", WORLD_SIZES[size].num_samples)
        )
        if out.exists():
            shutil.rmtree(out)
        world.rename(out)
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {num_bytes / 1e6:.1f} MB")
