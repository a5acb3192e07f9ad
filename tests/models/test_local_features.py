"""Token selection, patch boxes and suppression: small cases by hand, larger ones by brute force."""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from vitgal.features import selection
from vitgal.models import descriptors
from vitgal.models.inference import network_input
from vitgal.models.network import TokenCodes, build_model
from vitgal.settings.sections import SelectionSettings

FRAME = ((0, 0, 64, 48), (48, 64))


class Tokens:
    """Stands where a network does and gives tokens made by hand, one set a call (a scale)."""

    code_dim = 3
    patch = multiple = 16

    def __init__(self, *sets: tuple[tuple[int, int], list[float]]):
        self.sets = list(sets)

    def token_codes(self, images: torch.Tensor) -> TokenCodes:
        grid, attention = self.sets.pop(0)
        attention = torch.tensor(attention)[None, None].repeat(len(images), 1, 1)
        number = torch.arange(1, 1 + attention.shape[2], dtype=torch.float32)
        codes = torch.stack([number, 0 * number, 2 * number], dim=1)[None].repeat(len(images), 1, 1)
        return TokenCodes(grid=grid, attention=attention, codes=codes)


def one(model, size=(32, 32), **options):
    selection = SelectionSettings(**options)
    (features,) = descriptors.local_features(model, torch.zeros(1, 3, *size), [FRAME], selection)
    return features


class TestScores:
    def test_by_hand(self):
        """Heads over their peaks: [1, .5, .5], [.25, 1, .25]; mean [.625, .75, .375], sum 1.75.

        The second head attends ten times as much; without the peaks its place would be first.
        """
        attention = torch.tensor([[[0.04, 0.02, 0.02], [0.1, 0.4, 0.1]]])
        expected = np.array([0.625, 0.75, 0.375]) / 1.75 * 3
        # float32 rounding
        np.testing.assert_allclose(descriptors.token_scores(attention)[0], expected, rtol=1e-6)

    def test_the_mean_is_one(self):
        attention = torch.rand(3, 8, 77, generator=torch.Generator().manual_seed(0))
        np.testing.assert_allclose(descriptors.token_scores(attention).mean(dim=1), 1, rtol=1e-5)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_attention_that_is_not_finite_is_refused(self, bad):
        tokens = Tokens(((3, 4), [1.0] * 11 + [bad]), ((3, 4), [1.0] * 12))
        with pytest.raises(ValueError, match="not finite"):
            one(tokens, scales=(1.0, 1.0))


class TestSelection:
    SCORES = np.array([0.5, 70, 0.95, 31, 0.9375, 2, 30], np.float32)

    @pytest.mark.parametrize(
        ("target", "expected"),
        [
            (1, [1]),  # above 60: one, enough
            (2, [1, 3]),  # above 30, strictly: not the last
            (3, [1, 3, 6]),  # above 15
            (4, [1, 3, 5, 6]),  # above 1.875
            (5, [1, 2, 3, 5, 6]),  # above 0.9375, strictly: not the fifth
            (100, [1, 2, 3, 5, 6]),  # nothing below 0.9375 is ever tried
        ],
    )
    def test_ladder(self, target, expected):
        assert selection.select_tokens(self.SCORES, target).tolist() == expected

    def test_none_pass(self):
        flat = np.full(9, 0.9, np.float32)
        assert selection.select_tokens(flat, 5).tolist() == []
        assert selection.select_tokens(flat[:0], 5).tolist() == []

    def test_the_loop_it_replaces(self):
        """Halving from 60, stopping when enough are found or the next would be below 0.6."""
        rng = np.random.default_rng(0)
        for target in rng.uniform(0.5, 120, 200):
            scores = rng.gamma(0.3, 3, 100).astype(np.float32)
            threshold = 60.0
            while True:
                kept = [i for i, score in enumerate(scores) if score > np.float32(threshold)]
                threshold /= 2
                if len(kept) >= target or threshold < 0.6:
                    break
            assert selection.select_tokens(scores, target).tolist() == kept


