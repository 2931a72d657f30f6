"""Permutation sets: far apart, as stated, and the same on every machine."""

from __future__ import annotations

import hashlib
import math
from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medssl.errors import ConfigError
from medssl.pretext._permutations import (
    affine_group,
    finite_field,
    largest_set,
    permutation_set,
    projective_group,
)

FIELDS = [4, 8, 9, 27]
every_field = pytest.mark.parametrize("order", FIELDS)

SETS = [
    ("greedy_max_min", 4, 24),
    ("greedy_max_min", 8, 24),
    ("greedy_max_min", 9, 100),
    ("greedy_max_min", 27, 100),
    ("agl", 4, 12),
    ("agl", 8, 56),
    ("agl", 9, 40),
    ("agl", 27, 100),
    ("pgl", 9, 100),
]
every_set = pytest.mark.parametrize(("kind", "num_tiles", "size"), SETS)

GOLDEN = [
    ("greedy_max_min", 4, 24, "0 2 3 1", "e99bb00a87f530c3"),
    ("greedy_max_min", 8, 24, "3 1 2 5 7 0 4 6", "519791d5847ce380"),
    ("greedy_max_min", 9, 100, "5 8 1 6 3 7 2 4 0", "c8ff036da80119a8"),
    (
        "greedy_max_min",
        27,
        100,
        "26 21 5 19 24 8 14 16 12 4 17 9 7 13 15 20 2 1 3 6 23 22 25 10 18 11 0",
        "243e0a772292b80a",
    ),
    ("agl", 4, 12, "1 0 3 2", "506a4b34143cf633"),
    ("agl", 8, 56, "1 0 3 2 5 4 7 6", "3c8b9509f5caab9e"),
    ("agl", 9, 72, "1 2 0 4 5 3 7 8 6", "792b4cf7990ae182"),
    ("agl", 9, 20, "2 0 1 5 3 4 8 6 7", "a26c3a49e0c3f0f4"),
    (
        "agl",
        27,
        702,
        "1 2 0 4 5 3 7 8 6 10 11 9 13 14 12 16 17 15 19 20 18 22 23 21 25 26 24",
        "bd7bf825b562a841",
    ),
    ("pgl", 9, 504, "1 0 3 2 5 4 7 6 8", "a576a1bd36a5be9f"),
]


def as_set(rows: Tensor | np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(row) for row in rows.tolist()}


def distances(rows: Tensor) -> list[int]:
    """Return the distance of every pair, one by one."""
    pairs = combinations(rows.tolist(), 2)
    return [sum(x != y for x, y in zip(a, b, strict=True)) for a, b in pairs]


@st.composite
def sizes(draw: st.DrawFn) -> tuple[str, int, int]:
    kind, num_tiles = draw(
        st.sampled_from(
            [("greedy_max_min", 4), ("greedy_max_min", 5), ("agl", 8), ("agl", 9), ("pgl", 9)]
        )
    )
    return kind, num_tiles, draw(st.integers(2, min(largest_set(kind, num_tiles), 60)))


@every_set
def test_every_row_is_a_permutation_and_no_two_are_equal(kind, num_tiles, size):
    rows = permutation_set(kind, num_tiles, size).permutations
    assert rows.dtype == torch.long
    assert rows.shape == (size, num_tiles)
    assert torch.equal(rows.sort(1).values, torch.arange(num_tiles).expand_as(rows))
    assert len(as_set(rows)) == size


@every_set
def test_the_stated_distances_are_those_of_all_pairs(kind, num_tiles, size):
    found = permutation_set(kind, num_tiles, size)
    each = distances(found.permutations)
    assert found.min_hamming == min(each)
    assert found.mean_hamming == pytest.approx(sum(each) / len(each))


