"""Decoding, cropping, resizing: against files written here and numbers worked out by hand."""

import io
import os
import resource
import socket
import struct
import zlib

import cv2
import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
from hypothesis import example, given, settings, strategies as st

from tests.limited_memory import run_limited
from vitgal.data import formats, images
from vitgal.settings.sections import RESIZE_MODES

PROGRESSIVE = (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
COORDINATES = st.floats(-2, 70) | st.floats()
MARKERS = [b"\xff", b"\xff\xd8", b"\xff\xd9", b"\xff\xda\0\2", b"\xff\xc0\0\x0b\x08", b"\xff\x01"]


@pytest.fixture
def photograph() -> np.ndarray:
    """(48, 64, 3) uint8 RGB: a smooth ramp, so that JPEG changes it little."""
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([4 * x, 5 * y, 2 * (x + y)], axis=-1).clip(0, 255).astype(np.uint8)


def write(path, rgb, *options):
    assert cv2.imwrite(str(path), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), list(options))
    return path


def exif_rotated(jpeg: bytes) -> bytes:
    """The same JPEG with an EXIF tag that asks viewers to turn it by 90 degrees (orientation 6)."""
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    body = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


class TestReadImage:
    def test_png_is_read_exactly_in_rgb(self, tmp_path, photograph):
        read = images.read_image(write(tmp_path / "a.png", photograph))
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, photograph)

    def test_jpeg_is_close(self, tmp_path, photograph):
        read = images.read_image(
            write(tmp_path / "a.jpg", photograph, cv2.IMWRITE_JPEG_QUALITY, 98)
        )
        # JPEG at quality 98 with halved colour resolution stays within a few grey levels of a ramp
        # (the clipped corner more); swapped channels would differ by up to 200.
        assert np.abs(read.astype(int) - photograph).mean() < 3

    def test_grey_and_transparent_become_rgb(self, tmp_path):
        grey = np.full((5, 7), 90, np.uint8)
        assert cv2.imwrite(str(tmp_path / "grey.png"), grey)
        np.testing.assert_array_equal(
            images.read_image(tmp_path / "grey.png"), np.full((5, 7, 3), 90)
        )
        rgba = np.zeros((5, 7, 4), np.uint8)
        rgba[..., 2] = 200  # OpenCV writes BGRA: red 200, alpha 0
        assert cv2.imwrite(str(tmp_path / "clear.png"), rgba)
        assert images.read_image(tmp_path / "clear.png")[2, 3].tolist() == [200, 0, 0]

    def test_orientation_is_ignored_unless_asked_for(self, tmp_path, photograph):
        path = write(tmp_path / "a.jpg", photograph)
        path.write_bytes(exif_rotated(path.read_bytes()))
        assert images.read_image(path).shape == (48, 64, 3)
        assert images.read_image(path, ignore_orientation=False).shape == (64, 48, 3)

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="gone.jpg"):
            images.read_image(tmp_path / "gone.jpg")

    @pytest.mark.parametrize("content", [b"", b"no picture at all", b"\xff\xd8\xff"])
    def test_rubbish_is_named(self, tmp_path, content):
        path = tmp_path / "bad.jpg"
        path.write_bytes(content)
        with pytest.raises(images.ImageError, match="bad.jpg") as caught:
            images.read_image(path)
        assert caught.value.path == path
        assert "bad.jpg" not in caught.value.reason

    def test_a_folder_is_named(self, tmp_path):
        with pytest.raises(images.ImageError, match="cannot be read") as caught:
            images.read_image(tmp_path)
        assert not isinstance(caught.value, images.ReadError)

    def test_a_transient_failure_is_a_read_error(self, tmp_path, photograph):
        path = write(tmp_path / "a.jpg", photograph)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
            with pytest.raises(images.ReadError, match="a.jpg: .*Too many.*same command again"):
                images.read_image(path)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    def test_pipes_sockets_devices_and_endless_links_are_not_opened(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.jpg")
        (tmp_path / "device.jpg").symlink_to("/dev/zero")
        (tmp_path / "endless.jpg").symlink_to("endless.jpg")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "socket.jpg"))
        for name in ("pipe", "device", "socket", "endless"):
            with pytest.raises(images.ImageError, match=f"{name}.jpg: cannot be read"):
                images.read_image(tmp_path / f"{name}.jpg")

    @pytest.mark.parametrize("progressive", [0, 1])
    def test_cut_jpeg(self, tmp_path, photograph, progressive):
        noisy = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
        path = write(tmp_path / "a.jpg", noisy, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive)
        whole = path.read_bytes()
        for fraction in (0.1, 0.5, 0.9):
            path.write_bytes(whole[: int(len(whole) * fraction)])
            with pytest.raises(images.ImageError, match="cut short"):
                images.read_image(path)
        path.write_bytes(whole[:-2])  # all the pixels, but no end marker
        with pytest.warns(UserWarning, match="a.jpg: .*lacks its end mark, but every row is there"):
            read = images.read_image(path)
        path.write_bytes(whole[:-200])
        with pytest.raises(images.ImageError, match="cut short"):
            images.read_image(path, least_side=90)
        path.write_bytes(whole[:-2])
        with pytest.warns(UserWarning, match="lacks its end mark"):
            assert images.read_image(path, least_side=90).shape == (100, 150, 3)
        path.write_bytes(whole)
        np.testing.assert_array_equal(images.read_image(path), read)

    @pytest.mark.parametrize("options", [(), PROGRESSIVE, (cv2.IMWRITE_JPEG_RST_INTERVAL, 4)])
    def test_a_jpeg_with_a_hole_or_a_false_end(self, tmp_path, options):
        noisy = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
        path = write(tmp_path / "a.jpg", noisy, *options)
        whole = path.read_bytes()
        middle, end = len(whole) // 2, b"\xff\xd9"
        for damaged in (
            whole[:middle] + end,
            whole[:-60] + end,
            whole[:middle] + whole[middle + 500 :],
            whole[:middle] + bytes(500) + whole[middle + 500 :],
            whole[:middle] + b"\xff" * 500 + whole[middle + 500 :],  # as on an erased card
            whole[:middle] + b"\xff\x30" + whole[middle + 2 :],
            whole[:middle] + b"\xff\xc9" + whole[middle + 2 :],
        ):
            path.write_bytes(damaged)
            with pytest.raises(images.ImageError, match="cut short|damaged"):
                images.read_image(path)

    def test_padding_before_the_end_is_accepted(self, tmp_path, photograph):
        path = write(tmp_path / "a.jpg", photograph)
        expected = images.read_image(path)
        path.write_bytes(path.read_bytes()[:-2] + bytes(50) + b"\xff\xd9" + b"clip\xff\xd9")
        np.testing.assert_array_equal(images.read_image(path), expected)

    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    @pytest.mark.parametrize("size", [(64, 48), (33, 17), (1, 1), (1, 40)])
    def test_pixels_are_those_of_opencv(self, tmp_path, photograph, mode, size):
        """The decoder that tells of damage gives the very bytes that OpenCV gives."""
        path = tmp_path / "a.jpg"
        picture = PIL.Image.fromarray(cv2.resize(photograph, size)).convert(mode)
        for options in ({}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}):
            if mode == "RGB" or "subsampling" not in options:
                picture.save(path, **options)
                expected = cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]
                np.testing.assert_array_equal(images.read_image(path), expected)

    def test_cut_jpeg_with_a_whole_thumbnail(self, tmp_path, photograph):
        """The thumbnail's own end marker stands before the photograph's scan: it must not count."""
        path = write(tmp_path / "a.jpg", photograph)
        jpeg = path.read_bytes()
        thumbnail = write(tmp_path / "t.jpg", photograph[:8, :8]).read_bytes()
        assert thumbnail.endswith(b"\xff\xd9")
        segment = b"\xff\xe2" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
        path.write_bytes(jpeg[:2] + segment + jpeg[2:])
        assert images.read_image(path).shape == (48, 64, 3)
        path.write_bytes((jpeg[:2] + segment + jpeg[2:])[:-40])
        with pytest.raises(images.ImageError, match="cut short"):
            images.read_image(path)

    def test_bytes_after_the_end_are_allowed(self, tmp_path, photograph):
        """A film clip appended to a photograph holds every pair of bytes, scan headers too."""
        path = write(tmp_path / "a.jpg", photograph)
        path.write_bytes(path.read_bytes() + b"\xff\xd9clip\xff\xda" + bytes(100))
        assert images.read_image(path).shape == (48, 64, 3)

    def test_cut_png(self, tmp_path):
        noisy = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
        path = write(tmp_path / "a.png", noisy)
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(images.ImageError, match="cut short"):
            images.read_image(path)

    @pytest.mark.parametrize(
        ("suffix", "kind"),
        [("jpg", "JPEG"), ("png", "PNG"), ("gif", "GIF"), ("bmp", "BMP"), ("tif", "TIFF")]
        + [("webp", "WEBP"), ("jp2", "JPEG 2000"), ("avif", "AVIF"), ("ppm", "PPM")],
    )
    def test_every_format_is_read_under_any_name(self, tmp_path, photograph, suffix, kind):
        path = write(tmp_path / f"a.{suffix}", photograph)
        expected = images.read_image(path)
        data = path.read_bytes()
        assert formats.image_format(data[: formats.HEAD]) == kind
        assert formats.image_size(data, kind) == images.stored_size(path) == (48, 64)
        for name in ("a.jpg.part", "a.txt", "noending"):
            (tmp_path / name).write_bytes(data)
            np.testing.assert_array_equal(images.read_image(tmp_path / name), expected)
        for length in (0, 3, 11, 20, 40, len(data) // 2, len(data) - 40):
            (tmp_path / "cut").write_bytes(data[:length])
            with pytest.raises(images.ImageError, match="cut: "):
                images.read_image(tmp_path / "cut")

    def test_a_jpeg_without_a_frame_has_no_size(self, tmp_path):
        (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xd9")
        for read in (images.read_image, images.stored_size):
            with pytest.raises(images.ImageError, match="does not tell its size"):
                read(tmp_path / "a.jpg")

    def test_heic_is_read_upright(self, tmp_path, photograph):
        pillow_heif = pytest.importorskip("pillow_heif")
        exif = PIL.Image.Exif()
        exif[PIL.ExifTags.Base.Orientation] = 6
        picture = PIL.Image.fromarray(photograph)
        pillow_heif.from_pillow(picture).save(tmp_path / "a.jpg", quality=-1, exif=exif.tobytes())
        upright, orientation, _ = images.read_photograph(tmp_path / "a.jpg")
        assert orientation == 1 and upright.shape == (64, 48, 3)
        assert np.abs(upright - np.rot90(photograph, -1).astype(int)).mean() < 6

    def test_unsupported_formats_are_named(self, tmp_path):
        for data, kind in (
            (b"\xff\x0a\xfa\x7f", "JPEG XL"),
            (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "camera raw"),
        ):
            (tmp_path / "a.jpg").write_bytes(data)
            with pytest.raises(images.ImageError, match=f"{kind} is not read here: convert it"):
                images.read_image(tmp_path / "a.jpg")


def claiming(kind: str, side: int) -> bytes:
    """A small file whose header claims `side` x `side` pixels."""
    _, encoded = cv2.imencode(
        {
            "JPEG": ".jpg",
            "PNG": ".png",
            "WEBP": ".webp",
            "TIFF": ".tif",
            "GIF": ".gif",
            "BMP": ".bmp",
            "PPM": ".ppm",
            "JPEG 2000": ".jp2",
            "AVIF": ".avif",
        }[kind],
        np.full((48, 64, 3), 90, np.uint8),
    )
    data = bytearray(encoded.tobytes())
    if kind == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", side, side)
    elif kind == "PNG":
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", side, -side)
    elif kind == "PPM":
        data = data.replace(b"64 48", b"%d %d" % (side, side))
    elif kind == "WEBP":
        data = (
            b"VP8X" + struct.pack("<II", 10, 0) + (side - 1).to_bytes(3, "little") * 2 + data[12:]
        )
        data = b"RIFF" + struct.pack("<I", len(data) + 4) + b"WEBP" + data
    elif kind == "TIFF":
        data = struct.pack("<4sIH", b"II*\0", 8, 2)
        data += struct.pack("<HHII", 256, 4, 1, side) + struct.pack("<HHII", 257, 4, 1, side)
    elif kind == "JPEG 2000":
        start = data.index(b"\xff\x4f\xff\x51") + 8
        data[start : start + 8] = struct.pack(">II", side, side)
    else:
        start = data.index(b"ispe") + 8
        data[start : start + 8] = struct.pack(">II", side, side)
    return bytes(data)


CLAIMING = ["JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG 2000", "AVIF"]


def test_a_small_file_with_a_large_header_takes_no_memory(tmp_path):
    for kind in CLAIMING:
        (tmp_path / f"{kind}.jpg").write_bytes(claiming(kind, 30_000))
        assert (tmp_path / f"{kind}.jpg").stat().st_size < 10_000
    with open(tmp_path / "sparse.jpg", "wb") as handle:
        handle.truncate(20 << 30)
    stored = io.BytesIO()
    PIL.Image.new("L", (64, 64), 90).save(stored, "JPEG", progressive=True)
    scans = bytearray(stored.getvalue())
    start = scans.index(b"\xff\xc2") + 5
    scans[start : start + 4] = struct.pack(">HH", 14_000, 14_000)  # 196 million pixels
    (tmp_path / "claims.jpg").write_bytes(scans)
    last = scans[scans.rindex(b"\xff\xda") : -2]
    (tmp_path / "scans.jpg").write_bytes(scans[:-2] + last * 1000 + b"\xff\xd9")
    tiles = struct.pack("<4sIH", b"II*\0", 8, 4)
    for tag, value in ((256, 64), (257, 64), (322, 30_000), (323, 30_000)):
        tiles += struct.pack("<HHII", tag, 4, 1, value)
    (tmp_path / "tiles.jpg").write_bytes(tiles)
    printed = run_limited(
        "from vitgal.data import images",
        """
for path in sys.argv[1:]:
    for options in ({}, {"least_side": 64}, {"ignore_orientation": False}):
        try:
            images.read_image(path, **options)
        except images.ImageError as error:
            print(error)
""",
        *sorted(tmp_path.iterdir()),
    )
    assert printed.count("30000 x 30000 pixels are more than 200 million") == 3 * len(CLAIMING)
    for fault in ("tiles.jpg: ", "larger than 2 GiB", "it has too many scans", "cannot hold 14000"):
        assert printed.count(fault) == 3


@pytest.mark.parametrize("options", [{"progressive": True}, {"optimize": True}])
def test_a_photograph_of_one_colour_is_no_small_file(tmp_path, options):
    """The shortest JPEG there is: the largest sampling, a bit or two a block."""
    PIL.Image.new("RGB", (4096, 4096)).save(tmp_path / "a.jpg", "JPEG", subsampling=2, **options)
    assert images.stored_size(tmp_path / "a.jpg") == (4096, 4096)


def test_the_limit_on_pixels_is_a_setting(tmp_path, photograph, monkeypatch):
    path = write(tmp_path / "a.jpg", photograph)
    monkeypatch.setenv("VITGAL_MAX_MEGAPIXELS", "0.003")
    with pytest.raises(images.ImageError, match="64 x 48 pixels are more than 0.003 million"):
        images.read_image(path)
    for text in ("many", "nan", "-1"):
        monkeypatch.setenv("VITGAL_MAX_MEGAPIXELS", text)
        with pytest.raises(images.ImageError, match=f"MEGAPIXELS is '{text}', no number above 0"):
            images.read_image(path)
    monkeypatch.setenv("VITGAL_MAX_MEGAPIXELS", "0.004")
    assert images.read_image(path).shape == (48, 64, 3)


class TestDamagedBytes:
    """No bytes make a reader hang, or raise anything but an ImageError."""

    @given(st.sampled_from(CLAIMING), st.data())
    def test_changed_bytes_are_one_failed_file(self, tmp_path_factory, kind, data):
        path = tmp_path_factory.getbasetemp() / "changed"
        whole = bytearray(claiming(kind, 70))
        for _ in range(data.draw(st.integers(1, 4))):
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(whole)
        try:
            pixels, orientation, _ = images.read_photograph(path)
        except images.ImageError as error:
            assert error.path == path and error.reason.isprintable()
        else:
            assert pixels.ndim == 3 and 1 <= orientation <= 8

    @given(st.lists(st.binary(max_size=8) | st.sampled_from(MARKERS), max_size=12).map(b"".join))
    def test_any_bytes(self, tail):
        for head in (b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF"):
            shape = formats.jpeg_shape(head + tail)
            assert shape is None or (len(shape) == 2 and min(shape) >= 0)
            end = formats.jpeg_end(head + tail)
            assert end is None or (head + tail)[end : end + 2] == b"\xff\xd9"

    @given(st.data())
    def test_a_changed_or_shortened_photograph(self, data):
        _, encoded = cv2.imencode(".jpg", np.full((24, 40, 3), 90, np.uint8))
        jpeg = bytearray(encoded.tobytes())
        assert formats.jpeg_shape(bytes(jpeg)) == (24, 40) and formats.jpeg_end(bytes(jpeg))
        position = data.draw(st.integers(0, len(jpeg) - 1))
        assert formats.jpeg_end(bytes(jpeg[:position])) is None
        jpeg[position] = data.draw(st.integers(0, 255))
        formats.jpeg_shape(bytes(jpeg))
        formats.jpeg_end(bytes(jpeg))


def entry(kind: int, value: bytes, order: str = "<") -> bytes:
    """An EXIF block whose only tag is an orientation of this TIFF type."""
    sign = b"II*\0" if order == "<" else b"MM\0*"
    inline, outside = (value.ljust(4, b"\0"), b"") if len(value) <= 4 else (None, value)
    field = struct.pack(order + "I", 26) if inline is None else inline
    return sign + struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1) + field + bytes(4) + outside


ORIENTATION_OF_SIX = [
    entry(3, struct.pack("<H", 6)),
    entry(3, struct.pack(">H", 6), ">"),
    entry(4, struct.pack(">I", 6), ">"),  # LONG
    entry(5, struct.pack("<II", 6, 1)),  # RATIONAL
    entry(5, struct.pack(">II", 12, 2), ">"),
    entry(11, struct.pack("<f", 6.0)),  # FLOAT
    entry(12, struct.pack("<d", 6.0)),  # DOUBLE
]
NO_ORIENTATION = [
    entry(5, struct.pack("<II", 6, 0)),
    entry(5, struct.pack("<II", 13, 2)),
    entry(3, struct.pack("<H", 9)),
    entry(2, b"six"),
    entry(11, struct.pack("<f", float("nan"))),
    b"II*\0" + struct.pack("<IH", 8, 65535),
    b"nothing",
]
XMP = (
    b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'>"
    b'<rdf:Description tiff:Orientation="6" /></x:xmpmeta>'
)


def with_segment(jpeg: bytes, body: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


@pytest.mark.parametrize("turned", [True, False])
def test_one_reader_decides_about_the_orientation(tmp_path, photograph, turned):
    path = write(tmp_path / "a.jpg", photograph)
    jpeg = path.read_bytes()
    stored = images.read_image(path)
    blocks = [b"Exif\0\0" + block for block in (ORIENTATION_OF_SIX if turned else NO_ORIENTATION)]
    for body in [*blocks, XMP] if turned else blocks:
        path.write_bytes(with_segment(jpeg, body))
        np.testing.assert_array_equal(images.read_image(path), stored)
        pixels, orientation, _ = images.read_photograph(path)
        np.testing.assert_array_equal(pixels, stored)
        assert orientation == (6 if turned else 1), body
        upright = images.read_image(path, ignore_orientation=False)
        np.testing.assert_array_equal(upright, np.rot90(stored, -1) if turned else stored)


@given(
    st.sampled_from(["png", "webp", "tif", "avif"]),
    st.integers(1, 8),
    st.integers(2, 12),
    st.integers(2, 12),
)
@settings(max_examples=60)
def test_oriented_pixels_are_the_stored_ones_turned(
    tmp_path_factory, suffix, orientation, height, width
):
    stored = np.arange(height * width, dtype=np.uint8).reshape(height, width)
    path = tmp_path_factory.getbasetemp() / f"oriented.{suffix}"
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    options = {"tif": {"tiffinfo": exif}, "webp": {"lossless": True}, "avif": {"quality": 100}}
    picture = PIL.Image.fromarray(np.stack([stored] * 3, axis=-1))
    picture.save(path, **{"exif": exif} | options.get(suffix, {}))
    read = images.read_image(path)
    if suffix == "avif":
        assert read.shape == (height, width, 3)
        stored = read[..., 0]
    np.testing.assert_array_equal(read[..., 0], stored)
    assert images.stored_size(path) == (height, width)
    assert images.read_photograph(path)[1] == orientation
    upright = images.read_image(path, ignore_orientation=False)[..., 0]
    turned = stored[:, ::-1] if orientation in (2, 4, 5, 7) else stored
    turned = np.rot90(turned, {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: -1, 7: -1, 8: 1}[orientation])
    np.testing.assert_array_equal(upright, turned)


class TestCropBox:
    @given(st.integers(0, 60), st.integers(0, 60), st.lists(COORDINATES, min_size=4, max_size=4))
    @example(48, 64, [0.0, 0.0, 65.0, 49.0])
    def test_a_crop_has_the_shape_of_its_box(self, height, width, box):
        image = np.zeros((height, width, 3), np.uint8)
        try:
            crop, cut = images.crop_box(image, box)
        except ValueError:
            return
        x0, y0, x1, y1 = cut
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        assert crop.shape == (y1 - y0, x1 - x0, 3) and np.shares_memory(crop, image)
        assert all(0 <= given - whole < 2 for given, whole in zip(box, cut, strict=True))
        again, same = images.crop_box(image, cut)
        assert same == cut and again.shape == crop.shape

    def test_fractions_are_truncated(self, photograph):
        crop, box = images.crop_box(photograph, (3.9, 5.1, 20.99, 30.5))
        assert box == (3, 5, 20, 30)
        np.testing.assert_array_equal(crop, photograph[5:30, 3:20])

    def test_none_is_the_whole_image(self, photograph):
        crop, box = images.crop_box(photograph, None)
        assert box == (0, 0, 64, 48)
        assert crop.shape == photograph.shape

    def test_one_pixel_outside_is_clipped(self, photograph):
        crop, box = images.crop_box(photograph, (10, 10, 65.9, 49))
        assert box == (10, 10, 64, 48)
        assert crop.shape == (38, 54, 3)

    @pytest.mark.parametrize(
        ("box", "message"),
        [
            ((-0.5, 0, 10, 10), "negative"),
            ((0, 0, 66, 10), "outside"),
            ((0, 0, 10, 50), "outside"),
            ((10, 10, 10.9, 20), "empty"),
            ((20, 10, 10, 20), "empty"),
            ((64, 0, 65, 10), "empty"),
            ((0, 0, float("nan"), 10), "finite"),
            ((0, 0, 10), "four"),
        ],
    )
    def test_bad_boxes(self, photograph, box, message):
        with pytest.raises(ValueError, match=message):
            images.crop_box(photograph, box)

    def test_an_empty_image(self):
        with pytest.raises(ValueError, match="empty"):
            images.crop_box(np.zeros((0, 5, 3), np.uint8), None)


class TestResize:
    @given(st.integers(1, 9000), st.integers(1, 9000), st.integers(16, 2048))
    def test_shapes_of_every_mode(self, height, width, size):
        shapes = {mode: images.resized_shape(height, width, size, mode) for mode in RESIZE_MODES}
        assert shapes["squash"] == (size, size)
        assert max(shapes["longest"]) == size and min(shapes["longest"]) >= 1
        tall, wide = shapes["area"]
        assert tall % 16 == wide % 16 == 0 and min(tall, wide) >= 16
        assert tall * wide <= size * size * (1 + 1e-9) or min(tall, wide) == 16
        for mode, shape in shapes.items():  # a turned photograph gives the turned shape
            assert images.resized_shape(width, height, size, mode) == shape[::-1]

    @pytest.mark.parametrize(
        ("height", "width", "mode", "expected"),
        [
            (360, 480, "squash", (512, 512)),
            (360, 480, "longest", (384, 512)),
            (333, 1000, "longest", (170, 512)),  # 512 * 0.333 = 170.5
            (1000, 1, "longest", (512, 1)),
            # 512 * sqrt(0.75) = 443.4, 512 / sqrt(0.75) = 591.2; floored to multiples of 16
            (360, 480, "area", (432, 576)),
            (300, 640, "area", (336, 736)),  # 350.5, 747.8
            (700, 700, "area", (512, 512)),
            (1080, 1920, "area", (384, 672)),  # 512 * 3 / 4 = 384 exactly, 682.7
            (1, 5000, "area", (16, 36192)),  # 7.2 would floor to no patch at all; 36203.9
        ],
    )
    def test_shapes(self, height, width, mode, expected):
        assert images.resized_shape(height, width, 512, mode) == expected

    @pytest.mark.parametrize("longest", [3, 7, 49, 103, 105, 1021, 1599])
    def test_longest_side_is_the_size(self, longest):
        """Published floating point loses a pixel for some: int(103 * (512 / 103)) is 511."""
        for size in (224, 511, 512, 1023):
            assert images.resized_shape(longest, 2, size, "longest")[0] == size

    def test_bilinear_without_smoothing(self):
        """Halving 4 columns samples at 0.5 and 2.5 (pixel centres): means of neighbouring pairs."""
        row = np.array([0, 100, 50, 250] + [0] * 28, np.uint8)
        image = np.broadcast_to(row[None, :, None], (32, 32, 3)).copy()
        resized = images.resize(image, 16, "squash")
        assert resized.shape == (16, 16, 3)
        assert resized[5, :2, 0].tolist() == [50, 150]
        # A quarter the width samples at 1.5: only two of four pixels count (the mean is 100).
        wide = np.tile(image, (1, 2, 1))
        assert images.resize(wide, 16, "squash")[0, 0, 1] == (100 + 50) // 2

    @pytest.mark.parametrize(
        ("shape", "size", "mode", "message"),
        [
            ((0, 9, 3), 64, "squash", "empty"),
            ((9, 9, 3), 8, "squash", "at least 16"),
            ((9, 9, 3), 64, "stretch", "squash, longest, area"),
        ],
    )
    def test_errors(self, shape, size, mode, message):
        with pytest.raises(ValueError, match=message):
            images.resize(np.zeros(shape, np.uint8), size, mode)
