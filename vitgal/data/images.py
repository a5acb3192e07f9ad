"""Photographs: decode, cut out the query's box, resize exactly as published.

Images are (H, W, 3) uint8 RGB. A box is (x0, y0, x1, y1) in pixels of the stored photograph: (0, 0)
is its top-left corner, and x1, y1 are the first column and row outside the box.
"""

import io
import math
import os
import re
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import simplejpeg

from vitgal import runs
from vitgal.data import formats
from vitgal.settings.sections import RESIZE_MODES

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB, of values in [0, 1]
STD = (0.229, 0.224, 0.225)
PATCH = 16  # side of a patch in pixels of the network input

MAX_MEGAPIXELS = 200  # default of VITGAL_MAX_MEGAPIXELS
MOST_SCANS = 20  # of a JPEG with as many pixels; smaller ones may have more
MOST_PIXELS_A_BYTE = 1024  # of a JPEG: a block of 64 pixels takes at least a bit
MOST_BYTES = 2**31 - 1  # that OpenCV decodes
CUT = "the file is cut short"
TOO_LARGE = "the file is larger than 2 GiB"
NO_END = "the file lacks its end mark, but every row is there"
_DECODER_FLAGS = {  # by the factor that the decoder divides both sides by
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_INVERSE = {6: 8, 8: 6}  # of the orientations that are not their own inverse


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
    """Decodes a photograph to (H, W, 3) uint8 RGB by its content, without transparency.

    Query boxes are given in the pixels as stored; `ignore_orientation=False` turns them by their
    EXIF tag, as the published code does. With `least_side` a JPEG is decoded at the smallest of
    1/2, 1/4 and 1/8 with both sides of at least this many pixels. A JPEG that lacks only its end
    mark is read with a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is no regular one, empty, truncated, damaged, has more pixels than
            MAX_MEGAPIXELS or has an unsupported format.
        ReadError: the system cannot read it: an input/output error, too many open files.
    """
    image, orientation, remark = read_photograph(path, not ignore_orientation, least_side)
    if remark:
        warnings.warn(f"{runs.printable(path)}: {remark}", stacklevel=2)
    return image if ignore_orientation else turn(image, orientation)


def read_photograph(
    path: str | os.PathLike, oriented: bool = True, least_side: int | None = None
) -> tuple[np.ndarray, int, str | None]:
    """Reads pixels as stored, (H, W, 3) uint8 RGB, the EXIF orientation, and a remark or None.

    `turn` makes the pixels upright; without `oriented` it is 1. Raises as `read_image`.
    """
    path = Path(path)
    data = read_file(path)
    try:
        kind = formats.image_format(data[: formats.HEAD])
        shape = _checked_size(data, kind)
        remark = end_remark(data)
        if remark:
            data += b"\xff\xd9"
        image = _decode(data, kind, _reduction(shape, kind, least_side), cut=bool(remark))
        tag = formats.image_orientation(data, kind) if oriented or kind == "TIFF" else 1
        if kind == "TIFF":  # OpenCV has turned it
            image = turn(image, _INVERSE.get(tag, tag))
        if least_side is None and kind not in ("AVIF", "HEIC") and image.shape[:2] != shape:
            sizes = "{1} x {0} pixels, but {3} x {2} by its header"
            raise ValueError(sizes.format(*image.shape[:2], *shape))
    except Exception as error:  # decoders raise anything
        reason = runs.printable(error.err if isinstance(error, cv2.error) else error)
        raise ImageError(path, reason[:300] or type(error).__name__) from error
    return image, tag if oriented else 1, remark


def stored_size(path: str | os.PathLike) -> tuple[int, int]:
    """Reads (height, width) of the stored pixels from the header. Raises as `read_image`."""
    data = read_file(Path(path))
    try:
        return _checked_size(data, formats.image_format(data[: formats.HEAD]))
    except ValueError as error:
        raise ImageError(path, str(error)) from error


def end_remark(data: bytes) -> str | None:
    """Returns a remark on a JPEG that lacks its end mark, None for other files."""
    is_jpeg = formats.image_format(data[: formats.HEAD]) == "JPEG"
    return NO_END if is_jpeg and formats.jpeg_end(data) is None else None


def read_file(path: Path) -> bytes:
    """Reads the bytes of a photograph; pipes and devices are not opened. Raises as `read_image`."""
    try:
        before = os.stat(path)
        if not stat.S_ISREG(before.st_mode):
            raise ImageError(path, "cannot be read: it is no regular file")
        if before.st_size > MOST_BYTES:
            raise ImageError(path, TOO_LARGE)
        data = Path(path).read_bytes()
        after = os.stat(path)
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise ImageError(path, f"cannot be read ({error.strerror})") from error
    except OSError as error:
        raise ReadError(path, f"cannot be read just now ({error.strerror})") from error
    if (len(data), before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ImageError(path, "the file changed while it was read")
    return data


def _checked_size(data: bytes, kind: str | None) -> tuple[int, int]:
    if not data:
        raise ValueError("the file is empty")
    if kind is None:
        raise ValueError("not an image that OpenCV can decode")
    if kind not in formats.DECODED:
        raise ValueError(f"{kind} is not read here: convert it to .jpg or .png")
    if kind == "JPEG" and formats.jpeg_shape(data) is None and end_remark(data):
        raise ValueError(CUT)
    if kind == "PNG" and b"IEND" not in data:
        raise ValueError(CUT)
    height, width = formats.image_size(data, kind)
    limit = _max_megapixels()
    if height * width > limit * 1e6:
        raise ValueError(
            f"{width} x {height} pixels are more than {limit:g} million: reduce it, or set "
            "VITGAL_MAX_MEGAPIXELS"
        )
    if kind == "JPEG" and formats.jpeg_scans(data) * height * width > MOST_SCANS * limit * 1e6:
        raise ValueError("it has too many scans: decoding would take too long")
    if kind == "JPEG" and height * width > MOST_PIXELS_A_BYTE * len(data):
        raise ValueError(f"{len(data)} bytes cannot hold {width} x {height} pixels: {CUT}")
    return height, width


def _max_megapixels() -> float:
    text = os.environ.get("VITGAL_MAX_MEGAPIXELS") or str(MAX_MEGAPIXELS)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not limit > 0:
        raise ValueError(f"VITGAL_MAX_MEGAPIXELS is {runs.short(text)}, no number above 0")
    return limit


def _reduction(shape: tuple[int, int], kind: str, least_side: int | None) -> int:
    """The largest of 8, 4, 2 that leaves both sides of a JPEG `least_side` pixels, else 1."""
    if kind != "JPEG" or least_side is None:
        return 1
    return next((factor for factor in (8, 4, 2) if min(shape) >= factor * least_side), 1)


def _decode(data: bytes, kind: str, factor: int, *, cut: bool) -> np.ndarray:
    if kind == "HEIC":
        return _decode_heic(data)
    if kind == "JPEG" and (factor == 1 or cut):
        try:
            # OpenCV uses the same decoder, but fills in missing data without an error.
            image = simplejpeg.decode_jpeg(data, "RGB")
            if factor == 1:
                return image
        except ValueError as error:
            _refuse_damaged(data, str(error))
    flags = _DECODER_FLAGS[factor] | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        raise ValueError(CUT if cut else f"not a {kind} file that OpenCV can decode")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _refuse_damaged(data: bytes, report: str) -> None:
    """Raises ValueError where the JPEG decoder's report means that pixels are missing or wrong."""
    if "remature end" in report:
        raise ValueError(CUT)
    extra = re.search(r"(\d+) extraneous bytes before marker 0xd9", report)
    padding = data[: formats.jpeg_end(data)][-int(extra[1]) :] if extra else b""
    # OpenCV returns what it had decoded before an error as a whole image.
    fatal = ("Unsupported marker", "Bogus ", "Invalid JPEG file", "Unsupported JPEG process")
    if report.startswith(fatal) or ("Corrupt JPEG data" in report and len(set(padding)) != 1):
        raise ValueError(f"the file is damaged ({report})")


def _decode_heic(data: bytes) -> np.ndarray:
    try:
        import pillow_heif
    except ImportError:
        raise ValueError(
            "HEIC is read with `pip install pillow-heif`; or convert it to .jpg"
        ) from None
    pillow_heif.register_heif_opener()
    with PIL.Image.OPEN["HEIF"][0](io.BytesIO(data), "") as image:
        return np.array(image.convert("RGB"))


def turn(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turns stored pixels (H, W, ...) upright by their EXIF orientation, 1 to 8."""
    # EXIF 2.3, 4.6.4
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def crop_box(
    image: np.ndarray, box: Sequence[float] | None
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Cuts a box (x0, y0, x1, y1) in pixels out of an image (H, W, ...); None: the whole image.

    Coordinates are truncated to integers, as published. Those up to 1 px past the right or lower
    edge are clipped. Returns the crop (y1 - y0, x1 - x0, ...), a view of the image, and its box in
    whole pixels.

    Raises ValueError where a coordinate is negative, not finite or further outside, or the crop is
    empty.
    """
    height, width = image.shape[:2]
    if box is None:
        box = (0, 0, width, height)
    if len(box) != 4 or not all(abs(value) < 1e18 for value in box):
        wrong = runs.short(tuple(box))
        raise ValueError(f"a box is four finite numbers (x0, y0, x1, y1), got {wrong}")
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


def resized_shape(
    height: int, width: int, size: int, mode: str, multiple: int | None = None
) -> tuple[int, int]:
    """Returns the (height, width) that `resize` gives an image of this height and width."""
    if min(height, width) < 1:
        raise ValueError(f"an image of {width} x {height} pixels is empty")
    if size < PATCH:
        raise ValueError(f"size must be at least {PATCH} pixels (one patch), got {size}")
    if mode not in RESIZE_MODES:
        raise ValueError(f"unknown resize mode {mode!r}; choose {', '.join(RESIZE_MODES)}")
    if mode == "squash":
        return size, size
    longest = max(height, width)
    if mode == "longest":
        # Integers: in floating point the longer side itself can come out one pixel short.
        sides = (size * height // longest, size * width // longest)
        step = multiple or 1
    else:
        # In the published order of operations: where the exact side is a multiple of 16, as for
        # 16:9 photographs, the last bit decides whether a row of patches is lost.
        stretch = longest / math.sqrt(height * width)
        sides = (int(size * stretch * side / longest) for side in (height, width))
        step = multiple or PATCH
    tall, wide = (max(step, side - side % step) for side in sides)
    return tall, wide


def resize(image: np.ndarray, size: int, mode: str, multiple: int | None = None) -> np.ndarray:
    """Resizes (H, W, 3) uint8 with bilinear interpolation and no smoothing, as published.

    mode: "squash" to size x size, ignoring the aspect (published, global features); "longest"
    scales the longer side to `size` and rounds the other down (published, keep-ratio); "area" keeps
    the aspect at about size x size pixels, both sides multiples of 16 and never below 16
    (published, local features). `multiple` makes both sides multiples of another number, with
    "longest" as well. Raises ValueError for an empty image, a size below 16 or another mode.
    """
    height, width = resized_shape(*image.shape[:2], size, mode, multiple)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
