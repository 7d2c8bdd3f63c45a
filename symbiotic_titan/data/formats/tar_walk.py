"""The members of a tar file. Headers of the usual kind are parsed here, in batches; all others are left to ``tarfile``.

Usual are regular files with octal numbers and a right checksum, also after a pax header that holds no more than times and a path:
what data sets are written with. Such a header means the same here and in ``tarfile``. At any other header, and where the file
breaks off, ``tarfile`` goes on from there, so that members and errors are those that it alone would give, which takes ten times as long.
"""

import os
import tarfile
from collections.abc import Iterator
from typing import IO

import numpy as np
from fsspec.implementations.local import LocalFileOpener

# Bytes of a block of a tar file.
BLOCK = 512
# A damaged header may claim any size; a negative one would make tarfile walk backwards forever.
MAX_MEMBER = 2**62
# Headers that are checked together.
BATCH = 4096
# Bytes read at a time where headers are near each other; where they are not, what lies between them is passed over.
WINDOW = 2**20
NEAR = 2**14
# After members that ``tarfile`` read, so many of the usual kind make it worth while to go on without it.
MIN_RUN = 16
MAX_RUN = 1024

# What tarfile raises on damaged headers.
TAR_ERRORS = (
    tarfile.TarError,
    ValueError,
    EOFError,
    OverflowError,
    IndexError,
    RecursionError,  # it calls itself for each of the headers that precede a member
)
# Bytes of a header with a long name or many records, which ``tarfile`` would read whatever it claims.
MAX_HEADER = 2**20

ENCODING: str = tarfile.ENCODING  # type: ignore[attr-defined]
NUL = b"\0"
REGULAR, PAX = b"0x"
# Keywords of pax headers that change nothing but the name.
PAX_KEYWORDS = (b"path", b"mtime", b"atime", b"ctime")
MAX_PAX = 2**16

# Name, offset of the bytes, their number.
Member = tuple[str, int, int]


class TarWalk:
    """Iterates over lists of the regular files of an open archive, up to its end or its first damage.

    damage:  then says what is wrong, "" if nothing.
    goes_on: then says whether there are bytes other than zeros after the end.
    """

    def __init__(self, opened: IO[bytes]) -> None:
        self._opened = opened
        self._num_bytes = opened.seek(0, 2)
        self.damage = ""
        self.goes_on = False
        self._done = False
        self._next = 0  # where the next header begins
        self._last: int | None = None  # where the header of the last member begins

    def __iter__(self) -> Iterator[list[Member]]:
        run = 1
        while not self._done:
            usual = UsualHeaders(self._opened, self._num_bytes, self._next)
            count = 0
            for members in usual:
                yield members
                count += len(members)
            if count:
                self._next, self._last = usual.next, usual.last
            run = 1 if count >= MIN_RUN else min(2 * run, MAX_RUN)
            if self._next + BLOCK > self._num_bytes:
                # tarfile looks back whether the bytes of the last member are there.
                yield list(self._by_tarfile(self._last, None))
            elif usual.header == bytes(BLOCK):
                self._end(self._next)
            else:
                yield list(self._by_tarfile(None, run))

    def _by_tarfile(self, again: int | None, limit: int | None) -> Iterator[Member]:
        """Members from the next header on; with ``limit`` only so many, if the rest does not depend on them.

        again: where the last header begins, if that is to be read once more.
        """
        end = self._next
        self._opened.seek(self._next if again is None else again)
        try:
            with tarfile.open(fileobj=_SmallReads(self._opened), mode="r:") as archive:  # type: ignore[call-overload]
                if again is not None:
                    archive.next()
                count = 0
                while (member := archive.next()) is not None:
                    # tarfile remembers every member at a kilobyte each: gigabytes for millions of samples.
                    archive.members.clear()  # type: ignore[attr-defined]
                    if not 0 <= member.size <= MAX_MEMBER:
                        raise ValueError(f"size {member.size} of {member.name!r}")
                    at = archive.offset  # type: ignore[attr-defined]
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    count += 1
                    if member.issparse():  # its bytes do not lie together
                        end = at
                    elif member.isfile():
                        yield member.name, member.offset_data, member.size
                    is_plain = end == at and not archive.pax_headers
                    if limit is not None and count >= limit and is_plain:
                        self._next, self._last = at, member.offset
                        return
        except TAR_ERRORS as error:
            self.damage = f"cannot be read as a tar file ({error}); write it again, uncompressed, or correct format"
            self._done = True
            return
        self._end(end)

    def _end(self, end: int) -> None:
        self._done = True
        self._opened.seek(end)
        # tarfile takes a truncated header for the end of the archive, but a complete archive ends with a block of zeros.
        if self._opened.read(BLOCK) != bytes(BLOCK):
            self.damage = f"breaks off after byte {end}; copy or write it again"
            return
        self.goes_on = bool(self._opened.read(WINDOW).strip(b"\0"))


