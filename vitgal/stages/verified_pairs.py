"""Counts of verified pairs of own photographs, kept by the contents of both.

    <run>/own/<settings>/pairs/<key>/ab/abcd….npz    one query and what it was compared with

A pair is matched and verified once; adding a photograph costs its own pairs alone.
"""

import functools
import itertools
import operator
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitgal import engines, runs
from vitgal.features.files import read_arrays
from vitgal.features.local import LocalFeatures
from vitgal.retrieval.evidence import weigh
from vitgal.retrieval.verification import inspect_shortlist
from vitgal.settings import RerankingSettings
from vitgal.stages.own_describer import Describer, Description

COLUMNS = ("matches", "inliers", "features", "plausible")  # of counts
DIGEST = 32  # bytes


@dataclass(frozen=True, eq=False)
class VerifiedPairs:
    """Matches and verifies pairs that were not yet."""

    describer: Describer
    settings: RerankingSettings

    @functools.cached_property
    def _folder(self) -> Path:
        folder = self.describer.folder / "pairs" / self.describer.pair_key(self.settings)
        runs.refuse_links([folder.parent, folder])
        return folder

    def counts(
        self, query: Description, files: Sequence[Path], features: Callable[[int], LocalFeatures]
    ) -> np.ndarray:
        """Returns COLUMNS for the query and each of N other descriptions: (N, 4) int64.

        `features` counts each feature once; `plausible` is 0 where the homography is doubtful.
        files: where the descriptions are stored. features: reads the local features of one of N.
        """
        kept = self._read(query)
        stems = [file.stem for file in files]
        missing = {stem: index for index, stem in enumerate(stems) if stem not in kept}
        if missing:
            kept |= self._verify(query, missing, features)
            self._write(query, kept)
        return np.array([kept[stem] for stem in stems], np.int64).reshape(-1, len(COLUMNS))

    def _verify(
        self, query: Description, missing: dict[str, int], features: Callable[[int], LocalFeatures]
    ) -> dict[str, tuple[int, ...]]:
        machine = self.describer.machine
        threads = min(len(missing), machine.workers or os.cpu_count() or 1)
        if self.settings.verification.estimator == "degensac":
            threads = 1  # its library has one random state for all threads

        def verify(stems: Sequence[str]) -> dict[str, tuple[int, ...]]:
            """Verifies some of the pairs, one after the other."""
            others, compared = itertools.tee(features(missing[stem]) for stem in stems)
            pairs = inspect_shortlist(
                query.features, compared, self.settings, device=machine.match_device
            )
            counts = {}
            for stem, other, pair in zip(stems, others, pairs, strict=True):
                weighed = weigh(query.features, other, pair)
                kept = weighed.matches, weighed.inliers, weighed.features
                counts[stem] = *kept, int(not weighed.kind)
            return counts

        stems = list(missing)
        # As in `inspect_shortlist`, but for all threads together.
        with engines.one_blas_thread(), ThreadPoolExecutor(threads) as pool:
            parts = pool.map(verify, [stems[first::threads] for first in range(threads)])
            counts = functools.reduce(operator.or_, parts)
        return {stem: counts[stem] for stem in stems}

    def _file(self, query: Description) -> Path:
        return self._folder / query.file.parent.name / query.file.name

    def _read(self, query: Description) -> dict[str, tuple[int, ...]]:
        try:
            arrays = read_arrays(self._file(query), ("others", "counts"))
        except (OSError, ValueError):
            return {}
        others, counts = arrays["others"], arrays["counts"]
        if others.ndim != 2 or others.dtype != np.uint8 or counts.dtype != np.int32:
            return {}
        if counts.shape != (len(others), len(COLUMNS)):
            return {}
        stems = (row.tobytes().hex() for row in others)
        return dict(zip(stems, map(tuple, counts.tolist()), strict=True))

    def _write(self, query: Description, kept: dict[str, tuple[int, ...]]) -> None:
        others = np.frombuffer(bytes.fromhex("".join(kept)), np.uint8).reshape(-1, DIGEST)
        counts = np.array(list(kept.values()), np.int32)
        runs.write_arrays(self._file(query), {"others": others, "counts": counts})
