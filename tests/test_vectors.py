"""Nearest rows, groups of near duplicates, rows that lie apart and the map, against plain loops in float64."""

import numpy as np
import pytest

from kinoray.library import vectors
from kinoray.library.vectors import cosines, far_apart, map_2d, near_groups, nearest, usable


def exact(rows: np.ndarray) -> np.ndarray:
    """float64 [N, D], each of length 1."""
    wide = rows.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def drawn(num_rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Vectors that point much the same way, as those of a network do: float16 [N, D]."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num_rows, width)) + 1).astype(np.float16)


def copies_of(rows: np.ndarray, noise: float, seed: int = 1) -> np.ndarray:
    """The rows, each with a little of something else in it."""
    wide = exact(rows)
    other = exact(np.random.default_rng(seed).normal(size=wide.shape))
    return (3 * (wide + noise * other)).astype(np.float16)


def plain_groups(rows: np.ndarray, threshold: float) -> list[int]:
    """The first row of each row's group: every pair is looked at, and groups are merged one by one."""
    similar = exact(rows) @ exact(rows).T
    assert np.abs(similar - threshold).min() > 1e-6, "a pair is too near to the threshold for float32"
    groups = list(range(len(rows)))
    for one, other in zip(*np.nonzero(similar >= threshold), strict=True):
        low, high = sorted((groups[one], groups[other]))
        if low != high:
            groups = [low if group == high else group for group in groups]
    return groups


def pairs_in(groups: np.ndarray) -> set[tuple[int, int]]:
    """All pairs of rows of one group."""
    found = set()
    for root in np.unique(groups):
        members = np.flatnonzero(groups == root).tolist()
        found |= {(one, other) for one in members for other in members if one < other}
    return found


# The nearest


@pytest.mark.parametrize("block", [7, 4096])
@pytest.mark.parametrize("count", [1, 10, 100])  # of so many all are sorted
def test_the_nearest_are_those_of_every_comparison(block: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_SMALL_BLOCK", block)
    rows, queries = drawn(700, 48), drawn(9, 48, seed=5).astype(np.float32)
    places, similarities = nearest(rows, queries, count)
    expected = exact(queries) @ exact(rows).T
    order = np.argsort(-expected, axis=1, kind="stable")[:, :count]
    assert np.array_equal(places, order)
    np.testing.assert_allclose(similarities, np.take_along_axis(expected, order, axis=1), atol=1e-6)


@pytest.mark.parametrize("few", [2, 64])
def test_of_equal_rows_the_first_are_the_nearest(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_FEW", few)
    monkeypatch.setattr(vectors, "_SMALL_BLOCK", 3)
    rows = np.tile(drawn(1, 8), (11, 1))
    places, similarities = nearest(rows, rows[:2], 4)
    assert places.tolist() == [[0, 1, 2, 3]] * 2
    np.testing.assert_allclose(similarities, 1, atol=1e-6)


def test_fewer_rows_than_are_wanted_are_all_found() -> None:
    rows = drawn(3, 8)
    places, similarities = nearest(rows, rows[2:], 10)
    assert sorted(places[0].tolist()) == [0, 1, 2]
    assert places[0, 0] == 2
    assert np.all(np.diff(similarities[0]) <= 0)


def test_similarity_is_of_directions_at_the_ends_of_float16() -> None:
    largest, least = 65504.0, 2.0**-24
    rows = np.array([[largest] * 64, [least] * 64, [largest, *[least] * 63]], np.float16)
    expected = exact(rows)
    assert np.allclose(cosines(rows, np.array([0, 0, 1]), np.array([1, 2, 2])), [1, *(expected[:2] @ expected[2])])


def test_every_float16_is_widened_as_numpy_does() -> None:
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    numbers = numbers[np.isfinite(numbers)].reshape(-1, 64)
    assert np.array_equal(vectors._widened(numbers)[0], numbers.astype(np.float32))


def test_a_vector_without_a_direction_is_not_usable() -> None:
    rows = np.array([[0, 1], [0, 0], [-0.0, 0], [np.inf, 1], [1, np.nan], [2.0**-24, 0], [-65504, 1]], np.float16)
    assert usable(rows).tolist() == [True, False, False, False, False, True, True]


# Near duplicates


def test_groups_are_those_of_every_pair() -> None:
    first = drawn(200, 24)
    rows = np.concatenate([first, copies_of(first[:60], 0.05), copies_of(first[:20], 0.1, seed=2)])
    rows = rows[np.random.default_rng(3).permutation(len(rows))]
    for threshold in (0.9, 0.97, 0.995):
        groups = near_groups(rows, threshold)
        assert groups.tolist() == plain_groups(rows, threshold)
    assert len(np.unique(near_groups(rows, 0.97))) < len(rows) - 60


def test_a_chain_of_neighbours_is_one_group_whose_ends_are_not_similar() -> None:
    angles = np.deg2rad(np.random.default_rng(0).permutation(41) * 2.0)
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    assert near_groups(rows, np.cos(np.deg2rad(2.5))).tolist() == [0] * 41
    assert near_groups(rows, np.cos(np.deg2rad(1.5))).tolist() == list(range(41))


def test_equal_rows_are_one_group_whatever_the_threshold() -> None:
    rows = drawn(30, 16)[np.arange(90) % 30]
    assert near_groups(rows, 1.0).tolist() == list(range(30)) * 3


def test_cells_find_what_every_pair_finds_but_for_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows without any structure, which is what cells are worst at; and they find nothing else."""
    first = drawn(3000, 64)
    rows = np.concatenate([first, copies_of(first, 0.15)])
    expected = pairs_in(near_groups(rows, 0.97))
    assert len(expected) == 3000
    monkeypatch.setattr(vectors, "EXACT_ROWS", 100)
    groups = near_groups(rows, 0.97)
    found = pairs_in(groups)
    assert found <= expected
    assert len(found) >= 0.99 * len(expected)
    assert np.array_equal(near_groups(rows, 0.97), groups)


def test_a_crowd_of_near_copies_is_one_group_of_many_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "EXACT_ROWS", 100)
    crowd = copies_of(np.repeat(drawn(1, 32, seed=9), 2000, axis=0), 0.05)
    rows = np.concatenate([drawn(500, 32), crowd])
    groups = near_groups(rows, 0.98)
    assert set(groups[500:].tolist()) == {500}
    assert groups[:500].tolist() == list(range(500))


def test_every_row_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.concatenate([drawn(400, 8), drawn(400, 8)[:50]])
    for most in (10_000, 100):
        monkeypatch.setattr(vectors, "EXACT_ROWS", most)
        told: list[int] = []
        near_groups(rows, 0.999, tell=told.append)
        assert sum(told) == len(rows)


# What to label next, and the map


@pytest.mark.parametrize("num_known", [0, 5])
def test_far_apart_is_the_greedy_choice(num_known: int) -> None:
    rows, known = drawn(120, 16), drawn(5, 16, seed=4)[:num_known]
    doubts = np.random.default_rng(2).random(120).astype(np.float32)
    unit, seen, expected = exact(rows), list(exact(known)) if num_known else [], []
    for _ in range(20):
        wanted = []
        for row, doubt in zip(unit, doubts, strict=True):
            closest = max((float(row @ other) for other in seen), default=-1.0)
            wanted.append(float(doubt) * max(0.0, 1 - closest))
        best = int(np.argmax([-1.0 if place in expected else value for place, value in enumerate(wanted)]))
        expected.append(best)
        seen.append(unit[best])
    assert far_apart(rows, doubts, 20, known).tolist() == expected


def test_far_apart_gives_each_row_once_though_all_are_equal() -> None:
    rows = np.tile(drawn(1, 8), (6, 1))
    assert sorted(far_apart(rows, np.ones(6), 9).tolist()) == [0, 1, 2, 3, 4, 5]


def test_the_map_is_the_two_largest_principal_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_BLOCK", 100)
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(350, 12)) * np.linspace(4, 0.2, 12) + 3).astype(np.float16)
    found = map_2d(rows)
    unit = exact(rows)
    centred = unit - unit.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ axes[:2].T
    expected *= np.sign((expected * found).sum(axis=0))
    np.testing.assert_allclose(found, expected / np.abs(expected).max(), atol=1e-4)
    assert np.abs(found).max() == 1
    assert np.array_equal(map_2d(rows), found)


@pytest.mark.parametrize("rows", [np.empty((0, 5), np.float16), drawn(1, 5), drawn(4, 1)])
def test_a_map_of_next_to_nothing_is_a_point(rows: np.ndarray) -> None:
    assert map_2d(rows).tolist() == [[0, 0]] * len(rows)
