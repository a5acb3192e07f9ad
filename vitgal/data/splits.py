"""Splits of landmark photographs: training, validation and retrieval validation."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.data.gldv2 import _check_images, exclude_images, image_path
from vitgal.data.revisited import GroundTruth

PARTS = ("train", "val", "val_retrieval")


def split_landmarks(
    table: pd.DataFrame,
    *,
    val_share: float = 0.2,
    seed: int = 0,
    exclude: Iterable[str | int] | None = None,
    held_out_classes: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Splits a landmark table into training and validation images by the published rule.

    The first image of each class trains; every other one validates with probability `val_share`.
    `held_out_classes` classes of at least two images, drawn by the seed, validate wholly and are
    not trained: their labels follow those of the trained classes.

    Args:
        table: `id`, `landmark_id`, as `read_landmark_table` gives it.
        exclude: image or landmark ids to leave out first, see `exclude_images`.
    Returns:
        train, val: `path` (str), `label` (int64), in order of label, within a class in the table's
        order. The labels of `train` are 0 .. C-1 without gaps, C = its number of classes.
    Raises:
        ValueError: an empty table, a share outside [0, 1), no class left to train, more classes
            held out than there are with two images.
    """
    if not 0 <= val_share < 1:
        raise ValueError(f"val_share must be at least 0 and below 1, not {val_share}")
    if exclude is not None:
        table = exclude_images(table, exclude)
    if not len(table):
        raise ValueError("the landmark table holds no image")
    landmarks = order_classes(table["landmark_id"], held_out_classes=held_out_classes, seed=seed)
    label = pd.Index(landmarks).get_indexer(table["landmark_id"])
    order = np.argsort(label, kind="stable")
    label = label[order]
    first = np.concatenate([[True], label[1:] != label[:-1]])
    # NOTE the published split is unseeded, and its sort leaves open which image is the first.
    drawn = (np.random.default_rng([seed, 0]).random(len(table)) < val_share)[order]
    validates = (drawn & ~first) | (label >= len(landmarks) - held_out_classes)
    ids = table["id"].to_numpy(dtype=object)[order]
    paths = np.array([image_path(image) for image in ids], dtype=object)
    return _split_table(paths, label, ~validates), _split_table(paths, label, validates)


