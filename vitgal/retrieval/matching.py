"""Nearest neighbours among local descriptors, equal to those of a float64 KD-tree."""

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

MOST = 1e38  # as far as a float32 goes
BLOCK = 1 << 22  # similarities held at once: 16 MiB
SIEVED = 1 / 500  # more pairs left by the first pass than this take longer than the whole product
SAMPLE = 64  # query descriptors that tell whether the first pass is worth it
PAIRS = 1 << 13  # descriptor pairs measured at once in float64: 8 MiB at 128 dimensions


def match(
    query_descriptors: np.ndarray,
    gallery_descriptors: np.ndarray,
    max_distance: float = 0.82,
    *,
    device: str | None = None,
) -> np.ndarray:
    """Matches each query descriptor with its nearest gallery descriptor, one way.

    Args:
        query_descriptors: (N, C) real numbers.
        gallery_descriptors: (M, C) real numbers.
        max_distance: Euclidean; a match lies strictly nearer. `math.inf`: no limit.
        device: of torch, "cuda" or "cuda:1" for example, where the products run; None: NumPy. The
            matches are the same.
    Returns:
        (K, 2) int64, (query index, gallery index) by rising query index. Several query descriptors
        may share one gallery descriptor. Equal distances: the lowest gallery index. No descriptor
        on either side: (0, 2), whatever the widths.
    Raises:
        ValueError: widths that differ, nan or infinite or huge values, a negative `max_distance`, a
            device that torch does not find.

    Distances are those of the published float64 KD-tree, digit by digit: float32 products find the
    few gallery descriptors that may be the nearest, float64 decides among them.
    """
    return match_shortlist(query_descriptors, [gallery_descriptors], max_distance, device=device)[0]


def match_shortlist(
    query_descriptors: np.ndarray,
    galleries: Iterable[np.ndarray],
    max_distance: float = 0.82,
    *,
    device: str | None = None,
) -> list[np.ndarray]:
    """`match` of one query image against each of many images, the query prepared once.

    galleries: (M_i, C) each; they are read one after the other. Returns one (K_i, 2) int64 each;
    no galleries: an empty list. Raises ValueError as `match` does.
    """
    check_device(device)
    query = _Descriptors.read(query_descriptors, "query")
    return [
        _match(query, _Descriptors.read(gallery, "gallery"), max_distance, device)
        for gallery in galleries
    ]


