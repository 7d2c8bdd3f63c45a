"""What a stage of the GPU check finds: one JSON line for each part, written at once, so that nothing is lost when it is cut off."""

import json
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """device: ``cuda``, or ``cpu`` at toy size. out: where results go. work: a folder for data and runs, which is removed."""

    device: str
    out: Path
    work: Path

    @property
    def is_toy(self) -> bool:
        return self.device == "cpu"

    @property
    def lines(self) -> Path:
        return self.out / "gpu_check.jsonl"


def finite(value: Any) -> Any:
    """``value`` with null for numbers that JSON does not have, and numbers rounded to six digits."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def append(file: Path, line: dict[str, Any]) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(finite(line)) + "\n")


class Notes:
    """The parts of one stage. ``failed`` names those that raised or whose values say ``passed: False``."""

    def __init__(self, settings: Settings, stage: str) -> None:
        self.settings, self.stage = settings, stage
        self.failed: list[str] = []

    def part(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``measure`` returns, also written as a line. An exception is noted, and the stage goes on."""
        try:
            values = measure()
        except Exception as error:  # noqa: BLE001 - whatever a new machine does
            traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0][:300]
            values = {"passed": False, "error": f"{type(error).__name__}: {first}"}
        if values.get("passed") is False:
            self.failed.append(name)
        append(self.settings.lines, {"stage": self.stage, "part": name, **values})
        return values
