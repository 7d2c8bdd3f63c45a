"""Parts from a user's module in a test, forgotten after it: a module registers its parts only when it is first imported."""

import contextlib
import sys
from collections.abc import Iterator

from symbiotic_titan.registry import Registry


@contextlib.contextmanager
def users_parts(*registries: Registry) -> Iterator[None]:
    """A frame in which no module of ``docs`` or named ``my_...`` is imported yet. At its end such modules are forgotten, and with
    them what was registered in ``registries``, which must be all that they register in."""
    path = list(sys.path)
    forget_modules()
    try:
        with contextlib.ExitStack() as stack:
            for registry in registries:
                stack.enter_context(registry.temporarily())
            yield
    finally:
        forget_modules()
        sys.path[:] = path


def forget_modules() -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "docs" or name.startswith("my_"):
            del sys.modules[name]
