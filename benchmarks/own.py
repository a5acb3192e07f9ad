"""Own photographs: how well a folder is searched, beside SIFT with the ratio test, in one run.

    python benchmarks/own.py FOLDER [DISTRACTORS] [--run NAME] [--weights FILE] [-p SETTING VALUE]

FOLDER has one sub-folder per place; DISTRACTORS, if given, holds photographs of none of them. Every
photograph of a place is searched for among all others, the other photographs of its place being
right. Recall at 5 is the fraction of the right photographs, of five at most, among the first
five; average precision is the benchmark's; both are means over a place's queries, then over places.

Then: is the place in the folder? Every photograph, of a place or not, is a query, and the
probability of the best of the first twenty by similarity is compared with whether it shows the
place. The model was fitted to other photographs: the shipped one for the defaults, else one fitted
to --known, a folder with one sub-folder per place. And the folder is grouped into places by
the rule of `vitgal own --places`.

SIFT is the plain baseline: OpenCV's 1000 best keypoints of the photograph resized to the same area,
nearest neighbours with Lowe's ratio test at 0.8, and the same verification, against every
photograph; equal counts by file name.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from vitgal import runs
from vitgal.data.images import resize
from vitgal.data.photographs import read_upright
from vitgal.evaluation.protocol import average_precision
from vitgal.evaluation.statistics import bootstrap_interval
from vitgal.retrieval.presence import Presence
from vitgal.retrieval.verification import verify
from vitgal.settings import RerankingSettings, Values, reader, settings_of
from vitgal.stages import own, own_answers
from vitgal.stages.model_choice import own_models
from vitgal.stages.presence import fit_places, known_presence

RATIO = 0.8
FEATURES = 1000
SIFT_SIZE = 320  # pixels: the square root of the input's area
ASKED = 20  # first photographs by similarity whose probabilities are asked
SAME = [("giza_pyramids", "great_pyramid")]  # two folders of one place


def link_folders(folder: Path, distractors: Path | None, target: Path) -> Path:
    """Makes `target` a folder of links: `place/<place>/…` and `distractor/…`."""
    target.mkdir(parents=True, exist_ok=True)
    for source, name in ((folder, "place"), (distractors, "distractor")):
        if source is not None:
            (target / name).unlink(missing_ok=True)
            (target / name).symlink_to(source.resolve(), target_is_directory=True)
    return target


def shown_place(name: str) -> str | None:
    """Returns the place that a photograph shows; None for a distractor."""
    parts = Path(name).parts
    return parts[1] if parts[0] == "place" else None


class Sift:
    """SIFT features of every photograph, and the inliers of a pair."""

    def __init__(self, photographs: own.Photographs, size: int) -> None:
        detector = cv2.SIFT_create(FEATURES)
        self.features = {}
        for name in tqdm(photographs.names, desc="SIFT", unit="image"):
            image = read_upright(photographs.path(name))
            grey = cv2.cvtColor(resize(image, size, "area"), cv2.COLOR_RGB2GRAY)
            points, descriptors = detector.detectAndCompute(grey, None)
            keypoints = np.array([point.pt for point in points], np.float32).reshape(-1, 2)
            self.features[name] = keypoints, descriptors
        self.matcher = cv2.BFMatcher()

    def inliers(self, query: str, other: str) -> int:
        """Counts the inliers of two photographs."""
        (left, left_descriptors), (right, right_descriptors) = map(
            self.features.get, (query, other)
        )
        if left_descriptors is None or right_descriptors is None or len(right_descriptors) < 2:
            return 0
        nearest = self.matcher.knnMatch(left_descriptors, right_descriptors, k=2)
        passed = [best for best, second in nearest if best.distance < RATIO * second.distance]
        pairs = [(match.queryIdx, match.trainIdx) for match in passed]
        pairs = np.array(pairs, np.int64).reshape(-1, 2)
        return verify(left[pairs[:, 0]], right[pairs[:, 1]]).count

    def ranking(self, query: str) -> list[str]:
        """Ranks all other photographs by falling number of inliers."""
        others = [name for name in self.features if name != query]
        counts = np.array([self.inliers(query, other) for other in others])
        return [others[index] for index in np.argsort(-counts, kind="stable")]


def score(rankings: dict[str, list[str]]) -> dict[str, tuple[float, float]]:
    """Returns for each place the mean recall at 5 and mean average precision of its queries."""
    scores: dict[str, list] = {}
    for query, ranking in rankings.items():
        right = np.array([shown_place(name) == shown_place(query) for name in ranking])
        if right.any():
            recall = right[:5].sum() / min(5, right.sum())
            precision = average_precision(np.flatnonzero(right), int(right.sum()))
            scores.setdefault(shown_place(query), []).append((recall, precision))
    return {name: tuple(np.mean(values, axis=0)) for name, values in sorted(scores.items())}


def timed(queries: list[str], rank: Callable[[str], list[str]]) -> tuple[dict, float]:
    """Returns each query's ranking, and milliseconds of processor time a query."""
    start = time.process_time()
    rankings = {query: rank(query) for query in tqdm(queries, unit="query")}
    return rankings, 1000 * (time.process_time() - start) / max(1, len(queries))


