"""Permutation sets for jigsaw puzzles: generated, far apart, the same on every machine.

The further apart two permutations lie (Hamming distance: the places at which they differ), the
more tiles must be looked at to tell them apart. A set of minimum distance d stays solvable as long
as fewer than d tiles look alike.

Source: Noroozi, Favaro, "Unsupervised learning of visual representations by solving jigsaw
puzzles", ECCV 2016; their published sets maximise the mean distance, and the nearest two of their
100 permutations differ at 2 places only. Affine and projective groups as permutation codes: Blake,
Cohen, Deza, "Coding with permutations", Information and Control 43, 1979.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, permutations, product
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medssl.errors import ConfigError

PermutationKind = Literal["greedy_max_min", "agl", "pgl"]

_EXHAUSTIVE = 9
"""Most tiles of which all permutations are candidates (9! = 362 880; 10! would take 36 MB and a
minute)."""

_POOL = 50_000
"""Random candidates for more tiles than that. 27 tiles have 1e28 permutations, and any two random
ones differ at 26 places on average: a larger pool gains nothing."""

_FIELDS: dict[int, tuple[int, tuple[int, ...]]] = {
    4: (2, (1, 1, 1)),
    8: (2, (1, 1, 0, 1)),
    9: (3, (1, 0, 1)),
    27: (3, (1, 2, 0, 1)),
}
"""The finite fields by their size: the prime p, and an irreducible polynomial over GF(p) whose
coefficients are given from the constant upwards. GF(4): x^2 + x + 1, GF(8): x^3 + x + 1,
GF(9): x^2 + 1, GF(27): x^3 + 2x + 1."""

_PROJECTIVE_TILES = 9
"""Points of the projective line over GF(8): its eight elements, and infinity as the last."""


@dataclass(frozen=True, eq=False)
class PermutationSet:
    """Permutations that a puzzle's class is chosen from.

    Attributes:
        permutations: (P, T) long on the CPU, to be read only: place t shows tile
            ``permutations[p, t]``.
        name: of the set, for people.
        min_hamming: places at which the nearest two permutations differ.
        mean_hamming: places at which two permutations differ on average.
        hash: sha256, in hexadecimal, of P, T and the permutations row by row, all as little-endian
            int64. Sets of equal hash give equal classes.
    """

    permutations: Tensor
    name: str
    min_hamming: int
    mean_hamming: float
    hash: str


def largest_set(kind: PermutationKind, num_tiles: int) -> int:
    """Return how many permutations of so many tiles a kind can give.

    Raises:
        ConfigError: the kind does not exist for that number of tiles.
    """
    if kind == "greedy_max_min":
        return math.factorial(num_tiles) if num_tiles <= _EXHAUSTIVE else _POOL
    if kind == "agl" and num_tiles in _FIELDS:
        return num_tiles * (num_tiles - 1)
    if kind == "pgl" and num_tiles == _PROJECTIVE_TILES:
        return num_tiles * (num_tiles - 1) * (num_tiles - 2)
    exists = "9" if kind == "pgl" else "4, 8, 9 or 27"
    raise ConfigError(
        f"pretext.permutations: {kind} permutes {exists} tiles, this puzzle has {num_tiles}. "
        "Choose greedy_max_min, or another pretext.grid."
    )


@lru_cache(maxsize=16)
def permutation_set(
    kind: PermutationKind, num_tiles: int, size: int, seed: int = 0
) -> PermutationSet:
    """Return a set of different permutations; equal arguments give equal sets on every machine.

    Args:
        kind: ``greedy_max_min`` adds, again and again, a permutation as far as possible from the
            nearest that is already in the set. ``agl`` are the affine maps of a finite field,
            T * (T - 1) permutations at distance T - 1 or more; two tiles are enough to tell them
            apart. ``pgl`` are the fractional linear maps of the projective line over GF(8), 504
            permutations of 9 tiles at distance 7 or more; three tiles tell them apart.
        num_tiles: T.
        size: permutations wanted. Of a group, a part is drawn: distances within it are no smaller.
        seed: which of the many equally good sets to take.

    Raises:
        ConfigError: the kind does not have that many, or does not exist for that many tiles.
    """
    limit = largest_set(kind, num_tiles)
    if not 2 <= size <= limit:
        raise ConfigError(
            f"pretext.num_permutations: {size} permutations asked for; {kind} has {limit} of "
            f"{num_tiles} tiles. Choose 2 to {limit}."
        )
    if kind == "greedy_max_min":
        chosen = _greedy_max_min(_candidates(num_tiles, seed), size)
        name = f"greedy max-min, {size} of {num_tiles} tiles, seed {seed}"
    else:
        group = affine_group(num_tiles) if kind == "agl" else projective_group()
        chosen = group[np.sort(_shuffled(len(group), seed)[:size])]
        name = f"AGL(1,{num_tiles})" if kind == "agl" else f"PGL(2,{num_tiles - 1})"
        if size < limit:
            name = f"{size} of {name}, seed {seed}"
    return PermutationSet(
        permutations=torch.from_numpy(chosen.astype(np.int64)),
        name=name,
        min_hamming=_min_hamming(chosen),
        mean_hamming=_mean_hamming(chosen),
        hash=_hash(chosen),
    )


def affine_group(order: int) -> NDArray[np.uint8]:
    """Return AGL(1, q): the maps x -> a x + b with a != 0 of GF(q), (q * (q - 1), q).

    Two of them agree at one point at most, so they lie at distance q - 1 or q. The first is the
    identity.

    Args:
        order: q, one of 4, 8, 9 and 27.
    """
    plus, times = finite_field(order)
    return np.stack([plus[times[a], b] for a in range(1, order) for b in range(order)])


def projective_group() -> NDArray[np.uint8]:
    """Return PGL(2, 8): the maps x -> (a x + b) / (c x + d) with ad != bc, (504, 9).

    Point 8 is infinity. Two of the maps agree at two points at most, so they lie at distance 7 or
    more. The first is the identity.
    """
    plus, times = finite_field(8)
    infinity = 8
    maps = [np.append(row, infinity) for row in affine_group(8)]  # c = 0
    # With c = 1, each map is written in one way. In characteristic 2, minus is plus.
    for a, b, d in product(range(8), repeat=3):
        if times[a, d] == b:
            continue
        values = []
        for x in range(8):
            above, below = plus[times[a, x], b], plus[x, d]
            # The quotient is the number that, times what is below, gives what is above.
            values.append(int(np.argmax(times[below] == above)) if below else infinity)
        maps.append(np.array([*values, a]))
    return np.stack(maps).astype(np.uint8)


def finite_field(order: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the tables of addition and multiplication of GF(q), each (q, q).

    Element ``n`` is the polynomial whose coefficients are the digits of n in base p, the constant
    first; so 0 is the zero and 1 the one.

    Args:
        order: q, one of 4, 8, 9 and 27.
    """
    prime, modulus = _FIELDS[order]
    degree = len(modulus) - 1
    weights = prime ** np.arange(degree)
    digits = np.arange(order)[:, None] // weights % prime  # (q, degree)
    plus = (digits[:, None] + digits[None, :]) % prime @ weights
    products = np.zeros((order, order, 2 * degree - 1), dtype=np.int64)
    for i, j in product(range(degree), repeat=2):
        products[..., i + j] += digits[:, None, i] * digits[None, :, j]
    # Highest power first, x^n is replaced by what the modulus, whose first coefficient is 1, makes
    # it equal to.
    for power in range(2 * degree - 2, degree - 1, -1):
        for low in range(degree):
            products[..., power - degree + low] -= products[..., power] * modulus[low]
    times = products[..., :degree] % prime @ weights
    return plus.astype(np.uint8), times.astype(np.uint8)


