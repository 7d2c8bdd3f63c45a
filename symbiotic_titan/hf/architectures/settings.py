"""Reading config.json: every setting is checked, and one that the network does not support is refused by name."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from symbiotic_titan.config.rows import check_value
from symbiotic_titan.hf.architectures.base import Config
from symbiotic_titan.hf.architectures.unknown_settings import check_known
from symbiotic_titan.model.args import ModelArgs

# Latents of target images, as set by [latents] codec = "flux": a 16-channel autoencoder of stride 8. No release has them.
LATENTS: dict[str, Any] = {"latent_channels": 16, "latent_stride": 8, "latent_patch": 2}

# Fields of ModelArgs that come from a job's config, not from a released model.
_OF_THE_JOB = {
    *("num_experts", "groups", "shield_modalities", "shield_mode", "attention_backend"),
    *("latent_channels", "latent_stride", "latent_patch", "timestep_width", "init_seed"),
}

# Numbers that may be zero; all others must be positive.
_MAY_BE_ZERO = {
    *("first_k_dense_replace", "n_shared_experts", "moe_num_shared_experts"),
    "num_nextn_predict_layers",
}

# Types of the settings that ``rotary_settings`` reads, to pass in ``others`` for the table that has them.
ROTARY: dict[str, Any] = {"rope_theta": float, "rope_parameters": Any, "rope_scaling": Any}


def settings(
    config: Config,
    table: str,
    defaults: Config,
    supported: Config | None = None,
    others: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings of one ``table`` of ``config`` ("" for the file's top level, "a.b" for the table b in a), with transformers'
    defaults where they are unset. null counts as unset.

    defaults   the value, and thereby the type, of a setting that is unset; a list holds integers.
    supported  the only value that the network supports, for settings that may also be unset.
    others     the type of every other known setting; ``Any`` where nothing here reads it.

    Raises:
        ValueError: the table is missing; or a setting has the wrong type, is a number but not positive, has an unsupported value, or
            is unknown and may change the network.
    """
    return _checked(nested(config, table), table, defaults, supported or {}, others or {})


