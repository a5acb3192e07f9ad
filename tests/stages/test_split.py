"""The stage that splits a landmark table."""

import json

import numpy as np
import pytest

from tests.data.landmark_tables import ROWS, make_images, write_table
from vitgal import runs
from vitgal.data import gldv2, splits
from vitgal.settings.sections import SplitSettings
from vitgal.stages.split import make_split


@pytest.fixture
def data(tmp_path):
    return {
        "train_table": write_table(tmp_path / "train.csv"),
        "image_folder": make_images(tmp_path / "train"),
    }


def settings(**changed):
    return SplitSettings(**{"val_queries": 0} | changed)


def test_stage_writes_tables_that_read_back(tmp_path, data):
    folder = make_split(tmp_path / "run", settings(val_share=0.999999), **data)
    assert folder == tmp_path / "run" / "split"
    assert (folder / "train.csv").read_text() == (
        "path,label\nb/b/2/bb20.jpg,0\nc/c/3/cc30.jpg,1\na/a/1/aa10.jpg,2\n"
    )
    assert splits.read_split(folder, "val").to_numpy().tolist()[0] == ["b/b/2/bb21.jpg", 0]
    assert splits.read_split(folder, "val_retrieval").empty
    assert "not audited" in splits.overlap_report(folder)
    classes = splits.class_counts(folder)
    assert classes.to_numpy().tolist() == [[0, 3, 1, 1, 0], [1, 7, 1, 0, 0], [2, 12, 1, 3, 0]]
    statistics = splits.split_statistics(folder)
    assert statistics.loc["train", ["images", "classes", "single"]].tolist() == [3, 3, 3]
    assert statistics.loc["val", ["images", "classes", "largest"]].tolist() == [4, 2, 3]
    assert statistics.loc["held_out", "images"] == 0 and np.isnan(
        statistics.loc["held_out", "median"]
    )


def test_held_out_classes_alone_make_the_retrieval_validation(tmp_path):
    rows = [(f"{c}{c}{c}{i}", c) for c in range(6) for i in range(8)]
    folder = make_split(
        tmp_path / "run",
        SplitSettings(
            expected_images=48,
            expected_classes=6,
            held_out_classes=2,
            val_queries=4,
            val_database=100,
            val_share=0.2,
        ),
        train_table=write_table(tmp_path / "train.csv", rows),
        image_folder=make_images(tmp_path / "train", rows),
    )
    drawn = splits.read_split(folder, "val_retrieval")
    assert set(drawn["label"]) == {4, 5}
    assert drawn["role"].value_counts().to_dict() == {"database": 12, "query": 4}
    statistics = splits.split_statistics(folder)
    assert statistics["classes"].astype(int).to_dict() == {
        "train": 4,
        "val": int(splits.read_split(folder, "val")["label"].nunique()),
        "held_out": 2,
        "val_queries": 2,
        "val_database": 2,
    }
    assert splits.class_counts(folder)["held_out"].tolist() == [0, 0, 0, 0, 1, 1]


def test_stage_is_reused_repeats_itself_and_refuses_other_settings(tmp_path, data):
    folder = make_split(tmp_path / "run", settings(val_share=0.5), **data)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    make_split(tmp_path / "run", settings(val_share=0.5), **data)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    other = make_split(tmp_path / "other", settings(val_share=0.5), **data)
    assert (other / "val.csv").read_bytes() == before["val.csv"]
    with pytest.raises(runs.StageError, match=r"val_share: 0\.5 there, 0\.2 now"):
        make_split(tmp_path / "run", settings(val_share=0.2), **data)
    write_table(data["train_table"], ROWS[:-1])
    with pytest.raises(runs.StageError, match="inputs.train_table"):
        make_split(tmp_path / "run", settings(val_share=0.5), **data)
    make_split(tmp_path / "run", settings(val_share=0.5), **data, overwrite=True)


def test_stage_excludes_and_audits(tmp_path, data):
    exclude, overlap = tmp_path / "gone.txt", tmp_path / "overlap.csv"
    exclude.write_text("7\n")
    overlap.write_text("landmark_id,test_set\n12,rparis6k\n7,rparis6k\n")
    folder = make_split(
        tmp_path / "run",
        settings(exclude=str(exclude), overlap_table=str(overlap), val_share=0.0),
        **data,
    )
    assert len(splits.read_split(folder, "train")) == 6
    # What was excluded overlaps no longer.
    assert (folder / "overlap.csv").read_text() == (
        "landmark_id,images,listed,test_sets\n12,4,4,rparis6k\n"
    )
    assert splits.overlap_report(folder).startswith("1 classes with 4 images overlap")
    recorded = json.loads((folder / "stage.json").read_text())
    assert set(recorded["inputs"]) == {"train_table", "exclude", "overlap_table"}
    assert recorded["recorded"]["images"]["train.csv"] == 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"exclude": "none.txt"}, FileNotFoundError, "exclude file .*none.txt"),
        ({"overlap_table": "none.csv"}, FileNotFoundError, "overlap table .*none.csv"),
        ({"expected_images": 1}, ValueError, "7 images of 3 classes.*correct expected_images"),
        ({"expected_classes": 4}, ValueError, "7 images of 3 classes.*expected_classes"),
        ({"val_queries": 1}, ValueError, "no validation class has 4 images"),
        ({"held_out_classes": 3}, ValueError, "held_out_classes is 3"),
    ],
)
def test_settings_are_checked_before_the_stage_begins(tmp_path, data, change, error, message):
    with pytest.raises(error, match=message):
        make_split(tmp_path / "run", settings(**change), **data)
    assert not (tmp_path / "run").exists()


def test_missing_inputs_are_named_before_the_stage_begins(tmp_path, data):
    for name, message in (("train_table", "landmark table"), ("image_folder", "image folder")):
        with pytest.raises(FileNotFoundError, match=rf"no {message} .*nowhere"):
            make_split(tmp_path / "run", settings(), **data | {name: tmp_path / "nowhere"})
    assert not (tmp_path / "run").exists()


def test_missing_images_stop_the_stage_with_names_and_count(tmp_path, data):
    for image in ("aa10", "bb20", "cc30", "aa13"):
        (data["image_folder"] / gldv2.image_path(image)).unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"4 of 7 listed .*a/a/1/aa10\.jpg, a/a/1/aa13\.jpg, b/b/2/bb20\.jpg.*unpack",
    ):
        make_split(tmp_path / "run", settings(), **data)
