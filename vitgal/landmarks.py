"""Google Landmarks v2: its tables, the training split, retrieval validation, the overlap audit.

A table has one row an image: `id` (str) and `landmark_id` (int64). A split has `path` (relative to
the image folder, `a/b/c/<id>.jpg`) and `label`. Labels 0 .. C-1 are the C classes that are trained,
in order of landmark_id; labels from C on are classes held out of training, known to validation
alone.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from vitgal import runs

CLEAN = (1_580_470, 81_313)  # images and classes of the clean table, both of its forms
NOISY_IMAGES = 4_132_914
PARTS = ("train", "val", "val_retrieval")
ID_CHARACTERS = re.compile(r"[0-9A-Za-z_-]*")
SHOWN = 3  # how many missing or repeated names an error lists
_REMEDY = (
    "use the Kaggle 2021 train.csv (id, landmark_id) or train_clean.csv (landmark_id, images), "
    f"which list {CLEAN[0]:,} images of {CLEAN[1]:,} classes"
)


# Tables


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


# The split


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


# The stage


def make_split(
    run: Path,
    *,
    train_table: Path,
    image_folder: Path,
    val_share: float = 0.2,
    held_out_classes: int = 0,
    exclude: Path | None = None,
    overlap_table: Path | None = None,
    val_queries: int = 1000,
    val_database: int = 20_000,
    min_val_images: int = 4,
    seed: int = 0,
    expected: Sequence[int] | None = CLEAN,
    overwrite: bool = False,
) -> Path:
    """Splits the training set, the stage `<run>/split`, and returns its folder.

    Writes train.csv, val.csv (path, label), val_retrieval.csv (path, label, role; of the held-out
    classes alone where there are any), classes.csv (label, landmark_id, images in train and val,
    held_out) and, with an overlap table, overlap.csv (see `overlap_audit`). Labels from the number
    of training classes on are held-out classes. Everything is checked before the stage begins.

    Args:
        image_folder: holds the images as a/b/c/<id>.jpg; every listed one must be there.
        exclude: text file of image and landmark ids to leave out (for one, the images that
            RGLDv2-clean removes since the test sets show them).
        overlap_table: CSV file with id or landmark_id, and optionally test_set.
        expected: numbers of images and classes that the table must list; None for any.
    Raises:
        FileNotFoundError: the table, the image folder or images are missing (first few and count).
        ValueError: see `read_landmark_table`, `split_landmarks`, `retrieval_validation`.
    """
    files = {"train_table": train_table, "exclude": exclude, "overlap_table": overlap_table}
    inputs = _fingerprints(files)
    options = {
        "val_share": val_share,
        "held_out_classes": held_out_classes,
        "val_queries": val_queries,
        "val_database": val_database,
        "min_val_images": min_val_images,
        "seed": seed,
    }
    folder = Path(run) / "split"
    tables = None
    if overwrite or not (folder / runs.MANIFEST).exists():
        tables = _make_tables(files, Path(image_folder), options, expected)
    with runs.stage(
        folder, "split", parameters=options, inputs=inputs, overwrite=overwrite
    ) as stage:
        if stage.finished:
            return stage.folder
        tables = tables or _make_tables(files, Path(image_folder), options, expected)
        for name, table in tables.items():
            write_csv(stage.folder / name, table)
        return stage.finish(tables, images={name: len(table) for name, table in tables.items()})


def _fingerprints(files: dict[str, Path | None]) -> dict[str, str]:
    given = {name: Path(path) for name, path in files.items() if path is not None}
    for name, path in given.items():
        if not path.is_file():
            raise FileNotFoundError(f"{name}: there is no file {path}")
    return {name: runs.fingerprint_file(path) for name, path in given.items()}


def _make_tables(
    files: dict[str, Path | None], image_folder: Path, options: dict, expected: Sequence[int] | None
) -> dict[str, pd.DataFrame]:
    table = read_landmark_table(files["train_table"])
    if expected is not None:
        _check_expected(table, expected, files["train_table"])
    if files["exclude"] is not None:
        table = exclude_images(table, read_exclusions(files["exclude"]))
    _check_images(image_folder, table)
    drawn = {key: options[key] for key in ("held_out_classes", "seed")}
    landmarks = order_classes(table["landmark_id"], **drawn)
    train, val = split_landmarks(table, val_share=options["val_share"], **drawn)
    trained = len(landmarks) - options["held_out_classes"]
    shown = val[val["label"] >= trained] if options["held_out_classes"] else val
    retrieval = retrieval_validation(
        shown,
        queries=options["val_queries"],
        database=options["val_database"],
        min_images=options["min_val_images"],
        seed=options["seed"],
    )
    tables = {"train.csv": train, "val.csv": val, "val_retrieval.csv": retrieval}
    tables["classes.csv"] = class_table(landmarks, train, val)
    if files["overlap_table"] is not None:
        overlap = pd.read_csv(files["overlap_table"], dtype={"id": str, "test_set": str})
        tables["overlap.csv"] = overlap_audit(table, overlap)
    return tables


def _check_expected(table: pd.DataFrame, expected: Sequence[int], path: Path) -> None:
    found = (len(table), int(table["landmark_id"].nunique()))
    if found != tuple(expected):
        raise ValueError(
            f"{path} lists {found[0]:,} images of {found[1]:,} classes where {expected[0]:,} of "
            f"{expected[1]:,} are expected; {_REMEDY}, or set the expected numbers (null for any)"
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


# Split files


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


# What notebook 01 shows


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
