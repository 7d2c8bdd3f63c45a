"""The order of samples as arithmetic: no random generator, so no random state to save.

The samples of a source form one endless sequence, epoch after epoch: index ``g`` is in epoch ``g // n`` at position ``g % n``.
Each epoch permutes the shards, then the samples of each shard: the order changes while reads stay within a few files at a time.
"""

from functools import lru_cache
from hashlib import blake2b

import numpy as np

# Permutations cached per source. A few suffice: all streams are in the same shard at about the same time.
CACHED_PERMUTATIONS = 8


def hash_key(*parts: object) -> int:
    """64 bits that depend on ``parts`` alone; Python's own ``hash`` of a string differs between processes."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def hash_fraction(*parts: object) -> float:
    """A uniform number in [0, 1) that depends on ``parts`` alone."""
    # 53 bits, the precision of a float64: more could round up to 1.
    return (hash_key(*parts) >> 11) / 2.0**53


def permutation(length: int, key: int) -> np.ndarray:
    """(length,) int64: 0 .. length-1 in an order given by ``key``.

    Sorts by the splitmix64 hash of each number (Steele, Lea and Flood, OOPSLA 2014). NumPy's generators are not used: their output
    may change between versions, and a resumed run would then lose and repeat samples.
    """
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2**64
        mixed = np.uint64(key) + np.arange(1, length + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return np.argsort(mixed, kind="stable")


class SourceOrder:
    """Order of one source's samples; a pure function of seed, source name and shard sizes."""

    def __init__(self, seed: int, name: str, shard_sizes: list[int]) -> None:
        self.num_samples = sum(shard_sizes)
        assert self.num_samples > 0, "a source without samples is refused when it is indexed"
        self._shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._names = (seed, name)
        self._shards = lru_cache(CACHED_PERMUTATIONS)(self._shards_of_epoch)
        self._samples = lru_cache(CACHED_PERMUTATIONS)(self._samples_of_shard)

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, sample within the shard) at ``index`` in the endless sequence."""
        epoch, position = divmod(index, self.num_samples)
        order, ends = self._shards(epoch)
        place = int(np.searchsorted(ends, position, side="right"))
        shard = int(order[place])
        within = position - int(ends[place]) + int(self._shard_sizes[shard])
        return shard, int(self._samples(epoch, shard)[within])

    def _shards_of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(len(self._shard_sizes), hash_key(*self._names, "shards", epoch))
        return order, np.cumsum(self._shard_sizes[order])

    def _samples_of_shard(self, epoch: int, shard: int) -> np.ndarray:
        key = hash_key(*self._names, "samples", epoch, shard)
        return permutation(int(self._shard_sizes[shard]), key)
