"""Stages of the GPU check that train: whole runs of ``debug_gpu.toml`` compared bit by bit, and the speed of ``1b_a0.3b.toml``."""

import gc
import hashlib
import os
import signal
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_timing import Clock
from gpu_measures import demo_data
from gpu_notes import Notes, Settings
from step_child import make_trainer, note_steps, register, stepper

from symbiotic_titan.checkpoint.start import find_start
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.training.checks import check_job
from symbiotic_titan.training.trainer import SymbioticTrainer

CONFIGS = Path(__file__).resolve().parents[2] / "train_configs"
# What a run at toy size without a GPU changes of the shipped configs: sizes, and what only a GPU has.
TOY = [
    *("--model.attention_backend", "sdpa", "--compile.backend", "eager"),
    *("--training.seq_len", "160", "--training.local_batch_size", "1"),
    *("--training.global_batch_size", "2", "--training.mixed_precision_param", "float32"),
    *("--data.max_vit_tokens", "64", "--data.max_vae_tokens", "64", "--data.too_long", "skip"),
    *("--data.vit_pixels", "1024", "--data.vae_pixels", "1024", "--latents.patch", "4"),
    *("--training.dataloader.num_workers", "0", "--training.dataloader.no_pin_memory"),
    *("--checkpoint.async_mode", "disabled"),
]
Step = tuple[float, float]  # (loss, gradient norm)


def digest(model: torch.nn.Module) -> str:
    """Of all weights' bits."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:16]


@contextmanager
def forgotten() -> Iterator[None]:
    """Afterwards graphs and memory of the run are gone."""
    try:
        yield
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def train(
    settings: Settings, folder: str, steps: int, options: list[str], stop_after: int | None = None
) -> tuple[list[Step], str]:
    """(loss and gradient norm of each step, digest of the weights at the end) of a run of ``debug_gpu.toml``; it begins where ``folder``
    has a checkpoint. ``stop_after``: a stop signal comes after this step."""
    register()
    toy = TOY if settings.is_toy else []
    run = ["--job.dump_folder", str(settings.work / folder), "--training.steps", str(steps)]
    quiet = ["--metrics.no_enable_tensorboard", "--checkpoint.interval", "1000000"]
    config = load_job_config(
        ["--job.config_file", str(CONFIGS / "debug_gpu.toml"), *toy, *run, *quiet, *options]
    )
    check_job(config)
    found: list[Step] = []
    with forgotten():
        trainer = SymbioticTrainer(config, find_start(config))
        note_steps(trainer, lambda losses, norm: found.append((losses["total"], norm)))

        def stop(step: int) -> None:
            if step == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

        trainer.step_hooks.append(stop)
        try:
            trainer.train()
            weights = digest(trainer.model_parts[0])
        finally:
            trainer.close()
        del trainer
    return found, weights


def first_difference(a: list[Step], b: list[Step]) -> int | None:
    """The first step that is not equal in every bit, from 1."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True), 1) if x != y), None)


def largest_change(a: list[Step], b: list[Step]) -> float:
    """Of the losses, relative."""
    return max(abs(x[0] - y[0]) / abs(y[0]) for x, y in zip(a, b, strict=True))


