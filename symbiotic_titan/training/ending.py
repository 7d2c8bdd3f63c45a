"""What a run says when it ends: where its checkpoint, its logs and its samples are, and which commands go on from there."""

import os
import shlex
import sys
from pathlib import Path

from symbiotic_titan.config.data import used_sources
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.data.latents import generates


def program(name: str) -> str:
    """How to call a program of this Python's environment from the current directory: by its path, or else by its name."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        return name
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def closing_lines(config: JobConfig, step: int) -> list[str]:
    """About a run that ended after ``step``, and has closed its files."""
    folder = Path(config.job.dump_folder)
    checkpoint = folder / config.checkpoint.folder / f"step-{step}"
    is_saved = config.checkpoint.enable and checkpoint.is_dir()
    lines = [f"checkpoint: {checkpoint}" if is_saved else f"checkpoint: none of step {step}"]
    if config.metrics.enable_tensorboard:
        logs = folder / config.metrics.save_tb_folder
        lines.append(f"TensorBoard: {program('tensorboard')} --logdir {shlex.quote(str(logs))}")
        if config.sampling.enable:
            lines.append("samples: in TensorBoard, under Images, sampling/pictures")
    if step < config.training.steps:
        start = "the same command goes on from there" if is_saved else "the same command starts it"
        return [*lines, f"stopped at step {step} of {config.training.steps}; {start}"]
    lines.append(f"finished: all {step} steps are done")
    if is_saved:
        lines += [f"next: {command}" for command in next_commands(config)]
    return lines


def next_commands(config: JobConfig) -> list[str]:
    """One that generates with the model of a finished run, and one that scores it."""
    folder, symbiotic = config.job.dump_folder, program("symbiotic")
    run, out = shlex.quote(folder), shlex.quote(os.path.join(folder, "generated"))
    sources = used_sources(config.data.sources, config.data.stages)
    kind, prompt = "text", "How many circles are there?"
    if generates(sources):
        kind, prompt = "image", "a red circle"
    # The demo world has a suite of its own; which one suits other data, its user knows.
    is_demo = any("demo_data" in Path(source.path).parts for source in sources)
    score = f"--suite {'demo_world' if is_demo else 'NAME'}"
    hint = "" if is_demo else "  (evaluate --suites lists the names)"
    return [
        f'{symbiotic} generate {kind} --run {run} --prompt "{prompt}" --out {out}',
        f"{symbiotic} evaluate {run} {score}{hint}",
    ]