def pick_device(device: str | None) -> str | None:
    """The device as it is named; for "auto" "cuda" where there is a GPU, else None, for NumPy."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else None


def check_device(device: str | None) -> None:
    """Raises ValueError where torch finds no such device; None and "auto" ask for none."""
    if device in (None, "auto"):
        return
    import torch  # only here: matching on the processor does without it

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"matching cannot run on {device!r} ({reason}): name another device, or None for NumPy"
        ) from error


def match_squares(
    query_descriptors: np.ndarray, gallery_descriptors: np.ndarray, matches: np.ndarray
) -> np.ndarray:
    """Squared distances (K,) float64 of the matches (K, 2), as `match` compares them.

    A match (i, j) lies within `max_distance` exactly where its value is below its square.
    """
    query = _Descriptors.read(query_descriptors, "query").values
    gallery = _Descriptors.read(gallery_descriptors, "gallery").values
    return _squared_distances(query, gallery, matches[:, 0], matches[:, 1])


@dataclass(frozen=True, eq=False)
class _Descriptors:
    """Descriptors as given, and half their squared lengths."""

    values: np.ndarray  # (N, C) float32 or float64
    halves: np.ndarray  # (N,) float64

    @classmethod
    def read(cls, descriptors: np.ndarray, side: str) -> "_Descriptors":
        values = np.asarray(descriptors)
        values = values.astype(np.result_type(values, np.float32), copy=False)
        if values.ndim != 2:
            raise ValueError(f"{side} descriptors of shape {values.shape}, not (N, C)")
        halves = np.einsum("ij,ij->i", values, values, dtype=np.float64) / 2
        if not (halves < 1e30).all():  # false for nan as well
            raise ValueError(f"{side} descriptors hold nan, infinite or huge values")
        return cls(values, halves)

    @functools.cached_property
    def left(self) -> np.ndarray:  # (N, C + 1) float32: u, 1
        return self._extended(np.ones(len(self.values)))

    @functools.cached_property
    def right(self) -> np.ndarray:  # (N, C + 1) float32: v, -|v|^2 / 2
        return self._extended(-self.halves)

    @functools.cached_property
    def left_bound(self) -> np.ndarray:  # (N, S + 3): u's first values, |the rest|, 1, -|u|^2 / 2
        return self._shortened(np.ones(len(self.values)), -self.halves)

    @functools.cached_property
    def right_bound(self) -> np.ndarray:  # (N, S + 3): v's, |the rest|, -|v|^2 / 2, 1
        return self._shortened(-self.halves, np.ones(len(self.values)))

    def _shortened(self, *columns: np.ndarray) -> np.ndarray:
        short = self.values.shape[1] * 5 // 8
        rest = self.values[:, short:]
        shortened = np.empty((len(self.values), short + 3), np.float32)
        shortened[:, :short], shortened[:, -2], shortened[:, -1] = self.values[:, :short], *columns
        shortened[:, short] = np.sqrt(np.einsum("ij,ij->i", rest, rest, dtype=np.float64))
        return shortened

    def _extended(self, column: np.ndarray) -> np.ndarray:
        extended = np.empty((len(self.values), self.values.shape[1] + 1), np.float32)
        extended[:, :-1], extended[:, -1] = self.values, column
        return extended


def _match(
    query: _Descriptors, gallery: _Descriptors, max_distance: float, device: str | None = None
) -> np.ndarray:
    if not max_distance >= 0:
        raise ValueError(f"max_distance is {max_distance}, not a distance")
    (count, width), (size, other) = query.values.shape, gallery.values.shape
    if not count or not size:  # before the widths: nothing extracted may have no width either
        return np.empty((0, 2), np.int64)
    if width != other:
        raise ValueError(f"query descriptors are {width} wide, gallery descriptors {other}")
    found = []
    closest = functools.partial(_halving, device) if device is not None else _closest
    worth = math.isfinite(max_distance) and device is None
    for block in _blocks(count, size):
        pairs = _sieved(query, gallery, block, max_distance) if worth else None
        worth = pairs is not None
        found.append(pairs or closest(query, gallery, block, max_distance))
    rows, columns = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return _nearest(query.values, gallery.values, rows, columns, max_distance)


def _blocks(count: int, size: int) -> list[slice]:
    """Query rows to take at once; the first are few and tell whether the first pass is worth it."""
    step = max(1, BLOCK // size)
    sample = min(SAMPLE, step, count)
    later = [slice(first, min(first + step, count)) for first in range(sample, count, step)]
    return [slice(0, sample), *later]


Pairs = tuple[np.ndarray, np.ndarray]  # query and gallery indices, by rising query index


def _sieved(
    query: _Descriptors, gallery: _Descriptors, block: slice, max_distance: float
) -> Pairs | None:
    """All pairs that may lie within the distance; None where these are many.

    By Cauchy and Schwarz u.v is at most the product of the first values of u and v and of the
    lengths of what is left of them: a shorter product than the whole one rules out most pairs. It
    bounds -|u - v|^2 / 2 as a whole, since one number is compared faster than one a row.
    """
    bounds = query.left_bound[block] @ gallery.right_bound.T  # (N, M) float32
    halves = query.halves[block].max(), gallery.halves.max()
    slack = _rounding(*halves, query.values.shape[1])
    floor = -max_distance * max_distance / 2 - slack
    floor = np.nextafter(np.float32(max(floor, -MOST)), np.float32(-np.inf))
    hits = np.flatnonzero(bounds >= floor)
    if hits.size > SIEVED * bounds.size:
        return None
    rows, columns = np.divmod(hits, bounds.shape[1])
    return rows + block.start, columns


def _closest(
    query: _Descriptors, gallery: _Descriptors, block: slice, max_distance: float
) -> Pairs:
    """For each descriptor those that rounding cannot tell from the nearest, if near enough."""
    # The nearest v to u is the one of the greatest u.v - |v|^2 / 2, which a single product gives.
    closeness = query.left[block] @ gallery.right.T  # (N, M) float32
    floor = _floors(closeness.max(axis=1), query, gallery, block, max_distance)
    rows = np.flatnonzero(floor < np.inf)
    if len(rows) < len(closeness):
        closeness = closeness[rows]
    hits = np.flatnonzero(closeness >= floor[rows, None])
    row, column = np.divmod(hits, closeness.shape[1])
    return rows[row] + block.start, column


def _halving(
    device: str, query: _Descriptors, gallery: _Descriptors, block: slice, max_distance: float
) -> Pairs:
    """`_closest_on` in as many parts as the device's memory asks for; the result is the same.

    RuntimeError where a single query descriptor is too much.
    """
    import torch

    try:
        return _closest_on(device, query, gallery, block, max_distance)
    except torch.OutOfMemoryError as error:
        if block.stop - block.start == 1:
            raise RuntimeError(
                f"{device} has no memory left to match one descriptor with {len(gallery.values)}: "
                "close other programs that use it, use fewer workers, or set match_device: null"
            ) from error
    # Outside the handler: the exception holds what was too large.
    torch.cuda.empty_cache()  # does nothing where there is no GPU
    middle = (block.start + block.stop) // 2
    halves = slice(block.start, middle), slice(middle, block.stop)
    parts = [_halving(device, query, gallery, half, max_distance) for half in halves]
    rows, columns = (np.concatenate(both) for both in zip(*parts, strict=True))
    return rows, columns


def _closest_on(
    device: str, query: _Descriptors, gallery: _Descriptors, block: slice, max_distance: float
) -> Pairs:
    """`_closest` by torch; the device sends back a number a row, then the few pairs."""
    import torch

    left, right = (torch.from_numpy(a).to(device) for a in (query.left[block], gallery.right))
    with _float32_products():
        closeness = left @ right.T
    best = closeness.amax(dim=1).cpu().numpy()
    floor = torch.from_numpy(_floors(best, query, gallery, block, max_distance)).to(device)
    row, column = torch.nonzero(closeness >= floor[:, None], as_tuple=True)  # by rising row
    return row.cpu().numpy() + block.start, column.cpu().numpy()


@contextlib.contextmanager
def _float32_products() -> Iterator[None]:
    """No TF32 and no bf16 in torch's products, whatever the program allows: `_rounding` needs it.

    Since PyTorch 2.9 each backend has a setting of its own, and the one for all of them raises
    where these differ.
    """
    import torch

    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _floors(
    best: np.ndarray, query: _Descriptors, gallery: _Descriptors, block: slice, max_distance: float
) -> np.ndarray:
    """The least closeness (N,) float32 of what may be each row's nearest; inf where none is near.

    best: (N,) float32, each row's greatest closeness.
    """
    best = best.astype(np.float64)
    slack = _rounding(query.halves[block], gallery.halves.max(), query.values.shape[1])
    # Rounded down, so that float32 loses none of those that may be nearest.
    floor = np.nextafter((best - 2 * slack).astype(np.float32), np.float32(-np.inf))
    floor[best + slack < query.halves[block] - max_distance * max_distance / 2] = np.inf
    return floor


def _nearest(
    query: np.ndarray, gallery: np.ndarray, rows: np.ndarray, columns: np.ndarray, bound: float
) -> np.ndarray:
    """The matches (K, 2) among pairs: each row's nearest, the lowest index of equal ones."""
    squares = _squared_distances(query, gallery, rows, columns)
    first = np.flatnonzero(np.diff(rows, prepend=-1))  # where each row's candidates begin
    nearest = np.minimum.reduceat(squares, first) if len(first) else squares
    group = np.repeat(np.arange(len(first)), np.diff(first, append=len(rows)))
    ties = np.flatnonzero(squares == nearest[group])
    lowest = ties[np.flatnonzero(np.diff(rows[ties], prepend=-1))]
    within = squares[lowest] < bound * bound
    return np.column_stack([rows, columns])[lowest][within]


