"""Sources on disk or at an fsspec URL: their shards, indexed once.

Shards are plain data and are sent to worker processes, where a ``Reader`` fetches samples from them. Each format indexes and reads
its files in ``formats``.
"""

import functools
import logging
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np

from symbiotic_titan.config.data import FORMATS, DataSource
from symbiotic_titan.config.files import InputLimits
from symbiotic_titan.data.fields import (
    Fields,
    Keys,
    check_fields,
    dotted,
    names_of,
    names_wanted,
    schemas_of,
)
from symbiotic_titan.data.files import open_file, other_kind, source_files
from symbiotic_titan.data.formats.index_cache import cached_index
from symbiotic_titan.data.formats.shard import (
    BadSample,
    ChooseColumns,
    DamagedRest,
    File,
    FileFormat,
    Indexed,
    Reader,
    Shard,
)
from symbiotic_titan.sequence.tasks import TASKS, Task

# Samples of a source that are read to find out which fields they have.
NUM_INSPECTED = 16

# Seconds between two log lines about indexing.
LOG_SECONDS = 15

# Seconds of indexing after which helper processes are started: they take some to start themselves.
HELP_SECONDS = 5
MAX_HELPERS = 16
HELPER = "symbiotic_titan.data.index_helper"
# Bytes of indexes in memory from which on a cache folder is advised.
ADVISED_BYTES = 64 * 2**20


def index_source(
    source: DataSource,
    where: str,
    *,
    cache_folder: str = "",
    tolerant: bool = False,
    limits: InputLimits | None = None,
) -> list[Shard]:
    """All shards of ``source``, sorted by path. Reads of every file what its index needs: tar headers, lines or footers.

    where:        the config row, for messages.
    cache_folder: for indexes and unpacked files; "": keep neither.
    tolerant:     count the unreadable part of a file as one bad sample after the others, instead of raising.
    limits:       what one file and one of its samples may cost.

    Raises:
        ValueError: no file matches, none has samples, or one is damaged or not of its format.
    """
    paths = source_files(source, where)
    # Each process indexes in its own random order, so that processes that start together share the work through the cache.
    # The shards are sorted below, so the order affects nothing else.
    order = random.Random().sample(paths, len(paths)) if cache_folder else paths
    found: dict[str, list[Shard]] = {}
    remarks: dict[str, Indexed] = {}
    limits = limits or InputLimits()
    for path in _watched(order, source, cache_folder, where, limits):
        file, indexed = index_file(source, path, cache_folder, where, limits)
        if indexed.damage and not tolerant:
            raise ValueError(f"{where}: {path} {indexed.damage}")
        shards = list(indexed.shards)
        if indexed.damage:
            shards.append(DamagedRest(path, file.num_bytes, f"the file {indexed.damage}"))
        found[path] = shards
        if indexed.warning or indexed.note:
            remarks[path] = replace(indexed, shards=[])
    if not cache_folder:
        _advise([shard for shards in found.values() for shard in shards], where)
    _check_empty([path for path in paths if not found[path]], paths, where)
    for level, name in ((logging.WARNING, "warning"), (logging.INFO, "note")):
        texts = [(path, getattr(remarks[path], name)) for path in paths if path in remarks]
        _log_first(level, [f"{path} {text}" for path, text in texts if text], where)
    return [shard for path in paths for shard in found[path]]


def _check_empty(empty: list[str], paths: list[str], where: str) -> None:
    """Refuse a source without samples; say which of its files have none, in one line."""
    if len(empty) == len(paths):
        others = f", nor do {len(empty) - 1} more files" if len(empty) > 1 else ""
        raise ValueError(
            f"{where}: {empty[0]} holds no samples{others}; write samples into it, or correct path"
        )
    if empty:
        logging.getLogger(__name__).info(
            f"{where}: {len(empty)} of {len(paths)} files hold no samples, the first is {empty[0]}"
        )


def _log_first(level: int, lines: list[str], where: str) -> None:
    """One line for the source, which may have thousands of files."""
    if lines:
        others = f"; so it is with {len(lines) - 1} more files" if len(lines) > 1 else ""
        logging.getLogger(__name__).log(level, f"{where}: {lines[0]}{others}")


def _advise(shards: list[Shard], where: str) -> None:
    """Say so where the indexes take much memory, in every process."""
    arrays = [v for s in shards for v in getattr(s, "__dict__", {}).values()]
    num_bytes = sum(value.nbytes for value in arrays if isinstance(value, np.ndarray))
    if num_bytes > ADVISED_BYTES:
        logging.getLogger(__name__).info(
            f"{where}: the index takes {num_bytes / 2**20:.0f} MiB in every process; with data.cache_folder they share one"
        )


