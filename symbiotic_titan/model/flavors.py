"""Named models. A flavor is a file, ``flavors/NAME.json`` next to this module, in the format of a checkpoint's model.json; README.md
there says what each is. A new one needs no Python: copy what ``symbiotic convert from-hf`` writes.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.model_config import read_model_config

FOLDER = Path(__file__).with_name("flavors")


class Flavors(Mapping[str, ModelArgs]):
    """Name -> ModelArgs, read anew at every lookup, so that callers cannot modify a shared flavor. A name that ends in .json is the
    path of a model.json. torchtitan takes this mapping as a train spec's ``model_args``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> ModelArgs:
        if name.endswith(".json"):
            return read_model_config(Path(name))
        if name not in list(self):
            raise ValueError(
                f"model.flavor: unknown flavor {name!r}; choose from {', '.join(self)}, or name a model.json"
            )
        return read_model_config(self._folder / f"{name}.json")

    def __contains__(self, name: object) -> bool:
        return name in list(self) or (
            isinstance(name, str) and name.endswith(".json") and Path(name).is_file()
        )

    def __iter__(self) -> Iterator[str]:
        return iter(sorted((path.stem for path in self._folder.glob("*.json")), key=str.lower))

    def __len__(self) -> int:
        return len(list(iter(self)))


FLAVORS = Flavors(FOLDER)


def model_args(config: JobConfig) -> ModelArgs:
    """The ModelArgs of a config: its flavor, changed as its sections say.

    Raises:
        ValueError: an unknown flavor, or sections that break its rules.
    """
    args = FLAVORS[config.model.flavor]
    args.update_from_config(config)
    return args
