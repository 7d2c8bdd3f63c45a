"""The trainer of a config as a bench drives it, step by step, on data and checks of its own and without what runs beside training."""

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

# Newest first. The package itself was the home of all of these until it got rooms.
HOMES = ("symbiotic_titan.training", "symbiotic_titan")
ONE_PROCESS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",  # the system chooses a free one
}


def part(module: str, name: str) -> Any:
    """``name`` of ``module``, wherever this layout of the package keeps it.

    Raises:
        ValueError: it has no such module.
    """
    for home in HOMES:
        if find_spec(home) and find_spec(f"{home}.{module}"):
            return getattr(import_module(f"{home}.{module}"), name)
    places = " or ".join(f"{home}.{module}" for home in HOMES)
    raise ValueError(f"this checkout has no {places}, so its trainer cannot be driven")


def register() -> None:
    """Make the model known to torchtitan; the environment becomes that of a single process unless torchrun set another."""
    for name, value in ONE_PROCESS.items():
        os.environ.setdefault(name, value)
    part("train_spec", "register")()


def load_config(config_file: str, folder: str, steps: int, overrides: list[str]) -> Any:
    """The checked config of a run of ``steps`` steps that writes nothing and does nothing but train: no checkpoints, logs, validation
    or sample grids.

    Raises:
        ValueError: a mistake in the config or in the ``overrides``.
    """
    config = import_module("symbiotic_titan.config.load").load_job_config(
        [
            *("--job.config_file", config_file, "--job.dump_folder", folder),
            *("--training.steps", str(steps), "--checkpoint.no_enable"),
            *("--metrics.no_enable_tensorboard", "--metrics.log_freq", "1000000"),
            *("--validation.no_enable", "--sampling.no_enable"),
            *overrides,
        ]
    )
    part("checks", "check_job")(config)
    return config


def make_trainer(config_file: str, folder: str, steps: int, overrides: list[str]) -> Any:
    """The trainer of ``load_config``; nothing has run yet."""
    config = load_config(config_file, folder, steps, overrides)
    return part("trainer", "SymbioticTrainer")(config)


def stepper(trainer: Any) -> Callable[[], None]:
    """One training step per call."""
    batches = trainer.batch_generator(trainer.dataloader)

    def step() -> None:
        trainer.step += 1
        trainer.train_step(batches)

    return step
