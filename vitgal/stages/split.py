"""The stage of notebook 01: a table of landmark photographs becomes a split."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from vitgal import runs
from vitgal.data.gldv2 import (
    _REMEDY,
    CLEAN,
    _check_images,
    exclude_images,
    overlap_audit,
    read_exclusions,
    read_landmark_table,
)
from vitgal.data.splits import (
    class_table,
    order_classes,
    retrieval_validation,
    split_landmarks,
    write_csv,
)


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
