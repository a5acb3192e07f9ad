"""Local features, and damaged copies of files, for the tests of this folder."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from hypothesis import HealthCheck, settings, strategies as st

from vitgal.features import store
from vitgal.features.local import LocalFeatures

FP32 = store.ShardFormat(settings={"precision": "fp32"})
FAILURE = {"name": "d", "reason": "the file is empty"}
properties = settings(max_examples=50, derandomize=True, deadline=None)
# A test that damages a file writes it whole in every example, so its folder may be the same.
fuzz = settings(properties, suppress_health_check=[HealthCheck.function_scoped_fixture])


def features(count: int, seed: int = 0, code_dim: int = 10) -> LocalFeatures:
    rng = np.random.default_rng(seed)
    codes = rng.standard_normal((count, code_dim)).astype(np.float32)
    return LocalFeatures(
        keypoints=rng.integers(0, 500, (count, 2)).astype(np.float32),
        descriptors=codes / np.linalg.norm(codes, axis=1, keepdims=True),
        scores=np.sort(rng.random(count, np.float32))[::-1],
        scales=rng.choice(np.float32([0.5, 1]), count),
        input_size=(432, 576),
        box=(10, 20, 490, 380),
        image_size=(400, 500 + seed),
    )


ITEMS = {"b": features(5, 1), "q/b": features(3, 2), "ähre/1": features(0, 3), "c": features(7)}


def assert_same(actual: LocalFeatures, expected: LocalFeatures, atol: float) -> None:
    np.testing.assert_array_equal(actual.keypoints, expected.keypoints)
    np.testing.assert_array_equal(actual.scores, expected.scores)
    np.testing.assert_array_equal(actual.scales, expected.scales)
    np.testing.assert_allclose(actual.descriptors, expected.descriptors, atol=atol)
    assert actual.descriptors.dtype == actual.keypoints.dtype == np.float32
    assert actual.sizes == expected.sizes


@contextlib.contextmanager
def restored(path: Path) -> Iterator[bytes]:
    """Yields a file's content and writes it back in the end."""
    content = path.read_bytes()
    try:
        yield content
    finally:
        path.write_bytes(content)


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """The content with up to eight bytes in a row replaced by others, or cut short."""
    if draw(st.booleans()):
        return content[: draw(st.integers(0, len(content) - 1))]
    start = draw(st.integers(0, len(content)))
    stop = draw(st.integers(start, min(len(content), start + 8)))
    return content[:start] + draw(st.binary(max_size=8)) + content[stop:]


VALUES = [None, True, -1, 2**31, 2**70, 0.5, float("nan"), "", "\ud800", [], [1], {}, {"name": 1}]


@st.composite
def damaged_json(draw: Any, text: str) -> str:
    """JSON with one entry, at any depth, replaced by another value or removed."""
    root = container = {"": json.loads(text)}
    key: Any = ""
    while isinstance(container[key], (dict, list)) and container[key] and draw(st.integers(0, 3)):
        container = container[key]
        keys = container if isinstance(container, dict) else range(len(container))
        key = draw(st.sampled_from(sorted(keys)))
    if container is root or draw(st.integers(0, 3)):
        container[key] = draw(st.sampled_from(VALUES))
    else:
        del container[key]
    return json.dumps(root[""])


# Global descriptors of another system
NAMES = ["q", "a", "b", "sub/c"]
ROWS = np.array([[3, 4], [0, 2], [5, 0], [-1, 0]], np.float32)  # lengths 5, 2, 5, 1


def save_npy(path: Path, rows=ROWS, names=NAMES) -> Path:
    np.save(path, rows)
    path.with_suffix(".txt").write_text("".join(f"{name}\n" for name in names))
    return path


def save_hloc(path: Path, rows=ROWS, names=NAMES, suffix=".jpg") -> Path:
    with h5py.File(path, "w") as file:
        for name, row in zip(names, rows, strict=True):
            file.create_group(name + suffix).create_dataset("global_descriptor", data=row)
    return path
