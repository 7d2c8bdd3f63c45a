"""The trainer of a config as a bench drives it; and a program that takes a training step for every line it reads.

``step.py --against GITREF`` starts this program once for each checkout, with that checkout on PYTHONPATH. It names only those modules
of the package that every layout since commit d603279 has; some have moved from the package itself into the room ``training``.

Its argument is JSON: ``root``, the checkout; ``configs``, in order of preference: the first that this checkout accepts is trained;
``folder``, ``steps`` and ``overrides`` as in ``make_trainer``; ``threads``, those of torch, or null; ``dense``, whether it will be asked
for the dense limit.

Its answers are JSON too, one line each. First ``config``, the one it trains, or ``refused``, the reason. Then to ``step``: ``seconds``,
``cpu_seconds`` over all threads, and the step's ``loss``; to ``dense``: ``step_dense.DenseLimit.measure`` of the last step.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from bench_timing import Clock, default_device

HOMES = ("symbiotic_titan.training", "symbiotic_titan")  # newest first
ONE_PROCESS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",  # the system chooses a free one
}


def checkout() -> Path:
    """The checkout that the package is imported from."""
    return Path(str(import_module("symbiotic_titan").__file__)).parents[1]


def part(module: str, name: str) -> Any:
    """``name`` of ``module``, wherever this checkout keeps it.

    Raises:
        ValueError: it has no such module.
    """
    # Looked for as files: where another checkout is installed as editable, its import hook offers what this one lacks.
    places = [f"{home}.{module}" for home in HOMES]
    for place in places:
        if (checkout() / f"{place.replace('.', '/')}.py").is_file():
            return getattr(import_module(place), name)
    raise ValueError(
        f"it has no {' or '.join(places)}; commits before d603279 cannot be compared with"
    )


def register() -> None:
    """Make the model known to torchtitan. The process is the only one unless torchrun says otherwise."""
    for name, value in ONE_PROCESS.items():
        os.environ.setdefault(name, value)
    import_module(
        "symbiotic_titan.device"
    ).prepare()  # before torchtitan; not every layout does it by itself
    part("train_spec", "register")()


def load_config(config_file: str, folder: str, steps: int, overrides: list[str]) -> Any:
    """The checked config of a run of ``steps`` steps that only trains: without checkpoints, logs, validation and sample grids.

    Raises:
        ValueError: a mistake in the config or in the ``overrides``.
    """
    config = part("config.load", "load_job_config")(
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


def note_steps(trainer: Any, note: Callable[[dict[str, float], float], object]) -> None:
    """Call ``note`` with the losses and the gradient norm of every step, before the weights change."""
    if hasattr(trainer, "check_finite"):  # older checkouts
        owner, name = trainer, "check_finite"
    else:
        owner, name = trainer.loss_fn, "not_finite"
    check = getattr(owner, name)

    def checked(losses: dict[str, float], grad_norm: float, *args: Any) -> Any:
        note(losses, grad_norm)
        return check(losses, grad_norm, *args)

    setattr(owner, name, checked)


def timed_stepper(trainer: Any) -> Callable[[], dict[str, float]]:
    """Takes a step and returns its ``seconds``, ``cpu_seconds`` and ``loss``."""
    step, clock = stepper(trainer), Clock(default_device())
    losses: list[float] = []
    note_steps(trainer, lambda values, grad_norm: losses.append(values["total"]))

    def timed() -> dict[str, float]:
        cpu, begin = time.process_time(), clock.now()
        step()
        seconds = clock.seconds(begin, clock.now())
        cpu_seconds = time.process_time() - cpu
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": losses[-1]}

    return timed


def accepted(configs: list[str], folder: str, steps: int, overrides: list[str]) -> str:
    """The first of the ``configs`` that this checkout accepts.

    Raises:
        ValueError: it accepts none; the message is that for the first.
    """
    reasons = []
    for config in configs:
        try:
            load_config(config, folder, steps, overrides)
        except (ValueError, SystemExit) as error:
            reasons.append(str(error))
        else:
            return config
    raise ValueError(reasons[0])


def serve(request: dict[str, Any]) -> None:
    """Answer the lines of standard input, as the head of this file says."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print is no answer

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")

    run = request["folder"], request["steps"], request["overrides"]
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    try:
        if str(checkout()) != request["root"]:
            raise ValueError("it has no package symbiotic_titan")
        register()
        config = accepted(request["configs"], *run)
        trainer = make_trainer(config, *run)
    except ValueError as error:
        answer({"refused": str(error)})
        return
    answers_to = {"step": timed_stepper(trainer)}
    if request["dense"]:
        from step_dense import DenseLimit

        answers_to["dense"] = DenseLimit(trainer).measure
    answer({"config": config})
    for line in sys.stdin:
        answer(answers_to[line.strip()]())


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
