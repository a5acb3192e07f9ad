"""Photographs: decode, cut out the query's box, resize exactly as published.

Images are (H, W, 3) uint8 RGB. A box is (x0, y0, x1, y1) in pixels of the stored photograph: (0, 0)
is its top-left corner, and x1, y1 are the first column and row outside the box.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from vitgal import runs
from vitgal.settings.sections import RESIZE_MODES

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB, of values in [0, 1]
STD = (0.229, 0.224, 0.225)
PATCH = 16  # side of a patch in pixels of the network input

_JPEG_START = b"\xff\xd8"
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA
_NO_LENGTH = {0x01, *range(0xD0, 0xD9)}  # markers without a segment
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of a frame header
# The next marker after a JPEG scan: 0xff followed by anything but a stuffed zero, a restart marker
# or another 0xff.
_SCAN_END = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_DECODER_FLAGS = {  # by the factor that the decoder divides both sides by
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


class ImageError(runs.UserError, ValueError):
    """A file that cannot be decoded completely; `path` is the file, `reason` the cause."""

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(path, reason)  # with both arguments the error can be pickled
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; replace the file or take it out of the image list"


class ReadError(ImageError):
    """A file that the system failed to read although it may be intact: a disk or network error."""

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.reason}; run the same command again once the file can be read: "
            "finished work is kept"
        )


def read_image(
    path: str | os.PathLike, *, ignore_orientation: bool = True, least_side: int | None = None
) -> np.ndarray:
    """Decodes a photograph; grey becomes RGB, transparency is dropped.

    Args:
        ignore_orientation: keep the pixels as stored, in which query boxes are given. False turns
            the image by its EXIF tag, as the published code does.
        least_side: decode a JPEG at the smallest of 1/2, 1/4 and 1/8 with both sides of at least
            this many pixels; None: full size.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is empty, truncated, or no image that OpenCV reads. OpenCV alone would
            fill the missing part of a truncated JPEG with grey and report nothing.
        ReadError: the system cannot read it: an input/output error, too many open files.
    """
    path = Path(path)
    data = _read_bytes(path)
    if not data:
        raise ImageError(path, "the file is empty")
    if not is_whole(data):
        raise ImageError(path, "the file is cut short")
    flags = _DECODER_FLAGS[1 if least_side is None else _reduction_factor(data, least_side)]
    if ignore_orientation:
        flags |= cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:  # among others: more pixels than OpenCV accepts
        raise ImageError(path, f"cannot be decoded ({error.err})") from error
    if image is None:
        raise ImageError(path, "not an image that OpenCV can decode")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except (IsADirectoryError, PermissionError) as error:
        raise ImageError(path, f"cannot be read ({error.strerror})") from error
    except OSError as error:
        raise ReadError(path, f"cannot be read just now ({error.strerror})") from error


def _reduction_factor(data: bytes, least_side: int) -> int:
    """The largest of 8, 4, 2 that leaves both sides of a JPEG `least_side` pixels, else 1."""
    shorter = min(jpeg_shape(data) or (0,))
    return next((factor for factor in (8, 4, 2) if shorter >= factor * least_side), 1)


def jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """Reads (height, width) from a JPEG's frame header; None where no frame precedes a scan."""
    for marker, start in _jpeg_segments(data):
        if marker in _FRAMES and start + 9 <= len(data):
            height, width = data[start + 5 : start + 7], data[start + 7 : start + 9]
            return int.from_bytes(height, "big"), int.from_bytes(width, "big")
        if marker == _START_OF_SCAN:
            return None
    return None


