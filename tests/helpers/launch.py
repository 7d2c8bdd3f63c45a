"""Run the trainer as a user would, in processes of its own, and read back what it logged."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
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


def command_of(world_size: int, arguments: list[str]) -> list[str]:
    if world_size == 1:
        return [sys.executable, "-m", "symbiotic_titan.train", *arguments]
    return [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world_size}",
        "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "-m", "symbiotic_titan.train", *arguments,
    ]  # fmt: skip


def environment(world_size: int) -> dict[str, str]:
    extra = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    if world_size == 1:
        extra |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        extra |= {"MASTER_PORT": str(free_port())}
    return os.environ | extra


def arguments_of(folder: Path, demo: Path, overrides: dict[str, object]) -> list[str]:
    """Arguments of a run of debug.toml that reads ``demo`` and dumps into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (ROOT / "train_configs" / "debug.toml").read_text()
    config = folder / "job.toml"
    config.write_text(text.replace("demo_data/", f"{demo}/"))
    settings = {"job.dump_folder": folder, "metrics.log_freq": 1, "checkpoint.interval": 1000}
    settings["lr_scheduler.warmup_steps"] = 5
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
    done = subprocess.run(
        command_of(world_size, arguments_of(folder, demo, settings)),
        cwd=ROOT,
        env=environment(world_size),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Run(done.returncode, done.stdout + done.stderr, folder)


def wait_for(words: str, path: Path, seconds: int = 120) -> None:
    for _ in range(10 * seconds):
        if words in path.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(path.read_text()[-3000:])


def stop_one_of_two(folder: Path, arguments: list[str]) -> tuple[list[int], list[str]]:
    """(exit statuses, texts) of two ranks, the second of which gets a SIGTERM a second after training began."""
    port = str(free_port())
    logs = [folder / f"{rank}.log" for rank in range(2)]
    ranks = []
    for rank, path in enumerate(logs):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with open(path, "w") as log:
            ranks.append(
                subprocess.Popen(
                    command_of(1, arguments),
                    cwd=ROOT,
                    env=environment(1) | place,
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        wait_for("Training starts at step 1", logs[1])
        time.sleep(1)
        ranks[1].send_signal(signal.SIGTERM)
        statuses = [process.wait(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return statuses, [path.read_text() for path in logs]
