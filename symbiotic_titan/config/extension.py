"""Import the module that a config names, so that it can register its parts."""

import importlib
import os
import sys


def import_extension(name: str) -> None:
    """Import the module ``name``, the value of ``experimental.custom_import``; the current directory is searched too.

    ``load_job_config`` calls it before it looks at anything else of a config, so that what the module registers can be chosen there.

    Whatever else the module's own code raises keeps its traceback: it is the module's author who can use it.

    Raises:
        ValueError: it is no module's name, there is no such module, or it cannot be parsed or imports what does not exist.
    """
    where = f"experimental.custom_import = {name!r}"
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(
            f"{where}: must be the name of a module, with dots as in 'docs.examples.cosine_shield'"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a script's path begins with the script's own folder
    try:
        importlib.import_module(name)
    except SyntaxError as error:
        raise ValueError(f"{where}: {error}") from error
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and _is_part_of(name, str(error.name)):
            raise ValueError(
                f"{where}: there is no module {error.name!r} in {os.getcwd()}, in PYTHONPATH or among the installed packages"
            ) from None
        raise ValueError(f"{where}: importing it failed: {error}") from error


def _is_part_of(module: str, package: str) -> bool:
    """Whether ``module`` is ``package`` or lies in it."""
    return module == package or module.startswith(package + ".")
