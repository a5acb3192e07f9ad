"""Extraction: parity with the published code, images in memory, both stages and their resume."""

import contextlib
import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm

from tests.models import test_parity
from vitgal import runs
from vitgal.data import images as data_images
from vitgal.data import revisited
from vitgal.features import store
from vitgal.features.local import LocalFeatures
from vitgal.features.store.feature_store import FeatureStore
from vitgal.features.store.rows import RowFile
from vitgal.models import descriptors as models_descriptors
from vitgal.models import inference
from vitgal.models.network import build_model
from vitgal.models.weights import load_model, save_model
from vitgal.retrieval import ranking, shortlists
from vitgal.settings import GlobalSettings, LocalSettings, MachineSettings
from vitgal.stages import describe, local_describer, rankings, ray_describer
from vitgal.stages import extract as stages_extract
from vitgal.stages import images as stages_images
from vitgal.stages.local_describer import LocalDescriber
from vitgal.stages.shards import shard_tasks

HIDDEN = tqdm(disable=True)
TOP = Path(__file__).resolve().parents[2]
NANO = "xcit_nano_12_p16_224"


@pytest.fixture(scope="module")
def model():
    return build_model(NANO, code_dim=8, seed=0)


def noise(height: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


SHAPES = [(96, 128), (128, 96), (96, 128), (80, 160), (128, 128)]


# Parity


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "s12_ae.pth"
    return load_model(test_parity.parity_weights().write_checkpoint("s12_ae", path))


@pytest.fixture(scope="module")
def recorded():
    with np.load(test_parity.PARITY / "expected_s12_ae.npz") as file:
        return dict(file)


# Image 2 tells how sides are rounded.
@pytest.mark.slow
@pytest.mark.parametrize("index", [2, 0, 1, 3])
def test_multi_scale_local_features_are_the_published(published, recorded, index):
    """Every location and descriptor, in the published order.

    Two neighbours in that order may change places where their scores agree to 1e-4.
    """
    found = models_descriptors.extract_local(
        published, np.ascontiguousarray(test_parity.photograph(index))
    )
    assert found.input_size == tuple(recorded[f"input_shape_{index}"][2:])
    locations, wanted = found.keypoints[:, ::-1].astype(int), recorded[f"locations_{index}"]
    assert sorted(map(tuple, locations)) == sorted(map(tuple, wanted))
    order = np.arange(len(found))  # the published position of each of ours
    for at in np.flatnonzero((locations != wanted).any(axis=1)):
        order[at] = next(j for j in (at - 1, at + 1) if (locations[at] == wanted[j]).all())
        assert abs(found.scores[at] - found.scores[order[at]]) < 1e-4 * found.scores[at]
    # float32 through 14 blocks in another order of summation: 2e-7 was measured
    descriptors = recorded[f"descriptors_{index}"][order]
    np.testing.assert_allclose(found.descriptors, descriptors, atol=2e-5)


def test_global_descriptor_is_the_published(published, recorded):
    wanted = recorded["global_1"] / np.linalg.norm(recorded["global_1"])
    photo = np.ascontiguousarray(test_parity.photograph(1))
    row = models_descriptors.extract_global(published, [photo])[0]
    np.testing.assert_allclose(row, wanted, atol=1e-5)  # 1e-6 of the largest was measured


# Images in memory


class TestGlobal:
    def test_network_input_is_normalise(self):
        image = noise(40, 56, 0)
        batch = inference.network_input(np.stack([image, image[::-1]]), "cpu")
        np.testing.assert_array_equal(batch[0], data_images.normalise(image))
        assert batch.shape == (2, 3, 40, 56)

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
                inputs = torch.from_numpy(
                    data_images.normalise(data_images.resize(photo, 64, resize))
                )
                alone = F.normalize(model.global_features(inputs[None]))[0]
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
        inputs = torch.from_numpy(data_images.normalise(photo))[None]
        smaller = F.interpolate(inputs, scale_factor=0.7071, mode="bilinear", align_corners=False)
        assert smaller.shape == (1, 3, 67, 67)
        with torch.inference_mode():
            parts = [F.normalize(model.global_features(each))[0] for each in (inputs, smaller)]
        mean = (parts[0] + parts[1]).numpy() / 2
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)
        only = models_descriptors.extract_global(model, [photo], size=96)[0]
        assert np.abs(row - only).max() > 1e-4

    def test_every_scale_counts_the_same(self):
        """(3, 0) at full size and (0, 1) at half: the mean of their directions lies between."""

        class Lengths(torch.nn.Linear):
            embed_dim = 2

            def global_features(self, images):
                row = [3.0, 0.0] if images.shape[2] == 32 else [0.0, 1.0]
                return torch.tensor([row] * len(images))

        found = models_descriptors.extract_global(
            Lengths(1, 1), [noise(32, 32, 0)], size=32, scales=(1.0, 0.5)
        )
        np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5]], rtol=1e-6)

    def test_none_and_one(self, model):
        assert models_descriptors.extract_global(model, []).shape == (0, 128)
        row = models_descriptors.extract_global(model, [noise(20, 30, 0)], size=32)
        np.testing.assert_allclose(np.linalg.norm(row, axis=1), 1, rtol=1e-6)

    def test_training_mode_is_put_back(self, model):
        other = build_model(NANO, seed=0)
        expected = models_descriptors.extract_global(other, [noise(40, 40, 0)], size=32)
        other.train()
        found = models_descriptors.extract_global(other, [noise(40, 40, 0)], size=32)
        np.testing.assert_array_equal(found, expected)
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


