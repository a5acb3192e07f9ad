"""Descriptors, planted homographies and benchmarks that several test modules use."""

import numpy as np

from vitgal.data.revisited import GroundTruth
from vitgal.features.local import LocalFeatures

PLANTED = np.array([[1.1, 0.1, 5], [-0.05, 0.9, 10], [1e-4, 2e-5, 1]])


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def project(points: np.ndarray, homography: np.ndarray) -> np.ndarray:
    mapped = np.column_stack([points, np.ones(len(points))]) @ homography.T
    return mapped[:, :2] / mapped[:, 2:]


def planted(inliers: int, outliers: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points under PLANTED, followed by points that are at least 60 px from where it puts them."""
    rng = np.random.default_rng(seed)
    query = rng.uniform(0, 512, (inliers + outliers, 2))
    gallery = project(query, PLANTED)
    angle = rng.uniform(0, 2 * np.pi, outliers)
    away = rng.uniform(60, 400, outliers)[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
    gallery[inliers:] += away
    return query, gallery


def local_features(points: np.ndarray, descriptors: np.ndarray) -> LocalFeatures:
    scores = np.linspace(2, 1, len(points), dtype=np.float32)
    size, box = (512, 512), (0, 0, 512, 512)
    return LocalFeatures(
        points.astype(np.float32), descriptors, scores, np.ones_like(scores), size, box, size
    )


def image_pair(shared: int, alone: int, seed: int = 0) -> tuple[LocalFeatures, LocalFeatures]:
    """Two images with `shared` common features under PLANTED, the first ones of both."""
    rng = np.random.default_rng(seed)
    query, gallery = planted(shared, alone, seed)
    descriptors = unit(rng.standard_normal((shared + 2 * alone, 32)))
    actual, reference = descriptors[: shared + alone], descriptors.copy()
    reference = np.concatenate([reference[:shared], reference[shared + alone :]])
    return local_features(query, actual), local_features(gallery, reference)


def random_benchmark(number: int, queries: int, seed: int) -> tuple[GroundTruth, np.ndarray]:
    """Random labels and a random whole ranking (N, Q)."""
    rng = np.random.default_rng(seed)
    lists = {"easy": [], "hard": [], "junk": []}
    for _ in range(queries):
        images = rng.permutation(number)
        cuts = np.cumsum(rng.integers(0, 9, 3))
        for label, part in zip(lists, np.split(images, cuts)[:3], strict=True):
            lists[label].append(np.sort(part))
    ranking = np.stack([rng.permutation(number) for _ in range(queries)], axis=1)
    return GroundTruth(
        name="random",
        database=[f"image{i:02d}" for i in range(number)],
        queries=[f"query{q}" for q in range(queries)],
        boxes=np.tile([0.0, 0, 512, 512], (queries, 1)),
        **lists,
    ), ranking


def tied(number, queries, *, seed=0):
    """Small whole numbers: every product is exact and most similarities repeat many times."""
    generator = np.random.default_rng(seed)
    database = generator.integers(-1, 2, (number, 5)).astype(np.float32)
    database[:, 0] = 1  # no row of zeros
    return generator.integers(-1, 2, (queries, 5)).astype(np.float32), database


def full_sort(similarities):
    """(N, Q): best first, ties by lower index; written without numpy's stable sort."""
    columns = [
        sorted(range(len(column)), key=lambda i, column=column: (-column[i], i))
        for column in similarities.T.tolist()
    ]
    return np.array(columns, dtype=np.int64).reshape(similarities.shape[::-1]).T


def normalised(generator, *shape):
    rows = generator.standard_normal(shape)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def draw_labels(generator, number, queries, count):
    return [np.sort(generator.choice(number, count, replace=False)) for _ in range(queries)]
