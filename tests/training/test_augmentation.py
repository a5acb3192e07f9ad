"""Augmentation: each step against torchvision's, the whole against a torchvision composition."""

import functools

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torchvision.transforms import RandomResizedCrop

from vitgal.data import formats, images
from vitgal.training import augmentation


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """(60, 90, 3) uint8: smooth colours, as photographs have them, with a hard edge."""
    rows, columns = np.mgrid[0:60, 0:90]
    image = np.stack([2 * columns + 20, 3 * rows + 30, 240 - rows - columns], axis=2)
    image[20:40, 30:60] = (200, 60, 40)
    return image.astype(np.uint8)


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


def difference(ours: np.ndarray, theirs: torch.Tensor) -> np.ndarray:
    return np.abs(ours.astype(int) - theirs.permute(1, 2, 0).numpy().astype(int))


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_brightness_contrast_and_saturation_are_torchvisions(photograph, factor):
    # both round to whole levels, ours up and down, torchvision down, contrast twice
    actual = augmentation.adjust_contrast(photograph, factor, 0.0)
    assert difference(actual, tv.adjust_brightness(tensor(photograph), factor)).max() <= 1
    actual = augmentation.adjust_contrast(photograph, factor)
    assert difference(actual, tv.adjust_contrast(tensor(photograph), factor)).max() <= 1
    actual = augmentation.adjust_saturation(photograph, factor)
    assert difference(actual, tv.adjust_saturation(tensor(photograph), factor)).max() <= 2


@pytest.mark.parametrize("turn", [-0.4, 0.0, 0.1])
def test_hue_is_torchvisions(photograph, turn):
    # A step of 256 hues changes a strong colour by 6 levels, half a step of rounding twice by 6; 8
    # bits of saturation and value between the two conversions add up to 3 at an extreme.
    result = difference(
        augmentation.adjust_hue(photograph, turn), tv.adjust_hue(tensor(photograph), turn)
    )
    assert result.mean() < 1.5 and result.max() <= 9


def test_contrast_by_hand():
    image = np.full((2, 2, 3), 100, np.uint8)
    image[0] = 200  # mean 150: 200 -> 150 + 1.4 * 50 = 220, 100 -> 80
    result = augmentation.adjust_contrast(image, 1.4)
    assert np.unique(result).tolist() == [80, 220]


def reference(image: np.ndarray, size: int, rng: np.random.Generator) -> torch.Tensor:
    """The published steps on torchvision, with the same draws."""
    picture = tensor(image)
    if rng.random() < 0.5:
        picture = tv.horizontal_flip(picture)
    if rng.random() < 0.5:
        steps = [
            functools.partial(tv.adjust_brightness, brightness_factor=rng.uniform(0.6, 1.4)),
            functools.partial(tv.adjust_contrast, contrast_factor=rng.uniform(0.6, 1.4)),
            functools.partial(tv.adjust_saturation, saturation_factor=rng.uniform(0.6, 1.4)),
            functools.partial(tv.adjust_hue, hue_factor=rng.uniform(-0.4, 0.4)),
        ]
        for step in rng.permutation(4):
            picture = steps[step](picture)
    if rng.random() < 0.5:
        rng.integers(99, 101)  # quality 99 or 100 changes next to nothing
    if rng.random() < 0.7:
        height, width = picture.shape[-2:]
        picture = tv.affine(
            picture,
            angle=float(rng.uniform(-10, 10)),
            translate=[float(rng.uniform(-0.2, 0.2) * side) for side in (width, height)],
            scale=float(rng.uniform(0.7, 1.3)),
            shear=[0.0, 0.0],
            interpolation=tv.InterpolationMode.BILINEAR,
            fill=0,
        )
    if rng.random() < 0.5:
        top, left, height, width = augmentation._resized_crop(*picture.shape[-2:], rng)
        picture = tv.crop(picture, top, left, height, width)
    return tv.resize(picture, [size, size], antialias=False)


@pytest.mark.parametrize("seed", range(12))
def test_the_published_augmentation_is_torchvisions_composition(photograph, seed):
    actual = augmentation.augment_published(photograph, 48, np.random.default_rng(seed))
    expected = reference(photograph, 48, np.random.default_rng(seed))
    assert actual.shape == (48, 48, 3) and actual.dtype == np.uint8
    # The mean over the picture, of 255: pixels at an edge differ by the interpolation's rounding,
    # all by the JPEG step, which the reference leaves out. Other draws differ by more.
    assert difference(actual, expected).mean() < 4
    others = reference(photograph, 48, np.random.default_rng(seed + 100))
    assert difference(actual, others).mean() > 8