def _split_table(paths: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> pd.DataFrame:
    path = pd.Series(paths[rows], dtype=object)
    return pd.DataFrame({"path": path, "label": labels[rows].astype(np.int64)})


def order_classes(
    landmarks: Sequence[int] | pd.Series, *, held_out_classes: int = 0, seed: int = 0
) -> np.ndarray:
    """The landmark_id of every label: the trained classes by landmark_id, then those held out.

    `landmarks` is one landmark_id an image. ValueError where more classes are to be held out than
    have two images, or none would be left to train.
    """
    ids, sizes = np.unique(np.asarray(landmarks), return_counts=True)
    eligible = np.flatnonzero(sizes >= 2)
    if not 0 <= held_out_classes <= min(len(eligible), len(ids) - 1):
        raise ValueError(
            f"held_out_classes is {held_out_classes}, but of {len(ids)} classes {len(eligible)} "
            "have two images, and at least one class must be left to train"
        )
    rng = np.random.default_rng([seed, 1])
    out = np.zeros(len(ids), bool)
    out[rng.choice(eligible, held_out_classes, replace=False)] = True
    return np.concatenate([ids[~out], ids[out]])


def retrieval_validation(
    val: pd.DataFrame, *, queries: int, database: int, min_images: int = 4, seed: int = 0
) -> pd.DataFrame:
    """Draws queries and a database from validation images, to follow mAP during training.

    Queries come from classes with at least `min_images` images, one of each class in turn, at most
    half of a class; no image is both. The database takes the rest of the queries' classes first
    (one of each class in turn), then other images.

    Args:
        val: `path`, `label`.
        queries, database: how many at most; 0 queries give an empty table.
    Returns:
        `path`, `label`, `role` ("query" or "database"), queries first, each part in val's order.
    Raises:
        ValueError: queries are asked for and no class is large enough, or the database is smaller
            than the number of the queries' classes.
    """
    if queries <= 0:
        return val.iloc[:0].assign(role=pd.Series(dtype=object)).reset_index(drop=True)
    labels = val["label"].to_numpy()
    rng = np.random.default_rng([seed, 2])
    chance = rng.permutation(len(val))
    turn = _turns(labels, chance)
    size = pd.Series(labels).groupby(labels).transform("size").to_numpy()
    asked = np.flatnonzero((size >= max(2, min_images)) & (turn < size // 2))
    if not len(asked):
        raise ValueError(
            f"no validation class has {max(2, min_images)} images to take queries from; lower "
            "min_val_images, hold out more classes, or set val_queries to 0"
        )
    asked = asked[np.lexsort((chance[asked], turn[asked]))][:queries]
    classes = np.unique(labels[asked])
    if database < len(classes):
        raise ValueError(
            f"{len(asked)} queries of {len(classes)} classes need a database of at least "
            f"{len(classes)} images, not {database}: raise val_database or lower val_queries"
        )
    rest = np.setdiff1d(np.arange(len(val)), asked)
    turn = _turns(labels[rest], chance[rest])  # anew: now every query's class has a turn 0
    rest = rest[np.lexsort((chance[rest], turn, ~np.isin(labels[rest], classes)))]
    return _roles(val, asked, rest[:database])


def _turns(labels: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Each image's place within its class, in order of `chance`."""
    return pd.Series(chance).groupby(labels).rank().to_numpy().astype(np.int64) - 1


def _roles(val: pd.DataFrame, queries: np.ndarray, database: np.ndarray) -> pd.DataFrame:
    parts = [
        val.iloc[np.sort(rows)][["path", "label"]].assign(role=role)
        for role, rows in (("query", queries), ("database", database))
    ]
    return pd.concat(parts, ignore_index=True)


def validation_ground_truth(table: pd.DataFrame, boxes: np.ndarray | None = None) -> GroundTruth:
    """Returns the labels of a retrieval validation: database images of a query's class are easy.

    Nothing is hard or junk; every other database image is negative.

    Args:
        table: `path`, `label`, `role`, as `retrieval_validation` gives it; the paths become names.
        boxes: (Q, 4) float64, (x0, y0, x1, y1) in pixels; None: zeros, for use without images.
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


def class_table(landmarks: np.ndarray, train: pd.DataFrame, val: pd.DataFrame) -> pd.DataFrame:
    """One row a class: `label`, `landmark_id`, images in `train` and `val`, `held_out` (0 or 1).

    `landmarks` is the landmark_id of every label, as `order_classes` gives it.
    """
    train_count, val_count = (
        np.bincount(part["label"], minlength=len(landmarks)) for part in (train, val)
    )
    return pd.DataFrame(
        {
            "label": np.arange(len(landmarks)),
            "landmark_id": landmarks,
            "train": train_count,
            "val": val_count,
            "held_out": (train_count == 0).astype(int),
        }
    )


def write_csv(path: Path, table: pd.DataFrame) -> Path:
    """Writes a table of a split as CSV, atomically; its text fields hold no comma and no quote."""
    columns = [table[name].tolist() for name in table.columns]
    line = ",".join(["%s"] * len(columns)) + "\n"
    rows = (line % row for row in zip(*columns, strict=True))
    return _write_lines(path, line % tuple(table.columns), rows)


def _write_lines(path: Path, head: str, lines: Iterable[str]) -> Path:
    with runs.atomic(Path(path)) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        handle.write(head)
        handle.writelines(lines)
    return Path(path)


def read_split(folder: Path, part: str) -> pd.DataFrame:
    """One table of a split folder: "train", "val" or "val_retrieval".

    `path` (str), `label` (int64), for "val_retrieval" also `role` ("query" or "database").
    Raises ValueError for another part, FileNotFoundError where the folder has no such table.
    """
    if part not in PARTS:
        raise ValueError(f"there is no part {part!r} of a split; the parts are {', '.join(PARTS)}")
    return _read_part(Path(folder) / f"{part}.csv")


def _read_part(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: run notebook 01_data_split first")
    types = {"path": object, "role": object, "label": np.int64}
    return pd.read_csv(path, dtype=types, keep_default_na=False)


def split_statistics(folder: Path) -> pd.DataFrame:
    """Images and classes of each part of a split folder, one row a part.

    Rows train, val, held_out (validation images of classes that are not trained), val_queries and
    val_database; columns images, classes, smallest, median, largest (images in a class; nan in an
    empty part), single (classes of one image). `classes` of the row train is the number of labels
    that a classifier needs.
    """
    train, val, retrieval = (read_split(folder, part) for part in PARTS)
    trained = int(train["label"].max()) + 1
    parts = {
        "train": train,
        "val": val,
        "held_out": val[val["label"] >= trained],
        "val_queries": retrieval[retrieval["role"] == "query"],
        "val_database": retrieval[retrieval["role"] == "database"],
    }
    return pd.DataFrame({name: _statistics(part) for name, part in parts.items()}).T


def _statistics(part: pd.DataFrame) -> pd.Series:
    sizes = part["label"].value_counts()
    return pd.Series(
        {
            "images": len(part),
            "classes": len(sizes),
            "smallest": sizes.min(),
            "median": sizes.median(),
            "largest": sizes.max(),
            "single": int((sizes == 1).sum()),
        }
    )


def class_counts(folder: Path) -> pd.DataFrame:
    """A split folder's classes.csv: label, landmark_id, images in train and val, held_out."""
    return _read_part(Path(folder) / "classes.csv")


def write_split_txt(path: Path, split: pd.DataFrame, *, prefix: str = "train/") -> Path:
    """Writes a split in the published form: a line `path label` an image.

    `prefix` goes before every path: the published list is relative to the folder above the images.
    """
    rows = zip(split["path"].tolist(), split["label"].tolist(), strict=True)
    return _write_lines(path, "", (f"{prefix}{image} {label}\n" for image, label in rows))


def read_split_txt(path: Path, *, prefix: str = "train/") -> pd.DataFrame:
    """Reads the published form: `path` without the prefix, `label`; paths may hold spaces.

    Raises FileNotFoundError, and ValueError naming the first line that is no `path label` or whose
    path does not begin with the prefix. An empty file gives an empty table.
    """
    with open(path, encoding="utf-8") as handle:
        rows = list(_split_lines(handle, path, prefix))
    paths = pd.Series([image for image, _ in rows], dtype=object)
    return pd.DataFrame({"path": paths, "label": np.array([label for _, label in rows], np.int64)})


def _split_lines(lines: Iterable[str], path: Path, prefix: str) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(lines, 1):
        # NOTE the published reader cuts at every space and fails on a path that holds one.
        image, _, label = line.rstrip("\r\n").rpartition(" ")
        if not image.startswith(prefix) or not image or not label.isdecimal():
            raise ValueError(f"{path}, line {number}: expected `{prefix}<image> <label>`: {line!r}")
        yield image[len(prefix) :], int(label)


def sample_images(
    table: pd.DataFrame, image_folder: Path, *, classes: int, per_class: int
) -> list[tuple[str, Path]]:
    """Titles and files of some images of some classes, both spread evenly over the table.

    table: `id`, `landmark_id`. Returns up to `classes` x `per_class` pairs, class by class; classes
    with too few images give those that they have. An empty table gives none. Raises
    FileNotFoundError, with what to do, where the folder or one of these images is not there.
    """
    groups = list(table.groupby("landmark_id")["id"])
    chosen = []
    for place in np.linspace(0, len(groups) - 1, num=min(classes, len(groups)), dtype=int):
        landmark, ids = groups[place]
        picked = np.linspace(0, len(ids) - 1, num=min(per_class, len(ids)), dtype=int)
        chosen += [(landmark, image) for image in ids.iloc[picked]]
    _check_images(image_folder, pd.DataFrame(chosen, columns=["landmark_id", "id"]))
    return [(f"landmark {mark}", Path(image_folder) / image_path(image)) for mark, image in chosen]


def overlap_report(folder: Path) -> str:
    """What the overlap audit of a split folder found, in words and a table."""
    if not (Path(folder) / "overlap.csv").is_file():
        return "no overlap table was given: overlap with the test sets is not audited"
    audit = _read_part(Path(folder) / "overlap.csv")
    if audit.empty:
        return "no class of the table is known to overlap the test sets"
    summary = f"{len(audit)} classes with {audit['images'].sum():,} images overlap the test sets"
    return f"{summary}:\n{audit.to_string(index=False)}"