def calibration_error(probabilities: np.ndarray, shown: np.ndarray) -> float:
    """Returns the expected calibration error over ten bins (Naeini et al., AAAI 2015)."""
    bins = np.minimum((np.asarray(probabilities) * 10).astype(int), 9)
    return np.abs(np.bincount(bins, probabilities - np.asarray(shown, float))).sum() / len(bins)


def pair_scores(groups: np.ndarray, true: np.ndarray) -> tuple[float, float, float]:
    """Returns precision, recall and F1 of the pairs in one group (N,); -1 is in none."""
    pairs = np.triu_indices(len(groups), 1)
    ends = [(labels[pairs[0]], labels[pairs[1]]) for labels in (groups, true)]
    named, wanted = ((first == second) & (first >= 0) for first, second in ends)
    both = (named & wanted).sum()
    return both / named.sum(), both / wanted.sum(), 2 * both / (named.sum() + wanted.sum())


def print_presence(tables: dict[str, pd.DataFrame], presence: Presence) -> None:
    """Prints how well probabilities tell whether a query's place is there; tables: by query."""
    best, right, there, pairs, shown = [], [], [], [], []
    for query, table in tables.items():
        verified, place = table[table["global_rank"] <= ASKED], shown_place(query)
        evidence = verified["evidence"].to_numpy(np.int64)
        probabilities = presence.probabilities(verified["similarity"], evidence)
        same = [place is not None and shown_place(name) == place for name in verified["photograph"]]
        best.append(probabilities.max())
        right.append(same[int(probabilities.argmax())])
        there.append(place is not None)
        pairs += probabilities.tolist()
        shown += same
    best, right, there = np.array(best), np.array(right), np.array(there)
    called = best >= presence.threshold
    print(
        f"is it there: {there.sum()} queries of places, {(~there).sum()} of none: AUROC "
        f"{roc_auc_score(there, best):.4f}, calibration error {calibration_error(best, right):.3f} "
        f"of the best result, {calibration_error(pairs, shown):.3f} of all {len(pairs)} verified; "
        f"threshold {presence.threshold:.2f}: precision {right[called].mean():.3f}, recall "
        f"{(right & called).sum() / there.sum():.3f} (fit: {presence.precision:.3f}, "
        f"{presence.recall:.3f} on {presence.pairs} pairs)"
    )


def read_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("distractors", type=Path, nargs="?")
    parser.add_argument("--run", default="demo", help="the run with the model")
    parser.add_argument("--weights")
    parser.add_argument("--top", type=int, default=50)
    parser.add_argument("-p", dest="set", nargs=2, action="append", default=[])
    parser.add_argument("--without-sift", action="store_true")
    parser.add_argument("--known", type=Path, default=Path("third_party/landmarks"))
    return parser.parse_args()


