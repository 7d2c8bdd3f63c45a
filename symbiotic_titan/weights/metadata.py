"""The metadata of a distributed checkpoint that a stranger may have made: nothing in it is run.

torch.distributed.checkpoint unpickles ``.metadata``, and a pickle may call any function of any module. Here an interpreter reads the few
opcodes that metadata are written with. It knows the classes below by their whole names, makes them itself of values whose types it has
checked, and imports and calls nothing.

What names anything else is refused with ``UnsafeContent``, not passed over like a damaged checkpoint: it did not come about by accident,
and whoever would go on from the checkpoint before it should know that someone has changed the folder.

Time and memory grow with the length of the file, whatever it says: dict keys are checked before they are hashed, for the hash of nested
tuples takes exponential time; no number in it reserves memory; and tensors are as large as their chunks, which lie in the files.
"""

import gc
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache, partial
from itertools import islice
from math import prod
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

_SHOWN = 100  # characters of a name in a message
_MAX_DIMS = 64  # of a tensor of torch

REMEDY = "nothing of it was run; remove the folder, or take the checkpoint from a source you trust"


class UnsafeContent(ValueError):
    """A file names a function or class that checkpoints have no use for, and that may do harm where it is called."""


# ---- what may stand in .metadata ------------------------------------------------------------------------------------------


class _Call:
    """A function or class that a pickle calls. ``make`` gets the arguments and checks them."""

    def __init__(self, make: Callable[[tuple[Any, ...]], Any]) -> None:
        self.make = make


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _size(arguments: tuple[Any, ...]) -> torch.Size:
    (sizes,) = arguments
    if type(sizes) is not tuple or len(sizes) > _MAX_DIMS or not all(map(_is_count, sizes)):
        raise ValueError("a size in it is not one of a tensor")
    return torch.Size(sizes)


def _memory_format(arguments: tuple[Any, ...]) -> _MEM_FORMAT_ENCODING:
    (value,) = arguments
    if not _is_count(value):
        raise ValueError("a memory format must be a number")
    return _MEM_FORMAT_ENCODING(value)


def _member(arguments: tuple[Any, ...]) -> _MEM_FORMAT_ENCODING:
    """``getattr``, by which Python 3.11.0 to 3.11.3 pickles the member of an enumeration; of no other object."""
    owner, name = arguments
    if owner is not _MEMORY_FORMAT or type(name) is not str:
        raise UnsafeContent("names 'builtins.getattr' of something other than a memory format")
    return _MEM_FORMAT_ENCODING[name]


def _layout(arguments: tuple[Any, ...]) -> torch.layout:
    if arguments != ("torch.strided",):
        raise ValueError("a layout must be torch.strided")
    return torch.strided


_MEMORY_FORMAT = _Call(_memory_format)

_NAMES: dict[tuple[str, str], Any] = {
    **{("torch", str(d).partition(".")[2]): d for d in vars(torch).values() if isinstance(d, torch.dtype)},
    ("torch", "Size"): _Call(_size),
    ("torch.serialization", "_get_layout"): _Call(_layout),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): _MEMORY_FORMAT,
    ("builtins", "getattr"): _Call(_member),
    # Where the run saved it; not read, and therefore no path.
    ("pathlib", "PosixPath"): _Call(lambda parts: None),
}  # fmt: skip
"""(module, name) -> what stands for it."""


def _is_index(state: Mapping[str, Any]) -> bool:
    return (
        type(state.get("fqn")) is str
        and type(state.get("offset")) in (torch.Size, NoneType)
        and type(state.get("index")) in (int, NoneType)
    )


def _is_place(state: Mapping[str, Any]) -> bool:
    return (
        type(state.get("relative_path")) is str
        and _is_file_name(state["relative_path"])
        and _is_count(state.get("offset"))
        and _is_count(state.get("length"))
        and not state.get(
            "transform_descriptors"
        )  # of compression, which our checkpoints do not have
    )


@lru_cache
def _is_file_name(name: str) -> bool:
    """Whether a file of this name lies in the checkpoint's folder, and nowhere else."""
    return name.isprintable() and name not in ("", "..") and name == Path(name).name


def _is_chunk(state: Mapping[str, Any]) -> bool:
    offsets, sizes = state.get("offsets"), state.get("sizes")
    return type(offsets) is type(sizes) is torch.Size and len(offsets) == len(sizes)


def _is_tensor(state: Mapping[str, Any]) -> bool:
    return (
        type(state.get("properties")) is TensorProperties
        and type(state.get("size")) is torch.Size
        and type(state.get("chunks")) is list
    )


_FILLED: dict[type, Callable[[Mapping[str, Any]], bool]] = {
    MetadataIndex: _is_index,
    _StorageInfo: _is_place,
    ChunkStorageMetadata: _is_chunk,
    TensorStorageMetadata: _is_tensor,
    # ``_checked`` takes of these what loading uses.
    StorageMeta: lambda state: True,
    Metadata: lambda state: True,
}
"""Class -> whether an object can have these fields. What is in lists and dicts is checked at the end: until then they grow."""

