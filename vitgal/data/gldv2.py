"""Google Landmarks v2: its tables, its image folder, and lists of images to leave out."""

import os
import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from vitgal import runs

CLEAN = (1_580_470, 81_313)  # images and classes of the clean table, in both of its forms
NOISY_IMAGES = 4_132_914
ID = re.compile(r"[0-9A-Za-z_-]{3,}")
_REMEDY = (
    "use the Kaggle 2021 train.csv (id, landmark_id) or train_clean.csv (landmark_id, images), "
    f"which list {CLEAN[0]:,} images of {CLEAN[1]:,} classes"
)


def read_landmark_table(path: str | os.PathLike) -> pd.DataFrame:
    """Reads `id` (str) and `landmark_id` (int64), one row an image in the file's order.

    There are two forms: id, landmark_id (Kaggle 2021 and the demo), and landmark_id, images
    (`train_clean.csv`, ids separated by spaces). A column url marks the noisy table.

    Raises FileNotFoundError, and ValueError for the noisy table, other columns, no image, a
    landmark_id that is not an integer, or an id that is repeated, shorter than 3 characters or not
    of letters, digits, _ and -.
    """
    path = _existing(path, "landmark table", f"; {_REMEDY}")
    try:
        table = _image_rows(path)
        if len(table) >= NOISY_IMAGES:
            raise ValueError(f"{path} lists {len(table):,} images, as the noisy table does")
        if not len(table):
            raise ValueError(f"{path} lists no image")
    except ValueError as error:
        raise ValueError(f"{error}; {_REMEDY}") from None
    _check_ids(table["id"], path)
    return table


def _existing(path: str | os.PathLike, kind: str, remedy: str = "") -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no {kind} {path}{remedy}")
    return Path(path)


def _image_rows(path: Path) -> pd.DataFrame:
    columns = set(read_csv(path, rows=0).columns)
    if "url" in columns:
        raise ValueError(
            f"{path} is the noisy table of all {NOISY_IMAGES:,} images (it has a url column), "
            "not the clean one that training uses"
        )
    if {"landmark_id", "images"} <= columns:
        table = read_csv(path, ["landmark_id", "images"])
        table["id"] = [str(images).split() for images in table.pop("images")]
        return table[["id", "landmark_id"]].explode("id", ignore_index=True).dropna()
    if {"id", "landmark_id"} <= columns:
        return read_csv(path, ["id", "landmark_id"])[["id", "landmark_id"]]
    raise ValueError(f"{path} has the columns {runs.abbreviate(sorted(columns), 9)}")


def read_csv(path: Path, columns: list[str] | None = None, rows: int | None = None) -> pd.DataFrame:
    """Reads a table of images; ValueError names a file that is none.

    Classes and labels are int64 and everything else but counts is text: an id may look like a
    number (1e10000000000000, nan).
    """
    # Plain objects: pandas' string type would check every id again at each selection.
    types = dict.fromkeys(("id", "images", "test_set", "path", "role"), object)
    types |= {"landmark_id": np.int64, "label": np.int64}
    try:
        encoding = runs.text_encoding(path)
        return pd.read_csv(
            path, usecols=columns, nrows=rows, dtype=types, keep_default_na=False, encoding=encoding
        )
    except (ValueError, OverflowError) as error:  # among them the errors of pandas' parser
        raise ValueError(
            f"{path} cannot be read as a table ({runs.printable(str(error)[:300])})"
        ) from None


def _check_ids(ids: pd.Series, path: Path) -> None:
    wrong = next((image for image in ids if not ID.fullmatch(image)), None)
    if wrong is not None:
        short = "fewer than the 3 characters of a path"
        fault = short if len(wrong) < 3 else "other than letters, digits, _ and -"
        raise ValueError(f"{path}: the id {runs.short(wrong)} has {fault}")
    repeated = ids.duplicated().to_numpy()
    if repeated.any():
        names = runs.abbreviate(ids[repeated].unique())
        raise ValueError(f"{path} lists {int(repeated.sum()):,} ids more than once: {names}")


def check_table_size(
    table: pd.DataFrame, path: Path, *, images: int | None, classes: int | None
) -> None:
    """Raises ValueError where a table has other numbers of images or classes; None: any number."""
    counts = (len(table), int(table["landmark_id"].nunique()))
    expected = (counts[0] if images is None else images, counts[1] if classes is None else classes)
    if counts != expected:
        raise ValueError(
            f"{path} lists {counts[0]:,} images of {counts[1]:,} classes, not {expected[0]:,} of "
            f"{expected[1]:,}; {_REMEDY}, or correct expected_images and expected_classes"
        )


