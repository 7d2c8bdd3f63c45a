"""Of two runs of one folder the second is refused; what a dead one leaves behind blocks nobody."""

import errno
import fcntl
import json
import os
import signal
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from symbiotic_titan.checkpoint import lock as lock_module
from symbiotic_titan.checkpoint.lock import FolderLock
from symbiotic_titan.process import is_running, machine, process_start


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoint"


@pytest.fixture
def quick(monkeypatch):
    """Silence of 0.6 s is death."""
    monkeypatch.setattr(lock_module, "SILENCE", 0.6)


def without_os_locks(monkeypatch):
    def lockf(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", lockf)


def write_holder(folder, **changes):
    """The file that another process left; by default one of another machine that touched it just now."""
    values = {"token": "theirs", "host": "node7", "pid": os.getpid(), "start": "1"}
    values |= {"machine": "another", "since": "2026-01-01 00:00:00 UTC", **changes}
    path = FolderLock(folder).path
    path.write_text(json.dumps(values))
    return path


@contextmanager
def child(action=lambda: None):
    """The number of a process that does ``action`` and then lives until it is killed."""
    process = os.fork()
    if process == 0:
        try:
            action()
            time.sleep(60)
        finally:
            os._exit(1)
    yield process
    with suppress(ChildProcessError):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


@pytest.fixture
def other(folder):
    """Another process that holds the lock."""
    path = FolderLock(folder).path
    with child(lambda: FolderLock(folder).acquire(0)) as process:
        while not (path.exists() and f'"pid": {process}' in path.read_text()):
            time.sleep(0.02)
        yield process


def taken(folder, seconds=0.0):
    lock = FolderLock(folder)
    lock.acquire(seconds)
    lock.check()
    lock.release()
    return not lock.path.exists()


def test_a_second_run_is_refused_until_the_first_is_dead(folder, other, monkeypatch):
    message = (
        rf"dump_folder: another run writes into .*checkpoint \(process {other} on .*, since 20"
    )
    with pytest.raises(ValueError, match=message + ".*; stop that run"):
        FolderLock(folder).acquire(0)
    with monkeypatch.context() as patched:  # by the file alone
        without_os_locks(patched)
        with pytest.raises(ValueError, match=message):
            FolderLock(folder).acquire(0)
    threading.Timer(0.5, os.kill, (other, signal.SIGKILL)).start()
    began = time.monotonic()
    assert taken(folder, seconds=30)
    assert 0.4 < time.monotonic() - began < 10


def test_a_run_waits_for_the_end_of_another_no_longer_than_it_says(folder, other):
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"did not end within 1 s \(checkpoint.lock_timeout\)"):
        FolderLock(folder).acquire(1)
    assert 1 <= time.monotonic() - began < 5


@pytest.mark.parametrize("content", ["", '{"token": "x", "ho', "[]", '{"pid": 3}'])
def test_a_file_that_names_nobody_blocks_nobody(folder, content):
    FolderLock(folder).path.write_text(content)
    assert taken(folder)


def test_a_dead_process_blocks_nobody_where_there_are_no_locks(folder, monkeypatch):
    without_os_locks(monkeypatch)
    write_holder(folder, machine=machine())
    assert taken(folder)


def test_a_process_of_this_machine_is_told_from_a_later_one_of_its_number(folder):
    write_holder(folder, machine=machine(), start=process_start(os.getpid()))
    with pytest.raises(ValueError, match=rf"process {os.getpid()} on node7"):
        FolderLock(folder).acquire(0)
    write_holder(folder, machine=machine(), start="1")
    assert taken(folder)


def test_a_process_of_another_machine_lives_while_it_touches_the_file(folder, quick):
    """Its clock is five minutes behind."""
    path, ended = write_holder(folder), threading.Event()

    def beat():
        for i in range(50):
            os.utime(path, (time.time() - 300 + i,) * 2)
            if ended.wait(0.3):
                return

    heart = threading.Thread(target=beat)
    heart.start()
    with pytest.raises(ValueError, match="on node7, since 2026-01-01 00:00:00 UTC"):
        FolderLock(folder).acquire(0)
    ended.set()
    heart.join()
    began = time.monotonic()
    assert taken(folder)  # it is silent now
    assert time.monotonic() - began > 0.6


def test_a_file_of_another_machine_that_is_old_is_not_watched_first(folder):
    path = write_holder(folder)
    os.utime(path, (time.time() - 3600,) * 2)
    began = time.monotonic()
    assert taken(folder)
    assert time.monotonic() - began < 5


def test_the_holder_touches_the_file_while_it_holds_it(folder, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT", 0.05)
    lock = FolderLock(folder)
    lock.acquire(0)
    os.utime(lock.path, (1, 1))
    for _ in range(100):
        time.sleep(0.05)
        if lock.path.stat().st_mtime > 1:
            break
    assert lock.path.stat().st_mtime > 1
    lock.release()


def test_a_run_whose_lock_was_taken_saves_no_more(folder):
    lock = FolderLock(folder)
    lock.acquire(0)
    write_holder(folder)
    with pytest.raises(ValueError, match="it has taken .*lock while this one did not respond"):
        lock.check()
    lock.release()
    assert lock.path.exists()  # it is the other one's


def test_a_lock_that_was_removed_is_made_again(folder):
    lock = FolderLock(folder)
    lock.acquire(0)
    lock.path.unlink()
    lock.check()
    assert lock.path.exists()
    lock.path.unlink()
    write_holder(folder)
    with pytest.raises(ValueError, match="this one ends without a save"):
        lock.check()
    lock.release()


def test_a_process_that_was_killed_and_not_waited_for_does_not_run():
    with child() as process:
        begun = process_start(process)
        assert begun and is_running(process, begun) and not is_running(process, "1")
        os.kill(process, signal.SIGKILL)
        while process_start(process):
            time.sleep(0.01)
        assert not is_running(process, begun)
