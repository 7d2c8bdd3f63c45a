"""Parts that a config chooses by name, ours and those that a user's own module registers."""

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Name -> part, for one key of the config.

    A user's module, named in ``experimental.custom_import``, registers its parts before the config is checked.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._parts: dict[str, T] = {}

    def register(self, name: str, part: T) -> T:
        """Make ``part`` known under ``name``. Registering the same part again changes nothing.

        Raises:
            ValueError: another part has this name.
        """
        known = self._parts.setdefault(name, part)
        if known is not part:
            raise ValueError(
                f"{self.key}: {name!r} is already registered ({known!r}); choose another name"
            )
        return part

    def __getitem__(self, name: str) -> T:
        if name not in self._parts:
            raise ValueError(
                f"{self.key} = {name!r}: nothing is registered under this name; choose from {', '.join(self)}, "
                "or name the module that registers it in experimental.custom_import"
            )
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._parts))
