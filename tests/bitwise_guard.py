#!/usr/bin/env python3
"""Bitwise guard for changes of structure: what 12 steps of debug.toml give, down to the last bit.

    python tests/bitwise_guard.py record outputs/guard.json      # before the change
    python tests/bitwise_guard.py compare outputs/guard.json     # after it; exit status 1 where anything differs

Recorded are the losses and gradient norms that TensorBoard holds, a digest of every tensor of the checkpoint (weights and
optimizer state), the names of metrics, parameters and checkpoint entries, and the options that --help-all lists. A record holds for one
machine: another CPU rounds differently. Run in an environment that tools/setup_env.sh made.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).parents[1]
STEPS = 12
BITWISE = (
    "loss/",
    "grad_norm/",
    "update_ratio/",
    "validation/",
    "routing/",
    "tokens/",
    "shield/",
    "lr/",
)


def run(*options: str) -> str:
    command = [str(ROOT / "run_train.sh"), *options]
    environment = {**os.environ, "SYMBIOTIC_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


def metrics_of(folder: Path) -> dict[str, list[str]]:
    """Metric -> its values, exact; only the name where the value depends on the clock."""
    metrics: dict[str, list[str]] = {}
    for events in sorted(folder.rglob("events.out.*")):
        log = EventAccumulator(str(events)).Reload()
        for name in log.Tags()["scalars"]:
            exact = name.startswith(BITWISE)
            metrics[name] = [float(e.value).hex() for e in log.Scalars(name)] if exact else []
        metrics |= {f"image:{name}": [] for name in log.Tags()["images"]}
    return metrics


def digests(entry: object, name: str = "") -> dict[str, str]:
    """Dotted name of every entry of a checkpoint -> digest of its bytes; numbers and texts as they are."""
    if isinstance(entry, dict):
        return {
            k: v for key, value in entry.items() for k, v in digests(value, f"{name}{key}.").items()
        }
    if isinstance(entry, torch.Tensor):
        data = entry.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {name[:-1]: f"{tuple(entry.shape)} {hashlib.sha256(data).hexdigest()[:16]}"}
    if isinstance(entry, (bytes, str)):
        data = entry.encode() if isinstance(entry, str) else entry
        return {name[:-1]: hashlib.sha256(data).hexdigest()[:16]}
    return {name[:-1]: repr(entry)}


def record() -> dict[str, object]:
    out = Path(tempfile.mkdtemp(prefix="bitwise_guard_"))
    try:
        options = ("--training.steps", str(STEPS), "--metrics.log_freq", "1")
        run("--job.dump_folder", str(out), *options)
        whole = out / "whole.pt"
        dcp_to_torch_save(out / f"checkpoint/step-{STEPS}", whole)
        state = torch.load(whole, weights_only=False)
        return {
            "metrics": metrics_of(out / "tb"),
            "checkpoint": digests(state),
            "options": sorted(set(re.findall(r"--[a-z][\w.-]+", run("--help-all")))),
        }
    finally:
        shutil.rmtree(out)


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in ("record", "compare"):
        sys.exit(__doc__)
    path, now = Path(sys.argv[2]), record()
    if sys.argv[1] == "record":
        path.write_text(json.dumps(now, indent=1, sort_keys=True))
        return 0
    then = json.loads(path.read_text())
    differing = [
        f"{part}: {name}"
        for part in then
        for name in (
            sorted(set(then[part]) ^ set(now[part]))
            if isinstance(then[part], list)
            else sorted(
                n for n in {**then[part], **now[part]} if then[part].get(n) != now[part].get(n)
            )
        )
    ]
    print("\n".join(differing) or f"the same: {', '.join(f'{len(then[p])} {p}' for p in then)}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