_FIELDS = {cls: {f.name for f in fields(cls)} for cls in _FILLED}
_CLASSES = {*_FILLED, TensorProperties, BytesStorageMetadata}
_NAMES |= {(cls.__module__, cls.__qualname__): cls for cls in _CLASSES}


def _checked(top: Any) -> Metadata:
    """``top``, with what loading needs and nothing else."""
    if type(top) is not Metadata:
        raise ValueError(f"it holds a {type(top).__name__}")
    entries, places = vars(top).get("state_dict_metadata"), top.storage_data
    if type(entries) is not dict or type(places) is not dict:
        raise ValueError("it has no tables of entries and of their places")
    for name, entry in entries.items():
        if type(name) is not str or not name.isprintable():
            raise ValueError("an entry has a name that is none")
        if type(entry) not in (TensorStorageMetadata, BytesStorageMetadata):
            raise ValueError("an entry is neither a tensor nor bytes")
    tensors = {name: e for name, e in entries.items() if type(e) is TensorStorageMetadata}
    if len({id(entry.chunks) for entry in tensors.values()}) < len(tensors):
        raise ValueError("two tensors have the same chunks")
    for name, entry in tensors.items():
        _check_tensor(name[:_SHOWN], entry)
    for index, place in places.items():
        if type(index) is not MetadataIndex or type(place) is not _StorageInfo:
            raise ValueError("it has something else than the places of entries")
        if index.fqn not in entries:
            raise ValueError(f"it has a place of {index.fqn[:_SHOWN]!r}, which is no entry")
    version = top.version if type(top.version) is str else None
    return Metadata(entries, storage_data=places, version=version)


def _check_tensor(name: str, entry: TensorStorageMetadata) -> None:
    if not all(type(chunk) is ChunkStorageMetadata for chunk in entry.chunks):
        raise ValueError(f"its entry {name!r} has other chunks than those of tensors")
    if any(len(c.offsets) != len(entry.size) for c in entry.chunks) or sum(
        prod(chunk.sizes) for chunk in entry.chunks
    ) != prod(entry.size):
        raise ValueError(
            f"its entry {name!r} of shape {tuple(entry.size)} has chunks of other sizes"
        )


# ---- the interpreter ------------------------------------------------------------------------------------------------------


