"""Makes the README's pictures from a finished demo run: `python docs/make_pictures.py [RUN]`.

Only public domain and CC0 photographs may appear in them: of the queries whose pictures show no
other, the gallery draws the first few with both right and wrong images, the failure the one that
reranking changed most, the matches the pair with most inliers.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from vitgal import runs
from vitgal.data import revisited
from vitgal.evaluation import tuning
from vitgal.features import store
from vitgal.stages import rerank
from vitgal.viz import figures, rankings, style
from vitgal.viz import tuning as viz_tuning

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
    draw_matches(run, benchmark, free, folder / "matches.jpg")
    draw_failure(run, benchmark, free, folder / "failure.jpg")
    found = tuning.Tuning.read(run / tuning.DATASET / "tuning")
    style.save(viz_tuning.draw(found), folder / "tuning.jpg", dpi=110, close=True)


def draw_gallery(
    run: Path, benchmark: revisited.RetrievalDataset, free: pd.Series, target: Path
) -> None:
    """Rankings of queries of which query and first images are free, most varied labels first."""
    truth = benchmark.ground_truth
    ranks = np.load(run / "demo" / "rerank" / "top_medium.npy")
    shown = []
    for query, name in enumerate(truth.queries):
        names = [name] + [benchmark.database[image] for image in ranks[:COLUMNS, query]]
        if free[names].all():
            labels = rankings.relevance(truth, query, ranks[:COLUMNS, query])
            shown.append((-len(set(labels)), query))
    queries = [query for _, query in sorted(shown)[:ROWS]]
    style.save(figures.rankings(benchmark, ranks, queries), target, dpi=110, close=True)


def draw_matches(
    run: Path, benchmark: revisited.RetrievalDataset, free: pd.Series, target: Path
) -> None:
    """The hard image that has most inliers among those whose photographs are free."""
    truth = benchmark.ground_truth
    options = runs.read_stage(run / "demo" / "rerank", "notebook 06_rerank")["parameters"]
    kept = ("max_distance", "estimator", "threshold", "iterations", "confidence", "seed")
    best = []
    for query, name in enumerate(truth.queries):
        counts = rerank.inlier_counts(run / "demo" / "rerank", query)
        for image in rerank.hard_candidates(run / "demo" / "rerank", truth, query):
            if free[[name, benchmark.database[image]]].all():
                best.append((counts[image], query, image))
    _, query, image = max(best)
    features = store.FeatureStore.open(run / "demo" / "local")
    axes = figures.pair(
        benchmark, features, query, image, max_lines=40, **{key: options[key] for key in kept}
    )
    style.save(axes, target, dpi=110, close=True)


def draw_failure(
    run: Path, benchmark: revisited.RetrievalDataset, free: pd.Series, target: Path
) -> None:
    """Before and after reranking, of the query that changed most among those that may be shown."""
    both = [np.load(run / "demo" / name) for name in ("global/ranks.npy", "rerank/top_medium.npy")]
    table = figures.failure_table(run, benchmark, "change")
    order = table["change"].abs().sort_values(ascending=False).index
    for query in order:
        images = np.concatenate([ranks[: COLUMNS - 2, query] for ranks in both])
        names = [benchmark.ground_truth.queries[query], *(benchmark.database[i] for i in images)]
        if free[names].all():
            figure = figures.failure_figure(run, benchmark, int(query), columns=COLUMNS - 2)
            style.save(figure.axes[0], target, dpi=110, close=True)
            return
    raise ValueError("no query whose rankings show public domain and CC0 photographs alone")


if __name__ == "__main__":
    main(*sys.argv[1:])
