"""Randomness as a pure function of (seed, row key): the same on any number of workers, in any order of arrival."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), written as signed
# 64-bit numbers because torch has no unsigned arithmetic; two's complement makes the products the same.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def stream_seed(*parts: int) -> int:
    """Return one 63-bit seed for a tuple of integers, such as (seed, phase, epoch)."""
    state = torch.zeros(1, dtype=torch.int64)
    for part in parts:
        state = hash_keys(state + part, 0x5DC)
    return int(state.item()) & (2**63 - 1)


def hash_keys(keys: Tensor, seed: int) -> Tensor:
    """Return a 64-bit hash of each key: int64 of any shape in, the same shape and device out."""
    state = keys * _GAMMA + seed
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def uniform(keys: Tensor, seed: int) -> Tensor:
    """Return a float64 number in [0, 1) for each int64 key, in the shape of the keys."""
    return _shift_right(hash_keys(keys, seed), 11).double() * 2.0**-53


def permuted(keys: Tensor, size: int, seed: int) -> Tensor:
    """Return the place of each key in a random order of the numbers below `size`: no two keys share one.

    Each rank computes the places of its own keys alone.

    Args:
        keys: int64, each at least 0 and below `size`.
        size: at most 2^62.
        seed: another one gives another order.

    Source: a Feistel network is a permutation whatever its round function (Luby, Rackoff, "How to construct
    pseudorandom permutations", 1988); one of a few bits too many is applied until the number is below `size` again
    (Black, Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
    """
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    mask = (1 << half) - 1

    def once(places: Tensor) -> Tensor:
        left, right = places >> half, places & mask
        for number in range(4):
            left, right = right, left ^ (hash_keys(right, seed + number) & mask)
        return (left << half) | right

    places = once(keys)
    while len(outside := torch.nonzero(places >= size)[:, 0]):
        places[outside] = once(places[outside])
    return places


def normal(keys: Tensor, seed: int) -> Tensor:
    """Return a float32 standard normal number for each int64 key, by the inverse of its distribution function."""
    inside = uniform(keys, seed).clamp(2.0**-53, 1.0 - 2.0**-53)
    drawn: Tensor = torch.erfinv(2.0 * inside - 1.0) * 2.0**0.5
    return drawn.float()


def sample_mask(keys: npt.NDArray[np.int64], seed: int, fraction: float) -> npt.NDArray[np.bool_]:
    """Return which rows belong to a sample of about `fraction` of them; all of them for a fraction of 1 or more."""
    if fraction >= 1.0:
        return np.ones(len(keys), bool)
    return (uniform(torch.from_numpy(np.ascontiguousarray(keys)), seed) < fraction).numpy()


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
