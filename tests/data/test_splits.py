"""The split, retrieval validation, published lists, what notebook 01 shows."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from tests.data.landmark_tables import ROWS, frame, make_images
from vitgal.data import gldv2, splits


def large(classes=60, images=30):
    rows = [(f"{c:04x}{i:04x}", 5 * c) for i in range(images) for c in range(classes)]
    return frame(rows)


def split(table, **options):
    divided = splits.split_landmarks(table, **options)
    return divided.train, divided.val


# The split


def test_labels_follow_landmark_ids_and_first_images_train():
    train, val = split(frame(), val_share=0.999999)
    # Ordered by landmark_id: 3 -> 0, 7 -> 1, 12 -> 2; the first row of each class trains and, at a
    # share of nearly one, every other one validates.
    assert train.to_numpy().tolist() == [["b/b/2/bb20.jpg", 0], ["c/c/3/cc30.jpg", 1]] + [
        ["a/a/1/aa10.jpg", 2]
    ]
    assert val.to_numpy().tolist() == [["b/b/2/bb21.jpg", 0]] + [
        [f"a/a/1/aa{i}.jpg", 2] for i in (11, 12, 13)
    ]
    assert train["label"].dtype == val["label"].dtype == np.int64


def test_a_share_of_zero_trains_on_everything():
    train, val = split(frame(), val_share=0)
    assert len(train) == 7 and val.empty and list(val.columns) == ["path", "label"]


def test_split_equals_the_published_loop_with_the_same_draws():
    table = large().sample(frac=1, random_state=3, ignore_index=True)
    train, val = split(table, val_share=0.3, seed=5)
    draws = np.random.default_rng([5, 0]).random(len(table))
    parts, label, current = {True: [], False: []}, -1, None
    for row in sorted(range(len(table)), key=lambda row: table["landmark_id"][row]):
        first = table["landmark_id"][row] != current
        if first:
            current, label = table["landmark_id"][row], label + 1
        parts[first or draws[row] >= 0.3].append(
            [gldv2.image_path(table["id"][row]), label],
        )
    assert train.to_numpy().tolist() == parts[True]
    assert val.to_numpy().tolist() == parts[False]


def test_split_is_seeded():
    first, again, other = (
        split(large(), val_share=0.2, seed=seed)[1]["path"].tolist() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_share_of_validation_images_is_as_published():
    _, val = split(large(60, 30), val_share=0.2)
    # 60 x 29 images are drawn: mean 348, standard deviation 16.7; five of these either way.
    assert abs(len(val) - 348) < 84


def test_held_out_classes_validate_wholly_with_labels_after_the_trained():
    table = large(10, 6)
    train, val = split(table, val_share=0.2, held_out_classes=3, seed=4)
    assert sorted(train["label"].unique()) == list(range(7))
    out = val[val["label"] >= 7]
    assert out["label"].value_counts().to_dict() == {7: 6, 8: 6, 9: 6}
    marks = splits.order_classes(table["landmark_id"], held_out_classes=3, seed=4)
    assert marks[:7].tolist() == sorted(marks[:7]) and marks[7:].tolist() == sorted(marks[7:])
    assert sorted(marks) == [5 * c for c in range(10)]
    for part in (train, val):  # an id begins with its class's number in hexadecimal digits
        named = [5 * int(path.split("/")[-1][:4], 16) for path in part["path"]]
        assert named == marks[part["label"]].tolist()


def test_classes_of_one_image_are_never_held_out():
    for seed in range(20):
        marks = splits.order_classes([3, 3, 7, 12, 12], held_out_classes=2, seed=seed)
        assert marks.tolist() == [7, 3, 12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_share": 1.0}, "val_share must be"),
        ({"val_share": -0.1}, "val_share must be"),
        ({"held_out_classes": 3}, "of 3 classes 2 have two images"),
        ({"held_out_classes": -1}, "held_out_classes is -1"),
    ],
)
def test_impossible_splits_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        splits.split_landmarks(frame(), **{"val_share": 0.2} | options)


def test_not_all_classes_can_be_held_out():
    with pytest.raises(ValueError, match="at least one class must be left"):
        split(frame([("aa1", 1), ("aa2", 1)]), val_share=0.2, held_out_classes=1)


# Retrieval validation


def validation(sizes):
    rows = [(f"{c}/{i}.jpg", c) for c, size in enumerate(sizes) for i in range(size)]
    return pd.DataFrame(rows, columns=["path", "label"])


def test_every_query_has_a_positive_and_no_image_is_both():
    val = validation([9, 3, 4, 30, 1, 5])
    drawn = splits.retrieval_validation(val, queries=9, database=6, min_images=4, seed=1)
    queries, database = (drawn[drawn["role"] == role] for role in ("query", "database"))
    assert len(queries) == 9 and len(database) == 6
    assert set(queries["label"]) == {0, 2, 3, 5}  # classes 1 and 4 are too small
    assert set(queries["label"]) <= set(database["label"])
    assert not set(queries["path"]) & set(database["path"])
    # In turn: 4 classes give one each, then one more each (4 images give two at most), then 0 or 3.
    counts = queries["label"].value_counts()
    assert counts[2] == counts[5] == 2 and counts[0] + counts[3] == 5 and abs(counts[0] - 2.5) < 1


def test_a_large_database_takes_everything_that_is_left():
    val = validation([4, 2, 4])
    drawn = splits.retrieval_validation(val, queries=100, database=100)
    assert drawn["role"].value_counts().to_dict() == {"database": 6, "query": 4}
    assert sorted(drawn["path"]) == sorted(val["path"])
    assert drawn["label"].tolist() == [int(path[0]) for path in drawn["path"]]


def test_ground_truth_labels_the_database_images_of_a_querys_class():
    rows = [("q1", 5, "query"), ("q2", 3, "query"), ("q3", 9, "query")]
    rows += [("a", 3, "database"), ("b", 5, "database"), ("c", 7, "database"), ("d", 5, "database")]
    truth = splits.validation_ground_truth(pd.DataFrame(rows, columns=["path", "label", "role"]))
    assert truth.queries == ["q1", "q2", "q3"] and truth.database == ["a", "b", "c", "d"]
    assert [easy.tolist() for easy in truth.easy] == [[1, 3], [0], []]
    assert not any(labels.size for labels in (*truth.hard, *truth.junk))
    assert truth.boxes.shape == (3, 4)
    boxes = np.ones((3, 4))
    drawn = splits.retrieval_validation(validation([4, 4]), queries=3, database=5)
    assert splits.validation_ground_truth(drawn, boxes).boxes is boxes
    none = splits.validation_ground_truth(drawn[:0])
    assert none.queries == [] and none.boxes.shape == (0, 4)


def test_positives_come_before_other_images():
    val = validation([4] + [1] * 50)
    drawn = splits.retrieval_validation(val, queries=1, database=3, seed=2)
    assert drawn["label"].tolist() == [0, 0, 0, 0]


def test_retrieval_validation_is_seeded():
    val = validation([8] * 20)
    options = {"queries": 10, "database": 30}
    first, again, other = (
        splits.retrieval_validation(val, seed=seed, **options)["path"].tolist()
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_no_queries_give_an_empty_table():
    drawn = splits.retrieval_validation(validation([4]), queries=0, database=5)
    assert drawn.empty and list(drawn.columns) == ["path", "label", "role"]


def test_impossible_retrieval_validation_is_refused():
    with pytest.raises(ValueError, match="no validation class has 4 images"):
        splits.retrieval_validation(validation([3, 2]), queries=2, database=5)
    with pytest.raises(ValueError, match="no validation class has 2 images"):
        splits.retrieval_validation(validation([1]), queries=1, database=5, min_images=1)
    with pytest.raises(ValueError, match="2 queries of 2 classes need a database of at least 2"):
        splits.retrieval_validation(validation([4, 4]), queries=2, database=1)


# Files of a split


def test_reading_a_split_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebook 01_data_split first"):
        splits.read_split(tmp_path, "train")
    with pytest.raises(ValueError, match="no part 'test'"):
        splits.read_split(tmp_path, "test")


def test_a_damaged_split_is_refused_by_name(tmp_path):
    for path in ("../a.jpg", "/etc/a.jpg", "a/../../b.jpg"):
        (tmp_path / "val.csv").write_text(f"path,label\n{path},0\n")
        with pytest.raises(ValueError, match=r"val\.csv: '.*is not the path of a file inside"):
            splits.read_split(tmp_path, "val")
    for data in (
        b"path,label\na.jpg,x\n",
        b"path,label\n\xff,1\n",
        "path,label\na,1\n".encode("utf-16-le"),
    ):
        (tmp_path / "val.csv").write_bytes(data)
        with pytest.raises(ValueError, match=r"val\.csv"):
            splits.read_split(tmp_path, "val")
    (tmp_path / "val.csv").write_text("path,label\né.jpg,1\n", encoding="utf-16")
    assert splits.read_split(tmp_path, "val").to_numpy().tolist() == [["é.jpg", 1]]


# The published lists


def test_published_list_round_trip_with_spaces_in_paths(tmp_path):
    split = pd.DataFrame({"path": ["a/b/c/abc1.jpg", "a b/c d.jpg"], "label": [0, 81312]})
    path = splits.write_split_txt(tmp_path / "train_split.txt", split)
    assert path.read_text() == "train/a/b/c/abc1.jpg 0\ntrain/a b/c d.jpg 81312\n"
    read = splits.read_split_txt(path)
    assert read.to_numpy().tolist() == split.to_numpy().tolist()
    assert splits.read_split_txt(path, prefix="")["path"][0] == "train/a/b/c/abc1.jpg"


def test_an_empty_list_reads_as_an_empty_table(tmp_path):
    (tmp_path / "test_split.txt").touch()
    read = splits.read_split_txt(tmp_path / "test_split.txt")
    assert read.empty and read["label"].dtype == np.int64


@pytest.mark.parametrize(
    "line", ["train/a.jpg", "train/a.jpg x", "train/a.jpg -1", "other/a 1", "train/ 1", ""]
)
def test_wrong_lines_are_named_by_number(tmp_path, line):
    path = tmp_path / "train_split.txt"
    path.write_text(f"train/ok.jpg 3\n{line}\n")
    with pytest.raises(ValueError, match="line 2: expected"):
        splits.read_split_txt(path)


PIECES = st.binary(max_size=6) | st.sampled_from([b"train/", b"a ", b" 7", b"\n", b"9" * 30])


@given(st.lists(PIECES, max_size=8).map(b"".join))
def test_any_bytes_are_read_or_refused_with_the_lists_name(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any_split.txt"
    path.write_bytes(data)
    try:
        table = splits.read_split_txt(path)
    except ValueError as error:
        assert "any_split.txt" in str(error)
    else:
        splits.write_split_txt(path, table)
        assert splits.read_split_txt(path).equals(table)


# What notebook 01 shows


def test_sample_is_spread_over_classes_and_images(tmp_path):
    folder = make_images(tmp_path)
    # Classes in order: 3 (two images), 7 (one), 12 (four). The first and the last class; of four
    # images the first and the last, of two both.
    sample = splits.sample_images(frame(), folder, classes=2, per_class=2)
    assert [title for title, _ in sample] == ["landmark 3"] * 2 + ["landmark 12"] * 2
    assert [path.stem for _, path in sample] == ["bb20", "bb21", "aa10", "aa13"]
    assert all(path.is_file() for _, path in sample)
    assert len(splits.sample_images(frame(), folder, classes=9, per_class=9)) == len(ROWS)
    assert splits.sample_images(frame([]), folder, classes=2, per_class=2) == []


def test_sample_of_missing_images_names_the_remedy(tmp_path):
    options = {"classes": 3, "per_class": 1}
    with pytest.raises(
        FileNotFoundError, match=r"no image folder .*/none; it is the one that hold"
    ):
        splits.sample_images(frame(), tmp_path / "none", **options)
    make_images(tmp_path, ROWS[:2])
    with pytest.raises(FileNotFoundError, match=r"1 of 3 .* c/c/3/cc30\.jpg; unpack"):
        splits.sample_images(frame(), tmp_path, **options)