class _SmallReads:
    """An open archive that reads no more than a header at a time."""

    def __init__(self, opened: IO[bytes]) -> None:
        self._opened = opened
        self.tell, self.seek = opened.tell, opened.seek

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._opened.read(size)


class UsualHeaders:
    """Iterates over lists of members from the header at ``next`` on, up to the first header that is not of the usual kind.

    next:   then where that header begins.
    last:   where the header of the last member begins, or its pax header.
    header: the block at ``next``, shorter where the file ends.
    """

    def __init__(self, opened: IO[bytes], num_bytes: int, place: int) -> None:
        self._opened = opened
        self._num_bytes = num_bytes
        self._window, self._begin = b"", place - NEAR
        # Of a local file: one call of the system instead of four of Python.
        self._descriptor = opened.fileno() if isinstance(opened, LocalFileOpener) else None
        self.next, self.last, self.header = place, 0, b""

    def __iter__(self) -> Iterator[list[Member]]:
        more = True
        while more:
            headers, found, more = self._batch()
            count = count_usual(headers)
            if count and found[count - 1] is None:
                count -= 1  # a pax header without its member
            if count < len(headers):
                member = found[count] or found[count + 1]
                assert member is not None
                more, self.next = False, member[3]
            if count:
                member = found[count - 1]
                assert member is not None
                self.last = member[3]
            yield [
                (member[0] or _name(header), member[1], member[2])
                for header, member in zip(headers[:count], found, strict=False)
                if member is not None
            ]
        self.header = self._block(self.next)

    def _batch(self) -> tuple[list[bytes], list[tuple[str, int, int, int] | None], bool]:
        """Headers that seem to be usual; the member of each and where its headers begin, without a name that is in the header, or
        None for a pax header, whose member comes next; and whether the batch is full."""
        headers: list[bytes] = []
        found: list[tuple[str, int, int, int] | None] = []
        place = start = self.next
        name = ""
        while len(headers) < BATCH:
            at = place - self._begin
            header = self._window[at : at + BLOCK]
            if len(header) < BLOCK:
                header = self._block(place)
                if len(header) < BLOCK:
                    break
            try:
                size = int(header[124:135], 8)
            except ValueError:
                break
            after = place + BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
            if header[156] == REGULAR:
                found.append((name, place + BLOCK, size, start))
                name, start = "", after
            elif header[156] == PAX and place == start:
                path = self._pax_name(place + BLOCK, size)
                if path is None:
                    break
                found.append(None)
                name = path
            else:
                break
            headers.append(header)
            place = after
        self.next = start
        if place != start:  # a pax header, whose member did not follow
            del headers[-1], found[-1]
        return headers, found, len(headers) >= BATCH - 1

    def _block(self, place: int) -> bytes:
        """The header at ``place``."""
        is_near = place + BLOCK - self._begin - len(self._window) < NEAR
        self._window, self._begin = self._read(place, WINDOW if is_near else BLOCK), place
        return self._window[:BLOCK]

    def _read(self, place: int, size: int) -> bytes:
        if self._descriptor is not None:
            return os.pread(self._descriptor, size, place)
        self._opened.seek(place)
        return self._opened.read(size)

    def _pax_name(self, place: int, size: int) -> str | None:
        """The path in the pax header whose records begin there, "" if it has none; None if it may hold more than that."""
        at = place - self._begin
        records = self._window[at : at + size] if at + size <= len(self._window) else None
        if records is None:
            records = self._read(place, size) if size <= MAX_PAX else b""
        padding = self._read_padding(place, size)
        if len(records) < size or padding or b"hdrcharset" in records:
            return None
        name = ""
        while records:
            number, _, rest = records.partition(b" ")
            length = int(number) if number.isdigit() else 0
            keyword, sign, value = rest[: length - len(number) - 2].partition(b"=")
            is_record = len(number) + 1 < length <= len(records) and records[length - 1] == 10
            if not (is_record and sign and keyword in PAX_KEYWORDS):
                return None
            if keyword == b"path":
                name = _decoded_path(value)
                if not name:
                    return None
            records = records[length:]
        return name

    def _read_padding(self, place: int, size: int) -> bool:
        """Whether the bytes between the records and the next block are anything but zeros, or missing."""
        length = -size % BLOCK
        at = place + size - self._begin
        padding = self._window[at : at + length]
        if len(padding) < length:
            padding = self._read(place + size, length)
        return padding != bytes(length)


