"""The local stage: its store, what it mends, and what it refuses."""

import errno
from pathlib import Path

import numpy as np
import pytest

from tests.mini_benchmark import LOCAL, MACHINE, NANO, contents, extract, interrupt
from tests.stages.killing import kill
from vitgal import runs
from vitgal.data import images as data_images, revisited
from vitgal.features import store
from vitgal.features.local import LocalFeatures
from vitgal.features.store import FeatureStore
from vitgal.models import descriptors
from vitgal.models.descriptors import extract_local
from vitgal.models.network import build_model
from vitgal.models.weights import save_model
from vitgal.retrieval import shortlists
from vitgal.settings import LocalSettings
from vitgal.stages import extract as stages_extract
from vitgal.stages.images import ImageTask, shard_tasks
from vitgal.stages.local_describer import LocalDescriber


def test_store(global_run, benchmark, weight_file, model, capsys):
    folder = extract(global_run, benchmark, weight_file)
    assert folder == global_run / "mini" / "local"
    listed = shortlists.read_shortlist(global_run / "mini" / "global" / "shortlist.txt")
    names = {name for candidates in listed.values() for name in candidates}
    opened = FeatureStore.open(folder, verify=True)
    assert opened.names == sorted(names | {"query0", "query1"})
    photo = data_images.read_image(benchmark / "jpg/query1.jpg")
    expected = extract_local(
        model, photo, (8.5, 4, 150, 76), size=64, max_keypoints=9, scales=(0.7071, 1.0)
    )
    features = opened["query1"]
    assert isinstance(features, LocalFeatures)
    assert features.box == (8, 4, 150, 76)
    np.testing.assert_array_equal(features.keypoints, expected.keypoints)
    # half precision, and a batch of another size
    np.testing.assert_allclose(features.descriptors, expected.descriptors, atol=1e-3)
    whole = opened[sorted(names)[0]]
    assert whole.box == (0, 0, *whole.image_size[::-1])
    announced = capsys.readouterr().out
    start = f"local features of {len(opened)} images, 2 scales, float16: at most 0 MB (9 features"
    assert start in announced
    extract(global_run, benchmark, weight_file)
    assert capsys.readouterr().out == announced


def test_twice_the_same_bytes(global_run, benchmark, weight_file, finished):
    again = extract(global_run, benchmark, weight_file, read_threads=3)
    assert contents(again) == contents(finished / "run" / "mini" / "local")


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        # 128 numbers a descriptor; position, score and scale are 16 bytes; 150 an image.
        ("float16", "at most 274 GB"),
        ("int8", "at most 145 GB"),
        ("bit", "at most 32 GB"),
    ],
)
def test_the_size_of_a_million_images_is_announced(capsys, dtype, size):
    stages_extract._announce(128, 1_004_993, LocalSettings(dtype=dtype))
    text = capsys.readouterr().out
    assert text.startswith(f"local features of 1,004,993 images, 5 scales, {dtype}: {size} (1,000")


def test_images_of_a_short_list(benchmark):
    dataset = revisited.open_dataset("mini", benchmark)
    listed = benchmark / "shortlist.txt"
    listed.write_text("query0\timage0\nquery0\timage2\nquery1\timage0\n")
    tasks = stages_extract.shortlist_tasks(dataset, listed, crop=True)
    assert [(task.key, task.path.name, task.is_query) for task in tasks] == [
        (name, f"{name}.jpg", name.startswith("query"))
        for name in ("image0", "image2", "query0", "query1")
    ]
    listed.write_text("query1\tnowhere\n")
    with pytest.raises(runs.StageError, match="nowhere"):
        stages_extract.shortlist_tasks(dataset, listed, crop=True)


def test_shards_are_a_partition_of_the_sorted_keys(tmp_path):
    images = [ImageTask(f"{i:02d}", Path("x")) for i in range(11)]
    shards = shard_tasks(tmp_path, images[::-1], 4, store.ShardFormat())
    assert [shard.folder.name for shard in shards] == [f"shard-{i:02d}" for i in range(3)]
    assert [key for shard in shards for key in shard.keys] == [image.key for image in images]
    assert [len(shard.images) for shard in shards] == [4, 4, 3]


def test_no_images_at_all(model, tmp_path):
    describer = LocalDescriber(model, LOCAL, MACHINE, "fp32")
    shard_format = store.ShardFormat(code_dim=8, settings={"precision": "fp32"})
    shards = shard_tasks(tmp_path, [], 4, shard_format)
    stages_extract.write_shards(describer, shards, runs.ALONE, 0)
    opened = FeatureStore.open(tmp_path, verify=True)
    assert (len(opened), opened.code_dim) == (0, 8)


# Resume


def test_only_missing_and_damaged_shards_are_made(local_run, benchmark, weight_file):
    folder = local_run / "mini" / "local"
    wanted = contents(folder)
    shards = sorted(path for path in folder.glob("shard-*"))
    assert len(shards) >= 2
    interrupt(folder)  # and one shard damaged, one half-written
    damaged = shards[1] / "descriptors.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    (folder / ".partial-shard-07").mkdir()
    before = (shards[0] / "descriptors.npy").stat().st_ino
    assert contents(extract(local_run, benchmark, weight_file)) == wanted
    assert (shards[0] / "descriptors.npy").stat().st_ino == before
    assert not (folder / ".partial-shard-07").exists()


