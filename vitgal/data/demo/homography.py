"""Homographies as nested tuples of Python floats, computed alike on every machine."""

from typing import TypeVar

import numpy as np

Matrix = tuple[tuple[float, ...], ...]  # 3 x 3
Coordinate = TypeVar("Coordinate", float, np.ndarray)


def translation(x: float, y: float) -> Matrix:
    """Returns the matrix that moves a point by (x, y) pixels."""
    return ((1.0, 0.0, x), (0.0, 1.0, y), (0.0, 0.0, 1.0))


def multiply(a: Matrix, b: Matrix) -> Matrix:
    """Returns the product of two 3 x 3 matrices: first `b`, then `a`."""
    return tuple(
        tuple(a[i][0] * b[0][j] + a[i][1] * b[1][j] + a[i][2] * b[2][j] for j in range(3))
        for i in range(3)
    )


def invert(matrix: Matrix) -> Matrix:
    """Returns the inverse of a 3 x 3 matrix up to scale (the adjugate)."""
    (a, b, c), (d, e, f), (g, h, i) = matrix
    return (
        (e * i - f * h, c * h - b * i, b * f - c * e),
        (f * g - d * i, a * i - c * g, c * d - a * f),
        (d * h - e * g, b * g - a * h, a * e - b * d),
    )


def map_points(m: Matrix, x: Coordinate, y: Coordinate) -> tuple[Coordinate, Coordinate]:
    """Maps points by a 3 x 3 matrix; x and y are numbers or arrays of one broadcast shape."""
    w = m[2][0] * x + m[2][1] * y + m[2][2]
    return (m[0][0] * x + m[0][1] * y + m[0][2]) / w, (m[1][0] * x + m[1][1] * y + m[1][2]) / w