def rounded_linear(inputs, weight, bias, *_):
    return torch.nn.functional.linear(inputs.bfloat16().float(), weight.bfloat16().float(), bias)


class TestLinearLayers:
    """oneDNN's linear layers in float32, and PyTorch's own wherever they do not work."""

    def test_the_same_sums(self, model):
        image = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
        with torch.inference_mode():
            plain = model.eval().global_features(inference.network_input(image, "cpu"))
        with inference.inference(model):
            found = model.global_features(inference.network_input(image, "cpu"))
        # Another order of float32 sums through a whole network: a few last bits.
        np.testing.assert_allclose(found, plain, rtol=0, atol=2e-5 * plain.abs().max().item())

    def test_none_one_and_no_bias(self):
        layer = torch.nn.Linear(8, 3, bias=False)
        with torch.inference_mode(), inference._OneDNN():
            assert layer(torch.ones(0, 8)).shape == (0, 3)
            found = layer(torch.ones(8))
        np.testing.assert_allclose(found, layer.weight.detach().sum(1), atol=1e-6)

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
            found = model.global_features(inference.network_input(image, "cpu"))
        np.testing.assert_array_equal(found, plain)

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


class TestLocal:
    def test_one_image(self, model):
        found = models_descriptors.extract_local(
            model, noise(96, 128, 0), size=64, max_keypoints=20
        )
        assert found.box == (0, 0, 128, 96)
        assert found.image_size == (96, 128)
        assert found.input_size == (48, 64)  # 55.4 and 73.9 down to multiples of 16
        assert 0 < len(found) <= 20
        assert (np.diff(found.scores) <= 0).all()
        np.testing.assert_allclose(np.linalg.norm(found.descriptors, axis=1), 1, rtol=1e-6)
        assert (found.keypoints >= 0).all() and (found.keypoints < (64, 48)).all()

    def test_a_box_is_the_crop(self, model):
        photo = noise(96, 128, 0)
        found = models_descriptors.extract_local(model, photo, (16.7, 8, 112, 72), size=64)
        alone = models_descriptors.extract_local(model, photo[8:72, 16:112], size=64)
        np.testing.assert_array_equal(found.keypoints, alone.keypoints)
        np.testing.assert_array_equal(found.descriptors, alone.descriptors)
        assert found.box == (16, 8, 112, 72)
        assert found.image_size == (96, 128)
        difference = found.original_keypoints() - alone.original_keypoints()
        np.testing.assert_allclose(difference, np.tile([16, 8], (len(found), 1)), atol=1e-4)

    def test_no_autoencoder(self):
        with pytest.raises(ValueError, match="03_train_autoencoder"):
            models_descriptors.extract_local(build_model(NANO, seed=0), noise(32, 32, 0), size=32)


class TestStream:
    def test_batches(self):
        """Sizes a, b: a full batch leaves at once, the rest at the end in order of appearance."""
        a, b = np.zeros((1, 2, 3)), np.zeros((2, 1, 3))
        stream = enumerate([a, b, a, a, b, b, a])
        found = [labels for labels, _ in inference.batches(stream, 2)]
        assert found == [[0, 2], [1, 4], [3, 6], [5]]
        assert list(inference.batches([], 2)) == []

    @pytest.mark.parametrize("workers", [0, 1, 3])
    def test_prefetch_keeps_order_and_errors(self, workers):
        def work(job):
            if job.key == "5":
                raise data_images.ImageError(job.path, "cut")
            return job.key * 2

        jobs = [stages_images.ImageTask(str(i), Path("x")) for i in range(40)]
        found = list(stages_images.prefetch(work, jobs, threads=workers))
        assert [job for job, _ in found] == jobs
        assert isinstance(found[5][1], data_images.ImageError)
        assert [result for job, result in found if job.key != "5"] == [
            job.key * 2 for job in jobs if job.key != "5"
        ]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_prefetch_stays_a_little_ahead(self, workers):
        """Jobs are taken as they are needed, not all at once: a million would not fit."""
        taken = []

        def jobs():
            for i in range(1000):
                taken.append(i)
                yield stages_images.ImageTask(str(i), Path("x"))

        stream = stages_images.prefetch(lambda job: job.key, jobs(), threads=workers)
        next(stream)
        assert len(taken) <= stages_images.AHEAD * workers + 1
        stream.close()

    def test_the_bar_counts_every_image(self, model, benchmark, capsys):
        describer = LocalDescriber(model, GlobalSettings(size=32), MACHINE, "fp32")
        tasks = [stages_images.ImageTask(f"{i}", benchmark / f"jpg/image{i}.jpg") for i in range(6)]
        with tqdm(total=6) as bar:
            ((rows, failures),) = describer.describe_blocks([tasks], bar)
        assert rows.any(axis=1).all() and failures == []
        assert "6/6" in capsys.readouterr().err

    def test_other_errors_stop(self):
        def work(job):
            raise FileNotFoundError("gone")

        with pytest.raises(FileNotFoundError, match="gone"):
            list(stages_images.prefetch(work, [stages_images.ImageTask("a", Path("x"))], threads=2))

    def test_precision(self):
        assert inference.resolve_precision("fp32") == "fp32"
        assert inference.resolve_precision("auto") in ("fp32", "bf16")
        with pytest.raises(ValueError, match="fp32, bf16, auto"):
            inference.resolve_precision("half")

    def test_threads_are_put_back(self):
        before = torch.get_num_threads()
        with inference.limited_threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == before


# Stages