class _Machine:
    """An interpreter's state. bytes: those to come; starts: where on the stack the contents of a tuple, list or dict begin; memo: values
    in the order in which they were remembered; unfilled: how many objects lack their fields."""

    def __init__(self, data: bytes) -> None:
        self.bytes, self.unfilled = iter(data), 0
        self.stack: list[Any] = []
        self.starts: list[int] = []
        self.memo: list[Any] = []

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        taken = bytes(islice(self.bytes, count))
        if len(taken) < count:
            raise ValueError("it breaks off")
        return taken

    def word(self) -> int:
        """The integer of the next four bytes. The commonest operations are written for speed."""
        coming = self.bytes
        return next(coming) | next(coming) << 8 | next(coming) << 16 | next(coming) << 24

    def line(self) -> str:
        return bytes(iter(self.bytes.__next__, ord("\n"))).decode("utf-8", "replace")

    def since_mark(self) -> list[Any]:
        start = self.starts.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def last(self, count: int) -> tuple[Any, ...]:
        items = tuple(self.stack[-count:])
        if len(items) < count:
            raise ValueError("a tuple in it lacks values")
        del self.stack[-count:]
        return items

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError("values in it are appended to something other than a list")
        target.extend(items)

    def set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("items in it are set in something other than a dict")
        for i in range(0, len(items), 2):
            key = items[i]
            if type(key) is not str and not (type(key) is MetadataIndex and key.__dict__):
                raise ValueError("a key in it is neither a name nor a chunk's")
            target[key] = items[i + 1]  # hashed here, so checked before

    def call(self) -> Any:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Call or type(arguments) is not tuple:
            raise ValueError("something other than a function is called in it")
        return function.make(arguments)

    def new(self) -> Any:
        arguments, cls = self.stack.pop(), self.stack.pop()
        if not isinstance(cls, type) or arguments != ():
            raise ValueError("something other than a class is made in it")
        self.unfilled += cls is not BytesStorageMetadata
        return object.__new__(cls)

    def fill(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        cls = type(target)
        if cls not in _CLASSES or target.__dict__:
            raise ValueError("fields in it are set of something other than a new object")
        if cls is TensorProperties:
            _fill_properties(target, state)
        elif state and type(state) is dict and state.keys() <= _FIELDS[cls] and _FILLED[cls](state):
            target.__dict__.update(state)
        else:
            raise ValueError(f"the fields of a {cls.__name__} in it are others")
        self.unfilled -= 1


def _fill_properties(target: TensorProperties, state: Any) -> None:
    kinds = (torch.dtype, torch.layout, bool, _MEM_FORMAT_ENCODING, bool)
    if type(state) is not tuple or tuple(map(type, state)) != kinds:
        raise ValueError("the properties of a tensor in it are others")
    target.__setstate__(state)


def _named(module: Any, name: Any) -> Any:
    if not (type(module) is type(name) is str):
        raise ValueError("a name in it is no text")
    if (module, name) not in _NAMES:
        raise UnsafeContent(
            f"names {f'{module}.{name}'[:_SHOWN]!r}, which checkpoints have no use for"
        )
    return _NAMES[module, name]


def _operations(m: _Machine) -> dict[int, Callable[[], Any]]:
    """Opcode -> what it does to ``m``."""
    coming, stack, memo, push = m.bytes, m.stack, m.memo, m.stack.append
    operations: dict[bytes, Callable[[], Any]] = {
        pickle.PROTO: lambda: m.take(1),
        pickle.FRAME: lambda: m.take(8),
        pickle.BINGET: lambda: push(memo[next(coming)]),
        pickle.LONG_BINGET: lambda: push(memo[m.word()]),
        pickle.NONE: partial(push, None),
        pickle.NEWTRUE: partial(push, True),
        pickle.NEWFALSE: partial(push, False),
        pickle.BININT: lambda: push((m.word() ^ 2**31) - 2**31),
        pickle.BININT1: lambda: push(next(coming)),
        pickle.BININT2: lambda: push(next(coming) + 256 * next(coming)),
        pickle.LONG1: lambda: push(int.from_bytes(m.take(next(coming)), "little", signed=True)),
        pickle.SHORT_BINUNICODE: lambda: push(m.take(next(coming)).decode()),
        pickle.BINUNICODE: lambda: push(m.take(m.word()).decode()),
        pickle.EMPTY_TUPLE: partial(push, ()),
        pickle.EMPTY_LIST: lambda: push([]),
        pickle.EMPTY_DICT: lambda: push({}),
        pickle.MARK: lambda: m.starts.append(len(stack)),
        pickle.TUPLE: lambda: push(tuple(m.since_mark())),
        pickle.TUPLE1: lambda: push((stack.pop(),)),
        pickle.TUPLE2: lambda: push(m.last(2)),
        pickle.TUPLE3: lambda: push(m.last(3)),
        pickle.APPEND: lambda: m.append([stack.pop()]),
        pickle.APPENDS: lambda: m.append(m.since_mark()),
        pickle.SETITEM: lambda: m.set([stack.pop(-2), stack.pop()]),
        pickle.SETITEMS: lambda: m.set(m.since_mark()),
        pickle.STACK_GLOBAL: lambda: push(_named(stack.pop(-2), stack.pop())),
        # Of older protocols, which no checkpoint is written with: to say what an unsafe one names.
        pickle.GLOBAL: lambda: push(_named(m.line(), m.line())),
        pickle.INST: lambda: push(_named(m.line(), m.line())),
        pickle.REDUCE: lambda: push(m.call()),
        pickle.NEWOBJ: lambda: push(m.new()),
        pickle.BUILD: m.fill,
    }
    return {opcode[0]: operation for opcode, operation in operations.items()}


def _value_of(data: bytes) -> Any:
    m = _Machine(data)
    operations = _operations(m)
    memoize, remember, stack = pickle.MEMOIZE[0], m.memo.append, m.stack
    for opcode in m.bytes:
        if opcode == memoize:  # a third of all
            remember(stack[-1])
        elif opcode in operations:
            operations[opcode]()
        elif opcode == pickle.STOP[0]:
            break
        else:
            raise ValueError(f"it has the opcode {opcode}, which metadata are not written with")
    else:
        raise ValueError("it breaks off")
    if m.unfilled:
        raise ValueError("an object in it lacks its fields")
    return m.stack.pop()


@contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage collection: it would walk the growing metadata again and again, for five times as long as reading them takes."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def metadata_of(data: bytes) -> Metadata:
    """The metadata of a distributed checkpoint from the bytes of its ``.metadata``: entries and where they are, without what loading
    does not use. Takes 2.6 times as long as pickle.

    Raises:
        UnsafeContent: they name a function or class other than those of metadata.
        ValueError: they are damaged.
    """
    with _without_collection():
        try:
            return _checked(_value_of(data))
        except ValueError:
            raise
        except StopIteration:
            raise ValueError("it breaks off") from None
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
            raise ValueError(f"it is damaged, {type(error).__name__}") from None


def load_metadata(folder: Path, data: bytes | None = None) -> Metadata:
    """The metadata of the checkpoint ``folder``, in ``data``, or in its file. All that reads a distributed checkpoint gets them here.

    Raises:
        UnsafeContent: they name a function or class other than those of metadata; the message names the file.
        ValueError: they are damaged.
        OSError: the file cannot be read.
    """
    try:
        return metadata_of((folder / ".metadata").read_bytes() if data is None else data)
    except UnsafeContent as error:
        raise UnsafeContent(f"checkpoint {folder}: its .metadata {error}: {REMEDY}") from None
