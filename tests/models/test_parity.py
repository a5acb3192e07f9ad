"""The network against numbers that the published code computed on regenerable weights.

`parity/weights.py` makes the weights and images again. Global features, class attention, codes,
decoded tokens, tokens and multi-scale local features stand here, the scores in test_evaluation.py.
S24 differs in depth alone: test_weights.py.
"""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from vitgal.models import descriptors as models_descriptors
from vitgal.models.weights import load_model

PARITY = Path(__file__).parents[1] / "parity"
# float32 in both, summed in another order through 14 blocks: differences of about 1e-6 of a
# tensor's size were measured; another CPU's kernels may round differently, hence a margin of 100.
TOLERANCE = 1e-4


def parity_weights():
    spec = importlib.util.spec_from_file_location("parity_weights", PARITY / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def expected():
    with np.load(PARITY / "expected_s12_ae.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A file in the published layout; with a classifier, as the published checkpoints have one."""
    path = tmp_path_factory.mktemp("parity") / "s12_ae.pth"
    yield parity_weights().write_checkpoint("s12_ae", path, num_classes=7)
    path.unlink()


@pytest.fixture(scope="module")
def network(checkpoint):
    return load_model(checkpoint)


def photograph(index):
    if index == 3:
        return cv2.imread(str(PARITY / "image3.png"))[..., ::-1]
    height, width = [(360, 480), (480, 360), (300, 640)][index]
    return parity_weights().image(height, width, index)


def prepared(image, height, width):
    """Resized by OpenCV and normalised as the published code does: (1, 3, height, width)."""
    resized = cv2.resize(np.ascontiguousarray(image), (width, height)).astype(np.float32) / 255
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    return torch.from_numpy(((resized - mean) / std).transpose(2, 0, 1)[None].copy())


def assert_agrees(found, wanted):
    """To TOLERANCE of each value, or of the tensor's typical value where one is near zero."""
    size = np.sqrt(np.mean(wanted.astype(np.float64) ** 2))
    np.testing.assert_allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE * size)


def test_every_tensor_is_in_its_place(network, checkpoint):
    stored = torch.load(checkpoint, weights_only=False)["model"]
    tensors = {key: value.numpy() for key, value in stored.items() if not key.startswith("head.")}
    loaded = network.state_dict()
    assert sum(value.numel() for value in loaded.values()) == sum(v.size for v in tensors.values())
    backbone = "retrieval_back_bone."
    for ours, theirs in [
        ("autoencoder.encoder.weight", "whitening_layer.weight"),
        ("autoencoder.decoder.bias", "ae_decoder_layer.bias"),
        ("autoencoder.cls_token", "cls_token"),
        ("autoencoder.norm.weight", "norm.weight"),
        ("backbone.cls_token", f"{backbone}cls_token"),
        ("backbone.norm.weight", f"{backbone}norm.weight"),
        (
            "backbone.pos_embed.token_projection.weight",
            f"{backbone}pos_embeder.token_projection.weight",
        ),
        ("local_atrous.norm.running_var", f"{backbone}local_atrous.norm.running_var"),
    ]:
        np.testing.assert_array_equal(loaded[ours], np.float32(tensors[theirs]))
    # Rows 0 to 383 are the query's, then the key's, then the value's.
    stacked = np.float32(tensors[f"{backbone}cls_attn_blocks.0.attn.qkv.weight"])
    for row, letter in [(0, "q"), (384, "k"), (768, "v")]:
        found = loaded[f"backbone.cls_attn_blocks.0.attn.{letter}.weight"]
        np.testing.assert_array_equal(found, stacked[row : row + 384])


@pytest.mark.parametrize("index", [0, 3])
def test_global_features(network, expected, index):
    with torch.inference_mode():
        found = network.global_features(prepared(photograph(index), 512, 512))
    assert_agrees(found[0], expected[f"global_{index}"])


@pytest.mark.parametrize("index", [1, 2])  # a portrait and a wide landscape
def test_token_features(network, expected, index):
    _, _, height, width = expected[f"input_shape_{index}"].tolist()
    with torch.inference_mode():
        found = network.token_features(prepared(photograph(index), height, width))
    assert found.grid == (height // 16, width // 16)
    assert_agrees(found.attention[0], expected[f"attn_{index}"])
    assert_agrees(found.codes[0, :64], expected[f"reduced_{index}"])
    assert_agrees(found.decoded[0, :64], expected[f"decoded_{index}"])
    assert_agrees(found.tokens[0, :64], expected[f"tokens_{index}"])


# Descriptors


# Image 2 tells how sides are rounded.
@pytest.mark.slow
@pytest.mark.parametrize("index", [2, 0, 1, 3])
def test_multi_scale_local_features_are_the_published(network, expected, index):
    """Every location and descriptor, in the published order.

    Two neighbours in that order may change places where their scores agree to 1e-4.
    """
    found = models_descriptors.extract_local(network, np.ascontiguousarray(photograph(index)))
    assert found.input_size == tuple(expected[f"input_shape_{index}"][2:])
    locations, wanted = found.keypoints[:, ::-1].astype(int), expected[f"locations_{index}"]
    assert sorted(map(tuple, locations)) == sorted(map(tuple, wanted))
    order = np.arange(len(found))  # the published position of each of ours
    for at in np.flatnonzero((locations != wanted).any(axis=1)):
        order[at] = next(j for j in (at - 1, at + 1) if (locations[at] == wanted[j]).all())
        assert abs(found.scores[at] - found.scores[order[at]]) < 1e-4 * found.scores[at]
    # float32 through 14 blocks in another order of summation: 2e-7 was measured
    descriptors = expected[f"descriptors_{index}"][order]
    np.testing.assert_allclose(found.descriptors, descriptors, atol=2e-5)


def test_global_descriptor_is_the_published(network, expected):
    wanted = expected["global_1"] / np.linalg.norm(expected["global_1"])
    photo = np.ascontiguousarray(photograph(1))
    row = models_descriptors.extract_global(network, [photo])[0]
    np.testing.assert_allclose(row, wanted, atol=1e-5)  # 1e-6 of the largest was measured