@pytest.fixture
def benchmark(tmp_path) -> Path:
    """Six database images and two queries, in the real layout; query 1 is a crop of image 3."""
    folder = tmp_path / "benchmark"
    (folder / "jpg").mkdir(parents=True)
    database = [f"image{i}" for i in range(6)]
    for i, name in enumerate(database):
        photo = noise(*SHAPES[i % len(SHAPES)], seed=i)
        assert cv2.imwrite(str(folder / f"jpg/{name}.jpg"), photo)
    for i, name in enumerate(("query0", "query1")):
        photo = cv2.imread(str(folder / f"jpg/image{3 * i}.jpg"))
        assert cv2.imwrite(str(folder / f"jpg/{name}.jpg"), photo)
    truth = revisited.GroundTruth(
        name="mini",
        database=database,
        queries=["query0", "query1"],
        boxes=np.array([[0, 0, 128, 96], [8.5, 4, 150, 76]]),
        easy=[np.array([0]), np.array([3])],
        hard=[np.array([2]), np.array([], np.int64)],
        junk=[np.array([5]), np.array([1])],
    )
    revisited.write_ground_truth(folder / "gnd_mini.pkl", truth)
    return folder


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory, model) -> Path:
    return save_model(model, tmp_path_factory.mktemp("weights") / "model.safetensors")


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "runs" / "one"


MACHINE = MachineSettings(batch_size=2, local_batch_size=2, threads=1, read_threads=1)
GLOBAL = GlobalSettings(size=64, top=2, max_failed_share=0)
LOCAL = LocalSettings(
    size=64, shard_size=3, max_failed_share=0, max_keypoints=9, scales=(0.7071, 1.0)
)


def split_options(settings, options: dict):
    """Settings and machine settings with these values; what is left are the stage's own options."""

    def pop(section):
        names = [field.name for field in dataclasses.fields(section) if field.name in options]
        return dataclasses.replace(section, **{name: options.pop(name) for name in names})

    return pop(settings), pop(MACHINE), options


def evaluate(run, benchmark, weight_file, distractors=None, **changed) -> Path:
    dataset = revisited.open_dataset("mini", benchmark, distractors=distractors)
    settings, machine, options = split_options(GLOBAL, changed)
    options = {"progress": False, "model": weight_file} | options
    return describe.evaluate_global(run, dataset, settings, machine, **options)


def extract(run, benchmark, weight_file, **changed) -> Path:
    dataset = revisited.open_dataset("mini", benchmark)
    settings, machine, options = split_options(LOCAL, changed)
    options = {"progress": False, "model": weight_file} | options
    return stages_extract.extract_shortlist(run, dataset, settings, machine, **options)


def interrupt(folder: Path) -> None:
    """Leaves a stage as a kill before its end does: settings, but no manifest."""
    manifest = runs.read_json(folder / runs.MANIFEST)
    settings = {key: manifest[key] for key in ("format", "stage", "parameters", "inputs")}
    runs.write_json(folder / runs.STARTED, settings)
    (folder / runs.MANIFEST).unlink()


def contents(folder: Path) -> dict[str, bytes]:
    """Every result file of a stage; the manifest holds times."""
    skipped = (runs.MANIFEST, runs.LOCK)
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(skipped))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_all(benchmark, names) -> list[np.ndarray]:
    return [data_images.read_image(benchmark / f"jpg/{name}.jpg") for name in names]