def test_a_torn_shard_is_made_again(local_run, benchmark, weight_file, monkeypatch, capsys):
    """A finished stage with one file cut short: its images are described again, and no other."""
    folder = local_run / "mini" / "local"
    wanted = contents(folder)
    torn = folder / "shard-00" / "descriptors.npy"
    torn.write_bytes(torn.read_bytes()[:-1])
    described, real = [], descriptors.select_features

    def counted(tokens, frames, settings):
        described.append(len(frames))
        return real(tokens, frames, settings)

    monkeypatch.setattr(descriptors, "select_features", counted)
    assert contents(extract(local_run, benchmark, weight_file)) == wanted
    assert sum(described) == 3
    assert "shard-00 is damaged: it is made again" in capsys.readouterr().out
    (folder / "shard-01" / "items.json").unlink()
    assert contents(extract(local_run, benchmark, weight_file)) == wanted
    assert sum(described) == 6
    assert "shard-01 is damaged: it is made again" in capsys.readouterr().out


def kill_points(seed: int) -> list[tuple[str, int]]:
    """One seeded point of each kind, within the calls that two shards of three images make."""
    rng = np.random.default_rng(seed)
    last = {"load": 6, "network": 2, "write": 12, "replace": 17}
    return [(call, int(rng.integers(1, most + 1))) for call, most in last.items()]


@pytest.mark.slow
@pytest.mark.parametrize(("call", "number"), kill_points(0) + [("replace", 9), ("replace", 17)])
def test_killed_anywhere_it_resumes_to_the_same_store(
    global_run, benchmark, weight_file, finished, monkeypatch, call, number
):
    kill(extract, (global_run, benchmark, weight_file), call, number, monkeypatch)
    assert not (global_run / "mini/local/stage.json").exists()
    wanted = contents(finished / "run" / "mini" / "local")
    assert contents(extract(global_run, benchmark, weight_file)) == wanted


# Bad input


def test_failed_images_are_left_out(global_run, benchmark, weight_file):
    listed = shortlists.read_shortlist(global_run / "mini" / "global" / "shortlist.txt")
    bad = listed["query0"][0]
    path = benchmark / f"jpg/{bad}.jpg"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(runs.StageError, match=f"{bad}: the file is cut short"):
        extract(global_run, benchmark, weight_file)
    opened = FeatureStore.open(extract(global_run, benchmark, weight_file, max_failed_share=0.5))
    assert bad not in opened
    assert opened.failures == {bad: "the file is cut short"}


def test_a_disk_that_fails_for_a_while_costs_no_image(
    global_run, benchmark, weight_file, monkeypatch
):
    listed = shortlists.read_shortlist(global_run / "mini" / "global" / "shortlist.txt")
    name, read = listed["query1"][0], Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == f"{name}.jpg":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        message = f"{name}.jpg.*Input/output.*same command again"
        with pytest.raises(data_images.ReadError, match=message):
            extract(global_run, benchmark, weight_file, max_failed_share=1)
    opened = FeatureStore.open(extract(global_run, benchmark, weight_file, max_failed_share=1))
    assert not opened.failures and name in opened


def test_the_global_stage_must_be_there(run, benchmark, weight_file):
    with pytest.raises(runs.StageError, match="04_global_evaluation"):
        extract(run, benchmark, weight_file)


def test_a_model_without_autoencoder(global_run, benchmark, tmp_path):
    plain = save_model(build_model(NANO, seed=0), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="03_train_autoencoder"):
        extract(global_run, benchmark, plain)
    assert not (global_run / "mini/local/stage.json").exists()


def test_a_store_of_another_model_or_other_settings(local_run, benchmark, weight_file, tmp_path):
    other = save_model(build_model(NANO, code_dim=8, seed=1), tmp_path / "other.safetensors")
    with pytest.raises(runs.StageError, match="inputs.weights: .* there, .* now"):
        extract(local_run, benchmark, other)
    with pytest.raises(runs.StageError, match='parameters.dtype: "float16" there, "int8" now'):
        extract(local_run, benchmark, weight_file, dtype="int8")
    with pytest.raises(runs.StageError, match="max_keypoints: 9 there, 8 now"):
        extract(local_run, benchmark, weight_file, max_keypoints=8)
    assert len(FeatureStore.open(local_run / "mini" / "local", verify=True)) == 6  # untouched


def test_a_model_whose_codes_are_nan(global_run, benchmark, tmp_path):
    broken = build_model(NANO, code_dim=8, seed=0)
    broken.autoencoder.encoder.bias.data[:] = float("nan")
    path = save_model(broken, tmp_path / "codes.safetensors")
    with pytest.raises(ValueError, match="not finite: use precision fp32, or other weights"):
        extract(global_run, benchmark, path)
    assert not list((global_run / "mini/local").glob("shard-*"))
