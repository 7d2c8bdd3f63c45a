"""Files that are derived from a user's files and kept in the cache folder (data.cache_folder).

Their names depend on the path, size and time of what they come from, so that a changed file is never taken for the old one.
Several processes may write at once: each writes a file of its own, which gets its name when it is whole.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO
from uuid import uuid4

from fsspec.core import url_to_fs


def version_of(path: str) -> str:
    """Changes when the file at ``path``, local or behind a URL, does, as far as its file system tells."""
    filesystem, name = url_to_fs(path)
    # Some file systems' own keys leave out what they know of the version, a web server's entity tag for one.
    parts = (path, filesystem.ukey(name), sorted(map(str, filesystem.info(name).items())))
    return sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


@contextmanager
def written_whole(target: Path) -> Iterator[IO[bytes]]:
    """A file to write, which becomes ``target`` at the end, and nothing when that is not reached."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as out:
            yield out
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
