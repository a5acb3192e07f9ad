"""Prepared networks beside the plain ones, which run wherever a machine lacks something."""

import hashlib
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.mini_benchmark import NANO, noise
from tests.timm_models import build_backbone
from vitgal.data.images import resize
from vitgal.features.selection import Frame
from vitgal.models import inference
from vitgal.models.descriptors import describe, extract_global, extract_local, local_features
from vitgal.models.network import build_model
from vitgal.models.prepared import PackedLinear, is_prepared, keep_memory, prepare
from vitgal.settings import SelectionSettings

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="networks run plain here"
)
BF16 = pytest.mark.skipif(
    inference.resolve_precision("auto") != "bf16", reason="no bf16 on this processor"
)


IMAGE = noise(80, 112, seed=0)


@pytest.fixture(scope="module")
def model():
    """A network whose every tensor matters: at first many are zeros, ones or equal."""
    network = build_model(NANO, code_dim=8, seed=0)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if tensor.is_floating_point() and tensor.ndim == 1:
                noise = torch.rand(tensor.shape, generator=draws)
                tensor.add_(noise - 0.5 if "bias" in name or "mean" in name else noise)
    return network


def pixels(*shape: int) -> torch.Tensor:
    values = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    return inference.network_input(values, "cpu")


def outputs(network, images, precision="fp32") -> list[torch.Tensor]:
    with inference.inference(network, precision):
        found = network.token_codes(images)
        features = network.token_features(images)
        return [
            found.codes,
            found.attention,
            features.backbone_attention,
            network.global_features(images),
        ]


def errors(network, model, images, precision="fp32") -> list[float]:
    """Greatest differences, each in relation to the greatest value."""
    pairs = zip(outputs(network, images, precision), outputs(model, images), strict=True)
    return [((mine - plain).abs().max() / plain.abs().max()).item() for mine, plain in pairs]


# One patch, one row, a side that is no multiple of 16, a batch; more tokens than channels (128).
@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 16, 80), (2, 70, 96), (2, 176, 192)], ids=str)
def test_the_same_numbers(model, shape):
    # Float32 rounding through a whole network; a wrong fold gives errors of order one.
    assert max(errors(prepare(model), model, pixels(*shape))) < 2e-5


@BF16
def test_bf16_is_as_near_to_float32_as_autocast(model):
    images = pixels(2, 64, 96)
    mine = errors(prepare(model, "bf16"), model, images, "bf16")
    plain = errors(model, model, images, "bf16")
    assert all(a < 2 * b + 1e-3 for a, b in zip(mine, plain, strict=True))


def test_no_images(model):
    empty = outputs(prepare(model), pixels(1, 32, 48)[:0])
    assert [tuple(part.shape) for part in empty] == [(0, 6, 8), (0, 4, 6), (0, 4, 6), (0, 128)]


def test_every_location_is_the_same(model):
    images, selection = pixels(1, 96, 128), SelectionSettings()
    frame: Frame = ((0, 0, 128, 96), (96, 128))
    found = []
    for network in (model, prepare(model)):
        with inference.inference(network):
            found.append(local_features(network, images, [frame], selection)[0])
    plain, mine = found
    assert len(plain) > 20
    assert np.array_equal(plain.keypoints, mine.keypoints)
    assert np.array_equal(plain.scales, mine.scales)


def test_batches_do_not_change_an_image(model):
    images, network = pixels(4, 64, 96), prepare(model)
    with inference.inference(network):
        together = network.global_features(images)
        alone = torch.cat([network.global_features(image[None]) for image in images])
    # To the rounding of float32 sums, as with PyTorch's own layers.
    np.testing.assert_allclose(together, alone, rtol=0, atol=2e-5 * alone.abs().max().item())