class TestEvaluateGlobal:
    def test_files(self, run, benchmark, weight_file, model):
        folder = evaluate(run, benchmark, weight_file)
        assert folder == run / "mini" / "global"
        assert set(contents(folder)) == set(rankings.GLOBAL_OUTPUTS)
        names = json.loads((folder / "names.json").read_text())
        photographs = read_all(benchmark, names["database"])
        database = np.load(folder / "database.npy")
        expected = models_descriptors.extract_global(model, photographs, size=64)
        np.testing.assert_allclose(database, expected, atol=1e-5)  # batches of another size
        queries = np.load(folder / "queries.npy")
        boxes = [(0, 0, 128, 96), (8, 4, 150, 76)]
        expected = models_descriptors.extract_global(
            model, read_all(benchmark, names["queries"]), boxes=boxes, size=64
        )
        np.testing.assert_allclose(queries, expected, atol=1e-5)
        similarities = queries.astype(np.float64) @ database.T.astype(np.float64)
        ranks = np.load(folder / "ranks.npy")
        np.testing.assert_array_equal(ranks, np.argsort(-similarities, axis=1, kind="stable").T)
        assert ranks.dtype == np.int32
        positions = ranking.Positions.load(folder / "positions.npz")
        for q, (indices, places) in enumerate(zip(positions.indices, positions.ranks, strict=True)):
            np.testing.assert_array_equal(ranks[places, q], indices)
        assert [index.tolist() for index in positions.indices] == [[0, 2, 5], [1, 3]]
        listed = shortlists.read_shortlist(folder / "shortlist.txt")
        assert set(listed) == {"query0", "query1"}
        assert json.loads((folder / "failures.json").read_text()) == []
        assert ranks[0, 0] == 0  # query 0 is image 0 compressed once more

    def test_scores_hold_nothing_of_time_and_place(self, run, benchmark, weight_file, tmp_path):
        text = (evaluate(run, benchmark, weight_file) / "scores.json").read_text()
        scores = json.loads(text)
        assert set(scores["medium"]) >= {"map", "mp_at", "ap"}
        assert scores["protocol"]["crop_queries"] is True
        assert scores["failed_images"] == 0
        assert str(tmp_path) not in text
        for word in ("seconds", "commit", "host", "device"):
            assert f'"{word}"' not in text

    def test_twice_the_same_bytes(self, run, benchmark, weight_file, tmp_path):
        first = contents(evaluate(run, benchmark, weight_file))
        again = contents(evaluate(tmp_path / "other", benchmark, weight_file, read_threads=3))
        assert first == again

    def test_finished_is_reused_and_other_settings_refused(self, run, benchmark, weight_file):
        folder = evaluate(run, benchmark, weight_file)
        before = (folder / "stage.json").stat().st_mtime_ns
        evaluate(run, benchmark, weight_file, read_threads=0, batch_size=5, threads=2)
        assert (folder / "stage.json").stat().st_mtime_ns == before
        with pytest.raises(runs.StageError, match="parameters.size: 64 there, 48 now"):
            evaluate(run, benchmark, weight_file, size=48)
        with pytest.raises(runs.StageError, match="inputs.weights"):
            evaluate(run, benchmark, f"untrained:{NANO}")
        evaluate(run, benchmark, weight_file, size=48, overwrite=True)
        assert (folder / "stage.json").stat().st_mtime_ns != before

    def test_another_model_beside_it(self, run, benchmark, weight_file, tmp_path):
        ours = evaluate(run, benchmark, weight_file)
        other = save_model(build_model(NANO, seed=1), tmp_path / "other.safetensors")
        folder = evaluate(run, benchmark, other, folder="other")
        assert folder == run / "mini" / "other"
        rows, other_rows = (np.load(path / "database.npy") for path in (ours, folder))
        assert np.abs(rows - other_rows).max() > 1e-3

    def test_uncropped_queries(self, run, benchmark, weight_file, model):
        folder = evaluate(run, benchmark, weight_file, crop_queries=False)
        expected = models_descriptors.extract_global(
            model, read_all(benchmark, ["query0", "query1"]), size=64
        )
        np.testing.assert_allclose(np.load(folder / "queries.npy"), expected, atol=1e-5)
        assert json.loads((folder / "scores.json").read_text())["protocol"]["crop_queries"] is False

    def test_distractors_follow_the_database(self, run, benchmark, weight_file, tmp_path):
        more = tmp_path / "more"
        (more / "jpg" / "0").mkdir(parents=True)
        for name in ("b.jpg", "a.jpg"):
            assert cv2.imwrite(str(more / "jpg/0" / name), noise(64, 64, len(name)))
        (more / "revisitop1m.txt").write_text("0/b.jpg\n0/a.jpg\n")
        folder = evaluate(run, benchmark, weight_file, distractors=more)
        names = json.loads((folder / "names.json").read_text())["database"]
        assert names[6:] == ["0/b.jpg", "0/a.jpg"]
        assert np.load(folder / "ranks.npy").shape == (8, 2)
        scores = json.loads((folder / "scores.json").read_text())
        assert scores["protocol"]["distractors"] == 2

    def test_continues_where_it_stopped(self, run, benchmark, weight_file, tmp_path, monkeypatch):
        """Stopped after the second block of two images, it keeps both and ends the same."""
        monkeypatch.setattr(describe, "BLOCK", 2)
        (benchmark / "jpg/image3.jpg").write_bytes(b"")
        wanted = evaluate(tmp_path / "whole", benchmark, weight_file, max_failed_share=1)
        with pytest.raises(runs.StageError, match="what is done so far is kept"):
            evaluate(run, benchmark, weight_file)
        path = run / "mini/global/database.npy"
        assert not path.exists()
        settings = {"precision": "fp32"}
        assert RowFile.open(path, (6, 128), settings=settings).rows == 4
        assert contents(evaluate(run, benchmark, weight_file, max_failed_share=1)) == contents(
            wanted
        )

    def test_whole_rows_are_not_made_again(self, run, benchmark, weight_file):
        """Rows that no image gives are put where a killed run's would be, and found at the end."""
        wanted = np.load(evaluate(run, benchmark, weight_file) / "database.npy")
        folder = run / "mini/global"
        interrupt(folder)
        rows = RowFile.open(folder / "database.npy", (6, 128), settings={"precision": "fp32"})
        assert rows.rows == 0
        marks = np.eye(2, 128, dtype=np.float32)
        rows.append(marks)
        database = np.load(evaluate(run, benchmark, weight_file) / "database.npy")
        np.testing.assert_array_equal(database[:2], marks)
        np.testing.assert_allclose(database[2:], wanted[2:], atol=1e-5)  # in other batches
        interrupt(folder)
        rows = RowFile.open(folder / "database.npy", (6, 128), settings={"precision": "bf16"})
        rows.append(marks)
        # The processor's other precision: neither mixed with ours nor thrown away unasked.
        with pytest.raises(runs.StageError, match='precision: "bf16" there, "fp32" now'):
            evaluate(run, benchmark, weight_file)
        database = np.load(evaluate(run, benchmark, weight_file, overwrite=True) / "database.npy")
        np.testing.assert_array_equal(database, wanted)

    def test_a_failed_image_is_recorded_and_ranks_last(self, run, benchmark, weight_file, capsys):
        path = benchmark / "jpg/image1.jpg"
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(runs.StageError, match=r"1 of 6 images.*image1: the file is cut short"):
            evaluate(run, benchmark, weight_file)
        # A greater share is no other setting: the same stage goes on.
        folder = evaluate(run, benchmark, weight_file, max_failed_share=0.2)
        failures = json.loads((folder / "failures.json").read_text())
        assert failures == [{"name": "image1", "reason": "the file is cut short"}]
        assert not np.load(folder / "database.npy")[1].any()
        assert np.load(folder / "ranks.npy")[-1].tolist() == [1, 1]
        assert json.loads((folder / "scores.json").read_text())["failed_images"] == 1
        evaluate(run, benchmark, weight_file, max_failed_share=0.2)
        assert capsys.readouterr().out.count("1 of 6 images could not be read") == 2  # reused too

    def test_a_failed_query_stops(self, run, benchmark, weight_file):
        (benchmark / "jpg/query1.jpg").write_bytes(b"")
        with pytest.raises(runs.StageError, match="query1 cannot be read: the file is empty"):
            evaluate(run, benchmark, weight_file, max_failed_share=1)
        assert not (run / "mini/global/stage.json").exists()

    def test_a_box_outside_its_query(self, run, benchmark, weight_file):
        assert cv2.imwrite(str(benchmark / "jpg/query1.jpg"), noise(60, 60, 0))
        with pytest.raises(ValueError, match=r"query1\.jpg: box .* of a 60 x 60 image"):
            evaluate(run, benchmark, weight_file)

    def test_missing_weights(self, run, benchmark, tmp_path):
        with pytest.raises(FileNotFoundError, match="there are no weights.*02_train"):
            evaluate(run, benchmark, tmp_path / "none.safetensors")
        with pytest.raises(FileNotFoundError, match="no weights.*`vitgal download vitgal_s24` br"):
            evaluate(run, benchmark, tmp_path / "weights" / "vitgal_s24.pth")
        with pytest.raises(ValueError, match="unknown architecture"):
            evaluate(run, benchmark, "untrained:resnet")


