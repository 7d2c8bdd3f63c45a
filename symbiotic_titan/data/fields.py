"""Fields of a sample, ``image``, ``caption`` and so on, and what can be wrong with them.

A source's ``keys`` map fields to the names that its own samples have: tar members by extension, keys of the JSON object or
Parquet columns. A name that no sample has may lead into a table by its dots: ``meta.json.caption`` is the key ``caption`` of
the member ``meta.json``, ``image.bytes`` a field of a column.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any, Protocol

from symbiotic_titan.data.formats.shard import BadSample, Sample, brief, load_json
from symbiotic_titan.sequence.tasks import DRAWN_FIELDS, FIELDS, IMAGE_EXTENSIONS, IMAGE_KEYS, Task

# Extension of the member with the latents of an image, in shards of a latent cache.
CACHED_EXTENSION = "safetensors"

# Names of what a sample may have and no task reads, so that to leave it out would train something else than the sample.
MEDIA = ("video", "videos", "audio", "audios")
PREFERENCE_PAIR = ("chosen", "rejected")
_UNREAD, _IMAGE_NAMES = frozenset((*MEDIA, *PREFERENCE_PAIR)), frozenset(IMAGE_EXTENSIONS)

Keys = Mapping[str, str | list[str]]

# What is chosen, e.g. "caption" -> a number in [0, 1) for it.
Draw = Callable[[str], float]


def first_of_all(what: str) -> float:
    """A ``Draw`` that always chooses the first."""
    return 0.0


class ReadsImages(Protocol):
    """What fields need of ``image_files.ImageFiles``."""

    def read(self, value: Any, members: Mapping[str, Any]) -> bytes: ...

    def pages(self, data: bytes, number: int) -> list[bytes]: ...


class Fields:
    """The values of ``sample`` by field.

    files:  reads its images; None where only other fields are asked for.
    draw:   chooses among several captions of the sample.
    """

    def __init__(
        self,
        sample: Sample,
        keys: Keys,
        *,
        files: ReadsImages | None = None,
        draw: Draw = first_of_all,
    ) -> None:
        """Raises BadSample: the JSON object cannot be read."""
        self.sample = sample
        self.keys = keys
        self.draw = draw
        self.files = files
        self._values = sample.members
        if isinstance(sample.members.get("json"), bytes):
            self._values = parse_json(sample.members["json"]) | sample.members

    @property
    def names(self) -> Set[str]:
        """The sample's own names."""
        return self._values.keys()

    def named(self, name: str) -> Any:
        """The value of the sample's own ``name``, or None."""
        return _look_up(self._values, name)

    def get(self, field: str) -> Any:
        """The value of ``field``, or None. Where ``keys`` give it several names: the values of all that the sample has, in a list."""
        names = names_of(field, self.keys)
        if isinstance(self.keys.get(field), list):
            values = [value for name in names if (value := self.named(name)) is not None]
            return [text for value in values for text in alternatives(value)] or None
        for name in names:
            if (value := self.named(name)) is not None:
                return value
        return None

    def need(self, field: str) -> Any:
        """Raises BadSample: there is none."""
        value = self.get(field)
        if value is None:
            raise self._missing(field)
        return value

    def text(self, field: str) -> str:
        """The text of ``field``, or one of several texts that it holds.

        Raises BadSample: there is none, or it is no text.
        """
        value, name = self.several(field), self._shown(field)
        if field in DRAWN_FIELDS and isinstance(value, list):
            return self.one_of(value, name, field)
        return as_text(value, name)

    def several(self, field: str) -> Any:
        """The value of ``field``; a list where it may be chosen from. Raises BadSample: there is none."""
        value = self.need(field)
        if field != "caption":
            return value
        texts = alternatives(value)
        return texts if isinstance(texts, list) and texts != [value] else value

    def one_of(self, texts: list[Any], name: str, what: str) -> str:
        """One of ``texts``, as ``draw`` chooses for ``what``; None and empty ones are left out. Raises BadSample: there is no text."""
        there = [text for text in texts if text not in (None, "", b"")]
        good = [text for text in there if not isinstance(text, str) or text.strip()]
        if not good:
            raise BadSample("empty", f"{name} is empty")
        chosen = [as_text(text, f"each text of {name}") for text in good]
        return chosen[int(self.draw(what) * len(chosen))]

    def _shown(self, field: str) -> str:
        named = self.keys.get(field, field)
        return " or ".join(map(repr, named)) if isinstance(named, list) else repr(named)

    def image_values(self, field: str = "image") -> list[Any]:
        """What the sample has for each of its images; none where it has no image.

        Raises:
            BadSample: some of them are null.
        """
        members = self._image_members() if field == "image" else []
        if len(members) > 1:
            return [self._values[name] for name in members]
        values = self.get(field)
        if isinstance(values, bytes):  # as in most samples
            return [values]
        values = rows_of(values)
        if isinstance(values, str) and values.lstrip().startswith("["):
            values = _from_json(values)
        values = values if isinstance(values, list) else [values]
        if len(values) > 1 and all(isinstance(value, (int, list)) for value in values):
            raise BadSample("wrong_type", "its image is a list of numbers; it must be encoded")
        there = [value for value in values if not _is_null(value)]
        if there and len(there) < len(values):
            raise BadSample(
                "missing", f"{len(values) - len(there)} of its {len(values)} images are null"
            )
        return there

    def _image_members(self) -> list[str]:
        """Extensions of the images in the sample's part of a tar file, unless ``keys`` name one."""
        if "image" in self.keys:
            return []
        names = _IMAGE_NAMES.intersection(self._values)
        found = [name for name in names if isinstance(self._values[name], bytes)]
        return found if len(found) < 2 else sorted(found, key=IMAGE_EXTENSIONS.index)

    def images(self) -> list[bytes]:
        """Encoded images of the field ``image``, in order; raises BadSample where one cannot be read."""
        return [self.image_bytes(value) for value in self.image_values()]

    def some_image_values(self) -> list[Any]:
        """As ``image_values``; raises BadSample where there is none."""
        values = self.image_values()
        if not values:
            raise self._missing("image")
        if len(values) > 1 and len(members := self._image_members()) > 1:
            several = " and ".join(map(repr, members))
            raise BadSample(
                "wrong_type", f'it has {several}; name one: keys = {{image = "{members[0]}"}}'
            )
        return values

    def image(self) -> bytes:
        """Raises BadSample: there is none, or more than one."""
        values = self.some_image_values()
        if len(values) > 1:
            raise BadSample("wrong_type", f"it has {len(values)} images, one is expected")
        return self.image_bytes(values[0])

    def image_bytes(self, value: Any) -> bytes:
        """Encoded image that ``value`` holds or names, see ``ImageFiles.read``; a string may also name a member of the sample."""
        assert self.files is not None, "fields made without files read no images"
        return self.files.read(value, self._values)

    def _missing(self, field: str) -> BadSample:
        names = names_of(field, self.keys)
        null = [name for name in names if name in self.names and self.named(name) is None]
        if null:
            return BadSample("missing", f"its {field} is missing: {null[0]!r} is null")
        found = ", ".join(sorted(self.names)) or "no column that this task reads"
        return BadSample(
            "missing", f"its {field} is missing: there is no {_joined(names)} but {found}"
        )


