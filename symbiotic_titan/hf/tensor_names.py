"""Names of released tensors that differ from the architecture's only in their prefix, because the model was saved from within
another module (PEFT, DDP, torch.compile, a trainer's wrapper) or by another version of transformers.

    base_model.model.model.language_model.layers.0.mlp.gate.weight  ->  model.language_model.layers.0.mlp.gate.weight
    language_model.model.layers.0.mlp.gate.weight                   ->  model.language_model.layers.0.mlp.gate.weight
"""

import re
from collections.abc import Collection, Iterable

from symbiotic_titan.weights.reader import some_of
from symbiotic_titan.weights.weight_files import ADAPTER_REMEDY

# Modules that hold a model or a part of it, in any order and number.
_WRAPPERS = re.compile(r"(?:(?:base_model|model|module|language_model|thinker|_forward_module)\.)*")
# Modules that may stand anywhere in a name and add nothing to it.
_WITHIN = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Tensors that are computed from the config; older files hold them.
_COMPUTED = re.compile(r"rotary\w*\.inv_freq$|\.position_ids$")
_LORA = re.compile(r"\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)|base_layer)\.")


def names_by_architecture(names: Collection[str], expected: Iterable[str]) -> dict[str, str]:
    """Name in the files -> name with the prefix that the architecture gives to the same part of the model. ``expected``: names of the
    architecture, with every part. Names of other parts stay as they are.

    Raises:
        ValueError: two names differ in their prefix only.
    """
    prefixes = _prefixes(expected)
    out: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in names:
        _, rest = _split(name)
        prefix = prefixes.get(_head(rest))
        new = name if prefix is None else prefix + rest
        if new in taken:
            raise ValueError(
                f"holds {taken[new]} and {name}, which differ in their prefix only; keep one of them"
            )
        out[name], taken[new] = new, name
    return out


def check_merged(names: Iterable[str]) -> None:
    """Pass unless ``names`` are of a model with an adapter beside its weights.

    Raises:
        ValueError: they are.
    """
    if found := [name for name in names if _LORA.search(name)]:
        raise ValueError(f"holds {some_of(found)} of a LoRA adapter; {ADAPTER_REMEDY}")


def computed_from_config(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that the network computes itself: frequencies of rotary embeddings, numbers of positions."""
    return [name for name in names if _COMPUTED.search(name)]


def _prefixes(expected: Iterable[str]) -> dict[str, str]:
    """First module of a part -> prefix; without parts that occur under several prefixes."""
    found: dict[str, set[str]] = {}
    for name in expected:
        prefix, rest = _split(name)
        found.setdefault(_head(rest), set()).add(prefix)
    return {head: prefixes.pop() for head, prefixes in found.items() if len(prefixes) == 1}


def _split(name: str) -> tuple[str, str]:
    """(prefix, the rest from the first module that is no wrapper)."""
    name = _WITHIN.sub("", name)
    match = _WRAPPERS.match(name)
    end = match.end() if match else 0
    return name[:end], name[end:]


def _head(rest: str) -> str:
    return rest.split(".", 1)[0]
