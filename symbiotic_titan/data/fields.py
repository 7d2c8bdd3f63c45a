"""Fields of a sample, ``image``, ``caption`` and so on, and what can be wrong with them.

A source's ``keys`` map fields to the names that its own samples have: tar members by extension, keys of the JSON object or
Parquet columns. A name that no sample has may lead into a table by its dots: ``meta.json.caption`` is the key ``caption`` of
the member ``meta.json``, ``image.bytes`` a field of a column.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import fsspec

from symbiotic_titan.data.formats.shard import BadSample, Sample
from symbiotic_titan.sequence.tasks import FIELDS, Task

# Extension of the member with the latents of an image, in shards of a latent cache.
CACHED_EXTENSION = "safetensors"


class Fields:
    """The values of ``sample`` by field."""

    def __init__(self, sample: Sample, keys: dict[str, str]) -> None:
        """Raises BadSample: the JSON object cannot be read."""
        self.sample = sample
        self._folder = sample.shard.rpartition("/")[0]
        self.keys = keys
        self._values = sample.members
        if isinstance(sample.members.get("json"), bytes):
            self._values = parse_json(sample.members["json"]) | sample.members

    @property
    def names(self) -> set[str]:
        """The sample's own names."""
        return set(self._values)

    def get(self, field: str) -> Any:
        """The value of ``field``, or None."""
        for name in names_of(field, self.keys):
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
        return as_text(self.need(field), repr(self.keys.get(field, field)))

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
        names = " or ".join(repr(name) for name in names_of(field, self.keys))
        found = ", ".join(sorted(self.names)) or "nothing"
        return BadSample("missing", f"its {field} is missing: there is no {names} but {found}")

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
    return (keys[field],) if field in keys else FIELDS[field]


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


def schemas_of(task: Task, keys: dict[str, str]) -> tuple[tuple[str, ...], ...]:
    """The schemas that samples of ``task`` may have; where a source's ``keys`` name a field, those with such a field."""
    named = tuple(s for s in task.schemas if any(f in keys for f in s if f != "image"))
    return named or task.schemas


def schema_of(task: Task, fields: Fields) -> tuple[str, ...]:
    """The first schema whose last field the sample has; the first of all where it has none."""
    schemas = schemas_of(task, fields.keys)
    return next((s for s in schemas if fields.get(s[-1]) is not None), schemas[0])


def check_fields(task: Task, keys: dict[str, str], names: Iterable[str], where: str) -> None:
    """Refuse a source without the fields that ``task`` needs. ``names``: all names that its samples have.

    Raises:
        ValueError: names the field, where it was looked for and what was found; ``where`` (the config row) leads the message.
    """
    found = set(names)
    schemas = schemas_of(task, keys)
    possible = [schema for schema in schemas if _may_be_in(names_of(schema[-1], keys), found)]
    for field in (*(possible or schemas)[0], *keys):
        wanted = names_of(field, keys)
        if _may_be_in(wanted, found) or (field == "image" and CACHED_EXTENSION in found):
            continue
        key = f"keys.{field}" if field in keys else f"its {field}"
        raise ValueError(
            f"{where}: {key} is looked for as {' or '.join(map(repr, wanted))}, which no sample has; there are: "
            f'{", ".join(sorted(found))}. Name the right one: keys = {{{field} = "..."}}'
        )


def _may_be_in(wanted: tuple[str, ...], found: set[str]) -> bool:
    """Whether one of the ``wanted`` names is among those ``found``, or may lead into one whose contents are not known."""
    opaque = found - {head for name in found for head, _ in dotted(name)}
    return any(name in found or any(head in opaque for head, _ in dotted(name)) for name in wanted)