def own_image(item: Mapping[str, Any]) -> Any:
    """What ``item`` holds or names as its image, or None."""
    return next((item[key] for key in IMAGE_KEYS if item.get(key)), None)


def names_of(field: str, keys: Keys) -> tuple[str, ...]:
    """The names under which a source may hold ``field``."""
    if field not in keys:
        return FIELDS[field]
    named = keys[field]
    return (named,) if isinstance(named, str) else tuple(named)


def _joined(names: tuple[str, ...]) -> str:
    """``names`` in a message; of the many extensions of images only the first."""
    more = " or the like" if len(names) > 6 else ""
    return " or ".join(map(repr, names[:6])) + more


def _is_null(value: Any) -> bool:
    """Whether ``value`` is null, or a table of nulls, as which some writers of Parquet store it."""
    if isinstance(value, dict):
        return all(inner is None for inner in value.values())
    return value is None


def names_wanted(task: Task, keys: Keys) -> list[str]:
    """All names that samples of ``task`` are read by, dots included."""
    fields = {"image", *task.fields}
    return [
        *(name for field in fields for name in names_of(field, keys)),
        *(MEDIA if task.has_images else ()),
        *PREFERENCE_PAIR,
    ]


def refuse_unread(task: Task, fields: Fields) -> None:
    """Refuse a sample that has more than ``task`` can train.

    Raises:
        BadSample: it has a video or sound, or is a pair of a preferred and a rejected conversation.
    """
    if _UNREAD.isdisjoint(fields.names):
        return
    unread = [name for name in (*MEDIA, *PREFERENCE_PAIR) if not is_empty(fields.named(name))]
    named = {name for field in fields.keys for name in names_of(field, fields.keys)}
    for name in unread:
        if name in MEDIA and task.has_images and name not in named:
            kind = name.removesuffix("s")
            raise BadSample("wrong_type", f"{kind} is not supported, and it has {name!r}")
    pair = [name for name in PREFERENCE_PAIR if name in unread]
    if pair == list(PREFERENCE_PAIR) and not named & set(pair) and "messages" in task.fields:
        raise BadSample(
            "conversation",
            'it is a pair of answers, chosen and rejected; name what is trained: keys = {messages = "chosen"}',
        )


