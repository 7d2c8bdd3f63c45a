"""[validation] and [[validation.sources]]: losses on held-out data while training."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
from torchtitan.config.job_config import Validation as UpstreamValidation

from symbiotic_titan.config.data import source_rows


@dataclass
class Validation(UpstreamValidation):
    enable: bool = False
    """Whether to measure the losses on held-out data: before the first step, every ``freq`` steps and at the last step"""

    freq: int = 100
    """Steps between two validations"""

    steps: int = 4
    """Batches of one validation, each as large as a global batch of training. The same rows, made once, are used every time"""

    sources: Annotated[list[Any], tyro.conf.Fixed] = field(default_factory=list)
    """Rows of [[validation.sources]], with the keys of [[data.sources]]; set in TOML. They are read as [data] says, but in an
    order that data.seed does not change, and no caption is dropped."""

    def __post_init__(self) -> None:
        for name in ("freq", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"validation.{name}: must be at least 1, got {getattr(self, name)}"
                )
        self.sources = source_rows(self.sources, "[[validation.sources]]")
