"""Parts that a config chooses by name, ours and those that a user's own module registers."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from importlib import import_module
from typing import Any, Generic, Literal, TypeVar

T = TypeVar("T")

# Key of a config field's metadata: the registry that its value names a part of.
_REGISTRY = "registry"


def load_part(address: str) -> Any:
    """The attribute that ``"package.module:attribute"`` names, imported now."""
    module, _, attribute = address.partition(":")
    return getattr(import_module(module), attribute)


def _origin(part: object) -> str:
    """The module of a function or class, or that of the object's class."""
    return str(getattr(part, "__module__", type(part).__module__))


class Registry(Generic[T]):
    """Name -> part, for one key of the config. Iterates over names: built-in ones in their order, then those registered, in theirs.

    A user's module, named in ``experimental.custom_import``, registers its parts before the config is read.

    Args:
        key: what messages call the choice, e.g. ``latents.codec``.
        built_in: name -> address of the part (``"package.module:attribute"``), which is imported when it is first asked for. The
            only place where the name of a part of ours is written.
    """

    def __init__(self, key: str, built_in: Mapping[str, str] | None = None) -> None:
        self.key = key
        self._parts: dict[str, T | str] = dict(built_in or {})
        self._unloaded = set(self._parts)

    def register(self, name: str, part: T) -> T:
        """Make ``part`` known under ``name``. Registering the same part again changes nothing.

        Raises:
            ValueError: the name is empty, or another part has it.
        """
        self.check_name(name)
        if name not in self._parts:
            self._parts[name] = part
        elif self[name] is not part:
            raise ValueError(
                f"{self.key}: {name!r} is already registered by {_origin(self[name])}; choose another name"
            )
        return part

    def check_name(self, name: object) -> None:
        """Pass if a part can have this name.

        Raises:
            ValueError: it is no text without spaces. A part in its place was meant to be decorated.
        """
        if isinstance(name, str) and name and name.split() == [name]:
            return
        hint = "; a decorator needs it in parentheses, as in @register_...('mine')"
        raise ValueError(
            f"{self.key}: the name of a part must be a text without spaces, got {name!r}{hint if callable(name) else ''}"
        )

    def check(self, where: str, name: object) -> None:
        """Pass if ``name`` is registered; ``where`` is the key as the user wrote it.

        Raises:
            ValueError: it is not.
        """
        if name not in self._parts:
            raise ValueError(
                f"{where} = {name!r}: nothing is registered under this name; choose from {', '.join(self)}, "
                "or name the module that registers it in experimental.custom_import"
            )

    def __getitem__(self, name: str) -> T:
        if name not in self._parts:
            self.check(self.key, name)
        part = self._parts[name]
        # A str that is a part was registered as such; another thread may have loaded it first.
        if isinstance(part, str) and name in self._unloaded:
            part = self._parts[name] = load_part(part)
            self._unloaded.discard(name)
        return part  # type: ignore[return-value]

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._parts))

    def __len__(self) -> int:
        return len(self._parts)

    @contextlib.contextmanager
    def temporarily(self, **parts: T) -> Iterator[None]:
        """For tests: ``parts`` are registered inside the frame; what was registered in it is forgotten at its end."""
        before, unloaded = dict(self._parts), set(self._unloaded)
        try:
            for name, part in parts.items():
                self.register(name, part)
            yield
        finally:
            self._parts, self._unloaded = before, unloaded


def choice(registry: Registry[Any], default: Any = MISSING) -> Any:
    """A field of a config class, of type ``str`` (or ``str | None``), whose value names a part of ``registry``."""
    return field(default=default, metadata={_REGISTRY: registry})


def registry_of(config_field: Field) -> Registry[Any] | None:
    """The registry whose parts the field names, if it was made by ``choice``."""
    return config_field.metadata.get(_REGISTRY)


def offer_choices(cls: type) -> None:
    """Let the command line of a config class, and of the sections in it, offer the names that are registered by now."""
    for f in fields(cls):
        registry = registry_of(f)
        if registry is not None:
            names: Any = Literal[tuple(registry)]  # type: ignore[valid-type]
            f.type = names if f.default is not None else names | None
            cls.__annotations__[f.name] = f.type
        elif isinstance(f.type, type) and is_dataclass(f.type):
            offer_choices(f.type)
