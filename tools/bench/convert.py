#!/usr/bin/env python3
"""Time and memory of importing a released model: symbiotic convert from-hf on a synthetic checkpoint of some gigabytes.

Example: tools/bench/convert.py --gigabytes 4 --scratch outputs/bench_convert

The checkpoint is a Qwen3-VL with experts in bfloat16, made on the spot: layers of the released model's shape, as many as are asked
for, in files of --shard-gigabytes. Import and the making run in processes of their own, so that the import's peak of memory is its
own; what importing torch alone takes is measured beside it. --scratch must have room for twice the gigabytes and is removed.
A layer takes 1.2 GB: --narrow makes a smaller checkpoint of several, for a try.

The last line is JSON. ``peak_over_shard``: peak memory of the import, less that of torch alone, over the largest file (the bar: 2).
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

BAR = 2.0

# Qwen3-VL-30B-A3B, with a smaller vocabulary and image encoder: what is large are the experts.
_TEXT: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "out_hidden_size": 2048,
    "deepstack_visual_indexes": [0],
}


def config_of(num_layers: int, narrow: int) -> dict[str, Any]:
    """Of layers whose widths are a ``narrow``-th of the released ones; the image encoder has a multiple of four values a head."""
    hidden = _TEXT["hidden_size"] // narrow
    text = {name: _TEXT[name] // narrow for name in ("intermediate_size", "moe_intermediate_size")}
    vision = {
        "hidden_size": max(1, _VISION["hidden_size"] // 64 // narrow) * 64,
        "intermediate_size": _VISION["intermediate_size"] // narrow,
    }
    return {
        "model_type": "qwen3_vl_moe",
        "text_config": {**_TEXT, **text, "hidden_size": hidden, "num_hidden_layers": num_layers},
        "vision_config": {**_VISION, **vision, "out_hidden_size": hidden},
    }


def make(folder: Path, gigabytes: float, shard_gigabytes: float, narrow: int) -> None:
    """Write the checkpoint, in the layout of the released files; its numbers are patterns of bytes."""
    import torch

    from symbiotic_titan import device

    device.prepare()
    from symbiotic_titan.hf.architectures.base import architecture_of
    from symbiotic_titan.hf.converter import (
        ConverterStep,
        TensorConverter,
    )
    from symbiotic_titan.model.symbiotic import SymbioticModel
    from symbiotic_titan.weights.compatibility import tensors_of_model
    from symbiotic_titan.weights.reader import (
        TensorSpec,
        total_bytes,
    )
    from symbiotic_titan.weights.safetensors import write_folder

    def specs_of(num_layers: int) -> dict[str, TensorSpec]:
        config = config_of(num_layers, narrow)
        architecture = architecture_of(config)
        args = architecture.model_args(config)
        with torch.device("meta"):
            ours = {
                name: TensorSpec(spec.shape, torch.bfloat16)
                for name, spec in tensors_of_model(SymbioticModel(args)).items()
            }
        steps = [
            ConverterStep(mapping.ours, mapping.theirs, mapping.save)
            for mapping in architecture.weight_map(args, {})
        ]
        return TensorConverter(steps, ours, lambda name: ours[name].placeholder()).specs

    one, two = (total_bytes(specs_of(n).values()) for n in (1, 2))
    num_layers = max(1, 1 + round((gigabytes * 1e9 - one) / (two - one)))
    specs = specs_of(num_layers)

    def value(name: str) -> torch.Tensor:
        spec = specs[name]
        pattern = torch.arange(251).to(torch.bfloat16)
        return pattern.repeat(-(-spec.num_values // 251))[: spec.num_values].view(spec.shape)

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(num_layers, narrow)))
    write_folder(folder, specs, value, int(shard_gigabytes * 1e9))


def run(*words: str) -> tuple[float, int]:
    """(seconds, peak bytes) of a Python process.

    Raises:
        RuntimeError: it fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    silent = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
    process = os.posix_spawn(
        sys.executable, [sys.executable, *words], environment, file_actions=[silent]
    )
    _, status, usage = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"{' '.join(words)} failed")
    # Kilobytes, but bytes on macOS. This process imports no torch: a child's peak begins at that of its parent.
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, usage.ru_maxrss * unit


def bench(scratch: Path, gigabytes: float, shard_gigabytes: float, narrow: int) -> dict[str, Any]:
    """What the import took. ``scratch`` is made, and removed at the end."""
    scratch.mkdir(parents=True)
    try:
        free = shutil.disk_usage(scratch).free
        if free < 2.2e9 * gigabytes:
            raise ValueError(
                f"--scratch: {free / 1e9:.1f} GB are free, twice --gigabytes is needed"
            )
        source, out = scratch / "release", scratch / "checkpoint"
        run(__file__, "--make", str(source), *_sizes(gigabytes, shard_gigabytes, narrow))
        convert = str(ROOT / "tools" / "convert.py")
        _, idle = run(convert, "--help")
        seconds, peak = run(convert, "from-hf", "--hf", str(source), "--out", str(out))
        sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
        tensors = [path.stat().st_size for path in out.glob("*.distcp")]
    finally:
        shutil.rmtree(scratch)
    return {
        "gigabytes": round(sum(sizes) / 1e9, 2),
        "largest_file_gb": round(max(sizes) / 1e9, 2),
        "largest_tensor_gb": round(max(tensors) / 1e9, 2),
        "seconds": round(seconds, 1),
        "gb_per_second": round(sum(sizes) / 1e9 / seconds, 2),
        "peak_gb": round(peak / 1e9, 2),
        "idle_gb": round(idle / 1e9, 2),
        "peak_over_shard": round((peak - idle) / max(sizes), 2),
        "bar": BAR,
    }


def _sizes(gigabytes: float, shard_gigabytes: float, narrow: int) -> tuple[str, ...]:
    sizes = {"gigabytes": gigabytes, "shard-gigabytes": shard_gigabytes, "narrow": narrow}
    return tuple(word for name, size in sizes.items() for word in (f"--{name}", str(size)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--shard-gigabytes", type=float, default=2.0, help="of a file, at most")
    parser.add_argument(
        "--narrow", type=int, default=1, help="divides the widths of layers (default 1)"
    )
    parser.add_argument("--scratch", type=Path, help="folder to make and to remove")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not 1 <= options.narrow <= 64:
        parser.error(f"--narrow must be from 1 to 64, got {options.narrow}")
    if options.make is not None:
        make(options.make, options.gigabytes, options.shard_gigabytes, options.narrow)
        return 0
    if options.scratch is None or options.scratch.exists():
        print("error: --scratch must name a folder that does not exist yet", file=sys.stderr)
        return 2
    try:
        sizes = (options.gigabytes, options.shard_gigabytes, options.narrow)
        result = bench(options.scratch, *sizes)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from bench_timing import machine  # imports torch, which the children must not inherit

    print(json.dumps({**result, **machine()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