def _watched(
    paths: list[str], source: DataSource, cache_folder: str, where: str, limits: InputLimits
) -> Iterator[str]:
    """``paths``. Reports how far the caller is, and gets it help if it takes long."""
    start = last = time.monotonic()
    helpers: list[subprocess.Popen[bytes]] = []
    try:
        for number, path in enumerate(paths):
            now = time.monotonic()
            if now - last > LOG_SECONDS:
                last = now
                logging.getLogger(__name__).info(f"{where}: indexed {number} of {len(paths)} files")
            if now - start > HELP_SECONDS and cache_folder and not helpers:
                helpers = start_helpers(source, paths[number:], cache_folder, where, limits)
                start = float("inf")
            yield path
    finally:
        for helper in helpers:
            helper.terminate()
        for helper in helpers:
            helper.wait()


def start_helpers(
    source: DataSource,
    paths: list[str],
    cache_folder: str,
    where: str,
    limits: InputLimits | None = None,
) -> list["subprocess.Popen[bytes]"]:
    """Processes that index ``paths`` into the cache folder; the ranks of a machine share its cores."""
    if not FORMATS[source.format].cached_shard:
        return []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    count = min(cores // ranks - 1, len(paths) // 2, MAX_HELPERS)
    work = pickle.dumps((source, FORMATS[source.format], paths, cache_folder, where, limits))
    places = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    helpers = []
    for _ in range(count):
        helper = subprocess.Popen(
            # -P: the folder that the command was called in may be a stranger's, with a random.py in it.
            [sys.executable, "-P", "-m", HELPER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        helpers.append(helper)
        with suppress(OSError):  # it has ended already; then it is no help
            assert helper.stdin is not None
            with helper.stdin as opened:
                opened.write(work)
    return helpers


def index_file(
    source: DataSource,
    path: str,
    cache_folder: str,
    where: str,
    limits: InputLimits | None = None,
) -> tuple[File, Indexed]:
    """The file ``path`` and its shards."""
    file, damage = open_file(path, cache_folder, where, limits or InputLimits())
    file_format: FileFormat = FORMATS[source.format]()
    index = functools.partial(_index, source, file, functools.partial(_columns, source))
    if not file.num_bytes and not file_format.may_be_empty:
        indexed = Indexed([], "has 0 bytes; copy or write it again")
    elif cache_folder and file_format.cached_shard:
        indexed = cached_index(index, file, source.format, file_format, cache_folder)
    else:
        indexed = index()
    return file, replace(indexed, damage=damage or indexed.damage)


def _index(source: DataSource, file: File, choose_columns: ChooseColumns) -> Indexed:
    """The index of ``file``; a file of another kind is named as such."""
    file_format: FileFormat = FORMATS[source.format]()
    other = other_kind(file.data, source.format) if file_format.is_text else ""
    if other:
        return Indexed([], other)
    indexed = file_format.index(file, choose_columns)
    if indexed.damage and not indexed.shards:
        return replace(indexed, damage=other_kind(file.data, source.format) or indexed.damage)
    return indexed


def check_names(source: DataSource, shards: list[Shard], where: str) -> None:
    """Raise ValueError if no sample has the fields of the source's task, judged by a few samples or by a schema."""
    names = _names_seen(shards)
    if names:
        check_fields(TASKS[source.task], source.keys, names, where)
        if choice := _choice_of_schema(TASKS[source.task], source.keys, names):
            logging.getLogger(__name__).warning(f"{where}: {choice}")


def _choice_of_schema(task: Task, keys: Keys, names: set[str]) -> str:
    """For samples with fields of several schemas, between which ``keys`` do not choose: which one is read, and what to do; else ""."""
    fields = [schema[-1] for schema in schemas_of(task, keys)]
    found = [field for field in fields if names & set(names_of(field, keys))]
    if len(found) < 2 or any(field in keys for field in found):
        return ""
    name = next(name for name in names_of(found[1], keys) if name in names)
    return (
        f"its samples have {' and '.join(found)}, and {found[0]} is what is read; if another one is meant, name it, as in "
        f'keys = {{{found[1]} = "{name}"}}'
    )


def _columns(source: DataSource, names: list[str]) -> list[str]:
    """The ``names`` that samples of the source's task are read by; other columns are not decoded."""
    wanted = names_wanted(TASKS[source.task], source.keys)
    heads = {name for path in wanted for name in (path, *(head for head, _ in dotted(path)))}
    return [name for name in names if name in heads]


def _names_seen(shards: list[Shard]) -> set[str]:
    """Field names of a few samples, spread over the shards; empty if all of them are bad."""
    reader = Reader(shards)
    names: set[str] = set()
    inspected = range(0, len(shards), -(-len(shards) // NUM_INSPECTED))
    for number in inspected:
        shard = shards[number]
        names.update(shard.names)
        count = 0 if shard.names else min(shard.num_samples, NUM_INSPECTED // len(inspected))
        for sample in range(count):
            try:
                names |= Fields(reader.read(number, sample), {}).names
            except BadSample:
                continue
    return names
