"""Embeddings as numbers: the nearest rows, groups of near duplicates, rows that lie apart, and a map.

Vectors are float16 [N, D], as labellings store them, and stay so in memory; a few thousand at a time are float32 of
length 1. Similarity is the cosine, summed in float32; all that is given here is `usable`. What is easy to break: equal
inputs give equal outputs, so of equal rows the first counts, and what is drawn at random has a fixed seed.
"""
# Shapes: N rows, B rows of a block, D numbers of a vector, Q queries, K pivots, M cells in which a row is looked for

from collections.abc import Callable, Iterator, Sequence

import numpy as np

__all__ = ["EXACT_ROWS", "Nearest", "cosines", "differing", "far_apart", "map_2d", "near_groups", "nearest", "usable"]

EXACT_ROWS = 16_384
"""Up to so many different vectors `near_groups` compares each with each."""

_BLOCK = 4096
_SMALL_BLOCK = 1024  # float32, it fits into the cache of a core
_CELLS = 8  # M
_FEW = 64  # to find so many one by one takes no longer than to sort a block
_MAX_EDGES = 2**20  # that wait to be joined
_SIGN_AND_NUMBER = np.int32(-0x7000_2000)  # 0x8FFFE000: of a float16 whose bits were shifted to a float32's
_EXPONENTS_APART = np.float32(2.0**112)  # 127 - 15


def usable(vectors_ND: np.ndarray) -> np.ndarray:
    """bool [N]: whether all numbers of a vector (float16) are finite, and not all of them 0."""
    largest_N = np.empty(len(vectors_ND), np.uint16)
    for begin in range(0, len(vectors_ND), _SMALL_BLOCK):
        bits_BD = vectors_ND[begin : begin + _SMALL_BLOCK].view(np.uint16)
        largest_N[begin : begin + _SMALL_BLOCK] = (bits_BD & np.uint16(0x7FFF)).max(axis=1)  # rises with the number
    return (largest_N > 0) & (largest_N < np.uint16(0x7C00))


def _widened(vectors_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, D], and their lengths, float32 [N]."""
    if vectors_ND.dtype == np.float16:
        # As astype does, in half its time, which is most of a search: the bits in their new places, and the exponents.
        bits_ND = vectors_ND.view(np.int16).astype(np.int32)
        bits_ND <<= 13
        bits_ND &= _SIGN_AND_NUMBER
        x_ND = bits_ND.view(np.float32)
        x_ND *= _EXPONENTS_APART
    else:
        x_ND = vectors_ND.astype(np.float32)
    return x_ND, np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND))


def _unit(vectors_ND: np.ndarray) -> np.ndarray:
    """float32 [N, D], each of length 1."""
    x_ND, lengths_N = _widened(vectors_ND)
    x_ND /= lengths_N[:, None]
    return x_ND


def _largest(x_QB: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and values of the largest of each row, [Q, count], falling; of equal ones the first. Destroys x."""
    count = min(count, x_QB.shape[1])
    if count > _FEW:
        columns = np.argsort(-x_QB, axis=1, kind="stable")[:, :count]
        return columns, np.take_along_axis(x_QB, columns, axis=1)
    rows = np.arange(len(x_QB))
    columns = np.empty((len(x_QB), count), np.int64)
    values = np.empty((len(x_QB), count), x_QB.dtype)
    for rank in range(count):
        best = x_QB.argmax(axis=1)
        columns[:, rank] = best
        values[:, rank] = x_QB[rows, best]
        x_QB[rows, best] = -np.inf
    return columns, values