def _rounding(halves: np.ndarray | float, half: float, width: int) -> np.ndarray | float:
    """How far a float32 closeness, or half a square less, may lie from the true one, at worst.

    A sum of n products in float32, in any order, is off by less than n * 2^-24 times the sum of
    their magnitudes; the rest of the factor covers the rounding of the factors themselves.
    """
    relative = (width + 12) * 2.0**-24
    sizes = np.sqrt(2 * halves) * np.sqrt(2 * half) + half + halves
    return relative * sizes + width * float(np.finfo(np.float32).tiny)


def _squared_distances(
    query: np.ndarray, gallery: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Squared Euclidean distances (P,) float64 of pairs, summed in the order of SciPy's KD-tree.

    The order matters where distances are equal but for rounding: it decides which is smaller.
    """
    squares = np.empty(len(rows))
    lanes = query.shape[1] // 4 * 4
    for first in range(0, len(rows), PAIRS):
        part = slice(first, first + PAIRS)
        terms = np.subtract(query[rows[part]], gallery[columns[part]], dtype=np.float64)
        terms *= terms
        sums = np.zeros((len(terms), 4))
        for start in range(0, lanes, 4):
            sums += terms[:, start : start + 4]
        total = sums[:, 0] + sums[:, 1] + sums[:, 2] + sums[:, 3]
        for column in range(lanes, terms.shape[1]):
            total += terms[:, column]
        squares[part] = total
    return squares
