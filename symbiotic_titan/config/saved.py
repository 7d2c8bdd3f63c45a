"""The config of a run, kept in its folder: what a checkpoint was trained with, without the files and options it came from."""

from dataclasses import asdict
from pathlib import Path

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.toml_text import blocks, without_none

NAME = "config.toml"


class SavedConfig:
    """``config`` as it is now, to be written when the run is sure to begin: by then parts of it may have been filled in."""

    def __init__(self, config: JobConfig) -> None:
        table = without_none(asdict(config))
        table["job"].pop("config_file", None)
        self._text = "\n\n".join(blocks(table, {})) + "\n"
        self._path = Path(config.job.dump_folder) / NAME

    def write(self) -> None:
        """Write, or replace what an earlier start of the run wrote; the file is never half there."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_name(NAME + ".incomplete")
        unfinished.write_text(self._text, encoding="utf-8")
        unfinished.replace(self._path)


def saved_config(path: Path) -> Path:
    """The config file of a run. ``path``: its folder, that of its checkpoints, or one of them.

    Raises:
        ValueError: there is none.
    """
    for folder in (path, path.parent, path.parent.parent):
        if (folder / NAME).is_file():
            return folder / NAME
    raise ValueError(
        f"--config: {path} is not in the folder of a run that kept its {NAME}; name the TOML file of its config"
    )
