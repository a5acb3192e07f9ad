"""A network as it is run: input, batches, precision and threads."""

import numpy as np
import pytest
import torch

from vitgal.models import inference


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


def test_network_input_of_images_and_of_arrays():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    listed = inference.network_input([image, image[:, ::-1]], "cpu")
    assert torch.equal(listed, inference.network_input(np.stack([image, image[:, ::-1]]), "cpu"))
    assert inference.network_input(np.zeros((0, 2, 4, 3), np.uint8), "cpu").shape == (0, 3, 2, 4)


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


def test_a_processor_without_bf16_computes_in_fp32(monkeypatch):
    monkeypatch.setattr(inference, "BF16_FLAGS", set())
    assert inference.resolve_precision("auto") == "fp32"


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with inference.limited_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
