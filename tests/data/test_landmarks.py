"""Landmark tables, the split, retrieval validation, published lists, the overlap audit."""

import json

import numpy as np
import pandas as pd
import pytest

from vitgal import runs
from vitgal.data import gldv2, splits
from vitgal.stages import split as stages_split

# Out of order, with one class of a single image (7), classes of 2 (3) and 4 (12).
ROWS = [
    ("aa10", 12),
    ("bb20", 3),
    ("aa11", 12),
    ("cc30", 7),
    ("bb21", 3),
    ("aa12", 12),
    ("aa13", 12),
]


def frame(rows=ROWS):
    return pd.DataFrame(rows, columns=["id", "landmark_id"])


def large(classes=60, images=30):
    rows = [(f"{c:04x}{i:04x}", 5 * c) for i in range(images) for c in range(classes)]
    return frame(rows)


def write_table(path, rows=ROWS):
    path.write_text("id,landmark_id\n" + "".join(f"{image},{mark}\n" for image, mark in rows))
    return path


def make_images(folder, rows=ROWS):
    for image, _ in rows:
        path = folder / gldv2.image_path(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.fixture
def data(tmp_path):
    return {
        "train_table": write_table(tmp_path / "train.csv"),
        "image_folder": make_images(tmp_path / "train"),
        "expected": None,
        "val_queries": 0,
    }


# Tables


def test_table_keeps_the_files_order_and_ids_that_look_like_numbers(tmp_path):
    rows = [("1e10000000000000", 4), ("0000000000000007", 2), ("nan0", 4)]
    table = gldv2.read_landmark_table(write_table(tmp_path / "train.csv", rows))
    assert list(table.itertuples(index=False, name=None)) == rows
    assert table["landmark_id"].dtype == np.int64


def test_clean_table_of_image_lists_gives_one_row_an_image(tmp_path):
    path = tmp_path / "train_clean.csv"
    path.write_text("landmark_id,images\n12,aa10 aa11\n3,bb20\n")
    table = gldv2.read_landmark_table(path)
    assert list(table.itertuples(index=False, name=None)) == [
        ("aa10", 12),
        ("aa11", 12),
        ("bb20", 3),
    ]


def test_noisy_table_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("id,url,landmark_id\naa10,http://a.example/x.jpg,12\n")
    with pytest.raises(ValueError, match=r"train\.csv is the noisy table.*train_clean\.csv"):
        gldv2.read_landmark_table(path)


def test_noisy_table_without_its_addresses_is_known_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(gldv2, "NOISY_IMAGES", len(ROWS))
    with pytest.raises(ValueError, match="lists 7 images, as the noisy table does"):
        gldv2.read_landmark_table(write_table(tmp_path / "train.csv"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no table"),
        ("id,landmark_id\n", "lists no image"),
        ("landmark_id,images\n3,\n", "lists no image"),
        ("image,class\naa10,1\n", "has the columns class, image"),
        ("id,landmark_id\naa10,one\n", "cannot be read as a table"),
        ("id,landmark_id\naa10,\n", "cannot be read as a table"),
        ("id,landmark_id\naa,1\n", "'aa' has fewer than the 3 characters"),
        ("id,landmark_id\naa10,1\n../etc,1\n", r"'\.\./etc' holds other than"),
        ("id,landmark_id\naa10,1\nbb,1\nbb20,1\naa10,2\n", "'bb' has fewer"),
        ("id,landmark_id\naa10,1\nbb20,1\naa10,2\n", "lists 1 ids more than once: aa10"),
    ],
)
def test_wrong_tables_are_refused_by_name(tmp_path, text, said):
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        gldv2.read_landmark_table(path)
    assert "train.csv" in str(error.value)


def test_missing_table_names_the_one_to_get(tmp_path):
    with pytest.raises(FileNotFoundError, match="Kaggle 2021"):
        gldv2.read_landmark_table(tmp_path / "train.csv")


def test_images_lie_under_their_ids_first_three_letters():
    assert gldv2.image_path("17660ef415d37059") == "1/7/6/17660ef415d37059.jpg"


def test_missing_images_are_named_sorted_whatever_lacks(tmp_path):
    make_images(tmp_path, ROWS[:3])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "c").touch()  # a file where a folder should be
    assert gldv2.missing_images(tmp_path, [image for image, _ in ROWS]) == [
        "aa12",
        "aa13",
        "bb21",
        "cc30",
    ]
    assert gldv2.missing_images(tmp_path, []) == []


# The split


