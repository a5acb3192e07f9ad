"""Checks of data folders."""

import os

from tests.data.download_server import bring, photo
from vitgal.data.download import checks


def test_check_names_every_missing_and_every_unreadable_image(world, tmp_path):
    folder = bring("roxford5k", tmp_path, world)
    (folder / "jpg" / "oxford_000002.jpg").unlink()
    (folder / "jpg" / "all_souls_000001.jpg").write_bytes(photo(0)[:300])
    (folder / "jpg" / "radcliffe_000003.jpg").write_bytes(b"")
    (folder / "jpg" / "extra.jpg").write_bytes(b"no image")
    report = checks.check("roxford5k", folder=tmp_path / "data", progress=False, sources=world)
    assert not report.ok
    assert (report.images, report.listed) == (3, 3)
    assert report.missing == ["oxford_000002.jpg"]
    assert report.unreadable == [
        ("all_souls_000001.jpg", "the file is cut short"),
        ("radcliffe_000003.jpg", "the file is empty"),
    ]
    assert [location for location, _ in report.unlisted] == ["extra.jpg"]
    text = str(report)
    assert "NOT whole" in text
    for name in ("oxford_000002.jpg", "all_souls_000001.jpg: the file is cut", "extra.jpg"):
        assert name in text
    # The source's own folder is understood as well as the one above.
    assert checks.check("roxford5k", folder=folder, progress=False, sources=world) == report


def test_unreadable_images_that_no_list_names_leave_a_set_whole(world, tmp_path):
    bring("rparis6k", tmp_path, world)
    report = checks.check("rparis6k", folder=tmp_path / "data", progress=False, sources=world)
    assert report.ok
    assert report.unlisted == [("paris_damaged.jpg", "the file is cut short")]
    assert (report.images, report.listed) == (4, 3)


def test_check_reports_images_in_other_sub_folders(world, tmp_path):
    folder = bring("roxford5k", tmp_path, world)
    (folder / "jpg" / "sub").mkdir()
    os.replace(folder / "jpg" / "oxford_000002.jpg", folder / "jpg" / "sub" / "oxford_000002.jpg")
    report = checks.check("roxford5k", folder=folder, progress=False, sources=world)
    assert report.missing == ["oxford_000002.jpg"]
    assert "sub/oxford_000002.jpg for oxford_000002.jpg" in report.problems[0]


def test_check_counts_where_there_is_no_list(world, tmp_path):
    folder = bring("gldv2_train", tmp_path, world)
    assert checks.check("gldv2_train", folder=folder, progress=False, sources=world).ok
    (folder / "train" / "0" / "a" / "1" / "0a1c.jpg").unlink()
    report = checks.check("gldv2_train", folder=folder, progress=False, sources=world)
    assert report.problems == ["3 images; the whole set has 4"]
    # With the clean table there, the removed image is one that nothing lists.
    bring("gldv2_clean", tmp_path, world)
    assert checks.check("gldv2_train", folder=folder, progress=False, sources=world).ok


def test_check_knows_both_clean_tables_and_refuses_the_noisy_one(world, tmp_path):
    folder = bring("gldv2_clean", tmp_path, world)
    (folder / "train.csv").write_text("id,landmark_id\n0a1b,7\nff00,7\nf00d,9\n")
    report = checks.check("gldv2_clean", folder=folder, sources=world)
    assert report.ok
    assert report.notes == [
        "train_clean.csv: 3 images of 2 classes",
        "train.csv: 3 images of 2 classes",
    ]
    (folder / "train_clean.csv").unlink()  # Kaggle's alone will do
    assert checks.check("gldv2_clean", folder=folder, sources=world).ok
    (folder / "train.csv").write_text("id,url,landmark_id\n0a1b,http://x,7\n")
    assert "noisy" in checks.check("gldv2_clean", folder=folder, sources=world).problems[0]
    (folder / "train.csv").write_text("id,landmark_id\n0a1b,7\n")
    report = checks.check("gldv2_clean", folder=folder, sources=world)
    assert "lists 1 images of 1 classes; the clean set has 3 of 2" in report.problems[0]


def test_check_of_a_missing_folder(world, tmp_path):
    report = checks.check("roxford5k", folder=tmp_path / "data", sources=world)
    assert report.problems == ["it is not there; `vitgal download roxford5k` brings it"]
    (tmp_path / "data" / "roxford5k").mkdir(parents=True)
    report = checks.check("roxford5k", folder=tmp_path / "data", sources=world)
    assert [problem.split()[0] for problem in report.problems] == ["gnd_roxford5k.pkl", "jpg/"]
    (tmp_path / "data" / "gldv2").mkdir()
    report = checks.check("gldv2_clean", folder=tmp_path / "data", sources=world)
    assert "neither of train_clean.csv, train.csv is there" in report.problems[0]
    (tmp_path / "data" / "weights").mkdir()
    report = checks.check("xcit", folder=tmp_path / "data", sources=world)
    assert report.problems == ["xcit.pth is missing; `vitgal download xcit` brings it"]
