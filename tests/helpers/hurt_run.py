"""Stands in for a training run: takes steps, saves, and goes on from its newest intact checkpoint; or does one thing wrong.

``hurt_run.py PROTOTYPE FLAW --job.dump_folder FOLDER --training.steps N ...``: every checkpoint is a copy of the folder PROTOTYPE. FLAW:

none        does everything right
deaf        takes no notice of signals and of the end of its work
forgetful   ends at a signal without saving
trusting    loads its newest checkpoint without looking at it
helpless    fails where a checkpoint is damaged
noisy       saves and ends at a signal, with a traceback
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

INTERVAL = 3
STEP_SECONDS = 0.03


def is_intact(folder: Path, prototype: Path) -> bool:
    files = [path.name for path in prototype.iterdir()]
    return all(
        (folder / name).is_file()
        and (folder / name).read_bytes() == (prototype / name).read_bytes()
        for name in files
    )


def save(folder: Path, step: int, prototype: Path) -> None:
    shutil.rmtree(folder / "unfinished", ignore_errors=True)
    shutil.copytree(prototype, folder / "unfinished")
    (folder / "unfinished").rename(folder / f"step-{step}")


def newest(folder: Path, prototype: Path, flaw: str) -> int:
    found = sorted((int(path.name[5:]) for path in folder.glob("step-*")), reverse=True)
    for step in found:
        path = folder / f"step-{step}"
        if flaw == "trusting" or is_intact(path, prototype):
            return step
        if flaw == "helpless":
            sys.exit(1)
        shutil.rmtree(path)
    return 0


def main() -> None:
    prototype, flaw, options = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    folder = Path(options[options.index("--job.dump_folder") + 1]) / "checkpoint"
    steps = int(options[options.index("--training.steps") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, lambda number, frame: told.append(number))
    step = newest(folder, prototype, flaw)
    print(f"Training starts at step {step + 1}", flush=True)
    while step < steps or flaw == "deaf":
        if told and flaw != "deaf":
            break
        step += 1
        print(f"step: {step} ", flush=True)
        time.sleep(STEP_SECONDS)
        if step % INTERVAL == 0:
            save(folder, step, prototype)
    if flaw == "forgetful" and told:
        os._exit(0)
    if step and not (folder / f"step-{step}").exists():
        save(folder, step, prototype)
    if flaw == "noisy" and told:
        print("Traceback (most recent call last):", flush=True)


if __name__ == "__main__":
    main()