def image_path(image: str) -> str:
    """Returns an image's path in the image folder: `a/b/c/<id>.jpg`, by the id's first letters."""
    return f"{image[0]}/{image[1]}/{image[2]}/{image}.jpg"


def missing_images(folder: Path, ids: Iterable[str]) -> list[str]:
    """Returns the ids whose image is not in the folder, sorted."""
    missing = []
    # Each of the at most 4,096 leaf folders is listed once: 1.58 million look-ups of single files
    # would take minutes on a network disk.
    for prefix, images in groupby(sorted(ids), key=lambda image: image[:3]):
        try:
            present = set(os.listdir(Path(folder, *prefix)))
        except (FileNotFoundError, NotADirectoryError):
            present = set()
        missing += [image for image in images if f"{image}.jpg" not in present]
    return missing


def check_images(folder: Path, ids: Iterable[str]) -> None:
    """Raises FileNotFoundError, with the remedy, where the folder or an image is missing."""
    folder, ids = Path(folder), list(ids)
    if not folder.is_dir():
        layout = "it is the one that holds 0/, 1/, ... f/ with images as a/b/c/<id>.jpg"
        raise FileNotFoundError(f"there is no image folder {folder}; {layout}")
    missing = missing_images(folder, ids)
    if missing:
        first = runs.abbreviate([image_path(image) for image in missing])
        raise FileNotFoundError(
            f"{len(missing):,} of {len(ids):,} listed images are not in {folder}: {first}; unpack "
            "every archive of the training set there (a/b/c/<id>.jpg), or list the missing ids in "
            "the exclude file"
        )


def read_exclusions(path: str | os.PathLike) -> list[str]:
    """Reads image or landmark ids from a text file, one a line, without # comments.

    Raises FileNotFoundError, and ValueError where the file is no text or lists nothing.
    """
    lines = runs.read_lines(_existing(path, "exclude file"))
    entries = [entry for line in lines if (entry := line.split("#")[0].strip())]
    if not entries:
        raise ValueError(f"the exclude file {path} lists no image and no landmark")
    return entries


def exclude_images(table: pd.DataFrame, entries: Iterable[str]) -> pd.DataFrame:
    """Returns the table without these images or landmarks; ValueError for unknown entries."""
    entries = list(entries)
    images = set(entries) & set(table["id"])
    classes = [entry for entry in entries if entry not in images]
    listed_classes = set(np.unique(table["landmark_id"]).astype(str))
    unknown = [entry for entry in classes if entry not in listed_classes]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(entries)} entries to exclude are neither an image id nor a "
            f"landmark_id of the table: {runs.abbreviate(unknown)}"
        )
    excluded = table["id"].isin(images)
    excluded |= table["landmark_id"].isin(np.array([int(entry) for entry in classes], np.int64))
    return table[~excluded].reset_index(drop=True)


def read_overlap(path: str | os.PathLike) -> pd.DataFrame:
    """Reads images (`id`) or else classes (`landmark_id`) of the test sets, and `test_set`.

    Raises FileNotFoundError, and ValueError where it is no table or has neither column.
    """
    columns = read_csv(_existing(path, "overlap table"), rows=0).columns
    key = next((name for name in ("id", "landmark_id") if name in columns), None)
    if key is None:
        raise ValueError(f"the overlap table {path} needs a column id or landmark_id")
    return read_csv(path, [key, *{"test_set"}.intersection(columns)])


def overlap_audit(table: pd.DataFrame, overlap: pd.DataFrame) -> pd.DataFrame:
    """Lists the classes of a table (`id`, `landmark_id`) that occur in test sets (`read_overlap`).

    Returns landmark_id, images (of the class, in the table), listed (those that the overlap table
    names; a class stands for all its images), test_sets (joined by spaces); by landmark_id.
    """
    key = "id" if "id" in overlap else "landmark_id"
    listed = overlap[[key]].assign(test_set=overlap.get("test_set", ""))
    groups = table.merge(listed, on=key).groupby("landmark_id")
    audit = pd.DataFrame(
        {
            "listed": groups["id"].nunique(),
            "test_sets": groups["test_set"].agg(lambda sets: " ".join(sorted(set(sets) - {""}))),
        }
    ).reset_index()
    sizes = table["landmark_id"].value_counts()
    audit.insert(1, "images", sizes.reindex(audit["landmark_id"]).to_numpy())
    return audit
