"""Before weights are used: do the bytes of a checkpoint have the digests that were written with them?

Once the process group exists and before the model is built, each rank reads its share of the files, so that a run with as many ranks as
the one that saved reads the files it loads next. What one rank finds all ranks learn, and the run starts from the checkpoint before, or
ends with one line where the config names the damaged one.
"""

import time
from pathlib import Path

import torch.distributed as dist
from torchtitan.tools.logging import logger

from symbiotic_titan.process import is_first_process
from symbiotic_titan.weights.digests import SUMS, in_order, read_sums, wrong_file
from symbiotic_titan.weights.weight_files import INDEX


def damage_on_any_rank(folder: Path) -> str | None:
    """What is wrong with the files of the checkpoint in ``folder``, the same on all ranks; None if nothing is. Collective.

    ``.metadata`` is left out: whoever reads it compares its digest.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    start = time.monotonic()
    try:
        sums = read_sums(folder)
        names = in_order(name for name in sums or () if _is_read(folder / name))
        found = wrong_file(folder, sums or {}, names[rank::num_ranks])
    except (OSError, ValueError) as error:
        names, found = [], str(error)
    on_ranks: list[str | None] = [None] * num_ranks
    dist.all_gather_object(on_ranks, found)
    damage = next((text for text in on_ranks if text), None)
    if damage is None and is_first_process():
        _report(folder, names, time.monotonic() - start)
    return damage


def _is_read(path: Path) -> bool:
    """Whether ``path`` holds tensors, or says where they are. A release may list more files, and need not hold all that it lists."""
    return (path.suffix in (".distcp", ".safetensors") or path.name == INDEX) and path.is_file()


def _report(folder: Path, names: list[str], seconds: float) -> None:
    if not names:
        logger.info(f"checkpoint {folder} has no {SUMS}, so its bytes were not verified")
        return
    size = sum((folder / name).stat().st_size for name in names)
    logger.info(f"Verified {size / 1e9:.2f} GB of {folder} in {seconds:.2f} seconds.")


def tell_all(error: str | None) -> None:
    """Raise the first process's ``error`` on all of them, if there is one. Collective.

    Raises:
        ValueError: with its text.
    """
    told = [error]
    dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise ValueError(told[0])