def test_labels_follow_landmark_ids_and_first_images_train():
    train, val = splits.split_landmarks(frame(), val_share=0.999999)
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
    train, val = splits.split_landmarks(frame(), val_share=0)
    assert len(train) == 7 and val.empty and list(val.columns) == ["path", "label"]


def test_split_equals_the_published_loop_with_the_same_draws():
    table = large().sample(frac=1, random_state=3, ignore_index=True)
    train, val = splits.split_landmarks(table, val_share=0.3, seed=5)
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
        splits.split_landmarks(large(), seed=seed)[1]["path"].tolist() for seed in (1, 1, 2)
    )
    assert first == again != other


def test_share_of_validation_images_is_as_published():
    _, val = splits.split_landmarks(large(60, 30), val_share=0.2)
    # 60 x 29 images are drawn: mean 348, standard deviation 16.7; five of these either way.
    assert abs(len(val) - 348) < 84


def test_held_out_classes_validate_wholly_with_labels_after_the_trained():
    table = large(10, 6)
    train, val = splits.split_landmarks(table, held_out_classes=3, seed=4)
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
    ("options", "said"),
    [
        ({"val_share": 1.0}, "val_share must be"),
        ({"val_share": -0.1}, "val_share must be"),
        ({"held_out_classes": 3}, "of 3 classes 2 have two images"),
        ({"held_out_classes": -1}, "held_out_classes is -1"),
        ({"exclude": [3, 7, 12]}, "holds no image"),
    ],
)
def test_impossible_splits_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        splits.split_landmarks(frame(), **options)


def test_not_all_classes_can_be_held_out():
    with pytest.raises(ValueError, match="at least one class must be left"):
        splits.split_landmarks(frame([("aa1", 1), ("aa2", 1)]), held_out_classes=1)


def test_exclusion_by_image_and_by_class():
    left = gldv2.exclude_images(frame(), ["aa10", "3"])
    assert left["id"].tolist() == ["aa11", "cc30", "aa12", "aa13"]
    train, _ = splits.split_landmarks(frame(), exclude=["aa10", 3], val_share=0.999999)
    assert train.to_numpy().tolist() == [["c/c/3/cc30.jpg", 0], ["a/a/1/aa11.jpg", 1]]


def test_an_id_of_digits_alone_is_an_image_when_the_table_has_it():
    table = frame([("0000000000000012", 1), ("aa11", 12)])
    assert gldv2.exclude_images(table, ["0000000000000012"])["id"].tolist() == ["aa11"]
    assert gldv2.exclude_images(table, ["12"])["id"].tolist() == ["0000000000000012"]


def test_unknown_exclusions_are_refused():
    with pytest.raises(ValueError, match=r"2 of 3 entries .* zz99, 0003"):
        gldv2.exclude_images(frame(), ["aa10", "zz99", "0003"])


def test_exclude_file_skips_comments_and_must_list_something(tmp_path):
    path = tmp_path / "gone.txt"
    path.write_text("# overlap\naa10\n\n 12  # a class\n")
    assert gldv2.read_exclusions(path) == ["aa10", "12"]
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="lists no image"):
        gldv2.read_exclusions(path)
    with pytest.raises(FileNotFoundError, match="exclude file"):
        gldv2.read_exclusions(tmp_path / "none.txt")


def test_overlap_audit_counts_images_of_classes(tmp_path):
    overlap = pd.DataFrame({"id": ["aa11", "aa12", "aa11", "zz00"], "test_set": list("pqqp")})
    audit = gldv2.overlap_audit(frame(), overlap)
    assert audit.to_numpy().tolist() == [[12, 4, 2, "p q"]]
    audit = gldv2.overlap_audit(frame(), pd.DataFrame({"landmark_id": [12, 3, 99]}))
    assert audit.to_numpy().tolist() == [[3, 2, 2, ""], [12, 4, 4, ""]]
    empty = gldv2.overlap_audit(frame(), pd.DataFrame({"landmark_id": [99]}))
    assert empty.empty and list(empty.columns) == ["landmark_id", "images", "listed", "test_sets"]
    with pytest.raises(ValueError, match="column id or landmark_id"):
        gldv2.overlap_audit(frame(), pd.DataFrame({"image": ["aa11"]}))


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


# The stage


