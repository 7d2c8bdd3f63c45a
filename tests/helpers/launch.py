"""Run the trainer as a user would, in processes of their own, and read back what it logged."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.forked import ROOT, Ranks

NUM_STEPS = 20  # length of the runs that are compared


@dataclass(frozen=True)
class Run:
    """What a finished run left behind: exit status, console text, and its dump folder."""

    status: int
    text: str
    folder: Path

    def scalars(self, tag: str) -> dict[int, float]:
        """Step -> value of one TensorBoard scalar; of several event files the later wins."""
        return read_scalars(self.folder, tag)


def read_scalars(folder: Path, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values: dict[int, float] = {}
    files = sorted((folder / "tb").glob("*/events*"), key=lambda path: path.stat().st_mtime)
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        if tag in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars(tag)}
    return values


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environments(world_size: int, path: str = "") -> list[dict[str, str]]:
    """What torchrun would tell each rank. ``path`` is searched for modules, too."""
    extra = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "MASTER_ADDR": "127.0.0.1"}
    extra |= {
        "PYTHONPATH": f"{ROOT}:{path}" if path else str(ROOT),
        "MASTER_PORT": str(free_port()),
    }
    extra |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    ranks = map(str, range(world_size))
    return [os.environ | extra | {"RANK": rank, "LOCAL_RANK": rank} for rank in ranks]


def start_ranks(
    folder: Path, arguments: list[str], *, world_size: int = 1, path: str = ""
) -> Ranks:
    """The trainer, started; it prints into files of ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    return Ranks(arguments, environments(world_size, path), folder)


def train(
    folder: Path, arguments: list[str], *, world_size: int = 1, path: str = "", timeout: int = 300
) -> Run:
    """Train to the end with these arguments. The status is that of the first rank that failed, if one did."""
    ranks = start_ranks(folder, arguments, world_size=world_size, path=path)
    statuses = ranks.wait(timeout)
    return Run(next(filter(None, statuses), 0), "".join(ranks.texts()), folder)


def arguments_of(folder: Path, demo: Path, overrides: dict[str, object]) -> list[str]:
    """Arguments of a run of debug.toml that reads ``demo`` and dumps into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (ROOT / "train_configs" / "debug.toml").read_text()
    config = folder / "job.toml"
    config.write_text(text.replace("demo_data/", f"{demo}/"))
    settings = {"job.dump_folder": folder, "metrics.log_freq": 1, "checkpoint.interval": 1000}
    # Full routing reports draw a heat map for each modality, which takes longer than a step; the reference run has them.
    settings |= {"lr_scheduler.warmup_steps": 5, "metrics.routing_freq": 0}
    arguments = ["--job.config_file", str(config)]
    for key, value in (settings | overrides).items():
        if isinstance(value, bool):
            section, _, name = key.rpartition(".")
            arguments.append(f"--{section}.{name}" if value else f"--{section}.no_{name}")
        else:
            arguments += [f"--{key}", str(value)]
    return arguments


def launch(
    folder: Path, demo: Path, *, world_size: int = 1, timeout: int = 300, **overrides: object
) -> Run:
    """Train to the end. Keys of ``overrides`` have ``__`` where the command line has a dot."""
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    arguments = arguments_of(folder, demo, settings)
    return train(folder, arguments, world_size=world_size, timeout=timeout)


def run_in_turn(
    folder: Path, runs: list[list[str]], *, world_size: int = 1, timeout: int = 240
) -> list[list[Run]]:
    """Runs with these arguments, one after another: for each what it left behind on each rank; ``Run.folder`` is ``folder``. Fails
    where a run hangs."""
    found = []
    for arguments in runs:
        ranks = start_ranks(folder, arguments, world_size=world_size)
        statuses = ranks.wait(timeout)
        found.append([Run(*left, folder) for left in zip(statuses, ranks.texts(), strict=True)])
    return found


def launch_program(folder: Path, demo: Path, **overrides: object) -> Run:
    """As ``launch``, by the interpreter's command line."""
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    command = [sys.executable, "-m", "symbiotic_titan.train", *arguments_of(folder, demo, settings)]
    [environment] = environments(1)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return Run(done.returncode, done.stdout + done.stderr, folder)


def stop_one_of_two(folder: Path, arguments: list[str]) -> tuple[list[int], list[str]]:
    """(exit statuses, texts) of two ranks, the second of which gets a SIGTERM a second after training began."""
    ranks = start_ranks(folder, arguments, world_size=2)
    ranks.wait_for("Training starts at step 1", rank=1)
    time.sleep(1)
    ranks.send(signal.SIGTERM, rank=1)
    return ranks.wait(120), ranks.texts()
