"""The demo's training views and its benchmark with labels."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.data.demo.photographs import SAME_SITE, Photograph
from vitgal.data.demo.views import QUERY_LEVEL, View, draw_view, query_box
from vitgal.data.revisited import GroundTruth, write_ground_truth
from vitgal.settings.sections import DemoSettings

BENCHMARK_VIEWS = 8  # database views of each photograph
EASY_VISIBLE, EASY_STRENGTH = 0.6, 0.45
JUNK_VISIBLE = 0.15
OTHER_VISIBLE, OTHER_STRENGTH = 0.5, 0.6  # beyond, two photographs have too little in common
ASIDE_LEVEL = 0.5
TRAIN_ID_STEP = 37  # landmark ids of the training part are neither 0, 1, 2, ... nor contiguous
TABLES = ("train.csv", "views.csv", "benchmark/views.csv", "benchmark/gnd_demo.pkl")


def training_recipes(photographs: Sequence[Photograph], settings: DemoSettings) -> list[View]:
    """Draws the training views, named by 16 hexadecimal digits, in order of photograph."""
    recipes = []
    for photograph in photographs:
        for index in range(settings.train_views):
            text = f"{settings.seed}/{photograph.name}/{index}"
            name = hashlib.sha256(text.encode()).hexdigest()[:16]
            level = _level(index, settings.train_views)
            recipes.append(_draw("train", photograph, index, name, level, settings))
    return recipes


def benchmark_recipes(
    photographs: Sequence[Photograph], settings: DemoSettings, views: int = BENCHMARK_VIEWS
) -> tuple[list[View], list[View]]:
    """Draws the query views and `views` database views of each photograph.

    A photograph gives one query, or two if it is the only one of its landmark. So every landmark
    has two or three queries and a similar weight in the score. The last of several database views
    is aimed past the landmark.
    """
    landmarks = [photograph.landmark for photograph in photographs]
    queries, database = [], []
    for photograph in photographs:
        for index in range(2 if landmarks.count(photograph.landmark) == 1 else 1):
            name = f"{photograph.name}_q{index}"
            queries.append(_draw("query", photograph, index, name, QUERY_LEVEL, settings))
        for index in range(views):
            aside = index > 0 and index == views - 1
            level = ASIDE_LEVEL if aside else _level(index, views - 1)
            name = f"{photograph.name}_v{index:02d}"
            database.append(_draw("database", photograph, index, name, level, settings, aside))
    return queries, database


def _level(index: int, views: int) -> float:
    """Spreads levels evenly from mild to strong: every photograph has views of all kinds."""
    return QUERY_LEVEL + (1 - QUERY_LEVEL) * index / max(1, views - 1)


def _draw(
    part: str,
    photograph: Photograph,
    index: int,
    name: str,
    level: float,
    settings: DemoSettings,
    aside: bool = False,
) -> View:
    digest = hashlib.sha256(f"{part}/{photograph.name}".encode()).digest()
    seed = [settings.seed, int.from_bytes(digest[:8], "big"), index]
    return draw_view(photograph, name, level, seed=seed, view_size=settings.view_size, aside=aside)


def label(query: View, view: View) -> str:
    """Returns a database view's label for a query: "easy", "hard", "junk" or "negative".

        easy      same photograph, at least 60 % of the landmark visible, strength at most 0.45
        hard      same photograph, at least 15 % visible, not easy; or another photograph of the
                  landmark, at least 50 % visible and strength at most 0.6
        junk      another view of the landmark; or one of a landmark at the same site (SAME_SITE)
        negative  a view of another landmark

    The visible part is the fraction of the landmark's box that lies inside the view and in front of
    its occluder. The strength is a weighted sum of tilt, rotation, zoom, night, loss of colour,
    exposure, white balance and blur.
    """
    landmarks = {query.photograph.landmark, view.photograph.landmark}
    if len(landmarks) == 2:
        return "junk" if any(landmarks <= site for site in SAME_SITE) else "negative"
    if query.photograph.name != view.photograph.name:
        is_clear = view.visible >= OTHER_VISIBLE and view.strength <= OTHER_STRENGTH
        return "hard" if is_clear else "junk"
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
    own_queries = {query.photograph.name: query for query in queries}
    labels = [label(own_queries[view.photograph.name], view) for view in database]
    recipes.insert(3, "label", ["query"] * len(queries) + labels)
    runs.write_text(folder / "benchmark" / "views.csv", recipes.to_csv(index=False))
    truth = ground_truth(queries, database)
    write_ground_truth(folder / "benchmark" / "gnd_demo.pkl", truth)


def recipe_table(views: Sequence[View]) -> pd.DataFrame:
    """Returns a row a view: its photograph and changes, and the photograph's author and licence."""
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
    """Returns the benchmark's ground truth: every query's box, and its labels by `label`."""
    labels = np.array([[label(query, view) for view in database] for query in queries])
    return GroundTruth(
        name="demo",
        database=[view.name for view in database],
        queries=[view.name for view in queries],
        boxes=np.array([query_box(query) for query in queries]),
        easy=[np.flatnonzero(row == "easy") for row in labels],
        hard=[np.flatnonzero(row == "hard") for row in labels],
        junk=[np.flatnonzero(row == "junk") for row in labels],
    )