def _name(header: bytes) -> str:
    """The path of a member, as ``tarfile`` decodes it."""
    stop = header.find(0, 0, 100)
    name = header[: 100 if stop < 0 else stop].decode(ENCODING, "surrogateescape")
    if header[345]:
        return f"{header[345:500].partition(NUL)[0].decode(ENCODING, 'surrogateescape')}/{name}"
    return name


def _decoded_path(value: bytes) -> str:
    try:
        path = value.decode("utf-8")
    except UnicodeDecodeError:
        path = value.decode(ENCODING, "surrogateescape")
    return path.rstrip("/")


# Columns of the number fields: mode, uid, gid; mtime; major, minor. Where each begins among these columns.
NUMBERS = np.r_[100:124, 136:148, 329:345]
FIELDS = np.array([0, 8, 16, 24, 36, 44])
DIGITS = np.isin(np.arange(256), list(b"01234567"))
NUMERALS = DIGITS | np.isin(np.arange(256), list(b"\0 "))
POWERS = 8 ** np.arange(5, -1, -1)


def count_usual(headers: list[bytes]) -> int:
    """How many headers, from the first on, have octal numbers in all fields and a right checksum."""
    rows = np.frombuffer(b"".join(headers), dtype=np.uint8).reshape(-1, BLOCK)
    is_digit = DIGITS[rows[:, 124:154]]
    # The size: 11 digits and a blank. The checksum: 6 digits, then blanks.
    right = is_digit[:, :11].all(axis=1) & is_digit[:, 24:].all(axis=1)
    right &= np.isin(rows[:, [135, 154, 155]], (0, 32)).all(axis=1)
    # The others: digits that nothing interrupts, between blanks.
    numbers = rows[:, NUMBERS]
    begins = DIGITS[numbers]
    begins[:, 1:] &= ~begins[:, :-1] | np.isin(np.arange(1, len(NUMBERS)), FIELDS)
    right &= NUMERALS[numbers].all(axis=1)
    right &= (np.add.reduceat(begins, FIELDS, axis=1, dtype=np.int64) <= 1).all(axis=1)
    sums = rows.sum(axis=1, dtype=np.uint32) - rows[:, 148:156].sum(axis=1, dtype=np.uint32)
    stored = (rows[:, 148:154].astype(np.int64) - ord("0")) @ POWERS
    right &= sums.astype(np.int64) + 8 * ord(" ") == stored
    return int(right.argmin()) if not right.all() else len(right)
