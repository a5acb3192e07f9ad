"""Reads an image file's format, size, orientation and completeness from its header."""

import io
import math
import re
import struct
from collections.abc import Callable, Iterator

import PIL.ExifTags
import PIL.Image

HEAD = 32  # bytes that identify the format
MOST_TILE_PIXELS = 64_000_000  # a tile of a TIFF may be larger than the image
_FORMATS = {  # by the first bytes
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a",
    "WEBP": rb"RIFF....WEBP",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "BMP": rb"BM............[\x0c-\x7c]\0\0\0",
    "PPM": rb"P[1-6][\s#]",
    "JPEG 2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "AVIF": rb"....ftyp(?:avif|avis|....\0\0\0\0(?:....)*avif)",
    "HEIC": rb"....ftyp(?:hei[cxms]|hev[cx]|mif1|msf1)",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
    "camera raw": rb"....ftypcrx |FUJIFILMCCD-RAW|II(?:RO|RS|U\0)",
}
_FORMATS = {name: re.compile(pattern, re.DOTALL) for name, pattern in _FORMATS.items()}

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_NO_LENGTH = {0x01, *range(0xD0, 0xD9)}  # markers without a segment
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of a frame header
# The next marker after a JPEG scan: 0xff followed by anything but a stuffed zero, a restart marker
# or another 0xff.
_SCAN_END = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def image_format(data: bytes) -> str | None:
    """Returns the format of a file that begins with these bytes; None for an unknown one."""
    return next((name for name, pattern in _FORMATS.items() if pattern.match(data)), None)


def image_size(data: bytes, kind: str) -> tuple[int, int]:
    """Reads (height, width) as stored from the header; ValueError where it is damaged."""
    try:
        height, width = map(abs, _SIZES[kind](data))  # a bitmap from top to bottom has a minus
    except (struct.error, LookupError, ValueError, AttributeError):
        height = width = 0
    if not height or not width:
        raise ValueError(f"the header of this {kind} file does not tell its size")
    return height, width


def jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """Reads (height, width) from a JPEG's frame header; None where no frame precedes a scan."""
    for marker, start in _jpeg_segments(data):
        if marker in _FRAMES and start + 9 <= len(data):
            return struct.unpack_from(">HH", data, start + 5)
        if marker == _START_OF_SCAN:
            return None
    return None


def _box_size(data: bytes) -> tuple[int, int]:
    """Returns the largest of the images, tiles and previews of an AVIF or HEIC file."""
    sizes = re.findall(rb"ispe\0{4}(.{4})(.{4})", data, re.DOTALL)
    sizes = [(int.from_bytes(height), int.from_bytes(width)) for width, height in sizes]
    return max(sizes, key=math.prod)


def _jpeg2000_size(data: bytes) -> tuple[int, int]:
    start = data.index(b"\xff\x4f\xff\x51")  # the decoder reads the codestream, not the boxes
    right, lower, left, upper = struct.unpack_from(">4I", data, start + 8)
    return lower - upper, right - left


def _portable_size(data: bytes) -> tuple[int, int]:
    blank = rb"(?:\s|#[^\n]*\n)+"
    width, height = re.match(rb"P." + (blank + rb"(\d{1,9})") * 2, data).groups()
    return int(height), int(width)


def _webp_size(data: bytes) -> tuple[int, int]:
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
    if data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return height & 0x3FFF, width & 0x3FFF


def _tiff_tags(data: bytes) -> dict[int, int]:
    """Returns the whole numbers in the first directory of a TIFF or BigTIFF file by their tag."""
    order, big = "<" if data[:2] == b"II" else ">", b"+" in data[2:4]
    count, entry = (order + layout for layout in (("Q", "HHQ") if big else ("H", "HHI")))
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (entries,) = struct.unpack_from(count, data, start)
    tags = {}
    for index in range(min(entries, 4096)):
        position = start + struct.calcsize(count) + index * (20 if big else 12)
        tag, kind, values = struct.unpack_from(entry, data, position)
        if kind in _WHOLE_NUMBERS and values == 1:
            layout = order + _WHOLE_NUMBERS[kind]
            (tags[tag],) = struct.unpack_from(layout, data, position + struct.calcsize(entry))
    return tags


def _tiff_size(data: bytes) -> tuple[int, int]:
    tags = _tiff_tags(data)
    if tags.get(322, 0) * tags.get(323, 0) > MOST_TILE_PIXELS:
        raise ValueError
    return tags[257], tags[256]


_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q", 17: "q"}  # as libtiff
_SIZES: dict[str, Callable[[bytes], tuple[int, int]]] = {
    "JPEG": lambda data: jpeg_shape(data) or (0, 0),
    "PNG": lambda data: struct.unpack_from(">II", data, 16)[::-1],
    "GIF": lambda data: struct.unpack_from("<HH", data, 6)[::-1],
    "WEBP": _webp_size,
    "TIFF": _tiff_size,
    "BMP": lambda data: struct.unpack_from("<HH" if data[14] == 12 else "<ii", data, 18)[::-1],
    "PPM": _portable_size,
    "JPEG 2000": _jpeg2000_size,
    "AVIF": _box_size,
    "HEIC": _box_size,
}


DECODED = tuple(_SIZES)


def image_orientation(data: bytes, kind: str) -> int:
    """Returns an image's EXIF orientation, 1 to 8; 1 where it has none.

    Pillow also reads XMP and the boxes of AVIF. The decoder has already turned HEIC.
    """
    try:
        if kind == "TIFF":  # what OpenCV turns by
            value = _tiff_tags(data).get(PIL.ExifTags.Base.Orientation, 1)
        elif kind in ("JPEG", "PNG", "WEBP", "AVIF"):
            PIL.Image.init()
            with PIL.Image.OPEN[kind][0](io.BytesIO(data), "") as image:
                value = image.getexif().get(PIL.ExifTags.Base.Orientation, 1)
            value = float(value[0] if isinstance(value, tuple) else value)
        else:
            value = 1
    except Exception:  # a damaged block can raise anything; the pixels may still be intact
        return 1
    return int(value) if value in range(1, 9) else 1


def jpeg_scans(data: bytes) -> int:
    """Returns the number of a JPEG's scans, each of which may go over all its pixels."""
    return sum(marker == _START_OF_SCAN for marker, _ in _jpeg_segments(data))


def jpeg_end(data: bytes) -> int | None:
    """Returns the position of a JPEG's end marker, None where it lacks one."""
    # A search of the whole file would find the marker of an embedded thumbnail; a test of the
    # file's end would refuse photographs with an appended film clip.
    *_, (marker, position) = _jpeg_segments(data)
    return position if marker == _END_OF_IMAGE else None


def _jpeg_segments(data: bytes) -> Iterator[tuple[int | None, int]]:
    """Yields each marker outside the scans and its position; None last without an end marker."""
    position = 2
    while 0 <= (position := data.find(b"\xff", position)) < len(data) - 1:
        marker = data[position + 1]
        if marker in (0, 0xFF) or marker in _NO_LENGTH:
            position += 1 if marker == 0xFF else 2
            continue
        yield marker, position
        if marker == _END_OF_IMAGE:
            return
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
        if marker == _START_OF_SCAN:
            scan_end = _SCAN_END.search(data, position)
            position = len(data) if scan_end is None else scan_end.start()
    yield None, len(data)
