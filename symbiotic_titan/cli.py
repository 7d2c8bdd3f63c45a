"""The command ``symbiotic``: ``symbiotic NAME [OPTION ...]`` runs the module of ``symbiotic_titan.commands`` of that name.

Each command is imported when it is called, so that ``symbiotic plot`` needs no model and ``symbiotic train`` no matplotlib.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from symbiotic_titan.process import INTERRUPTED, loading
from symbiotic_titan.signals import ignore_stop_signals

COMMANDS = {
    "make-demo-data": "write the demo world",
    "train": "train the model of a config in one process; run_train.sh starts several",
    "show-config": "the merged config, or what differs between two",
    "show-batch": "packed sequences as text and images, in one HTML page",
    "check-data": "read every sample as training would, and list the bad ones",
    "show-parallel": "dry run: shapes, memory and traffic per rank",
    "cache-latents": "encode the target images once, as shards",
    "profile-experts": "how often text and ViT tokens choose each expert",
    "check-checkpoint": "list the checkpoints of a run and verify their bytes",
    "convert": "a released model to groups of experts, and back",
    "generate": "images and texts from a checkpoint",
    "evaluate": "scores of checkpoints, side by side",
    "plot": "figures of one or several runs",
    "reliability": "kills, signals, damage, full disks: do runs go on as if nothing had happened?",
    "reproduce": "the comparison of the paper on the demo world, for several seeds, as one page",
}

# Optional package -> the extra of pyproject.toml that installs it.
EXTRAS = {
    "datasets": "bench",
    "diffusers": "diffusers",
    "lm_eval": "lm-eval",
    "matplotlib": "plot",
    "sklearn": "demo",
    "torchmetrics": "torchmetrics",
    "transformers": "torchmetrics",
    "webdataset": "bench",
}

# run_train.sh --help prints this as well, by looking for its first and its last line.
MOST_USED = """\
The options most used; every key of a config is one, as --section.key VALUE, and --section.key or --section.no_key if it is a yes or no:

  --job.dump_folder FOLDER                      where the run writes; the same folder goes on from its newest checkpoint
  --training.steps N                            the last step
  --training.local_batch_size N                 rows of a micro-batch on each rank; --training.global_batch_size N: of a step
  --training.seq_len N                          tokens of a row
  --metrics.log_freq N                          steps from one line in the log to the next
  --checkpoint.interval N                       steps from one checkpoint to the next
  --checkpoint.initial_load_path FOLDER         weights to start from
  --parallelism.expert_parallel_degree N        ranks that share out the experts
  --parallelism.context_parallel_degree N       ranks that share out each row
  --activation_checkpoint.mode MODE             none, selective or full: less memory, more time
  --compile.enable                              compile the layers
  --validation.enable, --sampling.enable        held-out losses; pictures in TensorBoard

--help-all lists all of them with their defaults, in a few seconds; docs/reference/settings.md explains them by section.
"""

TRAIN_USAGE = """usage: symbiotic train CONFIG.toml [--section.key VALUE ...]

Example: symbiotic train train_configs/debug.toml --training.steps 50

One process, on one GPU or a CPU. ./run_train.sh and torchrun start several. --job.config_file CONFIG.toml names the config as well.
"""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {sentence}" for name, sentence in COMMANDS.items()]
    last = "symbiotic COMMAND --help explains one."
    return "\n".join(["usage: symbiotic COMMAND [OPTION ...]", "", *lines, "", last])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: the command's own, 2 where there is no such command or a package is missing, 130 after Ctrl-C. Without ``arguments``:
    those of this process, which then ends."""
    try:
        status = run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:  # while the command was loaded, or a second one while it ended
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    if arguments is None:
        ignore_stop_signals()
        if status == INTERRUPTED:
            # Python would end itself by SIGINT where the first one came in a string that was executed, as dataclasses do.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return status


def run(arguments: list[str]) -> int:
    """Find the command and run it."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    command = name.replace("_", "-")
    if command not in COMMANDS:
        print(f"symbiotic: no command {name!r}\n{usage()}", file=sys.stderr)
        return 2
    sys.argv = [f"symbiotic {command}", *rest]
    try:
        if command == "train":
            return train(rest)
        return load(f"commands.{command.replace('-', '_')}").main(rest)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in EXTRAS:
            raise
        install = f"{sys.executable} -m pip install 'symbiotic_titan[{EXTRAS[package]}]'"
        print(f"error: symbiotic {command} needs {package}: {install}", file=sys.stderr)
        return 2


def load(module: str) -> ModuleType:
    with loading():
        return import_module(f"symbiotic_titan.{module}")


def train(arguments: list[str]) -> int:
    """Train in this process, which is the only one unless torchrun says otherwise."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"{TRAIN_USAGE}\n{MOST_USED}", end="")
        return 0 if arguments else 2
    arguments = ["--help" if word == "--help-all" else word for word in arguments]
    if not arguments[0].startswith("-"):
        arguments = ["--job.config_file", *arguments]
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        # Port 0 lets the system choose a free one.
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    module = load("train")
    status = module.main(arguments)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        module.leave(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