def test_the_same_bytes_again(model):
    images = pixels(1, 64, 64)
    first, second = (outputs(prepare(model), images) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_plain_network_stays(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = prepare(model)
    assert network is not model and is_prepared(network) and not is_prepared(model)
    assert prepare(network) is network
    assert not any(isinstance(part, PackedLinear) for part in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_network_of_timm():
    plain = build_backbone("test_vit")
    network, images = prepare(plain), pixels(1, 64, 64)
    assert any(isinstance(part, PackedLinear) for part in network.modules())
    with inference.inference(plain):
        expected, found = plain(images).tokens, network(images).tokens
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_layer_without_bias():
    layer = torch.nn.Linear(8, 3, bias=False)
    packed = PackedLinear(layer, torch.float32)
    with torch.inference_mode():
        assert packed(torch.ones(0, 8)).shape == (0, 3)
        np.testing.assert_allclose(packed(torch.ones(8)), layer.weight.sum(1), atol=1e-6)


def rounded(inputs, *_):
    return torch.zeros_like(inputs)


class TestFallback:
    """Each lack gives the plain network and a warning that names it."""

    @pytest.mark.parametrize(
        "there",
        [
            SimpleNamespace(),
            SimpleNamespace(_reorder_linear_weight=lambda weight: weight),
            SimpleNamespace(_reorder_linear_weight=rounded, _linear_pointwise=rounded),
        ],
        ids=["missing", "another signature", "other sums"],
    )
    def test_operations(self, model, monkeypatch, there):
        monkeypatch.setattr(torch.ops, "mkldnn", there)
        with pytest.warns(UserWarning, match="unprepared and slower: this PyTorch"):
            assert prepare(model) is model

    def test_processor(self, model, monkeypatch):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        with pytest.warns(UserWarning, match="no AVX-512"):
            assert prepare(model) is model

    def test_said_once_and_the_plain_network_computes(self, model, monkeypatch):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("default")
            rows = [extract_global(model, [IMAGE], size=64) for _ in range(2)]
            extract_local(model, IMAGE, size=64)
        assert [str(warning.message) for warning in seen] == [
            "networks run unprepared and slower: the processor has no AVX-512"
        ]
        with inference.inference(model):
            plain = describe(model, resize(IMAGE, 64, "squash")[None])
        assert all((row == plain).all() for row in rows)

    def test_bf16(self, model, monkeypatch):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        with pytest.warns(UserWarning, match="no bf16"):
            assert prepare(model, "bf16") is model
        assert is_prepared(prepare(model, "fp32"))

    def test_another_device(self):
        with torch.device("meta"):
            network = torch.nn.Linear(2, 2)
        assert prepare(network) is network


ON_ONE_CORE = """
import os, sys, warnings
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from tests.models.test_prepared import described
warnings.simplefilter("error")
print(torch.get_num_threads(), *described())
"""


def described():
    """Digests of a photograph's descriptor and features by a prepared network."""
    model = build_model(NANO, code_dim=8, seed=0)
    features = extract_local(model, IMAGE, size=96)
    arrays = extract_global(model, [IMAGE], size=64), features.keypoints, features.descriptors
    return [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays]


@pytest.mark.slow
def test_one_core_gives_the_bytes_of_one_thread():
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", ON_ONE_CORE]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    with inference.limited_threads(1):
        assert run.stdout.split() == ["1", *described()]


def test_more_threads_than_cores():
    with inference.limited_threads(1):
        expected = extract_global(build_model(NANO, seed=0), [IMAGE], size=64)
    with inference.limited_threads(3 * os.cpu_count()):
        rows = extract_global(build_model(NANO, seed=0), [IMAGE], size=64)
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not keep_memory(), reason="no glibc")
@pytest.mark.slow
def test_freed_memory_is_kept():
    """Blocks of 64 MiB come from memory that was touched before, once some have been freed.

    A small block behind a freed one keeps it from being taken again: the first few may be new.
    """
    code = (
        "import resource, torch; from vitgal.models.prepared import keep_memory; keep_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(40): before = faults(); torch.ones(1 << 24)\n"
        "print(faults() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1000  # 16,384 pages of 4 KiB where memory is mapped anew