class TestExtractShortlist:
    def test_store(self, run, benchmark, weight_file, model, capsys):
        chosen = evaluate(run, benchmark, weight_file)
        folder = extract(run, benchmark, weight_file)
        assert folder == run / "mini" / "local"
        listed = shortlists.read_shortlist(chosen / "shortlist.txt")
        names = {name for found in listed.values() for name in found}
        opened = FeatureStore.open(folder, verify=True)
        assert opened.names == sorted(names | {"query0", "query1"})
        photo = read_all(benchmark, ["query1"])[0]
        expected = models_descriptors.extract_local(
            model, photo, (8.5, 4, 150, 76), size=64, max_keypoints=9, scales=(0.7071, 1.0)
        )
        found = opened["query1"]
        assert isinstance(found, LocalFeatures)
        assert found.box == (8, 4, 150, 76)
        np.testing.assert_array_equal(found.keypoints, expected.keypoints)
        # half precision, and a batch of another size
        np.testing.assert_allclose(found.descriptors, expected.descriptors, atol=1e-3)
        whole = opened[sorted(names)[0]]
        assert whole.box == (0, 0, *whole.image_size[::-1])
        announced = capsys.readouterr().out
        said = (
            f"local features of {len(opened)} images, 2 scales, float16: at most 0 MB (9 features"
        )
        assert said in announced
        extract(run, benchmark, weight_file)
        assert capsys.readouterr().out == announced

    def test_twice_the_same_bytes(self, run, benchmark, weight_file, tmp_path):
        evaluate(run, benchmark, weight_file)
        first = contents(extract(run, benchmark, weight_file))
        evaluate(tmp_path / "other", benchmark, weight_file)
        again = contents(extract(tmp_path / "other", benchmark, weight_file, read_threads=3))
        assert first == again

    def test_only_missing_and_damaged_shards_are_made(self, run, benchmark, weight_file):
        evaluate(run, benchmark, weight_file)
        folder = extract(run, benchmark, weight_file)
        wanted = contents(folder)
        shards = sorted(path for path in folder.glob("shard-*"))
        assert len(shards) >= 2
        interrupt(folder)  # and one shard damaged, one half-written
        damaged = shards[1] / "descriptors.npy"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
        (folder / ".partial-shard-07").mkdir()
        before = (shards[0] / "descriptors.npy").stat().st_ino
        assert contents(extract(run, benchmark, weight_file)) == wanted
        assert (shards[0] / "descriptors.npy").stat().st_ino == before
        assert not (folder / ".partial-shard-07").exists()

    def test_failed_images_are_left_out(self, run, benchmark, weight_file):
        chosen = evaluate(run, benchmark, weight_file)
        listed = shortlists.read_shortlist(chosen / "shortlist.txt")
        bad = listed["query0"][0]
        path = benchmark / f"jpg/{bad}.jpg"
        path.write_bytes(path.read_bytes()[:400])
        with pytest.raises(runs.StageError, match=f"{bad}: the file is cut short"):
            extract(run, benchmark, weight_file)
        opened = FeatureStore.open(extract(run, benchmark, weight_file, max_failed_share=0.5))
        assert bad not in opened
        assert opened.failures == {bad: "the file is cut short"}

    def test_the_global_stage_must_be_there(self, run, benchmark, weight_file):
        with pytest.raises(runs.StageError, match="04_global_evaluation"):
            extract(run, benchmark, weight_file)

    def test_a_model_without_autoencoder(self, run, benchmark, tmp_path):
        plain = save_model(build_model(NANO, seed=0), tmp_path / "plain.safetensors")
        evaluate(run, benchmark, plain)
        with pytest.raises(ValueError, match="03_train_autoencoder"):
            extract(run, benchmark, plain)
        assert not (run / "mini/local/stage.json").exists()

    def test_other_settings_are_refused(self, run, benchmark, weight_file):
        evaluate(run, benchmark, weight_file)
        extract(run, benchmark, weight_file)
        with pytest.raises(runs.StageError, match="max_keypoints: 9 there, 8 now"):
            extract(run, benchmark, weight_file, max_keypoints=8)


# Killed, torn, shared


