#!/usr/bin/env python
"""Write the demo world: handwritten digits, painted scenes, words and numbers, and English text, as shards that the main job reads.

Examples:
    symbiotic make-demo-data --out demo_data
    symbiotic make-demo-data --out study_data --size study --seed 1 --questions 150
"""

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from symbiotic_titan.demo.vocabulary import VOCABULARY
from symbiotic_titan.demo.write import (
    PRETRAIN,
    SPLITS,
    WORLD_SIZES,
    WorldSize,
    write_world,
)
from symbiotic_titan.process import Counter, exit_status

WRITTEN = (*SPLITS, PRETRAIN, "manifest.json", VOCABULARY)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo_data"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes another world")
    parser.add_argument(
        "--size",
        choices=sorted(WORLD_SIZES),
        default="full",
        help="how much; study has few training questions, and pre-training data of its own",
    )
    parser.add_argument(
        "--questions",
        type=int,
        metavar="N",
        help="training questions about images; by default 300 in size study, as many as images in the others",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a demo world that is already there"
    )
    options = parser.parse_args(arguments)

    def run() -> None:
        _check_out(options.out, options.force)
        _write(options.out, options.seed, _size(options.size, options.questions))

    return exit_status(run)


def _size(name: str, questions: int | None) -> WorldSize:
    size = WORLD_SIZES[name]
    if questions is None:
        return size
    if questions < size.train_shards:
        raise ValueError(
            f"--questions {questions}: must be at least {size.train_shards}, one for each file of --size {name}"
        )
    return replace(size, questions=questions)


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


def _write(out: Path, seed: int, size: WorldSize) -> None:
    """Write beside ``out`` and move it there when complete, so that an interrupted run leaves no partial data there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        world = Path(scratch) / "world"
        world.mkdir()
        write_world(world, seed, size, Counter("samples", size.num_samples))
        if out.exists():
            shutil.rmtree(out)
        world.rename(out)
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {num_bytes / 1e6:.1f} MB")
