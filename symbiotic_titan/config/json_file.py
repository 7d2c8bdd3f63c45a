"""JSON files that one tool writes and another reads; each says what it is, so that a mix-up is named."""

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, kind: str, values: dict[str, Any]) -> None:
    """Write ``values`` as a file of ``kind``; a file of this name is replaced once the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".incomplete")
    unfinished.write_text(json.dumps({"kind": kind, **values}, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def read_json(path: Path, kind: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """The values of a file of ``kind``, with all of ``keys``.

    Raises:
        ValueError: no such file, not JSON, of another kind, or incomplete.
    """
    if not path.is_file():
        raise ValueError(f"{kind}: no such file: {path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{kind}: {path} is not JSON: {error}") from None
    found = values.get("kind") if isinstance(values, dict) else None
    if found != kind:
        raise ValueError(f"{path} is no {kind}" + (f" but a {found}" if found else ""))
    missing = [key for key in keys if key not in values]
    if missing:
        raise ValueError(f"{kind}: {path} lacks {', '.join(missing)}; write it anew")
    return values
