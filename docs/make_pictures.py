"""Makes the README's pictures from a finished demo run: `python docs/make_pictures.py [RUN]`.

Only public domain and CC0 photographs may appear in them. Of the queries whose pictures show no
other, the gallery draws the first few with both right and wrong images, the failure the one with
the most wrong images in front, the matches the pair of different photographs with most inliers.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from playwright.sync_api import sync_playwright

from vitgal import runs, stages, viz
from vitgal.data import revisited
from vitgal.evaluation import tuning
from vitgal.features import store
from vitgal.retrieval.ranking import Ranking
from vitgal.settings import RerankingSettings

FREE = {"Public Domain", "CC0-1.0"}
COLUMNS = 8
ROWS = 3


def main(run_dir: str = "demo") -> None:
    run = runs.run_folder(run_dir)
    benchmark = revisited.open_dataset("demo", run / "data" / "benchmark")
    views = pd.read_csv(run / "data" / "benchmark" / "views.csv", index_col="name")
    free = views["licence"].isin(FREE)
    folder = Path(__file__).parent
    draw_gallery(run, benchmark, free, folder / "gallery.jpg")
    pair = free_pair(run, benchmark, free, views["photograph"])
    draw_matches(run, benchmark, pair, folder / "matches.jpg")
    draw_instrument(run, benchmark, pair, folder / "instrument.jpg")
    draw_failure(run, benchmark, free, folder / "failure.jpg")
    tuned = tuning.Tuning.read(run / tuning.DATASET / "tuning")
    viz.save_figure(viz.tuning_figure(tuned), folder / "tuning.jpg", dpi=110, close=True)


def draw_gallery(
    run: Path, benchmark: revisited.RetrievalDataset, free: pd.Series, target: Path
) -> None:
    """Draws rankings of queries of which query and first images are free, most labels first."""
    truth = benchmark.ground_truth
    order = Ranking.load(run / "demo" / "rerank", "medium").order
    candidates = []
    for query, name in enumerate(truth.queries):
        images = order[:COLUMNS, query]
        if free[[name, *(benchmark.database[image] for image in images)]].all():
            labels = revisited.relevance_labels(truth, query, images)
            candidates.append((-len(set(labels)), query))
    queries = [query for _, query in sorted(candidates)[:ROWS]]
    axes = viz.ranking_gallery(benchmark, order, queries)
    viz.save_figure(axes, target, dpi=110, close=True)


def free_pair(
    run: Path, benchmark: revisited.RetrievalDataset, free: pd.Series, photographs: pd.Series
) -> tuple[int, int]:
    """Returns query and image of most inliers among hard ones of two free photographs."""
    truth, folder = benchmark.ground_truth, run / "demo" / "rerank"
    pairs = []
    for query, name in enumerate(truth.queries):
        counts = stages.inlier_counts(folder, query)
        for image in stages.hard_candidates(folder, truth, query):
            names = [name, benchmark.database[image]]
            if free[names].all() and photographs[names].nunique() == 2:
                pairs.append((counts[image], query, image))
    _, query, image = max(pairs)
    return query, image


def draw_matches(
    run: Path, benchmark: revisited.RetrievalDataset, pair: tuple[int, int], target: Path
) -> None:
    """Draws the matches of a query and an image."""
    parameters = runs.read_stage(run / "demo" / "rerank", "notebook 06_rerank")["parameters"]
    features = store.FeatureStore.open(run / "demo" / "local")
    settings = RerankingSettings.from_manifest(parameters)
    axes = viz.pair_matches(benchmark, features, *pair, settings, max_lines=40)
    viz.save_figure(axes, target, dpi=110, close=True)


def draw_instrument(
    run: Path, benchmark: revisited.RetrievalDataset, pair: tuple[int, int], target: Path
) -> None:
    """Takes a picture of the report's view of a pair in the system's Chromium."""
    query, image = pair
    name = benchmark.database[image]
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as engine:
        page = viz.write_report([run], Path(scratch) / "report")
        browser = engine.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        window = browser.new_page(viewport={"width": 1200, "height": 890})
        window.goto(f"{page.as_uri()}#view=ranking&protocol=hard&query={query}")
        window.locator("section", has_text="After reranking").get_by_title(name).click()
        window.wait_for_function("document.querySelectorAll('.crops canvas').length === 3")
        pixels = np.frombuffer(window.screenshot(), np.uint8)
        browser.close()
    cv2.imwrite(str(target), cv2.imdecode(pixels, cv2.IMREAD_COLOR), [cv2.IMWRITE_JPEG_QUALITY, 85])


def draw_failure(
    run: Path, benchmark: revisited.RetrievalDataset, free: pd.Series, target: Path
) -> None:
    """Draws the free query with the most wrong images in front after reranking under Hard."""
    truth = benchmark.ground_truth
    rankings = [
        Ranking.load(run / "demo" / "global"),
        Ranking.load(run / "demo" / "rerank", "hard"),
    ]
    failures = []
    for query, name in enumerate(truth.queries):
        orders = [ranking.order[:, query] for ranking in rankings]
        rows = [order[~np.isin(order, truth.easy[query])][: COLUMNS - 2] for order in orders]
        names = [name, *(benchmark.database[image] for image in np.concatenate(rows))]
        if free[names].all():
            wrong = revisited.relevance_labels(truth, query, rows[1]).count("negative")
            failures.append((-wrong, query))
    if not failures:
        raise ValueError("no query whose rankings show public domain and CC0 photographs alone")
    query = min(failures)[1]
    figure = viz.failure_figure(run, benchmark, query, "hard", columns=COLUMNS - 2)
    viz.save_figure(figure.axes[0], target, dpi=110, close=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
