"""Parts of your own, chosen by name in a config: see docs/extending.md.

A module of yours registers them when it is imported, and ``experimental.custom_import`` names the module:

    @register_shield_schedule("cosine")
    def cosine(config, step): ...
"""

import importlib
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from symbiotic_titan.checkpoint.plan import PARTITION_RULES, PartitionRule
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.registry import Registry
from symbiotic_titan.moe.scores import ROUTER_SCORES, RouterScore
from symbiotic_titan.optim.build import OPTIMIZER_BUILDERS, OptimizerBuilder
from symbiotic_titan.optim.shield_schedule import SHIELD_SCHEDULES, ShieldSchedule

T = TypeVar("T")


def _into(registry: Registry[T], name: str) -> Callable[[T], T]:
    return lambda part: registry.register(name, part)


def register_partition_rule(name: str) -> Callable[[PartitionRule], PartitionRule]:
    """Decorator: ``experts.partition_rule = name`` chooses this function in ``tools/convert.py plan``."""
    return _into(PARTITION_RULES, name)


def register_shield_schedule(name: str) -> Callable[[ShieldSchedule], ShieldSchedule]:
    """Decorator: ``shielding.ramp = name`` chooses this function for the warm-up shield."""
    return _into(SHIELD_SCHEDULES, name)


def register_router_score(name: str) -> Callable[[RouterScore], RouterScore]:
    """Decorator: ``experts.score_function = name`` chooses this function for every router."""
    return _into(ROUTER_SCORES, name)


def register_optimizer_builder(name: str) -> Callable[[OptimizerBuilder], OptimizerBuilder]:
    """Decorator: ``optimizer.builder = name`` chooses this function to make the optimizer."""
    return _into(OPTIMIZER_BUILDERS, name)


def import_extension(config: JobConfig) -> None:
    """Import the module that ``experimental.custom_import`` names, if it does; the current directory is searched too.

    Whatever else the module's own code raises keeps its traceback: it is the module's author who can use it.

    Raises:
        ValueError: it is no module's name, there is no such module, or it cannot be parsed or imports what does not exist.
    """
    name = config.experimental.custom_import
    if not name:
        return
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
