"""The fast walk over a tar file gives the members, and the damage, that ``tarfile`` alone gives."""

import io
import random
import tarfile
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_tar import PlainWalk

from symbiotic_titan.data.formats import tar_walk
from symbiotic_titan.data.formats.tar_walk import TarWalk
from tests.helpers.tar_files import tar_bytes

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
LONG = "folder/" * 12 + "x" * 60


def archive(members, form=tarfile.PAX_FORMAT, **fields):
    """A tar file of (name, length, kind, mtime)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, **fields) as tar:
        for name, length, kind, mtime in members:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.mtime = length, kind, mtime
            member.linkname = "target" if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE) else ""
            data = io.BytesIO(bytes(i % 251 for i in range(length)))
            tar.addfile(member, data if kind == tarfile.REGTYPE else None)
    return buffer.getvalue()


def plain(data):
    walk = PlainWalk(io.BytesIO(data))
    return [(m.name, m.offset_data, m.size) for m in walk], walk.damage


def fast(data):
    walk = TarWalk(io.BytesIO(data))
    return list(chain.from_iterable(walk)), walk.damage


names = st.sampled_from(
    ["0.png", "a/1.json", "ü.txt", LONG, "y" * 101, "z" * 260, "d/", "\udce4.x", "="]
)
kinds = st.sampled_from(
    [tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.AREGTYPE]
)
times = st.sampled_from([0, 1700000000, 1700000000.25, 2**36])
sizes = st.sampled_from([0, 1, 511, 512, 513, 1500])
archives = st.lists(st.tuples(names, sizes, kinds, times), max_size=12)  # fmt: skip


def tar_of(members, form):
    members = [(n, s if k == tarfile.REGTYPE else 0, k, t) for n, s, k, t in members]
    try:
        return archive(members, form)
    except ValueError:  # ustar holds no such name or time
        return archive(members, tarfile.PAX_FORMAT)


@settings(deadline=None, max_examples=200)
@given(archives, st.sampled_from(FORMATS))
def test_whole_archives_give_the_same_members(members, form):
    data = tar_of(members, form)
    assert fast(data) == plain(data)


@settings(deadline=None, max_examples=400)
@given(archives, st.sampled_from(FORMATS), st.data())
def test_damaged_archives_give_the_same_members_and_damage(members, form, data):
    content = bytearray(tar_of(members, form))
    used = max(1, content.rstrip(b"\0").__len__())
    for _ in range(data.draw(st.integers(0, 3))):
        # Mostly within headers: their fields of numbers, names and kinds.
        block = data.draw(st.integers(0, used // 512)) * 512
        place = min(block + data.draw(st.integers(0, 511)), len(content) - 1)
        content[place] = data.draw(st.sampled_from(list(b"\0 07/9x\x80\xffgLS=")))
        if data.draw(st.booleans()) and block + 512 <= len(content):
            header = content[block : block + 512]
            total = sum(header[:148]) + sum(header[156:]) + 256
            content[block + 148 : block + 156] = b"%06o\0 " % total
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, min(len(content), used + 1100)))]
    assert fast(bytes(content)) == plain(bytes(content))


@pytest.mark.parametrize("seed", range(4))
def test_batches_windows_and_runs_may_end_anywhere(monkeypatch, seed):
    generator = random.Random(seed)
    members = [
        (
            f"{i:05d}.txt" if generator.random() < 0.9 else f"{LONG}{i}",
            generator.choice([0, 100, 3000]),
            tarfile.REGTYPE,
            generator.choice([0, 0.5]),
        )
        for i in range(300)
    ]
    monkeypatch.setattr(tar_walk, "BATCH", 7)
    monkeypatch.setattr(tar_walk, "WINDOW", 4096)
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = archive(members, form)
        found, damage = fast(data)
        assert (found, damage) == plain(data) and len(found) == 300


def test_a_global_pax_header_holds_for_all_that_follow():
    members = [(f"{i}.txt", 10, tarfile.REGTYPE, 0) for i in range(5)]
    data = archive(members, pax_headers={"path": "all.txt"})
    found, damage = fast(data)
    assert (found, damage) == plain(data) and [name for name, *_ in found] == ["all.txt"] * 5


def test_base_256_sizes_and_old_sparse_files_are_left_to_tarfile():
    data = bytearray(
        archive([("0.txt", 700, tarfile.REGTYPE, 0), ("1.txt", 5, tarfile.REGTYPE, 0)])
    )
    data[124:136] = b"\x80" + (700).to_bytes(11, "big")
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 256)
    assert (
        fast(bytes(data)) == plain(bytes(data)) == ([("0.txt", 512, 700), ("1.txt", 2048, 5)], "")
    )


def test_few_headers_go_through_tarfile(monkeypatch):
    members = [(f"{i:04d}.jpg", 2000, tarfile.REGTYPE, i + 0.5) for i in range(500)]
    calls = []
    next_of = tarfile.TarFile.next
    monkeypatch.setattr(tarfile.TarFile, "next", lambda self: calls.append(1) or next_of(self))
    for form in FORMATS:
        found, _ = fast(archive(members, form))
        assert len(found) == 500
    assert not calls


def test_bytes_after_the_end_are_noticed():
    whole = tar_bytes([("0.txt", b"a")])
    for data, goes_on in ((whole, False), (whole + whole, True), (whole + bytes(5000), False)):
        walk = TarWalk(io.BytesIO(data))
        assert [name for name, *_ in chain.from_iterable(walk)] == ["0.txt"] and (
            walk.damage,
            walk.goes_on,
        ) == (
            "",
            goes_on,
        )
