"""The command ``symbiotic``: ``symbiotic NAME [OPTION ...]`` runs the module of ``symbiotic_titan.commands`` of that name."""

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "make-demo-data": "write the demo world",
    "train": "train the model of a config; run_train.sh starts several processes",
    "show-config": "the merged config, or what differs between two",
    "show-batch": "packed sequences as text and images, in one HTML page",
    "show-parallel": "dry run: shapes, memory and traffic per rank",
    "cache-latents": "encode the target images once, as shards",
    "profile-experts": "how often text and ViT tokens choose each expert",
    "convert": "a released model to groups of experts, and back",
    "generate": "images and texts from a checkpoint",
    "evaluate": "scores of checkpoints, side by side",
    "plot": "figures of one or several runs",
    "run-study": "the study of train_configs/mini from beginning to end",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {sentence}" for name, sentence in COMMANDS.items()]
    return "\n".join(["usage: symbiotic COMMAND [OPTION ...]", "", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: the command's own, 2 where there is no such command."""
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    command = name.replace("_", "-")
    if command not in COMMANDS:
        print(f"symbiotic: no command {name!r}\n{usage()}", file=sys.stderr)
        return 2
    module = f"commands.{command.replace('-', '_')}" if command != "train" else "train"
    sys.argv = [f"symbiotic {command}", *rest]
    try:
        chosen = import_module(f"symbiotic_titan.{module}")
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "matplotlib":
            raise
        install = f"{sys.executable} -m pip install 'symbiotic_titan[plot]'"
        print(f"error: plotting needs matplotlib: {install}", file=sys.stderr)
        return 2
    return chosen.main(rest)


if __name__ == "__main__":
    sys.exit(main())
