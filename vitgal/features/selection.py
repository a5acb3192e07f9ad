"""Selects the patch tokens that become local features: thresholds and suppression."""

from collections.abc import Sequence

import numpy as np

from vitgal.data.images import PATCH
from vitgal.settings.sections import SelectionSettings

Frame = tuple[tuple[int, int, int, int], tuple[int, int]]  # the crop's box, the photograph's (h, w)


def scaled_size(size: Sequence[int], scale: float, multiple: int = PATCH) -> tuple[int, int]:
    """Returns the (h, w) of a network input at a scale, in multiples of so many pixels.

    As published, sides are truncated to pixels and then raised to a multiple: 736 at 1.4142 is
    1040.9, hence 1040 and not 1056.
    """
    height, width = (max(multiple, -(-int(side * scale) // multiple) * multiple) for side in size)
    return height, width


def select_tokens(
    scores: np.ndarray, target: float, ladder: Sequence[float] = SelectionSettings.ladder
) -> np.ndarray:
    """Selects the tokens above the first threshold that leaves at least `target` of them.

    Where none leaves that many, those above the last threshold are selected. One token and no token
    are valid results (the published code stops at both).

    Args:
        scores: (N,) float32 of mean 1; N may be 0.
        ladder: falling thresholds, at least one.
    Returns:
        (n,) int64, rising indices into `scores`.
    """
    counts = (scores[None, :] > np.asarray(ladder, np.float32)[:, None]).sum(axis=1)
    enough = np.flatnonzero(counts >= target)
    threshold = ladder[enough[0]] if enough.size else ladder[-1]
    return np.flatnonzero(scores > np.float32(threshold))


def patch_boxes(
    tokens: np.ndarray, columns: int, factors: tuple[float, float], patch: int = PATCH
) -> np.ndarray:
    """Returns the patches of tokens (N,) as (N, 4) int64, (y0, x0, y1, x1), truncated to pixels.

    Pixels are those of the network input at scale 1. Tokens are numbered row by row, `columns` in a
    row. factors: height and width of the scaled input over those at scale 1. patch: side of a patch
    in pixels of the scaled input.
    """
    starts = np.stack(np.divmod(tokens, columns), axis=1) * patch  # (n, 2): y, x
    corners = np.concatenate([starts / factors, (starts + patch) / factors], axis=1)
    return corners.astype(np.int64)


def centres(boxes: np.ndarray) -> np.ndarray:
    """Returns centres (N, 2) float32 (x, y) of `patch_boxes` (N, 4), rounded down, as published."""
    middle = (boxes[:, :2] + boxes[:, 2:]) // 2
    return np.ascontiguousarray(middle[:, ::-1], np.float32)


def suppress(
    boxes: np.ndarray, scores: np.ndarray, *, overlap: float, candidates: int, keep: int
) -> np.ndarray:
    """Suppresses boxes that overlap a better one: greedy non-maximum suppression.

    Args:
        boxes: (N, 4) integers, x and y in either order; N may be 0.
        scores: (N,) float32.
        overlap: a box is dropped where its intersection over union with a survivor is greater.
        candidates: only so many boxes of the highest score are considered, ties by index.
        keep: greatest number of survivors.
    Returns:
        (K,) int64 indices of the survivors, best first.
    """
    import torch
    import torchvision

    order = np.argsort(-scores, kind="stable")[:candidates]
    falling = torch.arange(len(order), 0, -1, dtype=torch.float64)  # keeps the order
    # In float64 a bound such as 1/2 is strict.
    survivors = torchvision.ops.nms(torch.from_numpy(boxes[order]).double(), falling, overlap)
    return order[survivors.numpy()[:keep]]