def killed(run, benchmark, weight_file, call: str, number: int, monkeypatch) -> None:
    """Extracts in a child that kills itself at the `number`-th of these calls.

    The child is forked by a server that has imported torch and computed nothing, so that it starts
    at once and no thread is lost.
    """
    monkeypatch.setenv("PYTHONPATH", str(TOP))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.stages.test_extraction"])
    child = context.Process(target=_kill_at, args=(run, benchmark, weight_file, call, number))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL, "the kill point was not reached"


def _kill_at(run, benchmark, weight_file, call: str, number: int) -> None:
    owner, name = {
        "load": (local_describer, "load_image"),
        "network": (local_describer, "local_features"),
        "describe": (local_describer, "describe"),
        "write": (np, "save"),
        "replace": (os, "replace"),
    }[call]
    real, calls = getattr(owner, name), itertools.count(1)

    def dying(*arguments, **options):
        if next(calls) == number:
            if call == "write":  # half of the file is there
                arguments[0].write(b"\x93NUMPY half")
                arguments[0].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(owner, name, dying)
    stage = evaluate if call == "describe" else extract
    stage(run, benchmark, weight_file)


def kill_points(seed: int) -> list[tuple[str, int]]:
    """One seeded point of each kind, within the calls that two shards of three images make."""
    rng = np.random.default_rng(seed)
    last = {"load": 6, "network": 2, "write": 12, "replace": 17}
    return [(call, int(rng.integers(1, most + 1))) for call, most in last.items()]


@pytest.mark.slow
@pytest.mark.parametrize(("call", "number"), kill_points(0) + [("replace", 9), ("replace", 17)])
def test_killed_anywhere_it_resumes_to_the_same_store(
    run, benchmark, weight_file, tmp_path, monkeypatch, call, number
):
    evaluate(run, benchmark, weight_file)
    shutil.copytree(run, tmp_path / "whole")
    wanted = contents(extract(tmp_path / "whole", benchmark, weight_file))
    killed(run, benchmark, weight_file, call, number, monkeypatch)
    assert not (run / "mini/local/stage.json").exists()
    assert contents(extract(run, benchmark, weight_file)) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3])
def test_killed_while_describing(run, benchmark, weight_file, tmp_path, monkeypatch, number):
    wanted = contents(evaluate(tmp_path / "whole", benchmark, weight_file))
    killed(run, benchmark, weight_file, "describe", number, monkeypatch)
    assert contents(evaluate(run, benchmark, weight_file)) == wanted


def test_a_torn_shard_is_mended(run, benchmark, weight_file, monkeypatch, capsys):
    """A finished stage with one file cut short: whole images are kept, the other made again."""
    evaluate(run, benchmark, weight_file)
    folder = extract(run, benchmark, weight_file)
    wanted = contents(folder)
    torn = folder / "shard-00" / "descriptors.npy"
    torn.write_bytes(torn.read_bytes()[:-1])  # the last of three images
    described, real = [], local_describer.local_features
    monkeypatch.setattr(
        local_describer,
        "local_features",
        lambda model, images, frames, selection: (
            described.append(len(frames)) or real(model, images, frames, selection)
        ),
    )
    capsys.readouterr()
    assert contents(extract(run, benchmark, weight_file)) == wanted
    assert sum(described) <= 2  # the batch that the torn image belongs to, and no other
    assert "2 of 3 images are kept" in capsys.readouterr().out
    (folder / "shard-01" / "items.json").unlink()
    assert contents(extract(run, benchmark, weight_file)) == wanted
    assert "0 of 3 images are kept" in capsys.readouterr().out


def _work(run, benchmark, weight_file, worker: int, meeting, done) -> None:
    """One of two workers: notes every image that it reads, and waits for the other to begin."""
    real = local_describer.load_image

    def noted(job, **options):
        done.put((worker, job.key))
        return real(job, **options)

    local_describer.load_image = noted
    open_local = ray_describer.open_local

    def together(*arguments):
        meeting.wait(60)  # both are in the stage before either extracts
        return open_local(*arguments)

    ray_describer.open_local = together
    try:
        extract(run, benchmark, weight_file, worker=worker, worker_count=2, read_threads=0)
    except runs.StageError as error:
        assert "are for other workers" in str(error)