@pytest.mark.parametrize(("height", "width"), [(768, 1024), (1024, 768), (500, 500), (300, 900)])
def test_the_crop_is_drawn_as_torchvision_draws_it(height, width):
    rng = np.random.default_rng(0)
    actual = np.array([augmentation._resized_crop(height, width, rng) for _ in range(2000)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        page, shape = torch.empty(3, height, width), ([0.9, 1.0], [3 / 4, 4 / 3])
        expected = np.array([RandomResizedCrop.get_params(page, *shape) for _ in range(2000)])
    for top, left, tall, wide in actual:
        assert 0 <= top <= height - tall and 0 <= left <= width - wide
    # Four standard deviations of the difference of two means, of two shares; where nothing varies
    # (at 1:3 no draw fits, and the middle is taken) the two are equal.
    bound = 4 * np.sqrt((actual.var(axis=0) + expected.var(axis=0)) / 2000)
    assert (np.abs(actual.mean(axis=0) - expected.mean(axis=0)) <= bound).all()
    first, second = (
        np.mean((item[:, 2:] == (height, width)).all(axis=1)) for item in (actual, expected)
    )
    assert abs(first - second) <= 4 * np.sqrt(2 * 0.25 / 2000)


def test_the_crop_of_a_wide_photograph_is_its_middle():
    # 300 x 900 at 4:3 at most: 0.9 of the area would need 569 x 427 pixels. All of the height, and
    # 400 of the width, from (900 - 400) / 2 on.
    rng = np.random.default_rng(0)
    assert {augmentation._resized_crop(300, 900, rng) for _ in range(9)} == {(0, 250, 300, 400)}
    assert augmentation._resized_crop(900, 300, rng) == (250, 0, 400, 300)
    assert augmentation._resized_crop(1, 1, rng) == (0, 0, 1, 1)


def test_fast_is_published_without_its_last_roundings(photograph):
    # where neither draws anything but the flip both are a flip and a squash
    class Flip:
        draws = iter([0.1, *[0.99] * 20])

        def random(self) -> float:
            return next(self.draws)

    result = augmentation.augment_fast(photograph, 48, Flip())
    expected = images.resize(photograph[:, ::-1], 48, "squash")
    # the warp's half-pixel convention differs from the resize's by less than a pixel of 48
    assert np.abs(result.astype(int) - expected).mean() < 6


def test_rand_augment_by_hand():
    # Magnitude 9 of 30: brightness 1 +- 0.27 makes 100 to 127 or 73, and every other operation
    # leaves one grey as it is (off the border, where shifts fill 0), but for a level of rounding.
    grey = np.full((32, 32, 3), 100, np.uint8)
    middles = {
        int(augmentation.rand_augment(grey, 1, 9, np.random.default_rng(seed))[16, 16, 0])
        for seed in range(80)
    }
    assert middles <= {72, 73, 99, 100, 127}
    assert {100, 127} <= middles and middles & {72, 73}


def test_rand_augment_follows_its_generator_alone():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    state = torch.random.get_rng_state()
    single = augmentation.rand_augment(image, 2, 20, np.random.default_rng(5))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(9)
    assert np.array_equal(single, augmentation.rand_augment(image, 2, 20, np.random.default_rng(5)))
    assert not np.array_equal(single, image)


# Decoding at a reduced scale


@pytest.mark.parametrize("quality", [99, 100])
def test_jpeg_round_trips_are_those_of_opencv(photograph, quality):
    for shape in ((60, 90), (59, 83), (17, 3), (1, 1)):
        image = photograph[: shape[0], : shape[1]]
        _, coded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        expected = cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1]
        np.testing.assert_array_equal(augmentation.through_jpeg(image, quality), expected)


@pytest.fixture
def jpeg(tmp_path, photograph):
    path = tmp_path / "a.jpg"
    smooth = cv2.resize(photograph, (640, 400), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(path), smooth, [cv2.IMWRITE_JPEG_QUALITY, 98])
    return path


@pytest.mark.parametrize(
    ("least", "shape"),
    [(None, (400, 640)), (201, (400, 640)), (200, (200, 320)), (100, (100, 160)), (1, (50, 80))],
)
def test_the_smallest_scale_that_keeps_both_sides(jpeg, least, shape):
    result = images.read_image(jpeg, least_side=least)
    assert result.shape == (*shape, 3)
    whole = images.read_image(jpeg)
    expected = cv2.resize(whole, shape[::-1], interpolation=cv2.INTER_AREA)
    # the decoder's own average of its 8 x 8 blocks against a plain mean
    assert np.abs(result.astype(int) - expected).mean() < 1.5


def test_other_formats_keep_their_size(tmp_path, photograph):
    cv2.imwrite(str(tmp_path / "a.png"), photograph)
    assert images.read_image(tmp_path / "a.png", least_side=8).shape == photograph.shape


def test_a_progressive_jpeg_with_a_long_head(tmp_path, photograph):
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    _, data = cv2.imencode(".jpg", cv2.resize(photograph, (320, 240)), options)
    note = b"\xff\xfe\x00\x06abcd" + b"\xff\xe1\x00\x08Exif\0\0"  # comment, application data
    path = tmp_path / "a.jpg"
    path.write_bytes(data.tobytes()[:2] + note + data.tobytes()[2:])
    assert formats.jpeg_shape(path.read_bytes()) == (240, 320)
    assert images.read_image(path, least_side=60).shape == (60, 80, 3)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xda\x00\x02", b"\x89PNG"])
def test_no_frame_header_no_shape(data):
    assert formats.jpeg_shape(data) is None
