"""Worker processes that may die: a decoder that crashes, or that the system kills for its memory, costs one sample and no more.

A worker notes in shared memory which sample it is at, so that the parent knows what killed it. ``DataLoader`` and
``concurrent.futures`` give up where one worker dies, and do not know its sample.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch

from symbiotic_titan.signals import end_with_parent, parent_pid

Item = TypeVar("Item")
Result = TypeVar("Result")


class Position:
    """The sample that a worker is at, visible to its parent; -1 between two items."""

    def __init__(self, context: Any) -> None:
        self._value = context.RawValue("q", -1)

    def set(self, sample: int) -> None:
        self._value.value = sample

    def get(self) -> int:
        return int(self._value.value)


@dataclass(frozen=True)
class Crash:
    """A worker ended instead of returning a result: at which sample (-1: not known), and how."""

    sample: int
    message: str


# Item -> result; calls ``Position.set`` before each sample.
Work = Callable[[Any, Position], Any]


@dataclass
class _Worker(Generic[Item]):
    process: BaseProcess
    pipe: connection.Connection
    position: Position
    items: list[Item] = field(default_factory=list)  # what it works on: one, or none


class WorkerPool(Generic[Item, Result]):
    """``num_workers`` processes that call ``work``. Leaving the ``with`` block ends them."""

    def __init__(self, work: Work, num_workers: int) -> None:
        self._work = work
        self._num_workers = num_workers
        # Forked where the system can: the index of the shards is then shared instead of copied.
        self._context: Any = get_context()
        self._workers: list[_Worker[Item]] = []

    def __enter__(self) -> "WorkerPool[Item, Result]":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def run(
        self, choose: Callable[[Item | None], Item | None]
    ) -> Iterator[tuple[Item, Result | Crash]]:
        """Items with their results, in the order in which these arrive.

        choose: the next item for a worker whose last one was the argument; None where no item is left for it. Called again after
                every result that was yielded, which may have added items.
        """
        last: dict[int, Item | None] = dict.fromkeys(range(self._num_workers))
        while True:
            for number in range(self._num_workers):
                self._give(number, choose, last)
            busy = [worker for worker in self._workers if worker.items]
            if not busy:
                return
            sources: list[Any] = [w.pipe for w in busy] + [w.process.sentinel for w in busy]
            ready = connection.wait(sources)
            for worker in busy:
                if worker.pipe in ready or worker.process.sentinel in ready:
                    yield worker.items[0], self._collect(worker)

    def _give(
        self,
        number: int,
        choose: Callable[[Item | None], Item | None],
        last: dict[int, Item | None],
    ) -> None:
        """Hand the next item to worker ``number``, unless it is busy; it is started when there is work for it."""
        if number < len(self._workers) and self._workers[number].items:
            return
        item = choose(last[number])
        if item is None:
            return
        last[number] = item
        if number >= len(self._workers):
            self._workers.append(self._start())
            number = len(self._workers) - 1
        worker = self._workers[number]
        worker.items = [item]
        # A worker that died between two items is found by ``run``: its sentinel is ready.
        with suppress(OSError):
            worker.pipe.send(item)

    def _collect(self, worker: _Worker[Item]) -> Result | Crash:
        """The result of a worker that has one or has ended; one that has ended is replaced."""
        worker.items = []
        with suppress(EOFError, OSError):
            if worker.pipe.poll():
                return worker.pipe.recv()
        worker.process.join()
        worker.pipe.close()
        self._workers[self._workers.index(worker)] = self._start()
        return Crash(worker.position.get(), _how_it_ended(worker.process.exitcode))

    def _start(self) -> _Worker[Item]:
        ours, theirs = self._context.Pipe()
        position = Position(self._context)
        process = self._context.Process(
            target=_serve, args=(self._work, theirs, position), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process, ours, position)


def _serve(work: Work, pipe: connection.Connection, position: Position) -> None:
    """Runs in the worker."""
    # Ctrl-C is for the parent, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    # The end of the pipe would not tell that the parent was killed: workers that were forked later hold it open as well.
    end_with_parent(parent_pid())
    while True:
        item = pipe.recv()
        result = work(item, position)
        position.set(-1)
        pipe.send(result)


def _how_it_ended(status: int | None) -> str:
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        cause = "; the system does that where memory runs out" if name == "SIGKILL" else ""
        return f"its worker process was ended by {name}{cause}"
    return f"its worker process ended with exit status {status}; it has printed why"