def deterministic_step(settings: Settings) -> dict[str, Any]:
    """One step, twice, where torch refuses every operator that is not deterministic."""
    demo_data(settings)
    options = ["--debug.deterministic", "--checkpoint.no_enable", "--compile.no_enable"]
    try:
        runs = [train(settings, f"deterministic_{i}", 1, options) for i in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    return {"loss": runs[0][0][0][0], "passed": runs[0] == runs[1]}


def debug_gpu(notes: Notes) -> None:
    """60 compiled steps, once more, stopped and resumed, and eager."""
    settings = notes.settings
    demo_data(settings)
    steps = 4 if settings.is_toy else 60
    # Tracing takes most of a toy run, so there only the last run is compiled; on a GPU only the last is not.
    usual, other = ["--compile.enable"], ["--compile.no_enable"]
    if settings.is_toy:
        usual, other = other, usual
    half, plain = steps // 2, [*usual, "--checkpoint.no_enable"]
    runs: dict[str, tuple[list[Step], str]] = {}

    def straight() -> dict[str, Any]:
        runs["straight"] = train(settings, "straight", steps, plain)
        losses = [loss for loss, _ in runs["straight"][0]]
        return {"steps": steps, "first_loss": losses[0], "last_loss": losses[-1]}

    def against(name: str) -> dict[str, Any]:
        (found, weights), (expected, others) = runs[name], runs["straight"]
        differs = first_difference(found, expected[-len(found) :])
        return {
            "first_step_that_differs": differs,
            "largest_change_of_a_loss": largest_change(found, expected[-len(found) :]),
            "passed": differs is None and weights == others,
        }

    def again() -> dict[str, Any]:
        runs["again"] = train(settings, "again", steps, plain)
        return against("again")

    def resumed() -> dict[str, Any]:
        stopped = train(settings, "stopped", steps, usual, stop_after=half)
        runs["resumed"] = train(settings, "stopped", steps, usual)
        found = against("resumed")
        counts = {"steps_before": len(stopped[0]), "steps_after": len(runs["resumed"][0])}
        # The run stops after the step that has begun when the signal is read.
        stopped_early = half <= len(stopped[0]) < steps and sum(counts.values()) == steps
        return {**found, **counts, "passed": found["passed"] and stopped_early}

    def eager_and_compiled() -> dict[str, Any]:
        found, _ = train(settings, "other", steps, [*other, "--checkpoint.no_enable"])
        expected = runs["straight"][0]
        change, bound = largest_change(found, expected), 1e-4 if settings.is_toy else 5e-2
        first = abs(found[0][0] - expected[0][0]) / abs(expected[0][0])
        return {
            "largest_change_of_a_loss": change,
            "change_in_the_first_step": first,
            "bound": bound,
            "passed": change <= bound,
        }

    notes.part("straight", straight)
    for name, part in (("again", again), ("stop_and_resume", resumed)):
        notes.part(name, part)
    notes.part("eager_and_compiled", eager_and_compiled)


# ---- speed ------------------------------------------------------------------------------------------------------------

AC = {
    "none": ["--activation_checkpoint.mode", "none"],
    "op": [
        *("--activation_checkpoint.mode", "selective"),
        *("--activation_checkpoint.selective_ac_option", "op"),
    ],
    "full": ["--activation_checkpoint.mode", "full"],
}
FLOAT8 = ["--model.converters", "float8"]
# Names of kernels, in lower case -> class; the first that fits counts.
CLASSES = {
    "nccl": "communication",
    "flex_attention": "attention",
    "fmha": "attention",
    "grouped": "grouped matmul",
    "group_gemm": "grouped matmul",
    "gemm": "matmul",
    "cutlass": "matmul",
    "nvjet": "matmul",
    "triton": "fused by the compiler or written in Triton",
    "memcpy": "copy",
    "memset": "copy",
    "multi_tensor": "optimizer",
    "adam": "optimizer",
    "index": "gather and scatter",
    "scatter": "gather and scatter",
    "gather": "gather and scatter",
    "sort": "gather and scatter",
    "reduce": "reduction",
    "softmax": "reduction",
    "elementwise": "elementwise",
}
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
TRACE_BYTES = 16 * 10**6


def kernel_class(name: str) -> str:
    lower = name.lower()
    return next((kind for word, kind in CLASSES.items() if word in lower), "other")


def toy_flavor(settings: Settings) -> list[str]:
    """The shape of the 1b model with small widths, as a file."""
    from symbiotic_titan.model.flavors import FLAVORS
    from symbiotic_titan.model.model_config import write_model_config

    debug, file = FLAVORS["debug"], settings.work / "toy.json"
    small = {"vocab_size": 320, "dim": 64, "num_layers": 2, "dense_hidden_dim": 64, "num_heads": 4}
    small |= {"num_kv_heads": 2, "expert_hidden_dim": 32, "shared_hidden_dim": 32, "top_k": 2}
    rotary = {"head_dim": debug.head_dim, "mrope_sections": debug.mrope_sections}
    args = replace(FLAVORS["1B-A0.3B"], **small, **rotary, vit=debug.vit)  # type: ignore[arg-type]
    if not file.exists():
        write_model_config(file, args)
    return [*TOY, "--model.flavor", str(file), "--compile.no_enable"]


def profile_step(run: Any, trace: Path, device: str) -> dict[str, Any]:
    """One step under torch's profiler: milliseconds of kernels by class, syncs, and a trace if it is small enough."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run()
        if device == "cuda":
            torch.cuda.synchronize()  # device sync
    totals: dict[str, float] = {}
    kernels: dict[str, float] = {}
    syncs = dict.fromkeys(SYNCS, 0)
    for event in profile.key_averages():
        if event.key in syncs:
            syncs[event.key] += event.count
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        if on_device or device == "cpu":
            time = event.self_device_time_total if on_device else event.self_cpu_time_total
            totals[kernel_class(event.key)] = totals.get(kernel_class(event.key), 0) + time / 1e3
            kernels[event.key] = time / 1e3
    profile.export_chrome_trace(str(trace))
    size = trace.stat().st_size
    if size > TRACE_BYTES:
        trace.unlink()
    longest = sorted(kernels, key=kernels.__getitem__, reverse=True)[:15]
    return {
        "kernel_ms_by_class": dict(sorted(totals.items(), key=lambda item: -item[1])),
        "longest_kernels_ms": {name[:120]: kernels[name] for name in longest},
        "syncs": syncs,
        "trace_bytes": size,
        "trace_kept": size <= TRACE_BYTES,
    }


def speed(settings: Settings, name: str, options: list[str], trace: bool) -> dict[str, Any]:
    """Of ``1b_a0.3b.toml`` with ``options``; the profiled step comes after those that are timed."""
    warmup, steps = (2, 2) if settings.is_toy else (3, 6)
    toy = toy_flavor(settings) if settings.is_toy else []
    options = [*toy, *options]
    with forgotten():
        register()
        config = str(CONFIGS / "1b_a0.3b.toml")
        trainer = make_trainer(config, str(settings.work / name), warmup + steps + 9, options)
        clock, run, times = Clock(settings.device), stepper(trainer), []
        try:
            for _ in range(warmup):
                run()
            trainer.metrics_processor.performance(warmup)  # counts from here
            for _ in range(steps):
                begin = clock.now()
                run()
                times.append(clock.seconds(begin, clock.now()))
            metrics = trainer.metrics_processor.performance(warmup + steps)
            found = {
                "step_seconds": statistics.median(times),
                "shortest": min(times),
                "longest": max(times),
                **{key.removeprefix("perf/"): value for key, value in metrics.items()},
            }
            if trace:
                file = settings.out / "trace.json.gz"
                found["profile"] = profile_step(run, file, settings.device)
        finally:
            trainer.close()
        del trainer, run
    return found


def one_b(notes: Notes) -> None:
    """Activation checkpointing none and full, and float8, as the config compiles; none and per op without the compiler, since a compiled
    model has no wrapper for the latter. The profile is that of the first."""
    settings = notes.settings
    demo_data(settings)
    float8 = [*FLOAT8, "--float8.emulate"] if settings.is_toy else FLOAT8
    variants = {
        "ac_none": AC["none"],
        "ac_none_float8": [*AC["none"], *float8],
        "ac_full": AC["full"],
        "eager_ac_none": [*AC["none"], "--compile.no_enable"],
        "eager_ac_op": [*AC["op"], "--compile.no_enable"],
    }
    for name, options in variants.items():
        notes.part(name, partial(speed, settings, name, options, name == "ac_none"))