class TestScales:
    @pytest.mark.parametrize(
        ("size", "scale", "expected"),
        [
            ((432, 576), 0.3535, (160, 208)),  # 152.7, 203.6
            ((432, 576), 1.0, (432, 576)),
            ((336, 736), 1.4142, (480, 1040)),  # 475.2; 1040.9 is truncated before rounding up
            ((16, 16), 0.05, (16, 16)),  # never below one patch
        ],
    )
    def test_scaled_size(self, size, scale, expected):
        assert selection.scaled_size(size, scale) == expected

    def test_published_interpolation_loses_a_pixel(self):
        """688 * (496 / 688) is 495.99..., rounded down by the published way to scale."""
        images = torch.rand(1, 3, 32, 688, generator=torch.Generator().manual_seed(0))
        published, factors = descriptors.rescale(images, 0.7071, "published")
        assert published.shape[2:] == (32, 495)
        actual, same = descriptors.rescale(images, 0.7071)
        assert actual.shape[2:] == (32, 496)
        assert factors == same == (1.0, 496 / 688)

    def test_elsewhere_the_two_agree(self):
        images = torch.rand(1, 3, 432, 576, generator=torch.Generator().manual_seed(0))
        for scale in SelectionSettings.scales:
            actual, reference = (
                descriptors.rescale(images, scale, method)[0] for method in ("size", "published")
            )
            assert actual.shape == reference.shape
            # sampling positions that differ in the last bit of about 600 (6e-5 pixels)
            np.testing.assert_allclose(actual, reference, atol=2e-4)

    def test_scale_one_changes_nothing(self):
        images = torch.rand(1, 3, 32, 48)
        assert descriptors.rescale(images, 1.0)[0] is images


class TestPatches:
    def test_at_scale_one(self):
        """Token 4 of rows of 3 stands in row 1, column 1."""
        boxes = selection.patch_boxes(np.array([0, 4]), 3, (1.0, 1.0))
        assert boxes.tolist() == [[0, 0, 16, 16], [16, 16, 32, 32]]
        assert selection.centres(boxes).tolist() == [[8, 8], [24, 24]]

    def test_truncation_and_halves(self):
        """At factors 10/27 and 13/36: 16 px are 43.2 down and 44.3 across; (0 + 43) // 2 = 21."""
        boxes = selection.patch_boxes(np.array([0, 5]), 4, (160 / 432, 208 / 576))
        assert boxes.tolist() == [[0, 0, 43, 44], [43, 44, 86, 88]]
        assert selection.centres(boxes).tolist() == [[22, 21], [66, 64]]

    def test_none(self):
        boxes = selection.patch_boxes(np.array([], np.int64), 4, (1.0, 1.0))
        assert boxes.shape == (0, 4)
        assert selection.centres(boxes).shape == (0, 2)


