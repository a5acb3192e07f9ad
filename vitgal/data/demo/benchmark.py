"""The demo's training views and its benchmark with labels."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.data.demo.drawing import QUERY_LEVEL, View, draw_view, query_box
from vitgal.data.demo.photographs import SAME_PLACE, Photograph
from vitgal.data.revisited import GroundTruth, write_ground_truth

EASY_VISIBLE, EASY_STRENGTH = 0.6, 0.45
JUNK_VISIBLE = 0.15
OTHER_VISIBLE, OTHER_STRENGTH = 0.5, 0.6  # beyond, two photographs share too little to tell
ASIDE_LEVEL = 0.5
TRAIN_ID_STEP = 37  # landmark ids of the training part are neither 0, 1, 2, ... nor contiguous


def train_path(name: str) -> Path:
    """Where a training view lies in the data folder."""
    return Path("train", name[0], name[1], name[2], f"{name}.jpg")


def jpg_path(name: str) -> Path:
    """Where a benchmark view, query or database, lies in the data folder."""
    return Path("benchmark", "jpg", f"{name}.jpg")


def training_recipes(
    photographs: Sequence[Photograph], views: int, *, seed: int, view_size: int
) -> list[View]:
    """The training part's recipes, named by 16 hexadecimal digits, in order of photograph."""
    made = []
    for photograph in photographs:
        for index in range(views):
            text = f"{seed}/{photograph.name}/{index}"
            made.append(
                draw_view(
                    photograph,
                    hashlib.sha256(text.encode()).hexdigest()[:16],
                    _level(index, views),
                    seed=_words(seed, "train", photograph.name, index),
                    view_size=view_size,
                )
            )
    return made


def benchmark_recipes(
    photographs: Sequence[Photograph], views: int, *, seed: int, view_size: int
) -> tuple[list[View], list[View]]:
    """The query recipes and `views` database recipes of each photograph.

    A photograph gives one query, the only one of its landmark two: two or three queries a landmark,
    so that those with several photographs do not decide the score alone.
    """
    size = {"view_size": view_size}
    landmarks = [photograph.landmark for photograph in photographs]
    queries, database = [], []
    for photograph in photographs:
        for index in range(2 if landmarks.count(photograph.landmark) == 1 else 1):
            words = _words(seed, "query", photograph.name, index)
            name = f"{photograph.name}_q{index}"
            queries.append(draw_view(photograph, name, QUERY_LEVEL, seed=words, **size))
        for index in range(views):
            aside = index > 0 and index == views - 1
            level = ASIDE_LEVEL if aside else _level(index, views - 1)
            words = _words(seed, "database", photograph.name, index)
            name = f"{photograph.name}_v{index:02d}"
            database.append(draw_view(photograph, name, level, seed=words, aside=aside, **size))
    return queries, database


def _level(index: int, views: int) -> float:
    """Spread evenly from mild to strong, so that every photograph has views of each kind."""
    return QUERY_LEVEL + (1 - QUERY_LEVEL) * index / max(1, views - 1)


def _words(seed: int, part: str, name: str, index: int) -> list[int]:
    digest = hashlib.sha256(f"{part}/{name}".encode()).digest()
    return [seed, int.from_bytes(digest[:8], "big"), index]


def label(query: View, view: View) -> str:
    """What a database view is for a query: "easy", "hard", "junk" or "wrong" (see `make_demo`)."""
    landmarks = {query.photograph.landmark, view.photograph.landmark}
    if len(landmarks) == 2:
        return "junk" if any(landmarks <= set(places) for places in SAME_PLACE) else "wrong"
    if query.photograph.name != view.photograph.name:
        kept = view.visible >= OTHER_VISIBLE and view.strength <= OTHER_STRENGTH
        return "hard" if kept else "junk"
    if view.visible < JUNK_VISIBLE:
        return "junk"
    easy = view.visible >= EASY_VISIBLE and view.strength <= EASY_STRENGTH
    return "easy" if easy else "hard"


def write_tables(
    folder: Path, training: Sequence[View], queries: Sequence[View], database: Sequence[View]
) -> None:
    """Writes TABLES below the data folder: train.csv, both views.csv and the ground truth."""
    landmarks = sorted({view.photograph.landmark for view in training})
    ids = {name: 1000 + TRAIN_ID_STEP * index for index, name in enumerate(landmarks)}
    rows = sorted((view.name, ids[view.photograph.landmark]) for view in training)
    table = pd.DataFrame(rows, columns=["id", "landmark_id"])
    runs.write_text(folder / "train.csv", table.to_csv(index=False))
    runs.write_text(folder / "views.csv", recipe_table(training).to_csv(index=False))
    recipes = recipe_table([*queries, *database])
    own = {query.photograph.name: query for query in queries}
    labels = [label(own[view.photograph.name], view) for view in database]
    recipes.insert(3, "label", ["query"] * len(queries) + labels)
    runs.write_text(folder / "benchmark" / "views.csv", recipes.to_csv(index=False))
    truth = ground_truth(queries, database)
    write_ground_truth(folder / "benchmark" / "gnd_demo.pkl", truth)


def recipe_table(views: Sequence[View]) -> pd.DataFrame:
    """One row a view: what was done to which photograph, whose it is and under which licence."""
    return pd.DataFrame(
        {
            "name": view.name,
            "landmark": view.photograph.landmark,
            "photograph": view.photograph.name,
            "visible": view.visible,
            "strength": view.strength,
            "tilt": round(view.tilt, 1),
            "rotation": round(view.rotation, 1),
            "window": view.window,
            "gain": round(view.light.gain, 3),
            "night": int(view.light.night),
            "grey": int(view.light.grey),
            "blur": round(view.light.blur, 2),
            "occluder": int(view.occluder is not None),
            "quality": view.light.quality,
            "author": view.photograph.author,
            "licence": view.photograph.licence,
            "source": view.photograph.source,
        }
        for view in views
    )


def ground_truth(queries: Sequence[View], database: Sequence[View]) -> GroundTruth:
    """The benchmark's ground truth: every query's box, and its labels by `label`."""
    labels = [[label(query, view) for view in database] for query in queries]
    found = {
        kind: [np.flatnonzero([given == kind for given in row]) for row in labels]
        for kind in ("easy", "hard", "junk")
    }
    return GroundTruth(
        name="demo",
        database=[view.name for view in database],
        queries=[view.name for view in queries],
        boxes=np.array([query_box(query) for query in queries]),
        **found,
    )


def sheet(
    folder: Path, landmarks: Sequence[str], views: int = 6
) -> dict[str, list[tuple[str, Path]]]:
    """Names and image files of each landmark's first `views` views, for a contact sheet.

    `folder` is `<run>/data`; the landmarks may be of either part. ValueError names one that the
    demo set does not hold.
    """
    folder, found = Path(folder), {}
    parts = [
        (pd.read_csv(folder / "benchmark" / "views.csv"), jpg_path),
        (pd.read_csv(folder / "views.csv", dtype={"name": str}), train_path),
    ]
    for landmark in landmarks:
        found[landmark] = [
            (name, folder / path(name))
            for table, path in parts
            for name in table.loc[table["landmark"] == landmark, "name"]
        ][:views]
        if not found[landmark]:
            raise ValueError(f"the demo set in {folder} has no landmark {landmark!r}")
    return found
