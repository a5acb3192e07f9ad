"""Photographs: decode, cut out the query's box, resize and normalise exactly as published.

Pixels are (H, W, 3) uint8 RGB. A box is (x0, y0, x1, y1) in pixels of the stored photograph, with
(0, 0) its top-left corner and x1, y1 the first column and row left out.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from vitgal import runs

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB, of values in [0, 1]
STD = (0.229, 0.224, 0.225)
PATCH = 16  # pixels of the network input to a side of a patch
RESIZE_MODES = ("squash", "longest", "area")
# The next marker of a JPEG scan: 0xff followed by anything but a stuffed zero, a restart marker or
# another 0xff.
_SCAN_END = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA
_NO_LENGTH = {0x01, *range(0xD0, 0xD9)}  # markers that stand alone
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of a frame header
_REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


class ImageError(runs.UserError, ValueError):
    """A file that cannot be decoded whole; the message names it, `reason` says why."""

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(path, reason)  # both, so that the error can be pickled
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; replace the file or take it out of the image list"


class ReadError(ImageError):
    """A file that the system could not read just now, though it may be whole: a disk, a network."""

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.reason}; once it can be read run the same command again, what is "
            "done is kept"
        )


def read_image(
    path: str | os.PathLike, *, ignore_orientation: bool = True, least_side: int | None = None
) -> np.ndarray:
    """Decodes a photograph to (H, W, 3) uint8 RGB; grey becomes RGB, transparency is dropped.

    Args:
        ignore_orientation: take the pixels as stored, which is what query boxes are given in
            (the published code turns them by the EXIF tag; False does that).
        least_side: decode a JPEG at 1/2, 1/4 or 1/8 of its size, in the decoder itself, the
            smallest of them that leaves both sides this many pixels; None: always at full size.
    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is empty, cut short, or no image that OpenCV reads. OpenCV itself
            fills the missing part of a cut JPEG with grey and says nothing.
        ReadError: the system cannot read it: an input/output error, too many open files.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except (IsADirectoryError, PermissionError) as error:
        raise ImageError(path, f"cannot be read ({error.strerror})") from error
    except OSError as error:
        raise ReadError(path, f"cannot be read just now ({error.strerror})") from error
    if not data:
        raise ImageError(path, "the file is empty")
    if not is_whole(data):
        raise ImageError(path, "the file is cut short")
    flags = _REDUCED[1 if least_side is None else _reduction(data, least_side)]
    if ignore_orientation:
        flags |= cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:  # among others: more pixels than OpenCV accepts
        raise ImageError(path, f"cannot be decoded ({error.err})") from error
    if image is None:
        raise ImageError(path, "not an image that OpenCV can decode")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _reduction(data: bytes, least_side: int) -> int:
    """The largest of 8, 4, 2 that leaves both sides of a JPEG `least_side` pixels, else 1."""
    shorter = min(_jpeg_shape(data) or (0,))
    return next((factor for factor in (8, 4, 2) if shorter >= factor * least_side), 1)


def _jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """(height, width) from a JPEG's frame header; None where there is no plain one."""
    at = 2
    while data[:2] == b"\xff\xd8" and at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            return tuple(int.from_bytes(data[at + k : at + k + 2], "big") for k in (5, 7))
        if marker == _START_OF_SCAN:
            return None
        if marker == 0xFF or marker in _NO_LENGTH:
            at += 1 if marker == 0xFF else 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def is_whole(data: bytes) -> bool:
    """False where a JPEG, PNG or WebP file lacks its end; True for every other kind of file."""
    if data[:2] == b"\xff\xd8":
        return _jpeg_is_whole(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return b"IEND" in data
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    return True


def _jpeg_is_whole(data: bytes) -> bool:
    """Walks a JPEG's segments; whole is one whose scans end with an end-of-image marker.

    Looking for the marker's two bytes anywhere would find those of an embedded thumbnail, and
    looking only at the file's end would refuse photographs with a film clip appended.
    """
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            break  # no marker where one must be: decoders skip to the next, and so does `in` below
        marker = data[at + 1]
        if marker == _END_OF_IMAGE:
            return True
        if marker == 0xFF or marker in _NO_LENGTH:
            at += 1 if marker == 0xFF else 2
            continue
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _START_OF_SCAN:
            found = _SCAN_END.search(data, at)
            if found is None:
                return False
            at = found.start()
    return bytes((0xFF, _END_OF_IMAGE)) in data[at:]


def crop_box(
    image: np.ndarray, box: Sequence[float] | None
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Cuts a box out of an image: the crop (a view) and the box really taken, in whole pixels.

    Coordinates are truncated to int, as published. Those up to 1 px past the right or lower edge
    are clipped. None takes the whole image.

    Raises:
        ValueError: a coordinate is negative, not finite or further outside, or the crop is empty.
    """
    height, width = image.shape[:2]
    if box is None:
        box = (0, 0, width, height)
    if len(box) != 4 or not all(math.isfinite(value) for value in box):
        raise ValueError(f"a box is four finite numbers (x0, y0, x1, y1), got {tuple(box)}")
    x0, y0, x1, y1 = (int(value) for value in box)
    shown = f"box {tuple(float(value) for value in box)} of a {width} x {height} image"
    if min(box) < 0:
        raise ValueError(f"{shown} has a negative coordinate: correct it in the ground truth")
    if x1 > width + 1 or y1 > height + 1:
        raise ValueError(f"{shown} reaches outside: correct it, or check that the image is right")
    x1, y1 = min(x1, width), min(y1, height)
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"{shown} is empty: x0 must be below x1 and y0 below y1")
    return image[y0:y1, x0:x1], (x0, y0, x1, y1)


def resized_shape(height: int, width: int, size: int, mode: str) -> tuple[int, int]:
    """The (height, width) that `resize` gives an image of this height and width."""
    if min(height, width) < 1:
        raise ValueError(f"an image of {width} x {height} pixels is empty")
    if size < PATCH:
        raise ValueError(f"size must be at least {PATCH} pixels (one patch), got {size}")
    longest = max(height, width)
    if mode == "squash":
        return size, size
    if mode == "longest":
        # Whole numbers: in floating point the longer side itself can come out one pixel short.
        return max(1, size * height // longest), max(1, size * width // longest)
    if mode == "area":
        # In the order of the published operations: where the exact side is a multiple of 16, as
        # for 16:9 photographs, the last bit decides whether a row of patches is lost.
        stretch = longest / math.sqrt(height * width)
        sides = (int(size * stretch * side / longest) for side in (height, width))
        tall, wide = (max(PATCH, side - side % PATCH) for side in sides)
        return tall, wide
    raise ValueError(f"unknown resize mode {mode!r}; known: {', '.join(RESIZE_MODES)}")


def resize(image: np.ndarray, size: int, mode: str) -> np.ndarray:
    """Resizes (H, W, 3) uint8 with plain bilinear interpolation (no smoothing), as published.

    Args:
        size: in pixels; what it is the size of depends on the mode.
        mode: "squash" to size x size, whatever the shape (published, global features); "longest"
            the longer side to `size`, the other rounded down (published, keep-ratio); "area" keeps
            the shape at about size x size pixels, both sides multiples of 16 and never below 16
            (published, local features).
    Raises:
        ValueError: an empty image, a size below 16, an unknown mode.
    """
    height, width = resized_shape(*image.shape[:2], size, mode)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def normalise(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB to the network's (3, H, W) float32: / 255, less MEAN, over STD."""
    scaled = image.astype(np.float32) / np.float32(255)
    standard = (scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return np.ascontiguousarray(standard.transpose(2, 0, 1))