def is_whole(data: bytes) -> bool:
    """Returns False where a JPEG, PNG or WebP file lacks its end; True for other kinds of files."""
    if data[:2] == _JPEG_START:
        return _jpeg_is_whole(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return b"IEND" in data
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    return True


def _jpeg_is_whole(data: bytes) -> bool:
    """Returns whether a JPEG's last scan is followed by an end-of-image marker.

    A search of the whole file would find the marker of an embedded thumbnail; a test of the file's
    end would refuse photographs with an appended film clip.
    """
    *_, (_, position) = _jpeg_segments(data)
    # Like a decoder, the search skips bytes that should have been a marker.
    return data.find(bytes((0xFF, _END_OF_IMAGE)), position) >= 0


def _jpeg_segments(data: bytes) -> Iterator[tuple[int | None, int]]:
    """Yields each marker outside the scans with its position, an end-of-image marker last.

    A file without that marker ends with None and the position of the first unreadable byte.
    """
    position = 2
    while data[:2] == _JPEG_START and position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF or marker in _NO_LENGTH:
            position += 1 if marker == 0xFF else 2
            continue
        yield marker, position
        if marker == _END_OF_IMAGE:
            return
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == _START_OF_SCAN:
            scan_end = _SCAN_END.search(data, position)
            position = len(data) if scan_end is None else scan_end.start()
    yield None, position


def crop_box(
    image: np.ndarray, box: Sequence[float] | None
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Cuts a box out of an image.

    Coordinates are truncated to integers, as published. Those up to 1 px past the right or lower
    edge are clipped.

    Args:
        image: (H, W, ...).
        box: (x0, y0, x1, y1) in pixels; None: the whole image.

    Returns:
        The crop (y1 - y0, x1 - x0, ...), a view of the image, and its box in whole pixels.

    Raises:
        ValueError: a coordinate is negative, not finite or further outside, or the crop is empty.
    """
    height, width = image.shape[:2]
    if box is None:
        box = (0, 0, width, height)
    if len(box) != 4 or not all(math.isfinite(value) for value in box):
        raise ValueError(f"a box is four finite numbers (x0, y0, x1, y1), got {tuple(box)}")
    x0, y0, x1, y1 = (int(value) for value in box)
    described = f"box {tuple(float(value) for value in box)} of a {width} x {height} image"
    if min(box) < 0:
        raise ValueError(f"{described} has a negative coordinate: correct the ground truth")
    if x1 > width + 1 or y1 > height + 1:
        raise ValueError(f"{described} reaches outside: correct it, or check the image")
    x1, y1 = min(x1, width), min(y1, height)
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"{described} is empty: x0 must be below x1 and y0 below y1")
    return image[y0:y1, x0:x1], (x0, y0, x1, y1)


def resized_shape(height: int, width: int, size: int, mode: str) -> tuple[int, int]:
    """Returns the (height, width) that `resize` gives an image of this height and width."""
    if min(height, width) < 1:
        raise ValueError(f"an image of {width} x {height} pixels is empty")
    if size < PATCH:
        raise ValueError(f"size must be at least {PATCH} pixels (one patch), got {size}")
    longest = max(height, width)
    if mode == "squash":
        return size, size
    if mode == "longest":
        # Integers: in floating point the longer side itself can come out one pixel short.
        return max(1, size * height // longest), max(1, size * width // longest)
    if mode == "area":
        # In the published order of operations: where the exact side is a multiple of 16, as for
        # 16:9 photographs, the last bit decides whether a row of patches is lost.
        stretch = longest / math.sqrt(height * width)
        sides = (int(size * stretch * side / longest) for side in (height, width))
        tall, wide = (max(PATCH, side - side % PATCH) for side in sides)
        return tall, wide
    raise ValueError(f"unknown resize mode {mode!r}; choose {', '.join(RESIZE_MODES)}")


def resize(image: np.ndarray, size: int, mode: str) -> np.ndarray:
    """Resizes an image with bilinear interpolation and no smoothing, as published.

    Args:
        image: (H, W, 3) uint8.
        size: in pixels; its meaning depends on the mode.
        mode: "squash" to size x size, whatever the aspect (published, global features); "longest"
            scales the longer side to `size` and rounds the other down (published, keep-ratio);
            "area" keeps the aspect at about size x size pixels, both sides multiples of 16 and
            never below 16 (published, local features).

    Returns:
        (H', W', 3) uint8, see `resized_shape`.

    Raises:
        ValueError: an empty image, a size below 16, an unknown mode.
    """
    height, width = resized_shape(*image.shape[:2], size, mode)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