def greedy(boxes, scores, overlap, candidates, keep):
    """Suppression by definition, with whole numbers: one loop over pairs."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:candidates]
    kept = []
    for i in order:
        for j in kept:
            y = min(boxes[i][2], boxes[j][2]) - max(boxes[i][0], boxes[j][0])
            x = min(boxes[i][3], boxes[j][3]) - max(boxes[i][1], boxes[j][1])
            pair = max(y, 0) * max(x, 0)
            area = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (boxes[i], boxes[j]))
            if pair > overlap * (area - pair):
                break
        else:
            kept.append(i)
    return kept[:keep]


class TestSuppression:
    LIMITS = dict(overlap=0.5, candidates=1200, keep=1000)

    def test_exactly_half_survives(self):
        """Two 2 x 3 boxes that share 2 x 2: 4 / 8 is not above one half. 3 x 2 of 12 / 18: is."""
        boxes = np.array([[0, 0, 2, 3], [0, 1, 2, 4]])
        assert selection.suppress(boxes, np.float32([1, 2]), **self.LIMITS).tolist() == [1, 0]
        boxes = np.array([[0, 0, 3, 5], [0, 1, 3, 6]])
        assert selection.suppress(boxes, np.float32([1, 2]), **self.LIMITS).tolist() == [1]

    def test_the_suppressed_suppress_nothing(self):
        """The second falls to the first; the third overlaps only the second."""
        boxes = np.array([[0, 0, 1, 10], [0, 3, 1, 13], [0, 6, 1, 16]])
        assert selection.suppress(boxes, np.float32([3, 2, 1]), **self.LIMITS).tolist() == [0, 2]

    def test_ties_go_by_position(self):
        boxes = np.array([[0, 0, 9, 9]] * 3 + [[20, 20, 29, 29]] * 2)
        assert selection.suppress(boxes, np.float32([1, 1, 1, 1, 1]), **self.LIMITS).tolist() == [
            0,
            3,
        ]

    @pytest.mark.parametrize("count", [0, 1, 2])
    def test_few(self, count):
        boxes = np.array([[0, 0, 4, 4], [9, 9, 12, 12]])[:count]
        scores = np.float32([1, 2])[:count]
        assert selection.suppress(boxes, scores, **self.LIMITS).tolist() == [1, 0][2 - count :]

    @pytest.mark.parametrize(("candidates", "keep"), [(1200, 1000), (70, 1000), (1200, 17)])
    def test_brute_force(self, candidates, keep):
        rng = np.random.default_rng(0)
        for overlap in (0.3, 0.5, 0.7):
            corners = rng.integers(0, 90, (160, 2))
            sides = rng.integers(8, 45, (160, 2))
            boxes = np.concatenate([corners, corners + sides], axis=1)
            scores = rng.integers(0, 40, 160).astype(np.float32)  # many ties
            result = selection.suppress(
                boxes, scores, overlap=overlap, candidates=candidates, keep=keep
            )
            assert result.tolist() == greedy(boxes, scores, overlap, candidates, keep)


class TestLocalFeatures:
    def test_by_hand(self):
        """Scores: peaks 4 and 2 of a mean of 1; the last threshold 0.9375 passes three of four."""
        result = one(Tokens(((2, 2), [0.2, 0.4, 0.0, 0.2])), scales=(1.0,))
        assert result.keypoints.tolist() == [[24, 8], [8, 8], [24, 24]]
        np.testing.assert_allclose(result.scores, [2, 1, 1], rtol=1e-6)
        np.testing.assert_allclose(result.descriptors, [[1 / 5**0.5, 0, 2 / 5**0.5]] * 3, rtol=1e-6)
        assert result.scales.tolist() == [1, 1, 1]
        assert (result.input_size, result.box, result.image_size) == ((32, 32), *FRAME)

    def test_scales_compete(self):
        """The patch of half scale covers the image; each patch of scale 1 only a quarter of it."""
        model = Tokens(((1, 1), [0.3]), ((2, 2), [0.1, 0.4, 0.0, 0.1]))
        result = one(model, scales=(0.5, 1.0))
        # Of scale 1 the scores are 0.67, 2.67, 0, 0.67; of half scale 1.
        assert result.keypoints.tolist() == [[24, 8], [16, 16]]
        assert result.scales.tolist() == [1, 0.5]
        np.testing.assert_allclose(result.descriptors[:, 2], 2 / 5**0.5, rtol=1e-6)

    def test_exactly_one_token(self):
        """The published code stops with an error here."""
        result = one(Tokens(((2, 2), [0.0, 0.0, 0.9, 0.0])), scales=(1.0,))
        assert result.keypoints.tolist() == [[8, 24]]
        assert result.descriptors.shape == (1, 3)

    def test_no_token(self):
        result = one(Tokens(((2, 2), [0.5, 0.5, 0.5, 0.5])), scales=(1.0,), ladder=(2.0,))
        assert len(result) == 0
        assert result.descriptors.shape == (0, 3)
        assert result.keypoints.shape == (0, 2)
        assert result.scores.dtype == result.scales.dtype == np.float32

    def test_limits(self):
        attention = [0.1, 0.2, 0.3, 0.4]
        result = one(Tokens(((2, 2), attention)), scales=(1.0,), max_keypoints=1)
        assert result.keypoints.tolist() == [[24, 24]]
        result = one(Tokens(((2, 2), attention)), scales=(1.0,), nms_candidates=1)
        assert result.keypoints.tolist() == [[24, 24]]
        result = one(
            Tokens(((2, 2), attention)), scales=(1.0,), target_per_scale=1, ladder=(1.5, 1)
        )
        assert result.keypoints.tolist() == [[24, 24]]  # 1.6 alone is above 1.5

    def test_fewer_tokens_are_wanted_at_a_smaller_scale(self):
        """Half of 64 pixels: a quarter of the area, so 1 token of the 4 wanted at scale 1."""
        # Scores 0.4, 0.8, 1.2, 1.6: one above 1.5, which is enough; at scale 1 it is not.
        for scale, wanted in ((0.5, 1), (1.0, 2)):
            model = Tokens(((2, 2), [0.1, 0.2, 0.3, 0.4]))
            options = dict(scales=(scale,), target_per_scale=4, ladder=(1.5, 1))
            assert len(one(model, size=(64, 64), **options)) == wanted

    def test_published_locations_are_scrambled_by_the_lost_pixel(self):
        """31 tokens a row counted as 30: token 31, row 1 column 0, is taken for row 1 column 1."""
        attention = np.zeros(62, np.float32)
        attention[31] = 1
        for method, x in (("size", (0 + 22) // 2), ("published", (22 + 44) // 2)):
            model = Tokens(((2, 31), attention.tolist()))
            result = one(model, size=(32, 688), scales=(0.7071,), interpolation=method)
            assert result.keypoints[0, 0] == x

    def test_batches_do_not_mix_images(self):
        """Two images together give what each gives alone."""
        model = build_model("xcit_nano_12_p16_224", code_dim=8, seed=0)
        with torch.no_grad():
            # The attention of random weights is nearly even. Made ten times as sharp, no two scores
            # are so close that another order of summation swaps them: it depends on the threads.
            model.autoencoder.cls_attn_blocks[0].attn.q.weight.mul_(10)
        images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            settings = SelectionSettings()
            together = descriptors.local_features(model, images, [FRAME, FRAME], settings)
            for image, expected in zip(images, together, strict=True):
                (single,) = descriptors.local_features(model, image[None], [FRAME], settings)
                assert (-np.diff(single.scores) / single.scores[1:]).min() > 1e-5
                np.testing.assert_array_equal(single.keypoints, expected.keypoints)
                # batched products may sum in another order: 5e-7 was seen
                np.testing.assert_allclose(single.descriptors, expected.descriptors, atol=1e-5)
                np.testing.assert_allclose(single.scores, expected.scores, rtol=5e-6)
            assert descriptors.local_features(model, images[:0], [], settings) == []

    def test_errors(self):
        plain = build_model("xcit_nano_12_p16_224", seed=0)
        with pytest.raises(ValueError, match="03_train_autoencoder"):
            one(plain)
        for options, message in (
            ({"scales": ()}, "scales"),
            ({"scales": (0.0,)}, "scales"),
            ({"ladder": (1.0, 2.0)}, "ladder"),
            ({"interpolation": "nearest"}, "size, published"),
        ):
            with pytest.raises(ValueError, match=message):
                one(Tokens(), **options)


class HostReads(TorchFunctionMode):
    """Counts what makes the processor wait for a GPU: tensors and numbers that are read back."""

    WAITS = {"cpu", "item", "tolist", "__bool__", "__float__", "__int__", "nonzero"}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in self.WAITS
        return function(*args, **(kwargs or {}))


class TestOnAGpu:
    """What keeps a GPU busy, counted on a processor: read back is once a batch and stage."""

    @pytest.mark.parametrize("images", [1, 4])
    def test_a_batch_is_read_back_twice(self, images):
        model = build_model("xcit_nano_12_p16_224", code_dim=8, seed=0).eval()
        batch = [np.full((64, 48, 3), 9 * at, np.uint8) for at in range(images)]
        settings = SelectionSettings(scales=(0.5, 0.7071, 1.0, 1.4142, 2.0))
        with torch.inference_mode(), HostReads() as launching:
            inputs = network_input(batch, "cpu")
            tokens = descriptors.compute_tokens(model, inputs, settings)
        with torch.inference_mode(), HostReads() as selecting:
            features = descriptors.select_features(tokens, [FRAME] * images, settings)
        assert len(features) == images
        # The first is a copy that is not waited for (`_to_host`); nothing else until all is sent.
        assert (launching.count, selecting.count) == (1, 1)

    def test_global_descriptors_wait_for_nothing(self):
        model = build_model("xcit_nano_12_p16_224", seed=0).eval()
        batch = [np.zeros((64, 48, 3), np.uint8)] * 2
        with torch.inference_mode(), HostReads() as launching:
            rows = descriptors.global_descriptors(model, batch, (1.0, 0.7071))
        assert rows.shape == (2, model.embed_dim) and launching.count == 0


def test_one_image_has_the_layout_of_a_batch():
    # torch rounds by layout; NumPy's stride of a new axis is 0, which torch takes for another one
    image = np.zeros((32, 48, 3), np.uint8)
    alone = network_input(image[None], "cpu")
    assert alone.stride() == network_input(np.stack([image]), "cpu").stride()
