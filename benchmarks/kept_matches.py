"""How many features keep their nearest neighbour within a limit, on right and on wrong pairs.

    python benchmarks/kept_matches.py RUN FILE... [--limit 0.95] [--size 320] [--pairs 60]

RUN is a finished demo run: every query of its val_retrieval, whose landmarks are in no training, is
paired with one view of its landmark and one of another, drawn by seed 0. FILE are models with
an autoencoder; local features are the demo's. Printed per model: the fractions of the queries'
features whose nearest neighbour is within the limit, the same where the neighbour's nearest is the
feature (the demo's mutual matches), and the limit that 15 % on wrong pairs are within.
"""

import argparse
from pathlib import Path

import numpy as np

from vitgal import data, models


def drawn_pairs(run: Path, count: int) -> list[tuple[str, str, str]]:
    """Returns paths of a query, of another view of its landmark, and of another landmark."""
    table = data.read_split(run / "split", "val_retrieval")
    queries, database = (table[table["role"] == role] for role in ("query", "database"))
    rng, pairs = np.random.default_rng(0), []
    for path, label in zip(queries["path"], queries["label"], strict=True):
        same = (database["label"] == label).to_numpy()
        others = (rng.choice(database["path"][rows]) for rows in (same, ~same))
        pairs.append((path, *others))
    return [pairs[index] for index in rng.permutation(len(pairs))[:count]]


def nearest(query: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns (M, 2) of unit descriptors (M, C): distance to the nearest of (N, C), and if mutual.

    The second column is the distance, too, or infinite where the match is not mutual.
    """
    cosines = query @ other.T
    best = cosines.argmax(1)
    distances = np.sqrt(np.maximum(0, 2 - 2 * cosines.max(1)))
    mutual = cosines.argmax(0)[best] == np.arange(len(query))
    return np.stack([distances, np.where(mutual, distances, np.inf)], axis=1)


def main() -> None:
    """Prints a line per model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--limit", type=float, default=0.95)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--pairs", type=int, default=60)
    given = parser.parse_args()
    pairs = drawn_pairs(given.run, given.pairs)
    folder = given.run / "data" / "train"
    for file in given.files:
        model = models.load_model(file)
        features = {
            path: models.extract_local(
                model, data.read_image(folder / path), size=given.size
            ).descriptors
            for path in sorted({path for pair in pairs for path in pair})
        }
        right, wrong = (
            np.concatenate([nearest(features[pair[0]], features[pair[side]]) for pair in pairs])
            for side in (1, 2)
        )
        (kept, mutual), (kept_wrong, mutual_wrong) = (
            (part < given.limit).mean(0) for part in (right, wrong)
        )
        strict = np.quantile(wrong[:, 0], 0.15)
        print(
            f"{file.name}: {len(pairs)} pairs of each kind, {len(right)} features; within "
            f"{given.limit}: right {kept:.1%}, wrong {kept_wrong:.1%}, mutual {mutual:.1%} and "
            f"{mutual_wrong:.1%}; 15 % of the wrong within {strict:.3f}, right "
            f"{np.mean(right[:, 0] < strict):.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