@pytest.mark.slow
def test_two_processes_share_the_work(run, benchmark, weight_file, tmp_path, monkeypatch):
    evaluate(run, benchmark, weight_file)
    shutil.copytree(run, tmp_path / "alone")
    wanted = contents(extract(tmp_path / "alone", benchmark, weight_file))
    monkeypatch.setenv("PYTHONPATH", str(TOP))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.stages.test_extraction"])
    meeting, done = context.Barrier(2), context.Queue()
    options = (run, benchmark, weight_file)
    workers = [context.Process(target=_work, args=(*options, i, meeting, done)) for i in (0, 1)]
    for worker in workers:
        worker.start()
    seen = [done.get(timeout=60) for _ in range(6)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert done.empty()
    assert len({key for _, key in seen}) == 6  # no image twice
    assert {worker for worker, _ in seen} == {0, 1}
    assert (run / "mini/local/stage.json").exists()
    assert contents(run / "mini/local") == wanted


def test_workers_one_after_the_other(run, benchmark, weight_file):
    evaluate(run, benchmark, weight_file)
    with pytest.raises(runs.StageError, match="worker 1 has written its shards.*1 of 2 .shard-00"):
        extract(run, benchmark, weight_file, worker=1, worker_count=2)
    folder = extract(run, benchmark, weight_file, worker=0, worker_count=2)
    assert len(FeatureStore.open(folder, verify=True)) == 6
    with pytest.raises(ValueError, match="worker is 2: 2 workers"):
        extract(run, benchmark, weight_file, worker=2, worker_count=2)
    with pytest.raises(ValueError, match="overwrite"):
        extract(run, benchmark, weight_file, worker=0, worker_count=2, overwrite=True)


def test_the_last_worker_finds_what_others_left_damaged(run, benchmark, weight_file):
    """Also where the stage was finished before: its index is not written over the damage."""
    evaluate(run, benchmark, weight_file)
    both = dict(worker_count=2)
    with pytest.raises(runs.StageError, match="for other workers"):
        extract(run, benchmark, weight_file, worker=1, **both)
    folder = run / "mini" / "local"
    scores = folder / "shard-01" / "scores.npy"
    good = scores.read_bytes()
    scores.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(runs.StageError, match=r"1 \(shard-01, ...\) are damaged: run"):
        extract(run, benchmark, weight_file, worker=0, **both)
    assert not (folder / runs.MANIFEST).exists()
    extract(run, benchmark, weight_file)
    assert scores.read_bytes() == good
    offsets = folder / "shard-01" / "offsets.npy"
    offsets.write_bytes(offsets.read_bytes()[:-1] + b"x")
    with pytest.raises(runs.StageError, match="are damaged: run this again with worker_count=1"):
        extract(run, benchmark, weight_file, worker=0, **both)
    extract(run, benchmark, weight_file)
    assert len(FeatureStore.open(folder, verify=True)) == 6


@pytest.mark.slow
def test_auto_is_not_mixed(run, benchmark, weight_file, monkeypatch):
    """Machines that resolve precision auto in two ways: nothing is mixed, nothing is lost."""

    def resolves_to(precision: str) -> None:
        monkeypatch.setattr(local_describer, "resolve_precision", lambda *_: precision)

    auto = dict(precision="auto")
    resolves_to("bf16")
    with stopped_after(monkeypatch, 4), pytest.raises(KeyboardInterrupt):
        evaluate(run, benchmark, weight_file, **auto)
    resolves_to("fp32")
    with pytest.raises(runs.StageError, match='precision: "bf16" there, "fp32" now.*auto depends'):
        evaluate(run, benchmark, weight_file, **auto)
    evaluate(run, benchmark, weight_file, overwrite=True, **auto)
    with pytest.raises(runs.StageError, match="for other workers"):
        extract(run, benchmark, weight_file, worker=0, worker_count=2, **auto)
    resolves_to("bf16")
    with pytest.raises(runs.StageError, match="shard-00 was made in fp32, and here .* bf16"):
        extract(run, benchmark, weight_file, worker=1, worker_count=2, **auto)
    with pytest.raises(runs.StageError, match="shard-00 was made in fp32, and here .* bf16"):
        extract(run, benchmark, weight_file, **auto)
    resolves_to("fp32")
    shutil.rmtree(run / "mini" / "local" / "shard-01")
    folder = extract(run, benchmark, weight_file, **auto)
    assert len(FeatureStore.open(folder, verify=True)) == 6


@contextlib.contextmanager
def stopped_after(monkeypatch, images: int):
    """Blocks of so many database images, after the first of which the user interrupts."""
    append = RowFile.append

    def once(file, *block):
        append(file, *block)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(describe, "BLOCK", images)
        patch.setattr(RowFile, "append", once)
        yield


def test_a_disk_that_fails_for_a_while_costs_no_image(run, benchmark, weight_file, monkeypatch):
    evaluate(run, benchmark, weight_file)
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "image3.jpg":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(
            data_images.ReadError, match="image3.jpg.*Input/output.*same command again"
        ):
            extract(run, benchmark, weight_file, max_failed_share=1)
    folder = extract(run, benchmark, weight_file, max_failed_share=1)
    opened = FeatureStore.open(folder)
    assert not opened.failures and "image3" in opened


def test_shards_are_a_partition_of_the_sorted_keys(tmp_path):
    images = [stages_images.ImageTask(f"{i:02d}", Path("x")) for i in range(11)]
    shards = shard_tasks(tmp_path, images[::-1], 4, store.ShardFormat())
    assert [shard.folder.name for shard in shards] == [f"shard-{i:02d}" for i in range(3)]
    assert [key for shard in shards for key in shard.keys] == [image.key for image in images]
    assert [len(shard.images) for shard in shards] == [4, 4, 3]
    (empty,) = shard_tasks(tmp_path, [], 4, store.ShardFormat())
    assert (empty.folder, empty.keys) == (tmp_path / "shard-00", [])


# Bad input


def test_a_store_of_another_model_or_other_options(run, benchmark, weight_file, tmp_path):
    evaluate(run, benchmark, weight_file)
    folder = extract(run, benchmark, weight_file)
    other = save_model(build_model(NANO, code_dim=8, seed=1), tmp_path / "other.safetensors")
    with pytest.raises(runs.StageError, match="inputs.weights: .* there, .* now"):
        extract(run, benchmark, other)
    with pytest.raises(runs.StageError, match='parameters.dtype: "float16" there, "int8" now'):
        extract(run, benchmark, weight_file, dtype="int8")
    assert len(FeatureStore.open(folder, verify=True)) == 6  # nothing was touched


def test_a_model_that_gives_nan(run, benchmark, weight_file, tmp_path):
    """Neither stage keeps anything that is not a number, and both say what to change."""
    evaluate(run, benchmark, weight_file)
    broken = build_model(NANO, code_dim=8, seed=0)
    with torch.no_grad():
        broken.autoencoder.encoder.bias[:] = float("nan")
    path = save_model(broken, tmp_path / "codes.safetensors")
    with pytest.raises(ValueError, match="not finite: use precision fp32, or other weights"):
        extract(run, benchmark, path)
    assert not list((run / "mini/local").glob("shard-*"))
    with torch.no_grad():
        broken.backbone.cls_token[:] = float("nan")
    path = save_model(broken, tmp_path / "token.safetensors")
    with pytest.raises(ValueError, match="not finite: use precision fp32, or other weights"):
        evaluate(tmp_path / "other", benchmark, path)
    assert not (tmp_path / "other/mini/global/database.npy").exists()


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        # 128 numbers a descriptor; position, score and scale are 16 bytes; 150 an image.
        ("float16", "at most 274 GB"),
        ("int8", "at most 145 GB"),
        ("bit", "at most 32 GB"),
    ],
)
def test_the_size_of_a_million_images_is_announced(capsys, dtype, said):
    stages_extract._announce(128, 1_004_993, LocalSettings(dtype=dtype))
    shown = capsys.readouterr().out
    assert shown.startswith(f"local features of 1,004,993 images, 5 scales, {dtype}: {said} (1,000")