@given(case=sizes(), seed=st.integers(0, 2**32))
def test_any_part_of_a_set_has_the_stated_distances(case, seed):
    found = permutation_set(*case, seed)
    each = distances(found.permutations)
    assert (found.min_hamming, found.mean_hamming) == (
        min(each),
        pytest.approx(sum(each) / len(each)),
    )
    if case[0] != "greedy_max_min":
        assert found.min_hamming >= case[1] - (2 if case[0] == "pgl" else 1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_hundred_greedy_permutations_of_nine_tiles_differ_at_six_places(seed):
    assert permutation_set("greedy_max_min", 9, 100, seed).min_hamming == 6


def test_each_greedy_choice_is_as_far_as_any_permutation_could_be():
    rows = permutation_set("greedy_max_min", 5, 30, seed=3).permutations.tolist()

    def nearest(row: tuple[int, ...], chosen: list[list[int]]) -> int:
        return min(sum(x != y for x, y in zip(row, other, strict=True)) for other in chosen)

    for count in range(1, 30):
        best = max(nearest(row, rows[:count]) for row in permutations(range(5)))
        assert nearest(rows[count], rows[:count]) == best


def test_a_smaller_greedy_set_is_the_beginning_of_a_larger_one():
    small = permutation_set("greedy_max_min", 8, 24).permutations
    assert torch.equal(small, permutation_set("greedy_max_min", 8, 100).permutations[:24])


def test_greedy_sets_of_four_tiles_can_hold_every_permutation():
    found = permutation_set("greedy_max_min", 4, 24)
    assert as_set(found.permutations) == set(permutations(range(4)))
    assert found.min_hamming == 2


@pytest.mark.parametrize(
    ("kind", "num_tiles", "size", "distance"),
    [("agl", 4, 12, 3), ("agl", 8, 56, 7), ("agl", 9, 72, 8), ("agl", 27, 702, 26),
     ("pgl", 9, 504, 7)],
)  # fmt: skip
def test_a_whole_group_has_the_size_and_distance_of_theory(kind, num_tiles, size, distance):
    found = permutation_set(kind, num_tiles, size)
    assert largest_set(kind, num_tiles) == size == len(as_set(found.permutations))
    assert found.min_hamming == distance


@every_field
def test_the_tables_are_those_of_a_field(order):
    plus, times = (table.astype(int) for table in finite_field(order))
    everything = np.arange(order)
    for table, nought in ((plus, 0), (times, 1)):
        assert np.array_equal(table, table.T)
        assert np.array_equal(table[nought], everything)
        left = table[table[:, :, None], everything]  # (x . y) . z
        assert np.array_equal(left, table[everything[:, None, None], table[None]])
    assert np.array_equal(np.sort(plus, axis=1), np.broadcast_to(everything, plus.shape))
    nonzero = np.sort(times[1:, 1:], axis=1)  # no divisors of zero: every number has an inverse
    assert np.array_equal(nonzero, np.broadcast_to(everything[1:], nonzero.shape))
    spread = times[everything[:, None, None], plus[None]]  # x . (y + z)
    assert np.array_equal(spread, plus[times[:, :, None], times[:, None, :]])


@pytest.mark.parametrize(
    ("group", "points", "fixed"),
    [(affine_group(4), 4, 2), (affine_group(8), 8, 2), (affine_group(9), 9, 2),
     (affine_group(27), 27, 2), (projective_group(), 9, 3)],
    ids=["AGL(1,4)", "AGL(1,8)", "AGL(1,9)", "AGL(1,27)", "PGL(2,8)"],
)  # fmt: skip
def test_the_group_is_closed_and_sends_any_points_anywhere_in_exactly_one_way(group, points, fixed):
    maps = as_set(group)
    assert np.array_equal(group[0], np.arange(points))
    some = group[:: max(1, len(group) // 80)]
    assert all(as_set(group[:, row]) == maps for row in some)
    images = [tuple(row[:fixed]) for row in group.tolist()]
    assert len(set(images)) == len(images) == math.perm(points, fixed)


def test_of_a_group_the_seed_draws_a_part_in_the_group_s_order():
    parts = [permutation_set("agl", 9, 20, seed).permutations for seed in (0, 1)]
    assert not torch.equal(*parts)
    whole = [tuple(row) for row in affine_group(9).tolist()]
    for part in parts:
        positions = [whole.index(tuple(row)) for row in part.tolist()]
        assert positions == sorted(positions)


def test_of_a_whole_group_the_seed_changes_nothing():
    assert len({permutation_set("pgl", 9, 504, seed).hash for seed in range(3)}) == 1


@pytest.mark.parametrize("num_tiles", [4, 9, 27])
def test_another_seed_gives_another_greedy_set(num_tiles):
    hashes = {permutation_set("greedy_max_min", num_tiles, 10, seed).hash for seed in range(4)}
    assert len(hashes) == 4


def test_the_hash_tells_rows_in_another_order_and_another_shape_apart():
    found = permutation_set("agl", 4, 12)
    numbers = np.array([12, 4, *found.permutations.flatten().tolist()], dtype="<i8")
    assert found.hash == hashlib.sha256(numbers.tobytes()).hexdigest()
    kinds = product(("agl", "greedy_max_min"), (8, 9), (12, 24))
    assert len({permutation_set(*case).hash for case in kinds}) == 8


@pytest.mark.parametrize(("kind", "num_tiles", "size", "second", "start_of_hash"), GOLDEN)
def test_sets_never_change(kind, num_tiles, size, second, start_of_hash):
    """The classes of every earlier checkpoint depend on them."""
    found = permutation_set(kind, num_tiles, size)
    assert found.permutations[1].tolist() == [int(tile) for tile in second.split()]
    assert found.hash.startswith(start_of_hash)


def test_a_set_is_made_once():
    assert permutation_set("agl", 9, 72) is permutation_set("agl", 9, 72)


@pytest.mark.parametrize(
    ("kind", "num_tiles", "size", "limit"),
    [("agl", 9, 100, 72), ("pgl", 9, 505, 504), ("greedy_max_min", 4, 25, 24),
     ("greedy_max_min", 8, 1, 40320), ("greedy_max_min", 27, 50_001, 50_000)],
)  # fmt: skip
def test_more_permutations_than_there_are_or_fewer_than_two_are_refused(
    kind, num_tiles, size, limit
):
    with pytest.raises(ConfigError) as refused:
        permutation_set(kind, num_tiles, size)
    assert str(refused.value) == (
        f"pretext.num_permutations: {size} permutations asked for; {kind} has {limit} of "
        f"{num_tiles} tiles. Choose 2 to {limit}."
    )


@pytest.mark.parametrize(
    ("kind", "num_tiles", "exists"), [("pgl", 8, "9"), ("agl", 16, "4, 8, 9 or 27")]
)
def test_a_group_that_does_not_exist_for_the_grid_is_refused(kind, num_tiles, exists):
    with pytest.raises(ConfigError) as refused:
        permutation_set(kind, num_tiles, 10)
    assert str(refused.value) == (
        f"pretext.permutations: {kind} permutes {exists} tiles, this puzzle has {num_tiles}. "
        "Choose greedy_max_min, or another pretext.grid."
    )
