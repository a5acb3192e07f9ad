"""Landmark tables, image folders, lists of images to leave out, the overlap audit."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from tests.data.landmark_tables import ROWS, frame, make_images, write_table
from vitgal.data import gldv2


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
    ("text", "message"),
    [
        ("", "cannot be read as a table"),
        ("id,landmark_id\n", "lists no image"),
        ("landmark_id,images\n3,\n", "lists no image"),
        ("image,class\naa10,1\n", "has the columns class, image"),
        ("id,landmark_id\naa10,one\n", "cannot be read as a table"),
        ("id,landmark_id\naa10,\n", "cannot be read as a table"),
        ("id,landmark_id\naa,1\n", "'aa' has fewer than the 3 characters"),
        ("id,landmark_id\naa10,1\n../etc,1\n", r"'\.\./etc' has other than"),
        ("id,landmark_id\naa10,1\nbb,1\nbb20,1\naa10,2\n", "'bb' has fewer"),
        ("id,landmark_id\naa10,1\nbb20,1\naa10,2\n", "lists 1 ids more than once: aa10"),
    ],
)
def test_wrong_tables_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        gldv2.read_landmark_table(path)
    assert "train.csv" in str(error.value)


PIECES = [b"id,", b"landmark_id", b"images", b"\n", b",", b"aa10,1\n", b'"', b"9" * 30]
BYTES = st.lists(st.binary(max_size=12) | st.sampled_from(PIECES), max_size=10).map(b"".join)
HEADS = st.sampled_from([b"", b"id,landmark_id\n", b"landmark_id,images\n", b"id,test_set\n"])


@settings(max_examples=30)
@given(head=HEADS, tail=BYTES)
def test_any_bytes_are_read_or_refused_with_the_files_name(tmp_path_factory, head, tail):
    path = tmp_path_factory.getbasetemp() / "bytes.csv"
    path.write_bytes(head + tail)
    for read in (gldv2.read_landmark_table, gldv2.read_exclusions, gldv2.read_overlap):
        try:
            assert len(read(path)) or read is gldv2.read_overlap
        except ValueError as error:
            assert "bytes.csv" in str(error)


def test_missing_table_names_the_one_to_get(tmp_path):
    with pytest.raises(FileNotFoundError, match="Kaggle 2021"):
        gldv2.read_landmark_table(tmp_path / "train.csv")


def test_images_lie_under_their_ids_first_three_letters():
    assert gldv2.image_path("17660ef415d37059") == "1/7/6/17660ef415d37059.jpg"


def test_missing_images_are_named_in_order(tmp_path):
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


# Exclusion and overlap


def test_exclusion_by_image_and_by_class():
    left = gldv2.exclude_images(frame(), ["aa10", "3"])
    assert left["id"].tolist() == ["aa11", "cc30", "aa12", "aa13"]


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
    path.write_bytes(b"aa10\n\xff\n")
    with pytest.raises(ValueError, match="gone.txt is no text"):
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


def test_overlap_table_needs_a_key(tmp_path):
    path = tmp_path / "overlap.csv"
    path.write_text("id,landmark_id,note\naa11,,seen\n")
    assert gldv2.read_overlap(path).to_numpy().tolist() == [["aa11"]]
    path.write_text("landmark_id,test_set\n12,\n3,p\n")
    assert gldv2.overlap_audit(frame(), gldv2.read_overlap(path)).to_numpy().tolist() == [
        [3, 2, 2, "p"],
        [12, 4, 4, ""],
    ]
    path.write_text("image\naa11\n")
    with pytest.raises(ValueError, match="overlap.csv needs a column id or landmark_id"):
        gldv2.read_overlap(path)
    with pytest.raises(FileNotFoundError, match="overlap table .*none.csv"):
        gldv2.read_overlap(tmp_path / "none.csv")
