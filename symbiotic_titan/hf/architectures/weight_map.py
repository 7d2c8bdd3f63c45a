"""What the tables of several architectures share: reading settings, naming tensors, arranging them.

Letters: E experts, F hidden width, D width; of an image encoder W width, C colours, T frames, P pixels along a side of a patch.
"""

import copy
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from symbiotic_titan.config.rows import check_value
from symbiotic_titan.hf.architectures.base import (
    Arrange,
    Config,
    Link,
    Shape,
)
from symbiotic_titan.model.args import ModelArgs, one_pool
from symbiotic_titan.model.vit_args import VitArgs

# Images to be generated, where nobody says otherwise: a 16-channel autoencoder of stride 8, as [latents] codec = "flux" has it.
LATENTS: dict[str, Any] = {"latent_channels": 16, "latent_stride": 8, "latent_patch": 2}

# What a job's config decides, not a released model.
_OF_THE_JOB = {
    *("num_experts", "groups", "shield_modalities", "shield_mode", "attention_backend"),
    *("latent_channels", "latent_stride", "latent_patch", "timestep_width", "init_seed"),
}


# Settings of a config.json that do not change what the network computes.
_INERT = {
    *("model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "auto_map"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "video_token_id"),
    *("vision_start_token_id", "vision_end_token_id", "max_position_embeddings"),
    *("initializer_range", "use_cache", "router_aux_loss_coef", "output_router_logits"),
    *("output_attentions", "output_hidden_states", "return_dict", "problem_type", "id2label"),
    *("label2id", "is_encoder_decoder", "chunk_size_feed_forward"),
}

# Numbers among the settings of which there may be none; all others are positive.
_MAY_BE_ZERO = {
    *("first_k_dense_replace", "n_shared_experts", "moe_num_shared_experts"),
    "num_nextn_predict_layers",
}

# The type of each setting that ``rotary_settings`` reads, of a table whose ``settings`` are read.
ROTARY: dict[str, Any] = {"rope_theta": float, "rope_parameters": Any, "rope_scaling": Any}


# Settings


def settings(
    config: Config,
    table: str,
    defaults: Config,
    expressed: Config | None = None,
    others: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings of one ``table`` of ``config`` (of the file itself where it has no name), over what transformers takes where it
    is silent. A setting that is null is silent.

    defaults   also say the type of a setting; a list is of integers.
    expressed  the only value that the network expresses, of settings that may be silent.
    others     the type of every other known setting, ``Any`` where nothing here reads it.

    Raises:
        ValueError: there is no such table; or names a setting in it that has not its type, is a number and not positive, has a value
            that is not expressed, or is not known and may change the network.
    """
    values = _table(config, "", table) if table else config
    return _checked(values, table, defaults, expressed or {}, others or {})


def rotary_settings(
    values: Config,
    table: str,
    defaults: Config,
    expressed: Config,
    others: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What ``rope_parameters`` in a ``table`` with these ``values`` states, see ``settings``; in files from before transformers 5 it
    is ``rope_scaling`` and what stands beside it.

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
    return _checked(rotary, _name(table, key), defaults, expressed, others or {})


def _name(table: str, key: str) -> str:
    return f"{table}.{key}" if table else key


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
    values: Config, table: str, defaults: Config, expressed: Config, others: Mapping[str, Any]
) -> dict[str, Any]:
    out = {**defaults, **{key: value for key, value in values.items() if value is not None}}
    kinds = {key: _kind(default) for key, default in defaults.items()}
    for key, kind in {**kinds, **others}.items():
        if key in out:
            may_be_zero = kind == list[int] or key in _MAY_BE_ZERO
            _check_type(_name(table, key), out[key], kind, may_be_zero=may_be_zero)
    check_settings(out, table, expressed)
    _check_known(out, table, {*defaults, *expressed, *others})
    return out


def _kind(default: Any) -> Any:
    return list[int] if isinstance(default, list) else type(default)


def _check_type(name: str, value: Any, kind: Any, *, may_be_zero: bool) -> None:
    check_value(f"config.json: {name}", value, kind)
    numbers = value if kind == list[int] else [value] if kind in (int, float) else []
    if any(number < 0 or number == 0 and not may_be_zero for number in numbers):
        rule = "zero or positive" if may_be_zero else "positive"
        raise ValueError(f"config.json: {name}: must be {rule}, got {value!r}")


def _check_known(values: Config, table: str, known: Container[str]) -> None:
    """Pass if every setting is ``known``, changes nothing in what the network computes, or is off: a setting that nobody here has
    heard of may change the network."""
    for key, value in values.items():
        if value and key not in known and key not in _INERT and not key.startswith("_"):
            raise ValueError(
                f"config.json: {_name(table, key)} = {value!r} is not a setting that this network is known to express; take it out of "
                "the file if it does not change what is computed"
            )


def check_settings(values: Config, table: str, expressed: Mapping[str, Any]) -> None:
    """Pass if every setting named by ``expressed`` is silent or has the value that the network expresses.

    Raises:
        ValueError: the first that has another.
    """
    for key, expected in expressed.items():
        value = values.get(key)
        if value is not None and value != expected:
            raise ValueError(
                f"config.json: {_name(table, key)} = {value!r} is not expressed by this network, only {expected!r} is"
            )


@contextmanager
def described_by(table: str) -> Iterator[None]:
    """While our arguments are built: a rule of theirs that settings break together is told with the ``table`` that states them."""
    try:
        yield
    except ValueError as error:
        where = f"config.json: {table}" if table else "config.json"
        raise ValueError(f"{where}: {error}") from None


def one_value(values: Config, key: str) -> Any:
    """A setting that may be given once or as a list with one entry per layer.

    Raises:
        ValueError: layers differ, or there are none.
    """
    value = values[key]
    if not isinstance(value, list):
        return value
    if not value:
        raise ValueError(f"config.json: {key}: must have an entry per layer, got {value}")
    if any(other != value[0] for other in value):
        raise ValueError(
            f"config.json: {key} = {value} differs from layer to layer, which this network does not express"
        )
    return value[0]


def with_experts(
    config: Config, expected: ModelArgs, args: ModelArgs, table: str, *names: str
) -> dict[str, Any]:
    """``config`` with the number of experts that ``args`` have, under those of ``names`` that its ``table`` states (the first if it
    states none).

    Raises:
        ValueError: ``args`` differ from the ``expected`` of ``config`` in something else that such a file states.
    """
    same = replace(expected, groups=one_pool(args.num_experts), num_experts=args.num_experts)
    for field in fields(ModelArgs):
        has, needs = getattr(args, field.name), getattr(same, field.name)
        if field.name not in _OF_THE_JOB and has != needs:
            raise ValueError(
                f"the model has {field.name} = {has!r}, but config.json of its backbone states {needs!r}; "
                "a model of that architecture cannot be written"
            )
    out: dict[str, Any] = copy.deepcopy(dict(config))
    values = out[table] if table else out
    for name in [name for name in names if name in values] or names[:1]:
        values[name] = args.num_experts
    return out


# Tensors


def stack(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.stack(tensors)]


def unstack(tensors: list[Tensor]) -> list[Tensor]:
    return list(tensors[0].unbind())


def split(dim: int, parts: int = 2) -> Arrange:
    """``parts`` tensors from one that holds them, e.g. gate and up."""
    return lambda tensors: list(tensors[0].chunk(parts, dim))


def join(dim: int) -> Arrange:
    return lambda tensors: [torch.cat(tensors, dim)]


def chain(*steps: Arrange) -> Arrange:
    """One step behind the other."""

    def arrange(tensors: list[Tensor]) -> list[Tensor]:
        for step in steps:
            tensors = step(tensors)
        return tensors

    return arrange


def transpose(tensors: list[Tensor]) -> list[Tensor]:
    """(E, in, out) <-> (E, out, in)."""
    return [tensor.transpose(-1, -2).contiguous() for tensor in tensors]


def same(theirs: str, ours: str, *names: tuple[str, str]) -> list[Link]:
    """Tensors that are alike: (their name, our name) behind the two prefixes."""
    return [Link((theirs + their,), (ours + our,)) for their, our in names]


def with_biases(theirs: str, ours: str, *names: tuple[str, str]) -> list[Link]:
    """Linear layers and norms that are alike: weight and bias of each."""
    both = [(t + kind, o + kind) for t, o in names for kind in (".weight", ".bias")]
    return same(theirs, ours, *both)


def swiglu(theirs: str, ours: str) -> list[Link]:
    """A gated feed-forward."""
    return same(
        theirs,
        ours,
        (".gate_proj.weight", ".w1.weight"),
        (".down_proj.weight", ".w2.weight"),
        (".up_proj.weight", ".w3.weight"),
    )


def attention(theirs: str, ours: str, args: ModelArgs) -> list[Link]:
    """The four projections with the biases that ``args`` have; norms of queries and keys have no name in common."""
    links = []
    for their, our in (("q_proj", "wq"), ("k_proj", "wk"), ("v_proj", "wv"), ("o_proj", "wo")):
        links += same(f"{theirs}.{their}", f"{ours}.{our}", (".weight", ".weight"))
        if args.o_bias if our == "wo" else args.qkv_bias:
            links += same(f"{theirs}.{their}", f"{ours}.{our}", (".bias", ".bias"))
    return links


def experts(theirs: str, ours: str, num_experts: int, shapes: Mapping[str, Shape]) -> list[Link]:
    """The routed experts of a layer, in the layout that ``shapes`` show: a tensor per expert and projection, as on the Hub, or
    ``gate_up_proj`` (E, 2F, D) and ``down_proj`` (E, D, F), as transformers 5 holds them and saves them where it is asked to."""
    if f"{theirs}.gate_up_proj" in shapes:
        gate_up = Link(
            (f"{theirs}.gate_up_proj",),
            (f"{ours}.w1", f"{ours}.w3"),
            split(1),
            join(1),
        )
        return [gate_up, *same(theirs, ours, (".down_proj", ".w2"))]
    return [
        Link(
            tuple(f"{theirs}.{i}.{their}.weight" for i in range(num_experts)),
            (f"{ours}.{our}",),
            stack,
            unstack,
        )
        for their, our in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"))
    ]


def patch_embedding(theirs: str, ours: str, vit: VitArgs, *, frames: bool) -> list[Link]:
    """A convolution over whole patches, with ``frames`` over those of a patch too, as the linear layer that it is."""
    kernel = (vit.channels, *([vit.temporal_patch] if frames else []), vit.patch, vit.patch)
    weight = Link(
        (f"{theirs}.weight",),
        (f"{ours}.weight",),
        load=lambda tensors: [tensors[0].flatten(1)],  # (W, C, T, P, P) or (W, C, P, P)
        save=lambda tensors: [tensors[0].unflatten(1, kernel)],
    )
    return [weight, *same(theirs, ours, (".bias", ".bias"))]


def decoder(
    prefix: str,
    args: ModelArgs,
    layer: Callable[[int, str, str], list[Link]],
    output: str = "lm_head.weight",
) -> list[Link]:
    """A decoder whose tensors, but for the ``output``, are named behind ``prefix``. ``layer`` gets the number of each layer, and how
    their names and ours of its tensors begin."""
    out = ends(f"{prefix}embed_tokens.weight", f"{prefix}norm.weight", output, args)
    for i in range(args.num_layers):
        out += layer(i, f"{prefix}layers.{i}.", f"layers.{i}.")
    return out


def ends(embeddings: str, norm: str, output: str, args: ModelArgs) -> list[Link]:
    """Embedding table, last norm and output. A tied output is not on disk and is the table in memory."""
    table = "tok_embeddings.weight"
    links = same("", "", (norm, "norm.weight"))
    if not args.tie_embeddings:
        return links + same("", "", (embeddings, table), (output, "output.weight"))
    tied = Link(
        (embeddings,),
        (table, "output.weight"),
        load=lambda tensors: [tensors[0], tensors[0]],
        save=lambda tensors: [tensors[0]],
    )
    return [*links, tied]