def _greedy_max_min(candidates: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Choose rows one by one, each as far as possible from the nearest chosen one, (size, T).

    The first candidate starts; of several equally far ones, the first is taken.
    """
    places = np.ascontiguousarray(candidates.T)
    chosen = [0]
    nearest = np.full(len(candidates), candidates.shape[1], dtype=np.uint8)
    for _ in range(size - 1):
        np.minimum(nearest, _distances(places, candidates[chosen[-1]]), out=nearest)
        chosen.append(int(nearest.argmax()))
    return candidates[chosen]


def _distances(places: NDArray[Any], row: NDArray[Any]) -> NDArray[np.uint8]:
    """Return at how many places each permutation differs from one.

    Args:
        places: (T, M), the permutations as columns: long contiguous rows are compared ten times as
            fast as M short ones.
        row: (T,).
    """
    distances = np.zeros(places.shape[1], dtype=np.uint8)
    for place, tile in zip(places, row, strict=True):
        distances += (place != tile).view(np.uint8)  # added as they are, without a conversion
    return distances


def _candidates(num_tiles: int, seed: int) -> NDArray[np.uint8]:
    """Return permutations in an order drawn by the seed, all of them if the tiles are few."""
    if num_tiles > _EXHAUSTIVE:
        drawn = _random_words(_POOL * num_tiles, seed).reshape(_POOL, num_tiles)
        return drawn.argsort(axis=1, kind="stable").astype(np.uint8)
    count = math.factorial(num_tiles)
    flat = chain.from_iterable(permutations(range(num_tiles)))
    everything = np.fromiter(flat, dtype=np.uint8, count=count * num_tiles)
    return everything.reshape(count, num_tiles)[_shuffled(count, seed)]


def _shuffled(count: int, seed: int) -> NDArray[np.intp]:
    return _random_words(count, seed).argsort(kind="stable")


def _random_words(count: int, seed: int) -> NDArray[np.uint64]:
    """Return raw words of PCG64: what NumPy promises to keep the same in every later version.

    It does not promise that of ``Generator.permutation``, and a set that changed with an update
    would give the classes of every earlier checkpoint another meaning.
    """
    words: NDArray[np.uint64] = np.random.PCG64(seed).random_raw(count)
    return words


def _min_hamming(rows: NDArray[Any]) -> int:
    places = np.ascontiguousarray(rows.T)
    return min(
        int(_distances(places[:, number + 1 :], row).min()) for number, row in enumerate(rows[:-1])
    )


def _mean_hamming(rows: NDArray[Any]) -> float:
    """Return the mean distance of all pairs, from how often each tile comes to each place."""
    count, num_tiles = rows.shape
    alike = sum(
        math.comb(times, 2) for place in rows.T for times in Counter(place.tolist()).values()
    )
    return float(num_tiles - alike / math.comb(count, 2))


def _hash(rows: NDArray[Any]) -> str:
    numbers = np.concatenate([rows.shape, rows.ravel()]).astype("<i8")
    return hashlib.sha256(numbers.tobytes()).hexdigest()
