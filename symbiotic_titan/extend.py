"""Parts of your own, chosen by name in a config: see docs/extending.md.

A module of yours registers them when it is imported, and ``experimental.custom_import`` names the module:

    @register_shield_schedule("cosine")
    def cosine(config, step): ...
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import getattr_static
from typing import Any, TypeVar

from symbiotic_titan.codecs.codec import Codec
from symbiotic_titan.config.data import FORMATS, PACKINGS
from symbiotic_titan.config.experts import (
    PARTITION_RULES,
    ROUTER_SCORES,
    SHIELD_SCHEDULES,
    ShieldSchedule,
)
from symbiotic_titan.config.generation import CODECS, SOLVERS, SolverStep
from symbiotic_titan.config.losses import (
    LOSS_TERMS,
    TIMESTEP_DISTRIBUTIONS,
    LossTerm,
    TimestepDistribution,
    check_term_name,
)
from symbiotic_titan.config.optimizer import LR_DECAYS, OPTIMIZER_BUILDERS, LRDecay
from symbiotic_titan.config.tokenizer import TOKEN_FAMILIES, TOKENIZER_KINDS, TokenFamily
from symbiotic_titan.data.formats.shard import FileFormat
from symbiotic_titan.data.images import ResizeRule
from symbiotic_titan.data.packing import Packing
from symbiotic_titan.hf.architectures.base import ARCHITECTURES, Architecture
from symbiotic_titan.moe.router import RouterScore
from symbiotic_titan.optim.build import OptimizerBuilder
from symbiotic_titan.partition.rules import (
    PartitionRule,
)
from symbiotic_titan.registry import Registry
from symbiotic_titan.sequence.geometry import RESIZE_RULES
from symbiotic_titan.sequence.tasks import Task as Task
from symbiotic_titan.sequence.tasks import register_task as register_task

T = TypeVar("T")


def is_function(part: object) -> bool:
    """Whether ``part`` can be called, and is no class."""
    return callable(part) and not isinstance(part, type)


@dataclass(frozen=True)
class Rule:
    """What a registered part must be: in words, and whether it is."""

    text: str
    holds: Callable[[Any], bool]


FUNCTION = Rule("a function", is_function)
CALLABLE = Rule("a function or a class", callable)


def subclass_of(base: type, *methods: str) -> Rule:
    """A class below ``base`` that defines all ``methods``."""

    def holds(part: Any) -> bool:
        if not isinstance(part, type) or not issubclass(part, base):
            return False
        return all(getattr_static(part, n) is not getattr_static(base, n) for n in methods)

    text = f"a subclass of {base.__module__}.{base.__name__}"
    return Rule(f"{text} with {', '.join(methods)}" if methods else text, holds)


def instance_of(kind: type) -> Rule:
    """An object of the class ``kind``."""
    return Rule(f"a {kind.__module__}.{kind.__name__}", lambda part: isinstance(part, kind))


Format = TypeVar("Format", bound=type[FileFormat])


def _into(registry: Registry[T], name: str, rule: Rule = FUNCTION) -> Callable[[T], T]:
    """Registers under ``name`` what follows ``rule``.

    Raises:
        ValueError: the name is none, which is the case for a decorator without parentheses; or the part breaks the rule.
    """
    registry.check_name(name)

    def register(part: T) -> T:
        if not rule.holds(part):
            raise ValueError(f"{registry.key} = {name!r}: must be {rule.text}, got {part!r}")
        return registry.register(name, part)

    return register


def register_architecture(model_type: str, architecture: Architecture) -> Architecture:
    """Releases whose config.json has this ``model_type`` are read and written by ``architecture``."""
    return _into(ARCHITECTURES, model_type, instance_of(Architecture))(architecture)


def register_partition_rule(name: str) -> Callable[[PartitionRule], PartitionRule]:
    """Decorator: ``experts.partition_rule = name`` chooses this function in ``symbiotic convert plan``."""
    return _into(PARTITION_RULES, name)


def register_shield_schedule(name: str) -> Callable[[ShieldSchedule], ShieldSchedule]:
    """Decorator: ``shielding.ramp = name`` chooses this function for the warm-up shield."""
    return _into(SHIELD_SCHEDULES, name)


def register_router_score(name: str) -> Callable[[RouterScore], RouterScore]:
    """Decorator: ``experts.score_function = name`` chooses this function for every router."""
    return _into(ROUTER_SCORES, name)


def register_format(name: str) -> Callable[[Format], Format]:
    """Decorator: ``data.sources.format = name`` chooses this class to index files and to read samples from them."""
    return _into(FORMATS, name, subclass_of(FileFormat, "index"))


def register_packing(name: str) -> Callable[[Packing], Packing]:
    """Decorator: ``data.packing = name`` chooses this function to say which documents share a packed sequence."""
    return _into(PACKINGS, name)


def register_timestep_distribution(
    name: str,
) -> Callable[[TimestepDistribution], TimestepDistribution]:
    """Decorator: ``flow.timesteps = name`` chooses this function to draw the timesteps of training."""
    return _into(TIMESTEP_DISTRIBUTIONS, name)


def register_solver(name: str) -> Callable[[SolverStep], SolverStep]:
    """Decorator: ``sampling.sampler = name`` and ``--sampler name`` choose this function to solve the flow."""
    return _into(SOLVERS, name)


def register_lr_decay(name: str) -> Callable[[LRDecay], LRDecay]:
    """Decorator: ``lr_scheduler.decay_type = name`` chooses this function, for all groups or for one of them."""
    return _into(LR_DECAYS, name)


def register_loss_term(
    name: str,
    *,
    weight: float,
    help: str = "",
    count: Callable[..., Any] | None = None,
    all_logits: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function is a term of the loss, with the weight ``losses.<name>``, the metric ``loss/<name>`` and, where
    ``count`` is given, ``loss/by_task/<task>_<name>``.

    weight: the default. help: the sentence in --help-all. The function, ``count`` and ``all_logits``: see ``config.losses.LossTerm``.
    """

    check_term_name(name)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for part in (function, count):
            if part is not None and not callable(part):
                raise ValueError(f"losses.{name}: must be a function, got {part!r}")
        LOSS_TERMS.register(name, LossTerm(weight, help, function, count, all_logits=all_logits))
        return function

    return register


def register_codec(name: str) -> Callable[[type[Codec]], type[Codec]]:
    """Decorator: ``latents.codec = name`` chooses this subclass of ``codecs.codec.Codec``."""
    return _into(CODECS, name, subclass_of(Codec, "describe", "load"))


def register_resize_rule(name: str) -> Callable[[ResizeRule], ResizeRule]:
    """Decorator: ``image_resize = name`` of a model's ``vit`` chooses this function for the sizes of input images."""
    return _into(RESIZE_RULES, name)


def register_tokenizer_kind(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: ``tokenizer.kind = name`` chooses this function, which gets [tokenizer] and returns a ``data.tokenizer.Tokenizer``."""
    return _into(TOKENIZER_KINDS, name, CALLABLE)


def register_token_family(name: str, family: TokenFamily) -> TokenFamily:
    """``tokenizer.family = name`` chooses these special tokens and turns, and so does ``auto`` where a file has all of their signs."""
    return _into(TOKEN_FAMILIES, name, instance_of(TokenFamily))(family)


def register_optimizer_builder(name: str) -> Callable[[OptimizerBuilder], OptimizerBuilder]:
    """Decorator: ``optimizer.builder = name`` chooses this function to make the optimizer."""
    return _into(OPTIMIZER_BUILDERS, name, CALLABLE)