def main() -> None:
    """Describes, searches and prints the table."""
    options = read_options()
    run = runs.run_folder(options.run)
    models = own_models(run, options.weights)
    print(models.reason)
    given = {"threads": 1, "top": options.top}
    typed = reader.from_command_line(dict(options.set), {})
    whole = models.complete(settings_of(Values.of(given, "this benchmark") | typed))
    describer = models.describer(run, whole)
    settings = whole.reranking
    # Counts that are kept from a run before would make the times those of a second search.
    shutil.rmtree(describer.folder / "pairs", ignore_errors=True)
    folder = link_folders(options.folder, options.distractors, run / "own" / "benchmark")
    start = time.perf_counter()
    photographs = own.describe_folder(folder, describer)
    seconds = time.perf_counter() - start
    queries = [name for name in photographs.names if shown_place(name)]
    print(
        f"{len(photographs.names)} photographs, {len(queries)} queries; described "
        f"{photographs.extracted} in {seconds:.1f} s"
    )
    tables = {}
    presence = known_presence(describer, settings)
    if presence is None:
        presence = fit_places(own.describe_folder(options.known, describer), settings, SAME)
        print("fitted:", presence)

    def rerank(query: str) -> list[str]:
        tables[query] = own.search_folder(photographs, query, None, settings, presence).table
        return tables[query]["photograph"].tolist()

    reranked = timed(queries, rerank)
    by_similarity = {
        query: table.sort_values("global_rank")["photograph"].tolist()
        for query, table in tables.items()
    }
    systems = {
        "global": (by_similarity, float("nan")),
        f"{settings.order}, top {settings.top}": reranked,
    }
    if not options.without_sift:
        systems["SIFT"] = timed(queries, Sift(photographs, SIFT_SIZE).ranking)
    report({name: (score(rankings), spent) for name, (rankings, spent) in systems.items()})
    settings = replace(settings, top=min(ASKED, settings.top))
    timed([name for name in photographs.names if name not in tables], rerank)
    print_presence(tables, presence)
    print_places(photographs, whole.reranking, presence)


def print_places(
    photographs: own.Photographs, settings: RerankingSettings, presence: Presence
) -> None:
    """Prints how well the folder is grouped into places, over pairs of photographs."""
    asked = own_answers.named_queries(photographs)
    answers = own_answers.answer(photographs, asked, settings, presence)
    places = own_answers.find_places(answers)
    found = np.full(len(photographs.names), -1)
    for number, place in enumerate(places):
        found[place.members] = number
    shown = pd.Series(photographs.names).map(shown_place)
    precision, recall, f1 = pair_scores(found, pd.factorize(shown)[0])  # a distractor is -1
    print(
        f"places: {shown.nunique()} in the folder, {len(places)} found with "
        f"{sorted((len(place.members) for place in places), reverse=True)} photographs; pairs: "
        f"precision {precision:.3f}, recall {recall:.3f}, F1 {f1:.3f}"
    )


def report(systems: dict[str, tuple[dict, float]]) -> None:
    """Prints recall at 5 and AP of every place and their means, in percent."""
    places = list(next(iter(systems.values()))[0])
    width = max(len("mean over places"), *map(len, places))
    print(" " * width + "".join(f"  {name:>18}" for name in systems))
    print(" " * width + "".join(f"  {'R@5':>9}{'AP':>9}" for _ in systems))
    for name in places:
        cells = (scores[name] for scores, _ in systems.values())
        print(f"{name:<{width}}" + "".join(f"  {100 * r:9.1f}{100 * p:9.1f}" for r, p in cells))
    means = (np.mean(list(scores.values()), axis=0) for scores, _ in systems.values())
    print(
        f"{'mean over places':<{width}}"
        + "".join(f"  {100 * r:9.1f}{100 * p:9.1f}" for r, p in means)
    )
    cells = ""
    for scores, _ in systems.values():
        for column in np.array(list(scores.values())).T:
            low, high = bootstrap_interval(column)  # over places, which are few
            cells += f"{f'{100 * low:.0f}-{100 * high:.0f}':>9}"
        cells += "  "
    print(f"{'95 % interval':<{width}}  {cells}")
    spent = ("" if value != value else f"{value:.0f} ms a query" for _, value in systems.values())
    print(" " * width + "".join(f"  {text:>18}" for text in spent))


if __name__ == "__main__":
    main()