def test_no_images_at_all(model, tmp_path):
    describer = LocalDescriber(model, LOCAL, MACHINE, "fp32")
    shard_format = store.ShardFormat(code_dim=8, settings={"precision": "fp32"})
    shards = shard_tasks(tmp_path, [], 4, shard_format)
    stages_extract.write_shards(describer, shards, runs.ALONE, 0, progress=False)
    opened = FeatureStore.open(tmp_path, verify=True)
    assert len(opened) == 0
    assert opened.code_dim == 8


class Cramped(torch.nn.Module):
    """A model that runs out of memory above two images, as a GPU does."""

    def __init__(self, model, most: int):
        super().__init__()
        self.model, self.most = model, most
        self.embed_dim, self.code_dim = model.embed_dim, model.code_dim

    def global_features(self, images):
        return self._fits(images) or self.model.global_features(images)

    def token_codes(self, images):
        return self._fits(images) or self.model.token_codes(images)

    def _fits(self, images) -> None:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_halves_the_batch(model, benchmark, capsys):
    """Seven images in one batch go through as 7, 3, 1, 1, …: said twice, for 7 and for 3."""
    task = stages_images.ImageTask("a", benchmark / "jpg/image0.jpg")
    machine = MachineSettings(batch_size=7, local_batch_size=4, read_threads=0)
    found = []
    for network in (Cramped(model, 2), model):
        describer = LocalDescriber(network, GlobalSettings(size=64), machine, "fp32")
        ((rows, _),) = describer.describe_blocks([[task] * 14], HIDDEN)
        found.append(rows)
    np.testing.assert_allclose(*found, atol=1e-5)  # sums of batches of another size
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "out of memory with 7 images at once: going on with 3",
        "out of memory with 3 images at once: going on with 1",
    ]
    describer = LocalDescriber(Cramped(model, 2), LOCAL, machine, "fp32")
    with describer.stream([task] * 4, HIDDEN) as images:
        items, _ = describer.local_items(images, list("abcd"), {})
    assert [key for key, _ in items] == list("abcd")
    assert all(len(features) > 0 for _, features in items)


def test_one_image_that_does_not_fit(model, benchmark):
    describer = LocalDescriber(Cramped(model, 0), GlobalSettings(size=64), MACHINE, "fp32")
    tasks = [stages_images.ImageTask("a", benchmark / "jpg/image0.jpg")]
    with pytest.raises(RuntimeError, match="one image alone does not fit"):
        list(describer.describe_blocks([tasks], HIDDEN))


def test_images_of_a_short_list(benchmark):
    data = revisited.open_dataset("mini", benchmark)
    listed = benchmark / "shortlist.txt"
    listed.write_text("query0\timage0\nquery0\timage2\nquery1\timage0\n")
    tasks = stages_extract.shortlist_tasks(data, listed, crop=True)
    assert [(task.key, task.path.name, task.is_query) for task in tasks] == [
        (name, f"{name}.jpg", name.startswith("query"))
        for name in ("image0", "image2", "query0", "query1")
    ]
    listed.write_text("query1\tnowhere\n")
    with pytest.raises(runs.StageError, match="nowhere"):
        stages_extract.shortlist_tasks(data, listed, crop=True)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["evaluate", "extract"])
def test_a_full_disk(run, benchmark, weight_file, stage):
    """Files above a limit cannot be written: the stage stops with the system's error, the next run
    finishes. Extraction meets the limit at its second shard, so that the first is kept."""
    if stage == "extract":
        evaluate(run, benchmark, weight_file)
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *map(str, (TOP, stage, run)), str(benchmark)]
        + [str(weight_file)],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 1
    assert "File too large" in child.stderr
    folder = run / "mini" / ("global" if stage == "evaluate" else "local")
    assert not (folder / "database.npy").exists()
    assert [path.name for path in folder.glob("shard-*")] == ["shard-00"] * (stage == "extract")
    assert not (folder / "stage.json").exists()
    if stage == "evaluate":
        database = np.load(evaluate(run, benchmark, weight_file) / "database.npy")
        assert database.any(axis=1).all()
    else:
        opened = FeatureStore.open(extract(run, benchmark, weight_file), verify=True)
        assert len(opened) == 6


FULL_DISK = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
from tests.stages import test_extraction
from vitgal.features import store
real = store.write_shard

def limited(folder, *arguments, **options):
    if folder.name == "shard-01":
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    return real(folder, *arguments, **options)

store.write_shard = limited
if sys.argv[2] == "evaluate":
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
getattr(test_extraction, sys.argv[2])(*map(Path, sys.argv[3:]))
"""
