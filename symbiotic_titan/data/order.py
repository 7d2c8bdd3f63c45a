"""The order of samples as arithmetic: no random generator, so no random state to save.

The samples of a source form one endless sequence, epoch after epoch: index ``g`` is in epoch ``g // n`` at position ``g % n``.
Each epoch permutes the shards, then the samples of each shard: the order changes while reads stay within a few files at a time.
"""

from bisect import bisect_right
from functools import lru_cache
from hashlib import blake2b

import numpy as np

# Samples of the largest shard whose order is found by sorting; that of a larger one is arithmetic, so it costs no time and no memory.
LARGEST_SORTED = 2**20
# Even, so that both halves of a number have their size again.
ROUNDS = 4
BITS_64 = 2**64 - 1

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


def mix(number: int) -> int:
    """splitmix64 of one number, as in ``permutation``: 64 bits."""
    number = (number + 0x9E3779B97F4A7C15) & BITS_64
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & BITS_64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & BITS_64
    return number ^ (number >> 31)


class Bijection:
    """0 .. length-1 in an order given by ``key``, like ``permutation``, in constant memory: one number at a time.

    A Feistel network permutes the numbers of the fewest bits that hold ``length`` (Luby and Rackoff, SIAM J. Comput. 1988), and is
    applied again to a result that is too large (cycle walking; Black and Rogaway, CT-RSA 2002): less than twice on average.
    """

    def __init__(self, length: int, key: int) -> None:
        assert length > 0
        self._length = length
        bits = max(2, (length - 1).bit_length())
        self._low_bits = bits // 2
        self._masks = [2 ** (bits - bits // 2) - 1, 2 ** (bits // 2) - 1]
        self._keys = [mix(key ^ mix(i)) for i in range(ROUNDS)]

    def __getitem__(self, number: int) -> int:
        while (number := self._permuted(number)) >= self._length:
            pass
        return number

    def _permuted(self, number: int) -> int:
        # The halves change places at every round, and with them their sizes.
        high, low = number >> self._low_bits, number & self._masks[1]
        for i, key in enumerate(self._keys):
            high, low = low, high ^ (mix(key ^ low) & self._masks[i % 2])
        return high << self._low_bits | low


class SourceOrder:
    """Order of one source's samples; a pure function of seed, source name and shard sizes.

    sorts_all: large shards are sorted too, as before version 2 of the order: see ``fingerprint``.
    """

    def __init__(
        self, seed: int, name: str, shard_sizes: list[int], *, sorts_all: bool = False
    ) -> None:
        self.num_samples = sum(shard_sizes)
        assert self.num_samples > 0, "a source without samples is refused when it is indexed"
        self._shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._names = (seed, name)
        self._sorts_all = sorts_all
        self._shards = lru_cache(CACHED_PERMUTATIONS)(self._shards_of_epoch)
        self._samples = lru_cache(CACHED_PERMUTATIONS)(self._samples_of_shard)

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, sample within the shard) at ``index`` in the endless sequence."""
        epoch, position = divmod(index, self.num_samples)
        order, ends = self._shards(epoch)
        place = bisect_right(ends, position)
        shard = order[place]
        within = position - ends[place] + int(self._shard_sizes[shard])
        return shard, int(self._samples(epoch, shard)[within])

    def _shards_of_epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        """The shards in the order of ``epoch``, and the position at which each of them ends."""
        order = permutation(len(self._shard_sizes), hash_key(*self._names, "shards", epoch))
        return order.tolist(), np.cumsum(self._shard_sizes[order]).tolist()

    def _samples_of_shard(self, epoch: int, shard: int) -> np.ndarray | Bijection:
        key, length = self._key(epoch, shard), int(self._shard_sizes[shard])
        if length > LARGEST_SORTED and not self._sorts_all:
            return Bijection(length, key)
        return permutation(length, key).astype(np.uint32 if length < 2**32 else np.int64)

    def _key(self, epoch: int, shard: int) -> int:
        return hash_key(*self._names, "samples", epoch, shard)
