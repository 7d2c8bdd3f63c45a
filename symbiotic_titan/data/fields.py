"""A sample as named values, and what can be wrong with it.

A source's ``keys`` say which of its own names stands for ``image``, ``caption`` and so on. A name is looked for among the
sample's own ones (tar members by extension, keys of the JSON object, Parquet columns); where there is no such name, its dots
lead into tables: ``meta.json.caption`` is the key ``caption`` of the member ``meta.json``, ``image.bytes`` a field of a column.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import fsspec

from symbiotic_titan.config.data import TASK_FIELDS, DataSource
from symbiotic_titan.data.formats.shard import BadSample, Sample
from symbiotic_titan.data.latents import CACHED_EXTENSION

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")

# Where a field is looked for when the source's ``keys`` do not name it.
DEFAULT_NAMES = {
    "text": ("text", "txt"),
    "image": (*IMAGE_EXTENSIONS, "image", "images"),
    "caption": ("caption", "txt"),
    "question": ("question",),
    "answer": ("answer",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "segments": ("segments",),
}


class Fields:
    """The values of ``sample``, by the names that tasks have for them."""

    def __init__(self, sample: Sample, keys: dict[str, str]) -> None:
        """Raises BadSample: the JSON object cannot be read."""
        self.sample = sample
        self._folder = sample.shard.rpartition("/")[0]
        self._keys = keys
        self._values = sample.members
        if isinstance(sample.members.get("json"), bytes):
            self._values = parse_json(sample.members["json"]) | sample.members

    @property
    def names(self) -> set[str]:
        """The sample's own names."""
        return set(self._values)

    def get(self, field: str) -> Any:
        """The value of ``field``, or None."""
        for name in names_of(field, self._keys):
            value = _look_up(self._values, name)
            if value is not None:
                return value
        return None

    def need(self, field: str) -> Any:
        """Raises BadSample: there is none."""
        value = self.get(field)
        if value is None:
            raise self._missing(field)
        return value

    def text(self, field: str) -> str:
        """Raises BadSample: there is none, or it is no text."""
        return as_text(self.need(field), repr(self._keys.get(field, field)))

    def images(self) -> list[bytes]:
        """Encoded images of the field ``image``, in order; raises BadSample where one cannot be read."""
        value = self.get("image")
        values = value if isinstance(value, list) else [value]
        return [self.image_bytes(v) for v in values if v is not None]

    def some_images(self) -> list[bytes]:
        """Raises BadSample: there is none."""
        images = self.images()
        if not images:
            raise self._missing("image")
        return images

    def image(self) -> bytes:
        """Raises BadSample: there is none, or more than one."""
        images = self.some_images()
        if len(images) > 1:
            raise BadSample("wrong_type", f"it has {len(images)} images, one is expected")
        return images[0]

    def _missing(self, field: str) -> BadSample:
        names = " or ".join(repr(name) for name in names_of(field, self._keys))
        there = ", ".join(sorted(self.names)) or "nothing"
        return BadSample("missing", f"its {field} is missing: there is no {names} but {there}")

    def image_bytes(self, value: Any) -> bytes:
        """Encoded image that ``value`` holds or names: bytes, a member of the sample, a path relative to the shard's folder, or a
        table with ``bytes`` or ``path``, as Hugging Face datasets have it."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and isinstance(self._values.get(value), bytes):
            value = self._values[value]
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise BadSample("wrong_type", f"an image must be bytes or a path, got {value!r:.80}")
        return _read_file(value, self._folder)


def names_of(field: str, keys: dict[str, str]) -> tuple[str, ...]:
    """The names under which a source may hold ``field``."""
    return (keys[field],) if field in keys else DEFAULT_NAMES[field]


def parse_json(data: bytes | str) -> dict[str, Any]:
    """The JSON object in ``data``; raises BadSample."""
    try:
        value = json.loads(data)
    except UnicodeDecodeError as error:
        raise BadSample("encoding", f"its JSON cannot be parsed ({error})") from error
    except (ValueError, RecursionError) as error:
        raise BadSample("json", f"its JSON cannot be parsed ({error})") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise BadSample("json", f"its JSON must be an object, got {kind}")
    return value


def as_text(value: Any, name: str) -> str:
    """``value`` as text that UTF-8 can hold: a lone surrogate becomes a question mark. Raises BadSample."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSample("encoding", f"{name} is not UTF-8 ({error})") from error
    if not isinstance(value, str):
        raise BadSample("wrong_type", f"{name} must be a string, got {value!r:.80}")
    if not value.strip():
        raise BadSample("empty", f"{name} is empty")
    return value.encode("utf-8", errors="replace").decode("utf-8")


def _look_up(values: dict[str, Any], name: str) -> Any:
    """The value of ``name``, or None: that very name first, then the longest start of it that leads into a table."""
    if name in values:
        return values[name]
    for head, rest in dotted(name):
        value = values.get(head)
        if isinstance(value, (bytes, str)):
            value = parse_json(value)
        if isinstance(value, dict):
            return _look_up(value, rest)
    return None


def dotted(name: str) -> Iterator[tuple[str, str]]:
    """(head, rest) of ``name`` at each of its dots, from the last to the first."""
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:i]), ".".join(parts[i:])


def _read_file(path: str, folder: str) -> bytes:
    """Bytes of ``path``, which is relative to ``folder`` unless it starts at a root or is a URL."""
    if folder and not path.startswith("/") and "://" not in path:
        path = f"{folder}/{path}"
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise BadSample("unreadable", f"image {path} cannot be read ({error})") from error


def ways_of(source: DataSource) -> tuple[tuple[str, ...], ...]:
    """The sets of fields of which a sample of ``source`` must have one; ``keys`` choose those that they speak of."""
    ways = TASK_FIELDS[source.task]
    named = tuple(way for way in ways if any(f in source.keys for f in way if f != "image"))
    return named or ways


def way_of(source: DataSource, fields: Fields) -> tuple[str, ...]:
    """The first set of fields that the sample has; where it has none, the first."""
    ways = ways_of(source)
    return next((way for way in ways if fields.get(way[-1]) is not None), ways[0])


def check_fields(source: DataSource, names: Iterable[str], where: str) -> None:
    """Refuse a source none of whose samples has what its task needs. ``names``: all that are there.

    Raises:
        ValueError: names the field, where it was looked for and what is there; ``where`` (the config row) leads the message.
    """
    there = set(names)
    ways = [way for way in ways_of(source) if _may_be_there(source, way[-1], there)]
    for field in (*(ways or ways_of(source))[0], *source.keys):
        if _may_be_there(source, field, there) or (field == "image" and CACHED_EXTENSION in there):
            continue
        wanted = " or ".join(repr(name) for name in names_of(field, source.keys))
        key = f"keys.{field}" if field in source.keys else f"its {field}"
        raise ValueError(
            f"{where}: {key} is looked for as {wanted}, which no sample has; there are: "
            f'{", ".join(sorted(there))}. Name the right one: keys = {{{field} = "..."}}'
        )


def _may_be_there(source: DataSource, field: str, there: set[str]) -> bool:
    """Whether a name of ``field`` is there, or one that it may lead into, of which nothing is known."""
    opaque = there - {head for name in there for head, _ in dotted(name)}
    return any(
        name in there or any(head in opaque for head, _ in dotted(name))
        for name in names_of(field, source.keys)
    )
