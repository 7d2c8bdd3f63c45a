"""model.json: a model's ModelArgs as a file, so that a new size needs no code."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from symbiotic_titan.config.files import read_json, write_json
from symbiotic_titan.config.rows import check_value, row_from_dict
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.vit_args import VitArgs
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.sequence.modality import MODALITY_NAMES, modality_ids

FILE_NAME = "model.json"
KIND = "model shape"

# Types, as they are in JSON, of the fields that are converted before ModelArgs checks the rest.
_KINDS: dict[str, Any] = {
    "vit": dict[str, Any],
    "groups": list[dict[str, Any]],
    "shield_modalities": list[str],
}


def values_of(args: ModelArgs) -> dict[str, Any]:
    """Every field of ``args`` as JSON has it; modalities by name."""
    groups = [_group_row(group) for group in args.groups]
    shield = [MODALITY_NAMES[m] for m in args.shield_modalities]
    # A private field of torchtitan's base class is not a hyperparameter.
    values = {key: value for key, value in asdict(args).items() if not key.startswith("_")}
    return {**values, "groups": groups, "shield_modalities": shield}


def write_model_config(path: Path, args: ModelArgs) -> None:
    write_json(path, KIND, values_of(args))


def read_model_config(path: Path) -> ModelArgs:
    """The inverse of ``write_model_config``.

    Raises:
        ValueError: the file is missing or of another kind, or its values break a rule of ``ModelArgs``.
    """
    values = read_json(path, KIND, ("vit", "groups", "shield_modalities"))
    del values["kind"]
    try:
        for key, kind in _KINDS.items():
            check_value(key, values[key], kind)
        values["shield_modalities"] = modality_ids(values["shield_modalities"], key="shield")
        values["groups"] = [_group(row) for row in values["groups"]]
        values["vit"] = row_from_dict(VitArgs, _tuples(values["vit"]), "vit")
        return row_from_dict(ModelArgs, _tuples(values), "model")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{KIND}: {path} cannot be used: {error}") from None


def _group_row(group: ExpertGroup) -> dict[str, Any]:
    """The inverse of ``_group``; without the sizes that are the model's."""
    row = {key: value for key, value in asdict(group).items() if value is not None}
    return {**row, "modalities": [MODALITY_NAMES[m] for m in group.modalities]}


def _group(row: dict[str, Any]) -> ExpertGroup:
    check_value("groups.modalities", row.get("modalities"), list[str])
    modalities = modality_ids(row["modalities"], key=f"groups.{row.get('name')}")
    return row_from_dict(ExpertGroup, {**row, "modalities": modalities}, "groups")


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where the fields are tuples."""
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
