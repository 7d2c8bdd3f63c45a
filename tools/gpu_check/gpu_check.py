"""Runs the stages of ``tools/gpu_check.sh``, which starts it, one process after the other, and writes the page of their results."""

import argparse
import contextlib
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from gpu_notes import Notes, Settings, append

ROOT = Path(__file__).resolve().parents[2]
TOTAL_SECONDS = 535  # of the 9 minutes, the rest is for starting and for the page
PATIENCE = 4  # at toy size, times these limits: a CPU may be shared with other work
# Stage -> (its function, seconds that it may take, its imports included).
STAGES = {
    "install": ("gpu_measures:install", 30),
    "ceilings": ("gpu_measures:ceilings", 20),
    "correctness": ("gpu_measures:correctness", 90),
    "debug_gpu": ("gpu_training:debug_gpu", 120),
    "moe": ("gpu_measures:moe_layers", 60),
    "1b": ("gpu_training:one_b", 200),
}
# What the stages import, before they are forked at toy size: that takes longer than the stages themselves.
SHARED = ("symbiotic_titan.training.trainer", "symbiotic_titan.training.checks", "gpu_equalities")


_FORK, _SPAWN = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")


def run_stage(name: str, settings: Settings) -> None:
    """The whole of a stage's process."""
    os.setsid()  # so that it can be ended with all that it started
    log = os.open(settings.out / "gpu_check.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    print(f"==== {name}")
    os.chdir(settings.work)
    began, spent, notes = time.monotonic(), time.process_time(), Notes(settings, name)
    module, function = STAGES[name][0].split(":")
    try:
        getattr(import_module(module), function)(notes)
    except Exception as error:  # noqa: BLE001 - also where nothing can be imported
        traceback.print_exc()
        notes.failed.append(f"{type(error).__name__}: {error}")
    status = "failed" if notes.failed else "passed"
    seconds = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - spent}
    append(settings.lines, {"stage": name, "status": status, **seconds, "failed": notes.failed})
    sys.stdout.flush()
    os._exit(1 if notes.failed else 0)  # loader workers and threads of libraries are not waited for


def supervise(name: str, settings: Settings, limit: float) -> str:
    """Run a stage for at most ``limit`` seconds: ``passed``, ``failed`` or ``timed out``."""
    # A forked process cannot use a GPU that its parent has touched, and imports touch it.
    start = partial(_FORK.Process if settings.is_toy else _SPAWN.Process, target=run_stage)
    process = start(args=(name, settings))
    began = time.monotonic()
    process.start()
    process.join(limit)
    timed_out = process.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)  # what it left running as well
    process.join()
    if timed_out or process.exitcode not in (0, 1):
        status = "timed out" if timed_out else f"ended with status {process.exitcode}"
        seconds = time.monotonic() - began
        append(settings.lines, {"stage": name, "status": status, "seconds": seconds, "failed": []})
        return status
    return "failed" if process.exitcode else "passed"


def run(stages: Sequence[str], settings: Settings, spent: float) -> dict[str, str]:
    """Stage -> its status; printed as it comes. ``spent``: seconds that have gone by already, those of the first stage."""
    began, patience = time.monotonic() - spent, PATIENCE if settings.is_toy else 1
    if settings.is_toy:
        with contextlib.suppress(ImportError):  # the stages say what is missing
            for module in SHARED:
                import_module(module)
    found = {}
    for name in stages:
        left = patience * TOTAL_SECONDS - (time.monotonic() - began)
        limit = patience * STAGES[name][1] - (spent if name == "install" else 0)
        start = time.monotonic()
        found[name] = (
            supervise(name, settings, max(min(limit, left), 1)) if left > 1 else "no time left"
        )
        print(f"{name:12s} {found[name]}, {time.monotonic() - start:.0f} s", flush=True)
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", usage="see the top of tools/gpu_check.sh")
    out = os.environ.get("OUT") or str(ROOT / "outputs" / "gpu_check")
    parser.add_argument("--cpu", action="store_true", help="toy size, without a GPU")
    parser.add_argument("--out", type=Path, default=Path(out), help="where results go")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of this file")
    parser.add_argument("--spent", type=float, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.stages = [name for name in STAGES if name in args.stages]
    if args.page is not None and not args.page.is_file():
        parser.error(f"--page: there is no file {args.page}; name the gpu_check.jsonl of a check")
    if args.page is None and (args.out / "gpu_check.jsonl").exists():
        parser.error(
            f"--out {args.out}: holds the results of an earlier check; name another folder or remove it"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from gpu_page import write_page  # of the standard library alone

    if args.page is not None:
        print(write_page(args.page, ROOT / "benchmarks"))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        device = "cpu" if args.cpu else "cuda"
        if args.cpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        settings = Settings(device, args.out.resolve(), Path(work))
        found = run(args.stages, settings, args.spent)
    page = write_page(settings.lines, settings.out)
    passed = [name for name, status in found.items() if status == "passed"]
    others = [f"{name} ({status})" for name, status in found.items() if status != "passed"]
    where = re.sub(rf"^{re.escape(str(Path.cwd()))}/", "", str(page))
    print(f"passed: {', '.join(passed) or 'none'}; not passed: {', '.join(others) or 'none'}; {where}")  # fmt: skip
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
