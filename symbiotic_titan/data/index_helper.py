"""A program that indexes files of a source into the cache folder, to help the process that waits for them.

    python -m symbiotic_titan.data.index_helper      # what to do comes through standard input

It only fills the cache. Whatever it does or fails to do, the process that started it reads the same indexes or makes them itself, so
no result depends on it. It is a program of its own, not a fork: the process may have threads, which a fork would break.
"""

import os
import pickle
import random
import signal
import sys
from dataclasses import dataclass

from symbiotic_titan.config.data import DataSource
from symbiotic_titan.config.files import InputLimits
from symbiotic_titan.data.readers import index_file


@dataclass(frozen=True)
class Work:
    """Files of a source, and the folder for their indexes. format_class: loads the module that registered the format."""

    source: DataSource
    format_class: type
    paths: list[str]
    cache_folder: str
    where: str
    limits: InputLimits | None = None


def index_files(work: Work, parent: int) -> None:
    """In random order, so that helpers rarely meet at a file; until all are done or the process ``parent`` has ended."""
    for path in random.sample(work.paths, len(work.paths)):
        if os.getppid() != parent:
            return
        try:
            index_file(work.source, path, work.cache_folder, work.where, work.limits)
        except (OSError, ValueError):
            continue  # the process that needs the file finds the error itself


def main() -> int:
    # An orderly end, which removes files that are written in part.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Of the process that started this one; nothing from a file is unpickled.
    source, format_class, *rest = pickle.load(sys.stdin.buffer)  # noqa: S301
    index_files(Work(source, format_class, *rest), os.getppid())
    return 0


if __name__ == "__main__":
    sys.exit(main())
