"""Splits of landmark photographs: training, validation and retrieval validation."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.data.gldv2 import check_images, image_path, read_csv
from vitgal.data.revisited import GroundTruth
from vitgal.settings.sections import SplitSettings

PARTS = ("train", "val", "val_retrieval")


@dataclass(frozen=True, eq=False)
class LandmarkSplit:
    """Training and validation images of landmarks.

    `train` and `val` hold `path` (str) and `label` (int64), in order of label, within a class in
    the order of the landmark table. `landmarks` (L,) int64 is the landmark_id of every label. The
    labels of `train` are 0 .. C-1 without gaps; classes from C on are held out, wholly in `val`.
    """

    train: pd.DataFrame
    val: pd.DataFrame
    landmarks: np.ndarray

    @property
    def held_out(self) -> pd.DataFrame:
        """The validation images of classes that are not trained."""
        return _untrained(self.train, self.val)


def _untrained(train: pd.DataFrame, val: pd.DataFrame) -> pd.DataFrame:
    return val[val["label"] > train["label"].max()]


def split_landmarks(
    table: pd.DataFrame, *, val_share: float, held_out_classes: int = 0, seed: int = 0
) -> LandmarkSplit:
    """Splits a landmark table (`id`, `landmark_id`) by the published rule.

    The first image of each class is for training, each other one with probability `val_share` for
    validation. `held_out_classes` random classes of at least two images are for validation alone.

    ValueError: an empty table, a share outside [0, 1), or as `order_classes`.
    """
    if not 0 <= val_share < 1:
        raise ValueError(f"val_share must be at least 0 and below 1, not {val_share}")
    if not len(table):
        raise ValueError("the landmark table holds no image")
    landmarks = order_classes(table["landmark_id"], held_out_classes=held_out_classes, seed=seed)
    labels = pd.Index(landmarks).get_indexer(table["landmark_id"])
    order = np.argsort(labels, kind="stable")
    labels = labels[order]
    is_first = np.concatenate([[True], labels[1:] != labels[:-1]])
    # NOTE the published split is unseeded, and its sort leaves open which image is the first.
    drawn = (np.random.default_rng([seed, 0]).random(len(table)) < val_share)[order]
    in_val = (drawn & ~is_first) | (labels >= len(landmarks) - held_out_classes)
    ids = table["id"].to_numpy(dtype=object)[order]
    paths = np.array([image_path(image) for image in ids], dtype=object)
    train, val = (_part(paths[rows], labels[rows]) for rows in (~in_val, in_val))
    return LandmarkSplit(train, val, landmarks)


def _part(paths: Sequence[str], labels: Sequence[int]) -> pd.DataFrame:
    paths = pd.Series(paths, dtype=object)
    return pd.DataFrame({"path": paths, "label": np.asarray(labels, np.int64)})


def order_classes(
    landmarks: Sequence[int] | pd.Series, *, held_out_classes: int = 0, seed: int = 0
) -> np.ndarray:
    """Returns the landmark_id of every label: trained classes by landmark_id, then held-out ones.

    `landmarks` (N,) is the landmark_id of each image. ValueError where more classes are to be held
    out than have two images, or none would be left.
    """
    ids, sizes = np.unique(np.asarray(landmarks), return_counts=True)
    eligible = np.flatnonzero(sizes >= 2)
    if not 0 <= held_out_classes <= min(len(eligible), len(ids) - 1):
        raise ValueError(
            f"held_out_classes is {held_out_classes}, but of {len(ids)} classes {len(eligible)} "
            "have two images, and at least one class must be left to train"
        )
    drawn = np.random.default_rng([seed, 1]).choice(eligible, held_out_classes, replace=False)
    return np.concatenate([np.delete(ids, drawn), ids[np.sort(drawn)]])


def retrieval_validation(
    val: pd.DataFrame,
    *,
    queries: int,
    database: int,
    min_images: int = SplitSettings.min_val_images,
    seed: int = 0,
) -> pd.DataFrame:
    """Draws at most so many queries and database images from `val` (`path`, `label`).

    Queries are drawn from classes with at least `min_images` images, one of each class in turn, at
    most half of a class. The database is drawn in the same way from the other images of these
    classes, then from other classes.

    Returns:
        `path`, `label`, `role` ("query" or "database"), queries first, each part in val's order;
        empty for 0 queries.

    Raises:
        ValueError: no class is large enough, or the database smaller than the queries' classes.
    """
    if queries <= 0:
        return _with_roles(val, np.zeros(0, int), np.zeros(0, int))
    labels = val["label"].to_numpy()
    random_order = np.random.default_rng([seed, 2]).permutation(len(val))
    turns = _turns(labels, random_order)
    sizes = pd.Series(labels).groupby(labels).transform("size").to_numpy()
    rows = np.flatnonzero((sizes >= max(2, min_images)) & (turns < sizes // 2))
    if not len(rows):
        raise ValueError(
            f"no validation class has {max(2, min_images)} images to take queries from; lower "
            "min_val_images, hold out more classes, or set val_queries to 0"
        )
    query_rows = rows[np.lexsort((random_order[rows], turns[rows]))][:queries]
    classes = np.unique(labels[query_rows])
    if database < len(classes):
        raise ValueError(
            f"{len(query_rows)} queries of {len(classes)} classes need a database of at least "
            f"{len(classes)} images, not {database}: raise val_database or lower val_queries"
        )
    rest = np.setdiff1d(np.arange(len(val)), query_rows)
    turns = _turns(labels[rest], random_order[rest])  # renumbered: every query's class has a turn 0
    rest = rest[np.lexsort((random_order[rest], turns, ~np.isin(labels[rest], classes)))]
    return _with_roles(val, query_rows, rest[:database])


def _turns(labels: np.ndarray, random_order: np.ndarray) -> np.ndarray:
    """Numbers the images of each class from 0 in a random order."""
    return pd.Series(random_order).groupby(labels).rank().to_numpy().astype(np.int64) - 1


def _with_roles(val: pd.DataFrame, queries: np.ndarray, database: np.ndarray) -> pd.DataFrame:
    parts = [
        val.iloc[np.sort(rows)][["path", "label"]].assign(role=role)
        for role, rows in (("query", queries), ("database", database))
    ]
    return pd.concat(parts, ignore_index=True)


def validation_ground_truth(table: pd.DataFrame, boxes: np.ndarray | None = None) -> GroundTruth:
    """Returns the labels of a retrieval validation, with paths as names.

    Database images of a query's class are easy, all others negative. `boxes` (Q, 4) float64 is
    (x0, y0, x1, y1) in pixels; None: zeros, for use without images.
    """
    queries, database = (table[table["role"] == role] for role in ("query", "database"))
    rows_of_class = database.reset_index(drop=True).groupby("label").indices
    empty = np.zeros(0, np.int64)
    return GroundTruth(
        name="val_retrieval",
        database=database["path"].tolist(),
        queries=queries["path"].tolist(),
        boxes=np.zeros((len(queries), 4)) if boxes is None else boxes,
        easy=[np.asarray(rows_of_class.get(label, empty)) for label in queries["label"]],
        hard=[empty] * len(queries),
        junk=[empty] * len(queries),
    )


def class_table(split: LandmarkSplit) -> pd.DataFrame:
    """Returns a row a class: `label`, `landmark_id`, images in `train` and `val`, `held_out`."""
    table = pd.DataFrame({"label": np.arange(len(split.landmarks)), "landmark_id": split.landmarks})
    for name, part in (("train", split.train), ("val", split.val)):
        table[name] = np.bincount(part["label"], minlength=len(table))
    return table.assign(held_out=(table["train"] == 0).astype(int))


def read_split(folder: Path, part: str) -> pd.DataFrame:
    """Reads `path` (str), `label` (int64) of "train", "val" or "val_retrieval" in a split folder.

    "val_retrieval" also has `role` ("query" or "database").

    Raises:
        ValueError: another part, or a table that is damaged or whose paths lead out of the folder.
        FileNotFoundError: the folder has no such table.
    """
    if part not in PARTS:
        raise ValueError(f"there is no part {part!r} of a split; the parts are {', '.join(PARTS)}")
    path = Path(folder) / f"{part}.csv"
    table = _read_table(path)
    for column in ("path", "label", *(["role"] if part == "val_retrieval" else [])):
        if column not in table:
            raise ValueError(f"{path} has no column {column}: run notebook 01_data_split again")
    try:
        runs.refuse_outside("the image folder", table["path"].tolist())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return table


def _read_table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: run notebook 01_data_split first")
    return read_csv(path)


def split_statistics(folder: Path) -> pd.DataFrame:
    """Counts images and classes of each part of a split folder, one row a part.

    smallest, median and largest are images in a class (nan in an empty part), single the classes of
    one image; held_out is the part of val whose classes are not trained.
    """
    train, val, retrieval = (read_split(folder, part) for part in PARTS)
    parts = {
        "train": train,
        "val": val,
        "held_out": _untrained(train, val),
        "val_queries": retrieval[retrieval["role"] == "query"],
        "val_database": retrieval[retrieval["role"] == "database"],
    }
    rows = {}
    for name, part in parts.items():
        sizes = part["label"].value_counts()
        rows[name] = {
            "images": len(part),
            "classes": len(sizes),
            "smallest": sizes.min(),
            "median": sizes.median(),
            "largest": sizes.max(),
            "single": int((sizes == 1).sum()),
        }
    return pd.DataFrame(rows).T


def class_counts(folder: Path) -> pd.DataFrame:
    """Reads a split folder's classes.csv, see `class_table`."""
    return _read_table(Path(folder) / "classes.csv")


