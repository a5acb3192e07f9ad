"""The stage of notebook 01: a table of landmark photographs becomes a split."""

from pathlib import Path

import pandas as pd

from vitgal import runs
from vitgal.data import gldv2, splits
from vitgal.settings.sections import SplitSettings


def make_split(
    run: Path,
    settings: SplitSettings,
    *,
    train_table: Path,
    image_folder: Path,
    overwrite: bool = False,
) -> Path:
    """Splits the training set, the stage `<run>/split`, and returns its folder.

    Writes train.csv, val.csv (path, label), val_retrieval.csv (path, label, role; of the held-out
    classes alone where there are any), classes.csv (label, landmark_id, images in train and val,
    held_out) and, with an overlap table, overlap.csv (see `gldv2.overlap_audit`). Labels from the
    number of training classes on are held-out classes. All checks come before the stage begins.

    train_table: see `gldv2.read_landmark_table`. image_folder: holds every listed image as
    a/b/c/<id>.jpg. Raises FileNotFoundError where a table or images are missing, ValueError for a
    table that is refused or cannot be split with these settings.
    """
    paths = {"train_table": Path(train_table)}
    for name in ("exclude", "overlap_table"):
        if (path := getattr(settings, name)) is not None:
            paths[name] = runs.resolve(path)
    folder = Path(run) / "split"
    tables = None
    if overwrite or not (folder / runs.MANIFEST).exists():
        tables = _make_tables(settings, paths, Path(image_folder))
    inputs = {name: runs.file_input(path) for name, path in paths.items()}
    with runs.stage(
        folder, "split", parameters=settings.compared(), inputs=inputs, overwrite=overwrite
    ) as stage:
        if stage.finished:
            return stage.folder
        tables = tables or _make_tables(settings, paths, Path(image_folder))
        for name, table in tables.items():
            runs.write_text(stage.folder / name, table.to_csv(index=False))
        images = {name: len(table) for name, table in tables.items()}
        return stage.finish(tables, {"images": images})


def _make_tables(
    settings: SplitSettings, paths: dict[str, Path], image_folder: Path
) -> dict[str, pd.DataFrame]:
    """Returns the tables to write by file name; `paths` holds the input tables by setting."""
    table = gldv2.read_landmark_table(paths["train_table"])
    gldv2.check_table_size(
        table,
        paths["train_table"],
        images=settings.expected_images,
        classes=settings.expected_classes,
    )
    overlap = gldv2.read_overlap(paths["overlap_table"]) if "overlap_table" in paths else None
    if "exclude" in paths:
        table = gldv2.exclude_images(table, gldv2.read_exclusions(paths["exclude"]))
    gldv2.check_images(image_folder, table["id"])
    split = splits.split_landmarks(
        table,
        val_share=settings.val_share,
        held_out_classes=settings.held_out_classes,
        seed=settings.seed,
    )
    retrieval = splits.retrieval_validation(
        split.held_out if settings.held_out_classes else split.val,
        queries=settings.val_queries,
        database=settings.val_database,
        min_images=settings.min_val_images,
        seed=settings.seed,
    )
    tables = {"train.csv": split.train, "val.csv": split.val, "val_retrieval.csv": retrieval}
    tables["classes.csv"] = splits.class_table(split)
    if overlap is not None:
        tables["overlap.csv"] = gldv2.overlap_audit(table, overlap)
    return tables
