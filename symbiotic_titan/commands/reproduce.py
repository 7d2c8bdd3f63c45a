"""The paper's comparison from beginning to end, for several seeds: data, the pre-trained model, its splits, every system, and a page.

Examples: symbiotic reproduce                                            all systems, seeds 0 to 2
          symbiotic reproduce symbiotic standard_moe --seeds 0 1         two of them
          symbiotic reproduce symbiotic mot --steps 100 --out outputs/short
          symbiotic reproduce --page-only --out outputs/short            its page again, of what there is

For every seed the demo world is made, a model is pre-trained on text and on questions about images, its experts are profiled and
split, every system is checked and asked before its first step, trained on the same samples from the same start, and scored. The
systems are the configs of train_configs/study; those in its folder step_zero are measured before the first step only.

Started again with the same command it goes on where it was stopped. What the stages print is below OUT/seed-N/logs. The default
takes about two hours on 2 cores, where two single-thread processes run side by side.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from symbiotic_titan.config.files import check_output_folder, read_json, write_json
from symbiotic_titan.process import ROOT, DiskFull, check_checkout, exit_status
from symbiotic_titan.study.queue import Queue
from symbiotic_titan.study.record import recorded
from symbiotic_titan.study.runs import START, StudyRun, find_runs
from symbiotic_titan.study.stages import (
    FOLDER,
    Scale,
    all_stages,
    bytes_of,
    configs_hash,
    systems_of,
)

SETTINGS = "study"  # the kind of OUT/settings.json
# Student's t needs at least one degree of freedom.
FEWEST_SEEDS = 2


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises:
    ValueError: intervals need more, one is given twice, or one is negative.
    """
    repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if repeated:
        raise ValueError(f"--seeds: {repeated[0]} is given twice; every seed is another sample")
    if len(seeds) < FEWEST_SEEDS:
        raise ValueError(
            f"--seeds: intervals over seeds need at least {FEWEST_SEEDS}, got {len(seeds)}; give more"
        )
    if min(seeds) < 0:
        raise ValueError(f"--seeds: must not be negative, got {min(seeds)}")


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Pass if no study was begun in ``out``, or one with these settings.

    Raises:
        ValueError: it has other settings, or its file is damaged.
    """
    path = out / "settings.json"
    if not path.exists():
        return
    begun = read_json(path, SETTINGS, tuple(settings))
    for key, value in settings.items():
        if begun[key] == value:
            continue
        what = "with other configs in train_configs/study"
        if key != "configs":
            what = f"with {key} = {_words(begun[key])}, now it is {_words(value)}"
        raise ValueError(
            f"--out {out}: a study was begun there {what}; name another folder, or give the settings of {path}"
        )


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def check_disk(out: Path, num_seeds: int, systems: Sequence[StudyRun], at_once: int) -> None:
    """Pass if the disk has room for what is not there yet.

    Raises:
        DiskFull: it has not.
    """
    present = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    needed = max(0, bytes_of(num_seeds, systems, at_once) - present)
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DiskFull(
            f"--out {out}: the study needs about {needed / 1e6:.0f} MB more, its disk has {free / 1e6:.0f} MB; free some space, or "
            "name a folder on another disk"
        )


def cores() -> int:
    """That this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def environment(at_once: int) -> dict[str, str]:
    """Of every process: the cores divided among them. Threads that spin while they wait would take the cores of the others."""
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // at_once)), "OMP_WAIT_POLICY": "PASSIVE"}
    return {**threads, "PYTHONUNBUFFERED": "1"}


def write_page(out: Path) -> None:
    """The page of the study; what it needs, matplotlib among it, is loaded at the end only."""
    from symbiotic_titan.study.page import write_page

    print(write_page(out))


def check_page_only(options: argparse.Namespace) -> None:
    """Raises:
    ValueError: an option that a page has no use for.
    """
    unused = vars(build_parser().parse_args([])) | {"page_only": True, "out": options.out}
    given = [key.replace("_", "-") for key, value in vars(options).items() if value != unused[key]]
    if given:
        raise ValueError(
            f"--page-only: shows what is in --out and has no use for {', '.join(given)}; leave that out"
        )


def reproduce(options: argparse.Namespace) -> None:
    """Raises:
    ValueError: a user's mistake, before anything is built.
    RuntimeError: a stage failed.
    """
    if options.page_only:
        check_page_only(options)
        write_page(options.out)
        return
    systems = systems_of()
    del systems[START]
    chosen = find_runs(options.systems, systems, "system")
    check_seeds(options.seeds)
    names = [run.name for run in chosen]
    scale = Scale(options.steps, options.scale)
    settings = {
        "systems": names,
        "seeds": sorted(options.seeds),
        "steps": options.steps or 0,
        "scale": options.scale,
        "configs": configs_hash(),
    }
    check_output_folder(options.out, "--out")
    check_settings(options.out, settings)
    check_disk(options.out, len(options.seeds), chosen, options.at_once)
    write_json(options.out / "settings.json", SETTINGS, settings)
    stages = all_stages(options.out, sorted(options.seeds), names, scale)
    with recorded(options.out, options.at_once):
        Queue(stages, options.at_once, environment(options.at_once)).run()
    write_page(options.out)


def whole(text: str) -> int:
    """A number of things."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("systems", nargs="*", metavar="SYSTEM", help="names of configs; default: all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="at least 2; default: 0 1 2")
    add("--steps", type=whole, help="of each system; default: as its config says")
    add(
        "--scale",
        type=whole,
        default=1,
        metavar="S",
        help="for a GPU: S times the steps, the warm-up and the shield with them, and the rows of a step; S * S times the questions, "
        "which are then read as often; default 1",
    )
    add("--out", type=Path, default=Path("outputs/reproduce"), metavar="FOLDER")
    add("--page-only", action="store_true", help="run nothing: write OUT/page of what is there")
    add("--at-once", type=whole, default=cores(), help="processes at once; default: cores")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)

    def run() -> None:
        check_checkout(ROOT, str(FOLDER.relative_to(ROOT)))
        reproduce(options)

    return exit_status(
        run,
        (OSError, RuntimeError, ValueError),
        f"stopped; the same command goes on: symbiotic {' '.join(sys.argv[1:]) if arguments is None else 'reproduce'}",
    )