def cosines(vectors_ND: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The similarity of each row in `left` to the one at its place in `right`, float32."""
    found = [np.empty(0, np.float32)]
    for begin in range(0, len(left), _BLOCK):
        part = slice(begin, begin + _BLOCK)
        found.append(np.einsum("nd,nd->n", _unit(vectors_ND[left[part]]), _unit(vectors_ND[right[part]])))
    return np.concatenate(found)


# The nearest


class Nearest:
    """The rows of a stream that are most similar to each of some queries, exactly; of equal ones the first.

    Args:
        queries_QD: of any type; float32 where nothing is to be lost.
        count: how many of each.
    """

    def __init__(self, queries_QD: np.ndarray, count: int) -> None:
        self._queries_QD = _unit(queries_QD)
        self._count = count
        self.num_seen = 0
        """Rows so far."""
        self.places = np.empty((len(queries_QD), 0), np.int64)
        """[Q, count]: in the stream, the most similar first; fewer while it has fewer rows."""
        self.similarities = np.empty((len(queries_QD), 0), np.float32)
        """[Q, count]"""

    def add(self, vectors_ND: np.ndarray) -> None:
        """Look at the next rows."""
        for begin in range(0, len(vectors_ND), _SMALL_BLOCK):
            x_BD, lengths_B = _widened(vectors_ND[begin : begin + _SMALL_BLOCK])
            similarities_QB = self._queries_QD @ x_BD.T
            similarities_QB /= lengths_B
            if self.num_seen < self._count or (similarities_QB > self.similarities[:, -1:]).any():
                self._take(similarities_QB)
            self.num_seen += len(x_BD)

    def _take(self, similarities_QB: np.ndarray) -> None:
        places_B = np.arange(self.num_seen, self.num_seen + similarities_QB.shape[1])
        places = np.concatenate([self.places, np.broadcast_to(places_B, similarities_QB.shape)], axis=1)
        both = np.concatenate([self.similarities, similarities_QB], axis=1)
        columns, self.similarities = _largest(both, self._count)
        self.places = np.take_along_axis(places, columns, axis=1)


def nearest(vectors_ND: np.ndarray, queries_QD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are most similar to each query: places, int64 [Q, count], and similarities, float32 [Q, count].

    A query that is a row itself finds itself first, or a row before it that is equal to it.
    """
    found = []
    for begin in range(0, max(1, len(queries_QD)), _SMALL_BLOCK):
        search = Nearest(queries_QD[begin : begin + _SMALL_BLOCK], count)
        search.add(vectors_ND)
        found.append(search)
    return np.concatenate([one.places for one in found]), np.concatenate([one.similarities for one in found])


# Near duplicates


def near_groups(
    vectors_ND: np.ndarray, threshold: float, *, tell: Callable[[int], None] = lambda num_rows: None
) -> np.ndarray:
    """Group rows by similarity: int64 [N], the first row of each row's group.

    Two rows of a group are at least as similar as `threshold`, or others of the group lie between them that are. Up to
    EXACT_ROWS different vectors, every pair is looked at. Beyond, each row is compared with the rows of its 8 nearest
    cells: a cell is what lies nearest to one of sqrt(16 N) rows drawn at random, by the cosine after their mean was
    taken off, since all vectors of a network point much the same way. That finds nearly all pairs (docs/benchmarks.md);
    what it finds is at least as similar as it should be.

    Args:
        tell: is called with the number of rows that are done since the last call.
    """
    groups = _Groups(len(vectors_ND))
    first_N = _first_equal(vectors_ND)
    groups.note(np.arange(len(vectors_ND)), first_N)
    rows = np.flatnonzero(first_N == np.arange(len(vectors_ND)))
    tell(len(vectors_ND) - len(rows))
    for pivot, home, near in _cells(vectors_ND, rows) if len(rows) > EXACT_ROWS else [(rows[:1], rows, rows)]:
        _join_cell(vectors_ND, pivot, home, near, threshold, groups)
        tell(len(home))
    return groups.roots()


def differing(roots: np.ndarray, values: Sequence[object]) -> np.ndarray:
    """bool [N]: whether the group of a row, given by its first row, has several values; None is no value."""
    of_group: dict[int, set[str]] = {}
    for root, value in zip(roots.tolist(), values, strict=True):
        if value is not None:
            of_group.setdefault(root, set()).add(str(value))
    return np.array([len(of_group.get(root, ())) > 1 for root in roots.tolist()], bool)


class _Groups:
    """Rows in groups that grow together; what is to be joined is gathered, since joining looks at all rows."""

    def __init__(self, num_rows: int) -> None:
        self._roots = np.arange(num_rows)
        self._edges: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_edges = 0

    def note(self, left: np.ndarray, right: np.ndarray) -> None:
        """Each row of `left` and the one at its place in `right` are of one group."""
        apart = self._roots[left] != self._roots[right]
        self._edges.append((left[apart], right[apart]))
        self._num_edges += int(apart.sum())
        if self._num_edges > _MAX_EDGES:
            self._join()

    def roots(self) -> np.ndarray:
        """The first row of each row's group."""
        self._join()
        return self._roots

    def _join(self) -> None:
        if not self._edges:
            return
        left, right = (np.concatenate([edge[side] for edge in self._edges]) for side in (0, 1))
        self._edges = []
        self._num_edges = 0
        while True:
            one, other = self._roots[left], self._roots[right]
            apart = one != other
            if not apart.any():
                return
            left, right, one, other = left[apart], right[apart], one[apart], other[apart]
            np.minimum.at(self._roots, np.maximum(one, other), np.minimum(one, other))
            self._flatten()

    def _flatten(self) -> None:
        while True:
            above = self._roots[self._roots]
            if np.array_equal(above, self._roots):
                return
            self._roots = above


def _first_equal(vectors_ND: np.ndarray) -> np.ndarray:
    """int64 [N]: the first row with the very same numbers. Copies in great number would make a cell of their own."""
    weights_D = np.random.default_rng(0).integers(2**64, size=vectors_ND.shape[1], dtype=np.uint64)
    hashes_N = np.empty(len(vectors_ND), np.uint64)
    for begin in range(0, len(vectors_ND), _SMALL_BLOCK):
        bits_BD = vectors_ND[begin : begin + _SMALL_BLOCK].view(np.uint16).astype(np.uint64)
        hashes_N[begin : begin + len(bits_BD)] = bits_BD @ weights_D
    _, first, inverse = np.unique(hashes_N, return_index=True, return_inverse=True)
    first_N = first[inverse]
    again = np.flatnonzero(first_N != np.arange(len(first_N)))
    for begin in range(0, len(again), _BLOCK):
        rows = again[begin : begin + _BLOCK]
        differ = (vectors_ND[rows] != vectors_ND[first_N[rows]]).any(axis=1)
        first_N[rows[differ]] = rows[differ]
    return first_N


def _cells(vectors_ND: np.ndarray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pivot [1], the rows to which its cell is the nearest, and those that have it among their M nearest."""
    num_cells = int(np.sqrt(2 * _CELLS * len(rows)))  # as much work to find the cells as to compare inside them
    pivots_K = np.sort(np.random.default_rng(0).choice(rows, num_cells, replace=False))
    axes_KD = _unit(vectors_ND[pivots_K])
    middle_D = axes_KD.mean(axis=0)
    axes_KD -= middle_D
    axes_KD /= np.sqrt(np.einsum("kd,kd->k", axes_KD, axes_KD))[:, None] + np.float32(1e-12)
    offsets_K = axes_KD @ middle_D
    cells_NM = np.empty((len(rows), _CELLS), np.int32)
    for begin in range(0, len(rows), _SMALL_BLOCK):
        block_BD = _unit(vectors_ND[rows[begin : begin + _SMALL_BLOCK]])
        cells_NM[begin : begin + len(block_BD)] = _largest(block_BD @ axes_KD.T - offsets_K, _CELLS)[0]
    home, home_ends = _by_value(cells_NM[:, 0], num_cells)
    near, near_ends = _by_value(cells_NM.ravel(), num_cells)
    near //= _CELLS
    for cell in range(num_cells):
        of_home = home[home_ends[cell] : home_ends[cell + 1]]
        of_near = near[near_ends[cell] : near_ends[cell + 1]]
        yield pivots_K[cell : cell + 1], rows[of_home], rows[of_near]


def _by_value(values: np.ndarray, num_values: int) -> tuple[np.ndarray, np.ndarray]:
    """The places of 0, then those of 1, ..., and where those of each begin, with the end of the last."""
    ends = np.concatenate([[0], np.cumsum(np.bincount(values, minlength=num_values))])
    return np.argsort(values, kind="stable"), ends


def _join_cell(
    vectors_ND: np.ndarray, pivot: np.ndarray, home: np.ndarray, near: np.ndarray, threshold: float, groups: _Groups
) -> None:
    """Join the rows of `home` with what is similar to them in `near`.

    Those that are similar to the pivot are one group by that; they are compared with the others only, so that a crowd
    of near copies takes no time that grows with its square.
    """
    pivot_D = _unit(vectors_ND[pivot])[0]
    for first in range(0, len(home), _BLOCK):
        left = home[first : first + _BLOCK]
        left_BD = _unit(vectors_ND[left])
        left_known = left_BD @ pivot_D >= threshold
        for begin in range(0, len(near), _BLOCK):
            right = near[begin : begin + _BLOCK]
            right_BD = _unit(vectors_ND[right])
            right_known = right_BD @ pivot_D >= threshold
            groups.note(right[right_known], np.broadcast_to(pivot, right_known.sum()))
            for mine, theirs in ((~left_known, slice(None)), (left_known, ~right_known)):
                one, other = _where(left_BD[mine] @ right_BD[theirs].T >= threshold)
                groups.note(left[mine][one], right[theirs][other])


def _where(is_BB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of what is true: np.nonzero, which takes ten times as long for two axes as for one."""
    flat = np.flatnonzero(is_BB)
    return flat // max(1, is_BB.shape[1]), flat % max(1, is_BB.shape[1])


# What to look at


def far_apart(
    vectors_ND: np.ndarray, doubts_N: np.ndarray, count: int, known_KD: np.ndarray | None = None
) -> np.ndarray:
    """Rows to label next, int64 [count], the most wanted first: doubtful ones that lie far from each other.

    Greedy k-centre: each is the one with the largest doubt x distance, where distance is 1 less the similarity to the
    nearest row that is chosen, or `known` already.

    Args:
        doubts_N: float [N], at least 0: how little sure the network is.
        known_KD: float16, vectors of what has been labelled.
    """
    x_ND = _unit(vectors_ND)
    nearest_N = np.full(len(x_ND), -1.0, np.float32)
    for begin in range(0, 0 if known_KD is None else len(known_KD), _SMALL_BLOCK):
        known_BD = _unit(known_KD[begin : begin + _SMALL_BLOCK])  # type: ignore[index]
        for start in range(0, len(x_ND), _BLOCK):
            part = slice(start, start + _BLOCK)
            nearest_N[part] = np.maximum(nearest_N[part], (x_ND[part] @ known_BD.T).max(axis=1))
    chosen = np.empty(min(count, len(x_ND)), np.int64)
    left_N = np.ones(len(x_ND), bool)
    for rank in range(len(chosen)):
        wanted_N = np.where(left_N, doubts_N * np.maximum(1 - nearest_N, 0), -1.0)
        chosen[rank] = wanted_N.argmax()
        left_N[chosen[rank]] = False
        nearest_N = np.maximum(nearest_N, x_ND @ x_ND[chosen[rank]])
    return chosen


def map_2d(vectors_ND: np.ndarray) -> np.ndarray:
    """Where to draw each row: float32 [N, 2] in -1 .. 1, the two directions in which vectors of length 1 differ most.

    Principal components. The larger side of the map fills -1 .. 1, the other one keeps its proportion.
    """
    num_rows, width = vectors_ND.shape
    if not num_rows or width < 2:
        return np.zeros((num_rows, 2), np.float32)
    sum_D = np.zeros(width)
    products_DD = np.zeros((width, width))
    for begin in range(0, num_rows, _BLOCK):
        block_BD = _unit(vectors_ND[begin : begin + _BLOCK])
        sum_D += block_BD.sum(axis=0, dtype=np.float64)
        products_DD += block_BD.T @ block_BD
    middle_D = sum_D / num_rows
    _, axes_DD = np.linalg.eigh(products_DD / num_rows - np.outer(middle_D, middle_D))
    axes_D2 = axes_DD[:, :-3:-1]  # of the two largest
    axes_D2 = axes_D2 * np.sign(axes_D2[np.abs(axes_D2).argmax(axis=0), [0, 1]])
    map_N2 = np.empty((num_rows, 2), np.float32)
    for begin in range(0, num_rows, _BLOCK):
        block_BD = _unit(vectors_ND[begin : begin + _BLOCK])
        map_N2[begin : begin + _BLOCK] = (block_BD - middle_D) @ axes_D2
    return map_N2 / max(float(np.abs(map_N2).max()), 1e-6)  # less is the rounding of float32
