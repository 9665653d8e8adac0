"""Rendezvous hashing (Thaler and Ravishankar 1998): each key orders the replicas by a hash of
the key and the replica, so that a replica that joins or leaves moves only its own keys.

The order is the same in every process, since it depends only on the names.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

Seeds = npt.NDArray[np.uint64]
Slots = npt.NDArray[np.intp]

_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def hash_of(text: str) -> np.uint64:
    """64 bits of a name or digest."""
    digest = blake2b(text.encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def seeds_of(names: Iterable[str]) -> Seeds:
    """Hash of each replica's name, for `scores`."""
    return np.array([hash_of(name) for name in names], dtype=np.uint64)


def scores(key: np.uint64, seeds: Seeds) -> Seeds:
    """The key's score with each replica: the finalizer of SplitMix64 (Steele, Lea and
    Flood 2014) over both hashes. Takes microseconds for a thousand replicas."""
    mixed: Any = seeds ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)


def ordered(key: np.uint64, seeds: Seeds, first: int) -> Slots:
    """Indices of the ``first`` replicas in the key's order; of all if there are fewer."""
    rank = ~scores(key, seeds)  # lowest first
    if first < len(rank):
        few = np.argpartition(rank, first - 1)[:first]
        return few[np.argsort(rank[few], kind="stable")]
    return np.argsort(rank, kind="stable")