def rotary_settings(
    values: Config,
    table: str,
    defaults: Config,
    supported: Config,
    others: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings of ``rope_parameters`` in a ``table`` with these ``values``. Files written before transformers 5 have
    ``rope_scaling`` instead, with ``rope_theta`` and ``partial_rotary_factor`` next to it.

    Raises:
        ValueError: as ``settings``.
    """
    keys = ("rope_parameters", "rope_scaling")
    stated = [key for key in keys if values.get(key) is not None and _table(values, table, key)]
    key = stated[0] if stated else keys[0]
    check_settings(values, table, {other: values[key] for other in stated[1:]})
    rotary = {name: value for name, value in (values.get(key) or {}).items() if value is not None}
    rotary.setdefault("rope_type", rotary.pop("type", defaults["rope_type"]))
    for name in ("rope_theta", "partial_rotary_factor"):
        if values.get(name) is not None:
            rotary.setdefault(name, values[name])
    return _checked(rotary, _name(table, key), defaults, supported, others or {})


def _name(table: str, key: str) -> str:
    return f"{table}.{key}" if table else key


def nested(config: Config, table: str) -> Config:
    """The ``table`` of ``config``, see ``settings``.

    Raises:
        ValueError: it is missing, or is no table.
    """
    values, above = config, ""
    for key in table.split(".") if table else ():
        values, above = _table(values, above, key), _name(above, key)
    return values


def _table(values: Config, table: str, key: str) -> Config:
    value = values.get(key)
    if value is None:
        raise ValueError(
            f"config.json has no {_name(table, key)}, a table of settings that describe this architecture"
        )
    if not isinstance(value, Mapping):
        raise ValueError(f"config.json: {_name(table, key)}: must be a table, got {value!r}")
    return value


def _checked(
    values: Config, table: str, defaults: Config, supported: Config, others: Mapping[str, Any]
) -> dict[str, Any]:
    out = {**defaults, **{key: value for key, value in values.items() if value is not None}}
    kinds = {key: _kind(default) for key, default in defaults.items()}
    for key, kind in {**kinds, **others}.items():
        if key in out:
            may_be_zero = kind == list[int] or key in _MAY_BE_ZERO
            _check_type(_name(table, key), out[key], kind, may_be_zero=may_be_zero)
    check_settings(out, table, supported)
    check_known(out, _name(table, ""), {*defaults, *supported, *others})
    return out


def _kind(default: Any) -> Any:
    return list[int] if isinstance(default, list) else type(default)


def _check_type(name: str, value: Any, kind: Any, *, may_be_zero: bool) -> None:
    check_value(f"config.json: {name}", value, kind)
    numbers = value if kind == list[int] else [value] if kind in (int, float) else []
    if any(number < 0 or number == 0 and not may_be_zero for number in numbers):
        rule = "zero or positive" if may_be_zero else "positive"
        raise ValueError(f"config.json: {name}: must be {rule}, got {value!r}")


def check_settings(values: Config, table: str, supported: Mapping[str, Any]) -> None:
    """Pass if every setting of ``supported`` is unset or has the value given there.

    Raises:
        ValueError: names the first that has another value.
    """
    for key, expected in supported.items():
        value = values.get(key)
        if value is not None and value != expected:
            raise ValueError(
                f"config.json: {_name(table, key)} = {value!r} is not supported by this network, only {expected!r} is"
            )


@contextmanager
def described_by(table: str) -> Iterator[None]:
    """Prefix a ValueError in the block, from building ModelArgs or VitArgs, with the ``table`` of config.json that caused it."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("config.json"):
            raise
        where = f"config.json: {table}" if table else "config.json"
        raise ValueError(f"{where}: {error}") from None


def one_value(values: Config, key: str) -> Any:
    """The value of a setting that may be a list with one entry per layer.

    Raises:
        ValueError: the entries differ, or the list is empty.
    """
    value = values[key]
    if not isinstance(value, list):
        return value
    if not value:
        raise ValueError(f"config.json: {key}: must have an entry per layer, got {value}")
    if any(other != value[0] for other in value):
        raise ValueError(
            f"config.json: {key} = {value} differs from layer to layer, which this network does not support"
        )
    return value[0]


def with_experts(
    config: Config,
    expected: ModelArgs,
    args: ModelArgs,
    table: str,
    *names: str,
    width: tuple[str, ...] = (),
    top_k: tuple[str, ...] = (),
) -> dict[str, Any]:
    """``config`` with the routed experts of ``args``, each value stored under those of its keys that ``table`` has (under the first
    if it has none), and with their number of embeddings if rows were added.

    names         keys of the number of experts in a pool.
    width, top_k  keys of an expert's hidden width and of the experts per token; without any, the architecture cannot state another.

    Raises:
        ValueError: ``args`` differ from ``expected`` (what ``config`` describes) in more than that and a job's settings, or have pools
            of different sizes.
    """
    sizes = {group.name: group.num_experts for group in args.groups}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"the model's groups have {sizes} experts; config.json of the released model has one number for all of its pools"
        )
    other = {"expert_hidden_dim": width, "top_k": top_k, "vocab_size": ("vocab_size",)}
    stated: dict[str, Any] = {name: getattr(args, name) for name, keys in other.items() if keys}
    stated["vocab_size"] = max(args.vocab_size, expected.vocab_size)
    same = replace(expected, groups=args.groups, num_experts=args.num_experts, **stated)
    for field in fields(ModelArgs):
        has, needs = getattr(args, field.name), getattr(same, field.name)
        if field.name not in _OF_THE_JOB and has != needs:
            raise ValueError(
                f"the model has {field.name} = {has!r}, but config.json of the released model has {needs!r}; "
                "a model of that architecture cannot be written"
            )
    out: dict[str, Any] = copy.deepcopy(dict(config))
    values: dict[str, Any] = nested(out, table)  # type: ignore[assignment]
    _state(values, names, args.groups[0].num_experts, expected.groups[0].num_experts)
    for name, value in stated.items():
        _state(values, other[name], value, getattr(expected, name))
    if (
        "vocab_size" in out and stated["vocab_size"] != expected.vocab_size
    ):  # some files have it beside the table too
        out["vocab_size"] = stated["vocab_size"]
    return out


def _state(values: dict[str, Any], keys: Sequence[str], value: int, before: int) -> None:
    """Set those of ``keys`` that ``values`` have, or else the first, to ``value`` if it was another ``before``; in each entry where the
    file has a list with one per layer."""
    for key in [key for key in keys if key in values] or keys[:1]:
        old = values.get(key)
        if value != before:
            values[key] = [value] * len(old) if isinstance(old, list) else value
