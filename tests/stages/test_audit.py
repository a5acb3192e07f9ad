"""Commands on folders. The audit: files, what a second one costs, two folders, GLDv2's landmarks,
bad input. The export of a folder.
"""

import resource
import shutil
import sqlite3
from pathlib import Path

import cv2
import h5py
import numpy as np
import pandas as pd
import pytest

from tests.retrieval.test_copies import picture
from tests.stages.test_own import write
from vitgal import runs, stages, viz
from vitgal.app import command_line
from vitgal.data import gldv2
from vitgal.data.photographs import PhotographError
from vitgal.settings import GlobalSettings, MachineSettings, read_settings
from vitgal.stages import audit as audits, model_choice
from vitgal.stages.own import Describer


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def describer(weight_file, tmp_path_factory) -> Describer:
    return Describer(tmp_path_factory.mktemp("run"), weight_file, GlobalSettings(size=32), None,
                     MachineSettings(threads=1))  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three photographs; of the first a larger copy and a mirrored one, of the second its bytes."""
    top = tmp_path_factory.mktemp("audited") / "photos"
    for number in range(3):
        write(top / f"{number}.png", picture(number))
    write(top / "more/large.png", cv2.resize(picture(0), (640, 480)))
    write(top / "more/mirror.jpg", picture(0)[:, ::-1])
    shutil.copy(top / "1.png", top / "more/=<i>1.png")
    (top / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    return top


def audit(describer, store, *folders, **options):
    return audits.find_copies(*folders, describer=describer, store=store, **options)


def test_within_a_folder(folder, describer, store, tmp_path):
    result = audit(describer, store, folder)
    assert list(map(Path, result.left_out)) == [folder / "cut.jpg"]
    audits.write_audit(result, tmp_path)
    table = pd.read_csv(tmp_path / "copies.csv")
    assert table[["group", "first", "second", "change"]].to_numpy().tolist() == [
        [0, "0.png", "more/large.png", "2.00 times the size"],
        [0, "0.png", "more/mirror.jpg", "mirrored"],
        [0, "more/large.png", "more/mirror.jpg", "mirrored; 0.50 times the size"],
        [1, "1.png", "more/=<i>1.png", "the same file"],
    ]
    # Of the first group the largest stays, of the second the first.
    entries = gldv2.read_exclusions(tmp_path / "leave_out.txt")
    assert entries == ["0.png", "more/=<i>1.png", "more/mirror.jpg"]
    page = viz.write_audit_page(result, tmp_path / "index.html").read_text()
    assert page.count("<img ") == 8 and "=&lt;i&gt;1.png" in page and "<i>" not in page


def test_what_is_described_is_not_described_again(folder, describer, store, tmp_path):
    first = audit(describer, store, folder)
    moved = shutil.copytree(folder, tmp_path / "moved")
    describer.__dict__["network"] = None  # a description would fail
    again = audit(describer, store, moved)
    pd.testing.assert_frame_equal(again.pairs, first.pairs)
    (block,) = [path for path in store.glob("*/*.npz") if path.name == "00000.npz"]
    block.write_bytes(block.read_bytes()[:100])
    del describer.__dict__["network"]
    pd.testing.assert_frame_equal(audit(describer, store, moved).pairs, first.pairs)


def test_descriptors_are_read_in_slices_and_mapped(describer, tmp_path):
    store = audits.GlobalStore(tmp_path, describer)
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (40_000, 33), np.uint8)
    descriptors = rng.standard_normal((40_000, 2)).astype("f2")
    for number, part in enumerate((slice(0, 15_000), slice(15_000, 40_000))):
        arrays = {"keys": keys[part], "descriptors": descriptors[part]}
        runs.write_arrays(store.folder / f"{number:05}.npz", arrays)
    order = rng.permutation(40_000)[:35_000]  # more than a slice, in another order than on disk
    listed, reader = [bytes(keys[i]).hex() for i in order], audits.GlobalStore(tmp_path, describer)
    rows = reader.rows(listed)
    assert isinstance(rows, np.memmap) and not rows.flags.writeable
    np.testing.assert_array_equal(rows, descriptors[order])
    assert {path.name for path in store.folder.iterdir()} == {
        "00000.npz", "00001.npz", "settings.json"
    }  # fmt: skip
    assert store.rows([]).shape == (0, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as a full disk
        with pytest.raises(OSError, match="no space left to write descriptors; make room"):
            reader.rows(listed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_between_two_folders_the_landmarks_of_gldv2(folder, describer, store, tmp_path):
    """Two images of landmark 5 are copies of test images, one of landmark 6 is none."""
    crop = picture(2)[50:190, 60:250]
    train = tmp_path / "train"
    for name, image in (("abc1", picture(0)), ("abd2", crop), ("abe3", picture(8))):
        write(train / gldv2.image_path(name), image)
    for name, part in (("roxford5k", 0), ("rparis6k", 2)):
        write(tmp_path / "test" / name / "jpg" / f"{name}.png", picture(part))
    result = audit(describer, store, train, tmp_path / "test")
    assert result.leave_out() == ["abc1", "abd2"]
    audits.write_audit(result, tmp_path / "out")
    overlap = gldv2.read_overlap(tmp_path / "out/overlap.csv")
    assert overlap.to_numpy().tolist() == [["abc1", "roxford5k"], ["abd2", "rparis6k"]]
    table = pd.DataFrame({"id": ["abc1", "abd2", "abe3"], "landmark_id": [5, 5, 6]})
    (row,) = gldv2.overlap_audit(table, overlap).to_numpy().tolist()
    assert row == [5, 2, 2, "roxford5k rparis6k"]
    # As notebook 01 leaves them out.
    kept = gldv2.exclude_images(table, gldv2.read_exclusions(tmp_path / "out/leave_out.txt"))
    assert kept["id"].tolist() == ["abe3"]
    larger = audit(describer, store, tmp_path / "test", train)
    pairs = result.pairs[["second", "first"]].to_numpy().tolist()
    assert sorted(larger.pairs[["first", "second"]].to_numpy().tolist()) == sorted(pairs)


def test_a_landmark_in_other_photographs_is_found_by_its_probability(tmp_path, monkeypatch):
    """The Eiffel Tower from two sides, with few inliers; two temples that look alike are not one.

    The settings are those of the command with the network that comes along.
    """
    monkeypatch.setattr(model_choice, "baseline_network", lambda: None)
    photographs = runs.resolve("third_party/landmarks")
    for side, names in (
        ("train", ("eiffel_tower/3.jpg", "parthenon/1.jpg")),
        ("test", ("eiffel_tower/1.jpg", "lincoln_memorial/1.jpg")),
    ):
        for name in names:
            target = tmp_path / side / name.replace("/", "_")
            target.parent.mkdir(exist_ok=True)
            shutil.copy(photographs / name, target)
    models = model_choice.own_models(tmp_path / "run")
    settings = models.complete(read_settings({"device": "cpu"}))
    chosen = models.describer(tmp_path / "run", settings)
    folders = tmp_path / "train", tmp_path / "test"
    result = audit(chosen, tmp_path / "store", *folders, settings=settings.reranking)
    assert [result.path(0, row.first).name for row in result.pairs.itertuples()] == [
        "eiffel_tower_3.jpg"
    ]
    (row,) = result.overlap().to_dict("records")
    assert (row["id"], row["test_set"], row["copy"]) == ("eiffel_tower_3", "test", 0)
    assert row["probability"] > 0.6 and row["inliers"] < 12
    audits.write_audit(result, tmp_path / "out")
    assert len(gldv2.read_overlap(tmp_path / "out/overlap.csv")) == 1
    assert result.copies.empty
    # Without a model of presence the inliers decide.
    assert audit(chosen, tmp_path / "store", *folders).pairs.empty


def test_no_copies_and_a_single_image(describer, store, tmp_path):
    write(tmp_path / "one/1.png", picture(4))
    result = audit(describer, store, tmp_path / "one")
    assert result.pairs.empty and result.leave_out() == []
    audits.write_audit(result, tmp_path / "out")
    with pytest.raises(ValueError, match="lists no image"):
        gldv2.read_exclusions(tmp_path / "out/leave_out.txt")
    assert "<img" not in viz.write_audit_page(result, tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("other", "sentence"),
    [("", "both are one folder"), ("more", "one holds the other"), ("..", "one holds the other")],
)
def test_a_folder_with_itself_is_refused(folder, describer, store, other, sentence):
    with pytest.raises(PhotographError, match=sentence):
        audit(describer, store, folder, folder / other)


def test_the_command_line_refuses_in_a_sentence(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VITGAL_RUNS", str(tmp_path))
    for arguments, sentence in (
        ([tmp_path / "none"], "is not a folder"),
        ([folder, "--to", folder / "out"], "name another folder by --to"),
        ([folder, "--table", folder / "train.csv"], "--table needs OTHER"),
        ([folder, folder], "both are one folder"),
        ([folder, "--neighbours", 0], "--neighbours is 0"),
    ):
        assert command_line.main(["audit", *map(str, arguments)]) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1


def test_the_command_line_writes_lists_and_page(folder, weight_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VITGAL_RUNS", str(tmp_path / "runs"))
    assert command_line.main(["audit", str(folder), "--weights", str(weight_file)]) == 0
    printed = capsys.readouterr().out
    assert "4 pairs of copies in 2 groups among 7 images" in printed
    names = {path.name for path in (tmp_path / "runs/audit/photos").iterdir()}
    assert names == {"copies.csv", "leave_out.txt", "index.html"}


def test_a_folder_goes_to_other_programs(tmp_path, weight_file, capsys, monkeypatch):
    """Two crops of one picture, 40 pixels apart: COLMAP's verified matches are by so much apart."""
    monkeypatch.setenv("VITGAL_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("vitgal.app.folder_commands.own_network", with_sift(weight_file))
    wide = picture(5, 240, 360)
    write(tmp_path / "photos/1.png", wide[:, :320])
    write(tmp_path / "photos/sub/2.png", wide[:, 40:])
    write(tmp_path / "photos/other.png", picture(6))
    for target in ("colmap", "hloc", "kapture"):
        assert command_line.main(["export", str(tmp_path / "photos"), "--to", target]) == 0
    top = tmp_path / "runs/export"
    with sqlite3.connect(top / "photos-colmap/database.db") as file:
        points = [
            np.frombuffer(data, np.float32).reshape(-1, 2)
            for (data,) in file.execute("SELECT data FROM keypoints ORDER BY image_id")
        ]
        ((key, data),) = file.execute("SELECT pair_id, data FROM two_view_geometries").fetchall()
    assert key == 2147483647 * 1 + 3  # 1.png, other.png, sub/2.png
    first, second = np.frombuffer(data, np.uint32).reshape(-1, 2).T
    moved = points[0][first] - points[2][second]
    assert len(moved) >= 15 and np.abs(np.median(moved, axis=0) - [40, 0]).max() < 0.5
    assert (top / "photos-colmap/pairs.txt").read_text() == "1.png sub/2.png\n"
    with h5py.File(top / "photos-hloc/matches.h5") as file:
        assert (file["1.png/sub-2.png/matches0"][:] >= 0).sum() == len(first)
    matches = top / "photos-kapture/reconstruction/matches/vitgal/1.png.overlapping/sub"
    assert len(np.fromfile(matches / "2.png.matches")) == 3 * len(first)
    capsys.readouterr()
    write(tmp_path / "photos/1 2.png", wide[:, 20:340])
    assert command_line.main(["export", str(tmp_path / "photos"), "--to", "hloc"]) == 1
    assert "has a blank in it" in capsys.readouterr().err
    assert command_line.main(["export", str(tmp_path / "none"), "--to", "hloc"]) == 1
    assert "is not a folder" in capsys.readouterr().err


def with_sift(weight_file: Path):
    """As the command chooses where EfficientNet-Lite0 is installed, but a small network."""

    def own_network(run: Path, _: str | None):
        models = stages.own_models(run, str(weight_file))
        values = model_choice.BASELINE_VALUES | {"global_size": 32, "global_scales": (1.0,)}
        settings = read_settings({n: list(v) if isinstance(v, tuple) else v
                                  for n, v in values.items()})  # fmt: skip
        return (
            models,
            Describer(run, weight_file, settings.describing, settings.local, settings.machine),
            settings,
        )

    return own_network
