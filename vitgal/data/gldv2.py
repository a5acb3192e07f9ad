"""Google Landmarks v2: its tables, its image folders, and lists of images to leave out."""

import os
import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

CLEAN = (1_580_470, 81_313)  # images and classes of the clean table, both of its forms
NOISY_IMAGES = 4_132_914
ID_CHARACTERS = re.compile(r"[0-9A-Za-z_-]*")
SHOWN = 3  # how many missing or repeated names an error lists
_REMEDY = (
    "use the Kaggle 2021 train.csv (id, landmark_id) or train_clean.csv (landmark_id, images), "
    f"which list {CLEAN[0]:,} images of {CLEAN[1]:,} classes"
)


def read_landmark_table(path: str | os.PathLike) -> pd.DataFrame:
    """Reads a table of landmark images: `id` (str), `landmark_id` (int64), in the file's order.

    Two forms are known by their columns: id, landmark_id (Kaggle 2021, and the demo), and
    landmark_id, images (`train_clean.csv`, ids separated by spaces). Further columns of the first
    form are dropped, but one named url marks the noisy table.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the noisy table, other columns, no image, a landmark_id that is no integer, an
            id listed twice, shorter than 3 characters or with other than letters, digits, _ and -.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no landmark table {path}; {_REMEDY}")
    columns = _columns(path)
    if "url" in columns:
        raise ValueError(
            f"{path} is the noisy table of all {NOISY_IMAGES:,} images (it has a url column), "
            f"not the clean one that training uses; {_REMEDY}"
        )
    if {"landmark_id", "images"} <= columns:
        table = _images_by_class(_read_csv(path, ["landmark_id", "images"]))
    elif {"id", "landmark_id"} <= columns:
        table = _read_csv(path, ["id", "landmark_id"])[["id", "landmark_id"]]
    else:
        raise ValueError(f"{path} has the columns {', '.join(sorted(columns))}; {_REMEDY}")
    if len(table) >= NOISY_IMAGES:
        raise ValueError(f"{path} lists {len(table):,} images, as the noisy table does; {_REMEDY}")
    _check_ids(table["id"], path)
    return table


def _columns(path: Path) -> set[str]:
    try:
        return set(pd.read_csv(path, nrows=0).columns)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no table ({error}); {_REMEDY}") from None


def _read_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    # An id such as 1e10000000000000 or nan is text. Plain objects: pandas' string type would check
    # all of them again at every selection.
    types = {name: np.int64 if name == "landmark_id" else object for name in columns}
    try:
        return pd.read_csv(path, usecols=columns, dtype=types, keep_default_na=False)
    except (ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from None


def _images_by_class(table: pd.DataFrame) -> pd.DataFrame:
    ids = [str(images).split() for images in table["images"]]
    return pd.DataFrame(
        {
            "id": pd.Series([image for images in ids for image in images], dtype=object),
            "landmark_id": np.repeat(table["landmark_id"].to_numpy(), [len(i) for i in ids]),
        }
    )


def _check_ids(ids: pd.Series, path: Path) -> None:
    if not len(ids):
        raise ValueError(f"{path} lists no image; {_REMEDY}")
    short = [image for image in ids if len(image) < 3]
    if short:
        raise ValueError(f"{path}: the id {short[0]!r} has fewer than the 3 characters of a path")
    if not ID_CHARACTERS.fullmatch("".join(ids)):
        strange = next(image for image in ids if not ID_CHARACTERS.fullmatch(image))
        raise ValueError(f"{path}: the id {strange!r} holds other than letters, digits, _ and -")
    twice = ids.duplicated().to_numpy()
    if twice.any():
        names = ", ".join(ids[twice].unique()[:SHOWN])
        raise ValueError(f"{path} lists {int(twice.sum()):,} ids more than once: {names}")


def image_path(image: str) -> str:
    """Where an image lies in the image folder: `a/b/c/<id>.jpg`, the id's first three letters."""
    return f"{image[0]}/{image[1]}/{image[2]}/{image}.jpg"