def test_stage_writes_tables_that_read_back(tmp_path, data):
    folder = stages_split.make_split(tmp_path / "run", **data, val_share=0.999999)
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
    folder = stages_split.make_split(
        tmp_path / "run",
        train_table=write_table(tmp_path / "train.csv", rows),
        image_folder=make_images(tmp_path / "train", rows),
        expected=(48, 6),
        held_out_classes=2,
        val_queries=4,
        val_database=100,
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
    folder = stages_split.make_split(tmp_path / "run", **data, val_share=0.5)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    stages_split.make_split(tmp_path / "run", **data, val_share=0.5)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    other = stages_split.make_split(tmp_path / "other", **data, val_share=0.5)
    assert (other / "val.csv").read_bytes() == before["val.csv"]
    with pytest.raises(runs.StageError, match=r"val_share: 0\.5 there, 0\.2 now"):
        stages_split.make_split(tmp_path / "run", **data, val_share=0.2)
    write_table(data["train_table"], ROWS[:-1])
    with pytest.raises(runs.StageError, match="inputs.train_table"):
        stages_split.make_split(tmp_path / "run", **data, val_share=0.5)
    stages_split.make_split(tmp_path / "run", **data, val_share=0.5, overwrite=True)


def test_stage_excludes_and_audits(tmp_path, data):
    exclude, overlap = tmp_path / "gone.txt", tmp_path / "overlap.csv"
    exclude.write_text("7\n")
    overlap.write_text("landmark_id,test_set\n12,rparis6k\n7,rparis6k\n")
    folder = stages_split.make_split(
        tmp_path / "run", **data, exclude=exclude, overlap_table=overlap, val_share=0
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
    ("change", "error", "said"),
    [
        ({"image_folder": "nowhere"}, FileNotFoundError, "no image folder .*nowhere"),
        ({"train_table": "none.csv"}, FileNotFoundError, "train_table: there is no file"),
        ({"exclude": "none.txt"}, FileNotFoundError, "exclude: there is no file"),
        ({"overlap_table": "none.csv"}, FileNotFoundError, "overlap_table: there is no file"),
        ({"expected": (1, 1)}, ValueError, "lists 7 images of 3 classes where 1 of 1 are expected"),
        ({"val_queries": 1}, ValueError, "no validation class has 4 images"),
        ({"val_share": 2}, ValueError, "val_share must be"),
    ],
)
def test_stage_checks_everything_before_it_begins(tmp_path, data, change, error, said):
    with pytest.raises(error, match=said):
        stages_split.make_split(tmp_path / "run", **data | change)
    assert not (tmp_path / "run").exists()


def test_missing_images_stop_the_stage_with_names_and_count(tmp_path, data):
    for image in ("aa10", "bb20", "cc30", "aa13"):
        (data["image_folder"] / gldv2.image_path(image)).unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"4 of 7 listed .*a/a/1/aa10\.jpg, a/a/1/aa13\.jpg, b/b/2/bb20\.jpg; unpack",
    ):
        stages_split.make_split(tmp_path / "run", **data)


def test_reading_a_split_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebook 01_data_split first"):
        splits.read_split(tmp_path, "train")
    with pytest.raises(ValueError, match="no part 'test'"):
        splits.read_split(tmp_path, "test")


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
    "line", ["train/a.jpg", "train/a.jpg x", "train/a.jpg -1", "other/a 1", ""]
)
def test_wrong_lines_are_named_by_number(tmp_path, line):
    path = tmp_path / "train_split.txt"
    path.write_text(f"train/ok.jpg 3\n{line}\n")
    with pytest.raises(ValueError, match="line 2: expected"):
        splits.read_split_txt(path)


# What notebook 01 shows


def test_sample_is_spread_over_classes_and_images(tmp_path):
    folder = make_images(tmp_path)
    # Classes in order: 3 (two images), 7 (one), 12 (four). The first and the last class; of four
    # images the first and the last, of two both.
    found = splits.sample_images(frame(), folder, classes=2, per_class=2)
    assert [title for title, _ in found] == ["landmark 3"] * 2 + ["landmark 12"] * 2
    assert [path.stem for _, path in found] == ["bb20", "bb21", "aa10", "aa13"]
    assert all(path.is_file() for _, path in found)
    assert len(splits.sample_images(frame(), folder, classes=9, per_class=9)) == len(ROWS)
    assert splits.sample_images(frame([]), folder, classes=2, per_class=2) == []


def test_sample_of_missing_images_says_what_to_do(tmp_path):
    options = {"classes": 3, "per_class": 1}
    with pytest.raises(
        FileNotFoundError, match=r"no image folder .*/none; it is the one that hold"
    ):
        splits.sample_images(frame(), tmp_path / "none", **options)
    make_images(tmp_path, ROWS[:2])
    with pytest.raises(FileNotFoundError, match=r"1 of 3 .*first c/c/3/cc30\.jpg; unpack every"):
        splits.sample_images(frame(), tmp_path, **options)
