"""Descriptors of images in memory: parity with the published code, sizes, boxes and scales."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.mini_benchmark import NANO, SHAPES, noise
from vitgal.data import images as data_images
from vitgal.models import descriptors as models_descriptors, inference
from vitgal.models.network import build_model
from vitgal.models.prepared import prepare


@pytest.fixture(scope="module")
def model():
    return build_model(NANO, code_dim=8, seed=0)


# Images in memory


class TestGlobal:
    @pytest.mark.parametrize("resize", data_images.RESIZE_MODES)
    def test_mixed_sizes_keep_their_order(self, model, resize):
        photographs = [noise(*shape, seed) for seed, shape in enumerate(SHAPES)]
        together = models_descriptors.extract_global(
            model, photographs, size=64, resize=resize, batch_size=2
        )
        assert together.shape == (5, 128)
        assert together.dtype == np.float32
        for photo, row in zip(photographs, together, strict=True):
            with torch.inference_mode():
                resized = data_images.resize(photo, 64, resize)
                inputs = inference.network_input(resized[None], "cpu")
                alone = F.normalize(model.global_features(inputs))[0]
            np.testing.assert_allclose(row, alone, atol=1e-5)  # sums of batches of another size
        apart = np.linalg.norm(together[:, None] - together[None], axis=2)
        assert apart[np.triu_indices(5, 1)].min() > 1e-3  # so that a wrong order would show

    def test_boxes_are_cropped(self, model):
        photo = noise(96, 128, 0)
        boxes = [(10.9, 20, 90, 80), None]
        cropped, whole = models_descriptors.extract_global(
            model, [photo, photo], boxes=boxes, size=64
        )
        expected = models_descriptors.extract_global(model, [photo[20:80, 10:90], photo], size=64)
        np.testing.assert_allclose([cropped, whole], expected, atol=1e-6)
        assert np.abs(cropped - whole).max() > 1e-3

    def test_several_scales(self, model):
        """The mean of the scales' normalised descriptors; 96 * 0.7071 = 67.9 is rounded down."""
        photo = noise(96, 96, 0)
        row = models_descriptors.extract_global(model, [photo], size=96, scales=(1.0, 0.7071))[0]
        inputs = inference.network_input(photo[None], "cpu")
        smaller = F.interpolate(inputs, scale_factor=0.7071, mode="bilinear", align_corners=False)
        assert smaller.shape == (1, 3, 67, 67)
        with torch.inference_mode():
            parts = [F.normalize(model.global_features(item))[0] for item in (inputs, smaller)]
        mean = (parts[0] + parts[1]).numpy() / 2
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)
        only = models_descriptors.extract_global(model, [photo], size=96)[0]
        assert np.abs(row - only).max() > 1e-4

    def test_every_scale_counts_the_same(self):
        """(3, 0) at full size and (0, 1) at half: the mean of their directions lies between."""

        class Lengths(torch.nn.Linear):
            embed_dim, on_timm = 2, False

            def global_features(self, images):
                row = [3.0, 0.0] if images.shape[2] == 32 else [0.0, 1.0]
                return torch.tensor([row] * len(images))

        result = models_descriptors.extract_global(
            Lengths(1, 1), [noise(32, 32, 0)], size=32, scales=(1.0, 0.5)
        )
        np.testing.assert_allclose(result, [[0.5**0.5, 0.5**0.5]], rtol=1e-6)

    @pytest.mark.parametrize("prepared", [False, True])
    def test_narrow_images_are_right_in_bf16(self, model, prepared):
        """oneDNN's strided bf16 convolutions of one column are wrong on a processor with AMX."""
        network = prepare(model, "bf16") if prepared else model
        images = [noise(80, 32, seed) for seed in range(10)]
        with inference.inference(model, "fp32"):
            expected = models_descriptors.describe(model, images, (0.5, 1.0))
        with inference.inference(network, "bf16"):
            for _ in range(3):
                rows = models_descriptors.describe(network, images, (0.5, 1.0))
                np.testing.assert_allclose(rows, expected, atol=0.02)  # rounding of bf16

    def test_none_and_one(self, model):
        assert models_descriptors.extract_global(model, []).shape == (0, 128)
        row = models_descriptors.extract_global(model, [noise(20, 30, 0)], size=32)
        np.testing.assert_allclose(np.linalg.norm(row, axis=1), 1, rtol=1e-6)

    def test_training_mode_is_put_back(self, model):
        other = build_model(NANO, seed=0)
        expected = models_descriptors.extract_global(other, [noise(40, 40, 0)], size=32)
        other.train()
        result = models_descriptors.extract_global(other, [noise(40, 40, 0)], size=32)
        np.testing.assert_array_equal(result, expected)
        assert other.training

    def test_bf16_is_close_to_fp32(self, model):
        photographs = [noise(64, 64, seed) for seed in range(2)]
        exact, rough = (
            models_descriptors.extract_global(model, photographs, size=64, precision=precision)
            for precision in ("fp32", "bf16")
        )
        assert (exact * rough).sum(axis=1).min() > 0.99  # 8 bits a number through 14 blocks
        assert np.abs(exact - rough).max() > 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"boxes": [(0, 0, 99, 9)]}, "outside"),
            ({"boxes": []}, "zip"),
            ({"scales": ()}, "scales"),
            ({"precision": "fp16"}, "fp32, bf16, auto"),
            ({"resize": "crop"}, "squash, longest, area"),
            ({"batch_size": 0}, "batch_size"),
        ],
    )
    def test_errors(self, model, options, message):
        with pytest.raises(ValueError, match=message):
            models_descriptors.extract_global(model, [noise(32, 32, 0)], **options)

    def test_a_descriptor_that_is_not_finite(self):
        broken = build_model(NANO, seed=0)
        with torch.no_grad():
            broken.backbone.cls_token[:] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            models_descriptors.extract_global(broken, [noise(32, 32, 0)], size=32)


class TestLocal:
    def test_one_image(self, model):
        result = models_descriptors.extract_local(
            model, noise(96, 128, 0), size=64, max_keypoints=20
        )
        assert result.box == (0, 0, 128, 96)
        assert result.image_size == (96, 128)
        assert result.input_size == (48, 64)  # 55.4 and 73.9 down to multiples of 16
        assert 0 < len(result) <= 20
        assert (np.diff(result.scores) <= 0).all()
        np.testing.assert_allclose(np.linalg.norm(result.descriptors, axis=1), 1, rtol=1e-6)
        assert (result.keypoints >= 0).all() and (result.keypoints < (64, 48)).all()

    def test_a_box_is_the_crop(self, model):
        photo = noise(96, 128, 0)
        result = models_descriptors.extract_local(model, photo, (16.7, 8, 112, 72), size=64)
        alone = models_descriptors.extract_local(model, photo[8:72, 16:112], size=64)
        np.testing.assert_array_equal(result.keypoints, alone.keypoints)
        np.testing.assert_array_equal(result.descriptors, alone.descriptors)
        assert result.box == (16, 8, 112, 72)
        assert result.image_size == (96, 128)
        difference = result.original_keypoints() - alone.original_keypoints()
        np.testing.assert_allclose(difference, np.tile([16, 8], (len(result), 1)), atol=1e-4)

    def test_no_autoencoder(self):
        with pytest.raises(ValueError, match="03_train_autoencoder"):
            models_descriptors.extract_local(build_model(NANO, seed=0), noise(32, 32, 0), size=32)