def overlap_report(folder: Path) -> str:
    """Describes the overlap audit of a split folder, in words and a table."""
    path = Path(folder) / "overlap.csv"
    if not path.is_file():
        return "no overlap table was given: overlap with the test sets is not audited"
    audit = read_csv(path)
    if audit.empty:
        return "no class of the table is known to overlap the test sets"
    audit["test_sets"] = audit["test_sets"].map(runs.printable)
    images = audit["images"].astype(int).sum()
    return (
        f"{len(audit)} classes with {images:,} images overlap the test sets:\n"
        f"{audit.to_string(index=False)}"
    )


def write_split_txt(path: Path, split: pd.DataFrame, *, prefix: str = "train/") -> Path:
    """Writes a part of a split in the published form: a line `<prefix><path> <label>` an image."""
    rows = zip(split["path"].tolist(), split["label"].tolist(), strict=True)
    return runs.write_text(path, "".join(f"{prefix}{image} {label}\n" for image, label in rows))


def read_split_txt(path: Path, *, prefix: str = "train/") -> pd.DataFrame:
    """Reads the published form: `path` without the prefix, `label`; paths may hold spaces.

    An empty file gives an empty table. ValueError names the first line that is not the prefix, a
    path, a space and a label.
    """
    lines = runs.read_lines(path)
    # NOTE the published reader cuts at every space and fails on a path that holds one.
    pattern = re.compile(re.escape(prefix) + r"(.+) ([0-9]{1,18})", re.DOTALL)
    rows = [pattern.fullmatch(line) for line in lines]
    if None in rows:
        number = rows.index(None)
        line = runs.short(lines[number])
        raise ValueError(f"{path}, line {number + 1}: expected `{prefix}<image> <label>`: {line}")
    return _part([row[1] for row in rows], [int(row[2]) for row in rows])


def sample_images(
    table: pd.DataFrame, image_folder: Path, *, classes: int, per_class: int
) -> list[tuple[str, Path]]:
    """Picks titles and files for a contact sheet, spread evenly over a table (`id`, `landmark_id`).

    At most `classes` x `per_class`, class by class. Raises as `check_images`.
    """
    groups = list(table.groupby("landmark_id")["id"])
    picked = []
    for index in np.linspace(0, len(groups) - 1, num=min(classes, len(groups)), dtype=int):
        landmark, ids = groups[index]
        rows = np.linspace(0, len(ids) - 1, num=min(per_class, len(ids)), dtype=int)
        picked += [(f"landmark {landmark}", image) for image in ids.iloc[rows]]
    check_images(image_folder, [image for _, image in picked])
    return [(title, Path(image_folder) / image_path(image)) for title, image in picked]
