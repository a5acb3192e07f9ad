"""A network as it is run: input, linear layers, batches, precision and threads."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.mini_benchmark import NANO
from vitgal.models import inference
from vitgal.models.network import build_model


@pytest.fixture(scope="module")
def model():
    return build_model(NANO, code_dim=8, seed=0)


def test_network_input_by_hand():
    image = np.zeros((2, 3, 3), np.uint8)
    image[1, 2] = (255, 128, 0)
    batch = inference.network_input(np.stack([image, image[::-1]]), "cpu")
    assert batch.shape == (2, 3, 2, 3) and batch.dtype == torch.float32
    expected = [(1 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, -0.406 / 0.225]
    # float32 rounding of three operations
    np.testing.assert_allclose(batch[0, :, 1, 2], expected, rtol=1e-6)
    np.testing.assert_allclose(batch[1, :, 0, 2], expected, rtol=1e-6)
    np.testing.assert_allclose(batch[:, 0, 0, 0], -0.485 / 0.229, rtol=1e-6)


def rounded_linear(inputs, weight, bias, *_):
    return torch.nn.functional.linear(inputs.bfloat16().float(), weight.bfloat16().float(), bias)


class TestLinearLayers:
    """oneDNN's linear layers in float32, and PyTorch's own wherever they do not work."""

    def test_the_same_sums(self, model):
        image = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
        with torch.inference_mode():
            plain = model.eval().global_features(inference.network_input(image, "cpu"))
        with inference.inference(model):
            result = model.global_features(inference.network_input(image, "cpu"))
        # Another order of float32 sums through a whole network: a few last bits.
        np.testing.assert_allclose(result, plain, rtol=0, atol=2e-5 * plain.abs().max().item())

    def test_none_one_and_no_bias(self):
        layer = torch.nn.Linear(8, 3, bias=False)
        with torch.inference_mode(), inference._OneDNN():
            assert layer(torch.ones(0, 8)).shape == (0, 3)
            result = layer(torch.ones(8))
        np.testing.assert_allclose(result, layer.weight.detach().sum(1), atol=1e-6)

    @pytest.mark.parametrize(
        "there",
        [
            SimpleNamespace(),  # the operation is gone
            SimpleNamespace(_linear_pointwise=lambda inputs, weight: inputs @ weight.T),
            SimpleNamespace(_linear_pointwise=rounded_linear),  # float32 in name only
        ],
        ids=["missing", "another signature", "rounded"],
    )
    def test_fallback(self, model, monkeypatch, there):
        image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
        with torch.inference_mode():
            plain = model.eval().global_features(inference.network_input(image, "cpu"))
        monkeypatch.setattr(torch.ops, "mkldnn", there)
        with inference.inference(model):
            result = model.global_features(inference.network_input(image, "cpu"))
        np.testing.assert_array_equal(result, plain)

    def test_batches_do_not_change_an_image(self, model):
        images = np.random.default_rng(0).integers(0, 256, (4, 64, 96, 3), np.uint8)
        with inference.inference(model):
            together = model.global_features(inference.network_input(images, "cpu"))
            alone = [
                model.global_features(inference.network_input(image[None], "cpu"))[0]
                for image in images
            ]
        # To the rounding of float32 sums, as with PyTorch's own layers.
        np.testing.assert_allclose(together, torch.stack(alone), rtol=0, atol=1e-5)


def test_batches():
    """Sizes a, b: a full batch leaves at once, the rest at the end in order of appearance."""
    a, b = np.zeros((1, 2, 3)), np.zeros((2, 1, 3))
    stream = enumerate([a, b, a, a, b, b, a])
    result = [labels for labels, _ in inference.batches(stream, 2)]
    assert result == [[0, 2], [1, 4], [3, 6], [5]]
    assert list(inference.batches([], 2)) == []


def test_precision():
    assert inference.resolve_precision("fp32") == "fp32"
    assert inference.resolve_precision("auto") in ("fp32", "bf16")
    with pytest.raises(ValueError, match="fp32, bf16, auto"):
        inference.resolve_precision("half")


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with inference.limited_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
