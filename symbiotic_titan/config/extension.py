"""Import the module of a user's own parts, which registers them as it is imported.

[experimental]
custom_import = "docs.examples.cosine_shield"
"""

import importlib
import os
import sys
from pathlib import PurePath


def import_extension(name: str) -> None:
    """Import the module ``name``, the value of ``experimental.custom_import``; the current directory is searched too.

    ``load_job_config`` calls it before it reads the rest of a config, so that the config can choose what the module registers.
    Any other error of the module's own code keeps its traceback, for the module's author.

    Raises:
        ValueError: the name is not that of a module, there is no such module, it cannot be parsed, ends the program, or an import
            of its fails.
    """
    where = f"experimental.custom_import = {name!r}"
    if name.endswith(".py"):
        module = ".".join(PurePath(name).with_suffix("").parts)
        raise ValueError(
            f"{where}: must be the name of a module, not of its file; write {module!r}"
        )
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(
            f"{where}: must be the name of a module, with dots as in 'docs.examples.cosine_shield'"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a script's path begins with the script's own folder
    try:
        importlib.import_module(name)
    except SystemExit as end:
        raise ValueError(
            f"{where}: importing it ends the program, with status {end.code!r}; put what is not to run on import below "
            'if __name__ == "__main__"'
        ) from None
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
