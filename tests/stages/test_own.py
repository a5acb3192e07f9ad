"""Own photographs: what is used and what is told, nothing done twice, search, export."""

import io
import os
import shutil
import sys
import tempfile
import unicodedata
from pathlib import Path

import cv2
import h5py
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest

from vitgal import runs
from vitgal.app import command_line as command_line, pipeline, summary
from vitgal.data import images, photographs as data_photographs
from vitgal.features import store
from vitgal.features.local import LocalFeatures
from vitgal.models import descriptors, inference
from vitgal.retrieval import verification
from vitgal.settings import (
    GlobalSettings,
    LocalSettings,
    MachineSettings,
    MatchingSettings,
    RerankingSettings,
    SettingsError,
)
from vitgal.stages import own, own_describer, own_export
from vitgal.stages.own import Describer
from vitgal.training import errors
from vitgal.viz import run_figures

matplotlib.use("agg")

SHAPE = (96, 128)


def texture(seed: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (shape[0] // 8 + 1, shape[1] // 8 + 1, 3), np.uint8)
    return cv2.resize(small, shape[::-1], interpolation=cv2.INTER_CUBIC)


def write(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return path


@pytest.fixture(scope="module")
def describer(xcit_file, tmp_path_factory) -> Describer:
    """Shared by the tests that do not count descriptions: equal photographs are described once."""
    return describer_of(xcit_file, tmp_path_factory.mktemp("run"))


def describer_of(weight_file: Path, run: Path, local_size: int = 96) -> Describer:
    return Describer(
        run,
        weight_file,
        GlobalSettings(size=64),
        LocalSettings(size=local_size, scales=(1.0,)),
        MachineSettings(threads=1),
    )


def reranking(top: int = 100, max_distance: float = 0.5) -> RerankingSettings:
    return RerankingSettings(top=top, matching=MatchingSettings(max_distance=max_distance))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two places: a/1 and a/2 show one texture, 2 shifted by a patch; b/1 shows another."""
    wide = texture(0, (96, 144))
    write(tmp_path / "photos/a/1.png", wide[:, :128])
    write(tmp_path / "photos/a/2.png", wide[:, 16:])
    write(tmp_path / "photos/b/1.JPG", texture(7))
    (tmp_path / "photos/notes.txt").write_text("holiday")
    return tmp_path / "photos"


def describe(folder: Path, describer: Describer) -> own.Photographs:
    return own.describe_folder(folder, describer)


# The folder


def test_listing(folder):
    for hidden in (".thumbnails/1.png", "@eaDir/1.png/thumbnail.png", "b/__MACOSX/._1.png"):
        write(folder / hidden, texture(1))
    write(folder / "._1.png", texture(1))
    (folder / "b/film.DNG").write_bytes(b"II*\0")
    (folder / "b/film.jxl").write_bytes(b"\xff\x0a")
    (folder / "P5.txt").write_text("P5 is a chapter")
    (folder / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jpg")
    os.mkfifo(folder / "pipe")
    (folder / "kernel.jpg").symlink_to("/proc/self/status")  # its size is stated as 0
    shutil.copy(folder / "a/1.png", folder / "no ending")
    shutil.copy(folder / "b/1.JPG", folder / "wrong.txt")
    for suffix in ("jfif", "jpe", "gif", "avif", "heic"):
        (folder / f"c.{suffix}").write_bytes(b"x")
    (folder / "d.jpg").touch()
    names = ["a/1.png", "a/2.png", "b/1.JPG", *(f"c.{s}" for s in "avif gif heic jfif jpe".split())]
    remedy = "is not read here: convert it to .jpg or .png"
    assert data_photographs.list_photographs(folder) == data_photographs.Listing(
        folder,
        [*names, "no ending", "wrong.txt"],
        {
            "b/film.DNG": f"camera raw {remedy}",
            "b/film.jxl": f"JPEG XL {remedy}",
            "d.jpg": "the file is empty",
            "gone.jpg": "it cannot be read (No such file or directory)",
            "kernel.jpg": "the file is empty",
            "pipe.jpg": "it is no regular file",
        },
        3,
    )


def test_a_sub_folder_that_cannot_be_listed_is_named():
    """Not in pytest's folder, which another user cannot enter."""
    with tempfile.TemporaryDirectory() as top:
        folder, user = Path(top), os.geteuid()
        write(folder / "a.png", texture(1))
        write(folder / "closed/b.png", texture(2))
        (folder / "closed").chmod(0)
        folder.chmod(0o755)
        try:
            if user == 0:
                os.seteuid(65534)
            listing = data_photographs.list_photographs(folder)
        finally:
            os.seteuid(user)
            (folder / "closed").chmod(0o700)
    assert listing.names == ["a.png"] and listing.other_files == 0
    assert listing.unsupported == {"closed/": "the folder cannot be listed (Permission denied)"}


def test_links_are_followed_and_loops_end(folder, tmp_path):
    write(tmp_path / "elsewhere/c.png", texture(1))
    (folder / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "a/loop").symlink_to(folder, target_is_directory=True)
    assert data_photographs.list_photographs(folder).names == [
        *("a/1.png", "a/2.png", "b/1.JPG"),
        "linked/c.png",
    ]


def test_links_lead_to_no_folder_above(folder, tmp_path):
    write(tmp_path / "above.png", texture(1))
    write(tmp_path / "far/away/c.png", texture(1))
    write(tmp_path / "far/b.png", texture(1))
    (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    (folder / "root").symlink_to("/", target_is_directory=True)
    (folder / "out").symlink_to(tmp_path / "far/away", target_is_directory=True)
    (tmp_path / "far/away/back").symlink_to(tmp_path / "far", target_is_directory=True)
    names = data_photographs.list_photographs(folder).names
    assert names == ["a/1.png", "a/2.png", "b/1.JPG", "out/c.png"]
    (folder / "also").symlink_to(tmp_path / "far", target_is_directory=True)
    names = data_photographs.list_photographs(folder).names
    assert names == ["a/1.png", "a/2.png", "also/away/c.png", "also/b.png", "b/1.JPG"]


def test_a_folder_without_photographs_is_refused(tmp_path):
    with pytest.raises(data_photographs.PhotographError, match="holds no photograph .*nothing"):
        data_photographs.list_photographs(tmp_path)
    (tmp_path / "a.nef").write_bytes(b"II*\0")
    with pytest.raises(data_photographs.PhotographError, match="1 files, a.nef: camera raw is not"):
        data_photographs.list_photographs(tmp_path)
    (tmp_path / "a.nef").unlink()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(data_photographs.PhotographError, match="1 files, such as notes.txt"):
        data_photographs.list_photographs(tmp_path)
    with pytest.raises(data_photographs.PhotographError, match="is not a folder"):
        data_photographs.list_photographs(tmp_path / "notes.txt")


def test_what_cannot_be_used_is_left_out_and_named(folder, describer):
    write(folder / "dot.png", np.zeros((1, 1, 3), np.uint8))
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (folder / "text.png").write_text("no image")
    (folder / "new.heic").write_bytes(b"x")
    (folder / "endless.jpg").write_bytes((folder / "b/1.JPG").read_bytes()[:-2])
    write(folder / "wide.png", texture(3, (64, 400)))
    result = describe(folder, describer)
    assert result.names == ["a/1.png", "a/2.png", "b/1.JPG", "endless.jpg", "wide.png"]
    assert {name: text.split(":")[0] for name, text in result.left_out.items()} == {
        "dot.png": "1 x 1 pixels, less than one patch of 16 x 16",
        "cut.jpg": "the file is cut short",
        "text.png": "not an image that OpenCV can decode",
        "new.heic": "not an image that OpenCV can decode",
    }
    assert result.notes["endless.jpg"] == "the file lacks its end mark, but every row is there"
    assert len(result.notes) == 2 and "6 times the other" in result.notes["wide.png"]
    report = result.report().splitlines()
    assert report[0] == "5 photographs described, 1 other files passed over"
    assert "left out: dot.png: 1 x 1 pixels" in report[2] and report[-1].startswith("note: wide")


def test_a_photograph_20000_pixels_wide_is_used_with_a_note(tmp_path, describer):
    write(tmp_path / "photos/a.png", texture(0))
    # 64 rows: what counts is the width, and a full one would take 20 s to make
    write(tmp_path / "photos/panorama.png", np.zeros((64, 20_000, 3), np.uint8))
    result = describe(tmp_path / "photos", describer)
    assert result.names == ["a.png", "panorama.png"]
    assert "20000 x 64 pixels, one side 312 times" in result.notes["panorama.png"]
    assert "small details are lost" in data_photographs.size_note(15_000, 20_000)
    assert data_photographs.size_note(3000, 4000) is None


def test_nothing_that_can_be_used_stops(tmp_path, describer):
    write(tmp_path / "photos/dot.png", np.zeros((1, 1, 3), np.uint8))
    with pytest.raises(
        data_photographs.PhotographError, match="none of the 1 photographs .*dot.png: 1 x 1"
    ):
        describe(tmp_path / "photos", describer)


def test_a_notebook_shows_the_message_alone():
    error = data_photographs.PhotographError("one\ntwo")
    assert error._render_traceback_() == ["one", "two"]
    assert runs.StageError("x")._render_traceback_() == ["x"]
    for kind in (store.StoreError, errors.TrainingError, errors.Preempted):
        assert kind("y")._render_traceback_() == ["y"]
    assert images.ImageError("a.jpg", "it is empty")._render_traceback_() == [
        "a.jpg: it is empty; replace the file or take it out of the image list"
    ]


# Descriptions


def test_descriptions_are_those_of_extraction(folder, describer, xcit_file):
    result = describe(folder, describer)
    model = inference.open_model(xcit_file)
    image = images.read_image(folder / "a/1.png")
    with inference.limited_threads(1):
        row = descriptors.extract_global(model, [image], size=64)[0]
        features = descriptors.extract_local(model, image, size=96, scales=(1.0,))
    np.testing.assert_array_equal(result.descriptors[0], row)
    kept = result.features("a/1.png")
    np.testing.assert_array_equal(kept.keypoints, features.keypoints)
    # float16 holds 11 bits: half a step of the largest value, 1
    np.testing.assert_allclose(kept.descriptors, features.descriptors, atol=2**-11)
    assert (kept.input_size, kept.box, kept.image_size) == (
        (features.input_size, features.box, features.image_size)
    )


def test_only_new_photographs_are_extracted(folder, weight_file, tmp_path):
    first = describe(folder, describer_of(weight_file, tmp_path))
    assert first.extracted == 3
    again = describe(folder, describer_of(weight_file, tmp_path))
    assert again.extracted == 0
    np.testing.assert_array_equal(again.descriptors, first.descriptors)
    write(folder / "c/new.png", texture(9))  # one is added, one moved, one changed
    (folder / "b/1.JPG").rename(folder / "moved.jpg")
    write(folder / "a/2.png", texture(11))
    later = describe(folder, describer_of(weight_file, tmp_path))
    assert later.extracted == 2
    assert later.names == ["a/1.png", "a/2.png", "c/new.png", "moved.jpg"]
    np.testing.assert_array_equal(later.descriptors[3], first.descriptors[2])
    assert (later.descriptors[1] != first.descriptors[1]).any()


def test_nothing_new_needs_no_network(folder, weight_file, tmp_path):
    describe(folder, describer_of(weight_file, tmp_path))
    other = describer_of(weight_file, tmp_path)
    describe(folder, other)
    assert "network" not in vars(other)  # a cached property: never asked for


def test_other_settings_and_weights_are_kept_apart(folder, weight_file, tmp_path):
    single = describer_of(weight_file, tmp_path)
    describe(folder, single)
    other = describer_of(weight_file, tmp_path, local_size=128)
    assert describe(folder, other).extracted == 3
    assert single.folder != other.folder
    assert runs.read_json(other.folder / "settings.json")["local_size"] == 128
    assert describe(folder, describer_of(weight_file, tmp_path)).extracted == 0


def test_descriptions_are_not_written_through_a_link(folder, weight_file, tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "own").symlink_to(tmp_path / "victim", target_is_directory=True)
    with pytest.raises(ValueError, match="own is a link"):
        describe(folder, describer_of(weight_file, tmp_path / "run"))
    assert not list((tmp_path / "victim").iterdir())


def test_a_killed_run_goes_on(folder, weight_file, tmp_path):
    describer = describer_of(weight_file, tmp_path)
    describer.describe(folder / "a/1.png")
    assert describe(folder, describer_of(weight_file, tmp_path)).extracted == 2


def test_a_damaged_description_is_made_again(folder, weight_file, tmp_path):
    describer = describer_of(weight_file, tmp_path)
    first = describe(folder, describer)
    files = sorted(describer.folder.glob("*/*.npz"))
    wanted = [file.read_bytes() for file in files]
    files[0].write_bytes(wanted[0][: len(wanted[0]) // 2])
    at = wanted[1].index(b"descriptor.npy") + 200  # within the array, which its CRC covers
    files[1].write_bytes(wanted[1][:at] + bytes([wanted[1][at] ^ 1]) + wanted[1][at + 1 :])
    again = describe(folder, describer_of(weight_file, tmp_path))
    assert again.extracted == 2
    np.testing.assert_array_equal(again.descriptors, first.descriptors)
    assert [file.read_bytes() for file in files] == wanted


def test_a_model_without_autoencoder_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="no autoencoder"):
        describe(folder, Describer(tmp_path, "untrained:xcit_nano_12_p16_224"))


# Search


def test_the_other_view_comes_first_and_never_the_query(folder, describer):
    photographs = describe(folder, describer)
    result = own.search_folder(photographs, "a/1.png", None, reranking())
    assert result.table["photograph"].tolist() == ["a/2.png", "b/1.JPG"]
    assert result.table["rank"].tolist() == [1, 2]
    assert sorted(result.table["global_rank"]) == [1, 2]
    features, pair = result.pair("a/2.png")
    assert pair.verification.count == result.table["inliers"][0] >= 5
    query = photographs.features("a/1.png")
    alone = verification.inspect_pair(query, features, reranking())
    np.testing.assert_array_equal(pair.matches, alone.matches)
    assert len(pair.matches) == result.table["matches"][0]


def test_beyond_the_short_list_nothing_is_verified(folder, describer):
    result = own.search_folder(describe(folder, describer), "a/1.png", None, reranking(top=1))
    assert result.table["inliers"].isna().tolist() == [False, True]
    assert result.table["global_rank"].tolist() == [1, 2]


def test_a_query_from_elsewhere_and_with_a_box(folder, weight_file, tmp_path):
    describer = describer_of(weight_file, tmp_path)
    photographs = describe(folder, describer)
    outside = write(tmp_path / "query.png", texture(0, (96, 144)))
    result = own.search_folder(photographs, str(outside), None, reranking())
    assert result.query == "query.png" and len(result.table) == 3
    boxed = own.search_folder(photographs, str(outside), (16, 0, 144, 96), reranking())
    # just what a/2 shows: the same pixels, hence the same descriptor
    assert boxed.table["photograph"][0] == "a/2.png"
    assert boxed.table["similarity"][0] == pytest.approx(1, abs=1e-6)
    assert boxed.description.features.box == (16, 0, 144, 96)
    assert describer.extracted == 5
    inside = own.search_folder(photographs, str(folder / "a/1.png"), None, reranking())
    assert inside.query == "a/1.png" and len(inside.table) == 2


def test_which_file_a_query_names(folder, describer, tmp_path, monkeypatch, capsys):
    photographs = describe(folder, describer)
    monkeypatch.setattr(runs, "checkout", lambda: tmp_path)
    write(tmp_path / "b/2.png", texture(0))
    write(tmp_path / "b/1.JPG", texture(7))
    assert own.find_query(photographs, "b/2.png") == ("2.png", tmp_path / "b/2.png")
    assert own.find_query(photographs, "a/1.png") == ("a/1.png", folder / "a/1.png")
    with pytest.raises(data_photographs.PhotographError, match=f"b/1.JPG is both {folder}/b/1.JPG"):
        own.find_query(photographs, "b/1.JPG")
    assert own.find_query(photographs, "./b/1.JPG") == ("1.JPG", tmp_path / "./b/1.JPG")
    inside = str(folder / "b/1.JPG")
    assert own.find_query(photographs, inside) == ("b/1.JPG", folder / "b/1.JPG")
    (tmp_path / "b/1.JPG").unlink()
    (tmp_path / "b/1.JPG").symlink_to(folder / "b/1.JPG")  # the same file, so not ambiguous
    assert own.find_query(photographs, "b/1.JPG")[0] == "b/1.JPG"
    assert own.find_query(photographs, "./b/1.JPG")[0] == "b/1.JPG"
    capsys.readouterr()
    own.search_folder(photographs, "b/2.png", None, reranking())
    assert capsys.readouterr().out == (
        f"the query is {tmp_path}/b/2.png, which is none of the photographs\n"
    )


def test_a_damaged_photograph_of_the_same_name_is_ignored(folder, describer, tmp_path):
    (folder / "tower.png").write_text("no image")
    healthy = write(tmp_path / "elsewhere/tower.png", texture(3))
    photographs = describe(folder, describer)
    assert own.find_query(photographs, str(healthy)) == ("tower.png", healthy)
    with pytest.raises(data_photographs.PhotographError, match="the query tower.png: not an image"):
        own.find_query(photographs, "tower.png")


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_both_normal_forms_of_a_name_are_one_query(tmp_path, describer, stored):
    name = unicodedata.normalize(stored, "Café/Zoë.png")
    write(tmp_path / "photos" / name, texture(0))
    write(tmp_path / "photos/b.png", texture(1))
    photographs = describe(tmp_path / "photos", describer)
    for form in ("NFC", "NFD"):
        query = unicodedata.normalize(form, name)
        for text in (query, str(tmp_path / "photos" / query)):
            assert own.find_query(photographs, text) == (name, tmp_path / "photos" / name)
    with pytest.raises(data_photographs.PhotographError, match=f"do you mean {name}"):
        own.find_query(photographs, unicodedata.normalize("NFC", "Zoë.png"))


def test_names_that_cannot_be_encoded_are_left_out(folder, describer, tmp_path):
    shutil.copy(folder / "a/1.png", os.fsencode(folder) + b"/caf\xe9.png")
    shutil.copy(folder / "a/1.png", folder / "=1+1\x1b[2J.png")
    photographs = describe(folder, describer)
    assert photographs.names == ["=1+1\x1b[2J.png", "a/1.png", "a/2.png", "b/1.JPG"]
    report = photographs.report().splitlines()
    assert report[1:] == [r"left out: caf\udce9.png: its name is no UTF-8: rename it"]
    result = own.search_folder(photographs, "a/1.png", None, reranking())
    text = own.write_ranking(result, tmp_path / "ranking.csv").read_text()
    assert "\n./=1+1" in text and "\n=" not in text


def test_a_folder_that_changes_while_it_is_described(folder, describer, tmp_path, monkeypatch):
    """One file is rewritten while it is read, one vanishes before, one after its description."""
    os.mkfifo(folder / "pipe.png")
    for name in ("gone", "later", "rewritten"):
        write(folder / f"{name}.png", texture(20 + len(name)))
    read = own_describer.read_oriented

    def changing(path):
        image = read(path)
        if path.name == "rewritten.png":
            write(path, texture(30))
        (folder / "gone.png").unlink(missing_ok=True)
        return image

    monkeypatch.setattr(own_describer, "read_oriented", changing)
    photographs = describe(folder, describer_of(describer.model, tmp_path / "run"))
    assert photographs.names == ["a/1.png", "a/2.png", "b/1.JPG", "later.png"]
    assert {name: text.split(":")[0] for name, text in photographs.left_out.items()} == {
        "gone.png": f"there is no photograph {folder}/gone.png",
        "pipe.png": "it is no regular file",
        "rewritten.png": "it changed while it was read",
    }
    (folder / "later.png").unlink()
    result = own.search_folder(photographs, "a/1.png", None, reranking())
    assert sorted(result.table["photograph"]) == ["a/2.png", "b/1.JPG", "later.png"]
    assert len(result.pair("later.png")[0]) > 0


@pytest.mark.parametrize(
    ("query", "box", "message"),
    [
        ("a/9.png", None, "there is no query a/9.png .* one is a/1.png"),
        ("b/1.png", None, "do you mean a/1.png"),
        ("dot.png", None, "the query dot.png: 1 x 1"),
        ("a/1.png", (0, 0, 500, 90), "reaches outside"),
        ("a/1.png", (50, 0, 50, 90), "is empty"),
        ("a/1.png", (0, 0, 9, 90), "9 x 90 pixels is less than one patch"),
        ("a/1.png", (0, 0, 9), "four finite numbers"),
        ("a/1.png", (0, 0, float("nan"), 9), "four finite numbers"),
        ("a/1.png", (0, 0, 10**400, 9), "four finite numbers"),
    ],
)
def test_an_invalid_query_is_reported(folder, describer, query, box, message):
    write(folder / "dot.png", np.zeros((1, 1, 3), np.uint8))
    with pytest.raises(data_photographs.PhotographError, match=message):
        own.search_folder(describe(folder, describer), query, box, reranking())


def test_a_folder_with_only_the_query_is_refused(tmp_path, describer):
    write(tmp_path / "photos/a.png", texture(0))
    photographs = describe(tmp_path / "photos", describer)
    with pytest.raises(data_photographs.PhotographError, match="nothing but the query"):
        own.search_folder(photographs, "a.png", None, reranking())


def test_ranking_is_written(folder, describer, tmp_path):
    result = own.search_folder(describe(folder, describer), "a/1.png", None, reranking(top=1))
    lines = own.write_ranking(result, tmp_path / "ranking.csv").read_text().splitlines()
    assert lines[0] == "photograph,rank,global_rank,similarity,matches,inliers,evidence"
    assert lines[2].startswith("b/1.JPG,2,2,") and lines[2].endswith(",,")


def test_figures(folder, describer):
    result = own.search_folder(describe(folder, describer), "a/1.png", None, reranking())
    axes = run_figures.ranking_figure(result)
    assert axes.shape == (2, 8)
    assert axes[1, 1].get_title().startswith("1   a/2.png\n")
    assert run_figures.pair_figure(result, "a/2.png")[0].get_title().endswith("matches")
    plt.close("all")


# EXIF, and what leaves the project


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_features_return_to_the_stored_photograph(tmp_path, orientation, suffix):
    """A bright dot is found upright by OpenCV; `undo_orientation` must find it in the file."""
    stored = np.zeros((64, 96, 3), np.uint8)
    stored[20:24, 70:74] = 255  # its centre: (71.5, 21.5)
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a.{suffix}"
    PIL.Image.fromarray(stored).save(path, quality=100, exif=exif, tiffinfo=exif)
    upright = data_photographs.read_upright(path)
    assert data_photographs.read_oriented(path)[1] == orientation
    height, width = upright.shape[:2]
    y, x = (location.mean() for location in np.nonzero(upright[..., 0] > 128))
    none = np.ones(1, np.float32)
    features = LocalFeatures(
        # the input frame's origin is the corner: half a pixel from the first centre
        np.array([[x + 0.5, y + 0.5]], np.float32) / 2,
        none[:, None],
        none,
        none,
        (height // 2, width // 2),
        (0, 0, width, height),
        (height, width),
    )
    back = own_export.undo_orientation(features, orientation)
    np.testing.assert_allclose(back.original_keypoints(), [[71.5, 21.5]], atol=0.1)
    assert back.image_size == (64, 96) and back.box == (0, 0, 96, 64)


def test_pairs(folder, describer, tmp_path):
    photographs = describe(folder, describer)
    every = [("a/1.png", "a/2.png"), ("a/1.png", "b/1.JPG"), ("a/2.png", "b/1.JPG")]
    assert own_export.retrieval_pairs(photographs, 5) == every
    rows = photographs.descriptors
    best = [int(np.argsort(-(rows @ row), kind="stable")[1]) for row in rows]
    wanted = sorted({tuple(sorted((location, other))) for location, other in enumerate(best)})
    names = photographs.names
    assert own_export.retrieval_pairs(photographs, 1) == [(names[i], names[j]) for i, j in wanted]
    assert own_export.retrieval_pairs(photographs, 0) == []
    path = own_export.export_pairs(every[:2], tmp_path / "pairs.txt")
    assert path.read_text() == "a/1.png a/2.png\na/1.png b/1.JPG\n"
    with pytest.raises(data_photographs.PhotographError, match="'my castle.png' has a blank"):
        own_export.export_pairs([("a.png", "my castle.png")], tmp_path / "pairs.txt")
    with pytest.raises(data_photographs.PhotographError, match="'#1.png' begins .*rename it"):
        own_export.export_pairs([("a.png", "#1.png")], tmp_path / "pairs.txt")


def test_features_are_exported_for_hloc(folder, describer, tmp_path):
    photographs = describe(folder, describer)
    with h5py.File(own_export.export_features(photographs, tmp_path / "features.h5")) as file:
        assert set(file) == {"a", "b"} and set(file["a"]) == {"1.png", "2.png"}
        features = photographs.features("a/1.png")
        np.testing.assert_array_equal(file["a/1.png/keypoints"], features.original_keypoints())
        assert file["a/1.png/descriptors"].shape == (8, len(features))


# The command


def own_notebook(scratch) -> Path:
    """A notebook 08 that prints nothing and writes what it was given as a ranking."""
    parameters = (
        "run_dir: str = 'a'\nphotographs_folder: str = 'x'\nquery_image: str = 'y'\n"
        "query_box: list[int] | None = None\ntop: int = 20"
    )
    source = (
        "from vitgal import runs\nfrom pathlib import Path\n"
        "box = '-'.join(map(str, query_box))\n"
        "row = f'{Path(photographs_folder).name} {Path(query_image).name} {box} {top}'\n"
        "text = f'photograph,rank,similarity,inliers\\n{row},1,0.5,7\\nb.jpg,2,0.25,\\n'\n"
        "runs.write_text(runs.run_folder(run_dir) / 'own' / 'ranking.csv', text)"
    )
    return scratch("08_own_photos.ipynb", parameters, source).parent


def test_the_command_fills_in_the_notebook(scratch, tmp_path, folder, monkeypatch, capsys):
    """Folder and query are given from the current folder; the folder's name holds a colon."""
    folder.rename(tmp_path / "2019: Rome")
    monkeypatch.chdir(tmp_path)
    run = pipeline.run_own(
        Path("2019: Rome"),
        "a/1.png",
        "1, 2,30,40",
        overrides={"top": "3"},
        output=tmp_path / "b",
        notebooks=own_notebook(scratch),
        progress=False,
    )
    assert run == tmp_path / "b"
    lines = summary.own_summary(run).splitlines()
    assert lines[0].split() == ["rank", "photograph", "similarity", "inliers"]
    assert "2019: Rome 1.png 1-2-30-40 3" in lines[1]
    path = tmp_path / "2019: Rome"
    assert f"the query is {path}/a/1.png\n" in capsys.readouterr().err
    executed = nbformat.read(run / "notebooks/08_own_photos.ipynb", as_version=4)
    assert any(f'photographs_folder = "{path}"' in cell.source for cell in executed.cells)
    assert lines[1].endswith("7")
    assert lines[2].split() == ["2", "b.jpg", "0.25", "-"]
    assert len({len(line) for line in lines[:3]}) == 1


@pytest.mark.parametrize("box", ["1,2,x,4", "1.5,2,3,4"])
def test_a_box_that_is_no_box_stops_before_anything_starts(scratch, tmp_path, folder, box):
    with pytest.raises(SettingsError, match="query_box"):
        pipeline.run_own(folder, "a/1.png", box, notebooks=own_notebook(scratch), progress=False)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_folder_without_photographs_ends_with_1_and_a_short_message(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("x")
    arguments = ["own", str(tmp_path / "empty"), "--query", "a.jpg", "--output"]
    arguments += [str(tmp_path / "run"), "-p", "weights", str(tmp_path / "none.safetensors")]
    assert command_line.main(arguments) == 1
    record = capsys.readouterr().err
    assert "holds no photograph that can be read (1 files, such as notes.txt)" in record
    executed = nbformat.read(tmp_path / "run/notebooks/08_own_photos.ipynb", as_version=4)
    errors = [
        output
        for cell in executed.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]
    assert len(errors) == 1 and len(errors[0].traceback) == 1  # the message alone


@pytest.mark.slow
def test_the_finished_run_searches_the_bundled_photographs(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run / "autoencoder", tmp_path / "run/autoencoder")
    if (finished_run / "own").exists():
        shutil.copytree(finished_run / "own", tmp_path / "run/own")
    photographs = runs.checkout() / own_folder()
    arguments = ["own", str(photographs), "--query", "neuschwanstein/1.jpg"]
    arguments += ["--box", "200,60,620,400", "--output", str(tmp_path / "run")]
    assert command_line.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    (first,) = (line for line in lines if line.split()[:1] == ["1"])
    assert "neuschwanstein/2.jpg" in first
    (kept,) = (path for path in (tmp_path / "run/own").iterdir() if list(path.glob("*/*.npz")))
    assert len(list(kept.glob("*/*-200-60-620-400.npz"))) == 1
    assert len([path for path in kept.glob("*/*.npz") if "-" not in path.stem]) == 85


def own_folder() -> str:
    result = pipeline.declared(runs.checkout() / "notebooks" / pipeline.OWN)
    return result["photographs_folder"].default


def test_notebook_08_shares_the_defaults_of_the_chain():
    top = runs.checkout() / "notebooks"
    actual = pipeline.declared(top / pipeline.OWN)
    for path in pipeline.chain(top):
        for name, declaration in pipeline.declared(path).items():
            if name in actual and name != "top":  # a folder of one's own is small
                assert (actual[name].kind, actual[name].default) == (
                    (declaration.kind, declaration.default)
                ), name


def test_names_outside_the_terminals_encoding_are_escaped(tmp_path, monkeypatch):
    """A search that is done already: the command prints its table and returns 0."""
    table = "photograph,rank,similarity,inliers\nCafé 東京.jpg,1,0.5,7\n"
    runs.write_text(tmp_path / "own" / "ranking.csv", table)
    monkeypatch.setattr(pipeline, "run_own", lambda *_, **__: tmp_path)
    monkeypatch.setattr("vitgal.app.own.search_own", lambda *_, **__: (None, ["page: index.html"]))
    terminal = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert command_line.main(["own", "photos", "--query", "a.jpg"]) == 0
    assert "Caf\xe9 \\u6771" in terminal.buffer.getvalue().decode("latin-1")
