"""Nearest neighbours among local descriptors, equal to those of a float64 KD-tree.

Distances are those of the published KD-tree, digit by digit. Float32 products find the few gallery
descriptors that may be the nearest; float64 decides among them.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from vitgal.engines import devices
from vitgal.settings import MatchingSettings

FLOAT32_LIMIT = 1e38  # below the greatest float32
BLOCK = 1 << 22  # similarities in memory at once: 16 MiB
SIEVE_LIMIT = 1 / 500  # fraction of pairs; if more pass the sieve, the whole product is faster
SAMPLE = 64  # query descriptors on which the sieve is tried first
PAIRS = 1 << 13  # descriptor pairs measured at once in float64: 8 MiB at 128 dimensions
PUBLISHED = MatchingSettings()

Pairs = tuple[np.ndarray, np.ndarray]  # query and gallery indices, by rising query index


def match(
    query_descriptors: np.ndarray,
    gallery_descriptors: np.ndarray,
    max_distance: float = MatchingSettings.max_distance,
    *,
    method: str = MatchingSettings.method,
    ratio: float = MatchingSettings.ratio,
    device: str | None = None,
) -> np.ndarray:
    """Matches each query descriptor with its nearest gallery descriptor.

    Args:
        query_descriptors, gallery_descriptors: (N, C) and (M, C) real numbers.
        max_distance: Euclidean; a match lies strictly nearer. `math.inf`: no limit.
        method: "one_way" keeps every such match. "mutual": those whose query descriptor is in turn
            the nearest of its gallery descriptor, so that none is shared. "ratio": those that pass
            the ratio test (Lowe 2004). "mutual_ratio": those that pass both.
        ratio: a match passes if its distance is below this times that to the second nearest gallery
            descriptor; equal ones fail, and with a single gallery descriptor all pass. In (0, 1].
        device: where torch computes the products; "auto": the GPU if there is one; None: NumPy. The
            matches are the same.
    Returns:
        (K, 2) int64, (query index, gallery index) by rising query index. Unless mutual, several
        query descriptors may share one gallery descriptor. Equal distances: the lowest index, on
        either side. No descriptor on either side: (0, 2), whatever the widths.
    Raises:
        ValueError: widths that differ, nan or infinite or huge values, a negative `max_distance`,
            an unknown method, a ratio out of range, a device that torch does not find.
    """
    query = Descriptors.read(query_descriptors, "query")
    gallery = Descriptors.read(gallery_descriptors, "gallery")
    settings = MatchingSettings(method=method, ratio=ratio)
    device = matching_device(device)
    return match_prepared(query, gallery, max_distance, device, settings)


def matching_device(device: str | None) -> str | None:
    """Checks a device for `match_prepared`; "auto" becomes a GPU, or None where there is none."""
    if device == "auto":
        return devices.find_gpu()
    if device is not None:
        devices.check_device(device)
    return device


@dataclass(frozen=True, eq=False)
class Descriptors:
    """One image's checked descriptors, with matrices for matching that are made once.

    values: (N, C) float32 or float64.  halves: (N,) float64, half of each squared length.
    """

    values: np.ndarray
    halves: np.ndarray

    @classmethod
    def read(cls, descriptors: np.ndarray, side: str) -> "Descriptors":
        """Checks descriptors (N, C) of real numbers; `side` names them in a ValueError."""
        values = np.asarray(descriptors)
        values = values.astype(np.result_type(values, np.float32), copy=False)
        if values.ndim != 2:
            raise ValueError(f"{side} descriptors of shape {values.shape}, not (N, C)")
        halves = np.einsum("ij,ij->i", values, values, dtype=np.float64) / 2
        if not (halves < 1e30).all():  # false for nan as well
            raise ValueError(f"{side} descriptors hold nan, infinite or huge values")
        return cls(values, halves)

    def subset(self, indices: np.ndarray) -> "Descriptors":
        """Returns the descriptors of some indices (K,), in this order."""
        return Descriptors(self.values[indices], self.halves[indices])

    # For a query u and a gallery v, -|u - v|^2 / 2 = u.v - |v|^2 / 2 - |u|^2 / 2. The closeness
    # u.v - |v|^2 / 2 is greatest for the nearest v; one product of extended vectors gives it.

    @functools.cached_property
    def as_query(self) -> np.ndarray:
        """(N, C + 1) float32: u, 1."""
        return _extended(self.values, np.ones(len(self.values)))

    @functools.cached_property
    def as_gallery(self) -> np.ndarray:
        """(N, C + 1) float32: ``v, -|v|^2 / 2``."""
        return _extended(self.values, -self.halves)

    @functools.cached_property
    def short_as_query(self) -> np.ndarray:
        """(N, S + 3) float32: S values of u, the length of its rest, 1, ``-|u|^2 / 2``."""
        return self._shortened(np.ones(len(self.values)), -self.halves)

    @functools.cached_property
    def short_as_gallery(self) -> np.ndarray:
        """(N, S + 3) float32: S values of v, the length of its rest, ``-|v|^2 / 2``, 1."""
        return self._shortened(-self.halves, np.ones(len(self.values)))

    def _shortened(self, *columns: np.ndarray) -> np.ndarray:
        short = self.values.shape[1] * 5 // 8
        rest = self.values[:, short:]
        lengths = np.sqrt(np.einsum("ij,ij->i", rest, rest, dtype=np.float64))
        return _extended(self.values[:, :short], lengths, *columns)


def _extended(values: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    extended = np.empty((len(values), values.shape[1] + len(columns)), np.float32)
    extended[:, : values.shape[1]] = values
    for position, column in enumerate(columns, start=values.shape[1]):
        extended[:, position] = column
    return extended


def match_prepared(
    query: Descriptors,
    gallery: Descriptors,
    max_distance: float,
    device: str | None = None,
    settings: MatchingSettings = PUBLISHED,
) -> np.ndarray:
    """Matches prepared descriptors as `match` does, (K, 2) int64.

    device: of `matching_device`. settings: method and ratio. Whatever the method, one block of
    similarities is in memory; beyond one way each test takes one more product, of those descriptors
    alone that have a match.
    """
    if not max_distance >= 0:
        raise ValueError(f"max_distance is {max_distance}, not a distance")
    (count, width), (size, gallery_width) = query.values.shape, gallery.values.shape
    if not count or not size:  # before the widths: an image without features may have no width
        return np.empty((0, 2), np.int64)
    if width != gallery_width:
        raise ValueError(f"query descriptors are {width} wide, gallery descriptors {gallery_width}")
    tested = settings.ratio if settings.method in ("ratio", "mutual_ratio") else None
    matches, squares = NearestSearch(query, gallery, max_distance, device, ratio=tested).run()
    method = settings.method if len(matches) else "one_way"
    if method in ("mutual", "mutual_ratio"):
        images = np.unique(matches[:, 1])
        back, _ = NearestSearch(gallery.subset(images), query, max_distance, device).run()
        mutual = back[np.searchsorted(images, matches[:, 1]), 1] == matches[:, 0]
        matches, squares = matches[mutual], squares[mutual]
    if method in ("ratio", "mutual_ratio"):
        # A second nearest beyond this is far enough for every match; the factor covers rounding.
        limit = max_distance / settings.ratio * (1 + 1e-9)
        matched = query.subset(matches[:, 0])
        second, second_squares = NearestSearch(
            matched, gallery, limit, device, excluded=matches[:, 1]
        ).run()
        least = np.full(len(matches), np.inf)
        least[second[:, 0]] = second_squares
        matches = matches[squares < settings.ratio * settings.ratio * least]
    return matches


def match_squares(
    query_descriptors: np.ndarray, gallery_descriptors: np.ndarray, matches: np.ndarray
) -> np.ndarray:
    """Computes the squared distances (K,) float64 of matches (K, 2), as `match` compares them."""
    query = Descriptors.read(query_descriptors, "query").values
    gallery = Descriptors.read(gallery_descriptors, "gallery").values
    return _squared_distances(query, gallery, (matches[:, 0], matches[:, 1]))


@dataclass(frozen=True, eq=False)
class NearestSearch:
    """The search for each query descriptor's nearest gallery descriptor within a distance.

    excluded: (N,) integers, a gallery index for each query descriptor that is passed over; None:
    none. ratio: query descriptors that certainly fail the ratio test may be left out; None: none
    is. A block is a slice of the query descriptors.
    """

    query: Descriptors
    gallery: Descriptors
    max_distance: float
    device: str | None = None
    excluded: np.ndarray | None = None
    ratio: float | None = None

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (K, 2) int64 by rising query index, and the squared distances (K,) float64."""
        count, size = len(self.query.values), len(self.gallery.values)
        candidates = []
        step = max(1, BLOCK // size)
        # The ratio test needs second nearest ones at any distance; few rows are not worth a sample.
        sieve = math.isfinite(self.max_distance) and self.device is None
        sieve = sieve and self.ratio is None and count > SAMPLE
        sample = min(step, SAMPLE if sieve else count)
        for first, last in pairwise([0, *range(sample, count, step), count]):
            block = slice(first, last)
            pairs = self.sieved(block) if sieve else None
            sieve = pairs is not None
            if pairs is None:
                pairs = self.closest(block) if self.device is None else self.closest_on(block)
            candidates.append(pairs)
        pairs = tuple(map(np.concatenate, zip(*candidates, strict=True)))
        if self.excluded is not None:  # the sieve returns these as well
            allowed = pairs[1] != self.excluded[pairs[0]]
            pairs = pairs[0][allowed], pairs[1][allowed]
        squares = _squared_distances(self.query.values, self.gallery.values, pairs)
        return _nearest(squares, pairs, self.max_distance)

    def sieved(self, block: slice) -> Pairs | None:
        """Returns all pairs that may lie within the distance; None where these are many.

        By Cauchy-Schwarz, u.v is at most the product of the first values of u and v plus the
        product of the lengths of their rests, so a shorter product rules out most pairs. It bounds
        -|u - v|^2 / 2, which needs only one threshold for all rows.
        """
        bounds = self.query.short_as_query[block] @ self.gallery.short_as_gallery.T  # (N, M)
        halves = self.query.halves[block].max(), self.gallery.halves.max()
        slack = _rounding(*halves, self.query.values.shape[1])
        floor = -self.max_distance * self.max_distance / 2 - slack
        floor = np.nextafter(np.float32(max(floor, -FLOAT32_LIMIT)), np.float32(-np.inf))
        hits = np.flatnonzero(bounds >= floor)
        if hits.size > SIEVE_LIMIT * bounds.size:
            return None
        rows, columns = np.divmod(hits, bounds.shape[1])
        return rows + block.start, columns

    def closest(self, block: slice) -> Pairs:
        """Returns all pairs within rounding error of their row's nearest, if near enough."""
        closeness = self.query.as_query[block] @ self.gallery.as_gallery.T  # (N, M) float32
        if self.excluded is not None:
            closeness[np.arange(len(closeness)), self.excluded[block]] = -np.inf
        if self.ratio is None:
            floor = self._floors(closeness.max(axis=1), block)
        else:
            floor = self._floors_of_distinct(closeness, block)
        rows = np.flatnonzero(floor < np.inf)
        if len(rows) < len(closeness):  # fewer to compare
            closeness = closeness[rows]
        hits = np.flatnonzero(closeness >= floor[rows, None])
        row, column = np.divmod(hits, closeness.shape[1])
        return rows[row] + block.start, column

    def closest_on(self, block: slice) -> Pairs:
        """`closest` on the device, the block halved until its memory suffices."""
        import torch

        try:
            return self.closest_by_torch(block)
        except torch.OutOfMemoryError as error:
            if block.stop - block.start == 1:
                raise RuntimeError(
                    f"{self.device} has no memory left to match one descriptor with "
                    f"{len(self.gallery.values)}: close other programs that use it, use fewer "
                    "workers, or set match_device: null"
                ) from error
        # Outside the handler: the exception references the tensors that were too large.
        torch.cuda.empty_cache()  # does nothing where there is no GPU
        middle = (block.start + block.stop) // 2
        halves = slice(block.start, middle), slice(middle, block.stop)
        return tuple(map(np.concatenate, zip(*map(self.closest_on, halves), strict=True)))

    def closest_by_torch(self, block: slice) -> Pairs:
        """`closest` by torch: the device returns one number a row, then the few pairs."""
        import torch

        arrays = self.query.as_query[block], self.gallery.as_gallery
        left, right = (torch.from_numpy(array).to(self.device) for array in arrays)
        with float32_products():
            closeness = left @ right.T
        if self.excluded is not None:
            columns = torch.from_numpy(self.excluded[block]).to(self.device)
            closeness[torch.arange(len(columns), device=self.device), columns] = -torch.inf
        best = closeness.amax(dim=1).cpu().numpy()
        floor = torch.from_numpy(self._floors(best, block)).to(self.device)
        row, column = torch.nonzero(closeness >= floor[:, None], as_tuple=True)  # by rising row
        return row.cpu().numpy() + block.start, column.cpu().numpy()

    def _floors_of_distinct(self, closeness: np.ndarray, block: slice) -> np.ndarray:
        """`_floors`, inf also where a row fails the ratio test whatever the rounding errors."""
        nearest = np.arange(len(closeness)), closeness.argmax(axis=1)
        best = closeness[nearest]
        closeness[nearest] = -np.inf
        second = closeness.max(axis=1)
        closeness[nearest] = best
        halves, slack = self._halves_and_slack(block)
        # Half the least square of the nearest, beside half the greatest of the second nearest.
        fails = halves - best - slack >= self.ratio * self.ratio * (halves - second + slack)
        return np.where(fails, np.inf, self._floors(best, block))

    def _halves_and_slack(self, block: slice) -> tuple[np.ndarray, np.ndarray]:
        halves = self.query.halves[block]
        return halves, _rounding(halves, self.gallery.halves.max(), self.query.values.shape[1])

    def _floors(self, best: np.ndarray, block: slice) -> np.ndarray:
        """Each row's least closeness (N,) that may be its nearest; inf beyond the distance."""
        best = best.astype(np.float64)
        halves, slack = self._halves_and_slack(block)
        # Rounded down, so that float32 loses no candidate.
        floor = np.nextafter((best - 2 * slack).astype(np.float32), np.float32(-np.inf))
        floor[best + slack < halves - self.max_distance * self.max_distance / 2] = np.inf
        return floor


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Keeps torch's products in float32, without TF32 and bf16 that the program may allow.

    Since PyTorch 2.9 each backend has a setting of its own, and reading the common one raises where
    these differ.
    """
    import torch

    with contextlib.ExitStack() as stack:
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
                stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = "ieee"
        else:
            before = torch.get_float32_matmul_precision()
            stack.callback(torch.set_float32_matmul_precision, before)
            torch.set_float32_matmul_precision("highest")
        yield


def _nearest(
    squares: np.ndarray, pairs: Pairs, max_distance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Each row's nearest pair (K, 2), of equal ones the lowest column, and its square (K,)."""
    rows = pairs[0]
    first = np.flatnonzero(np.diff(rows, prepend=-1))  # where each row's candidates begin
    nearest = np.minimum.reduceat(squares, first) if len(first) else squares
    group = np.repeat(np.arange(len(first)), np.diff(first, append=len(rows)))
    ties = np.flatnonzero(squares == nearest[group])
    lowest = ties[np.flatnonzero(np.diff(rows[ties], prepend=-1))]
    lowest = lowest[squares[lowest] < max_distance * max_distance]
    return np.column_stack(pairs)[lowest], squares[lowest]


def _rounding(halves: np.ndarray | float, half: float, width: int) -> np.ndarray | float:
    """The greatest rounding error of a float32 closeness, or of minus half a squared distance.

    A sum of n products in float32, in any order, is off by less than n * 2^-24 times the sum of
    their magnitudes; the rest of the factor covers the rounding of the factors themselves.
    """
    relative = (width + 12) * 2.0**-24
    sizes = np.sqrt(2 * halves) * np.sqrt(2 * half) + half + halves
    return relative * sizes + width * float(np.finfo(np.float32).tiny)


def _squared_distances(query: np.ndarray, gallery: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Returns squared distances (P,) float64, summed in the order of SciPy's KD-tree."""
    rows, columns = pairs
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