def is_empty(value: Any) -> bool:
    """Whether ``value`` holds nothing: null, an empty text, list or table, or a list of nulls. JSON text of these as well."""
    if value is None:
        return True
    if isinstance(value, str) and value.strip() in ("[]", "{}", "null", ""):
        return True
    if isinstance(value, dict):
        return all(is_empty(inner) for inner in value.values())
    return not value or (isinstance(value, list) and all(inner is None for inner in value))


def alternatives(value: Any) -> list[Any]:
    """The texts of a caption field: the only one, or those of a list or table, which may be JSON text."""
    if isinstance(value, bytes) and value.lstrip()[:1] in (b"[", b"{"):
        value = as_text(value, "its caption")
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = _from_json(value)
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else [value]


def _from_json(text: str) -> Any:
    """What ``text`` is JSON of; ``text`` itself where it is none."""
    try:
        return load_json(text)
    except (ValueError, RecursionError):
        return text


def rows_of(value: Any) -> Any:
    """``value``; a table of lists of one length, as ``datasets`` makes of a list of tables, becomes that list again."""
    if not isinstance(value, dict):
        return value
    columns = {name: column for name, column in value.items() if column is not None}
    lists = [column for column in columns.values() if isinstance(column, list)]
    if not lists or len(lists) < len(columns) or len({len(column) for column in lists}) > 1:
        return value
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def items_of(value: Any, name: str) -> list[Any]:
    """A list, a table of lists, or JSON text of one of these, that is not empty; raises BadSample."""
    if isinstance(value, (str, bytes)):
        try:
            value = load_json(value)
        except (ValueError, RecursionError) as error:
            raise BadSample("json", f"its {name} cannot be parsed ({error})") from error
    value = rows_of(value)
    if not isinstance(value, list):
        raise BadSample("wrong_type", f"its {name} must be a list, got {brief(value)}")
    if not value:
        raise BadSample("empty", f"its {name} are empty")
    return value


def parse_json(data: bytes | str) -> dict[str, Any]:
    """The JSON object in ``data``; raises BadSample."""
    try:
        value = load_json(data)
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
            value = value.decode("utf-8-sig")  # editors of Windows begin a file with U+FEFF
        except UnicodeDecodeError as error:
            raise BadSample("encoding", f"{name} is not UTF-8 ({error})") from error
    if not isinstance(value, str):
        raise BadSample("wrong_type", f"{name} must be a string, got {brief(value)}")
    if not value.strip():
        raise BadSample("empty", f"{name} is empty")
    return value.encode("utf-8", errors="replace").decode("utf-8")


def _look_up(values: dict[str, Any], name: str) -> Any:
    """The value of ``name``, or None: that very name first, then the longest start of it that leads into a table."""
    if name in values or "." not in name:
        return values.get(name)
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


def schemas_of(task: Task, keys: Keys) -> tuple[tuple[str, ...], ...]:
    """The schemas that samples of ``task`` may have; where a source's ``keys`` name a field, those with such a field."""
    if not keys:
        return task.schemas
    named = tuple(s for s in task.schemas if any(f in keys for f in s if f != "image"))
    return named or task.schemas


def schema_of(task: Task, fields: Fields) -> tuple[str, ...]:
    """The first schema whose last field the sample has; the first of all where it has none."""
    schemas = schemas_of(task, fields.keys)
    if len(schemas) == 1:
        return schemas[0]
    return next((s for s in schemas if fields.get(s[-1]) is not None), schemas[0])


def check_fields(task: Task, keys: Keys, names: Iterable[str], where: str) -> None:
    """Refuse a source without the fields that ``task`` needs. ``names``: all names that its samples have.

    Raises:
        ValueError: names the field, where it was looked for and what was found; ``where`` (the config row) leads the message.
    """
    found = set(names)
    schemas = schemas_of(task, keys)
    possible = [schema for schema in schemas if _may_be_in(names_of(schema[-1], keys), found)]
    for field in (*(possible or schemas)[0], *keys):
        wanted = names_of(field, keys)
        # Several names in ``keys`` must all be there, and one of those that a field has by itself.
        choices = [(name,) for name in wanted] if field in keys else [wanted]
        missing = next((names for names in choices if not _may_be_in(names, found)), None)
        if missing is None or (field == "image" and CACHED_EXTENSION in found):
            continue
        key = f"keys.{field}" if field in keys else f"its {field}"
        raise ValueError(
            f"{where}: {key} is looked for as {_joined(missing)}, which no sample has; there are: "
            f'{", ".join(sorted(found))}. Name the right one: keys = {{{field} = "..."}}'
        )


def _may_be_in(wanted: tuple[str, ...], found: set[str]) -> bool:
    """Whether one of the ``wanted`` names is among those ``found``, or may lead into one whose contents are not known."""
    opaque = found - {head for name in found for head, _ in dotted(name)}
    return any(name in found or any(head in opaque for head, _ in dotted(name)) for name in wanted)