def missing_images(folder: Path, ids: Iterable[str]) -> list[str]:
    """The ids whose image is not in the folder, sorted.

    Lists each of the at most 4,096 leaf folders once: asking for 1.58 million files one by one
    would take minutes on a network disk.
    """
    missing = []
    for prefix, images in groupby(sorted(ids), key=lambda image: image[:3]):
        try:
            present = set(os.listdir(Path(folder, *prefix)))
        except (FileNotFoundError, NotADirectoryError):
            present = set()
        missing += [image for image in images if f"{image}.jpg" not in present]
    return missing


def _check_images(folder: Path, table: pd.DataFrame) -> None:
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no image folder {folder}; it is the one that holds 0/, 1/, ... f/ with "
            "images as a/b/c/<id>.jpg"
        )
    missing = missing_images(folder, table["id"])
    if missing:
        shown = ", ".join(image_path(image) for image in missing[:SHOWN])
        raise FileNotFoundError(
            f"{len(missing):,} of {len(table):,} listed images are not in {folder}, first {shown}; "
            "unpack every archive of the training set there (a/b/c/<id>.jpg), or list the missing "
            "ids in the exclude file"
        )


def read_exclusions(path: str | os.PathLike) -> list[str]:
    """Image or landmark ids from a text file, one a line; blank lines and # comments are skipped.

    Raises FileNotFoundError, and ValueError where it lists nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no exclude file {path}")
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    entries = [line for line in lines if line]
    if not entries:
        raise ValueError(f"the exclude file {path} lists no image and no landmark")
    return entries


def exclude_images(table: pd.DataFrame, entries: Iterable[str | int]) -> pd.DataFrame:
    """The table without the listed images and without every image of the listed landmarks.

    An entry that is an image's id names that image, else a landmark_id. ValueError names entries
    that are neither, since a mistyped list would let images through that were to be removed.
    """
    entries = [str(entry) for entry in entries]
    images = set(entries) & set(table["id"])
    others = [entry for entry in entries if entry not in images]
    known = set(np.unique(table["landmark_id"]).astype(str))
    unknown = [entry for entry in others if entry not in known]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(entries)} entries to exclude are neither an image id nor a "
            f"landmark_id of the table: {', '.join(unknown[:SHOWN])}"
        )
    classes = np.array([int(entry) for entry in others], np.int64)
    gone = table["id"].isin(images) | table["landmark_id"].isin(classes)
    return table[~gone].reset_index(drop=True)


def overlap_audit(table: pd.DataFrame, overlap: pd.DataFrame) -> pd.DataFrame:
    """Which of the table's classes are known to show landmarks of the test sets.

    Args:
        table: `id`, `landmark_id`.
        overlap: rows that name an image (`id`) or a class (`landmark_id`); `test_set` is optional.
    Returns:
        landmark_id, images (of the class, in the table), listed (of these, named by the overlap
        table, a class naming all), test_sets (joined by spaces); by landmark_id. Empty where
        nothing overlaps.
    Raises:
        ValueError: the overlap table has neither id nor landmark_id.
    """
    if not {"id", "landmark_id"} & set(overlap.columns):
        raise ValueError("the overlap table needs a column id or landmark_id")
    listed = overlap.assign(
        test_set=overlap["test_set"] if "test_set" in overlap else "",
        key=overlap["id"].astype(object) if "id" in overlap else overlap["landmark_id"],
    )
    on = "id" if "id" in overlap else "landmark_id"
    found = table.merge(listed[["key", "test_set"]], left_on=on, right_on="key")
    sizes = table["landmark_id"].value_counts()
    groups = found.groupby("landmark_id")
    audit = pd.DataFrame(
        {
            "listed": groups["id"].nunique(),
            "test_sets": groups["test_set"].agg(lambda sets: " ".join(sorted(set(sets) - {""}))),
        }
    ).reset_index()
    audit.insert(1, "images", sizes.reindex(audit["landmark_id"]).to_numpy())
    return audit
